"""Arithmetic on images, a byte at a time, with OpenCV's rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from nbvision.errors import InputError
from nbvision.image import ImageBatch, as_batch, interleaved_color, to_device
from nbvision.ops._pointwise import run_pointwise
from nbvision.ops.arguments import as_given, collected, finite, one_of, target_for
from nbvision.ops.resize import plan
from nbvision.runtime.device import array_module, device_of, on_stream

__all__ = ["ThresholdMode", "add_weighted", "blend", "convert", "lut", "normalize", "threshold"]

ThresholdMode = Literal["binary", "binary_inv", "trunc", "tozero", "tozero_inv"]


def threshold(
    images: Any,
    threshold: float,
    *,
    max_value: float = 255,
    mode: ThresholdMode = "binary",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Each byte against a threshold, as ``cv2.threshold`` does it: the same bytes.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W) or (H, W, C) uint8 array, one (N, H, W, C) array, several arrays, or a batch. C is 1, 3 or 4.
    threshold : float
        What is above it counts; rounded down.
    max_value : float
        Of ``"binary"`` and ``"binary_inv"``; rounded half to even, saturated.
    mode : {"binary", "binary_inv", "trunc", "tozero", "tozero_inv"}
        Above the threshold the value becomes ``max_value``, 0, the threshold, itself or 0; else 0, ``max_value``,
        itself, 0 or itself.
    out : ImageBatch or array, optional
        Where to write; no memory of the images.
    stream : CUDA stream, optional
        Default: CuPy's current stream. Nothing waits on the host.

    Returns
    -------
    ImageBatch or array
        What came in: a batch, one array, an (N, H, W, C) array, or a list where the sizes differ.

    Raises
    ------
    InputError
        For options and shapes that do not fit.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.threshold(np.array([[90, 100, 110]], np.uint8), 100).tolist()
    [[0, 0, 255]]
    """
    from nbvision_kernels.codes import THRESHOLD, THRESHOLDS

    kind = THRESHOLDS[one_of("mode", mode, ThresholdMode)]
    limit = min(max(math.floor(finite("threshold", threshold)), 0 if mode == "trunc" else -1), 255)
    most = min(max(round(finite("max_value", max_value)), 0), 255)
    images, batch = collected(images)
    with on_stream(stream, batch.device):
        target, result = target_for(images, batch, _sizes(batch), out)
        run_pointwise(THRESHOLD, batch, target, limit, most, kind)
        return as_given(result, images, out)


def add_weighted(
    first: Any, alpha: float, second: Any, beta: float, gamma: float = 0.0, *, out: Any = None, stream: Any = None
) -> Any:
    """``first * alpha + second * beta + gamma``, as ``cv2.addWeighted`` does it: the bytes of its vector code, float32
    with fused multiply-adds, rounded half to even and saturated.

    Parameters
    ----------
    first, second : ImageBatch, array or iterable of arrays
        Images of equal sizes and channels on one device; see :func:`threshold`.
    alpha, beta, gamma : float
    out : ImageBatch or array, optional
        Where to write; no memory of the images.
    stream : CUDA stream, optional

    Returns
    -------
    ImageBatch or array
        In the form of ``first``.

    Raises
    ------
    InputError
        For images that do not fit each other, and numbers that are none.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.add_weighted(np.array([[200]], np.uint8), 0.5, np.array([[101]], np.uint8), 0.5).tolist()
    [[150]]
    """
    from nbvision_kernels.codes import ADD_WEIGHTED

    numbers = (finite("alpha", alpha), finite("beta", beta), finite("gamma", gamma))
    images, batch = collected(first)
    other = _like(batch, second)
    with on_stream(stream, batch.device):
        target, result = _target_beside(images, batch, other, out)
        run_pointwise(ADD_WEIGHTED, batch, target, *numbers, second=other)
        return as_given(result, images, out)


