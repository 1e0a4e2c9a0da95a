"""encode(): files that Pillow and OpenCV read as they should, from both devices."""

from __future__ import annotations

import io
import types
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, JpegImagePlugin, features

import nbvision as nbv
from nbvision.codecs import encode as encode_function
from nbvision.codecs import gpu_encode
from nbvision.codecs._threads import Turns
from nbvision.errors import InputError
from nbvision.image import CHANNELS
from nbvision.runtime.device import array_module

encode_module: Any = __import__("sys").modules[encode_function.__module__]

COLORS = ["rgb", "bgr", "rgba", "bgra", "gray"]
SIZES = [(1, 1), (1, 17), (16, 1), (31, 33), (75, 101)]
LOSSLESS = [("png", {}), ("png", {"optimize": True}), ("webp", {"lossless": True})]


def smooth(height: int, width: int, color: str = "rgb", seed: int = 0) -> np.ndarray:
    """What a photograph is to an encoder; alpha has all values from 0 to 255."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 24 + 2, width // 24 + 2, CHANNELS[color]), np.uint8)
    planes = [
        np.asarray(Image.fromarray(coarse[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC))
        for channel in range(coarse.shape[2])
    ]
    grain = rng.integers(-3, 4, (height, width, 1))
    return (np.stack(planes, axis=2).astype(int) + grain).clip(0, 255).astype(np.uint8)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def on(device: str, pixels: np.ndarray) -> Any:
    return array_module(device).asarray(pixels)  # type: ignore[arg-type]


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def red_first(pixels: np.ndarray, color: str) -> np.ndarray:
    """As Pillow has it: (H, W) if gray."""
    if color == "gray":
        return pixels[:, :, 0]
    return pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]] if color.startswith("bgr") else pixels


def by_pillow(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def psnr(got: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((got.astype(float) - expected) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(params=["imagecodecs", "Pillow alone"])
def png_writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Pillow alone":
        monkeypatch.setattr(encode_module, "imagecodecs_module", lambda: None)
    else:
        pytest.importorskip("imagecodecs")


# --- lossless --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("png_writer")
@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(("format", "options"), LOSSLESS, ids=["png", "png optimised", "webp"])
def test_lossless_formats_keep_every_pixel(format: str, options: Any, color: str, device: str) -> None:
    for size in SIZES:
        for pixels in (smooth(*size, color), noise(*size, CHANNELS[color])):
            data = nbv.encode(on(device, pixels), format, color=color, **options)
            expected = red_first(pixels, color)
            image = opened(data)
            assert image.format == format.upper()
            if format == "png":
                assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[CHANNELS[color]]
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[CHANNELS[color]]
            np.testing.assert_array_equal(np.asarray(image if image.mode == mode else image.convert(mode)), expected)


@pytest.mark.parametrize(("format", "options"), LOSSLESS, ids=["png", "png optimised", "webp"])
def test_opencv_reads_what_was_bgr(format: str, options: Any) -> None:
    for color, flag in (("bgr", cv2.IMREAD_COLOR), ("bgra", cv2.IMREAD_UNCHANGED)):
        pixels = noise(19, 23, CHANNELS[color])
        data = nbv.encode(pixels, format, color=color, **options)
        np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), flag), pixels)


def test_lossless_webp_keeps_colours_under_full_transparency() -> None:
    pixels = noise(40, 40, 4)
    pixels[:, :, 3] = 0
    np.testing.assert_array_equal(np.asarray(opened(nbv.encode(pixels, "webp", lossless=True)).convert("RGBA")), pixels)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    color=st.sampled_from(COLORS),
    case=st.sampled_from(LOSSLESS),
    seed=st.integers(0, 99),
)
def test_lossless_sizes(height: int, width: int, color: str, case: Any, seed: int) -> None:
    format, options = case
    pixels = noise(height, width, CHANNELS[color], seed)
    (back,) = nbv.decode([nbv.encode(pixels, format, color=color, **options)], color=color, device="cpu")
    np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize("format", ["png", "avif", "jpeg"])
def test_optimised_is_smaller(format: Any) -> None:
    pixels = np.tile(smooth(40, 40), (3, 4, 1)) if format == "png" else smooth(120, 160)  # long matches are to be found
    assert len(nbv.encode(pixels, format, optimize=True)) < len(nbv.encode(pixels, format))


# --- JPEG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("subsampling", ["420", "422", "444", "gray"])
@pytest.mark.parametrize("quality", [1, 50, 85, 100])
def test_plain_jpeg_is_simplejpegs(color: str, subsampling: str, quality: int, device: str) -> None:
    for size in SIZES:
        pixels = smooth(*size, color)
        data = nbv.encode(on(device, pixels), color=color, quality=quality, subsampling=subsampling)
        gray = "gray" in (color, subsampling)
        expected = simplejpeg.encode_jpeg(pixels, quality, color.upper(), "Gray" if gray else subsampling)
        assert data == expected


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize(
    "options", [{"optimize": True}, {"progressive": True}, {"optimize": True, "progressive": True}]
)
def test_optimised_and_progressive_jpegs_are_pillows(color: str, options: Any, device: str) -> None:
    for size in SIZES:
        pixels = smooth(*size, color)
        data = nbv.encode(on(device, pixels), color=color, quality=70, subsampling="422", **options)
        sampling = {} if color == "gray" else {"subsampling": "4:2:2"}
        assert data == by_pillow(red_first(pixels, color), "JPEG", quality=70, **sampling, **options)
        assert bool(opened(data).info.get("progressive")) is bool(options.get("progressive"))


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize(("subsampling", "in_header"), [("444", 0), ("422", 1), ("420", 2)])
def test_subsampling_is_in_the_file(color: str, options: Any, subsampling: str, in_header: int) -> None:
    image = opened(nbv.encode(smooth(33, 47), color=color, subsampling=subsampling, **options))
    assert JpegImagePlugin.get_sampling(image) == in_header
    assert image.mode == "RGB"
    gray = opened(nbv.encode(smooth(33, 47), color=color, subsampling="gray", **options))
    assert gray.mode == "L"


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
def test_gray_subsampling_keeps_the_luma(options: Any) -> None:
    pixels = smooth(60, 80, "bgr")
    got = opened(nbv.encode(pixels, color="bgr", subsampling="gray", quality=95, **options))
    assert psnr(np.asarray(got), np.asarray(Image.fromarray(pixels[:, :, ::-1]).convert("L"))) > 42


@pytest.mark.parametrize("quality", [50, 85, 94, 100])
def test_optimising_a_jpeg_saves_bytes_at_little_difference(quality: int) -> None:
    """Below 96 simplejpeg transforms with libjpeg's quick way, Pillow with the exact one."""
    pixels = smooth(90, 120)
    plain, small = (nbv.encode(pixels, quality=quality, optimize=optimize) for optimize in (False, True))
    assert len(small) < len(plain)
    one, other = np.asarray(opened(plain)), np.asarray(opened(small))
    assert psnr(other, one) > (44 if quality < 96 else np.finfo(float).max)
    assert psnr(one, pixels) > psnr(other, pixels) - 0.6


