"""Masks out of a mask head: extents and centroids in source pixels, cut-outs, and whole masks of the sources."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError
from nbvision.image import ImageBatch, as_batch, interleaved_color, to_device
from nbvision.ops._regions import checked_host_boxes
from nbvision.ops.arguments import number, three_numbers, whole
from nbvision.ops.boxes import Detections, FlatDetections
from nbvision.ops.geometry import Geometry, checked_geometry
from nbvision.ops.instances import Masks, mask_table
from nbvision.ops.preprocess import affine
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import Device, array_module, device_of

__all__ = ["argmax_map", "cut_out", "cut_out_rgba", "mask_boxes", "mask_centroids", "paste_masks"]

_THREADS = 256
_MAX_GRID_Y = 65535  # and of z
_PASTE_BLOCKS = 4096  # about four times what an H200 holds at once
_FARTHEST = 1 << 20  # coordinates of mask regions beyond are moved here


def argmax_map(logits: Any) -> Any:
    """The best class of each pixel of a semantic segmentation.

    Parameters
    ----------
    logits : (N, C, H, W) float array
        C is 1 or more; the device is where the work is done.

    Returns
    -------
    (N, H, W) int32 array
        The first of equal classes. NaN never wins over a number.

    Raises
    ------
    InputError
        If ``logits`` have another shape or are no floats.
    """
    device = device_of(logits)
    logits = to_device(logits, device)
    if logits.ndim != 4 or logits.shape[1] < 1 or logits.dtype.kind != "f":
        raise InputError(f"logits have shape {logits.shape} and dtype {logits.dtype}; expected floats (N, C, H, W)")
    logits = array_module(device).ascontiguousarray(logits, dtype=np.float32)
    images, planes, height, width = logits.shape
    plane = height * width
    out = memory.acquire(images * plane * 4, device=device).view((images, height, width), dtype=np.int32)
    if out.size and device == "cpu":
        _loop("argmax_map_cpu")(logits.reshape(-1), images, planes, plane, out.reshape(-1))
    elif out.size:
        from nbvision_kernels.catalog import argmax_map_kernel

        kernel = load_kernel(argmax_map_kernel(), logits.device.id)
        for first in range(0, images, _MAX_GRID_Y):
            part = slice(first, first + _MAX_GRID_Y)
            grid = (-(-plane // _THREADS), len(logits[part]))
            kernel(grid, (_THREADS,), (logits[part], np.int32(planes), np.int32(plane), out[part]))
    return out


def mask_boxes(logits: Any, geometry: Geometry, *, threshold: float = 0.0) -> tuple[Any, Any]:
    """The tight box and the area of each mask.

    Parameters
    ----------
    logits : (M, 1, H, W) or (M, H, W) float array
        One mask per canvas of ``geometry``, on its device; more than ``threshold`` is inside.
    geometry : Geometry
        Of the crops that the mask head saw.
    threshold : float
        0 for logits, 0.5 for probabilities.

    Returns
    -------
    boxes : (M, 4) float32
        x1, y1, x2, y2 in source pixels, half-open; zeros for an empty mask.
    areas : (M,) int32
        Canvas pixels inside the mask.

    Raises
    ------
    InputError
        If the shapes do not fit.
    """
    device = checked_geometry(geometry).device
    logits = _planes(logits, "logits", device)
    count, height, width = logits.shape
    if count != len(geometry):
        raise InputError(f"logits are {count} masks; expected {len(geometry)}, one per canvas of the geometry")
    boxes = memory.acquire(count * 16, device=device).view((count, 4), dtype=np.float32)
    areas = memory.acquire(count * 4, device=device).view((count,), dtype=np.int32)
    if count and device == "cpu":
        flat = (geometry.scales.reshape(-1), boxes.reshape(-1), areas)
        _loop("mask_boxes_cpu")(logits.reshape(-1), count, height, width, np.float32(threshold), *flat)
    elif count:
        from nbvision_kernels.catalog import mask_boxes_kernel

        numbers = (np.int32(height), np.int32(width), np.float32(threshold))
        kernel = load_kernel(mask_boxes_kernel(), logits.device.id)
        kernel((count,), (_THREADS,), (logits, *numbers, geometry.scales, boxes, areas))
    return boxes, areas


def mask_centroids(masks: Any, geometry: Geometry | None = None, *, threshold: float = 0.0) -> Any:
    """The centroid of each mask: the mean of the centres of its pixels.

    Parameters
    ----------
    masks : (M, 1, H, W) or (M, H, W) array
        Logits, probabilities, bool or integers; more than ``threshold`` is inside. With a geometry one mask per canvas
        of it, on its device. What are no floats is converted to float32 first.
    geometry : Geometry, optional
        Of the crops that the mask head saw.
    threshold : float
        0 for logits and for 0 and 1, 0.5 for probabilities.

    Returns
    -------
    (M, 2) float32 array
        x, y in source pixels, or in pixels of the masks without a geometry; 0, 0 for an empty mask. As with boxes, the
        centre of the first pixel is 0.5, 0.5. The sums are of integers, so both devices give the same bits.

    Raises
    ------
    InputError
        If the shapes do not fit.
    """
    device = device_of(masks) if geometry is None else checked_geometry(geometry).device
    masks = _planes(masks, "masks", device, _NUMBERS)
    count, height, width = masks.shape
    if geometry is not None and count != len(geometry):
        raise InputError(f"there are {count} masks; expected {len(geometry)}, one per canvas of the geometry")
    centroids = memory.acquire(count * 8, device=device).view((count, 2), dtype=np.float32)
    scales = masks.reshape(-1) if geometry is None else geometry.scales.reshape(-1)  # not read without a geometry
    numbers = (np.int32(height), np.int32(width), np.float32(number("threshold", threshold)))
    last = (scales, np.int32(geometry is not None), centroids.reshape(-1))
    if count and device == "cpu":
        _loop("mask_centroids_cpu")(masks.reshape(-1), count, *numbers, *last)
    elif count:
        from nbvision_kernels.catalog import mask_centroids_kernel
        from nbvision_kernels.codes import MASK_BLOCK_LINES, MASK_BLOCK_WIDTH

        kernel = load_kernel(mask_centroids_kernel(), masks.device.id)
        kernel((count,), (MASK_BLOCK_WIDTH, MASK_BLOCK_LINES), (masks, *numbers, *last))
    return centroids


def cut_out(
    crops: Any,
    logits: Any,
    *,
    threshold: float = 0.0,
    fill: float = 0.5,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    out: Any = None,
) -> Any:
    """Replace the background of each crop by ``fill``, then normalise: one launch from mask head to embedder.

    Parameters
    ----------
    crops : (M, 3, H, W) float32 array
        Values in the units of ``fill``, ``mean`` and ``std``, such as 0..1.
    logits : (M, 1, H, W) or (M, H, W) float array
        On the same device; more than ``threshold`` is kept.
    threshold : float
        0 for logits, 0.5 for probabilities.
    fill : float
        Value of the background, before normalising.
    mean, std : float or three floats, optional
        Output is ``(value - mean[c]) / std[c]``.
    out : (M, 3, H, W) float32 array, optional
        May be ``crops`` itself.

    Returns
    -------
    (M, 3, H, W) float32 array

    Raises
    ------
    InputError
        If shapes, dtypes or devices do not fit.
    """
    device = device_of(crops)
    crops = to_device(crops, device)
    logits = _planes(logits, "logits", device)
    if crops.ndim != 4 or crops.shape[1] != 3 or crops.dtype != np.float32:
        raise InputError(f"crops have shape {crops.shape} and dtype {crops.dtype}; expected (M, 3, H, W) float32")
    count = crops.shape[0]
    if logits.shape != (count, *crops.shape[2:]):
        raise InputError(f"logits have shape {logits.shape}; expected {(count, *crops.shape[2:])}, one mask per crop")
    crops = array_module(device).ascontiguousarray(crops)
    if out is None:
        out = memory.acquire(crops.nbytes, device=device).view(crops.shape, dtype=np.float32)
    elif out.shape != crops.shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise InputError(f"out has shape {out.shape} and dtype {out.dtype}; expected contiguous {crops.shape} float32")
    gain, bias = affine(
        1.0,
        three_numbers("mean", 0.0 if mean is None else mean),
        three_numbers("std", 1.0 if std is None else std),
    )
    plane = crops.shape[2] * crops.shape[3]
    numbers = (np.float32(threshold), np.float32(fill))
    if count and device == "cpu":
        flat = (crops.reshape(-1), logits.reshape(-1))
        _loop("cut_out_cpu")(*flat, count, plane, *numbers, gain, bias, out.reshape(-1))
    elif count:
        from nbvision_kernels.catalog import cut_out_kernel

        kernel = load_kernel(cut_out_kernel(), crops.device.id)
        for first in range(0, count, _MAX_GRID_Y):
            part = slice(first, first + _MAX_GRID_Y)
            grid = (-(-plane // _THREADS), len(crops[part]))
            arguments = (crops[part], logits[part], np.int32(plane), *numbers, *gain, *bias, out[part])
            kernel(grid, (_THREADS,), arguments)
    return out


def cut_out_rgba(
    images: Any,
    boxes: Any,
    masks: Any,
    *,
    box_images: Any = None,
    mask_regions: Any = None,
    threshold: float = 0.0,
) -> ImageBatch:
    """Cut objects out of images, with their masks as alpha.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        See :func:`nbvision.as_batch`. Where they are, the work is done.
    boxes : FlatDetections or (M, 4) array
        x1, y1, x2, y2 in source pixels; grown to whole pixels and clipped to their image, as
        :class:`nbvision.Preprocess` crops them. They are the sizes of the new images, which the host must know: boxes
        on a CUDA device, and ``mask_regions``, are copied to the host, which waits for them.
    masks : (M, 1, H, W) or (M, H, W) array
        One per box: logits, probabilities, bool or integers; more than ``threshold`` is inside. Each is stretched over
        its region: 1 or 0 at the centres of its pixels, interpolated between, and opaque where that is a half or more,
        as :func:`nbvision.draw` tints.
    box_images : (M,) integer array, optional
        The image of each box; may be left out for a single image, and comes with FlatDetections.
    mask_regions : (M, 4) array, optional
        Where each mask lies in its image, rounded to whole pixels; default: the part that is cut out. For crops with a
        margin, or letterboxed ones, what :meth:`Geometry.to_source <nbvision.Geometry.to_source>` gives of the whole
        canvas; for masks of the image's size, the whole image. Outside its region nothing is opaque.
    threshold : float
        0 for logits and for 0 and 1, 0.5 for probabilities.

    Returns
    -------
    ImageBatch
        M images, ``"rgba"`` whatever the order in the sources. Alpha is 255, or the source's own, inside the mask, and
        0 outside, where the colours stay as they are.

    Raises
    ------
    InputError
        If shapes or dtypes do not fit; for a box that is NaN, of no area, or outside its image or of a missing one.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> image = np.full((60, 90, 3), 200, np.uint8)
    >>> objects = nbv.cut_out_rgba(image, [[10, 20, 80, 55]], np.ones((1, 28, 28), bool))
    >>> objects[0].shape
    (35, 70, 4)
    """
    batch = as_batch(images)
    device = batch.device
    if isinstance(boxes, Detections):
        raise InputError("boxes are Detections; expected a list of boxes: call their flat()")
    if isinstance(boxes, FlatDetections):
        if box_images is not None:
            raise InputError("box_images came with FlatDetections, which have their own; leave them out")
        boxes, box_images = boxes.boxes, boxes.images
    boxes, box_images = checked_host_boxes(boxes, box_images, batch.sizes)
    records, sizes = _object_records(boxes, box_images, mask_regions, batch.sizes)
    count = len(records)
    masks = _planes(masks, "masks", device, _NUMBERS)
    if len(masks) != count or (count and 0 in masks.shape):
        raise InputError(f"masks have shape {masks.shape}; expected ({count}, H, W), one mask per box")
    swap = np.int32(interleaved_color(batch)[:3] == "bgr")
    numbers = (np.int32(batch.channels), swap)
    shape = (np.int32(masks.shape[1]), np.int32(masks.shape[2]), np.float32(number("threshold", threshold)))
    if device == "cuda":
        batch.use_on_current_stream()
    out = ImageBatch.allocate(sizes.tolist(), color="rgba", device=device)
    if not count:
        return out
    height, width = (int(length) for length in out.sizes.max(axis=0))
    if device == "cpu":
        tables = (np.int64(0), batch.table.reshape(-1), out.table.reshape(-1), records.reshape(-1))
        _loop("cut_out_rgba_cpu")(*tables, count, height, *numbers, masks.reshape(-1), *shape)
    else:
        from nbvision_kernels.catalog import cut_out_rgba_kernel
        from nbvision_kernels.codes import MASK_BLOCK_LINES, MASK_BLOCK_WIDTH

        kernel = load_kernel(cut_out_rgba_kernel(), masks.device.id)
        on_device = array_module(device).asarray(records)
        for first in range(0, count, _MAX_GRID_Y):
            grid = (-(-width // MASK_BLOCK_WIDTH), -(-height // MASK_BLOCK_LINES), min(count - first, _MAX_GRID_Y))
            arguments = (0, 0, batch.table, out.table, on_device, *numbers, masks, *shape, np.int32(first))
            kernel(grid, (MASK_BLOCK_WIDTH, MASK_BLOCK_LINES), arguments)
    return out


def _object_records(
    boxes: npt.NDArray[np.float32], images: npt.NDArray[np.int64], regions: Any, sizes: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """What :mod:`nbvision_kernels.masks` calls records, and the (M, 2) height and width of what is cut out."""
    far_corner = sizes[images][:, ::-1].astype(np.float32)
    part = np.empty(boxes.shape, np.int32)
    part[:, :2] = np.floor(np.maximum(boxes[:, :2], 0))
    part[:, 2:] = np.ceil(np.minimum(boxes[:, 2:], far_corner))
    rectangles = part
    if regions is not None:
        regions = np.asarray(to_device(regions, "cpu"))
        if regions.shape != boxes.shape or regions.dtype.kind not in "fiu":
            raise InputError(
                f"mask_regions have shape {regions.shape} and dtype {regions.dtype}; expected numbers "
                f"{boxes.shape}, one region per box"
            )
        regions = np.where(np.isnan(regions).any(axis=1, keepdims=True), 0, regions)
        rectangles = np.rint(np.clip(regions, -_FARTHEST, _FARTHEST)).astype(np.int32)
    records = np.concatenate([images[:, None], part[:, :2], rectangles], axis=1).astype(np.int32)
    return records, part[:, [3, 2]] - part[:, [1, 0]]


def paste_masks(
    masks: Any,
    geometry: Any,
    size: tuple[int, int] | npt.NDArray[np.integer[Any]],
    *,
    threshold: float = 0.0,
    limit_bytes: int | None = None,
) -> Any:
    """Masks of crops as masks of their whole sources.

    Each source pixel takes the mask's value at its centre, bilinear between the centres of the mask's pixels, and is
    inside if that is more than ``threshold``. At the border of its crop a mask's last values continue; beyond the crop
    nothing is inside.

    Parameters
    ----------
    masks : (M, 1, h, w) or (M, h, w) array
        Logits, probabilities, bool or integers; what are no floats is converted to float32 first.
    geometry : Geometry or (M, 4) float array
        Of the crops that the mask head saw: one mask per canvas, of the canvas's size, on the geometry's device. Or
        boxes, x1, y1, x2, y2 in source pixels, over each of which its mask is stretched; one that is NaN, infinite or
        of no area gives an empty mask.
    size : (int, int) or (N, 2) integer array
        Height and width of every source, or, with a geometry, of each: ``batch.sizes``.
    threshold : float
        0 for logits, 0.5 for probabilities and for 0 and 1.
    limit_bytes : int, optional
        Room for all masks together, where each source has its own size; see :func:`nbvision.instance_masks`. By
        default M times the largest source, which always suffices.

    Returns
    -------
    (M, H, W) bool array, or Masks
        For one size, whole sources; for a size of each, only the pixels of each crop, and where they lie in its source.
        Both on the same device; nothing waits on the host.

    Raises
    ------
    InputError
        If shapes, dtypes or sizes do not fit.
    """
    given_geometry = isinstance(geometry, Geometry)
    device = geometry.device if given_geometry else device_of(masks)
    masks = _planes(masks, "masks", device, _NUMBERS)
    count, rows, columns = masks.shape
    if rows < 1 or columns < 1:
        raise InputError(f"masks have shape {masks.shape}; expected no empty side")
    ragged, height, width = _source_size(size, given_geometry)
    if limit_bytes is not None and not ragged:
        raise InputError("limit_bytes came with one size for all, whose room is known; leave it out")
    places, boxes = _places(geometry, masks, device)
    capacity = count * height * width if limit_bytes is None else whole("limit_bytes", limit_bytes, least=0)
    centers = boxes - np.float32(0.5)  # a pixel is in a box if its centre is
    where = (centers, array_module(device).zeros(count, np.int64), 1, places, False)
    table, needed = mask_table(*where, size=(height, width), capacity=capacity, device=device)
    shape = (capacity,) if ragged else (count, height, width)
    pixels = memory.acquire(capacity, device=device).view(shape, dtype=np.uint8 if ragged else np.bool_)
    if not ragged:
        pixels.fill(0)
    numbers = (np.int32(count), np.int32(rows), np.int32(columns), np.float32(number("threshold", threshold)))
    canvas = (np.int64(height * width), np.int32(0 if ragged else width))
    if count and device == "cpu":
        flat = (masks.reshape(-1), places.reshape(-1), table.reshape(-1))
        _loop("paste_masks_cpu")(*flat, *numbers, height, *canvas, pixels.reshape(-1).view(np.uint8))
    elif count:
        from nbvision_kernels.catalog import paste_masks_kernel
        from nbvision_kernels.codes import MASK_BLOCK_LINES, MASK_BLOCK_WIDTH

        blocks = min(-(-height // MASK_BLOCK_LINES), max(_PASTE_BLOCKS // count, 8))
        kernel = load_kernel(paste_masks_kernel(), masks.device.id)
        arguments = (masks, places, table, *numbers, *canvas, pixels)
        kernel((blocks, min(count, _MAX_GRID_Y)), (MASK_BLOCK_WIDTH, MASK_BLOCK_LINES), arguments)
    return Masks(pixels, table, needed, (height, width), device) if ragged else pixels


def _source_size(size: Any, given_geometry: bool) -> tuple[bool, int, int]:
    """Whether each source has its own size, and the largest height and width."""
    try:
        sizes = np.asarray(size)
    except (TypeError, ValueError):
        sizes = np.zeros(0)
    if sizes.dtype.kind not in "iu" or sizes.shape[-1:] != (2,) or sizes.ndim > 2 or (sizes < 0).any():
        raise InputError(f"size is {size!r:.80}; expected (height, width), or one row of them per source")
    if sizes.ndim == 2 and not given_geometry:
        raise InputError(f"size is of {len(sizes)} sources; expected one size, as boxes do not say their sources")
    height, width = np.max(sizes.reshape(-1, 2), axis=0, initial=0).tolist()
    return sizes.ndim == 2, height, width


def _places(geometry: Any, masks: Any, device: Device) -> tuple[Any, Any]:
    """What :mod:`nbvision_kernels.masks` calls places, (M, 8) float32, and the boxes that they cover, (M, 4)."""
    xp = array_module(device)
    count, rows, columns = masks.shape
    if isinstance(geometry, Geometry):
        from nbvision_kernels.codes import OUT_HEIGHT, X

        if len(geometry) != count:
            raise InputError(f"there are {count} masks; expected {len(geometry)}, one per canvas of the geometry")
        places = xp.ascontiguousarray(geometry.regions[:, X : OUT_HEIGHT + 1], dtype=np.float32)
        return places, xp.concatenate([places[:, :2], places[:, :2] + places[:, 2:4]], axis=1)
    boxes = to_device(geometry, device)
    if boxes.shape != (count, 4) or boxes.dtype.kind not in "fiu":
        raise InputError(
            f"geometry has shape {boxes.shape} and dtype {boxes.dtype}; expected a Geometry or ({count}, 4) boxes, "
            "one per mask"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
        boxes = boxes.astype(np.float32)
    boxes = xp.where(xp.isfinite(boxes).all(axis=1, keepdims=True), boxes, np.float32(0))
    places = xp.zeros((count, 8), np.float32)
    places[:, :2] = boxes[:, :2]
    places[:, 2:4] = boxes[:, 2:] - boxes[:, :2]
    places[:, 6] = columns
    places[:, 7] = rows
    return places, boxes


_NUMBERS = "fbiu"


def _planes(array: Any, name: str, device: Any, kinds: str = "f") -> Any:
    """(M, 1, H, W) or (M, H, W) numbers of these kinds as contiguous (M, H, W) float32."""
    array = to_device(array, device)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3 or array.dtype.kind not in kinds:
        what = "floats" if kinds == "f" else "numbers"
        raise InputError(
            f"{name} have shape {array.shape} and dtype {array.dtype}; expected {what} (M, 1, H, W) or (M, H, W)"
        )
    return array_module(device).ascontiguousarray(array, dtype=np.float32)


@functools.cache
def _loop(name: str) -> Any:
    from nbvision_kernels import masks

    return cpu_loop(name, getattr(masks, name))
