"""All pictures of a file that has several: the frames of an animation, the pages of a TIFF."""

from __future__ import annotations

from typing import Any

from nbvision.codecs import host
from nbvision.codecs.decode import LIMIT_PIXELS, Source, as_items, check_options
from nbvision.codecs.open import OpenImage, read_image
from nbvision.errors import DecodeError, InputError
from nbvision.image import Color, ImageBatch
from nbvision.runtime.device import Device, resolve_device

__all__ = ["decode_frames"]

LIMIT_FRAMES = 1000


def decode_frames(
    source: Source,
    *,
    color: Color = "rgb",
    background: tuple[int, int, int] | None = None,
    device: Device | None = None,
    limit_pixels: int = LIMIT_PIXELS,
    limit_frames: int = LIMIT_FRAMES,
) -> ImageBatch:
    """Decode every frame of an animated GIF, WebP, PNG or AVIF, or every page of a TIFF; of another file, the image.

    Frames are whole pictures, as a viewer shows them one after the other, decoded on the host.

    Parameters
    ----------
    source : bytes-like, str or os.PathLike
        Compressed bytes, or the path of a file.
    color, background, device
        As :func:`nbvision.decode` takes them.
    limit_pixels : int
        Pixels of all frames together.
    limit_frames : int

    Returns
    -------
    ImageBatch
        One image for each frame.

    Raises
    ------
    DecodeError
        If any frame cannot be decoded, with the kinds of :func:`nbvision.decode`; ``"too_large"``, before any is, for
        more frames or pixels than the limits.
    InputError
        For arguments of a wrong type or range, and several sources.
    DeviceError, MissingExtraError
        If the device cannot be used.
    """
    items = as_items(source)
    if len(items) != 1:
        raise InputError(f"source is {len(items)} files; expected one, whose frames are the batch")
    check_options(color, background, limit_pixels, False, 1, None)
    if not isinstance(limit_frames, int) or limit_frames <= 0:
        raise InputError(f"limit_frames is {limit_frames!r}; expected a positive integer")
    target = resolve_device(device)
    if isinstance(items[0], OpenImage):
        raise InputError(f"source is {items[0]!r}; expected bytes or a path, for an opened image is its first frame")
    image = read_image(items[0], limit_pixels)
    if isinstance(image, DecodeError):
        raise image
    wanted = host.Wanted(color, background and (background[0], background[1], background[2]))
    limits = {"limit_frames": limit_frames, "limit_pixels": limit_pixels}
    try:
        frames: list[Any] = list(host.read_frames(image.data, image.header, wanted=wanted, **limits))
    except DecodeError as error:
        raise DecodeError(str(error), kind=error.kind, source=image.source) from error
    return ImageBatch.from_arrays(frames, color=color, device=target)
