"""decode(): against Pillow, on both devices, on whole and on broken files."""

from __future__ import annotations

import gc
import importlib
import io
import struct
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from nbvision.codecs import decode, gpu_decode, host, png, read_header
from nbvision.codecs._nvimgcodec import CPU_ONLY_DEVICE, DecoderHandle
from nbvision.codecs._threads import Turns
from nbvision.errors import DecodeError, DeviceError, InputError, MemoryLimitError
from nbvision.image import ImageBatch
from nbvision.runtime import memory

Pixels = npt.NDArray[np.uint8]


def photo(height: int = 97, width: int = 131, mode: str = "RGB") -> Image.Image:
    """Smooth, with a little grain: JPEG decoders differ most at hard colour edges, which photos seldom have."""
    rng = np.random.default_rng(7)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-4, 5, (height, width, 1))).clip(0, 255).astype(np.uint8)).convert(
        mode
    )


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_orientation(image: Image.Image, format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))


def by_pillow(data: bytes, mode: str = "RGB") -> Pixels:
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def on_host(batch: ImageBatch) -> list[Pixels]:
    return list(batch.to("cpu"))


def assert_like(got: Pixels, expected: Pixels, *, exact: bool) -> None:
    """Equal, or close as two correct JPEG decoders are.

    The standard leaves rounding of the inverse transform and the interpolation of colour to the decoder, so the GPU's
    pixels differ from libjpeg's by a few levels at single pixels and by less than one on average.
    """
    assert got.shape == expected.shape
    assert got.dtype == np.uint8
    difference = np.abs(got.astype(int) - expected)
    if exact:
        assert difference.max() == 0
    else:
        assert difference.mean() <= 0.7
        assert difference.max() <= 8


JPEGS = {
    "4:2:0": encode(photo(), "JPEG", quality=90, subsampling="4:2:0"),
    "4:2:2": encode(photo(), "JPEG", quality=90, subsampling="4:2:2"),
    "4:4:4": encode(photo(), "JPEG", quality=90, subsampling="4:4:4"),
    "gray": encode(photo(mode="L"), "JPEG", quality=90),
    "restart markers": encode(photo(), "JPEG", quality=90, restart_marker_blocks=4),
    "1x1": encode(photo(1, 1), "JPEG"),
    "1x40": encode(photo(1, 40), "JPEG"),
    "37x3": encode(photo(37, 3), "JPEG"),
    "37x3 4:2:2": encode(photo(37, 3), "JPEG", subsampling="4:2:2"),
    "37x4": encode(photo(37, 4), "JPEG"),
    "trailing bytes": encode(photo(), "JPEG", quality=90) + b"trailing",
}

# Decoded on the host whatever the device, so equal to Pillow everywhere.
OTHERS = {
    "progressive jpeg": encode(photo(), "JPEG", quality=90, progressive=True),
    "png": encode(photo(), "PNG"),
    "gray png": encode(photo(mode="L"), "PNG"),
    "gray-alpha png": encode(photo(mode="LA"), "PNG"),
    "rgba png": encode(photo(mode="RGBA"), "PNG"),
    "palette png": encode(photo().quantize(32), "PNG"),
    "palette png with a transparent colour": encode(photo().quantize(32), "PNG", transparency=3),
    "palette png with alpha": encode(photo().quantize(32), "PNG", transparency=bytes(range(32))),
    "rgb png with a transparent colour": encode(photo(), "PNG", transparency=(1, 2, 3)),
    "1-bit png": encode(photo(mode="1"), "PNG"),
    "1x1 png": encode(photo(1, 1), "PNG"),
    "webp": encode(photo(), "WEBP"),
    "lossless webp": encode(photo(mode="RGBA"), "WEBP", lossless=True),
    "bmp": encode(photo(), "BMP"),
    "palette bmp": encode(photo().quantize(32), "BMP"),
    "tiff": encode(photo(), "TIFF"),
    "lzw tiff": encode(photo(), "TIFF", compression="tiff_lzw"),
    "jpeg tiff": encode(photo(), "TIFF", compression="jpeg"),
    "1-bit tiff": encode(photo(mode="1"), "TIFF", compression="group4"),
    "cmyk tiff": encode(photo(mode="CMYK"), "TIFF"),
    "gif": encode(photo().quantize(32), "GIF"),
    "avif": encode(photo(), "AVIF"),
    "rgba avif": encode(photo(mode="RGBA"), "AVIF"),
    "gray avif": encode(photo(mode="L"), "AVIF"),
    "cmyk jpeg": encode(photo(mode="CMYK"), "JPEG"),
    "rgb jpeg": encode(photo(), "JPEG", keep_rgb=True),
}