@pytest.mark.parametrize("options", [{"optimize": True}, {"progressive": True}])
@pytest.mark.parametrize("quality", [94, 100])
def test_detail_at_high_quality_does_not_overflow_pillows_buffer(options: Any, quality: int, capfd: Any) -> None:
    before = ImageFile.MAXBLOCK
    black_or_white = np.where(noise(500, 600) < 128, 0, 255).astype(np.uint8)
    batch = [noise(500, 600), black_or_white, noise(3, 5), smooth(40, 50)]
    files = nbv.encode(batch, quality=quality, subsampling="444", threads=4, **options)
    for pixels, data in zip(batch, files, strict=True):
        plain = by_pillow(pixels, "JPEG", quality=quality, subsampling="4:4:4")
        np.testing.assert_array_equal(np.asarray(opened(data)), np.asarray(opened(plain)))
    assert before == ImageFile.MAXBLOCK
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_has_at_most_65500_pixels_a_side(options: Any, device: str, capfd: Any) -> None:
    assert opened(nbv.encode(on(device, np.zeros((1, 65_500), np.uint8)), **options)).width == 65_500
    for shape in ((1, 65_501), (1, 65_536), (65_536, 1)):
        with pytest.raises(InputError, match=f"{shape[0]} x {shape[1]} pixels; jpeg takes at most 65500 a side"):
            nbv.encode(on(device, np.zeros(shape, np.uint8)), **options)
    assert capfd.readouterr() == ("", "")


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    color=st.sampled_from(["rgb", "bgr", "gray"]),
    subsampling=st.sampled_from(["420", "422", "444"]),
    progressive=st.booleans(),
)
def test_jpeg_sizes(height: int, width: int, color: str, subsampling: str, progressive: bool) -> None:
    pixels = smooth(height, width, color)
    data = nbv.encode(pixels, color=color, quality=95, subsampling=subsampling, progressive=progressive)
    assert np.asarray(opened(data)).shape == red_first(pixels, color).shape
    assert opened(data).mode == ("L" if color == "gray" else "RGB")


