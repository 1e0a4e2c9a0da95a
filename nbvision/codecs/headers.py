"""What a compressed image says about itself, read without decoding it.

One cheap pass in pure Python over the container's structure: enough to allocate memory, to refuse a bomb, to choose a
decoder, and to see that a file ends too early, which the GPU's decoder does not tell.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nbvision.errors import DecodeError, InputError
from nbvision.runtime.compile import cpu_loop

__all__ = ["IMAGE_SUFFIXES", "Header", "ImageFormat", "as_bytes", "chunks", "read_header", "read_headers", "warm_up"]

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".j2k", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MANY = 3  # files of one call; fewer Python reads as fast
_WORTH_FILES = 50_000  # take 0.5 s in Python, as long as to import Numba
_read_files = 0  # by Python

ImageFormat = Literal["avif", "bmp", "gif", "jpeg", "jpeg2000", "png", "tiff", "webp"]


class Header(NamedTuple):  # made four times as fast as a frozen dataclass; thousands a second are
    """An image's own description.

    Attributes
    ----------
    format : {"avif", "bmp", "gif", "jpeg", "jpeg2000", "png", "tiff", "webp"}
    height, width : int
        In pixels, as stored: before ``orientation`` is applied.
    channels : int
        As stored; a palette counts as 3.
    bits : int
        Of one channel, as stored.
    orientation : int
        EXIF orientation, 1 (upright) to 8; of AVIF what its own turns and mirrors come to.
    complete : bool
        False if the file provably ends before its last pixel. True is no promise: pixels are not looked at.
    variant : str
        JPEG: ``"baseline"``, ``"extended"``, ``"progressive"``, ``"lossless"``, ``"hierarchical"`` or
        ``"arithmetic"``.  PNG: ``"interlaced"``.  JPEG 2000: ``"codestream"`` where no boxes are around it.  Otherwise
        empty.
    colorspace : str
        JPEG: ``"gray"``, ``"ycbcr"``, ``"rgb"``, ``"cmyk"``, ``"ycck"`` or ``"unknown"``.  Otherwise empty.
    has_profile : bool
        Whether an ICC profile says what its colours are.
    """

    format: ImageFormat
    height: int
    width: int
    channels: int
    bits: int = 8
    orientation: int = 1
    complete: bool = True
    variant: str = ""
    colorspace: str = ""
    has_profile: bool = False

    @property
    def oriented_size(self) -> tuple[int, int]:
        """Height and width of the upright image."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.height * self.width

    @property
    def progressive(self) -> bool:
        """Whether it is a progressive JPEG."""
        return self.variant == "progressive"


def read_header(data: Any) -> Header:
    """Read the header of one image.

    Parameters
    ----------
    data : bytes-like
        The whole file, or as much of it as there is.

    Returns
    -------
    Header
        Also of a file whose pixels are cut off; its ``complete`` is False then.

    Raises
    ------
    DecodeError
        With ``kind`` ``"empty"``, ``"not_an_image"``, ``"truncated"`` (inside the header), ``"corrupt"`` or
        ``"unsupported"`` (an image, of a format that nbvision does not read).
    InputError
        If ``data`` is not bytes-like.
    """
    raw = as_bytes(data)
    parse = _parser_of(raw)
    try:
        header = parse(raw)
    except (struct.error, IndexError, OverflowError):  # OverflowError: an offset of 2**63 in a BigTIFF
        raise DecodeError(f"the {len(raw)} bytes end inside the image's header", kind="truncated") from None
    if header.pixels == 0:
        raise _corrupt(header.format, f"says {header.height} x {header.width} pixels; expected at least 1 x 1")
    return header


def read_headers(datas: Sequence[bytes]) -> list[Header | None]:
    """Read the headers of plain JPEGs, all at once and without Python's lock; None for a file that wants a closer look.

    What is no JPEG, what is wrong with one, and what is rare in one :func:`read_header` tells. All are None while the
    process has not read so many that waiting for Numba and its loop would have been worth it; see :func:`warm_up`.
    """
    global _read_files
    is_loaded = _jpeg_loop.cache_info().currsize > 0
    if len(datas) < _MANY or not (is_loaded or _read_files >= _WORTH_FILES):
        _read_files += len(datas)
        return [None] * len(datas)
    try:
        rows = _read_by_loop(datas)
    except Exception:  # no memory, no compiler: whatever it is, it is not the files' fault
        return [None] * len(datas)
    return [_header_of(*row) if is_read else None for is_read, *row in rows.tolist()]