# --- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", JPEGS.values(), ids=JPEGS.keys())
def test_jpeg_is_like_pillow(device: Any, data: bytes) -> None:
    (got,) = on_host(decode(data, device=device))
    assert_like(got, by_pillow(data), exact=device == "cpu")


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS.keys())
def test_other_formats_are_equal_to_pillow(device: Any, data: bytes) -> None:
    (got,) = on_host(decode(data, device=device))
    assert_like(got, without_alpha(data), exact=True)


def without_alpha(data: bytes) -> Pixels:
    image = Image.open(io.BytesIO(data))
    image.load()
    image.info.pop("transparency", None)  # converting a palette with alpha warns
    return np.asarray(image.convert("RGB"))


def test_the_largest_images_are_begun_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And still stand where their files do."""
    sizes = [(5, 9), (40, 30), (1, 1), (20, 20)]
    begun: list[int] = []
    decode_into = host.decode_into

    def note(out: Pixels, data: bytes, header: Any, **options: Any) -> None:
        begun.append(header.pixels)
        decode_into(out, data, header, **options)

    monkeypatch.setattr(host, "decode_into", note)
    batch = decode([encode(photo(*size), "PNG") for size in sizes], device="cpu", threads=1)
    assert begun == [1200, 400, 45, 1]
    assert [tuple(size) for size in batch.sizes] == sizes
    for size, got in zip(sizes, on_host(batch), strict=True):
        np.testing.assert_array_equal(got, np.asarray(photo(*size)))


def refuse_to_decode(*_: Any, **__: Any) -> None:
    raise AssertionError("Pillow is asked for nothing")


@pytest.mark.parametrize("name", ["png", "rgba png", "1x1 png", "webp", "lossless webp"])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_plain_png_and_webp_do_not_need_pillow(name: str, color: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    png.warm_up(color)
    monkeypatch.setattr(host, "_decode_by_pillow_into", refuse_to_decode)
    assert decode(OTHERS[name], color=color, device="cpu").errors == (None,)


@pytest.mark.parametrize("color", ["rgb", "bgr", "rgba", "gray"])
@pytest.mark.parametrize("name", [name for name in OTHERS if "png" in name or "webp" in name])
def test_without_imagecodecs_all_is_the_same(name: str, color: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of whole files; of damaged ones the verdict, and the pixels where they are decoded all the same."""
    rng = np.random.default_rng(11)
    files = [OTHERS[name]]
    for _ in range(25):
        damaged = bytearray(OTHERS[name])
        damaged[rng.integers(16, len(damaged))] ^= 1 << rng.integers(8)
        files.append(bytes(damaged))
    with_it = decode(files, color=color, device="cpu", limit_pixels=10**6)
    monkeypatch.setattr(host, "imagecodecs_module", lambda: None)
    without = decode(files, color=color, device="cpu", limit_pixels=10**6)
    assert [error and error.kind for error in with_it.errors] == [error and error.kind for error in without.errors]
    for index in np.flatnonzero(without.ok):
        np.testing.assert_array_equal(with_it[index], without[index])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(device: Any, format: str, orientation: int) -> None:
    data = with_orientation(photo(), format, orientation)
    batch = decode(data, device=device)
    expected = by_pillow(data)
    assert tuple(batch.sizes[0]) == expected.shape[:2]
    assert_like(on_host(batch)[0], expected, exact=device == "cpu" or format != "JPEG")


