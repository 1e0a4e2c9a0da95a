"""JPEG 2000 on both devices, against Pillow: values, truth about cut files, limits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import to_host

import nbvision as nbv
from nbvision.codecs import read_header


def picture(mode: str, height: int = 45, width: int = 61) -> Image.Image:
    rng = np.random.default_rng(8)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 4), np.uint8), "RGBA") if mode != "I;16" else None
    if coarse is None:
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG2000", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"irreversible": True, "quality_layers": [10]}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "I;16"])
def test_pixels_are_pillows(device: Any, mode: str, options: dict[str, Any]) -> None:
    data = encoded(picture(mode), **options)
    header = read_header(data)
    assert (header.format, header.channels) == ("jpeg2000", {"L": 1, "I;16": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode])
    assert header.bits == (16 if mode == "I;16" else 8)
    with Image.open(io.BytesIO(data)) as image:
        whole = np.asarray(image)
    if mode == "I;16":
        whole = (whole >> 8).astype(np.uint8)
    for color, pillow in (("rgb", "RGB"), ("gray", "L"), ("rgba", "RGBA")):
        expected = np.asarray(Image.fromarray(whole).convert(pillow)).reshape(45, 61, -1)
        batch = nbv.decode([data], color=color, device=device)  # type: ignore[arg-type]
        np.testing.assert_array_equal(to_host(batch[0]), expected)


def test_alpha_is_blended(device: Any) -> None:
    data = encoded(picture("RGBA"))
    canvas = Image.new("RGBA", (61, 45), (10, 200, 30, 255))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(Image.alpha_composite(canvas, image).convert("RGB"))
    np.testing.assert_array_equal(to_host(nbv.decode(data, background=(10, 200, 30), device=device)[0]), expected)


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (32, 32)}], ids=str)
def test_cut_files_are_truncated(device: Any, options: dict[str, Any]) -> None:
    data = encoded(picture("RGB"), **options)
    cut = [data[: len(data) * tenth // 10] for tenth in range(1, 10)] + [data[:-1]]
    batch = nbv.decode([data, *cut], device=device)
    assert batch.errors[0] is None
    assert {error.kind for error in batch.errors[1:] if error} == {"truncated"}
    assert None not in batch.errors[1:]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_costs_no_other_image(position: int, bit: int) -> None:
    data = bytearray(encoded(picture("RGB")))
    data[position % len(data)] ^= 1 << bit
    whole = encoded(picture("L"))
    batch = nbv.decode([bytes(data), whole], device="cpu", limit_pixels=1_000_000)
    assert batch.errors[1] is None
    if batch.errors[0] is None:
        assert batch[0].shape[:2] == read_header(bytes(data)).oriented_size


def test_a_header_that_lies_is_refused_before_memory_is_taken(device: Any) -> None:
    data = bytearray(encoded(picture("RGB"), no_jp2=True))
    data[8:16] = (60_000).to_bytes(4, "big") * 2
    (error,) = nbv.decode([bytes(data)], device=device).errors
    assert error is not None
    assert error.kind == "too_large"
    data[8:16] = bytes(8)
    (error,) = nbv.decode([bytes(data)], device=device).errors
    assert error is not None
    assert error.kind == "corrupt"