# --- quality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "least"),
    [
        ("jpeg", {"quality": 95, "subsampling": "444"}, 38),
        ("jpeg", {}, 30),
        ("jpeg", {"progressive": True}, 30),
        ("webp", {"quality": 95}, 34),
        ("webp", {}, 30),
        ("avif", {"quality": 95}, 34),
        ("avif", {}, 30),
    ],
    ids=str,
)
def test_lossy_formats_stay_close(format: str, options: Any, least: float, device: str) -> None:
    for color in ["rgb", "bgr", "gray"] + (["rgba", "bgra"] if format != "jpeg" else []):
        pixels = smooth(75, 101, color)
        if pixels.shape[2] == 4:
            pixels[:, :, 3] |= 128  # what nobody sees may be anything
        image = opened(nbv.encode(on(device, pixels), format, color=color, **options))
        expected = red_first(pixels, color)
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[CHANNELS[color]]
        assert psnr(np.asarray(image.convert(mode)), expected) > least, color


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(
    ("format", "options", "pillows"),
    [
        ("webp", {}, {}),
        ("avif", {}, {"speed": 9, "max_threads": 1}),
        ("avif", {"optimize": True}, {"speed": 6, "max_threads": 1}),
    ],
)
def test_webp_and_avif_are_pillows(format: str, options: Any, pillows: Any, color: str) -> None:
    pixels = smooth(31, 33, color)
    expected = by_pillow(red_first(pixels, color), format.upper(), quality=60, **pillows)
    assert nbv.encode(pixels, format, color=color, quality=60, **options) == expected


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_better_quality_is_larger_and_closer(format: str) -> None:
    pixels = smooth(75, 101)
    files = [nbv.encode(pixels, format, quality=quality) for quality in (10, 50, 90)]
    assert len(files[0]) < len(files[1]) < len(files[2])
    closeness = [psnr(np.asarray(opened(data).convert("RGB")), pixels) for data in files]
    assert closeness == sorted(closeness)


# --- what comes in goes out ------------------------------------------------------------------------------------------


def test_form_of_the_result(device: str) -> None:
    xp = array_module(device)  # type: ignore[arg-type]
    image = on(device, noise(7, 9))
    assert isinstance(nbv.encode(image, "png"), bytes)
    assert isinstance(nbv.encode(image[:, :, 0], "png"), bytes)
    assert isinstance(nbv.encode(image[:, :, :1], "png"), bytes)
    assert [type(data) for data in nbv.encode([image], "png")] == [bytes]
    assert [type(data) for data in nbv.encode(xp.stack([image, image]), "png")] == [bytes] * 2
    assert [type(data) for data in nbv.encode((image for _ in range(3)), "png")] == [bytes] * 3
    grays = nbv.encode(on(device, noise(3, 7, 9)), "png", color="gray")  # three of (7, 9)
    np.testing.assert_array_equal([np.asarray(opened(data)) for data in grays], noise(3, 7, 9))
    assert nbv.encode([], "png") == []
    assert nbv.encode(xp.empty((0, 4, 5, 3), np.uint8)) == []
    assert nbv.encode(nbv.ImageBatch.allocate([], device=device)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "avif"])
def test_a_missing_image_of_a_batch_is_none(format: str, device: str) -> None:
    pictures = [noise(20, 30, seed=1), noise(31, 17, seed=2)]
    files = [by_pillow(pictures[0], "PNG"), b"no image", by_pillow(pictures[1], "PNG"), b""]
    batch = nbv.decode(files, device=device, color="bgr")  # type: ignore[arg-type]
    got = nbv.encode(batch, format)
    assert [data is None for data in got] == [False, True, False, True]
    assert [got[0], got[2]] == nbv.encode(pictures, format)
    assert nbv.encode(batch.select([1, 3]), format) == [None, None]


