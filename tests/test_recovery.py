"""Damaged files decoded as far as they go."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import to_host

import nbvision as nbv
from nbvision.codecs.decode import decode
from nbvision.codecs.gpu_decode import takes
from nbvision.codecs.headers import read_header
from nbvision.codecs.host import Wanted, check_jpeg
from nbvision.codecs.open import CompressedImage, How, decode_on_host, read_image
from nbvision.errors import DecodeError

HEIGHT, WIDTH = 150, 203


def picture(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (19, 26, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return image.quantize(64) if mode == "P" else image.convert("RGB").convert(mode)


def written(format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    image = picture(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257)
    image.save(file, format, **options)
    return file.getvalue()


IN_ORDER = {
    "jpeg": written("JPEG", quality=90),
    "jpeg 4:4:4": written("JPEG", quality=90, subsampling="4:4:4"),
    "gray jpeg": written("JPEG", "L"),
    "png": written("PNG"),
    "palette png": written("PNG", "P"),
    "1-bit png": written("PNG", "1"),
    "16-bit png": written("PNG", "I;16"),
    "gray-alpha png": written("PNG", "LA"),
    "webp": written("WEBP"),
    "lossless webp": written("WEBP", lossless=True),
}
OTHERS = {
    "progressive jpeg": written("JPEG", progressive=True),
    "restart markers": written("JPEG", restart_marker_blocks=5),
    "cmyk jpeg": written("JPEG", "CMYK"),
}


def whole_and_recovered(data: bytes, damaged: bytes, device: str) -> tuple[Any, Any, DecodeError | None]:
    batch = decode([data, damaged], device=device, recover=True)  # type: ignore[arg-type]
    assert batch.errors == (None, None)
    assert batch.damage[0] is None
    return to_host(batch[0]), to_host(batch[1]), batch.damage[1]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("data", IN_ORDER.values(), ids=IN_ORDER.keys())
def test_the_rows_before_the_end_are_known(device: str, data: bytes, share: float) -> None:
    whole, got, damage = whole_and_recovered(data, data[: int(len(data) * share)], device)
    assert damage is not None
    assert damage.kind == "truncated"
    assert damage.valid_rows is not None
    # JPEGs of the batch that are whole may come from the GPU, whose decoder differs by a few levels.
    difference = np.abs(got[: damage.valid_rows].astype(int) - whole[: damage.valid_rows])
    assert difference.max(initial=0) <= (8 if device == "cuda" and data.startswith(b"\xff\xd8") else 0)
    assert damage.valid_rows < HEIGHT
    assert damage.valid_rows > HEIGHT * (share - 0.4)


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS.keys())
def test_others_are_recovered_without_a_promise(device: str, data: bytes) -> None:
    whole, got, damage = whole_and_recovered(data, data[: int(len(data) * 0.8)], device)
    assert damage is not None
    assert damage.kind == "truncated"
    assert damage.valid_rows is None or (got[: damage.valid_rows] == whole[: damage.valid_rows]).all()
    assert np.abs(got[:40].astype(int) - whole[:40]).mean() < 30


def test_interlaced_png_is_recovered(device: str) -> None:
    """Pillow writes none, so its passes are packed here."""
    import struct
    import zlib

    pixels = np.asarray(picture())
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows = b"".join(b"\0" + row.tobytes() for t, d, l, r in passes for row in pixels[t::d, l::r])  # noqa: E741

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    whole, got, damage = whole_and_recovered(data, data[: int(len(data) * 0.7)], device)
    np.testing.assert_array_equal(whole, pixels)
    assert damage is not None
    assert damage.valid_rows is None
    np.testing.assert_array_equal(got[::8, ::8], pixels[::8, ::8])  # the first pass


def test_damage_inside_is_decoded_over() -> None:
    data = bytearray(IN_ORDER["jpeg"])
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(range(40))
    refused = decode(bytes(data), device="cpu")
    assert refused.errors[0] is not None
    assert refused.errors[0].kind == "corrupt"
    whole, got, damage = whole_and_recovered(IN_ORDER["jpeg"], bytes(data), "cpu")
    assert damage is not None
    assert damage.kind == "corrupt"
    assert damage.valid_rows is None
    np.testing.assert_array_equal(got[:40], whole[:40])


def test_strict_finds_damage_inside_on_every_device(device: str) -> None:
    data = bytearray(IN_ORDER["jpeg"])
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(range(40))
    files = [IN_ORDER["jpeg"], bytes(data), IN_ORDER["png"], OTHERS["progressive jpeg"]]
    refused = decode(files, device=device, strict=True)  # type: ignore[arg-type]
    assert [error and error.kind for error in refused.errors] == [None, "corrupt", None, None]
    recovered = decode(files, device=device, strict=True, recover=True)  # type: ignore[arg-type]
    assert recovered.ok.all()
    assert [damage and damage.kind for damage in recovered.damage] == [None, "corrupt", None, None]
    np.testing.assert_array_equal(to_host(recovered[1]), decode(bytes(data), device="cpu", recover=True)[0])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([name for name in sorted({**IN_ORDER, **OTHERS}) if "jpeg" in name]),
    st.lists(st.tuples(st.floats(0.1, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
)
def test_looking_through_a_jpeg_gives_the_verdict_of_decoding_it(name: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray({**IN_ORDER, **OTHERS}[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        header = read_header(bytes(data))
    except DecodeError:
        return
    if header.complete and takes(header, "rgb"):
        (error,) = decode(bytes(data), device="cpu", limit_pixels=1 << 20).errors
        found = None
        try:
            check_jpeg(bytes(data), header)
        except DecodeError as caught:
            found = caught.kind
        if error is None or error.kind != "too_large":
            assert found == (error and error.kind)


def test_a_broken_stream_of_a_png_is_decoded_to_the_break(device: str) -> None:
    data = bytearray(IN_ORDER["png"])
    data[len(data) // 2] ^= 0xFF
    whole, got, damage = whole_and_recovered(IN_ORDER["png"], bytes(data), device)
    assert damage is not None
    assert damage.valid_rows is None
    np.testing.assert_array_equal(got[:40], whole[:40])


@pytest.mark.parametrize("color", ["rgb", "bgr", "rgba", "gray"])
def test_colours_of_what_is_recovered(device: str, color: Any) -> None:
    for name in ("jpeg", "png", "webp"):
        data = IN_ORDER[name]
        batch = decode([data[: len(data) // 2], data], color=color, device="cpu", recover=True)
        (damage, none), rows = batch.damage, 30
        assert none is None
        assert damage is not None
        assert damage.valid_rows is not None
        assert damage.valid_rows > rows
        np.testing.assert_array_equal(batch[0][:rows], batch[1][:rows])


def test_what_cannot_be_saved_is_an_error(device: str) -> None:
    gif, jpeg = written("GIF", "P"), IN_ORDER["jpeg"]
    batch = decode([gif[:900], jpeg[:300], b"", IN_ORDER["png"][:40], b"no image"], device=device, recover=True)  # type: ignore[arg-type]
    assert [error and error.kind for error in batch.errors] == [
        "truncated",
        "truncated",
        "empty",
        "truncated",
        "not_an_image",
    ]
    assert batch.damage == (None,) * 5


def test_without_recover_damage_is_an_error(device: str, tmp_path: Any) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(IN_ORDER["png"][:5000])
    batch = decode([path], device=device)  # type: ignore[arg-type]
    assert batch.errors[0] is not None
    assert batch.damage == (None,)
    recovered = decode([path], device=device, recover=True)  # type: ignore[arg-type]
    assert recovered.damage[0] is not None
    assert recovered.damage[0].source == str(path)
    assert str(recovered.damage[0]) == str(batch.errors[0])


def test_what_is_lost_shows_nothing_of_what_the_memory_held_before() -> None:
    data = IN_ORDER["jpeg"]
    at = data.index(b"\xff\xc0")
    segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
    twice = data[:at] + segment + segment + data[at + len(segment) :]  # of which libjpeg decodes nothing
    image = read_image(twice, 1 << 30, recover=True)
    assert isinstance(image, CompressedImage)
    how = How(Wanted("gray"), "cpu", recover=True)
    pixels = [np.full((HEIGHT, WIDTH, 1), held, np.uint8) for held in (0, 9, 200)]
    for out in pixels:
        decode_on_host(dataclasses.replace(image), out, how)
        np.testing.assert_array_equal(out, pixels[0])


def test_batches_keep_what_is_known(device: str) -> None:
    data = IN_ORDER["jpeg"]
    batch = decode([data, data[:4000], b""], device=device, recover=True)  # type: ignore[arg-type]
    assert [bool(damage) for damage in batch.select([1, 0, 1]).damage] == [True, False, True]
    assert batch.to("cpu").damage == batch.damage
    assert nbv.as_batch(to_host(batch[0])).damage == (None,)


def test_a_webp_that_lies_about_its_length_costs_no_memory() -> None:
    import tracemalloc

    data = bytearray(IN_ORDER["webp"][:3000])
    data[4:8] = (0xFFFFFFF0).to_bytes(4, "little")
    tracemalloc.start()
    batch = decode(bytes(data), device="cpu", recover=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.damage[0] is not None
    assert peak < 10_000_000


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted({**IN_ORDER, **OTHERS})),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
)
def test_any_damage_gives_an_image_or_an_error(name: str, share: float, flips: list[tuple[float, int]]) -> None:
    """Cut anywhere, with bytes changed anywhere. What is not called damaged is what a strict decoder gives."""
    damaged = bytearray({**IN_ORDER, **OTHERS}[name])
    for place, change in flips:
        damaged[int(place * len(damaged))] ^= change
    damaged = damaged[: int(share * len(damaged))]
    recovered = decode(bytes(damaged), device="cpu", recover=True, limit_pixels=1 << 20)
    strict = decode(bytes(damaged), device="cpu", limit_pixels=1 << 20)
    (error,), (damage,), (strict_error,) = recovered.errors, recovered.damage, strict.errors
    if error is not None:
        assert strict_error is not None
        assert error.kind == strict_error.kind
    elif damage is None:
        np.testing.assert_array_equal(recovered[0], strict[0])
    else:
        assert strict_error is not None
        assert damage.kind == strict_error.kind
        assert recovered[0].shape[2] == 3