def warm_up() -> None:
    """Use the loop of :func:`read_headers` from now on, compiled if it never was on this machine (4 s)."""
    _read_by_loop([])


def _read_by_loop(datas: Sequence[bytes]) -> npt.NDArray[np.int32]:
    """A row for each file, see ``nbvision_kernels.jpeg.COLUMNS``."""
    from nbvision_kernels.jpeg import COLUMNS

    files = (ctypes.c_char_p * len(datas))(*datas)  # which knows the bytes' addresses, and keeps them alive
    lengths = np.fromiter(map(bytes.__len__, datas), np.int64, len(datas))
    rows = np.empty((len(datas), len(COLUMNS)), np.int32)
    addresses = np.frombuffer(memoryview(files), np.int64)
    _jpeg_loop()(addresses, lengths, rows)
    return rows


@functools.cache
def _jpeg_loop() -> Callable[..., None]:
    from nbvision_kernels.jpeg import make_cpu_loop

    return cpu_loop("jpeg-headers", make_cpu_loop(), parallel=False)


@functools.lru_cache(maxsize=4096)  # of many files some have the same size
def _header_of(
    height: int, width: int, channels: int, bits: int, orientation: int, variant: int, colorspace: int, profile: int
) -> Header:
    from nbvision_kernels.jpeg import COLORSPACES, VARIANTS

    coded, colors = VARIANTS[variant], COLORSPACES[colorspace]
    return Header("jpeg", height, width, channels, bits, orientation, True, coded, colors, bool(profile))


def as_bytes(data: Any) -> bytes:
    """``data`` as bytes; copied unless it is ``bytes`` already.

    Raises
    ------
    InputError
        If it is no flat buffer of bytes, for example an array of pixels.
    """
    if isinstance(data, bytes):
        return data
    try:
        view = memoryview(data)
    except TypeError:
        raise InputError(f"got a {type(data).__name__}; expected the bytes of a compressed image") from None
    if view.ndim != 1 or view.itemsize != 1:
        raise InputError(
            f"got a buffer of shape {view.shape} with {view.itemsize} bytes an item; expected the flat bytes of a "
            "compressed image. Pixels need no decoding: see ImageBatch.from_arrays()"
        )
    return view.tobytes()


def _corrupt(name: str, what: str) -> DecodeError:
    return DecodeError(f"this {name.upper()} {what}; the file is damaged", kind="corrupt")


# --- JPEG -----------------------------------------------------------------------------------------------------------

_SOI, _EOI, _SOS, _APP0, _APP1, _APP2, _APP14 = 0xFFD8, 0xFFD9, 0xFFDA, 0xFFE0, 0xFFE1, 0xFFE2, 0xFFEE
_FRAMES = {0xFFC0: "baseline", 0xFFC1: "extended", 0xFFC2: "progressive", 0xFFC3: "lossless"}
_FRAMES |= dict.fromkeys((0xFFC5, 0xFFC6, 0xFFC7), "hierarchical")
_FRAMES |= dict.fromkeys((0xFFC9, 0xFFCA, 0xFFCB, 0xFFCD, 0xFFCE, 0xFFCF), "arithmetic")
_PLAIN = {0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE3, 0xFFEE)}  # tables, comments: nothing in them concerns us
_FILL_BYTES = re.compile(rb"\xff+")

_marker_and_length = struct.Struct(">HH").unpack_from
_frame_header = struct.Struct(">BHHB").unpack_from  # bits, height, width, components