@pytest.mark.parametrize(("format", "options"), [("jpeg", {}), ("jpeg", {"optimize": True}), *LOSSLESS, ("avif", {})])
def test_views_are_what_they_show(format: str, options: Any, device: str) -> None:
    frame = on(device, noise(41, 62))
    views = [frame[3:30, 5:40], frame[::2], frame[:, ::3], frame[::-1], frame[:, ::-1], frame[:, :, ::-1]]
    views += [frame.transpose(1, 0, 2), frame[5:6, :, :], frame[:, 7:8], frame[:, :, 1], frame[:, :, 1:2][2:, 3:]]
    views += [on(device, noise(41, 62, 1))[2:30, 3:9]]  # gray lines at a pitch
    for view in views:
        copied = np.ascontiguousarray(view if device == "cpu" else view.get())
        assert nbv.encode(view, format, **options) == nbv.encode(copied, format, **options)


@pytest.mark.parametrize(("format", "options"), [("jpeg", {}), ("jpeg", {"progressive": True}), *LOSSLESS])
def test_read_only_images_are_read_only(format: str, options: Any) -> None:
    pixels = noise(20, 30)
    expected = nbv.encode(pixels, format, **options)
    pixels.flags.writeable = False
    assert nbv.encode(pixels, format, **options) == expected
    np.testing.assert_array_equal(pixels, noise(20, 30))


@pytest.mark.parametrize(("format", "options"), [("jpeg", {}), ("jpeg", {"progressive": True}), *LOSSLESS])
def test_threads_change_nothing(format: str, options: Any, device: str) -> None:
    batch = nbv.as_batch([smooth(20 + index, 70 - index, seed=index) for index in range(24)], device=device)  # type: ignore[arg-type]
    expected = [nbv.encode(image, format, **options) for image in batch.to("cpu")]
    for threads in (1, 2, 7, None):
        assert nbv.encode(batch, format, threads=threads, **options) == expected


@pytest.mark.needs_cuda
def test_work_queued_before_is_waited_for() -> None:
    import cupy

    for stream in (cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream.null):
        with stream:
            image = cupy.zeros((2000, 3000, 3), np.uint8)
            for _ in range(50):
                image += 1
            batch = nbv.as_batch([image, image[100:900, 50:70]])
        large, small = nbv.encode(batch, "png")
        assert np.unique(np.asarray(opened(large))).tolist() == [50]
        assert np.asarray(opened(small)).shape == (800, 20, 3)
        assert np.unique(np.asarray(opened(small))).tolist() == [50]


# --- on the GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.needs_cuda
@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}], ids=str)
@pytest.mark.parametrize(("subsampling", "in_header"), [("444", 0), ("422", 1), ("420", 2)])
def test_the_gpus_jpegs_are_as_near_as_the_hosts(color: str, options: Any, subsampling: str, in_header: int) -> None:
    for quality in (30, 85, 95):
        pixels = [smooth(*size, color, seed=index) for index, size in enumerate([(240, 320), (75, 101), (333, 16)])]
        how = {"color": color, "quality": quality, "subsampling": subsampling, **options}
        files = nbv.encode([on("cuda", image) for image in pixels], device="cuda", **how)
        for image, file, of_host in zip(pixels, files, nbv.encode(pixels, **how), strict=True):
            shown, by_host = opened(file), opened(of_host)
            assert (shown.mode, shown.size) == (by_host.mode, by_host.size)
            assert bool(shown.info.get("progressive")) is ("progressive" in options)
            if color != "gray":
                assert JpegImagePlugin.get_sampling(shown) == in_header
            expected = red_first(image, color)
            assert psnr(np.asarray(shown), expected) > psnr(np.asarray(by_host), expected) - 0.5
            # Of a progressive file, nvJPEG's tables are not those of the image, and take 1.5 kB.
            larger, tables_bytes = (1.7, 1900) if "progressive" in options else (1.1, 400)
            assert len(file) < larger * len(of_host) + tables_bytes


