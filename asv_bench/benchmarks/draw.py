"""Detections drawn on frames: outlines, names and scores, and masks, beside OpenCV on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .common import copied_bytes_per_us, gpu_us, launch_us, need, need_cuda, noise, wait_for_gpu, wall_us

HEIGHT, WIDTH = 1080, 1920
IMAGES, BOXES = 16, 20
NAMES = ["person", "bicycle", "car", "dog", "traffic light"]
WHAT = ["boxes and names", "and masks"]


@functools.lru_cache(maxsize=1)
def frames(count: int, height: int, width: int) -> list[np.ndarray]:
    return [noise(height, width, seed) for seed in range(count)]


def detections(count: int, height: int, width: int) -> tuple[Any, np.ndarray]:
    """On the host: (count, BOXES) detections, and masks of 28 x 28 for them."""
    from nbvision import Detections

    rng = np.random.default_rng(2)
    size = rng.uniform(0.05, 0.3, (count, BOXES, 2)) * [width, height]
    corner = rng.uniform(0, 1, (count, BOXES, 2)) * ([width, height] - size)
    boxes = np.concatenate([corner, corner + size], axis=2).astype(np.float32)
    scores = np.sort(rng.uniform(0, 1, (count, BOXES)).astype(np.float32), axis=1)[:, ::-1].copy()
    labels = rng.integers(0, len(NAMES), (count, BOXES)).astype(np.int32)
    masks = rng.normal(0, 1, (count, BOXES, 28, 28)).astype(np.float32)
    return Detections(boxes, scores, labels, np.full(count, BOXES, np.int32), device="cpu"), masks


def opencv(images: list[np.ndarray], found: Any, masks: np.ndarray | None) -> None:
    """The same by OpenCV, in place; its letters look different."""
    cv2 = need("cv2")
    from nbvision.ops.draw import PALETTE

    for image, boxes, scores, labels, index in zip(
        images, found.boxes, found.scores, found.labels, range(len(images)), strict=True
    ):
        for rank in reversed(range(len(boxes))):
            x1, y1, x2, y2 = (int(side) for side in np.rint(boxes[rank]))
            color = PALETTE[labels[rank] % len(PALETTE)]
            part = image[y1:y2, x1:x2]
            if masks is not None:
                inside = cv2.resize(masks[index, rank], (x2 - x1, y2 - y1)) > 0
                part[inside] = (part[inside] * 0.55 + np.array(color) * 0.45).astype(np.uint8)
            cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), color, 2)
            text = f"{NAMES[labels[rank]]} {scores[rank]:.2f}"
            (across, down), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
            cv2.rectangle(image, (x1, y1 - down - 4), (x1 + across, y1), color, -1)
            cv2.putText(image, text, (x1, y1 - 3), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)


class DrawOnGPU:
    """Frames and detections in device memory; drawn frames in device memory."""

    params = (WHAT, ["nbvision", "nbvision, in place", "OpenCV, copied down and up"])
    param_names = ("what", "how")

    def setup(self, what: str, how: str) -> None:
        need_cuda()
        import cupy

        from nbvision import Detections, ImageBatch, draw

        images = frames(IMAGES, HEIGHT, WIDTH)
        found, masks = detections(IMAGES, HEIGHT, WIDTH)
        options: dict[str, Any] = {"names": NAMES}
        batch = ImageBatch.from_arrays(images, device="cuda")
        if what == WHAT[1]:
            options["masks"] = cupy.asarray(masks)
        arrays = (cupy.asarray(array) for array in (found.boxes, found.scores, found.labels, found.counts))
        there = Detections(*arrays, device="cuda")
        self.moved_bytes = 2 * IMAGES * HEIGHT * WIDTH * 3
        self.on_host = how.startswith("OpenCV")
        if self.on_host:
            self.call: Callable[[], Any] = lambda: _round_trip(batch, found, masks if "masks" in options else None)
        else:
            target = batch if how.endswith("in place") else draw(batch, there, **options)
            self.call = lambda: draw(batch, there, out=target, **options)

    def track_us(self, what: str, how: str) -> float:
        """The GPU's time; of OpenCV the host's."""
        return wall_us(self.call, finish=wait_for_gpu) if self.on_host else gpu_us(self.call)

    track_us.unit = "us"

    def track_copy_bounds(self, what: str, how: str) -> float:
        """The same, as a multiple of a copy of all frames."""
        return self.track_us(what, how) / (self.moved_bytes / copied_bytes_per_us())

    track_copy_bounds.unit = "x the copy bound"

    def track_host_us(self, what: str, how: str) -> float:
        """What one call costs the Python thread, while the GPU is behind."""
        return float("nan") if self.on_host else launch_us(self.call)

    track_host_us.unit = "us"


class DrawOnCPU:
    """One frame on the host, drawn in place."""

    params = (WHAT, ["nbvision", "OpenCV"])
    param_names = ("what", "how")
    size = (HEIGHT, WIDTH)

    def setup(self, what: str, how: str) -> None:
        from nbvision import as_batch, draw

        images = [image.copy() for image in frames(1, *self.size)]
        found, masks = detections(1, *self.size)
        given = masks if what == WHAT[1] else None
        if how == "OpenCV":
            need("cv2")
            self.call: Callable[[], Any] = lambda: opencv(images, found, given)
        else:
            batch = as_batch(images, device="cpu")
            self.call = lambda: draw(batch, found, names=NAMES, masks=given, out=batch)

    def track_us(self, what: str, how: str) -> float:
        """Time of one call, on all cores."""
        return wall_us(self.call)

    track_us.unit = "us"


def _round_trip(batch: Any, found: Any, masks: np.ndarray | None) -> None:
    images = [image.get() for image in batch]
    opencv(images, found, masks)
    for image, drawn in zip(batch, images, strict=True):
        image.set(drawn)
