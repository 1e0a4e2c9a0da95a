"""Decode plain PNGs: 8 bits, RGB or RGBA, not interlaced; once a process has enough of them.

Codes are unpacked by libdeflate where imagecodecs is installed, else by zlib; both let go of the GIL, as does the loop
that undoes the filters.  docs/codecs.md compares it with Pillow, OpenCV and libspng.

What it takes, Pillow takes, and gives the same pixels; but for files that are made for the difference: libdeflate reads
tables of 287 and 288 codes, which zlib refuses and no encoder writes.
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
from nbvision.image import CHANNELS, Color
from nbvision.runtime.compile import cpu_loop

__all__ = ["decode_into", "takes", "warm_up"]

_PLACE_OF_RED: dict[Color, int] = {"rgb": 0, "bgr": 2, "rgba": 0, "bgra": 2}
_IHDR_BYTES = 13
_KIND_AT = 25  # where a PNG says what its pixels are, and then how they are packed and filtered, which is always 0
_RGB, _RGBA = 2, 6

# Chunks beside the pixels that nobody can have doubts about, and how long their bodies are; None: any length. Pillow
# refuses files for what is in some of the others, such as a text that unpacks to more than a megabyte.
_PLAIN_CHUNKS: dict[bytes, int | None] = {b"gAMA": 4, b"sRGB": 1, b"cHRM": 32, b"pHYs": 9, b"bKGD": 6, b"tIME": 7}
_PLAIN_CHUNKS |= {b"tRNS": 6, b"sBIT": None, b"PLTE": None, b"eXIf": None}
_BESIDE_BYTES = 1 << 20  # of all of them; Pillow takes 64 times as much text
_PROFILE_BYTES = 1 << 20  # as it is unpacked; Pillow takes no more

# To import Numba takes 0.4 s, and so much longer takes Pillow for so many bytes of pixels. So a process with few PNGs
# does not import it, and one with many has lost no more than twice what was best for it.
_WORTH_BYTES = 100_000_000
_decoded_bytes = 0  # by others


def takes(data: bytes, header: Header, color: Color) -> bool:
    """Whether this module may try an image."""
    plain = header.format == "png" and header.bits == 8 and header.variant == "" and color in _PLACE_OF_RED
    return plain and data[_KIND_AT] in (_RGB, _RGBA) and data[_KIND_AT + 1 : _KIND_AT + 3] == b"\0\0"


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


def warm_up(color: Color) -> None:
    """Use this module from now on, with its loops loaded, or compiled if they never were on this machine (3 s)."""
    channels = CHANNELS[color]
    for stored in (3, 4) if color in _PLACE_OF_RED else ():
        lines, pixels = np.zeros((1, 1 + stored), np.uint8), np.empty((1, 1, channels), np.uint8)
        _loop(stored, channels, _PLACE_OF_RED[color])(lines, pixels)


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
    view, last, beside_bytes = memoryview(data), b"", 0
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
            body = data[start:end]
            is_first = not last
            is_whole = zlib.crc32(body, zlib.crc32(name)).to_bytes(4, "big") == view[end : end + 4]
            is_plain = length == _IHDR_BYTES if is_first else _is_plain(name, body, has_alpha=has_alpha)
            beside_bytes += length
            if not is_whole or not is_plain or beside_bytes > _BESIDE_BYTES:
                return None
        last = name
    return b"".join(bodies)


def _is_plain(name: bytes, body: bytes, *, has_alpha: bool) -> bool:
    """Whether a chunk beside the pixels and their header gives Pillow nothing to say."""
    if name == b"tEXt":  # a key in small letters may be one of Pillow's own; those of the standard begin with a capital
        return body[:1].isupper() or b":" in body.partition(b"\0")[0]
    if name == b"iCCP":
        _, _, packed = body.partition(b"\0")
        return packed[:1] == b"\0" and _unpacks_to_at_most(packed[1:], _PROFILE_BYTES)
    if name == b"tRNS" and has_alpha:
        return False
    return name in _PLAIN_CHUNKS and _PLAIN_CHUNKS[name] in (None, len(body))


def _unpacks_to_at_most(packed: bytes, limit_bytes: int) -> bool:
    try:
        return len(zlib.decompressobj().decompress(packed, limit_bytes + 1)) <= limit_bytes
    except zlib.error:
        return False


def _unpack(packed: bytes, height: int, line_bytes: int, imagecodecs: Any) -> npt.NDArray[np.uint8] | None:
    """(H, line_bytes); None unless it is just as much, and what its checksum says."""
    total_bytes = height * line_bytes
    lines = np.empty(total_bytes, np.uint8)
    try:
        if imagecodecs is not None:
            complete = len(imagecodecs.deflate_decode(packed, out=lines)) == total_bytes
        else:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(packed, total_bytes + 1)
            complete = unpacker.eof and len(unpacked) == total_bytes
            if complete:
                lines[:] = np.frombuffer(unpacked, np.uint8)  # which is read-only: Numba would compile the loop twice
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