class HostPixels:
    def __init__(self, address: int, shape: tuple[int, int, int]) -> None:
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": (address, False), "version": 3}


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
def test_calls_to_nvimgcodec_without_a_gpu(monkeypatch: pytest.MonkeyPatch, color: Any) -> None:
    """The GPU room's own code over nvImageCodec's CPU encoder: same calls, host arrays."""
    codec = pytest.importorskip("nvidia.nvimgcodec")
    encoder = object.__new__(gpu_encode._Encoder)
    encoder._encoder = codec.Encoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, backends=[codec.Backend(codec.BackendKind.CPU_ONLY)]
    )
    encoder._turns = Turns()
    encoder._stream = types.SimpleNamespace(ptr=0, wait_event=lambda event: None)
    cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(record=lambda: None))
    host = types.SimpleNamespace(ascontiguousarray=lambda array: HostArray(np.ascontiguousarray(array)), cuda=cuda)
    monkeypatch.setattr(gpu_encode, "array_module", lambda device: host)
    monkeypatch.setattr(gpu_encode, "Pixels", HostPixels)
    images = [smooth(*size, color) for size in SIZES]
    files = encoder.encode(images, color, gpu_encode._params(95, "444", False, True))
    for image, file in zip(images, files, strict=True):
        shown = opened(file)
        assert shown.info["progressive"]
        assert psnr(np.asarray(shown), red_first(image, color)) > 30


