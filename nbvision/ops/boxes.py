"""Boxes out of a detector's head: best class, back to source pixels, greedy non-maximum suppression."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError
from nbvision.image import to_device
from nbvision.ops.arguments import number, whole
from nbvision.ops.geometry import Geometry, checked_geometry
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import Device, array_module, device_of

__all__ = ["Detections", "FlatDetections", "box_iou", "nms", "nms_boxes"]

_THREADS = 256
_BLOCK = 1024  # threads that rank and suppress the candidates of one image
_MAX_GRID_Y = 65535
_MAX_CANDIDATES = 32768  # one bit each, in the shared memory of a block


@dataclass(frozen=True)
class FlatDetections:
    """The detections of a batch in one list: M boxes with the image of each, in order of image, then score.

    ``boxes`` (M, 4) float32, ``scores`` (M,) float32, ``labels`` (M,) int32, ``images`` (M,) int64, and ``anchors``
    (M,) int32: the column of the head that each came from, None where that is unknown.
    """

    boxes: Any
    scores: Any
    labels: Any
    images: Any
    anchors: Any = None

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
        Where all are.
    anchors : (N, K) int32 or None
        The column of the head's output that each box came from, for what else is in it, such as mask coefficients.
    """

    boxes: Any
    scores: Any
    labels: Any
    counts: Any
    device: Device
    anchors: Any = None

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def flat(self) -> FlatDetections:
        """All detections in one list, on the same device. On CUDA this waits on the host for the counts."""
        xp = array_module(self.device)
        filled = xp.arange(self.boxes.shape[1])[None, :] < self.counts[:, None]
        images, _ = xp.nonzero(filled)
        anchors = None if self.anchors is None else self.anchors[filled]
        return FlatDetections(self.boxes[filled], self.scores[filled], self.labels[filled], images, anchors)

    def to_host(self) -> Detections:
        """The same on the CPU; waits for the device."""
        if self.device == "cpu":
            return self
        boxes, scores, labels, counts = (
            to_device(array, "cpu") for array in (self.boxes, self.scores, self.labels, self.counts)
        )
        anchors = None if self.anchors is None else to_device(self.anchors, "cpu")
        return Detections(boxes, scores, labels, counts, device="cpu", anchors=anchors)