@pytest.mark.parametrize("color", ["bgr", "rgba", "bgra"])
@pytest.mark.parametrize("name", ["4:2:0", "gray", "cmyk jpeg", "rgba png", "palette png with alpha", "gray png"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_orders_of_channels(device: Any, color: Any, name: str, orientation: int) -> None:
    data = (JPEGS | OTHERS)[name]
    if orientation != 1:
        data = with_orientation(photo(mode="RGBA"), "PNG", orientation)
    expected = by_pillow(data, "RGBA")
    order = {"bgr": [2, 1, 0], "rgba": [0, 1, 2, 3], "bgra": [2, 1, 0, 3]}[color]
    (got,) = on_host(decode(data, color=color, device=device))
    assert_like(got, expected[:, :, order], exact=device == "cpu" or name not in JPEGS or color != "bgr")


@pytest.mark.parametrize("name", ["4:2:0", "gray", "progressive jpeg"])
def test_gray_of_a_jpeg_is_its_luma(device: Any, name: str) -> None:
    data = (JPEGS | OTHERS)[name]
    image = Image.open(io.BytesIO(data))
    image.draft("L", image.size)
    (got,) = on_host(decode(data, color="gray", device=device))
    assert_like(got, np.asarray(image)[:, :, None], exact=device == "cpu" or name in OTHERS)


@pytest.mark.parametrize("name", ["png", "rgba png", "palette png", "webp", "gif", "1-bit png"])
def test_gray_of_other_formats_is_pillows(device: Any, name: str) -> None:
    (got,) = on_host(decode(OTHERS[name], color="gray", device=device))
    assert_like(got, by_pillow(OTHERS[name], "L"), exact=True)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_keep_the_upper_8(device: Any, format: str, rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65536, (20, 30), np.uint16)
    (got,) = on_host(decode(encode(Image.fromarray(deep), format), device=device))
    np.testing.assert_array_equal(got, np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_floats_are_unsupported(device: Any) -> None:
    batch = decode(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), device=device)
    assert batch.errors[0].kind == "unsupported"


def test_odd_colour_sampling_is_decoded(device: Any) -> None:
    """4:1:0 in libjpeg's words: a sampling that simplejpeg does not name, and Pillow decodes."""
    jpeg = bytearray(encode(photo(64, 64, "RGB"), "JPEG", subsampling="4:4:4"))
    jpeg[jpeg.index(b"\xff\xc0") + 11] = 0x42
    expected = Image.open(io.BytesIO(jpeg))
    batch = decode(bytes(jpeg), device=device)
    if batch.errors[0] is None:  # the scan no longer fits its frame: a decoder may refuse it, but not crash
        assert on_host(batch)[0].shape == (*expected.size[::-1], 3)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_keeps_its_order(device: Any) -> None:
    names = list((JPEGS | OTHERS).keys()) * 2
    batch = decode([(JPEGS | OTHERS)[name] for name in names], device=device)
    assert batch.errors == (None,) * len(names)
    for name, got in zip(names, on_host(batch), strict=True):
        assert_like(got, without_alpha((JPEGS | OTHERS)[name]), exact=device == "cpu" or name in OTHERS)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_errors_stay_where_they_are(device: Any, threads: int | None) -> None:
    jpeg, png = JPEGS["4:2:0"], OTHERS["png"]
    batch = decode(
        [jpeg, b"", png, jpeg[: len(jpeg) // 2], b"no image", jpeg, png[:-20], damaged_png()],
        device=device,
        threads=threads,
    )
    kinds = [None if error is None else error.kind for error in batch.errors]
    assert kinds == [None, "empty", None, "truncated", "not_an_image", None, "truncated", "corrupt"]
    assert batch.ok.tolist() == [kind is None for kind in kinds]
    assert [tuple(size) for size in batch.sizes] == [(97, 131) if kind is None else (0, 0) for kind in kinds]
    with pytest.raises(DecodeError):
        batch[3]
    good = on_host(batch.select([0, 2, 5]))
    assert_like(good[0], by_pillow(jpeg), exact=device == "cpu")
    assert_like(good[1], by_pillow(png), exact=True)
    np.testing.assert_array_equal(good[0], good[2])


def damaged_png() -> bytes:
    """Whole by its structure, with a checksum that does not fit."""
    data = bytearray(OTHERS["png"])
    data[data.index(b"IDAT") + 40] ^= 0xFF
    return bytes(data)


def test_an_empty_list_is_an_empty_batch(device: Any) -> None:
    batch = decode([], device=device)
    assert len(batch) == 0
    assert batch.device == device


def test_a_batch_of_errors_only(device: Any) -> None:
    batch = decode([b"", b"x"], device=device)
    assert [error.kind for error in batch.errors] == ["empty", "not_an_image"]


def test_every_kind_of_source(device: Any, tmp_path: Path) -> None:
    png = OTHERS["png"]
    path = tmp_path / "a.png"
    path.write_bytes(png)
    sources = [png, bytearray(png), memoryview(png), np.frombuffer(png, np.uint8), str(path), path]
    for got in on_host(decode(sources, device=device)):
        np.testing.assert_array_equal(got, by_pillow(png))
    assert len(decode(path, device=device)) == len(decode(png, device=device)) == 1
    assert len(decode((source for source in sources), device=device)) == len(sources)


def test_files_that_cannot_be_read_are_unreadable(device: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(JPEGS["4:2:0"][:500])
    batch = decode([tmp_path / "missing.jpg", tmp_path, "a\0b", broken, JPEGS["gray"]], device=device)
    assert [error.kind for error in batch.errors[:4]] == ["unreadable", "unreadable", "unreadable", "truncated"]
    assert [error.source for error in batch.errors[:4]] == [
        str(tmp_path / "missing.jpg"),
        str(tmp_path),
        "a\0b",
        str(broken),
    ]
    assert str(broken) in str(batch.errors[3])
    assert batch.errors[4] is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"sources": 3},
        {"sources": None},
        {"sources": [3]},
        {"sources": [b"", np.zeros((4, 4, 3), np.uint8)]},
        {"sources": [], "color": "yuv"},
        {"sources": [], "limit_pixels": 0},
        {"sources": [], "limit_pixels": 1.5},
        {"sources": [], "threads": 0},
        {"sources": [], "threads": "2"},
        {"sources": [], "device": "tpu"},
    ],
)
def test_wrong_arguments_are_input_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        decode(**{"device": "cpu", **arguments})


# --- broken and hostile files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4:2:0", "progressive jpeg", "png", "webp", "bmp", "tiff"])
def test_cut_files_are_truncated(device: Any, name: str) -> None:
    data = (JPEGS | OTHERS)[name]
    cuts = [data[: len(data) * part // 16] for part in range(1, 16)] + [data[:-1]]
    batch = decode(cuts, device=device)
    assert {error.kind for error in batch.errors} <= {"truncated"}


def huge_jpeg() -> bytes:
    jpeg = bytearray(JPEGS["4:2:0"])
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 65500, 65500)
    return bytes(jpeg)


def huge_png() -> bytes:
    data = bytearray(OTHERS["png"])
    struct.pack_into(">II", data, 16, 100_000, 100_000)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("bomb", [huge_jpeg, huge_png])
def test_bombs_are_refused_before_memory_is_taken(device: Any, bomb: Callable[[], bytes]) -> None:
    memory.clear(device=device)
    held = memory.stats(device=device).held_bytes
    batch = decode([bomb(), JPEGS["gray"]], device=device)
    assert batch.errors[0].kind == "too_large"
    assert batch.errors[1] is None
    assert memory.stats(device=device).held_bytes - held < 1_000_000


def test_the_limit_is_the_callers(device: Any) -> None:
    pixels = 97 * 131
    assert decode(OTHERS["png"], device=device, limit_pixels=pixels).errors == (None,)
    assert decode(OTHERS["png"], device=device, limit_pixels=pixels - 1).errors[0].kind == "too_large"


def test_pillows_own_limit_does_not_get_in_the_way(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("png", "bmp", "gif", "cmyk jpeg"):
        assert decode(OTHERS[name], device=device).errors == (None,)
    for name in ("tiff", "webp"):  # these two readers check for themselves in some versions of Pillow
        (error,) = decode(OTHERS[name], device=device).errors
        assert error is None or error.kind == "too_large"


def test_pillows_warnings_stay_inside() -> None:
    """A TIFF whose tags draw a warning is decoded, and the filters of the process are as before."""
    data = bytearray(OTHERS["tiff"])
    entries = struct.unpack_from("<I", data, 4)[0] + 2
    for position in range(entries, entries + 12 * 20, 12):
        if struct.unpack_from("<H", data, position)[0] == 284:  # planar configuration: two values instead of one
            struct.pack_into("<HI", data, position + 2, 3, 2)
    before = list(warnings.filters)
    assert decode(bytes(data), device="cpu").errors == (None,)
    assert warnings.filters == before


def test_damage_inside_a_jpeg_is_found_on_the_host() -> None:
    jpeg = bytearray(JPEGS["4:4:4"])
    for position in range(len(jpeg) // 2, len(jpeg) // 2 + 60):
        jpeg[position] = 0xA5
    assert decode(bytes(jpeg), device="cpu").errors[0].kind == "corrupt"


EVERYTHING = list((JPEGS | OTHERS).values())


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(EVERYTHING)))
    for _ in range(draw(st.integers(1, 6))):
        position = draw(st.one_of(st.integers(0, 200), st.integers(0, len(data) - 1)))
        data[min(position, len(data) - 1)] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(damaged_files(), st.sampled_from(["rgb", "gray", "bgra"]))
def test_damaged_bytes_never_hurt_their_neighbours(data: bytes, color: Any) -> None:
    batch = decode([data, OTHERS["png"]], color=color, device="cpu", limit_pixels=2_000_000)
    assert batch.errors[1] is None
    if batch.errors[0] is None:
        assert tuple(batch.sizes[0]) == batch[0].shape[:2] == read_header(data).oriented_size


# --- memory and threads ----------------------------------------------------------------------------------------------


def test_errors_do_not_keep_the_memory(device: Any) -> None:
    places: list[Any] = ["cpu"] if device == "cpu" else ["cuda", "pinned"]
    before = [memory.stats(device=place).used_bytes for place in places]
    errors = decode([damaged_png(), b"", OTHERS["png"]], device=device).errors
    assert [memory.stats(device=place).used_bytes for place in places] == before
    assert [error and (error.__traceback__, error.__context__) for error in errors] == [(None, None)] * 2 + [None]


def held(place: Any) -> dict[str, int]:
    return {name: ring.held_bytes for name, ring in memory.stats(device=place).sources.items()}


def test_all_memory_comes_from_the_callers_source(device: Any) -> None:
    places: list[Any] = ["cpu"] if device == "cpu" else ["cuda", "pinned"]
    before = [held(place) for place in places]
    with memory.source("a film"):
        decode([JPEGS["4:2:0"], *OTHERS.values()], device=device, threads=3)
    for place, old in zip(places, before, strict=True):
        assert held(place)["a film"] > 0
        assert {**held(place), "a film": 0} == {**old, "a film": 0}


def test_the_second_batch_allocates_nothing(device: Any) -> None:
    files = [JPEGS["4:2:0"], OTHERS["png"], OTHERS["progressive jpeg"]] * 3
    decode(files, device=device)
    before = memory.stats(device=device).allocations
    for _ in range(5):
        decode(files, device=device)
    assert memory.stats(device=device).allocations == before


def test_batches_that_live_do_not_share_memory(device: Any) -> None:
    first, second = decode(OTHERS["png"], device=device), decode(OTHERS["bmp"], device=device)
    np.testing.assert_array_equal(on_host(first)[0], on_host(second)[0])
    assert first.table[0, 0] != second.table[0, 0]


@pytest.fixture
def no_limit(device: Any) -> Any:
    yield
    memory.set_limit(None, device=device)


@pytest.mark.usefixtures("no_limit")
def test_a_batch_without_memory_leaves_the_next_one_whole(device: Any) -> None:
    files = [JPEGS["4:2:0"], OTHERS["png"]] * 8
    expected = on_host(decode(files, device=device))
    gc.collect()
    memory.clear(device=device)
    stats = memory.stats(device=device)
    memory.set_limit(stats.held_bytes + 100_000, device=device)
    for _ in range(3):
        with pytest.raises(MemoryLimitError, match="Release batches earlier"):
            decode(files, device=device)
    assert memory.stats(device=device).used_bytes == stats.used_bytes
    assert decode(files[:1], device=device).ok.all()  # which fits
    memory.set_limit(None, device=device)
    for got, wanted in zip(on_host(decode(files, device=device)), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_thousands_of_small_files_keep_their_order(device: Any, tmp_path: Path) -> None:
    formats = ("PNG", "BMP", "GIF", "WEBP", "JPEG")
    sources: list[Any] = []
    for index in range(3000):
        pixel = Image.new("RGB", (1 + index % 7, 1 + index % 5), (index % 256, index // 256 * 20, 77))
        options = {"lossless": True} if formats[index % 5] == "WEBP" else {}
        data = encode(pixel, formats[index % 5], **options)
        if index % 10 == 0:
            path = tmp_path / f"{index}.jpg"  # of whatever format
            path.write_bytes(data)
            sources.append(path)
        else:
            sources.append(data)
    (tmp_path / "500.jpg").unlink()  # the folder changes meanwhile
    batch = decode(sources, device=device)
    assert [index for index, error in enumerate(batch.errors) if error] == [500]
    assert batch.errors[500].kind == "unreadable"
    for index, pixels in enumerate(batch.select(np.flatnonzero(batch.ok)).to("cpu")):
        index += index >= 500
        assert pixels.shape == (1 + index % 5, 1 + index % 7, 3)
        wanted = np.array((index % 256, index // 256 * 20, 77))
        assert np.abs(pixels[0, 0].astype(int) - wanted).max() <= (0 if formats[index % 5] != "JPEG" else 4)


def test_a_hundred_megapixels(device: Any) -> None:
    rows = np.random.default_rng(3).integers(0, 256, (10_000, 1250), np.uint8)
    rows[100:] = rows[:100].repeat(99, axis=0)[: rows.shape[0] - 100]
    image = Image.frombytes("1", (10_000, 10_000), rows.tobytes())
    (got,) = decode(encode(image, "PNG"), color="gray", device=device).to("cpu")
    np.testing.assert_array_equal(got[:, :, 0], np.asarray(image, np.uint8) * 255)
    error = decode(encode(image, "PNG"), limit_pixels=99_999_999, device=device).errors[0]
    assert error.kind == "too_large"


def test_decode_from_many_threads(device: Any) -> None:
    files = [JPEGS["4:2:0"], OTHERS["png"], OTHERS["progressive jpeg"], OTHERS["lzw tiff"], b"broken"]
    expected = on_host(decode(files[:4], device=device))
    failures: list[object] = []

    def work() -> None:
        for _ in range(10):
            batch = decode(files, device=device)
            equal = [np.array_equal(*pair) for pair in zip(on_host(batch.select(range(4))), expected, strict=True)]
            if not all(equal) or batch.errors[4] is None:
                failures.append((equal, batch.errors))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def refuse_to_import() -> None:
    raise AssertionError("nvImageCodec is imported for nothing")


def test_nvimgcodec_is_left_alone_without_images_for_it(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "DecoderHandle", refuse_to_import)
    assert gpu_decode.decode_into([], [], [], color="rgba") == []
    assert decode(list(OTHERS.values()), device=device).ok.all()
    assert decode(list(JPEGS.values()), color="bgra", device=device).ok.all()


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4"])
def test_slivers_are_not_for_the_gpu(width: int, subsampling: str) -> None:
    header = read_header(encode(photo(9, width), "JPEG", subsampling=subsampling))
    assert gpu_decode.takes(header, "rgb") is (width > 4)
    assert not gpu_decode.takes(header, "rgba")


def test_the_width_of_slivers_is_the_stored_one() -> None:
    header = read_header(with_orientation(photo(37, 3), "JPEG", 6))
    assert header.oriented_size == (3, 37)
    assert not gpu_decode.takes(header, "rgb")


def lane_of_the_host() -> Any:
    """The GPU room's own code over nvImageCodec's CPU decoder: same calls, memory of the host."""
    pytest.importorskip("nvidia.nvimgcodec")
    lane = object.__new__(gpu_decode._Lane)
    lane._decoder, lane._turns = DecoderHandle("CPU_ONLY", CPU_ONLY_DEVICE, threads=1), Turns()
    lane.stream = types.SimpleNamespace(ptr=0, record=lambda: None)
    return lane


@pytest.mark.parametrize("slice", [2, 64])
@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
def test_calls_to_nvimgcodec_without_a_gpu(color: Any, slice: int) -> None:
    lanes = [lane_of_the_host(), lane_of_the_host()]
    datas = [(JPEGS | OTHERS)[name] for name in ("4:2:0", "gray", "progressive jpeg", "1x1")]
    datas += [with_orientation(photo(), "JPEG", orientation) for orientation in range(1, 9)]
    headers = [read_header(data) for data in datas]
    channels = 1 if color == "gray" else 3
    outs = [np.zeros((*header.oriented_size, channels), np.uint8) for header in headers]
    datas[1] = b"not what the header says"
    jobs = [gpu_decode._Job(out.ctypes.data, *job, cost=1) for out, *job in zip(outs, datas, headers, strict=True)]
    queue = iter(gpu_decode._sliced(jobs, slice))
    with ThreadPoolExecutor(2) as threads:
        turns = list(threads.map(lambda lane: lane.decode(queue, color), lanes))
    assert sum(turn.cost for turn in turns if turn) == len(jobs)
    assert [lane.load for lane in lanes] == [0, 0]
    assert [job.done for job in jobs] == [index != 1 for index in range(len(datas))]
    batch = decode(datas, color=color, device="cpu")
    for index, out in enumerate(outs):
        if batch.errors[index] is None:
            np.testing.assert_array_equal(out, batch[index])


def decoders_of_the_host(engine: list[Any], cuda: Any) -> Any:
    decoders = object.__new__(gpu_decode._Decoders)
    decoders._engine, decoders._helpers, decoders._cuda_helper = engine, ThreadPoolExecutor(2), ThreadPoolExecutor(1)
    decoders.__dict__["_cuda"] = cuda
    return decoders


def test_a_batch_is_shared_out_and_comes_back_whole() -> None:
    """Slices among the engine's two decoders, and what the CUDA decoder gets beside them."""
    decoders = decoders_of_the_host([lane_of_the_host(), lane_of_the_host()], lane_of_the_host())
    data = JPEGS["4:2:0"]
    expected, header = decode(data, device="cpu")[0], read_header(data)
    outs = np.zeros((100, *expected.shape), np.uint8)
    jobs = [gpu_decode._Job(out.ctypes.data, data, header, 1) for out in outs]
    for for_cuda in (0, 10):
        outs[:] = 0
        by_engine, by_cuda = decoders._decode_side_by_side(jobs[for_cuda:], jobs[:for_cuda], "rgb")
        assert (outs == expected).all()
        assert 1 <= len(by_engine) <= 2  # one may have taken all before the other was there
        assert sum(turn.cost for turn in by_engine) == 100 - for_cuda
        assert [turn.cost for turn in by_cuda] == [for_cuda] * bool(for_cuda)


@pytest.mark.parametrize(
    ("load", "height", "width", "calls"), [(0, 375, 500, 8), (1, 375, 500, 1), (0, 1080, 1920, 8), (1, 1080, 1920, 8)]
)
def test_small_images_go_in_one_call_while_another_batch_is_under_way(
    load: int, height: int, width: int, calls: int
) -> None:
    parts: list[int] = []
    lanes = [types.SimpleNamespace(load=load, decode=lambda queue, color: parts.extend(map(len, queue))) for _ in "ab"]
    header = read_header(JPEGS["4:2:0"])._replace(height=height, width=width)
    jobs = [gpu_decode._Job(0, b"", header, gpu_decode.cost_of(header.pixels)) for _ in range(256)]
    decoders_of_the_host(lanes, None)._decode_side_by_side(jobs, [], "rgb")
    assert sum(parts) == 256
    assert len(parts) == calls


def test_help_that_has_not_begun_is_not_waited_for() -> None:
    """The threads that help may all be busy with other batches."""
    decoders = decoders_of_the_host([lane_of_the_host(), lane_of_the_host()], None)
    data, done = JPEGS["4:2:0"], threading.Event()
    busy = [decoders._helpers.submit(done.wait, 20) for _ in range(2)]
    header = read_header(data)
    outs = np.zeros((64, *header.oriented_size, 3), np.uint8)
    jobs = [gpu_decode._Job(out.ctypes.data, data, header, 1) for out in outs]
    by_engine, _ = decoders._decode_side_by_side(jobs, [], "rgb")
    assert not any(future.done() for future in busy)
    assert [turn.cost for turn in by_engine] == [64]
    assert all(job.done for job in jobs)
    done.set()


def test_an_error_comes_once_nobody_writes_to_the_callers_memory_any_more() -> None:
    written = []

    def fail(*_: Any) -> None:
        raise DeviceError("as a whole")

    def write_slowly(slices: Any, color: str) -> None:
        time.sleep(0.05)
        written.extend(slices)

    failing, slow = (types.SimpleNamespace(load=0, decode=call) for call in (fail, write_slowly))
    jobs = [gpu_decode._Job(0, b"", read_header(JPEGS["4:2:0"]), 1) for _ in range(64)]
    for engine, cuda in (([failing, slow], slow), ([slow, failing], slow), ([slow, slow], failing)):
        written.clear()
        with pytest.raises(DeviceError):
            decoders_of_the_host(engine, cuda)._decode_side_by_side(jobs, jobs, "rgb")
        assert len(written) in (2, 3)  # slices of the engine's and the CUDA decoder's one, if it is not at fault


@pytest.mark.parametrize(("upright", "turned"), [(0, 1), (1, 0), (63, 65), (64, 127), (128, 0), (700, 129)])
def test_slices_are_of_one_kind_and_never_small_ones(upright: int, turned: int) -> None:
    """With few large images in a call the engine's parts run idle."""
    headers = [read_header(with_orientation(photo(3, 5), "JPEG", orientation)) for orientation in (1, 6)]
    jobs = [gpu_decode._Job(0, b"", header, 1) for header in [headers[0]] * upright + [headers[1]] * turned]
    slices = gpu_decode._sliced(jobs, 64)
    assert sorted(map(id, jobs)) == sorted(id(job) for part in slices for job in part)
    for part in slices:
        assert len({job.is_turned for job in part}) == 1
        assert len(part) < 128
        assert len(part) >= min(64, turned if part[0].is_turned else upright)


@pytest.mark.parametrize("is_slow", [False, True])
def test_threads_read_files_that_have_to_be_waited_for(monkeypatch: pytest.MonkeyPatch, is_slow: bool) -> None:
    inside, most, by = 0, 0, set()
    lock = threading.Lock()

    def open_slowly(source: Any, *options: Any) -> DecodeError:
        nonlocal inside, most
        by.add(threading.get_ident())
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02 if is_slow else 0)
        with lock:
            inside -= 1
        return DecodeError(str(source), kind="unreadable")

    room = importlib.import_module("nbvision.codecs.decode")  # its package has a function of that name
    monkeypatch.setattr(room, "read_file", open_slowly)
    monkeypatch.setattr(room, "_WAIT_S", 0.01 if is_slow else 10.0)
    batch = decode([f"{index}.jpg" for index in range(12)], device="cpu", threads=4)
    assert [str(error) for error in batch.errors] == [f"{index}.jpg" for index in range(12)]
    assert (most > 1) is is_slow
    assert by == {threading.get_ident()} or is_slow
