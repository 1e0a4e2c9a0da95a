"""Arguments of operations: each is what was expected, or an error says so."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np

from nbvision.errors import InputError
from nbvision.image import CHANNELS, Color, ImageBatch, as_batch, interleaved_color, to_device
from nbvision.runtime import memory
from nbvision.runtime.device import device_of

__all__ = [
    "as_given",
    "collected",
    "finite",
    "image_size",
    "number",
    "one_of",
    "target_for",
    "three_numbers",
    "whole",
]


def number(name: str, value: float) -> float:
    """A number; infinite ones too, which is no limit at all."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.nan
    if math.isnan(result):
        raise InputError(f"{name} is {value!r}; expected a number")
    return result


def finite(name: str, value: float) -> float:
    """A number that is not infinite."""
    result = number(name, value)
    if math.isinf(result):
        raise InputError(f"{name} is {value!r}; expected a finite number")
    return result


def whole(name: str, value: int, *, least: int) -> int:
    """An integer of at least ``least``."""
    try:
        result = operator.index(value)
    except TypeError:
        result = least - 1
    if result < least:
        raise InputError(f"{name} is {value!r}; expected an integer, {least} or more")
    return result


def three_numbers(name: str, value: float | Sequence[float]) -> tuple[float, float, float]:
    """One number for every channel, or three."""
    try:
        values = np.broadcast_to(np.asarray(value, np.float64).reshape(-1), 3)
    except (TypeError, ValueError):
        values = np.array([])
    if values.size != 3 or not np.isfinite(values).all():
        raise InputError(f"{name} is {value}; expected one finite number, or three, one per channel")
    first, second, third = values.tolist()
    return first, second, third


def one_of(name: str, value: str, choices: Any) -> Any:
    """One of the strings of a ``Literal``."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise InputError(f"{name} is {value!r}; expected one of {get_args(choices)}")
    return value


def image_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width, each from 1 to 65535."""
    try:
        height, width = (operator.index(length) for length in size)
    except (TypeError, ValueError):
        height = width = 0
    if not (0 < height < 65536 and 0 < width < 65536):
        raise InputError(f"size is {size!r}; expected (height, width), each an integer from 1 to 65535")
    return height, width


# --- images: what comes in goes out -----------------------------------------------------------------------------------

_COLOR_OF: dict[int, Color] = {1: "gray", 3: "rgb", 4: "rgba"}


def collected(images: Any) -> tuple[Any, ImageBatch]:
    """The images as they were given, an iterable as a list, and the batch of them. Arrays say how many channels they
    have; what these mean does not matter."""
    if isinstance(images, ImageBatch):
        return images, images
    one = hasattr(images, "shape")
    if not one:
        if not isinstance(images, Iterable):
            raise InputError(f"images are a {type(images).__name__}; expected an array, or several of them")
        images = list(images)
        if not images:
            return images, as_batch(images)
    shape = tuple(getattr(images if one else images[0], "shape", ()))
    channels = 1 if len(shape) == 2 else shape[-1] if len(shape) in ((3, 4) if one else (3,)) else 0
    if channels not in _COLOR_OF:
        raise InputError(
            f"{'images have' if one else 'image 0 has'} shape {shape}; expected (height, width), or "
            f"(height, width, channels) with 1, 3 or 4 channels{', or several of them' if one else ''}"
        )
    return images, as_batch(images, color=_COLOR_OF[channels], device=device_of(images if one else images[0]))


def target_for(
    images: Any, batch: ImageBatch, sizes: Sequence[tuple[int, int]], out: Any, *, color: Color | None = None
) -> tuple[ImageBatch, ImageBatch | Any]:
    """Where an operation writes one image of each size, as a batch and in the form of ``images``: a batch, an array,
    or for several sizes a list. Of ``out`` if there is one, else new. In another colour than the images' if one is
    given, a single gray one then as (H, W)."""
    new_color = color or interleaved_color(batch)
    channels = CHANNELS[new_color]
    if isinstance(images, ImageBatch):
        if out is None:
            target = ImageBatch.allocate(sizes, color=new_color, device=batch.device)
            target.errors = batch.errors
            return target, target
        fits = isinstance(out, ImageBatch) and (out.color, out.device, out.sizes.tolist()) == (
            new_color,
            batch.device,
            [list(size) for size in sizes],
        )
        if not fits:
            raise InputError(f"out is {out!r}; expected a batch of {new_color} on {batch.device} of sizes {sizes}")
        return _writable(out, batch), out
    if len(set(sizes)) > 1:
        if out is not None:
            raise InputError(
                f"out came with images of several sizes, {sizes}; leave it out, or make them an ImageBatch"
            )
        target = ImageBatch.allocate(sizes, color=new_color, device=batch.device)
        return target, list(target)
    size = sizes[0] if sizes else (0, 0)
    stack_shape = (len(sizes), *size, channels)
    shape: tuple[int, ...] = stack_shape
    if hasattr(images, "shape") and len(images.shape) < 4:
        gray = len(images.shape) == 2 if color is None else channels == 1
        shape = size if gray else stack_shape[1:]
    if out is None:
        array = memory.acquire(math.prod(shape), device=batch.device).view(shape)
    else:
        array = _array_of(out, shape, batch)
    target = ImageBatch.from_arrays(array.reshape(stack_shape), color=new_color, device=batch.device)
    return target if out is None else _writable(target, batch), array


def as_given(result: Any, images: Any, out: Any) -> Any:
    """A result of :func:`target_for`, or ``out``; arrays in torch's form where the images were torch's."""
    if out is not None:
        return out
    first = images[0] if isinstance(images, list) and images else images
    if not type(first).__module__.startswith("torch"):
        return result
    import torch

    return [torch.from_dlpack(array) for array in result] if isinstance(result, list) else torch.from_dlpack(result)


def _array_of(out: Any, shape: tuple[int, ...], batch: ImageBatch) -> Any:
    if device_of(out) != batch.device:
        raise InputError(f"out is on {device_of(out)}, the images are on {batch.device}; give both on one device")
    array = to_device(out, batch.device)
    if array.shape != shape or array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise InputError(
            f"out has shape {array.shape}, dtype {array.dtype}, contiguous={array.flags.c_contiguous}; "
            f"expected a contiguous uint8 array of shape {shape}"
        )
    return array


def _writable(target: ImageBatch, batch: ImageBatch) -> ImageBatch:
    """The target, if it can be written and is no memory of the images of ``batch``."""
    if target.device == "cpu" and not all(target[int(index)].flags.writeable for index in np.flatnonzero(target.ok)):
        raise InputError("out is read-only; expected memory that can be written")
    if any(batch.shares_memory(target[int(index)]) for index in np.flatnonzero(target.ok)):
        raise InputError("out shares memory with the images; expected other memory")
    return target
