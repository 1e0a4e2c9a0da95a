"""Plain PNGs by nbvision's own decoder: every filter, every way to cut a file up, and what it leaves to others."""

from __future__ import annotations

import io
import itertools
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbvision_kernels.png import paeth
from numba import njit
from PIL import Image

from nbvision.codecs import decode, host, png, read_header
from nbvision.codecs.decoder import Decoder
from nbvision.codecs.headers import chunks
from nbvision.codecs.host import imagecodecs_module
from nbvision.errors import CompileError
from nbvision.runtime.compile import _LoopCache

Pixels = npt.NDArray[np.uint8]

ORDERS = {"rgb": [0, 1, 2], "bgr": [2, 1, 0], "rgba": [0, 1, 2, 3], "bgra": [2, 1, 0, 3]}
UNPACKERS = ["zlib", pytest.param("imagecodecs", marks=pytest.mark.skipif(imagecodecs_module() is None, reason=""))]


def filtered(pixels: Pixels, kinds: list[int]) -> bytes:
    """Lines as PNG stores them, with the filter that is asked for each; by the standard's own words, byte by byte."""
    height, width, channels = pixels.shape
    lines = b""
    for y in range(height):
        line = [kinds[y]]
        for x in range(width):
            for c in range(channels):
                left = int(pixels[y, x - 1, c]) if x else 0
                above = int(pixels[y - 1, x, c]) if y else 0
                corner = int(pixels[y - 1, x - 1, c]) if x and y else 0
                guess = left + above - corner
                nearest = min((left, above, corner), key=lambda value: abs(guess - value))  # the first of equals
                line.append((int(pixels[y, x, c]) - [0, left, above, (left + above) // 2, nearest][kinds[y]]) % 256)
        lines += bytes(line)
    return lines


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def header_chunk(height: int, width: int, channels: int, bits: int = 8) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, {3: 2, 4: 6}[channels], 0, 0, 0))


def png_of(
    pixels: Pixels, lines: bytes, *, cuts: list[int] | None = None, before: bytes = b"", level: int = 6
) -> bytes:
    packed = zlib.compress(lines, level)
    places = [0, *sorted(cut % (len(packed) + 1) for cut in cuts or []), len(packed)]
    bodies = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in itertools.pairwise(places))
    return b"\x89PNG\r\n\x1a\n" + header_chunk(*pixels.shape) + before + bodies + chunk(b"IEND")


def wanted_pixels(pixels: Pixels, color: str) -> Pixels:
    opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    return np.concatenate([pixels, opaque], axis=2)[:, :, ORDERS[color]]


def by_ours(data: bytes, color: Any, unpacker: str = "imagecodecs") -> Pixels | None:
    header = read_header(data)
    if not png.takes(data, header, color):
        return None
    out = np.full((header.height, header.width, len(ORDERS[color])), 77, np.uint8)
    module = imagecodecs_module() if unpacker == "imagecodecs" else None
    return out if png.decode_into(out, data, header, color=color, imagecodecs=module) else None


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("unpacker", UNPACKERS)
@pytest.mark.parametrize("color", ORDERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_filter_is_undone(unpacker: str, color: str, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    channels = data.draw(st.sampled_from([3, 4]))
    levels = data.draw(st.sampled_from([2, 4, 256]))  # few levels: many distances are equal
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    cuts = data.draw(st.lists(st.integers(0, 1000), max_size=4))  # some at one place: chunks may be empty
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    pixels = (rng.integers(0, levels, (height, width, channels)) * (255 // (levels - 1))).astype(np.uint8)
    file = png_of(pixels, filtered(pixels, kinds), cuts=cuts, level=data.draw(st.sampled_from([0, 1, 9])))
    with Image.open(io.BytesIO(file)) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)  # or the test's own file is none
    got = by_ours(file, color, unpacker)
    assert got is not None
    np.testing.assert_array_equal(got, wanted_pixels(pixels, color))


def test_paeth_chooses_as_the_standard_says() -> None:
    """Of all three bytes that there can be."""

    @njit
    def choose_all(chosen: Any, corner: int) -> None:
        for left in range(256):
            for above in range(256):
                chosen[left, above] = paeth(np.int32(left), np.int32(above), np.int32(corner))

    left, above = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    chosen = np.empty((256, 256), np.int32)
    for corner in range(256):
        choose_all(chosen, corner)
        guess = left + above - corner
        distances = np.abs([guess - left, guess - above, guess - corner])
        np.testing.assert_array_equal(chosen, np.choose(distances.argmin(axis=0), [left, above, corner]))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4099, 4), (4099, 1, 3), (333, 517, 4), (1500, 1201, 3)])
@pytest.mark.parametrize("color", ORDERS)
def test_sizes(shape: tuple[int, int, int], color: Any) -> None:
    pixels = noise(*shape)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    got = by_ours(file.getvalue(), color)
    assert got is not None
    np.testing.assert_array_equal(got, wanted_pixels(pixels, color))


