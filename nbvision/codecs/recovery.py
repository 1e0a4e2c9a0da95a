"""What can be saved of a damaged JPEG, PNG or WebP.

A file that ends too early gets an end: bytes that a decoder takes for more pixels.  Decoding it twice, with two such
ends, tells which rows do not depend on them.  Damage inside a file is decoded over, as viewers do.
"""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nbvision.codecs import host
from nbvision.codecs.headers import Header
from nbvision.errors import DecodeError

__all__ = ["decode_into"]

_ENDS = (0x00, 0x55)  # what missing bytes are taken for
_JPEG_EOI, _JPEG_RESTARTS = b"\xff\xd9", b"\xff\xdd"
_END_BYTES = 4096  # libjpeg fills up with gray what lies behind them
_BLOCK_ROWS = 16  # of WebP, and of JPEG with colours of half the height
_PIECE_BYTES = 1024  # of compressed pixels at a time


def decode_into(
    out: npt.NDArray[np.uint8], data: bytes, header: Header, *, wanted: host.Wanted, damage: DecodeError
) -> int | None:
    """Decode what is left of an image, upright, into the caller's memory.

    Parameters
    ----------
    out : (H, W, C) uint8 array
        As :func:`nbvision.codecs.host.decode_into` takes it.
    data : bytes
    header : Header
        Of ``data``.
    wanted : Wanted
    damage : DecodeError
        What a decoder said of the file.

    Returns
    -------
    int or None
        Rows from the top that are as they were in the whole file; None where damage may be anywhere.

    Raises
    ------
    DecodeError
        If nothing can be saved.
    """
    whole = header._replace(complete=True)
    try:
        if header.format == "png":
            mended, rows = _mended_png(data, header)
            host.decode_into(out, mended, whole, wanted=wanted)
            return rows if _rows_are_known(data, header, damage) else None
        if header.format not in ("jpeg", "webp"):
            raise DecodeError(f"nothing is known of damaged {header.format.upper()} files", kind=damage.kind)
        host.decode_into(out, _with_end(data, header, _ENDS[0]), whole, wanted=wanted, strict=False)
        if not _rows_are_known(data, header, damage):
            return None
        other = np.empty_like(out)
        host.decode_into(other, _with_end(data, header, _ENDS[1]), whole, wanted=wanted, strict=False)
    except struct.error as error:  # a header that says more than is there
        raise DecodeError(f"nothing can be saved: {error}", kind=damage.kind) from None
    differing = (out != other).any(axis=(1, 2))
    if not differing.any():
        return None  # the decoder did not look at them
    # In whole blocks: at the edge of what is lost two ends may give the same pixels by chance.
    return max(int(differing.argmax()) - 1, 0) // _BLOCK_ROWS * _BLOCK_ROWS


def _rows_are_known(data: bytes, header: Header, damage: DecodeError) -> bool:
    """Whether rows are stored from top to bottom, once, and nothing is wrong but that they end."""
    in_order = header.variant in ("", "baseline", "extended") and header.orientation == 1
    # From a restart marker on, libjpeg fills up whatever comes.
    restarts = header.format == "jpeg" and _JPEG_RESTARTS in data
    return damage.kind == "truncated" and in_order and not restarts


def _with_end(data: bytes, header: Header, filler: int) -> bytes:
    if header.format == "jpeg":
        return data if data.endswith(_JPEG_EOI) else data + bytes([filler]) * _END_BYTES + _JPEG_EOI
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    missing = 8 + riff_bytes - len(data)
    if missing <= 0:
        return data
    # More than is missing, and the chunk that was cut says so: other bytes may be read more quickly. But no more than
    # pixels can need, whatever the file says of its length.
    longer = bytearray(data + bytes([filler]) * (min(missing, 4 * header.pixels) + _END_BYTES))
    position = 12
    while True:
        (chunk_bytes,) = struct.unpack_from("<I", longer, position + 4)
        if position + 8 + chunk_bytes > len(data):
            break
        position += 8 + chunk_bytes + chunk_bytes % 2
    struct.pack_into("<I", longer, position + 4, len(longer) - position - 8)
    struct.pack_into("<I", longer, 4, len(longer) - 8)
    return bytes(longer)


# --- PNG: unpacked as far as it goes, and packed again ----------------------------------------------------------------

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
_PASSES = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))  # Adam7


def _mended_png(data: bytes, header: Header) -> tuple[bytes, int]:
    """A whole PNG, of which the rows that are lost are zeros, and how many are not."""
    kept, packed = [], bytearray()
    for name, body in _chunks_as_far_as_they_go(data):
        if name == b"IDAT":
            packed += body
        elif name in (b"IHDR", b"PLTE", b"tRNS") and not packed:
            kept.append(_chunk(name, body))
    (kind,) = struct.unpack_from(">B", data, 25)
    bits = header.bits * _SAMPLES[kind]
    row_starts = [0]  # each row is a byte that names its filter, and its pixels
    for top, down, left, right in _PASSES if header.variant == "interlaced" else ((0, 1, 0, 1),):
        width, height = -(-max(header.width - left, 0) // right), -(-max(header.height - top, 0) // down)
        row_bytes = 1 + -(-width * bits // 8)
        row_starts += [row_starts[-1] + row_bytes * (row + 1) for row in range(height if width else 0)]
    expected = row_starts.pop()
    pixels = _unpacked(bytes(packed), expected)
    if not pixels:
        raise DecodeError("no row of this PNG is left", kind="truncated")
    whole_rows = bisect.bisect_right(row_starts, len(pixels) - row_bytes)
    pixels += bytes(expected - len(pixels))
    for start in row_starts:
        if pixels[start] > 4:  # no filter's name: damaged
            pixels[start] = 0
    return b"".join([_SIGNATURE, *kept, _chunk(b"IDAT", zlib.compress(pixels, 1)), _chunk(b"IEND", b"")]), whole_rows


def _chunks_as_far_as_they_go(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        if not name.isalpha() or name == b"IEND":
            return
        yield name, data[position + 8 : position + 8 + length]
        position += 12 + length


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _unpacked(packed: bytes, limit_bytes: int) -> bytearray:
    """What can be unpacked of a damaged stream, to the byte before the damage."""
    stream, pixels = zlib.decompressobj(), bytearray()
    for start in range(0, len(packed), _PIECE_BYTES):
        piece, before = packed[start : start + _PIECE_BYTES], stream.copy()
        try:
            pixels += stream.decompress(piece, limit_bytes - len(pixels) + 1)
        except zlib.error:
            stream = before
            for index in range(len(piece)):
                try:
                    pixels += stream.decompress(piece[index : index + 1], limit_bytes - len(pixels) + 1)
                except zlib.error:
                    break
            break
        if len(pixels) >= limit_bytes or stream.eof:
            break
        while stream.unconsumed_tail and len(pixels) < limit_bytes:
            pixels += stream.decompress(stream.unconsumed_tail, limit_bytes - len(pixels) + 1)
    return pixels[:limit_bytes]