def nms(
    predictions: Any,
    geometry: Geometry,
    *,
    score_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    class_aware: bool = True,
    max_detections: int = 100,
    max_candidates: int = 1024,
    soft_sigma: float | None = None,
    classes: int | None = None,
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
    soft_sigma : float, optional
        Gaussian soft-NMS (Bodla et al. 2017) instead of removal: a kept box multiplies the scores of those that it
        overlaps by ``exp(-iou ** 2 / soft_sigma)``, and what falls to ``score_threshold`` is dropped. ``iou_threshold``
        is not used, and the scores returned are the lowered ones.
    classes : int, optional
        How many rows are scores, for heads with more rows, such as mask coefficients. All but four by default.

    Returns
    -------
    Detections
        On the same device; nothing waits on the host. Greedy, by falling score, equal scores by rising anchor; the
        same input always gives the same output.

    Raises
    ------
    InputError
        If ``predictions`` have another shape or dtype, or are on another device than ``geometry``; if an option is out
        of range.
    """
    device = checked_geometry(geometry).device
    predictions = _checked_predictions(predictions, geometry)
    images, rows, anchors = predictions.shape
    classes = rows - 4 if classes is None else whole("classes", classes, least=1)
    if classes > rows - 4:
        raise InputError(f"classes is {classes}; expected 1 to {rows - 4}, the rows of predictions after the box")
    options = _Options(score_threshold, iou_threshold, soft_sigma, class_aware, max_candidates, max_detections)
    options = options.checked(anchors)
    kept = _kept_arrays(device, images, max_detections)
    if images and anchors and device == "cpu":
        flat = predictions.reshape(-1)
        tables = (geometry.regions.reshape(-1), geometry.scales.reshape(-1))
        head = (flat, flat.view(np.uint32), images, np.int32(rows), np.int32(classes), np.int32(anchors))
        _loop("nms_cpu")(*head, *tables, *options.numbers(), *(array.reshape(-1) for array in kept))
    elif images and anchors:
        from nbvision_kernels.catalog import head_candidates_kernel

        keys, boxes, scores, labels = _arrays(
            device,
            [
                ((images, anchors), np.uint64),
                ((images, anchors, 4), np.float32),
                ((images, anchors), np.float32),
                ((images, anchors), np.int32),
            ],
        )
        sizes = (np.int32(rows), np.int32(classes), np.int32(anchors))
        kernel = load_kernel(head_candidates_kernel(), predictions.device.id)
        for part in _grid_parts(images):
            grid = (-(-anchors // _THREADS), part.stop - part.start)
            given = (predictions[part], predictions[part].view(np.uint32))
            places = (geometry.regions[part], geometry.scales[part], np.float32(score_threshold))
            kernel(grid, (_THREADS,), (*given, *sizes, *places, keys[part], boxes[part], scores[part], labels[part]))
        _rank_and_suppress(keys, boxes, scores, labels, options, kept)
    boxes, scores, labels, indices, counts = kept
    return Detections(boxes, scores, labels, counts, device=device, anchors=indices)


def nms_boxes(
    boxes: Any,
    scores: Any,
    labels: Any = None,
    *,
    counts: Any = None,
    iou_threshold: float = 0.5,
    score_threshold: float = -math.inf,
    max_detections: int | None = None,
    max_candidates: int | None = None,
    soft_sigma: float | None = None,
) -> tuple[Any, Any]:
    """Non-maximum suppression of plain boxes, of one image or of a batch.

    Parameters
    ----------
    boxes : (K, 4) or (N, K, 4) float array
        x1, y1, x2, y2; its device is where the work is done.
    scores : (K,) or (N, K) float array
    labels : (K,) or (N, K) integer array, optional
        Only boxes of the same label remove each other; without labels all do.
    counts : (N,) integer array, optional
        How many boxes of each image are filled, for a batch; all by default.
    iou_threshold, score_threshold, soft_sigma
        As for :func:`nms`; by default every score counts.
    max_detections, max_candidates : int, optional
        Kept boxes of an image, and the best-scored ones that are considered; all by default.

    Returns
    -------
    indices : (max_detections,) or (N, max_detections) int32
        Places of the kept boxes, best first, equal scores by rising place; -1 from the count on.
    counts : () or (N,) int32
        On the same device; nothing waits on the host.

    Raises
    ------
    InputError
        If shapes or dtypes do not fit, or an option is out of range.
    """
    device = device_of(boxes)
    xp = array_module(device)
    boxes, scores = to_device(boxes, device), to_device(scores, device)
    single = boxes.ndim == 2
    if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or scores.shape != boxes.shape[:-1]:
        raise InputError(
            f"boxes have shape {boxes.shape} and scores {scores.shape}; expected (K, 4) and (K,), "
            "or (N, K, 4) and (N, K)"
        )
    if boxes.dtype.kind != "f" or scores.dtype.kind != "f":
        raise InputError(f"boxes are {boxes.dtype} and scores {scores.dtype}; expected floats")
    shape = (1, *scores.shape) if single else scores.shape
    images, width = shape
    class_aware = labels is not None
    labels = xp.zeros(shape, np.int32) if labels is None else to_device(labels, device)
    if labels.shape not in (scores.shape, shape) or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; expected integers of shape {scores.shape}"
        )
    counts = xp.full(images, width, np.int32) if counts is None else to_device(counts, device)
    if counts.shape != (images,) or counts.dtype.kind not in "iu":
        raise InputError(f"counts have shape {counts.shape} and dtype {counts.dtype}; expected integers ({images},)")
    boxes = xp.ascontiguousarray(boxes, dtype=np.float32).reshape(images, width, 4)
    scores = xp.ascontiguousarray(scores, dtype=np.float32).reshape(shape)
    labels = xp.ascontiguousarray(labels, dtype=np.int32).reshape(shape)
    counts = xp.ascontiguousarray(counts, dtype=np.int32)
    most = max(width, 1)
    max_detections = most if max_detections is None else max_detections
    max_candidates = most if max_candidates is None else max_candidates
    options = _Options(score_threshold, iou_threshold, soft_sigma, class_aware, max_candidates, max_detections)
    options = options.checked(width)
    kept = _kept_arrays(device, images, max_detections)
    kept_indices, kept_counts = kept[3:]
    kept_indices.fill(-1)
    if images and width and device == "cpu":
        given = (boxes.reshape(-1), scores.reshape(-1), scores.reshape(-1).view(np.uint32), labels.reshape(-1), counts)
        places = (images, np.int32(width))
        _loop("nms_boxes_cpu")(*given, *places, *options.numbers(), *(array.reshape(-1) for array in kept))
    elif images and width:
        from nbvision_kernels.catalog import box_candidates_kernel

        (keys,) = _arrays(device, [(shape, np.uint64)])
        kernel = load_kernel(box_candidates_kernel(), boxes.device.id)
        for part in _grid_parts(images):
            grid = (-(-width // _THREADS), part.stop - part.start)
            row = (scores[part], scores[part].view(np.uint32), counts[part])
            kernel(grid, (_THREADS,), (*row, np.int32(width), np.float32(score_threshold), keys[part]))
        _rank_and_suppress(keys, boxes, scores, labels, options, kept)
    return (kept_indices[0], kept_counts[0]) if single else (kept_indices, kept_counts)


def box_iou(first: Any, second: Any) -> Any:
    """Intersection over union of every pair of boxes.

    Parameters
    ----------
    first, second : (M, 4) and (N, 4) float arrays
        x1, y1, x2, y2; the device is that of ``first``.

    Returns
    -------
    (M, N) float32 array; 0 where neither box has an area.

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
    first, second = (xp.ascontiguousarray(boxes, dtype=np.float32) for boxes in (first, second))
    rows, columns = len(first), len(second)
    out = memory.acquire(rows * columns * 4, device=device).view((rows, columns), dtype=np.float32)
    if out.size and device == "cpu":
        _loop("box_iou_cpu")(first.reshape(-1), second.reshape(-1), rows, columns, out.reshape(-1))
    elif out.size:
        from nbvision_kernels.catalog import box_iou_kernel

        grid = (-(-columns // _THREADS), min(rows, _MAX_GRID_Y))
        arguments = (first, second, np.int32(rows), np.int32(columns), out)
        load_kernel(box_iou_kernel(), first.device.id)(grid, (_THREADS,), arguments)
    return out


@dataclass(frozen=True)
class _Options:
    """The numbers of a suppression."""

    score_threshold: float
    iou_threshold: float
    soft_sigma: float | None
    class_aware: bool
    max_candidates: int
    max_detections: int

    def checked(self, places: int) -> _Options:
        """The same with no more candidates than there are places, if all is in range."""
        whole("max_detections", self.max_detections, least=1)
        whole("max_candidates", self.max_candidates, least=1)
        number("score_threshold", self.score_threshold)
        number("iou_threshold", self.iou_threshold)
        if self.soft_sigma is not None and not number("soft_sigma", self.soft_sigma) > 0:
            raise InputError(f"soft_sigma is {self.soft_sigma}; expected more than 0, or None for hard suppression")
        candidates = min(self.max_candidates, max(places, 1))
        if candidates > _MAX_CANDIDATES:
            raise InputError(
                f"max_candidates is {self.max_candidates}, for {places} places; expected at most {_MAX_CANDIDATES}"
            )
        return replace(self, max_candidates=candidates)

    def numbers(self) -> tuple[Any, ...]:
        """What a CPU loop takes."""
        thresholds = (
            np.float32(self.score_threshold),
            np.float32(self.iou_threshold),
            np.float32(self.soft_sigma or 0),
        )
        return *thresholds, np.int32(self.class_aware), np.int32(self.max_candidates), np.int32(self.max_detections)


def _rank_and_suppress(keys: Any, boxes: Any, scores: Any, labels: Any, options: _Options, kept: list[Any]) -> None:
    """The last two steps on CUDA."""
    from nbvision_kernels.catalog import rank_candidates_kernel, suppress_kernel
    from nbvision_kernels.codes import SOFT_THREADS

    images, width = keys.shape
    most = options.max_candidates
    padded = max(2, 1 << (most - 1).bit_length())
    sorted_keys, *candidates = _arrays(
        "cuda",
        [
            ((images, padded), np.uint64),
            ((images, most, 4), np.float32),
            ((images, most), np.float32),
            ((images, most), np.int32),
            ((images, most), np.int32),
            ((images,), np.int32),
        ],
    )
    device_id = keys.device.id
    sizes = (np.int32(width), np.int32(most), np.int32(padded))
    arguments = (keys, *sizes, boxes, scores, labels, sorted_keys, *candidates)
    load_kernel(rank_candidates_kernel(), device_id)((images,), (_BLOCK,), arguments)
    limits = (np.int32(options.class_aware), np.int32(options.max_detections))
    if options.soft_sigma is None:
        threads, numbers = _BLOCK, [np.float32(options.iou_threshold)]
    else:
        threads, numbers = SOFT_THREADS, [np.float32(options.score_threshold), np.float32(options.soft_sigma)]
    kernel = load_kernel(suppress_kernel(soft=options.soft_sigma is not None), device_id)
    kernel((images,), (threads,), (*candidates, np.int32(most), *numbers, *limits, *kept))


def _kept_arrays(device: Device, images: int, most: int) -> list[Any]:
    """Zeroed boxes, scores, labels, indices and counts."""
    return _arrays(
        device,
        [
            ((images, most, 4), np.float32),
            ((images, most), np.float32),
            ((images, most), np.int32),
            ((images, most), np.int32),
            ((images,), np.int32),
        ],
        zeroed=True,
    )


def _grid_parts(images: int) -> list[slice]:
    """Images in runs that fit a grid's second axis."""
    starts = range(0, images, _MAX_GRID_Y)
    return [slice(start, min(start + _MAX_GRID_Y, images)) for start in starts]


def _checked_predictions(predictions: Any, geometry: Geometry) -> Any:
    array = to_device(predictions, geometry.device)
    if array.ndim != 3 or array.shape[1] < 5 or array.shape[0] != len(geometry) or array.dtype.kind != "f":
        raise InputError(
            f"predictions have shape {array.shape} and dtype {array.dtype}; expected floats of shape "
            f"({len(geometry)}, 4 + classes, anchors), one row per canvas of the geometry"
        )
    return array_module(geometry.device).ascontiguousarray(array, dtype=np.float32)


def _arrays(
    device: Device, wanted: Sequence[tuple[tuple[int, ...], npt.DTypeLike]], *, zeroed: bool = False
) -> list[Any]:
    """Arrays in one buffer of the memory manager, which is zeroed at once or not at all."""
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in wanted]
    starts = list(itertools.accumulate((-(-size // 256) * 256 for size in sizes), initial=0))
    buffer = memory.acquire(starts[-1], device=device)
    if zeroed:
        buffer.view((starts[-1],)).fill(0)
    return [
        buffer.view(shape, dtype=dtype, offset_bytes=start)
        for (shape, dtype), start in zip(wanted, starts, strict=False)
    ]


@functools.cache
def _loop(name: str) -> Any:
    from nbvision_kernels import boxes

    return cpu_loop(name, getattr(boxes, name))
