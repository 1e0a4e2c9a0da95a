"""Masks out of a mask head: extents in source pixels, and cut-outs for the next model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbvision.errors import InputError
from nbvision.image import to_device
from nbvision.ops.arguments import three_numbers
from nbvision.ops.geometry import Geometry, checked_geometry
from nbvision.ops.preprocess import affine
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import array_module, device_of

__all__ = ["argmax_map", "cut_out", "mask_boxes"]

_THREADS = 256
_MAX_GRID_Y = 65535


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


def _planes(array: Any, name: str, device: Any) -> Any:
    """(M, 1, H, W) or (M, H, W) floats as contiguous (M, H, W) float32."""
    array = to_device(array, device)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3 or array.dtype.kind != "f":
        raise InputError(
            f"{name} have shape {array.shape} and dtype {array.dtype}; expected floats (M, 1, H, W) or (M, H, W)"
        )
    return array_module(device).ascontiguousarray(array, dtype=np.float32)


@functools.cache
def _loop(name: str) -> Any:
    from nbvision_kernels import masks

    return cpu_loop(name, getattr(masks, name))