def _parse_jpeg(data: bytes) -> Header:
    frame = None
    variant, orientation, is_jfif, adobe_transform, has_profile = "", 1, False, None, False
    position = 2
    while True:
        marker, length = _marker_and_length(data, position)
        if marker in _PLAIN and length >= 2:
            position += 2 + length
            continue
        if marker == 0xFFFF:
            position = _FILL_BYTES.match(data, position).end() - 1  # type: ignore[union-attr]
            continue
        if marker == _SOS:
            break
        if marker < 0xFFC0 or 0xFFD0 <= marker <= _EOI or length < 2:
            raise _corrupt("jpeg", f"has {marker:#06x}, length {length}, where a segment should start")
        body = position + 4
        if marker in _FRAMES:
            variant, frame = _FRAMES[marker], body
        elif marker == _APP0:
            is_jfif = is_jfif or data.startswith(b"JFIF\0", body)
        elif marker == _APP1 and data.startswith(b"Exif\0", body):
            orientation = _exif_orientation(data, body + 6)
        elif marker == _APP2:
            has_profile = has_profile or data.startswith(b"ICC_PROFILE\0", body)
        elif marker == _APP14 and data.startswith(b"Adobe", body):
            adobe_transform = data[body + 11]
        position += 2 + length
    if frame is None:
        raise _corrupt("jpeg", "has pixels before it says how many")
    bits, height, width, channels = _frame_header(data, frame)
    if height == 0:
        raise DecodeError(
            "this JPEG gives its height after its pixels (DNL), which no decoder here reads", kind="unsupported"
        )
    return Header(
        format="jpeg",
        height=height,
        width=width,
        channels=channels,
        bits=bits,
        orientation=orientation,
        # Searched backwards from the end: bytes may follow, and thumbnails before the scan have an EOI of their own.
        complete=data.rfind(b"\xff\xd9", position) >= 0,
        variant=variant,
        colorspace=_jpeg_colorspace(data[frame + 6 : frame + 6 + 3 * channels : 3], is_jfif, adobe_transform),
        has_profile=has_profile,
    )


def _jpeg_colorspace(component_ids: bytes, is_jfif: bool, adobe_transform: int | None) -> str:
    """The guess that libjpeg makes, and with it everybody."""
    if len(component_ids) == 1:
        return "gray"
    if len(component_ids) == 3:
        if is_jfif:
            return "ycbcr"
        if adobe_transform is not None:
            return "rgb" if adobe_transform == 0 else "ycbcr"
        return "rgb" if component_ids == b"RGB" else "ycbcr"
    if len(component_ids) == 4:
        return "ycck" if adobe_transform == 2 else "cmyk"
    return "unknown"


# --- TIFF, and the EXIF that other formats carry ---------------------------------------------------------------------

_TAG_WIDTH, _TAG_HEIGHT, _TAG_BITS, _TAG_ORIENTATION, _TAG_CHANNELS = 256, 257, 258, 274, 277
_TAGS_STRIPS, _TAGS_TILES = (273, 279), (324, 325)  # offsets, byte counts
_TAG_PROFILE = 34675
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}


