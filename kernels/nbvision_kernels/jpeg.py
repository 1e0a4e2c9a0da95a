"""The headers of many JPEGs in one call: what ``nbvision.codecs.headers`` reads in Python, for those that are plain.

Whatever is odd is left to Python, which has the words for it.  So a file gets one verdict, read by whichever.
"""

from __future__ import annotations

import numpy as np

from nbvision_kernels.pixel import compiled_apart, pointer_from_address

__all__ = ["COLORSPACES", "COLUMNS", "VARIANTS", "make_cpu_loop"]

# A file's row. ``is_read`` is 0 where Python has to look; then the others say nothing.
COLUMNS = ("is_read", "height", "width", "channels", "bits", "orientation", "variant", "colorspace", "has_profile")
VARIANTS = ("baseline", "extended", "progressive")  # in the order of their markers
COLORSPACES = ("gray", "ycbcr", "rgb")

_GRAY, _YCBCR, _RGB = range(3)
_FRAME, _TABLES, _END, _SCAN, _QUANTIZERS, _RESTARTS, _COMMENT = 0xC0, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_ADOBE_BYTES = 12
_LEAST_BYTES = 16
_ORIENTATION_TAG, _SHORT = 274, 3
_ENTRY_BYTES = 12  # of a TIFF directory
_NONE = -1


def _starts_with(text):
    """``function(data, at)``: whether so it goes on there; the caller knows that there are as many bytes."""
    letters = tuple(text)

    @compiled_apart
    def starts(data, at):
        differing = 0
        for index, letter in enumerate(letters):
            differing |= data[at + index] ^ letter
        return differing == 0

    return starts


@compiled_apart
def _number(data, at, count, big_endian):
    """Of ``count`` bytes."""
    value = np.int64(0)
    for index in range(count):
        byte = data[at + index] if big_endian else data[at + count - 1 - index]
        value = value * 256 + byte
    return value


@compiled_apart
def _orientation(data, base, end):
    """What the EXIF at ``base`` says, 1 if it says nothing; ``_NONE`` where Python has to look."""
    if base + 8 > end or data[base] != data[base + 1] or data[base] not in (ord("I"), ord("M")):
        return _NONE
    big_endian = data[base] == ord("M")
    start = base + _number(data, base + 4, 4, big_endian)
    if _number(data, base + 2, 2, big_endian) == 43 or start + 2 > end:
        return _NONE
    count = _number(data, start, 2, big_endian)
    if start + 2 + count * _ENTRY_BYTES > end or count > 4096:
        return _NONE
    orientation = 1
    for index in range(count):
        entry = start + 2 + index * _ENTRY_BYTES
        if _number(data, entry, 2, big_endian) == _ORIENTATION_TAG:
            is_one = _number(data, entry + 2, 2, big_endian) == _SHORT and _number(data, entry + 4, 4, big_endian) == 1
            if not is_one:
                return _NONE
            orientation = _number(data, entry + 8, 2, big_endian)  # of two the last, as in Python
    return orientation if 1 <= orientation <= 8 else 1


def make_cpu_loop():
    """``read(addresses, lengths, rows)`` for files of any kind.

    ``addresses`` and ``lengths`` are (N,) int64, in bytes; ``rows`` is (N, 9) int32, see ``COLUMNS``.
    """
    is_jpeg, is_avif = _starts_with(b"\xff\xd8"), _starts_with(b"ftyp")
    is_jfif, is_exif, is_icc = _starts_with(b"JFIF\0"), _starts_with(b"Exif\0"), _starts_with(b"ICC_PROFILE\0")
    is_adobe = _starts_with(b"Adobe")

    @compiled_apart
    def colorspace_of(data, frame, channels, has_jfif, adobe_transform):
        if channels == 1:
            return _GRAY
        if channels != 3:
            return _NONE
        if has_jfif:
            return _YCBCR
        if adobe_transform != _NONE:
            return _RGB if adobe_transform == 0 else _YCBCR
        names = frame + 6
        if data[names] == ord("R") and data[names + 3] == ord("G") and data[names + 6] == ord("B"):
            return _RGB
        return _YCBCR

    @compiled_apart
    def read_one(data, size, row):
        if size < _LEAST_BYTES or not is_jpeg(data, 0) or is_avif(data, 4):
            return
        at, frame, variant, orientation, has_profile = np.int64(2), np.int64(0), 0, np.int64(1), 0
        has_jfif, adobe_transform = False, _NONE
        while True:
            if at + 4 > size or data[at] != 0xFF:
                return
            marker, length, body = data[at + 1], _number(data, at + 2, 2, True), at + 4
            if marker == _SCAN:
                break
            if length < 2 or at + 2 + length + _ADOBE_BYTES > size:  # so all that is compared below is there
                return
            if _FRAME <= marker < _FRAME + 3:
                frame, variant = body, marker - _FRAME
            elif marker == _APP0:
                has_jfif = has_jfif or is_jfif(data, body)
            elif marker == _APP1:
                if is_exif(data, body):
                    orientation = _orientation(data, body + 6, size)
                    if orientation == _NONE:
                        return
            elif marker == _APP2:
                if is_icc(data, body):
                    has_profile = 1
            elif marker == _APP14:
                if is_adobe(data, body):
                    adobe_transform = np.int64(data[body + 11])
            elif marker not in (_TABLES, _QUANTIZERS, _RESTARTS, _COMMENT) and not _APP2 < marker < _APP14:
                return
            at += 2 + length
        if frame == 0 or frame + 6 + 9 > size:
            return
        channels = np.int64(data[frame + 5])
        colorspace = colorspace_of(data, frame, channels, has_jfif, adobe_transform)
        height, width = _number(data, frame + 1, 2, True), _number(data, frame + 3, 2, True)
        if colorspace == _NONE or height == 0 or width == 0:
            return
        end = size - 2
        while end >= at and not (data[end] == 0xFF and data[end + 1] == _END):
            end -= 1
        if end < at:
            return
        row[1], row[2], row[3], row[4] = height, width, channels, data[frame]
        row[5], row[6], row[7], row[8] = orientation, variant, colorspace, has_profile
        row[0] = 1

    def read(addresses, lengths, rows):
        for index in range(addresses.size):
            rows[index, 0] = 0
            read_one(pointer_from_address(addresses[index]), lengths[index], rows[index])

    return read
