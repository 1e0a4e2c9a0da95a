"""Colour conversion of images."""

from __future__ import annotations

from typing import Any

from nbvision.errors import InputError
from nbvision.image import CHANNELS, Color, interleaved_color
from nbvision.ops._pointwise import run_pointwise
from nbvision.ops.arguments import as_given, collected, one_of, target_for
from nbvision.runtime.device import on_stream

__all__ = ["cvt_color"]


def cvt_color(images: Any, to: Color, *, color: Color | None = None, out: Any = None, stream: Any = None) -> Any:
    """Images in another order of channels, or gray, as ``cv2.cvtColor`` makes them: the same bytes.

    Hue, luma and the like are pixel functions of :mod:`nbvision.ops.adjust`, for ``Preprocess(pixel=...)``; NV12 is
    converted by ``Preprocess(dtype="uint8", layout="NHWC")``.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W) or (H, W, C) uint8 array, one (N, H, W, C) array, several arrays, or a batch.
    to : {"rgb", "bgr", "rgba", "bgra", "gray"}
        Alpha that was not there is 255.
    color : {"rgb", "bgr", "rgba", "bgra", "gray"}, optional
        What arrays hold; default: gray, RGB or RGBA by their number of channels. A batch knows.
    out : ImageBatch or array, optional
        Where to write; no memory of the images.
    stream : CUDA stream, optional
        Default: CuPy's current stream. Nothing waits on the host.

    Returns
    -------
    ImageBatch or array
        What came in: a batch, one array, (H, W) if gray, an (N, H, W, C) array, or a list where the sizes differ.

    Raises
    ------
    InputError
        For a colour that is none, or that does not have the images' number of channels.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.cvt_color(np.full((4, 6, 3), 200, np.uint8), "gray").shape
    (4, 6)
    """
    from nbvision_kernels.codes import COLOR

    to = one_of("to", to, Color)
    images, batch = collected(images)
    source = interleaved_color(batch)
    if color is not None and batch is not images:
        source = one_of("color", color, Color)
    elif color is not None and color != source:
        raise InputError(f"color is {color!r}, the batch is {source}; leave it out, a batch knows its colour")
    if CHANNELS[source] != batch.channels:
        raise InputError(f"color is {source!r}, the images have {batch.channels} channels; give the colour they hold")
    order = {"rgb": 1, "bgr": -1, "gra": 0}
    # Gray has no order, but to become it, blue must be known from red.
    swap = source[:3] == "bgr" if to == "gray" else order[source[:3]] * order[to[:3]] < 0
    with on_stream(stream, batch.device):
        sizes = [(height, width) for height, width in batch.sizes.tolist()]
        target, result = target_for(images, batch, sizes, out, color=to)
        run_pointwise(COLOR, batch, target, float(swap))
        return as_given(result, images, out)
