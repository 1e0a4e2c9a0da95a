"""The pipeline most people write first, as the baseline to measure nbvision against.

Every image is decoded, resized and normalised by OpenCV and NumPy on the host, one after the other; only the models
run on the GPU, so pictures and answers cross the bus at every stage. The models are nbvision's own engines, so both
pipelines run the same runtime in the same precision, and both find the same. Nothing is slowed down on purpose:
OpenCV uses all its threads, and each stage hands whole batches to its model.

    python3 examples/straightforward.py --device cuda --images 256 --precision fp16
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nbvision.demo.catalogue import make_catalogue
from nbvision.demo.run import models_directory
from nbvision.engines import Engine
from nbvision.ops.boxes import box_iou
from nbvision.recognizer import BACKGROUND, CROP_MARGIN, IMAGENET_MEAN, IMAGENET_STD, Recognition, Recognizer

__all__ = ["Found", "StraightforwardRecognizer", "agreement", "decode", "letterbox", "tensor_of"]

MEAN = np.array(IMAGENET_MEAN, np.float32).reshape(3, 1, 1)
STD = np.array(IMAGENET_STD, np.float32).reshape(3, 1, 1)


@dataclass(frozen=True)
class Found:
    """What was found in a batch, in the fields and the order of :class:`nbvision.recognizer.Recognition`."""

    errors: tuple[str | None, ...]
    images: np.ndarray
    boxes: np.ndarray
    mask_boxes: np.ndarray
    masks: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


class StraightforwardRecognizer:
    """Decode, detect, crop, mask, normalise and embed; the arguments are those of :class:`nbvision.Recognizer`."""

    def __init__(
        self,
        detector: Engine,
        masker: Engine,
        embedder: Engine,
        *,
        score_threshold: float = 0.35,
        iou_threshold: float = 0.5,
        max_detections: int = 16,
    ) -> None:
        self.detector, self.masker, self.embedder = detector, masker, embedder
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections

    def recognize(self, sources: Sequence[bytes]) -> Found:
        """Recognize one batch of compressed images; an image that cannot be decoded has its error and no objects."""
        decoded = [decode(source) for source in sources]
        errors = tuple(None if image is not None else "OpenCV cannot decode it" for image in decoded)
        where = [index for index, image in enumerate(decoded) if image is not None]
        images = [decoded[index] for index in where]

        boxes, scores, labels, rows = self._detect(images)
        regions = [enlarged(box, images[row].shape) for box, row in zip(boxes, rows, strict=True)]
        crops = self._crop(images, regions, rows)
        logits = run(self.masker, crops)[:, 0]
        masks = logits > 0
        cut = np.where(masks[:, None], crops, np.float32(BACKGROUND))
        vectors = run(self.embedder, (cut - MEAN) / STD)
        return Found(
            errors=errors,
            images=np.array(where, np.int64)[rows],
            boxes=boxes,
            mask_boxes=extents(masks, regions),
            masks=masks,
            scores=scores,
            labels=labels,
            vectors=vectors,
        )

    def stream(self, sources: Sequence[bytes], *, batch_size: int = 32) -> Iterator[tuple[Sequence[bytes], Found]]:
        """Recognize any number of images, batch by batch."""
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            yield batch, self.recognize(batch)

    def _detect(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Boxes, scores, labels, and the image of each."""
        height, width = self.detector.inputs[0].shape[2:]
        canvases, places = [], []
        for image in images:
            canvas, place = letterbox(image, (height, width))
            canvases.append(canvas)
            places.append(place)
        predictions = run(self.detector, tensor_of(canvases, (height, width)))
        found = [
            self._suppress(*self._boxes_of(prediction, place, image.shape))
            for prediction, place, image in zip(predictions, places, images, strict=True)
        ]
        counts = [len(boxes) for boxes, _, _ in found]
        if not found:
            return np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int64)
        boxes, scores, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return boxes, scores, labels, np.repeat(np.arange(len(images)), counts)

    def _boxes_of(
        self, prediction: np.ndarray, place: tuple[int, int, int, int], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The anchors of a YOLO head that score high enough: boxes in source pixels, scores, labels."""
        best = prediction[4:].max(axis=0)
        anchors = np.flatnonzero(best > self.score_threshold)
        centers, sides = prediction[:2, anchors].T, prediction[2:4, anchors].T
        corners = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
        left, top, new_width, new_height = place
        height, width = shape[:2]
        scale = np.array([width / new_width, height / new_height] * 2, np.float32)
        boxes = (corners - np.array([left, top] * 2, np.float32)) * scale
        boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
        return boxes, best[anchors], prediction[4:, anchors].argmax(axis=0).astype(np.int32)

    def _suppress(
        self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Greedy non-maximum suppression within each class."""
        order = np.argsort(-scores, kind="stable")
        kept: list[int] = []
        while len(order) and len(kept) < self.max_detections:
            first, rest = order[0], order[1:]
            kept.append(int(first))
            clash = (box_iou(boxes[first : first + 1], boxes[rest])[0] > self.iou_threshold) & (
                labels[rest] == labels[first]
            )
            order = rest[~clash]
        return boxes[kept], scores[kept], labels[kept]

    def _crop(
        self, images: Sequence[np.ndarray], regions: Sequence[tuple[int, int, int, int]], rows: np.ndarray
    ) -> np.ndarray:
        height, width = self.masker.inputs[0].shape[2:]
        crops = [
            cv2.resize(images[row][top:bottom, left:right], (width, height))
            for (left, top, right, bottom), row in zip(regions, rows, strict=True)
        ]
        return tensor_of(crops, (height, width))


def decode(source: bytes) -> np.ndarray | None:
    """RGB pixels, or None."""
    image = cv2.imdecode(np.frombuffer(source, np.uint8), cv2.IMREAD_COLOR) if source else None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def letterbox(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The image on a gray canvas, and where it stands there: left, top, width, height."""
    height, width = image.shape[:2]
    ratio = min(size[0] / height, size[1] / width)
    new_width, new_height = max(round(width * ratio), 1), max(round(height * ratio), 1)
    left, top = round((size[1] - new_width) / 2 - 0.1), round((size[0] - new_height) / 2 - 0.1)
    canvas = np.full((*size, 3), 114, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = cv2.resize(image, (new_width, new_height))
    return canvas, (left, top, new_width, new_height)


def tensor_of(pictures: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(N, 3, H, W) float32 in 0..1 of N pictures of one size."""
    if not pictures:
        return np.empty((0, 3, *size), np.float32)
    tensor = np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2), dtype=np.float32)
    tensor *= np.float32(1 / 255)
    return tensor