class _Directory:
    """The first directory ("IFD") of the TIFF structure that starts at ``base``; classic or BigTIFF."""

    def __init__(self, data: bytes, base: int = 0) -> None:
        self._data = data
        self._base = base
        self._order = {b"II": "<", b"MM": ">"}[data[base : base + 2]]
        (version,) = self._read("H", 2)
        big = version == 43
        (start,) = self._read("Q", 8) if big else self._read("I", 4)
        (count,) = self._read("Q" if big else "H", start)
        entry = struct.Struct(self._order + ("HHQ8s" if big else "HHI4s"))
        first = base + start + (8 if big else 2)
        table = data[first : first + min(count, 4096) * entry.size]
        self.complete = len(table) == count * entry.size
        table = table[: len(table) // entry.size * entry.size]
        self._entries = {tag: rest for tag, *rest in entry.iter_unpack(table)}

    def _read(self, code: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + code, self._data, self._base + offset)

    def integers(self, tag: int) -> tuple[int, ...]:
        """The values of a tag; none if it is not there, or does not hold integers."""
        kind, count, value = self._entries.get(tag, (0, 0, b""))
        if kind not in _TIFF_INTEGERS:
            return ()
        code = f"{count}{_TIFF_INTEGERS[kind]}"
        if struct.calcsize("=" + code) <= len(value):
            return struct.unpack_from(self._order + code, value)
        offset = int.from_bytes(value, "little" if self._order == "<" else "big")
        return self._read(code, offset)

    def has(self, tag: int) -> bool:
        return tag in self._entries

    def integer(self, tag: int, default: int) -> int:
        return next(iter(self.integers(tag)), default)

    def orientation(self) -> int:
        value = self.integer(_TAG_ORIENTATION, 1)
        return value if 1 <= value <= 8 else 1


def _exif_orientation(data: bytes, base: int) -> int:
    """Orientation in the EXIF at ``base``; 1 where the EXIF is broken, as every viewer does."""
    try:
        return _Directory(data, base).orientation()
    except (KeyError, OverflowError, struct.error):
        return 1


def _parse_tiff(data: bytes) -> Header:
    directory = _Directory(data)
    if not directory.complete:
        raise struct.error
    tiled = directory.integers(_TAGS_TILES[0])
    offsets, counts = (directory.integers(tag) for tag in (_TAGS_TILES if tiled else _TAGS_STRIPS))
    return Header(
        format="tiff",
        height=directory.integer(_TAG_HEIGHT, 0),
        width=directory.integer(_TAG_WIDTH, 0),
        channels=directory.integer(_TAG_CHANNELS, 1),
        bits=directory.integer(_TAG_BITS, 1),
        orientation=directory.orientation(),
        complete=all(offset + count <= len(data) for offset, count in zip(offsets, counts, strict=False)),
        has_profile=directory.has(_TAG_PROFILE),
    )


# --- PNG, WebP: chunks -----------------------------------------------------------------------------------------------


def chunks(data: bytes, position: int, layout: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and length of each whole chunk's body; ``layout`` is ``">I4s"`` (PNG) or ``"<4sI"`` (RIFF)."""
    unpack = struct.Struct(layout).unpack_from
    is_png = layout == ">I4s"
    while position + 8 <= len(data):
        first, second = unpack(data, position)
        name, length = (second, first) if is_png else (first, second)
        end = position + 8 + length + (4 if is_png else length % 2)  # a checksum; a byte that makes it even
        if end - (0 if is_png else length % 2) > len(data):
            return
        yield name, position + 8, length
        position = end


_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}


def _parse_png(data: bytes) -> Header:
    name, width, height, bits, kind, interlaced = struct.unpack_from(">4sIIBBxxB", data, 12)
    if name != b"IHDR" or kind not in _PNG_CHANNELS:
        raise _corrupt("png", f"starts with a chunk {name!r} of colour type {kind}; expected IHDR")
    orientation, complete, has_profile = 1, False, False
    for name, start, _ in chunks(data, 8, ">I4s"):
        if name == b"eXIf":  # it may stand after the pixels
            orientation = _exif_orientation(data, start)
        elif name == b"iCCP":
            has_profile = True
        elif name == b"IEND":
            complete = True
            break
    return Header(
        format="png",
        height=height,
        width=width,
        channels=_PNG_CHANNELS[kind],
        bits=bits,
        orientation=orientation,
        complete=complete,
        variant="interlaced" if interlaced else "",
        has_profile=has_profile,
    )


def _parse_webp(data: bytes) -> Header:
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    kind = data[12:16]
    complete = 8 + riff_bytes <= len(data)
    if kind == b"VP8 ":
        start_code, width, height = struct.unpack_from("<3sHH", data, 23)
        if start_code != b"\x9d\x01\x2a":
            raise _corrupt("webp", "has no key frame")
        return Header("webp", height & 0x3FFF, width & 0x3FFF, 3, complete=complete)
    if kind == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, 20)
        if signature != 0x2F:
            raise _corrupt("webp", "has no lossless signature")
        channels = 4 if bits >> 28 & 1 else 3
        return Header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, channels, complete=complete)
    if kind == b"VP8X":
        return _parse_extended_webp(data, complete)
    if len(kind) < 4:
        raise struct.error
    raise _corrupt("webp", f"starts with a chunk {kind!r}; expected VP8, VP8L or VP8X")


def _parse_extended_webp(data: bytes, complete: bool) -> Header:
    flags, width_low, width_high, height_low, height_high = struct.unpack_from("<BxxxHBHB", data, 20)
    orientation = 1
    if flags & 0x08:
        for name, start, _ in chunks(data, 12, "<4sI"):
            if name == b"EXIF":
                prefix = 6 if data.startswith(b"Exif\0\0", start) else 0
                orientation = _exif_orientation(data, start + prefix)
                break
    return Header(
        format="webp",
        height=(height_high << 16 | height_low) + 1,
        width=(width_high << 16 | width_low) + 1,
        channels=4 if flags & 0x10 else 3,
        orientation=orientation,
        complete=complete,
        has_profile=bool(flags & 0x20),
    )


# --- BMP, GIF --------------------------------------------------------------------------------------------------------

_BMP_UNPACKED = (0, 3, 6)  # compressions whose rows have a known length


