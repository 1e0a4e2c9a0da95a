"""Boxes out of a detector's head: best class, back to source pixels, greedy non-maximum suppression."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError
from nbvision.image import to_device
from nbvision.ops.geometry import Geometry
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import Device, array_module, device_of

__all__ = ["Detections", "FlatDetections", "box_iou", "nms"]


@dataclass(frozen=True)
class FlatDetections:
    """The detections of a batch in one list: M boxes with the image of each, in order of image, then score.

    ``boxes`` (M, 4) float32, ``scores`` (M,) float32, ``labels`` (M,) int32, ``images`` (M,) int64.
    """

    boxes: Any
    scores: Any
    labels: Any
    images: Any

    def __len__(self) -> int:
        return int(self.boxes.shape[0])


@dataclass(frozen=True)
class Detections:
    """What was found in N images, at most K in each, best first.

    Attributes
    ----------
    boxes : (N, K, 4) float32
        x1, y1, x2, y2 in source pixels; rows from ``counts`` on are zero.
    scores : (N, K) float32
    labels : (N, K) int32
    counts : (N,) int32
    device : {"cpu", "cuda"}
        Where all four are.
    """

    boxes: Any
    scores: Any
    labels: Any
    counts: Any
    device: Device

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def flat(self) -> FlatDetections:
        """All detections in one list, on the same device. On CUDA this waits on the host for the counts."""
        xp = array_module(self.device)
        filled = xp.arange(self.boxes.shape[1])[None, :] < self.counts[:, None]
        images, _ = xp.nonzero(filled)
        return FlatDetections(self.boxes[filled], self.scores[filled], self.labels[filled], images)

    def to_host(self) -> Detections:
        """The same on the CPU; waits for the device."""
        if self.device == "cpu":
            return self
        boxes, scores, labels, counts = (
            to_device(array, "cpu") for array in (self.boxes, self.scores, self.labels, self.counts)
        )
        return Detections(boxes, scores, labels, counts, device="cpu")


def nms(
    predictions: Any,
    geometry: Geometry,
    *,
    score_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    class_aware: bool = True,
    max_detections: int = 100,
    max_candidates: int = 1024,
) -> Detections:
    """Turn the output of a YOLO head into boxes in source pixels.

    Parameters
    ----------
    predictions : (N, 4 + classes, anchors) float32 or float16 array
        Centre x, centre y, width, height in canvas pixels, then one score per class: the layout that YOLOv8 and
        later export. On the device of ``geometry``.
    geometry : Geometry
        What :class:`nbvision.Preprocess` returned with the detector's input.
    score_threshold : float
        Only scores above it count.
    iou_threshold : float
        A box is removed by a better one that overlaps it by more than this.
    class_aware : bool
        Whether only boxes of the same class remove each other.
    max_detections, max_candidates : int
        Kept boxes of an image, and the best-scored anchors that are considered for it.

    Returns
    -------
    Detections
        On the same device; nothing waits on the host. Greedy, by falling score, equal scores by rising anchor; the
        same input always gives the same output.

    Raises
    ------
    InputError
        If ``predictions`` have another shape or dtype, or are on another device than ``geometry``.
    """
    device = geometry.device
    xp = array_module(device)
    predictions = _checked_predictions(predictions, geometry)
    if max_detections < 1 or max_candidates < 1:
        raise InputError(f"max_detections is {max_detections}, max_candidates {max_candidates}; expected 1 or more")
    images, rows, anchors = predictions.shape
    max_candidates = min(max_candidates, anchors)
    kept = _arrays(
        device,
        [
            ((images, max_detections, 4), np.float32),
            ((images, max_detections), np.float32),
            ((images, max_detections), np.int32),
            ((images,), np.int32),
        ],
    )
    for array in kept:
        array.fill(0)
    numbers = (np.float32(score_threshold), np.float32(iou_threshold), np.int32(class_aware))
    limits = (np.int32(max_candidates), np.int32(max_detections))
    head = (np.int32(rows - 4), np.int32(anchors))
    if images and anchors:
        if device == "cpu":
            flat = [array.reshape(-1) for array in (geometry.regions, geometry.scales, *kept)]
            _nms_loop()(predictions.reshape(-1), images, *head, *flat[:2], *numbers, *limits, *flat[2:])
        else:
            from nbvision_kernels.boxes_cuda import NMS_THREADS
            from nbvision_kernels.catalog import nms_kernel

            scratch = _arrays(
                device,
                [
                    ((images, anchors), np.float32),
                    ((images, anchors), np.int32),
                    ((images, max_candidates), np.float32),
                    ((images, max_candidates, 4), np.float32),
                    ((images, max_candidates), np.int32),
                    ((images, max_candidates), np.uint8),
                ],
            )
            predictions = xp.ascontiguousarray(predictions)
            tables = (geometry.regions, geometry.scales)
            arguments = (predictions, *head, *tables, *numbers, *limits, *scratch, *kept)
            load_kernel(nms_kernel(), predictions.device.id)((images,), (NMS_THREADS,), arguments)
    boxes, scores, labels, counts = kept
    return Detections(boxes, scores, labels, counts, device=device)


def box_iou(first: Any, second: Any) -> Any:
    """Intersection over union of every pair of boxes.

    Parameters
    ----------
    first, second : (M, 4) and (N, 4) float arrays
        x1, y1, x2, y2; the device is that of ``first``.

    Returns
    -------
    (M, N) float array; 0 where neither box has an area.

    Raises
    ------
    InputError
        If a last axis is not 4.
    """
    device = device_of(first)
    xp = array_module(device)
    first, second = to_device(first, device), to_device(second, device)
    for name, boxes in (("first", first), ("second", second)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise InputError(f"{name} has shape {boxes.shape}; expected (N, 4): x1, y1, x2, y2")
    a, b = first[:, None, :], second[None, :, :]
    sides = xp.minimum(a[..., 2:], b[..., 2:]) - xp.maximum(a[..., :2], b[..., :2])
    intersection = xp.maximum(sides, 0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - intersection
    return xp.where(union > 0, intersection / xp.where(union > 0, union, 1), 0)


def _checked_predictions(predictions: Any, geometry: Geometry) -> Any:
    array = to_device(predictions, geometry.device)
    if array.ndim != 3 or array.shape[1] < 5 or array.shape[0] != len(geometry) or array.dtype.kind != "f":
        raise InputError(
            f"predictions have shape {array.shape} and dtype {array.dtype}; expected floats of shape "
            f"({len(geometry)}, 4 + classes, anchors), one row per canvas of the geometry"
        )
    return array.astype(np.float32, copy=False)


def _arrays(device: Device, wanted: Sequence[tuple[tuple[int, ...], npt.DTypeLike]]) -> list[Any]:
    """Uninitialised arrays in one buffer of the memory manager."""
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in wanted]
    starts = np.cumsum([0] + [-(-size // 256) * 256 for size in sizes]).tolist()
    buffer = memory.acquire(starts[-1], device=device)
    return [
        buffer.view(shape, dtype=dtype, offset_bytes=start)
        for (shape, dtype), start in zip(wanted, starts, strict=False)
    ]


@functools.cache
def _nms_loop() -> Any:
    from nbvision_kernels.boxes import nms_cpu

    return cpu_loop("nms", nms_cpu)
