"""Oracles: what OpenCV, Ultralytics' letterbox and plain NumPy give."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from nbvision.ops.geometry import Geometry

INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST}

# Largest accepted difference in output units, by dtype, for values of 0..255 that were scaled to 0..1: float16 keeps
# 11 bits; float32 differs by the rounding of one fused multiply-add.
TOLERANCE = {"uint8": 0.0, "float16": 5e-4, "float32": 3e-7}


def to_host(array: Any) -> np.ndarray:
    """A NumPy copy of an array of either device."""
    return array.get() if hasattr(array, "get") else np.array(array)


def on(device: str, array: Any) -> Any:
    """The array on a device."""
    if device == "cpu":
        return array
    import cupy

    return cupy.asarray(array)


def geometry_on(device: str, geometry: Geometry) -> Geometry:
    """A geometry of the host on a device."""
    regions, steps, scales = (on(device, table) for table in (geometry.regions, geometry.steps, geometry.scales))
    return Geometry(regions, steps, scales, device)


def letterbox_placement(
    height: int, width: int, size: tuple[int, int], *, scaleup: bool = True, center: bool = True
) -> tuple[int, int, int, int]:
    """(new height, new width, top, left) as Ultralytics' LetterBox computes them, in Python floats."""
    ratio = min(size[0] / height, size[1] / width)
    if not scaleup:
        ratio = min(ratio, 1.0)
    new_width, new_height = max(round(width * ratio), 1), max(round(height * ratio), 1)
    pad_height, pad_width = size[0] - new_height, size[1] - new_width
    if not center:
        return new_height, new_width, 0, 0
    return new_height, new_width, round(pad_height / 2 - 0.1), round(pad_width / 2 - 0.1)


def cover_placement(height: int, width: int, size: tuple[int, int], shorter: int) -> tuple[int, int, int, int]:
    """(new height, new width, top, left) of torchvision's Resize(shorter) and CenterCrop(size)."""
    if height <= width:
        new_height, new_width = shorter, int(shorter * width / height)
    else:
        new_height, new_width = int(shorter * height / width), shorter
    return new_height, new_width, round((new_height - size[0]) / 2.0), round((new_width - size[1]) / 2.0)


def preprocess_u8(
    image: np.ndarray,
    size: tuple[int, int],
    *,
    fit: str,
    interpolation: str = "linear",
    fill: int = 114,
    **options: Any,
) -> np.ndarray:
    """The (H, W, 3) uint8 canvas that OpenCV makes of one image or crop."""
    flag = INTERPOLATIONS[interpolation]
    if fit == "stretch":
        return cv2.resize(image, size[::-1], interpolation=flag)
    new_height, new_width, top, left = letterbox_placement(*image.shape[:2], size, **options)
    resized = cv2.resize(image, (new_width, new_height), interpolation=flag)
    canvas = np.full((*size, 3), fill, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def random_image(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    width = max(min(first[2], second[2]) - max(first[0], second[0]), np.float32(0))
    height = max(min(first[3], second[3]) - max(first[1], second[1]), np.float32(0))
    intersection = width * height
    union = (first[2] - first[0]) * (first[3] - first[1]) + (second[2] - second[0]) * (second[3] - second[1])
    union -= intersection
    return float(intersection / union) if union > 0 else 0.0


def greedy_nms(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, *, iou_threshold: float, class_aware: bool
) -> list[int]:
    """Indices kept, best first; equal scores by index."""
    kept: list[int] = []
    for index in np.lexsort((np.arange(len(scores)), -scores)):
        clash = any(
            iou(boxes[index], boxes[other]) > iou_threshold and (labels[index] == labels[other] or not class_aware)
            for other in kept
        )
        if not clash:
            kept.append(int(index))
    return kept