def blend(first: Any, second: Any, mask: Any, *, out: Any = None, stream: Any = None) -> Any:
    """``first`` where the mask is 1, ``second`` where it is 0, and between them between: ``second + (first - second) *
    mask`` in float32, rounded half to even.

    Parameters
    ----------
    first, second : ImageBatch, array or iterable of arrays
        Images of equal sizes and channels on one device; see :func:`threshold`.
    mask : ImageBatch, array or iterable of arrays
        (H, W) for one image, (N, H, W) or one (H, W) for each of several: bool, uint8 of 0..255, or float32,
        limited to 0..1, NaN being 0. Of uint8 masks the result is that of Pillow's ``Image.composite``.
    out : ImageBatch or array, optional
        Where to write; no memory of the images.
    stream : CUDA stream, optional

    Returns
    -------
    ImageBatch or array
        In the form of ``first``.

    Raises
    ------
    InputError
        For images and masks that do not fit each other.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> black, white = np.zeros((1, 3), np.uint8), np.full((1, 3), 255, np.uint8)
    >>> nbv.blend(white, black, np.array([[0, 0.5, 1]], np.float32)).tolist()
    [[0, 128, 255]]
    """
    from nbvision_kernels.codes import BLEND_BYTES, BLEND_FLOATS

    images, batch = collected(first)
    other = _like(batch, second)
    masks = _masks(batch, mask)
    with on_stream(stream, batch.device):
        target, result = _target_beside(images, batch, other, out)
        run_pointwise(BLEND_BYTES if masks.dtype == np.uint8 else BLEND_FLOATS, batch, target, second=other, mask=masks)
        return as_given(result, images, out)


