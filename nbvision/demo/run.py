"""The main job, from compressed files to answers, and the figures that judge it."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbvision.demo.catalogue import Catalogue, Photograph, make_catalogue, product_of
from nbvision.demo.metrics import match_objects, mean_average_precision, mean_mask_iou, paste_mask, recall_at
from nbvision.demo.report import Match, Row, draw_report
from nbvision.indexing import index_files
from nbvision.recognizer import Recognition, Recognizer, StageTimes
from nbvision.runtime.device import Device
from nbvision.search import Hits, Index

if TYPE_CHECKING:
    from nbvision.console import Console

__all__ = ["LOADING", "WEAK_SIMILARITY", "DemoFigures", "models_directory", "run_demo"]

LOADING = "loading the models, compiling the kernels: half a minute or so, the first time"

# Of the shipped models. In two of the demo's shops, 353 objects asked for, the nearest picture of the same product was
# more similar than this for 98 % of them (median 0.91), that of another product for none (median 0.29, 99 % under 0.5).
WEAK_SIMILARITY = 0.55

REPORT_ROWS = 3
ANSWERS = 4


def models_directory() -> Path:
    """Where the shipped models are."""
    return Path(str(resources.files("nbvision.demo"))) / "models"


@dataclass(frozen=True)
class DemoFigures:
    """What ``nbvision demo --json`` writes. Rates are images (objects for crop, mask, embed, search) a second."""

    device: Device
    runtime: str
    precision: str
    images: int
    products: int
    queries: int
    map_50: float
    mask_iou: float
    recall_at_1: float
    recall_at_5: float
    images_per_second: dict[str, float]
    errors_by_kind: dict[str, int]
    seconds: float


def run_demo(
    directory: Path,
    console: Console,
    *,
    device: Device | None = None,
    precision: Any = "fp32",
    products: int = 120,
    photographs: int = 3,
    queries: int = 90,
    seed: int = 0,
) -> DemoFigures:
    """Make a catalogue in ``directory``, index it, query it, judge the answers; leaves ``report.png`` there.

    Parameters
    ----------
    directory : Path
    console : Console
        Where progress and tables go.
    device : {"cpu", "cuda"}, optional
    precision : {"fp32", "fp16"}
    products, photographs, queries : int
        Size of the catalogue: products, photographs of each, query scenes.
    seed : int
    """
    started = time.perf_counter()
    with console.progress("drawing the catalogue", products * photographs + queries) as advance:
        catalogue = make_catalogue(
            directory, products=products, photographs=photographs, queries=queries, seed=seed, on_image=advance
        )
    with console.status(LOADING):
        recognizer = Recognizer.load(models_directory(), device=device, precision=precision)
        recognizer.recognize([catalogue.photographs[0].path])

    times = StageTimes()
    judge = _Judge()
    index, errors = _index_catalogue(catalogue, directory / "index", recognizer, judge, times, console)
    answers = list(_query(catalogue, index, recognizer, judge, times, console))
    figures = DemoFigures(
        device=recognizer.device,
        runtime=recognizer.detector.runtime,
        precision=recognizer.detector.precision,
        images=len(catalogue.files),
        products=products,
        queries=queries,
        map_50=judge.map_50,
        mask_iou=judge.mask_iou,
        recall_at_1=recall_at(1, judge.ranked, judge.wanted),
        recall_at_5=recall_at(5, judge.ranked, judge.wanted),
        images_per_second=times.per_second(),
        errors_by_kind=dict(sorted(errors.items())),
        seconds=time.perf_counter() - started,
    )
    rows = [_report_row(answer, recognizer, catalogue) for answer in _most_varied(answers, REPORT_ROWS)]
    title = f"nbvision demo: {queries} scenes, {products} products"
    title += f" - recall@1 {figures.recall_at_1:.3f}, mAP@0.5 {figures.map_50:.3f}"
    draw_report(rows, directory / "report.png", title=title)
    return figures


def _index_catalogue(
    catalogue: Catalogue, path: Path, recognizer: Recognizer, judge: _Judge, times: StageTimes, console: Console
) -> tuple[Index, Counter[str]]:
    index = Index(recognizer.dimension, model=recognizer.digest)
    errors: Counter[str] = Counter()
    scenes = {photograph.path: photograph.scene for photograph in catalogue.photographs}
    with console.progress("indexing the catalogue", len(catalogue.files)) as advance:
        for batch, found in index_files(index, recognizer, catalogue.files, root=catalogue.shelf, times=times):
            for number, (file, error) in enumerate(zip(batch, found.errors, strict=True)):
                if error is not None:
                    errors[error.kind] += 1
                if file in scenes:
                    judge.see(found, number, scenes[file])
                advance()
    index.save(path)
    return Index.load(path, model=recognizer.digest), errors


def _query(
    catalogue: Catalogue, index: Index, recognizer: Recognizer, judge: _Judge, times: StageTimes, console: Console
) -> Iterator[_Answer]:
    """Ask with each query scene alone."""
    # So many photographs show five different products, whichever they are.
    deep_enough = 5 * len(catalogue.photographs) // len(catalogue.products)
    with console.progress("querying", len(catalogue.queries)) as advance:
        for query in catalogue.queries:
            found = recognizer.recognize([query.path], times=times)
            with times.stage("search", "cpu", items=len(found)):
                hits = index.search(found.vectors, k=deep_enough)
            matches = judge.see(found, 0, query.scene)
            judge.rank(query, matches, hits)
            advance()
            yield _Answer(query, found, hits, matches)


@dataclass(frozen=True)
class _Answer:
    """A query, what was found in it, the nearest photographs of each detection, and object -> detection."""

    query: Photograph
    found: Recognition
    hits: Hits
    matches: dict[int, int]


def _most_varied(answers: Iterable[_Answer], count: int) -> list[_Answer]:
    """The queries that show most: garments of classes not yet shown, then many garments.

    Chosen by what was drawn, never by what was found: the picture must not look better than the models are.
    """
    rest, chosen, seen = list(answers), list[_Answer](), set[int]()
    while rest and len(chosen) < count:
        labels = [set(answer.query.scene.class_indices.tolist()) for answer in rest]
        best = max(range(len(rest)), key=lambda i: (len(labels[i] - seen), len(rest[i].query.scene.class_indices)))
        seen |= labels[best]
        chosen.append(rest.pop(best))
    return chosen


class _Judge:
    """Collects what the metrics need, image by image."""

    def __init__(self) -> None:
        self._scored: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        self._objects: Counter[int] = Counter()
        self._masks: list[float] = []
        self.ranked: list[list[str]] = []
        self.wanted: list[str] = []

    def see(self, found: Recognition, image: int, scene: Any) -> dict[int, int]:
        """Judge one image; returns object of the scene -> detection."""
        matches = match_objects(found, image, scene)
        right = set(matches.values())
        self._objects.update(int(label) for label in scene.class_indices)
        for detection in found.of_image(image):
            self._scored[int(found.labels[detection])].append((float(found.scores[detection]), int(detection) in right))
        for number, detection in matches.items():
            pasted = paste_mask(found.masks[detection], found.crop_geometry, detection, scene.image.shape[:2])
            self._masks.append(mean_mask_iou([(pasted, scene.masks[number])]))
        return matches

    def rank(self, query: Photograph, matches: dict[int, int], hits: Hits) -> None:
        """Note the products ranked for each object of a query; a missed object has an empty ranking."""
        for number, product in enumerate(query.scene.product_ids):
            names = hits.ids[matches[number]] if number in matches else []
            self.ranked.append([product_of(name) for name in names])
            self.wanted.append(product)

    @property
    def map_50(self) -> float:
        return mean_average_precision(self._scored, self._objects)

    @property
    def mask_iou(self) -> float:
        return float(np.mean(self._masks)) if self._masks else 0.0


def _report_row(answer: _Answer, recognizer: Recognizer, catalogue: Catalogue) -> Row:
    found, scene = answer.found, answer.query.scene
    wanted = {detection: scene.product_ids[number] for number, detection in answer.matches.items()}

    def match(detection: int, name: str, score: float) -> Match:
        product = product_of(name)
        return Match(catalogue.shelf / name, _short(product, catalogue), score, right=product == wanted.get(detection))

    return Row(
        image=scene.image,
        boxes=found.boxes,
        masks=[paste_mask(mask, found.crop_geometry, i, scene.image.shape[:2]) for i, mask in enumerate(found.masks)],
        captions=[
            f"{recognizer.classes[label]} {score:.2f}" for label, score in zip(found.labels, found.scores, strict=True)
        ],
        matches=[
            [match(detection, name, float(score)) for name, score in list(zip(names, scores, strict=True))[:ANSWERS]]
            for detection, (names, scores) in enumerate(zip(answer.hits.ids, answer.hits.scores, strict=True))
        ],
    )


def _short(product: str, catalogue: Catalogue) -> str:
    """``dress-9000042`` as people want to read it: ``dress 42``, counted from the catalogue's first product."""
    kind, _, number = product.rpartition("-")
    return f"{kind} {int(number) - catalogue.products[0].seed}"


def figures_as_json(figures: DemoFigures) -> str:
    """The figures as ``--json`` writes them."""
    return json.dumps(asdict(figures), indent=2) + "\n"