def _parse_bmp(data: bytes) -> Header:
    offset, info_bytes = struct.unpack_from("<II", data, 10)
    if info_bytes == 12:  # OS/2
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)  # negative: rows run downwards
    if width < 0:
        raise _corrupt("bmp", f"says a width of {width}")
    row_bytes = (width * bits + 31) // 32 * 4
    complete = compression not in _BMP_UNPACKED or offset + row_bytes * height <= len(data)
    return Header("bmp", height, width, 4 if bits == 32 else 3, complete=complete)


def _parse_gif(data: bytes) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", height, width, 3)


# --- AVIF: boxes in boxes ---------------------------------------------------------------------------------------------

_ALPHA = b":auxiliary:alpha\0"  # of the type that an image of alpha names
# Turned left so many quarters, then not mirrored, mirrored up-down or left-right: as EXIF numbers it.
_TURNS = {0: (1, 4, 2), 1: (8, 5, 7), 2: (3, 2, 4), 3: (6, 7, 5)}


def _boxes(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each box's body; a box that is cut off ends the list."""
    while position + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, position)
        header_bytes = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
            header_bytes = 16
        stop = end if length == 0 else position + length
        if length and length < header_bytes:
            raise _corrupt("file", f"has a box {name!r} of {length} bytes")
        if stop > end:
            return
        yield name, position + header_bytes, stop
        position = stop


def _parse_avif(data: bytes) -> Header:
    top = {name: (start, end) for name, start, end in _boxes(data, 0, len(data)) if name in (b"ftyp", b"meta")}
    if b"ftyp" not in top:
        raise struct.error
    start, end = top[b"ftyp"]
    if not {b"avif", b"avis"} & {data[brand : brand + 4] for brand in range(start, end, 4)}:
        raise DecodeError("this is HEIF, but not AVIF, and nbvision does not read it", kind="unsupported")
    if b"meta" not in top:
        raise struct.error
    start, end = top[b"meta"]
    meta = {name: (start, end) for name, start, end in _boxes(data, start + 4, end)}
    if not {b"pitm", b"iprp", b"iloc"} <= set(meta):
        raise _corrupt("avif", "does not say where its image is")
    pitm = meta[b"pitm"][0]
    (item,) = struct.unpack_from(">I" if data[pitm] else ">H", data, pitm + 4)
    tables = {name: (start, end) for name, start, end in _boxes(data, *meta[b"iprp"])}
    if not {b"ipco", b"ipma"} <= set(tables):
        raise _corrupt("avif", "does not say how large its image is")
    known = list(_boxes(data, *tables[b"ipco"]))
    own = [known[index - 1] for index in _associated(data, tables[b"ipma"][0], item) if 0 < index <= len(known)]
    properties = {name: start for name, start, _ in own}
    if b"ispe" not in properties:
        raise _corrupt("avif", "does not say how large its image is")
    width, height = struct.unpack_from(">II", data, properties[b"ispe"] + 4)
    depth = data[properties[b"av1C"] + 2] if b"av1C" in properties else 0
    turns = data[properties[b"irot"]] & 3 if b"irot" in properties else 0
    mirrored = 1 + (data[properties[b"imir"]] & 1) if b"imir" in properties else 0
    return Header(
        format="avif",
        height=height,
        width=width,
        channels=4 if _ALPHA in data[slice(*tables[b"ipco"])] else 3,
        bits=12 if depth & 0x20 else 10 if depth & 0x40 else 8,
        orientation=_TURNS[turns][mirrored],
        complete=_last_byte(data, meta[b"iloc"][0]) <= len(data),
        has_profile=any(name == b"colr" and data[start : start + 4] in (b"prof", b"rICC") for name, start, _ in own),
    )


def _associated(data: bytes, position: int, item: int) -> list[int]:
    """The numbers, from 1, of an item's properties ("ipma")."""
    version, wide = data[position], data[position + 3] & 1
    (count,) = struct.unpack_from(">I", data, position + 4)
    position += 8
    for _ in range(count):
        (owner,) = struct.unpack_from(">I" if version else ">H", data, position)
        position += 4 if version else 2
        numbers = struct.unpack_from(f">{data[position]}{'H' if wide else 'B'}", data, position + 1)
        if owner == item:
            return [number & (0x7FFF if wide else 0x7F) for number in numbers]
        position += 1 + len(numbers) * (2 if wide else 1)
    return []