def test_many_threads_at_once() -> None:
    """Loops are compiled or loaded by the first of them, and each has memory of its own."""
    files, answers = [], {}
    for index in range(8):
        stream = io.BytesIO()
        Image.fromarray(noise(40 + index, 50, 3)).save(stream, "PNG")
        files.append(stream.getvalue())

    def work(index: int) -> None:
        answers[index] = [by_ours(file, "rgb") for file in files * 20]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers.values():
        for index, got in enumerate(answer):
            np.testing.assert_array_equal(got, noise(40 + index % 8, 50, 3))
    assert len(answers) == 4


FEW_AND_MANY = """
import io, sys
from PIL import Image
import nbvision as nbv
from nbvision.codecs import png

def file(height):
    stream = io.BytesIO()
    Image.new("RGB", (1000, height), (1, 2, 3)).save(stream, "PNG")
    return stream.getvalue()

for height in (10, 20, 30):
    nbv.decode(file(height), device="cpu")
assert "numba" not in sys.modules
if sys.argv[1] == "many":
    png._WORTH_BYTES = 1_000_000
    for _ in range(10):
        nbv.decode(file(100), device="cpu")
else:
    nbv.Decoder(device="cpu").warm_up()
assert "numba" in sys.modules
print(nbv.decode(file(7), device="cpu")[0].sum())
"""


@pytest.mark.parametrize("how", ["many", "warm"])
def test_a_process_with_few_of_them_does_not_import_numba(how: str) -> None:
    """But one with many does, and one that says so."""
    command = [sys.executable, "-c", FEW_AND_MANY, how]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert (done.returncode, done.stdout.strip()) == (0, "42000"), done.stderr