class HostArray:
    """A NumPy array in CuPy's words."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)


@pytest.mark.needs_cuda
def test_any_size_is_encoded_with_the_gpu() -> None:
    """The smallest, which its encoder may refuse, too."""
    pixels = [smooth(height, width) for height in (1, 2, 7, 8, 16, 17) for width in (1, 3, 8, 15, 40, 1000)]
    files = nbv.encode([on("cuda", image) for image in pixels], device="cuda", quality=95, subsampling="444")
    for image, file in zip(pixels, files, strict=True):
        assert psnr(np.asarray(opened(file)), image) > 30


@pytest.mark.needs_cuda
def test_the_gpu_encodes_what_is_queued_views_and_what_is_there() -> None:
    import cupy

    for stream in (cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream.null):
        with stream:
            image = cupy.zeros((2000, 3000, 3), np.uint8)
            for _ in range(50):
                image += 1
            large, small = nbv.encode(nbv.as_batch([image, image[100:900, 50:70]]), device="cuda")
            image += 100  # after the files were made
        assert np.unique(np.asarray(opened(large))).tolist() == [50]
        assert np.asarray(opened(small)).shape == (800, 20, 3)
        assert np.unique(np.asarray(opened(small))).tolist() == [50]
    batch = nbv.decode([by_pillow(noise(20, 30), "PNG"), b"none", by_pillow(noise(9, 9), "PNG")], device="cuda")
    first, missing, last = nbv.encode(batch, device="cuda")
    assert missing is None
    assert (opened(first).size, opened(last).size) == ((30, 20), (9, 9))
    assert nbv.encode([], device="cuda") == []


@pytest.mark.needs_cuda
def test_threads_share_the_gpus_encoder() -> None:
    from concurrent.futures import ThreadPoolExecutor

    images = [[on("cuda", smooth(90 + 7 * index, 200, seed=index))] * 5 for index in range(8)]
    alone = [nbv.encode(batch, device="cuda") for batch in images]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda batch: nbv.encode(batch, device="cuda"), images * 4)) == alone * 4


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        ("gif", {}, "format is 'gif'; expected one of"),
        (None, {}, "format is None"),
        ("jpeg", {"quality": 0}, "quality is 0; expected an integer from 1 to 100 for jpeg"),
        ("jpeg", {"quality": 101}, "quality is 101"),
        ("jpeg", {"quality": 85.5}, "quality is 85.5"),
        ("jpeg", {"quality": "high"}, "quality is 'high'"),
        ("webp", {"quality": -1}, "quality is -1; expected an integer from 0 to 100 for webp"),
        ("avif", {"quality": 101}, "expected an integer from 0 to 100 for avif"),
        ("png", {"quality": 90}, "quality is 90, but png has none"),
        ("webp", {"quality": 90, "lossless": True}, "lossless webp has none"),
        ("jpeg", {"subsampling": "411"}, "subsampling is '411'; expected one of"),
        ("jpeg", {"subsampling": 420}, "subsampling is 420"),
        ("webp", {"subsampling": "444"}, "subsampling is an option of jpeg, not of webp; leave it out"),
        ("webp", {"optimize": True}, "optimize is an option of jpeg, png and avif, not of webp"),
        ("png", {"progressive": True}, "progressive is an option of jpeg, not of png"),
        ("jpeg", {"lossless": True}, "lossless is an option of webp and png, not of jpeg"),
        ("jpeg", {"threads": 0}, "threads is 0"),
        ("jpeg", {"threads": 2.0}, "threads is 2.0"),
        ("jpeg", {"color": "hsv"}, "color is 'hsv'"),
    ],
)
def test_options_that_are_none(format: Any, options: Any, said: str, device: str) -> None:
    with pytest.raises(InputError, match=said):
        nbv.encode(on(device, noise(8, 8)), format, **options)


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ("cuda", {"format": "png", "device": "cuda"}, "'cuda' encodes jpeg, not png"),
        ("cpu", {"device": "cuda"}, "these are on the host"),
        ("cuda", {"device": "cuda", "subsampling": "gray"}, r"cvt_color\(images, 'gray'\)"),
        ("cuda", {"device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_what_the_gpus_encoder_does_not_do(images: str, options: Any, said: str, device: str) -> None:
    if images == device or images == "cpu":
        with pytest.raises(InputError, match=said):
            nbv.encode(on(images, smooth(20, 30)), **options)


@pytest.mark.parametrize("color", ["rgba", "bgra"])
def test_jpeg_holds_no_alpha(color: str, device: str) -> None:
    pixels = on(device, noise(8, 9, 4))
    with pytest.raises(
        InputError, match=rf"the images are {color}, and JPEG holds no alpha.*cvt_color\(images, 'rgb'\)"
    ):
        nbv.encode(pixels, color=color)
    opaque = nbv.cvt_color(pixels, "rgb", color=color)  # the way out that it names
    assert opened(nbv.encode(opaque)).size == (9, 8)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (3, "images are a int"),
        (np.zeros((4, 5, 2), np.uint8), r"images have shape \(4, 5, 2\)"),
        (np.zeros(7, np.uint8), r"images have shape \(7,\)"),
        ([np.zeros((1, 4, 5, 3), np.uint8)], r"image 0 has shape \(1, 4, 5, 3\)"),
        (["a.jpg"], r"image 0 has shape \(\)"),
        (np.zeros((4, 5, 3), np.uint16), "uint16"),
        (np.zeros((4, 5, 3), np.float32), "the images are HWC float32; expected uint8"),
        (np.zeros((0, 5, 3), np.uint8), "an image has at least one pixel"),
        ([np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)], "image 1 has shape"),
    ],
)
def test_images_that_are_none(images: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        nbv.encode(images, "png")


def test_planes_and_nv12_are_refused(device: str) -> None:
    planes = nbv.as_batch(on(device, noise(3, 8, 8)), layout="CHW")
    nv12 = nbv.as_batch(on(device, noise(12, 8, 1)[:, :, 0]), color="nv12")
    for batch in (planes, nv12):
        with pytest.raises(InputError, match="expected uint8 channels side by side"):
            nbv.encode(batch)


@pytest.mark.parametrize(("format", "longest"), [("webp", 16_383), ("png", 1_000_000), ("avif", 65_536)])
def test_sides_beyond_the_format(format: str, longest: int, capfd: Any) -> None:
    good = np.zeros((1, 8), np.uint8)
    if format != "avif":  # which takes seconds
        assert opened(nbv.encode(np.zeros((1, longest), np.uint8), format)).width == longest
    with pytest.raises(
        InputError, match=rf"image 1 has 1 x {longest + 1} pixels; {format} takes at most {longest} a side"
    ):
        nbv.encode([good, np.zeros((1, longest + 1), np.uint8)], format)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("format", ["webp", "avif"])
def test_a_pillow_without_the_format(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(InputError, match=f"this Pillow was built without {format}; install one"):
        nbv.encode(noise(4, 4), format)


def test_an_encoder_that_fails_says_at_which_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Image.Image, *_: Any, **__: Any) -> None:
        if self.width == 6:
            raise OSError("no room")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(InputError, match="image 1: the webp encoder says: no room") as caught:
        nbv.encode([noise(4, 5), noise(4, 6)], "webp")
    assert isinstance(caught.value.__cause__, OSError)
