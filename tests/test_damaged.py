"""Thousands of damaged files of every format: each gives an image or a typed error, and on both devices the same."""

from __future__ import annotations

import collections
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from reference import random_image

from nbvision.codecs import decode, read_header
from nbvision.errors import DecodeError, DecodeErrorKind

SEED = 20261123
FLIPS, SWAPS, LIES = 110, 60, 30  # of each file


def written(format: str, mode: str = "RGB", **options: Any) -> bytes:
    coarse = Image.fromarray(random_image(np.random.default_rng(SEED), 9, 13)).resize(
        (131, 97), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    coarse.convert(mode).save(file, format, **options)
    return file.getvalue()


WHOLE = {
    "jpeg 4:2:0": written("JPEG", quality=85),
    "jpeg 4:4:4 with restarts": written("JPEG", quality=85, subsampling=0, restart_marker_blocks=5),
    "jpeg gray": written("JPEG", "L"),
    "jpeg progressive": written("JPEG", progressive=True),
    "jpeg cmyk": written("JPEG", "CMYK"),
    "png": written("PNG"),
    "png rgba": written("PNG", "RGBA"),
    "png palette": written("PNG", "P"),
    "webp": written("WEBP"),
    "webp lossless": written("WEBP", "RGBA", lossless=True),
    "gif": written("GIF", "P"),
    "bmp": written("BMP"),
    "tiff": written("TIFF"),
    "tiff lzw": written("TIFF", compression="tiff_lzw"),
    "avif": written("AVIF"),
}


def cut(data: bytes) -> Iterator[bytes]:
    """At every tenth."""
    for tenth in range(1, 10):
        yield data[: len(data) * tenth // 10]


def flipped(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """One to eight bits are others."""
    for _ in range(FLIPS):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        yield bytes(damaged)


def swapped(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Two markers of a JPEG have changed places, or two words of another file."""
    markers = [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] not in (0x00, 0xFF)]
    is_jpeg = data[:2] == b"\xff\xd8"
    for _ in range(SWAPS):
        damaged = bytearray(data)
        first, second = rng.choice(markers, 2) if is_jpeg else rng.integers(0, len(data) - 4, 2)
        width = 2 if is_jpeg else 4
        damaged[first : first + width], damaged[second : second + width] = (
            data[second : second + width],
            data[first : first + width],
        )
        yield bytes(damaged)


def lying(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Numbers of the first 64 bytes are others, sizes among them; a PNG's checksum says that this is right."""
    for _ in range(LIES):
        damaged = bytearray(data)
        at = int(rng.integers(2, min(62, len(data) - 2)))
        struct.pack_into(">H", damaged, at, int(rng.choice([0, 1, 2, 255, 4000, 65535])))
        if data[:4] == b"\x89PNG":
            struct.pack_into(">I", damaged, 29, zlib.crc32(damaged[12:29]))
        yield bytes(damaged)


def damaged_files(name: str) -> list[tuple[str, bytes]]:
    """What was done to it, and the file."""
    rng = np.random.default_rng([SEED, *name.encode()])
    data = WHOLE[name]
    files = [("cut", damaged) for damaged in cut(data)]
    files += [("flipped", damaged) for damaged in flipped(data, rng)]
    files += [("swapped", damaged) for damaged in swapped(data, rng)]
    return files + [("lying", damaged) for damaged in lying(data, rng)]


def verdicts(files: list[bytes], device: str) -> list[str]:
    batch = decode(files, device=device, strict=True, limit_pixels=1 << 24)
    for index, error in enumerate(batch.errors):
        if error is None:
            assert batch[index].shape == (*read_header(files[index]).oriented_size, 3)
        else:
            assert type(error) is DecodeError
            assert error.kind in get_args(DecodeErrorKind)
    return ["ok" if error is None else error.kind for error in batch.errors]


def test_there_are_enough() -> None:
    assert sum(len(damaged_files(name)) for name in WHOLE) >= 3000


@pytest.mark.parametrize("name", WHOLE)
def test_each_file_gives_an_image_or_an_error(device: Any, name: str) -> None:
    files = [WHOLE[name], *(data for _, data in damaged_files(name))]
    got = verdicts(files, device)
    assert got[0] == "ok"
    done = ["whole", *(what for what, _ in damaged_files(name))]
    counts = collections.Counter(zip(done, got, strict=True))
    assert ("cut", "ok") not in counts, counts


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", WHOLE)
def test_both_devices_give_the_same_verdict(name: str) -> None:
    files = [data for _, data in damaged_files(name)]
    on_cpu, on_cuda = verdicts(files, "cpu"), verdicts(files, "cuda")
    differing = [(index, *pair) for index, pair in enumerate(zip(on_cpu, on_cuda, strict=True)) if len(set(pair)) > 1]
    assert len(differing) <= 0.01 * len(files), differing


@pytest.mark.parametrize("name", WHOLE)
def test_neighbours_do_not_change_a_verdict(device: Any, name: str) -> None:
    files = [data for _, data in damaged_files(name)][::7]
    assert [verdicts([data], device)[0] for data in files] == verdicts(files, device)