@pytest.mark.parametrize("unpacker", UNPACKERS)
@pytest.mark.parametrize("color", ORDERS)
def test_who_is_warm_waits_for_no_loop(color: Any, unpacker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that are asked for later are others than those that were warmed."""
    png._loop.cache_clear()
    Decoder(color=color, device="cpu").warm_up()
    asked: list[str] = []
    monkeypatch.setattr(_LoopCache, "load_overload", lambda self, *_: asked.append(self._name))
    for channels in (3, 4):
        assert (
            by_ours(png_of(noise(2, 2, channels), filtered(noise(2, 2, channels), [0, 1])), color, unpacker) is not None
        )
    assert asked == []
    Decoder(color="gray", device="cpu").warm_up()  # Pillow's


@pytest.mark.parametrize("error", [CompileError("no compiler"), MemoryError(), OSError("the disk is full")])
def test_a_host_that_cannot_leaves_it_to_pillow(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(png, "_loop", lambda *_: fail)
    np.testing.assert_array_equal(decode(GOOD, device="cpu")[0], WHOLE)


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a file"
    place.write_bytes(b"")
    monkeypatch.setattr("nbvision.runtime.compile.kernel_cache_dir", lambda: place / "kernels")
    png._loop.cache_clear()
    got = by_ours(GOOD, "rgb")
    png._loop.cache_clear()
    assert got is not None
    np.testing.assert_array_equal(got, WHOLE)


# --- what is left to others ------------------------------------------------------------------------------------------

WHOLE = noise(9, 11, 3)
LINES = filtered(WHOLE, [0, 1, 2, 3, 4, 0, 1, 2, 3])


def cut_lines(by: int) -> bytes:
    return png_of(WHOLE, LINES[: len(LINES) - by] if by > 0 else LINES + bytes(-by))


def with_flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def with_right_checksums(data: bytes) -> bytes:
    """As far as its chunks can be told apart."""
    whole = data[:8]
    for name, start, length in chunks(data, 8, ">I4s"):
        whole += chunk(name, data[start : start + length])
    return whole + data[len(whole) :]


def unknown_filter() -> bytes:
    return png_of(WHOLE, LINES[:34] + b"\x05" + LINES[35:])


HEAD, END = b"\x89PNG\r\n\x1a\n", chunk(b"IEND")
PIXELS = chunk(b"IDAT", zlib.compress(LINES))


def beside(extra: bytes) -> bytes:
    return png_of(WHOLE, LINES, before=extra)


GOOD = png_of(WHOLE, LINES, before=chunk(b"gAMA", b"\0\0\xb1\x8f"))
DOUBTFUL = {
    "a pixel too few": cut_lines(3),
    "a line too few": cut_lines(34),
    "a line too many": cut_lines(-34),
    "an unknown filter": unknown_filter(),
    "the header's checksum": with_flipped(GOOD, 8 + 8 + 13),
    "another chunk's checksum": with_flipped(GOOD, 8 + 25 + 8 + 4),
    "the checksum of the pixels": with_flipped(GOOD, len(GOOD) - 12 - 5),
    "a code": with_flipped(GOOD, len(GOOD) // 2),
    "something between the pixels": GOOD.replace(chunk(b"IEND"), b"")[: 8 + 25 + 16]
    + chunk(b"IDAT", zlib.compress(LINES)[:50])
    + chunk(b"tEXt", b"a\0b")
    + chunk(b"IDAT", zlib.compress(LINES)[50:])
    + chunk(b"IEND"),
    "another way to filter": HEAD + chunk(b"IHDR", struct.pack(">IIBBBBB", 11, 9, 8, 2, 0, 1, 0)) + PIXELS + END,
    "another way to pack": HEAD + chunk(b"IHDR", struct.pack(">IIBBBBB", 11, 9, 8, 2, 1, 0, 0)) + PIXELS + END,
    "a longer header": HEAD + chunk(b"IHDR", struct.pack(">IIBBBBBB", 11, 9, 8, 2, 0, 0, 0, 0)) + PIXELS + END,
    "two headers": beside(header_chunk(10, 11, 3)),
    "a text that unpacks to megabytes": beside(chunk(b"zTXt", b"Title\0\0" + zlib.compress(bytes(3 << 20)))),
    "a text for all the world": beside(chunk(b"iTXt", b"Title\0\1\0\0\0" + zlib.compress(bytes(3 << 20)))),
    "a profile that unpacks to megabytes": beside(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3 << 20)))),
    "a profile packed otherwise": beside(chunk(b"iCCP", b"a\0\1" + zlib.compress(b"profile"))),
    "a short gAMA": beside(chunk(b"gAMA", b"\0\0\0")),
    "a short cHRM": beside(chunk(b"cHRM", bytes(31))),
    "a short sRGB": beside(chunk(b"sRGB")),
    "a short pHYs": beside(chunk(b"pHYs", bytes(8))),
    "a short tRNS": beside(chunk(b"tRNS", bytes(4))),
    "a chunk without a name": beside(chunk(b"a-b!")),
    "a frame of an animation": beside(chunk(b"fcTL", struct.pack(">IIIIIHHBB", 5, 11, 9, 0, 0, 1, 1, 0, 0))),
    "a word of Pillow's": beside(chunk(b"tEXt", b"interlace\0001")),
    "no pixels at all": b"\x89PNG\r\n\x1a\n" + header_chunk(9, 11, 3) + chunk(b"IEND"),
}


PLAIN = {
    "a gamma": chunk(b"gAMA", b"\0\0\xb1\x8f"),
    "a resolution": chunk(b"pHYs", bytes(9)),
    "a time": chunk(b"tIME", bytes(7)),
    "a title": chunk(b"tEXt", b"Title\0of a picture"),
    "ImageMagick's": chunk(b"tEXt", b"date:create\0002026-11-30"),
    "a profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(bytes(3000))),
    "a suggested palette": chunk(b"PLTE", bytes(30)),
    "EXIF": chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_common_beside_pixels_is_plain(name: str) -> None:
    got = by_ours(beside(PLAIN[name]), "rgb")
    assert got is not None
    np.testing.assert_array_equal(got, WHOLE)


@pytest.mark.parametrize("unpacker", UNPACKERS)
@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_is_doubtful_is_left_to_others(name: str, unpacker: str) -> None:
    assert by_ours(GOOD, "rgb", unpacker) is not None
    assert by_ours(DOUBTFUL[name], "rgb", unpacker) is None


def test_a_transparent_colour_is_left_to_others_only_where_alpha_is_wanted() -> None:
    file = png_of(WHOLE, LINES, before=chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])))
    assert by_ours(file, "rgb") is not None
    assert by_ours(file, "rgba") is None


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "I;16"])
def test_other_kinds_are_left_to_others(mode: str) -> None:
    file = io.BytesIO()
    Image.fromarray(noise(5, 6)).convert(mode).save(file, "PNG")
    assert by_ours(file.getvalue(), "rgb") is None


@pytest.mark.parametrize("unpacker", UNPACKERS)
@pytest.mark.parametrize("channels", [3, 4])
def test_damaged_files_get_pillows_verdict(unpacker: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of 800 files changed at random, half of them with checksums that are right again, and all that is doubtful:
    refused by both or by none, with the same pixels."""
    pixels = noise(9, 11, channels)
    before = chunk(b"gAMA", b"\0\0\xb1\x8f") + chunk(b"tEXt", b"Title\0b") + chunk(b"pHYs", bytes(9))
    whole = png_of(pixels, filtered(pixels, [4, 3, 2, 1, 0, 4, 3, 2, 1]), cuts=[30, 90], before=before)
    rng = np.random.default_rng(5)
    files = [whole]
    for number in range(800):
        damaged = bytearray(whole)
        damaged[rng.integers(8, len(damaged))] ^= 1 << rng.integers(8)
        files.append(with_right_checksums(bytes(damaged)) if number % 2 else bytes(damaged))
    files += DOUBTFUL.values()
    if unpacker == "zlib":
        monkeypatch.setattr(host, "imagecodecs_module", lambda: None)
    ours = decode(files, device="cpu", limit_pixels=10**6)
    monkeypatch.setattr(host, "imagecodecs_module", lambda: None)
    monkeypatch.setattr(png, "takes", lambda *_: False)
    pillows = decode(files, device="cpu", limit_pixels=10**6)
    assert [error and error.kind for error in ours.errors] == [error and error.kind for error in pillows.errors]
    assert 1 < sum(ours.ok) < len(files)
    for index in np.flatnonzero(ours.ok):
        np.testing.assert_array_equal(ours[index], pillows[index])
