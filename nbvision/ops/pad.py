"""Images with a border around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbvision.errors import InputError
from nbvision.image import ImageBatch
from nbvision.ops.arguments import collected, one_of, whole
from nbvision.ops.warp import Border, translated

__all__ = ["pad"]


def pad(
    images: Any,
    padding: int | Sequence[int],
    *,
    mode: Border = "constant",
    fill: float | Sequence[float] = 0.0,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Images with a border, as ``cv2.copyMakeBorder`` and torchvision's ``pad`` make it.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        One (H, W) or (H, W, C) uint8 array, one (N, H, W, C) array, several arrays, or a batch. C is 1, 3 or 4.
    padding : int or (int, int, int, int)
        Pixels at each side, or at the top, the bottom, the left and the right, which is OpenCV's order.
    mode : {"constant", "replicate", "reflect"}
        The fill; the border's pixel; or the image mirrored about its border's pixel, which is OpenCV's
        ``BORDER_REFLECT_101``.
    fill : float or one for each channel
        0..255, rounded half to even.
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
        For options and shapes that do not fit, and for ``"reflect"`` by as much as an image is high or wide, or more.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> nbv.pad(np.zeros((4, 6, 3), np.uint8), (1, 2, 3, 4)).shape
    (7, 13, 3)
    """
    top, bottom, left, right = _sides(padding)
    mode = one_of("mode", mode, Border)
    images, batch = collected(images)
    if mode == "reflect":
        _check_room(batch, max(top, bottom), max(left, right))
    return translated(images, (top, left), (top + bottom, left + right), mode, fill, out, stream)


def _sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    try:
        sides = [padding] * 4 if not isinstance(padding, Sequence) else list(padding)
        top, bottom, left, right = (whole("padding", side, least=0) for side in sides)
    except ValueError:
        raise InputError(f"padding is {padding!r}; expected an integer, or top, bottom, left and right") from None
    return top, bottom, left, right


def _check_room(batch: ImageBatch, lines: int, columns: int) -> None:
    for index, (height, width) in enumerate(batch.sizes.tolist()):
        if batch.errors[index] is None and (lines >= height or columns >= width):
            raise InputError(
                f"image {index} is {height} x {width}; 'reflect' takes fewer lines and columns than it has: give mode "
                "'replicate', or pad by less"
            )