def _last_byte(data: bytes, position: int) -> int:
    """Behind the last byte that an item has in the file ("iloc")."""
    version, sizes = data[position], data[position + 4 : position + 6]
    offset_bytes, length_bytes, base_bytes, index_bytes = sizes[0] >> 4, sizes[0] & 15, sizes[1] >> 4, sizes[1] & 15
    (count,) = struct.unpack_from(">I" if version == 2 else ">H", data, position + 6)
    position += 10 if version == 2 else 8
    extent_bytes = offset_bytes + length_bytes + (index_bytes if version else 0)
    last = 0

    def number(length: int) -> int:
        nonlocal position
        position += length
        if position > len(data):
            raise struct.error
        return int.from_bytes(data[position - length : position], "big")

    for _ in range(count):
        number(4 if version == 2 else 2)
        in_file = number(2) & 15 == 0 if version else True
        number(2)
        base = number(base_bytes)
        for _ in range(number(2) if extent_bytes else 0):
            number(index_bytes if version else 0)
            offset, length = number(offset_bytes), number(length_bytes)
            last = max(last, base + offset + length if in_file else 0)
    return last


# --- JPEG 2000: a codestream, mostly in boxes -------------------------------------------------------------------------

_CODESTREAM, _START_OF_PIXELS, _END_OF_CODESTREAM = b"\xff\x4f\xff\x51", b"\xff\x93", b"\xff\xd9"


def _parse_codestream(data: bytes, start: int = 0) -> Header:
    """ISO 15444-1, A.5.1: the image is what lies between its offset and its far corner on the reference grid."""
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    channels, depth = struct.unpack_from(">HB", data, start + 40)
    if right <= left or bottom <= top:
        raise _corrupt("jpeg2000", f"says that it reaches from {left}, {top} to {right}, {bottom}")
    pixels = data.find(_START_OF_PIXELS, start + 42)
    return Header(
        format="jpeg2000",
        height=bottom - top,
        width=right - left,
        channels=channels,
        bits=(depth & 0x7F) + 1,
        # No two bytes of the pixels' codes look like this marker.
        complete=pixels >= 0 and data.rfind(_END_OF_CODESTREAM, pixels) >= 0,
        variant="" if start else "codestream",
    )


def _parse_jp2(data: bytes) -> Header:
    start = data.find(_CODESTREAM, 12)
    if start < 0:
        raise struct.error
    has_palette = has_profile = False
    for name, first, end in _boxes(data, 12, start):
        if name == b"jp2h":
            inner = [(name, at) for name, at, _ in _boxes(data, first, end)]
            has_palette = any(name == b"pclr" for name, _ in inner)
            has_profile = any(name == b"colr" and data[at] == 2 for name, at in inner)
    header = _parse_codestream(data, start)
    return header._replace(channels=3 if has_palette else header.channels, has_profile=has_profile)


# --- Signatures ------------------------------------------------------------------------------------------------------

_PARSERS: tuple[tuple[bytes, Callable[[bytes], Header]], ...] = (
    (b"\xff\xd8", _parse_jpeg),
    (b"\x89PNG\r\n\x1a\n", _parse_png),
    (b"RIFF", _parse_webp),
    (b"GIF87a", _parse_gif),
    (b"GIF89a", _parse_gif),
    (b"BM", _parse_bmp),
    (b"II*\0", _parse_tiff),
    (b"MM\0*", _parse_tiff),
    (b"II+\0", _parse_tiff),
    (b"MM\0+", _parse_tiff),
    (b"\0\0\0\x0cjP  \r\n\x87\n", _parse_jp2),
    (_CODESTREAM, _parse_codestream),
)

_UNREAD_FORMATS = (
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (4, b"ftyphei", "HEIC"),
)


def _parser_of(data: bytes) -> Callable[[bytes], Header]:
    if not data:
        raise DecodeError("no bytes at all; expected a compressed image", kind="empty")
    if data[4:8] == b"ftyp" and (data[8:12] in (b"avif", b"avis", b"mif1")):
        return _parse_avif
    for signature, parse in _PARSERS:
        if data.startswith(signature) and (signature != b"RIFF" or data[8:12] == b"WEBP"):
            return parse
    for offset, signature, name in _UNREAD_FORMATS:
        if data.startswith(signature, offset):
            raise DecodeError(f"this is {name}, which nbvision does not read; convert it first", kind="unsupported")
    raise DecodeError(
        f"{len(data)} bytes that start with {data[:8]!r}; expected a JPEG, PNG, WebP, AVIF, TIFF, BMP, GIF, JPEG 2000",
        kind="not_an_image",
    )
