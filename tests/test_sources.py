"""Planes and floats as sources of Preprocess, and what bfloat16 and four channels store."""

from __future__ import annotations

import cv2
import ml_dtypes
import numpy as np
import PIL.Image
import pytest
from reference import on, random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import ImageBatch, as_batch
from nbvision.ops import adjust
from nbvision.ops.preprocess import Preprocess

SIZES = [(1, 1), (1, 9), (7, 1), (2, 3), (37, 53), (333, 517)]
SAMPLERS = [("nearest", "cv2"), ("linear", "cv2"), ("linear", "fast")]
BOXES = np.array([[0, 0, 1, 1], [1.5, 0, 9, 1], [0, 2, 1, 6], [1, 0, 3, 2], [3, 5, 50, 37], [100, 9, 517, 300]])


@pytest.fixture
def without_ipp():
    before = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    yield
    cv2.ipp.setUseIPP(before)


def planes(image):
    return np.ascontiguousarray(np.moveaxis(image, -1, 0))


@pytest.mark.parametrize(("interpolation", "parity"), SAMPLERS)
@pytest.mark.parametrize("color", ["rgb", "bgr", "rgba", "gray"])
def test_planes_give_the_bits_of_interleaved_channels(device, rng, color, interpolation, parity):
    """Whole images and boxes, ragged: where the channels lie changes no value."""
    channels = {"gray": 1, "rgba": 4}.get(color, 3)
    images = [random_image(rng, *size, channels) for size in SIZES]
    pre = Preprocess((40, 61), interpolation=interpolation, parity=parity, fill=(1, 2, 3), scale=1 / 255)
    interleaved = ImageBatch.from_arrays(images, color=color, device=device)
    planar = ImageBatch.from_arrays([planes(image) for image in images], color=color, layout="CHW", device=device)
    for options in ({}, {"boxes": BOXES, "box_images": np.arange(6)}):
        wanted, _ = pre(interleaved, **options)
        found, _ = pre(planar, **options)
        np.testing.assert_array_equal(to_host(found), to_host(wanted))


def test_planes_at_any_address_and_pitch(device, rng):
    """Views that start at any byte and whose lines lie apart: whatever words the kernel loads, the values are right."""
    whole = on(device, rng.integers(0, 256, (3, 24, 61), dtype=np.uint8))
    pre = Preprocess((9, 11), fit="stretch", dtype="uint8")
    for x in range(9):
        for width in (1, 2, 5, 30):
            view = whole[:, :, x : x + width]
            found, _ = pre(as_batch(view, layout="CHW", device=device))
            wanted = cv2.resize(np.ascontiguousarray(to_host(view).transpose(1, 2, 0)), (11, 9))
            np.testing.assert_array_equal(to_host(found)[0], planes(wanted))


def test_planes_are_shared_when_they_lie_one_below_the_other(rng):
    dense = planes(random_image(rng, 8, 10))
    assert np.shares_memory(ImageBatch.from_arrays([dense], layout="CHW")[0], dense)
    lines_apart = dense[:, :, 2:7]
    assert np.shares_memory(ImageBatch.from_arrays([lines_apart], layout="CHW")[0], dense)
    for other in (dense[:, 1:5], dense[::-1], dense[:, :, ::2], planes(random_image(rng, 8, 10)).transpose(0, 2, 1)):
        batch = ImageBatch.from_arrays([other], layout="CHW")
        assert not np.shares_memory(batch[0], other)
        np.testing.assert_array_equal(batch[0], other)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.usefixtures("without_ipp")