def lut(images: Any, table: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Each byte replaced by what a table has for it, as ``cv2.LUT`` does.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        See :func:`threshold`.
    table : (256,) or (256, C) uint8 array
        For all channels, or one column for each; on the host or the images' device.
    out : ImageBatch or array, optional
        Where to write; no memory of the images.
    stream : CUDA stream, optional

    Returns
    -------
    ImageBatch or array
        What came in.

    Raises
    ------
    InputError
        For a table of another shape or dtype.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.lut(np.array([[1, 2]], np.uint8), np.arange(255, -1, -1, dtype=np.uint8)).tolist()
    [[254, 253]]
    """
    from nbvision_kernels.codes import LUT

    images, batch = collected(images)
    shape, dtype = tuple(getattr(table, "shape", ())), str(getattr(table, "dtype", type(table).__name__))
    if shape not in {(256,), (256, 1), (256, batch.channels)} or not dtype.endswith("uint8"):
        raise InputError(f"table has shape {shape} and dtype {dtype}; expected (256,) or (256, {batch.channels}) uint8")
    with on_stream(stream, batch.device):
        table = array_module(batch.device).ascontiguousarray(to_device(table, batch.device))
        target, result = target_for(images, batch, _sizes(batch), out)
        run_pointwise(LUT, batch, target, table.size // 256, table=table)
        return as_given(result, images, out)


def normalize(
    images: Any,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    *,
    scale: float = 1 / 255,
    dtype: Literal["float16", "bfloat16", "float32"] = "float32",
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """``(value * scale - mean) / std`` of images of one size, channels in their order: a kept
    :class:`nbvision.Preprocess` that resizes nothing.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        uint8, float16 or float32, three channels or gray, see :func:`nbvision.image.as_batch`; all of one size.
    mean, std : float or three floats
    scale : float
    dtype : {"float32", "float16", "bfloat16"}
    layout : {"NCHW", "NHWC"}
    out : array, optional
        Where to write: contiguous, of the result's shape and dtype, where the images are.
    stream : CUDA stream, optional

    Returns
    -------
    (N, C, H, W) or (N, H, W, C) array
        With C of 3, or 1 for gray images.

    Raises
    ------
    InputError
        For images of several sizes; resize them with ``Preprocess``.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.normalize(np.full((4, 6, 3), 255, np.uint8), 0.5, 0.25).max()
    np.float32(2.0)
    """
    batch = images if isinstance(images, ImageBatch) else _as_images(images)
    sizes = {tuple(size) for size in batch.sizes[batch.ok].tolist()}
    if len(sizes) != 1:
        raise InputError(f"images have sizes {sorted(sizes)}; expected one size: Preprocess resizes and normalizes")
    color = "gray" if batch.color == "gray" else "bgr" if batch.color.startswith("bgr") else "rgb"
    options: dict[str, Any] = {"mean": _hashable(mean), "std": _hashable(std), "scale": scale, "color": color}
    options |= {"fit": "stretch", "interpolation": "nearest", "dtype": dtype, "layout": layout, "fill": 0}
    tensor, _ = plan(sizes.pop(), **options)(batch, out=out, stream=stream)
    return tensor


def convert(array: Any, dtype: Any, *, scale: float = 1.0, bias: float = 0.0) -> Any:
    """``array * scale + bias`` in another dtype, as OpenCV's ``convertTo`` does: in float32, for integers rounded half
    to even and saturated.

    Parameters
    ----------
    array : NumPy or CuPy array of numbers
    dtype : {"uint8", "int8", "uint16", "int16", "float16", "float32"}
    scale, bias : float

    Returns
    -------
    array of the same shape, where the array was

    Raises
    ------
    InputError
        For another dtype.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.convert(np.array([0.25, 0.5, 2.0]), "uint8", scale=255).tolist()
    [64, 128, 255]
    """
    name = str(np.dtype(dtype)) if not isinstance(dtype, str) else dtype
    if name not in ("uint8", "int8", "uint16", "int16", "float16", "float32"):
        raise InputError(f"dtype is {name}; expected uint8, int8, uint16, int16, float16 or float32")
    xp = array_module(device_of(array))
    values = to_device(array, device_of(array)).astype(np.float32)
    values *= np.float32(finite("scale", scale))
    values += np.float32(finite("bias", bias))
    if name.startswith("float"):
        return values.astype(name, copy=False)
    limits = np.iinfo(name)
    return xp.clip(xp.rint(values), limits.min, limits.max).astype(name)


# --- arguments --------------------------------------------------------------------------------------------------------


def _sizes(batch: ImageBatch) -> list[tuple[int, int]]:
    return [(height, width) for height, width in batch.sizes.tolist()]


def _like(batch: ImageBatch, second: Any) -> ImageBatch:
    """The second images, which must have the sizes, the channels and the device of the first."""
    _, other = collected(second)
    interleaved_color(batch)
    interleaved_color(other)
    if other.device != batch.device:
        raise InputError(f"second is on {other.device}, first is on {batch.device}; give both on one device")
    if other.channels != batch.channels or not np.array_equal(other.sizes, batch.sizes):
        raise InputError(
            f"second has sizes {other.sizes.tolist()} and {other.channels} channels, first {batch.sizes.tolist()} and "
            f"{batch.channels}; expected the same"
        )
    return other


def _masks(batch: ImageBatch, mask: Any) -> ImageBatch:
    """One gray image of uint8 or float32 for each image."""
    if isinstance(mask, ImageBatch):
        masks = mask
    else:
        one = hasattr(mask, "shape") and len(mask.shape) == 2
        planes = [to_device(plane, batch.device) for plane in ([mask] if one else mask)]
        planes = [plane.astype(np.uint8) * np.uint8(255) if plane.dtype == bool else plane for plane in planes]
        masks = as_batch(planes, color="gray", device=batch.device)
    right = masks.color == "gray" and masks.dtype in (np.uint8, np.float32)
    if not right or not np.array_equal(masks.sizes, batch.sizes):
        raise InputError(
            f"mask is {masks.color} {masks.dtype} of sizes {masks.sizes.tolist()}; expected one channel of bool, uint8 "
            f"or float32 and sizes {batch.sizes.tolist()}"
        )
    return masks


def _target_beside(images: Any, batch: ImageBatch, other: ImageBatch, out: Any) -> tuple[ImageBatch, Any]:
    target, result = target_for(images, batch, _sizes(batch), out)
    if out is not None and any(other.shares_memory(image) for image in target):
        raise InputError("out shares memory with the images; expected other memory")
    return target, result


def _as_images(images: Any) -> ImageBatch:
    """As :func:`as_batch` with the colour that the number of channels tells."""
    first = images if hasattr(images, "shape") else next(iter(images), None)
    shape = tuple(getattr(first, "shape", ()))
    gray = len(shape) == 2 or shape[-1:] == (1,)
    return as_batch(images, color="gray" if gray else "rgb")


def _hashable(value: float | Sequence[float]) -> Any:
    return value if isinstance(value, (int, float)) else tuple(value)