def enlarged(box: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The box with the margin that the models were trained on, in whole pixels of its image."""
    x1, y1, x2, y2 = box
    margin_x, margin_y = (x2 - x1) * np.float32(CROP_MARGIN), (y2 - y1) * np.float32(CROP_MARGIN)
    left, top = int(np.floor(max(x1 - margin_x, 0))), int(np.floor(max(y1 - margin_y, 0)))
    return left, top, int(np.ceil(min(x2 + margin_x, shape[1]))), int(np.ceil(min(y2 + margin_y, shape[0])))


def extents(masks: np.ndarray, regions: Sequence[tuple[int, int, int, int]]) -> np.ndarray:
    """The tight box of each mask in source pixels; zeros for an empty one."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for index, (mask, (left, top, right, bottom)) in enumerate(zip(masks, regions, strict=True)):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if len(columns):
            scale_x, scale_y = (right - left) / mask.shape[1], (bottom - top) / mask.shape[0]
            boxes[index] = (
                left + columns[0] * scale_x,
                top + rows[0] * scale_y,
                left + (columns[-1] + 1) * scale_x,
                top + (rows[-1] + 1) * scale_y,
            )
    return boxes


def run(engine: Engine, inputs: np.ndarray) -> np.ndarray:
    """A model on host arrays: up, infer, down, in batches it was made for."""
    largest = engine.batch.max if engine.batch is not None else max(len(inputs), 1)
    parts = []
    for start in range(0, max(len(inputs), 1), largest):
        part: Any = inputs[start : start + largest]
        if engine.device == "cuda":
            import cupy

            part = cupy.asarray(part)
        outputs = engine(part)
        parts.append(outputs.get() if engine.device == "cuda" else outputs)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def agreement(first: Recognition | Found, second: Recognition | Found) -> float:
    """Share of all objects that both found: same image and class, boxes and vectors that nearly coincide."""
    pairs = box_iou(first.boxes, second.boxes) > 0.9
    pairs &= first.images[:, None] == second.images[None]
    pairs &= first.labels[:, None] == second.labels[None]
    pairs &= first.vectors @ second.vectors.T > 0.98
    both = np.count_nonzero(pairs.any(axis=1)) + np.count_nonzero(pairs.any(axis=0))
    return both / max(len(first) + len(second), 1) if len(first) or len(second) else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where it works")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        catalogue = make_catalogue(Path(directory), products=options.images, photographs=1, queries=0, seed=1)
        files = [photograph.path.read_bytes() for photograph in catalogue.photographs]
    ours = Recognizer.load(models_directory(), device=options.device, precision=options.precision)
    theirs = StraightforwardRecognizer(ours.detector, ours.masker, ours.embedder)

    found, baseline = [], []
    seconds: dict[str, list[float]] = {"nbvision": [], "straightforward": []}
    for _ in range(options.rounds + 1):  # in turns, so that both see the same machine; the first round warms up
        started = time.perf_counter()
        found = [result for _, result in ours.stream(files)]
        halfway = time.perf_counter()
        baseline = [result for _, result in theirs.stream(files)]
        seconds["nbvision"].append(halfway - started)
        seconds["straightforward"].append(time.perf_counter() - halfway)

    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16} {len(files) / median:8.1f} images/s")
    print(f"nbvision is {medians['straightforward'] / medians['nbvision']:.2f} times as fast", end=" ")
    print(f"({ours.device}, {ours.detector.runtime}, {ours.detector.precision}, {len(files)} images)")

    # On CUDA, nvJPEG's pixels are not OpenCV's to the last bit, so a rare object crosses a threshold.
    agreed = min(agreement(first, second) for first, second in zip(found, baseline, strict=True))
    assert agreed >= (1.0 if ours.device == "cpu" else 0.95), f"only {agreed:.0%} of a batch's objects agree"


if __name__ == "__main__":
    main()
