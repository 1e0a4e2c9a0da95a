"""Decode plain PNGs: 8 bits, RGB or RGBA, not interlaced; once a process has enough of them.

Codes are unpacked by libdeflate where imagecodecs is installed, else by zlib; both let go of the GIL, as does the loop
that undoes the filters.  docs/codecs.md compares it with Pillow, OpenCV and libspng.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.codecs.headers import Header, chunks
from nbvision.image import Color
from nbvision.runtime.compile import cpu_loop

__all__ = ["decode_into", "takes", "warm_up"]

_PLACE_OF_RED: dict[Color, int] = {"rgb": 0, "bgr": 2, "rgba": 0, "bgra": 2}
_KIND_AT = 25  # where a PNG says what its pixels are
_RGB, _RGBA = 2, 6

# To import Numba takes 0.4 s, and so much longer takes Pillow for so many bytes of pixels. So a process with few PNGs
# does not import it, and one with many has lost no more than twice what was best for it.
_WORTH_BYTES = 100_000_000
_decoded_bytes = 0  # by others


def takes(data: bytes, header: Header, color: Color) -> bool:
    """Whether this module may try an image."""
    plain = header.format == "png" and header.bits == 8 and header.variant == ""
    return plain and data[_KIND_AT] in (_RGB, _RGBA) and color in _PLACE_OF_RED


def decode_into(
    out: npt.NDArray[np.uint8], data: bytes, header: Header, *, color: Color, imagecodecs: ModuleType | None
) -> bool:
    """Decode a PNG as it is stored, whichever way it is to be seen.

    Parameters
    ----------
    out : (H, W, C) uint8 array, C-contiguous
        The stored height and width, the channels of ``color``.
    data : bytes
    header : Header
        Of ``data``, taken by :func:`takes`.
    color : {"rgb", "bgr", "rgba", "bgra"}
    imagecodecs : module or None
        That package, whose libdeflate is used.

    Returns
    -------
    bool
        Whether all is well. If not, somebody else has to judge the file, and nothing is promised of ``out``: a checksum
        is wrong, there are too few pixels or too many, one of the colours stands for transparency, or the process does
        not use Numba and has had few PNGs so far; see :func:`warm_up`.
    """
    if not _is_worth_it(out.nbytes):
        return False
    packed = _packed_lines(data, has_alpha=out.shape[2] == 4)
    if packed is None:
        return False
    lines = _unpack(packed, header.height, 1 + header.width * header.channels, imagecodecs)
    if lines is None or not _filters_are_known(lines):
        return False
    _loop(header.channels, out.shape[2], _PLACE_OF_RED[color])(lines, out)
    return True


def warm_up() -> None:
    """Use this module from now on, with its loops loaded, or compiled if they never were on this machine (3 s)."""
    for stored, channels, red in ((3, 3, 0), (4, 3, 0)):
        lines, pixels = np.zeros((1, 1 + stored), np.uint8), np.empty((1, 1, channels), np.uint8)
        _loop(stored, channels, red)(lines, pixels)


def _is_worth_it(size_bytes: int) -> bool:
    global _decoded_bytes
    if "numba" in sys.modules or _decoded_bytes > _WORTH_BYTES:
        return True
    _decoded_bytes += size_bytes
    return False


def _packed_lines(data: bytes, *, has_alpha: bool) -> bytes | None:
    """The bodies of all IDAT chunks, which have to follow each other; None if something else is not plain.

    Their checksums are left alone, by Pillow, too: what is packed in them has its own.
    """
    view, last = memoryview(data), b""
    bodies: list[memoryview] = []
    for name, start, length in chunks(data, 8, ">I4s"):
        end = start + length
        if name == b"IDAT":
            if bodies and last != b"IDAT":
                return None
            bodies.append(view[start:end])
        elif name == b"IEND":
            break
        else:
            is_whole = zlib.crc32(view[start - 4 : end]).to_bytes(4, "big") == view[end : end + 4]
            if not is_whole or (name == b"tRNS" and has_alpha):
                return None
        last = name
    return b"".join(bodies)


def _unpack(packed: bytes, height: int, line_bytes: int, imagecodecs: Any) -> npt.NDArray[np.uint8] | None:
    """(H, line_bytes); None unless it is just as much, and what its checksum says."""
    total_bytes = height * line_bytes
    try:
        if imagecodecs is not None:
            lines = np.empty(total_bytes, np.uint8)
            complete = len(imagecodecs.deflate_decode(packed, out=lines)) == total_bytes
        else:
            unpacker = zlib.decompressobj()
            lines = np.frombuffer(unpacker.decompress(packed, total_bytes + 1), np.uint8)
            complete = unpacker.eof and len(lines) == total_bytes
    except Exception:  # imagecodecs has exceptions of its own
        return None
    return lines.reshape(height, line_bytes) if complete else None


def _filters_are_known(lines: npt.NDArray[np.uint8]) -> bool:
    from nbvision_kernels.png import FILTERS

    return int(lines[:, 0].max()) < FILTERS


@functools.cache
def _loop(stored: int, channels: int, red: int) -> Callable[..., None]:
    from nbvision_kernels.png import make_cpu_loop

    return cpu_loop(f"png-{stored}-{channels}-{red}", make_cpu_loop(stored, channels, red), parallel=False)