def test_floats_are_resized_as_opencv_resizes_them(device, rng, dtype, channels):
    """Values of any range, up and down: within float32's rounding of OpenCV's own float resize, without IPP's."""
    color = {1: "gray", 3: "rgb", 4: "rgba"}[channels]
    images = [rng.normal(0, 3, (*size, channels)).astype(dtype) for size in SIZES]
    pre = Preprocess((40, 61), fit="stretch", layout="NHWC")
    found, _ = pre(ImageBatch.from_arrays(images, color=color, device=device))
    for image, canvas in zip(images, to_host(found), strict=True):
        wanted = cv2.resize(image.astype(np.float32), (61, 40)).reshape(40, 61, channels)
        np.testing.assert_allclose(canvas, np.broadcast_to(wanted[..., :3], (40, 61, 3)), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_nearest_copies_floats(device, rng, dtype):
    """Also the smallest half, infinity and NaN."""
    image = rng.normal(0, 3, (31, 17, 3)).astype(dtype)
    image[0, :5, 0] = [np.inf, -np.inf, np.nan, np.finfo(np.float16).smallest_subnormal, -0.0]
    pre = Preprocess((40, 61), fit="stretch", interpolation="nearest", layout="NHWC", color="bgr")
    found, _ = pre(as_batch(image, device=device))
    wanted = cv2.resize(image.astype(np.float32), (61, 40), interpolation=cv2.INTER_NEAREST)[..., ::-1]
    np.testing.assert_array_equal(to_host(found)[0], wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fill_scale_and_boxes_of_floats(device, rng, dtype):
    """What is outside is fill in the image's own range, normalised with it; views and boxes of one source."""
    image = rng.random((30, 45, 3)).astype(dtype)
    pre = Preprocess((32, 32), fill=0.5, mean=0.5, std=0.25, parity="fast")
    found, geometry = pre(as_batch(on(device, image)[::2, 5:], device=device), boxes=np.array([[2, 3, 22, 13]]))
    canvas = cv2.resize(np.ascontiguousarray(image[::2, 5:].astype(np.float32)[3:13, 2:22]), (32, 16))
    np.testing.assert_allclose(to_host(found)[0, :, 8:24], planes((canvas - 0.5) / 0.25), atol=1e-5)
    assert (to_host(found)[0, :, [*range(8), *range(24, 32)]] == 0).all()
    np.testing.assert_allclose(
        to_host(geometry.to_source(on(device, np.array([[0, 8, 32, 24]], np.float32)))), [[2, 3, 22, 13]]
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC4"])
def test_bfloat16_is_rounded_as_ml_dtypes_rounds_it(device, rng, layout):
    images = [random_image(rng, *size) for size in SIZES]
    options = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "layout": layout}
    batch = ImageBatch.from_arrays(images, device=device)
    found, _ = Preprocess((33, 47), dtype="bfloat16", **options)(batch)
    wanted, _ = Preprocess((33, 47), **options)(batch)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        to_host(found).view(np.uint16), to_host(wanted).astype(ml_dtypes.bfloat16).view(np.uint16)
    )


def test_bfloat16_of_every_kind_of_number():
    """NumPy's own cast through ml_dtypes: halves, overflow, the smallest numbers, infinities, NaN."""
    from nbvision_kernels.pixel import bfloat_bits, half_value

    bits = np.concatenate([np.arange(0, 2**32, 65521, dtype=np.uint64), [0x3F808000, 0x3F818000, 0x7F7FFFFF, 1]])
    values = bits.astype(np.uint32).view(np.float32)
    found = np.array([bfloat_bits(value) for value in values], np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(found[finite], wanted[finite])
    assert set(found[~finite].tolist()) == {0x7FFF}
    halves = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(
        np.array([half_value(half) for half in halves], np.float32), halves.view(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("width", [8, 9, 13])
def test_a_fourth_channel_of_zeros(device, rng, dtype, width):
    images = [random_image(rng, *size) for size in SIZES]
    options = {"dtype": dtype, "fill": 50, "mean": 20, "std": 3}
    batch = ImageBatch.from_arrays(images, device=device)
    found, _ = Preprocess((10, width), layout="NHWC4", **options)(batch)
    wanted, _ = Preprocess((10, width), layout="NHWC", **options)(batch)
    assert found.shape == (len(SIZES), 10, width, 4)
    np.testing.assert_array_equal(to_host(found)[..., :3], to_host(wanted))
    assert not to_host(found)[..., 3].any()


@pytest.mark.parametrize("color", ["rgb", "bgr", "rgba", "bgra"])
def test_gray_is_opencvs_gray(device, rng, color):
    """Resized by OpenCV, then made gray by it: the same bits, whatever the order of the source's channels."""
    images = [random_image(rng, *size, len(color)) for size in SIZES]
    pre = Preprocess((40, 61), fit="stretch", color="gray", dtype="uint8", layout="NHWC")
    found, _ = pre(ImageBatch.from_arrays(images, color=color, device=device))
    assert found.shape == (len(SIZES), 40, 61, 1)
    code = cv2.COLOR_RGB2GRAY if color.startswith("rgb") else cv2.COLOR_BGR2GRAY
    for image, canvas in zip(images, to_host(found), strict=True):
        resized = cv2.resize(image[..., :3], (61, 40))
        np.testing.assert_array_equal(canvas[..., 0], cv2.cvtColor(resized, code))


def test_every_colour_has_opencvs_gray(device):
    """All 2**24 of them, and Pillow's gray by its own formula."""
    steps = np.arange(256, dtype=np.uint8)
    for red in range(0, 256, 16):
        image = np.stack(np.meshgrid(steps[red : red + 16], steps, steps, indexing="ij"), -1).reshape(4096, 256, 3)
        options = {"fit": "stretch", "color": "gray", "dtype": "uint8"}
        found, _ = Preprocess((4096, 256), **options)(on(device, image))
        np.testing.assert_array_equal(to_host(found)[0, 0], cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        found, _ = Preprocess((4096, 256), parity="pil", **options)(on(device, image))
        np.testing.assert_array_equal(to_host(found)[0, 0], np.asarray(PIL.Image.fromarray(image).convert("L")))


def test_gray_of_gray_of_floats_and_after_pixel_functions(device, rng):
    image = random_image(rng, 20, 30)
    options = {"fit": "stretch", "color": "gray", "scale": 2, "mean": 1}
    gray = np.ascontiguousarray(image[..., 0])
    found, _ = Preprocess((20, 30), **options)(as_batch(on(device, gray), color="gray"))
    np.testing.assert_array_equal(to_host(found)[0, 0], gray * np.float32(2) - 1)
    shares = np.array([0.299, 0.587, 0.114])
    floats = rng.normal(0, 3, (20, 30, 3)).astype(np.float32)
    found, _ = Preprocess((20, 30), **options)(as_batch(on(device, floats), color="bgr"))
    np.testing.assert_allclose(to_host(found)[0, 0], floats[..., ::-1] @ shares * 2 - 1, atol=1e-3)
    found, _ = Preprocess((20, 30), pixel=adjust.invert, **options)(on(device, image))
    np.testing.assert_allclose(to_host(found)[0, 0], np.floor((255.0 - image) @ shares + 0.5) * 2 - 1, atol=2)
    fast, _ = Preprocess((20, 30), parity="fast", **options)(on(device, image))
    np.testing.assert_allclose(to_host(fast)[0, 0], image @ shares * 2 - 1, atol=0.05)


def test_one_plan_takes_gray_of_both_orders(device, rng):
    """What a plan keeps of its first batch must not decide about the next."""
    image = random_image(rng, 20, 30)
    pre = Preprocess((20, 30), fit="stretch", color="gray", dtype="uint8")
    for color, code in [("rgb", cv2.COLOR_RGB2GRAY), ("bgr", cv2.COLOR_BGR2GRAY), ("rgb", cv2.COLOR_RGB2GRAY)]:
        found, _ = pre(as_batch(image, color=color, device=device))
        np.testing.assert_array_equal(to_host(found)[0, 0], cv2.cvtColor(image, code))


def test_gray_takes_one_number_for_its_one_channel():
    for options, message in [
        ({"mean": (1, 2, 3)}, "mean is .* expected one number for color 'gray'"),
        ({"std": (1, 2, 3)}, "std is"),
        ({"fill": (1, 2, 3)}, "fill is"),
        ({"layout": "NHWC4"}, "layout is 'NHWC4' with color 'gray'"),
    ]:
        with pytest.raises(InputError, match=message):
            Preprocess((8, 8), color="gray", **options)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("interpolation", "parity"), SAMPLERS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHWC4"])
def test_both_devices_give_the_same_bits(rng, dtype, interpolation, parity, layout):
    images = [random_image(rng, *size) for size in SIZES]
    options = {"dtype": dtype, "interpolation": interpolation, "parity": parity, "layout": layout, "fill": (1, 2, 3)}
    pre = Preprocess((50, 66), scale=1 if dtype == "uint8" else 1 / 255, **options)
    if layout == "NCHW":
        gray = Preprocess((50, 66), color="gray", **(options | {"fill": 1}))
    for arrays, source in [
        ([planes(image) for image in images], "CHW"),
        ([image.astype(np.float16) for image in images], "HWC"),
        ([(image / np.float32(7)).astype(np.float32) for image in images], "HWC"),
    ]:
        for plan in (pre, gray) if layout == "NCHW" else (pre,):
            batches = [ImageBatch.from_arrays(arrays, layout=source, device=where) for where in ("cpu", "cuda")]
            on_host, on_gpu = (plan(batch)[0] for batch in batches)
            np.testing.assert_array_equal(to_host(on_gpu), on_host)


def test_select_and_views_keep_what_the_batch_is(device, rng):
    batch = ImageBatch.from_arrays([planes(random_image(rng, *size)) for size in SIZES], layout="CHW", device=device)
    part = batch.select([4, 1])
    assert (part.layout, part.dtype, part.sizes.tolist()) == ("CHW", np.uint8, [[37, 53], [1, 9]])
    assert part[0].shape == (3, 37, 53)
    assert repr(part) == f"ImageBatch(2 images, rgb CHW, {device}, 0 missing)"
    floats = ImageBatch.from_arrays([np.zeros((4, 6), np.float16)], color="gray", device=device)
    assert repr(floats.select([0])) == f"ImageBatch(1 images, gray float16, {device}, 0 missing)"
    assert ImageBatch.from_arrays([], layout="CHW", device=device).dtype == np.uint8


def test_what_does_not_fit_is_said(device, rng):
    image = on(device, planes(random_image(rng, 6, 8)))
    with pytest.raises(InputError, match=r"shape \(3, 6, 8\) and dtype float32; expected \(3, height, width\) uint8"):
        as_batch(image.astype(np.float32), layout="CHW")
    with pytest.raises(InputError, match=r"expected \(4, height, width\) uint8 for color='rgba' and layout='CHW'"):
        ImageBatch.from_arrays([image], layout="CHW", color="rgba")
    with pytest.raises(InputError, match="layout is 'CHW' with color 'nv12'"):
        ImageBatch.from_arrays([image], layout="CHW", color="nv12")
    with pytest.raises(InputError, match="layout is 'NCHW'; expected one of"):
        as_batch(image, layout="NCHW")
    with pytest.raises(InputError, match=r"an image has at least one pixel"):
        as_batch(image[:, :0], layout="CHW")
    mixed = [on(device, np.zeros((4, 4, 3), dtype)) for dtype in ("float16", "float32")]
    with pytest.raises(InputError, match=r"images have dtypes \['float16', 'float32'\]"):
        ImageBatch.from_arrays(mixed)
    with pytest.raises(InputError, match="dtype float64; expected"):
        as_batch(on(device, np.zeros((4, 4, 3))))


def test_other_operations_name_what_they_do_not_take(device, rng):
    batch = as_batch(on(device, planes(random_image(rng, 6, 8))), layout="CHW")
    floats = as_batch(on(device, np.zeros((6, 8, 3), np.float32)))
    box = np.array([[0, 0, 4, 4]], np.float32)
    calls = [
        lambda images: nbv.resize(images, (4, 4)),
        lambda images: nbv.letterbox(images, (4, 4)),
        lambda images: nbv.flip(images, horizontal=True),
        lambda images: nbv.warp_affine(images, np.eye(2, 3), (4, 4)),
        lambda images: nbv.cut_out_rgba(images, box, np.ones((1, 4, 4), bool)),
        Preprocess((4, 4), parity="pil"),
    ]
    for call in calls:
        with pytest.raises(InputError, match="the images are CHW uint8; expected uint8 channels side by side"):
            call(batch)
        with pytest.raises(InputError, match="the images are HWC float32; expected uint8 channels side by side"):
            call(floats)


def test_explain_names_the_source(rng):
    pytest.importorskip("numba_cuda")
    planar = as_batch(planes(random_image(rng, 90, 160)), layout="CHW")
    text = Preprocess((64, 64), dtype="bfloat16").explain(planar, cc=(9, 0))
    assert "3 channels, CHW uint8" in text
    assert "store    bfloat16 NCHW" in text
    assert f"{72 * 160 * 3 / 1e6:.1f} MB read" in text
    floats = as_batch(np.zeros((90, 160, 3), np.float16))
    assert f"{72 * 160 * 6 / 1e6:.1f} MB read" in Preprocess((64, 64)).explain(floats, cc=(9, 0))
