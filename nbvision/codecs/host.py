"""Decode one image on the CPU: JPEG with simplejpeg, plain PNG with ours, WebP with imagecodecs, the rest with Pillow.

imagecodecs is optional (the extra ``codecs``).  It gives the pixels that Pillow gives and, which matters in threads,
without the GIL, which Pillow holds while it decodes WebP.  What the others refuse, Pillow judges.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from nbvision.codecs import png
from nbvision.codecs._profiles import as_srgb
from nbvision.codecs.headers import Header
from nbvision.errors import DecodeError, DecodeErrorKind
from nbvision.image import Color

__all__ = ["Wanted", "check_jpeg", "decode_into", "imagecodecs_module", "read_frames"]

Pixels = npt.NDArray[np.uint8]

_SIMPLEJPEG_COLOR: dict[Color, str] = {"rgb": "RGB", "bgr": "BGR", "rgba": "RGBA", "bgra": "BGRA", "gray": "GRAY"}
_PILLOW_MODE: dict[Color, str] = {"rgb": "RGB", "bgr": "RGB", "rgba": "RGBA", "bgra": "RGBA", "gray": "L"}
_FROM_RED_FIRST: dict[Color, tuple[int, ...]] = {"bgr": (2, 1, 0), "bgra": (2, 1, 0, 3)}

# The classes themselves rather than Image.open(): we know the format already, and Pillow's own limit of pixels,
# a process-wide setting, does not get in the way of ours.
_PILLOW_READER: dict[str, type[ImageFile.ImageFile]] = {
    "avif": AvifImagePlugin.AvifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,
    "jpeg2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "png": PngImagePlugin.PngImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}


_PILLOW_CODEC = {"avif": "avif", "jpeg2000": "jpg_2000"}  # that a build may lack


@dataclass(frozen=True, slots=True)
class Wanted:
    """What pixels shall be.

    Attributes
    ----------
    color : {"rgb", "bgr", "rgba", "bgra", "gray"}
        Alpha is 255 where the image has none.  Gray is the luma of a JPEG as stored, ITU-R 601 luma of other images.
        16-bit channels keep their upper 8 bits.
    background : (int, int, int) or None
        Red, green, blue over which an image with alpha is blended, where ``color`` has none; None drops the alpha.
    srgb : bool
        Whether pixels with an ICC profile are converted to sRGB.
    reduce : {1, 2, 4, 8}
        How many times smaller the image shall be, both ways.
    """

    color: Color = "rgb"
    background: tuple[int, int, int] | None = None
    srgb: bool = False
    reduce: int = 1

    def size(self, header: Header) -> tuple[int, int]:
        """Height and width of the upright image."""
        if self.reduce == 1:
            return header.oriented_size
        height, width = header.oriented_size
        return -(-height // self.reduce), -(-width // self.reduce)

    def blends(self, header: Header) -> bool:
        """Whether an image may have alpha to blend; a palette or a single colour may be transparent in a PNG."""
        return self.background is not None and (header.channels in (2, 4) or header.format in ("png", "gif"))

    def converts(self, header: Header) -> bool:
        """Whether an image has colours to convert."""
        return self.srgb and header.has_profile


def decode_into(out: Pixels, data: bytes, header: Header, *, wanted: Wanted, strict: bool = True) -> None:
    """Decode an image, upright, into the caller's memory.

    Parameters
    ----------
    out : (H, W, C) uint8 array
        ``wanted.size(header)`` pixels, C channels of ``color``. JPEGs that are stored upright are decoded straight
        into it if it is C-contiguous. After an error its content is undefined.
    data : bytes
    header : Header
        Of ``data``.
    wanted : Wanted
    strict : bool
        Whether a JPEG that is damaged inside is refused, or decoded as far as it goes.

    Raises
    ------
    DecodeError
        With ``kind`` ``"truncated"``, ``"corrupt"``, ``"unsupported"`` or ``"too_large"``.
    """
    if not header.complete:
        raise DecodeError(f"this {header.format.upper()} ends before its last pixel", kind="truncated")
    color, done = wanted.color, False
    if wanted.blends(header) or wanted.converts(header):  # which is Pillow's
        if strict and header.format == "jpeg":
            check_jpeg(data, header)
    elif _suits_simplejpeg(header):
        done = _decode_jpeg_into(out, data, header, wanted, strict)
    elif wanted.reduce == 1 and png.takes(data, header, color):
        done = _decode_png_into(out, data, header, color)
    elif wanted.reduce == 1 and _suits_imagecodecs(header, color):
        done = _decode_webp_into(out, data, header, color)
    if not done:
        _decode_by_pillow_into(out, data, header, wanted)


# --- JPEG -----------------------------------------------------------------------------------------------------------


def _suits_simplejpeg(header: Header) -> bool:
    return header.variant in ("baseline", "extended", "progressive") and header.colorspace in ("gray", "ycbcr", "rgb")


def _decode_jpeg_into(out: Pixels, data: bytes, header: Header, wanted: Wanted, strict: bool) -> bool:
    """Decode a JPEG; False, and nothing done, if it samples its colours in a way that only Pillow takes."""
    upright = header.orientation == 1 and out.flags.c_contiguous
    height, width = out.shape[:2] if header.orientation < 5 else out.shape[1::-1]
    target = out if upright else np.empty((height, width, out.shape[2]), np.uint8)
    # libjpeg makes fewer pixels of each block: the fewest that are no less than these, which are then just as many.
    least = {"min_height": height, "min_width": width} if wanted.reduce > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, _SIMPLEJPEG_COLOR[wanted.color], buffer=target, strict=strict, **least)
    except Exception as error:  # ValueError in all cases we know; nothing else may escape either
        if "subsampling" in str(error):
            return False
        raise _decode_error(header, error) from error
    _check_size(header, pixels.shape[:2], (height, width))
    if not upright:
        _copy_turned(out, pixels, header.orientation)
    return True


def check_jpeg(data: bytes, header: Header) -> None:
    """Raise the error that a strict decoder would find in a JPEG, which Pillow and the GPU decode over.

    All its codes are read, but an eighth of its size is made of them, without colour: 0.6 of the time of decoding it.
    """
    if _suits_simplejpeg(header):
        try:
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)
        except Exception as error:
            if "subsampling" not in str(error):  # which only Pillow takes
                raise _decode_error(header, error) from error


# --- PNG and WebP ----------------------------------------------------------------------------------------------------


@functools.cache
def imagecodecs_module() -> ModuleType | None:
    """The package, where it is installed."""
    try:
        import imagecodecs
    except ImportError:
        return None
    module: ModuleType = imagecodecs
    return module


def _decode_png_into(out: Pixels, data: bytes, header: Header, color: Color) -> bool:
    upright = header.orientation == 1 and out.flags.c_contiguous
    target = out if upright else np.empty((header.height, header.width, out.shape[2]), np.uint8)
    try:
        done = png.decode_into(target, data, header, color=color, imagecodecs=imagecodecs_module())
    except Exception:  # no memory, no compiler: whatever it is, it is not the file's fault
        return False
    if done and not upright:
        _copy_turned(out, target, header.orientation)
    return done


def _suits_imagecodecs(header: Header, color: Color) -> bool:
    return imagecodecs_module() is not None and header.format == "webp" and color != "gray"


def _decode_webp_into(out: Pixels, data: bytes, header: Header, color: Color) -> bool:
    """Decode a WebP; False, and nothing promised of ``out``, where Pillow has to judge or to convert."""
    codec: Any = imagecodecs_module()
    has_alpha = out.shape[2] == 4
    in_place = header.orientation == 1 and color not in _FROM_RED_FIRST and out.flags.c_contiguous
    try:
        pixels = codec.webp_decode(data, hasalpha=has_alpha, out=out if in_place else None)
    except Exception:  # the codec has exceptions of its own, and an animation is one of them
        return False
    if pixels.dtype != np.uint8 or pixels.shape != (header.height, header.width, out.shape[2]):
        return False
    if pixels is not out:
        _copy_turned(out, pixels, header.orientation, _FROM_RED_FIRST.get(color))
    return True


# --- everything else -------------------------------------------------------------------------------------------------


def _decode_by_pillow_into(out: Pixels, data: bytes, header: Header, wanted: Wanted) -> None:
    codec = _PILLOW_CODEC.get(header.format)
    if codec is not None and not features.check(codec):
        raise DecodeError(f"this Pillow was built without {header.format}; install its wheel", kind="unsupported")
    try:
        with _quiet_pillow, _PILLOW_READER[header.format](io.BytesIO(data)) as image:
            # Before the pixels are touched: a reader that disagrees may be about to allocate gigabytes.
            upright_by_pillow = header.format == "tiff"
            expected = header.oriented_size if upright_by_pillow else (header.height, header.width)
            _check_size(header, (image.height, image.width), expected)
            pixels = _pixels_of(image, header, wanted)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers let about ten kinds of exception out of damaged files
        raise _decode_error(header, error) from error
    _check_size(header, pixels.shape[:2], (-(-expected[0] // wanted.reduce), -(-expected[1] // wanted.reduce)))
    _copy_turned(out, pixels, 1 if upright_by_pillow else header.orientation, _FROM_RED_FIRST.get(wanted.color))


def read_frames(
    data: bytes, header: Header, *, wanted: Wanted, limit_frames: int, limit_pixels: int
) -> Iterator[Pixels]:
    """Each picture of a file as (H, W, C) uint8, upright, in the channel order that is wanted.

    Raises
    ------
    DecodeError
        As :func:`decode_into`, and of kind ``"too_large"`` before a picture is decoded: for more of them than
        ``limit_frames``, or more than ``limit_pixels`` in all of them together.
    """
    at = 0
    try:
        with _quiet_pillow, _PILLOW_READER[header.format](io.BytesIO(data)) as image:
            count = getattr(image, "n_frames", 1)
            if count > limit_frames:
                raise DecodeError(f"it has {count} frames; the limit is {limit_frames}", kind="too_large")
            pixels = 0
            for at in range(count):
                image.seek(at)
                pixels += image.width * image.height
                # The frames of an animation are of one size, so what they come to is known at the first.
                if (pixels if header.format == "tiff" else header.pixels * count) > limit_pixels:
                    raise DecodeError(
                        f"it has {count} frames, the first of {header.height} x {header.width} pixels; the limit is "
                        f"{limit_pixels} in all. Raise limit_pixels if you trust the file",
                        kind="too_large",
                    )
                frame = _pixels_of(image.copy(), header, wanted)
                height, width, channels = frame.shape
                orientation = 1 if header.format == "tiff" else header.orientation  # Pillow turns those itself
                out = np.empty((width, height, channels) if orientation >= 5 else frame.shape, np.uint8)
                _copy_turned(out, frame, orientation, _FROM_RED_FIRST.get(wanted.color))
                yield out
    except DecodeError:
        raise
    except Exception as error:
        raise _decode_error(header, error, f"frame {at}: ") from error


def _pixels_of(image: Image.Image, header: Header, wanted: Wanted) -> Pixels:
    """(H, W, C) uint8, with red first."""
    mode = _PILLOW_MODE[wanted.color]
    image.load()
    if image.mode == "F" or (image.mode == "I" and header.bits != 16):
        raise DecodeError(f"its pixels are {header.bits}-bit numbers; expected 8 or 16 bits", kind="unsupported")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if wanted.converts(header):
        image = as_srgb(image)
    if wanted.background is not None and image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*wanted.background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if mode != "RGBA":
        image.info.pop("transparency", None)  # dropped anyway, and a palette's draws a warning
    if image.mode != mode:
        image = image.convert(mode)
    if wanted.reduce > 1:
        image = image.copy().reduce(wanted.reduce)  # of a copy, for JPEG 2000 files have a number of this name
    pixels: Pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


class _QuietPillow:
    """Pillow's warnings are ignored while a thread is inside.

    Warning filters belong to the whole process, so the first thread in sets this one and the last one out removes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *exception: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()


