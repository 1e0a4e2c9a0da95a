"""Resized and letterboxed images: plans of ``Preprocess`` that write images instead of a model's tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from nbvision.errors import InputError
from nbvision.image import ImageBatch, interleaved_color
from nbvision.ops.arguments import as_given, collected, image_size, target_for, three_numbers, whole
from nbvision.ops.preprocess import Interpolation, Parity, Preprocess
from nbvision.runtime import memory
from nbvision.runtime.device import array_module, on_stream

__all__ = ["letterbox", "plan", "resize"]


def resize(
    images: Any,
    size: tuple[int, int],
    *,
    interpolation: Interpolation = "linear",
    parity: Parity = "cv2",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Images of one size, as ``cv2.resize`` makes them.

    A :class:`nbvision.Preprocess` of the same options does the work and is kept, as is its compiled kernel. Three
    channels are written as they are computed; gray and alpha take a copy more.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W) or (H, W, C) uint8 array, one (N, H, W, C) array, several arrays of any sizes, or a batch. C is 1, 3
        or 4.
    size : (int, int)
        Height and width of the output, each up to 65535.
    interpolation, parity : str
        See :class:`nbvision.Preprocess`.
    out : array, optional
        Where to write: contiguous uint8 of the result's shape, where the images are; (N, H, W, C) for a batch.
    stream : CUDA stream, optional
        Default: CuPy's current stream. Nothing waits on the host.

    Returns
    -------
    ImageBatch or array
        What came in goes out: for a batch a batch, whose missing images stay missing; for one array one of its library
        (NumPy, CuPy, torch); for several, or one of four axes, an (N, H, W, C) array. The channels keep their order.

    Raises
    ------
    InputError
        For shapes, options or devices that do not fit.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.resize(np.zeros((60, 90, 3), np.uint8), (20, 30)).shape
    (20, 30, 3)
    """
    images, batch = collected(images)
    options: dict[str, Any] = {"fit": "stretch", "interpolation": interpolation, "parity": parity}
    return _planned(images, batch, image_size(size), options, out, stream)


