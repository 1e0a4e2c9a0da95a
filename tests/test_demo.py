"""The demo: its metrics against values computed by hand, its catalogue, and a small run from files to figures."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nbvision.codecs import decode
from nbvision.console import Console
from nbvision.demo.catalogue import Catalogue, make_catalogue, product_of
from nbvision.demo.garments import draw_scene, make_products
from nbvision.demo.metrics import match_objects, mean_average_precision, mean_mask_iou, paste_mask, recall_at
from nbvision.demo.run import LOADING, DemoFigures, figures_as_json, models_directory, run_demo
from nbvision.errors import InputError
from nbvision.image import ImageBatch
from nbvision.ops.geometry import Geometry
from nbvision.ops.preprocess import Preprocess
from nbvision.recognizer import Recognition

HIT, MISS = True, False
TRAINING = Path(__file__).parents[1] / "examples" / "train_demo_models.py"
README = Path(__file__).parents[1] / "README.md"


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scored", "objects", "expected"),
    [
        ([(0.9, HIT), (0.8, HIT)], 2, 1.0),
        ([(0.9, HIT), (0.8, MISS), (0.7, HIT)], 2, 1 / 2 * 1 + 1 / 2 * 2 / 3),
        ([(0.7, HIT), (0.9, HIT), (0.8, MISS)], 2, 1 / 2 * 1 + 1 / 2 * 2 / 3),  # the order given does not matter
        ([(0.9, HIT), (0.8, MISS)], 1, 1.0),  # a miss after the last hit costs nothing
        ([(0.9, MISS), (0.8, HIT)], 1, 1 / 2),
        ([(0.9, MISS), (0.8, HIT), (0.7, HIT)], 2, 2 / 3),  # the envelope lifts the first hit to 2/3
        ([(0.9, HIT)], 4, 1 / 4),  # three objects never found
        ([(0.9, MISS)], 1, 0.0),
        ([], 3, 0.0),
    ],
)
def test_average_precision(scored: list[tuple[float, bool]], objects: int, expected: float) -> None:
    assert mean_average_precision({4: scored}, {4: objects}) == pytest.approx(expected)


def test_mean_average_precision_is_over_the_classes_that_occur() -> None:
    scored = {0: [(0.9, HIT)], 1: [(0.9, MISS), (0.8, HIT)], 5: [(0.9, MISS)]}
    assert mean_average_precision(scored, {0: 1, 1: 1, 2: 3}) == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_mask_iou() -> None:
    left, top, none = np.zeros((3, 4, 4), bool)
    left[:, :2] = True
    top[:2] = True
    assert mean_mask_iou([(left, left)]) == 1
    assert mean_mask_iou([(left, top)]) == pytest.approx(4 / 12)
    assert mean_mask_iou([(left, none)]) == 0
    assert mean_mask_iou([(left, left), (left, top), (left, none)]) == pytest.approx((1 + 1 / 3) / 3)
    assert mean_mask_iou([(none, none)]) == mean_mask_iou([]) == 0


def test_recall_counts_different_products() -> None:
    ranked = [["a", "a", "a", "b", "c"], ["c", "b", "b"], []]
    assert recall_at(1, ranked, ["a", "c", "a"]) == pytest.approx(2 / 3)
    assert recall_at(1, ranked, ["b", "b", "b"]) == 0
    assert recall_at(2, ranked, ["b", "b", "b"]) == pytest.approx(2 / 3)  # b is the second product of the first ranking
    assert recall_at(2, ranked, ["c", "c", "c"]) == pytest.approx(1 / 3)
    assert recall_at(3, ranked, ["c", "c", "c"]) == pytest.approx(2 / 3)
    assert recall_at(5, [], []) == 0


def geometry_of(box: tuple[float, float, float, float], canvas: int) -> Geometry:
    """Where the pipeline puts the crop of ``box``, of an image of 20 rows and 30 columns."""
    batch = ImageBatch.from_arrays([np.zeros((20, 30, 3), np.uint8)])
    crop = Preprocess((canvas, canvas), fit="stretch")
    return crop(batch, boxes=np.array([box], np.float32), box_images=np.array([0]))[1]


def test_paste_mask_places_a_full_mask_on_its_box() -> None:
    pasted = paste_mask(np.ones((4, 4), bool), geometry_of((5, 2, 25, 14), 4), 0, (20, 30))
    expected = np.zeros((20, 30), bool)
    expected[2:14, 5:25] = True
    np.testing.assert_array_equal(pasted, expected)


def test_paste_mask_enlarges_each_pixel() -> None:
    mask = np.array([[1, 0], [0, 1]], bool)
    pasted = paste_mask(mask, geometry_of((10, 4, 18, 10), 2), 0, (20, 30))
    expected = np.zeros((20, 30), bool)
    expected[4:7, 10:14] = True
    expected[7:10, 14:18] = True
    np.testing.assert_array_equal(pasted, expected)


def test_paste_mask_shrinks_to_the_nearest_pixel() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    pasted = paste_mask(mask, geometry_of((0, 0, 4, 4), 8), 0, (20, 30))
    assert np.argwhere(pasted).tolist() == [[row, column] for row in range(4) for column in (2, 3)]


def test_match_objects_wants_class_and_overlap_and_gives_each_object_once() -> None:
    scene = draw_scene(
        make_products(1, seed=9),
        background=np.full((120, 160, 3), 90, np.uint8),
        size=(240, 320),
        rng=np.random.default_rng(0),
    )
    box, label = np.float32(scene.boxes[0]), int(scene.class_indices[0])
    away = box + np.float32(box[2] - box[0])
    found = [  # image, box, label; best first
        (1, box, label),  # of another image
        (0, box, label + 1),
        (0, away, label),
        (0, box + np.float32(1), label),
        (0, box, label),  # the object is taken
    ]
    count = len(found)
    recognition = Recognition(
        errors=(None, None),
        images=np.array([image for image, _, _ in found]),
        boxes=np.array([place for _, place, _ in found], np.float32),
        mask_boxes=np.zeros((count, 4), np.float32),
        masks=np.zeros((count, 4, 4), bool),
        crop_geometry=Geometry(
            np.zeros((count, 12), np.int32), np.zeros((count, 4), np.int64), np.zeros((count, 6), np.float32), "cpu"
        ),
        scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
        labels=np.array([label for _, _, label in found], np.int32),
        vectors=np.zeros((count, 8), np.float32),
    )
    assert match_objects(recognition, 0, scene) == {0: 3}
    assert match_objects(recognition, 1, scene) == {0: 0}


# --- the catalogue ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return make_catalogue(tmp_path_factory.mktemp("shop"), products=8, photographs=2, queries=5, seed=0)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_same_seed_same_files(tmp_path: Path) -> None:
    for name, seed in [("first", 1), ("again", 1), ("other", 2)]:
        make_catalogue(tmp_path / name, products=3, photographs=1, queries=2, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert len(first) == 3 + 2 + 5
    assert first == again
    assert not set(first.values()) & set(other.values()) - {b"", b"<html>404 Not Found</html>" * 40}


def test_catalogue_has_what_it_says(catalogue: Catalogue) -> None:
    assert len(catalogue.photographs) == 8 * 2
    assert len(catalogue.queries) == 5
    assert len(catalogue.files) == 16 + 5
    assert catalogue.files == sorted(catalogue.files)
    for photograph in catalogue.photographs:
        assert photograph.scene.product_ids == (product_of(photograph.path),)
    for query in catalogue.queries:
        assert set(query.scene.product_ids) <= {product.id for product in catalogue.products}


def test_every_format_is_there_and_decodes_to_its_scene(catalogue: Catalogue) -> None:
    images = [*catalogue.photographs, *catalogue.queries]
    kinds = set()
    for image in images:
        with Image.open(image.path) as opened:
            kinds.add((opened.format, bool(opened.info.get("progressive"))))
    assert kinds == {("JPEG", False), ("JPEG", True), ("PNG", False), ("WEBP", False)}
    batch = decode([image.path for image in images], device="cpu")
    assert batch.errors == (None,) * len(images)
    for number, image in enumerate(images):
        difference = np.abs(batch[number].astype(int) - image.scene.image)
        assert difference.mean() == 0 if image.path.suffix == ".png" else difference.mean() < 8


def test_broken_files_are_broken_as_named(catalogue: Catalogue) -> None:
    errors = decode(list(catalogue.broken), device="cpu").errors
    assert {path.name: error and error.kind for path, error in zip(catalogue.broken, errors, strict=True)} == {
        "broken-cut_0.jpg": "truncated",
        "broken-cut_1.png": "truncated",
        "broken-empty_0.jpg": "empty",
        "broken-text_0.jpg": "not_an_image",
        "broken-huge_0.jpg": "too_large",
    }


def test_fewer_products_than_a_scene_can_show(tmp_path: Path) -> None:
    catalogue = make_catalogue(tmp_path, products=1, photographs=1, queries=6, seed=0)
    assert [query.scene.product_ids for query in catalogue.queries] == [(catalogue.products[0].id,)] * 6


@pytest.mark.parametrize("wrong", [{"products": 0}, {"photographs": 0}, {"seed": -1}])
def test_impossible_catalogues_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is "):
        make_catalogue(tmp_path, **{"products": 2, "photographs": 1, "queries": 1, "seed": 0, **wrong})
    assert not list(tmp_path.iterdir())


def test_no_training_run_has_seen_the_demos_products(catalogue: Catalogue) -> None:
    """The training draws from the set of its seed, and judges itself on the next one."""
    text = TRAINING.read_text()
    assert re.findall(r"make_products\(.*?, seed=(.*)\)", text) == ["args.seed", "args.seed + 1"]
    defaults = {name: re.search(rf'"--{name}", type=int, default=([\d_]+)', text) for name in ("seed", "products")}
    seed, count = (int(default[1]) if default else -1 for default in defaults.values())
    assert seed == 0
    assert count >= 1000
    trained = {product.id for set_seed in (seed, seed + 1) for product in make_products(count, seed=set_seed)}
    assert not trained & {product.id for product in catalogue.products}


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoFigures, str]:
    """A small demo: its directory, its figures, what it printed."""
    directory, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    console = Console(file=printed)
    figures = run_demo(directory, console, device="cpu", products=12, photographs=2, queries=10)
    return directory, figures, printed.getvalue()


def test_figures_are_sane(run: tuple[Path, DemoFigures, str]) -> None:
    _, figures, _ = run
    assert 0.7 < figures.map_50 <= 1
    assert 0.6 < figures.mask_iou <= 1
    assert 0.7 < figures.recall_at_5 <= 1
    assert 0.4 < figures.recall_at_1 <= figures.recall_at_5
    assert figures.errors_by_kind == {"empty": 1, "not_an_image": 1, "too_large": 1, "truncated": 2}
    assert (figures.images, figures.products, figures.queries) == (12 * 2 + 5, 12, 10)
    assert (figures.device, figures.runtime, figures.precision) == ("cpu", "onnxruntime", "fp32")


def test_report_is_a_picture(run: tuple[Path, DemoFigures, str]) -> None:
    with Image.open(run[0] / "report.png") as report:
        assert report.format == "PNG"
        assert min(report.size) > 600
        assert len(report.convert("RGB").getcolors(1 << 24) or ()) > 200
    assert (run[0] / "report.png").stat().st_size < 700_000


def test_json_has_every_figure(run: tuple[Path, DemoFigures, str]) -> None:
    _, figures, _ = run
    content = json.loads(figures_as_json(figures))
    quality = {"map_50", "mask_iou", "recall_at_1", "recall_at_5"}
    speed = {"images_per_second", "seconds", "device", "runtime", "precision"}
    assert set(content) == quality | speed | {"errors_by_kind", "images", "products", "queries"}
    assert set(content["images_per_second"]) == {"decode", "detect", "crop", "mask", "embed", "search"}
    assert all(rate > 0 for rate in content["images_per_second"].values())
    assert content["device"] == "cpu"
    assert content["map_50"] == figures.map_50


def test_progress_is_told(run: tuple[Path, DemoFigures, str]) -> None:
    """Each step before it begins, in order."""
    steps = ("drawing the catalogue ...", f"{LOADING} ...", "indexing the catalogue ...", "querying ...")
    assert sorted(steps, key=run[2].index) == list(steps)


def test_a_step_is_told_before_it_begins() -> None:
    """Where output is no terminal, nothing moves: a silent half minute looks like a hang."""
    printed = io.StringIO()
    console = Console(file=printed)
    with console.status("first"):
        assert printed.getvalue() == "first ...\n"
    with console.progress("second", 2):
        assert printed.getvalue() == "first ...\nsecond ...\n"


def test_the_readme_names_measures_and_stages_as_the_demo_does(run: tuple[Path, DemoFigures, str]) -> None:
    table = README.read_text().partition("ONNX Runtime | H200")[2].partition("\n\n")[0]
    names = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    assert names[:4] == ["mAP@0.5", "mask IoU", "recall@1", "recall@5"]  # as test_cli.py finds them printed
    assert names[4:]
    assert set(names[4:]) <= set(run[1].images_per_second)


def test_the_shipped_models_are_three() -> None:
    assert {path.name for path in models_directory().glob("*.onnx")} == {
        "detector.onnx",
        "masker.onnx",
        "embedder.onnx",
    }
