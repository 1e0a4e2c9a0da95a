"""How good the answers are: average precision, mask overlap, recall of retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from nbvision.demo.garments import Scene
from nbvision.ops.boxes import box_iou
from nbvision.ops.geometry import Geometry
from nbvision.recognizer import Recognition

__all__ = ["match_objects", "mean_average_precision", "mean_mask_iou", "paste_mask", "recall_at"]

MATCH_IOU = 0.5


def match_objects(recognition: Recognition, image: int, scene: Scene) -> dict[int, int]:
    """Object of the scene -> best-scored detection of the right class that overlaps it by at least a half."""
    found = recognition.of_image(image)
    overlaps = box_iou(recognition.boxes[found], scene.boxes)
    matches: dict[int, int] = {}
    for row, detection in enumerate(found):
        open_objects = [
            index
            for index, label in enumerate(scene.class_indices)
            if index not in matches and label == recognition.labels[detection]
        ]
        best = max(open_objects, key=lambda index, row=row: overlaps[row, index], default=None)  # type: ignore[misc]
        if best is not None and overlaps[row, best] >= MATCH_IOU:
            matches[best] = int(detection)
    return matches


def mean_average_precision(scored: Mapping[int, Sequence[tuple[float, bool]]], objects: Mapping[int, int]) -> float:
    """mAP@0.5: area under the precision envelope, averaged over the classes that occur.

    Parameters
    ----------
    scored : class -> (score, whether it matched an object) of every detection
    objects : class -> number of objects there are
    """
    return float(np.mean([_average_precision(scored.get(label, ()), count) for label, count in objects.items()]))


def _average_precision(scored: Sequence[tuple[float, bool]], objects: int) -> float:
    hits = np.array([hit for _, hit in sorted(scored, key=lambda pair: -pair[0])], bool)
    if not hits.any():
        return 0.0
    recall = np.cumsum(hits) / objects
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # precision never falls as recall shrinks
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def mean_mask_iou(pairs: Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]) -> float:
    """Mean intersection over union of (found, true) masks of the same shape."""
    overlaps = [np.count_nonzero(a & b) / max(int(np.count_nonzero(a | b)), 1) for a, b in pairs]
    return float(np.mean(overlaps)) if overlaps else 0.0


def paste_mask(
    mask: npt.NDArray[np.bool_], geometry: Geometry, index: int, size: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """A crop's mask in its source image, (H, W) bool: the nearest canvas pixel of each source pixel."""
    x, y, width, height = (int(value) for value in geometry.regions[index, 1:5])
    rows = (np.arange(height) * mask.shape[0] + mask.shape[0] // 2) // height
    columns = (np.arange(width) * mask.shape[1] + mask.shape[1] // 2) // width
    pasted = np.zeros(size, bool)
    pasted[y : y + height, x : x + width] = mask[
        np.ix_(rows.clip(0, len(mask) - 1), columns.clip(0, mask.shape[1] - 1))
    ]
    return pasted


def recall_at(k: int, ranked: Sequence[Sequence[str]], wanted: Sequence[str]) -> float:
    """Share of the wanted products that are among the first ``k`` different ones of their ranking."""
    hits = [product in list(dict.fromkeys(ranking))[:k] for ranking, product in zip(ranked, wanted, strict=True)]
    return float(np.mean(hits)) if hits else 0.0