# --- shared ----------------------------------------------------------------------------------------------------------


# Steps along rows and columns; the images from 5 on are transposed first.
_FLIPS = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}


def _copy_turned(out: Pixels, pixels: Pixels, orientation: int, order: tuple[int, ...] | None = None) -> None:
    """Copy stored pixels the way EXIF says they are to be seen, their channels in a new order where one is given."""
    rows, columns = _FLIPS[orientation]
    turned = (pixels.swapaxes(0, 1) if orientation >= 5 else pixels)[::rows, ::columns]
    if orientation == 1 and order is None:
        np.copyto(out, turned)
        return
    for channel, origin in enumerate(order or range(out.shape[2])):  # 2 to 7 times as fast as whole pixels
        out[:, :, channel] = turned[:, :, origin]


def _check_size(header: Header, got: tuple[int, ...], expected: tuple[int, int]) -> None:
    if got != expected:
        raise DecodeError(
            f"the header says {expected[0]} x {expected[1]} pixels, the decoder found {got[0]} x {got[1]}; "
            "the file is damaged",
            kind="corrupt",
        )


def _decode_error(header: Header, error: Exception, where: str = "") -> DecodeError:
    """A decoder's own exception as ours, sorted into our kinds by what it says."""
    text = str(error) or type(error).__name__
    return DecodeError(
        f"{where}the {header.format.upper()} decoder says: {text}", kind=_kind_of(header, error, text.lower())
    )


def _kind_of(header: Header, error: Exception, said: str) -> DecodeErrorKind:
    if isinstance(error, (MemoryError, Image.DecompressionBombError)):
        return "too_large"
    if "truncated" in said or "premature end of jpeg file" in said:
        return "truncated"
    if isinstance(error, NotImplementedError) or "unsupported" in said or "unknown" in said:
        return "unsupported"
    is_odd_jpeg = header.format == "jpeg" and not (header.bits == 8 and _suits_simplejpeg(header))
    return "unsupported" if is_odd_jpeg else "corrupt"