def letterbox(
    images: Any,
    size: tuple[int, int],
    *,
    fill: float | Sequence[float] = 114,
    scaleup: bool = True,
    center: bool = True,
    auto: bool = False,
    stride: int = 32,
    interpolation: Interpolation = "linear",
    parity: Parity = "cv2",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Images resized to fit into ``size`` with their aspect ratio, and the rest filled, with Ultralytics' rounding.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        See :func:`resize`.
    size : (int, int)
        Height and width of the output.
    fill : float or three floats
        0..255, rounded half to even, in the images' order of channels. Alpha is filled with 255.
    scaleup : bool
        Whether an image may be enlarged.
    center : bool
        Whether it stands in the middle, else in the top left corner.
    auto : bool
        Whether to fill no more than makes height and width multiples of ``stride`` of what ``size`` lacks: the
        smallest canvas for a model of variable input.
    stride : int
        Of ``auto``.
    interpolation, parity : str
        See :class:`nbvision.Preprocess`.
    out : array, optional
        See :func:`resize`.
    stream : CUDA stream, optional

    Returns
    -------
    ImageBatch or array
        What came in, see :func:`resize`; with ``auto``, arrays that end in several sizes come as a list.

    Raises
    ------
    InputError
        For shapes, options or devices that do not fit, and for ``out`` where the results have several sizes.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.letterbox(np.zeros((60, 90, 3), np.uint8), (64, 64)).shape
    (64, 64, 3)
    """
    images, batch = collected(images)
    size = image_size(size)
    channels_fill = three_numbers("fill", fill)
    options: dict[str, Any] = {"interpolation": interpolation, "parity": parity, "fill": channels_fill}
    options |= {"fit": "letterbox", "scaleup": bool(scaleup), "center": bool(center)}
    if not auto:
        return _planned(images, batch, size, options, out, stream)
    return _smallest(images, batch, size, options, whole("stride", stride, least=1), out, stream)


@functools.lru_cache(maxsize=64)
def plan(size: tuple[int, int], **options: Any) -> Preprocess:
    """The plan of these options, kept."""
    return Preprocess(size, **options)


def _planned(
    images: Any, batch: ImageBatch, size: tuple[int, int], options: dict[str, Any], out: Any, stream: Any
) -> Any:
    interleaved_color(batch)
    with on_stream(stream, batch.device):
        sizes = [size] * len(batch)
        if not isinstance(images, ImageBatch):
            result: Any = target_for(images, batch, sizes, out)[1]
            _write(batch, size, options, result.reshape(len(batch), *size, batch.channels))
            return as_given(result, images, out)
        buffer = None
        if out is None:
            shape = (len(batch), *size, batch.channels)
            buffer = memory.acquire(math.prod(shape), device=batch.device)
            stack = buffer.view(shape)
        else:
            _, stack = target_for([], batch, sizes, out)  # an array like that of several arrays
        _write(batch, size, options, stack)
        shown = [image if present else None for image, present in zip(stack, batch.ok, strict=True)]
        return ImageBatch(shown, color=batch.color, device=batch.device, errors=batch.errors, buffer=buffer)


def _write(batch: ImageBatch, size: tuple[int, int], options: dict[str, Any], stack: Any) -> None:
    """Fill ``stack``, (N, H, W, C). A plan writes three channels: of gray one is taken, and alpha is a gray image."""
    channels = batch.channels
    options = options | {"dtype": "uint8", "color": "bgr" if batch.color.startswith("bgr") else "rgb"}
    if channels == 3:
        plan(size, layout="NHWC", **options)(batch, out=stack)
        return
    colors = min(channels, 3)
    planes, _ = plan(size, layout="NCHW", **options)(batch)
    stack[..., :colors] = planes[:, :colors].transpose(0, 2, 3, 1)
    if channels == 4:
        copied = array_module(batch.device).ascontiguousarray
        present = batch.ok
        alphas = [copied(batch[index][..., 3:]) if present[index] else None for index in range(len(batch))]
        gray = ImageBatch(alphas, color="gray", device=batch.device, errors=batch.errors)
        planes, _ = plan(size, layout="NCHW", **(options | {"fill": 255.0}))(gray)
        stack[..., 3] = planes[:, 0]


# --- the smallest canvas of a letterbox -------------------------------------------------------------------------------


def _smallest(
    images: Any, batch: ImageBatch, size: tuple[int, int], options: dict[str, Any], stride: int, out: Any, stream: Any
) -> Any:
    """Images that need the same canvas share a launch."""
    groups: dict[tuple[tuple[int, int], str], list[int]] = {}
    for index, image in enumerate(batch.sizes.tolist()):
        group = _smallest_canvas(image, size, options["scaleup"], stride) if batch.errors[index] is None else None
        groups.setdefault(group or (size, "letterbox"), []).append(index)
    if len(groups) < 2:
        canvas, fit = next(iter(groups), (size, "letterbox"))
        return _planned(images, batch, canvas, options | {"fit": fit}, out, stream)
    if out is not None:
        raise InputError(f"out came with results of {len(groups)} sizes; leave it out, or give images of one size")
    with on_stream(stream, batch.device):
        found: list[Any] = [None] * len(batch)
        for (canvas, fit), rows in groups.items():
            chosen = batch.select(rows)
            part = _planned(chosen, chosen, canvas, options | {"fit": fit}, None, None)
            for row, index in enumerate(rows):
                found[index] = part[row] if batch.errors[index] is None else None
        if isinstance(images, ImageBatch):
            return ImageBatch(found, color=batch.color, device=batch.device, errors=batch.errors)
        return as_given(found, images, None)


def _smallest_canvas(
    image: tuple[int, int], size: tuple[int, int], scaleup: bool, stride: int
) -> tuple[tuple[int, int], str]:
    """Height and width, and the fit that puts the image there: without any border its sides are what a letterbox of
    the whole ``size`` made of them, from which no ratio can be told exactly."""
    ratio = min(size[0] / image[0], size[1] / image[1])
    if not scaleup:
        ratio = min(ratio, 1.0)
    height, width = (max(round(side * ratio), 1) for side in image)
    lacking_height, lacking_width = (size[0] - height) % stride, (size[1] - width) % stride
    fit = "letterbox" if lacking_height or lacking_width else "stretch"
    return (height + lacking_height, width + lacking_width), fit
