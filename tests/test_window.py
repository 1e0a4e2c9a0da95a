"""OpenCV's area and cubic to the bit, torchvision's antialiased resize to one level."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cover_placement, letterbox_placement, on, random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import ImageBatch, as_batch
from nbvision.ops._regions import _scales
from nbvision.ops._taps import windows_of
from nbvision.ops.preprocess import Preprocess

FLAGS = {"area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC}


@pytest.fixture(autouse=True)
def opencvs_own_code():
    """IPP, which wheels for x86 carry, has another cubic."""
    before = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    yield
    cv2.ipp.setUseIPP(before)


def resized(image, size, interpolation):
    return cv2.resize(image, size[::-1], interpolation=FLAGS[interpolation]).reshape(*size, -1)


def random_sizes(rng, count, most):
    """Of all orders of magnitude, whole ratios among them."""
    sizes = np.exp(rng.uniform(0, np.log(most), (count, 2))).astype(int)
    return np.maximum(sizes, 1)


@pytest.mark.parametrize("interpolation", ["area", "cubic"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_random_sizes_are_bit_exact(device, rng, interpolation, channels):
    """700 for each: up, down, one axis up and one down, whole ratios; no value differs."""
    color = {1: "gray", 3: "rgb", 4: "rgba"}[channels]
    differing = 0
    for _ in range(35):
        size = tuple(int(length) for length in random_sizes(rng, 1, 300)[0])
        sizes = random_sizes(rng, 20, 300)
        ratios = rng.integers(1, 7, (6, 2))
        sizes[:6] = np.minimum(np.array(size) * ratios, 900)
        images = [random_image(rng, height, width, channels) for height, width in sizes]
        pre = Preprocess(size, fit="stretch", interpolation=interpolation, dtype="uint8", layout="NHWC")
        tensor, _ = pre(ImageBatch.from_arrays(images, color=color, device=device))
        for image, canvas in zip(images, to_host(tensor), strict=True):
            wanted = resized(image, size, interpolation)
            differing += int((canvas[..., : min(channels, 3)] != wanted[..., :3]).sum())
    assert differing == 0


@pytest.mark.parametrize("interpolation", ["area", "cubic"])
def test_sizes_people_use(device, rng, interpolation):
    images = [random_image(rng, *size) for size in [(1080, 1920), (427, 640), (1417, 1913), (3, 2000), (2999, 5)]]
    for size in [(640, 640), (224, 224), (540, 960), (360, 640), (1, 1), (17, 1023)]:
        pre = Preprocess(size, fit="stretch", interpolation=interpolation, dtype="uint8", layout="NHWC")
        tensor, _ = pre(ImageBatch.from_arrays(images, device=device))
        for image, canvas in zip(images, to_host(tensor), strict=True):
            np.testing.assert_array_equal(canvas, resized(image, size, interpolation))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cubic_of_lines_that_do_not_fill_a_vector(device, rng, channels):
    """Widths of 1 to 100: where OpenCV's vectors of a line end, and integers begin."""
    image = random_image(rng, 7, 43, channels)
    batch = ImageBatch.from_arrays([on(device, image)], color={1: "gray", 3: "bgr", 4: "bgra"}[channels])
    for width in range(1, 101):
        pre = Preprocess((40, width), fit="stretch", color="bgr", interpolation="cubic", dtype="uint8", layout="NHWC")
        wanted = resized(image, (40, width), "cubic")[..., :3]
        np.testing.assert_array_equal(to_host(pre(batch)[0])[0][..., : min(channels, 3)], wanted)


@pytest.mark.parametrize("ratio", [7, 48, 49, 98, 103])
def test_area_of_whole_ratios_that_opencv_takes_for_none(device, rng, ratio):
    """Of 49, 98 and 103 the inverse's inverse falls short in float64, so OpenCV takes weights for them."""
    assert (1 / (1 / ratio) == ratio) is (ratio in (7, 48))
    for lines in (1, ratio, 2):
        image = random_image(rng, 3 * lines, 5 * ratio)
        pre = Preprocess((3, 5), fit="stretch", interpolation="area", dtype="uint8", layout="NHWC")
        found = to_host(pre(as_batch(image, device=device))[0])[0]
        np.testing.assert_array_equal(found, resized(image, (3, 5), "area"))


@pytest.mark.parametrize(
    ("interpolation", "dtype", "layout"),
    [("area", "uint8", "NHWC"), ("cubic", "int8", "NCHW"), ("area", "float16", "NHWC4"), ("cubic", "float32", "NCHW")],
)
def test_stores_and_pixel_functions(device, rng, dtype, layout, interpolation):
    @nbv.pixel
    def function(r, g, b, x, y):
        return g + x, b - y, r * 0.5

    image = random_image(rng, 90, 70)
    plain = resized(image, (33, 35), interpolation)[..., ::-1].astype(np.float32)  # given as bgr
    y, x = np.mgrid[:33, :35].astype(np.float32)
    wanted = np.stack([plain[..., 1] + x, plain[..., 2] - y, plain[..., 0] * np.float32(0.5)], -1) * np.float32(0.25)
    if dtype in ("uint8", "int8"):
        wanted = np.rint(wanted).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    options = {"fit": "stretch", "dtype": dtype, "layout": layout, "scale": 0.25, "pixel": function}
    pre = Preprocess((33, 35), interpolation=interpolation, **options)
    found = to_host(pre(ImageBatch.from_arrays([on(device, image)], color="bgr"))[0])[0]
    if layout == "NHWC4":
        assert not found[..., 3].any()
    found = found.transpose(1, 2, 0) if layout == "NCHW" else found[..., :3]
    np.testing.assert_array_equal(found, wanted.astype(dtype))


@pytest.mark.parametrize(("color", "channels"), [("rgb", 3), ("bgr", 3), ("rgba", 4), ("bgra", 4), ("gray", 1)])
@pytest.mark.parametrize("output", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("interpolation", ["area", "cubic"])
def test_orders_of_channels(device, rng, color, channels, output, interpolation):
    """Normalised by other numbers for each channel, where there are any; gray is OpenCV's of the resized image."""
    image = random_image(rng, 61, 83, channels)
    batch = ImageBatch.from_arrays([on(device, image)], color=color)
    mean = 3 if output == "gray" else (1, 2, 3)
    options = {"fit": "stretch", "color": output, "layout": "NHWC", "interpolation": interpolation, "mean": mean}
    found = to_host(Preprocess((24, 40), **options)(batch)[0])[0]
    wanted = resized(image, (24, 40), interpolation)[..., :3]
    if output == "gray" and channels > 1:
        wanted = cv2.cvtColor(wanted, cv2.COLOR_RGB2GRAY if color[:3] == "rgb" else cv2.COLOR_BGR2GRAY)[..., None]
    elif channels > 1 and color[:3] != output:
        wanted = wanted[..., ::-1]
    np.testing.assert_array_equal(found, wanted.astype(np.float32) - np.array(mean, np.float32))


@pytest.mark.parametrize("interpolation", ["area", "cubic"])
def test_views_with_a_pitch(device, rng, interpolation):
    image = random_image(rng, 120, 200)
    view = on(device, image)[7:107, 31:171]
    for size in [(20, 28), (33, 171), (150, 90)]:
        pre = Preprocess(size, fit="stretch", interpolation=interpolation, dtype="uint8", layout="NHWC")
        found = to_host(pre(view)[0])[0]
        np.testing.assert_array_equal(found, resized(image[7:107, 31:171], size, interpolation))


SAMPLERS = [("area", "cv2"), ("cubic", "cv2"), ("linear", "torch"), ("cubic", "torch")]


@pytest.mark.parametrize(("interpolation", "parity"), SAMPLERS)
def test_missing_images_and_empty_batches(device, interpolation, parity):
    pre = Preprocess((5, 4), fill=9, interpolation=interpolation, parity=parity)
    batch = nbv.decode([b"no image"], device=device)
    tensor, geometry = pre(batch)
    assert (to_host(tensor) == 9).all()
    assert not to_host(geometry.valid).any()
    assert pre(batch.select([]))[0].shape == (0, 3, 5, 4)


@pytest.mark.parametrize(("interpolation", "parity"), SAMPLERS)
def test_sources_that_are_no_bytes_side_by_side_are_refused(device, rng, interpolation, parity):
    pre = Preprocess((5, 4), interpolation=interpolation, parity=parity)
    planar = as_batch(on(device, np.zeros((3, 8, 6), np.uint8)), layout="CHW")
    floats = as_batch(on(device, np.zeros((8, 6, 3), np.float32)))
    frames = ImageBatch.from_arrays([on(device, np.zeros((12, 6), np.uint8))], color="nv12", yuv="bt601")
    for batch in (planar, floats, frames):
        with pytest.raises(InputError, match="expected"):
            pre(batch)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("interpolation", "parity"), SAMPLERS)
@pytest.mark.parametrize("fit", ["stretch", "letterbox", "cover"])
def test_both_devices_give_the_same_bits(rng, interpolation, parity, fit):
    """Whole images, boxes of the host and boxes of the device; those of no area are fill."""
    images = [random_image(rng, *size) for size in [(1, 1), (1, 900), (700, 1), (333, 517), (37, 53)]]
    boxes = np.array([[0, 0, 1, 1], [3, 0, 800, 1], [0, 9, 1, 555], [1, 0, 300, 333], [52, 36, 53, 37]], np.float32)
    which = np.arange(5)
    pre = Preprocess((50, 66), fit=fit, interpolation=interpolation, parity=parity, fill=(1, 2, 3), scale=1 / 255)
    host, gpu = (ImageBatch.from_arrays(images, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(to_host(pre(gpu)[0]), pre(host)[0])
    wanted = pre(host, boxes=boxes, box_images=which)[0]
    np.testing.assert_array_equal(to_host(pre(gpu, boxes=boxes, box_images=which)[0]), wanted)
    none = np.array([[5, 5, 5, 9], [np.nan, 0, 4, 4]], np.float32)
    given = on("cuda", np.concatenate([boxes, none])), on("cuda", np.append(which, [3, 3]))
    found, geometry = pre(gpu, boxes=given[0], box_images=given[1])
    np.testing.assert_array_equal(to_host(found)[:5], wanted)
    assert to_host(geometry.valid).tolist() == [True] * 5 + [False] * 2
    filled = np.broadcast_to((np.array([1, 2, 3], np.float32) * np.float32(1 / 255))[:, None, None], (2, 3, 50, 66))
    np.testing.assert_array_equal(to_host(found)[5:], filled)


@pytest.mark.parametrize("interpolation", ["area", "cubic"])
@pytest.mark.parametrize("fit", ["letterbox", "cover"])
def test_fits(device, rng, interpolation, fit):
    size = (60, 83) if fit == "letterbox" else (60, 60)
    images = [random_image(rng, *image) for image in [(120, 166), (37, 53), (333, 517), (200, 30), (60, 83)]]
    pre = Preprocess(size, fit=fit, interpolation=interpolation, dtype="uint8", layout="NHWC", fill=9)
    tensor, _ = pre(ImageBatch.from_arrays(images, device=device))
    for image, canvas in zip(images, to_host(tensor), strict=True):
        if fit == "letterbox":
            height, width, top, left = letterbox_placement(*image.shape[:2], size)
            wanted = np.full((*size, 3), 9, np.uint8)
            wanted[top : top + height, left : left + width] = resized(image, (height, width), interpolation)
        else:
            height, width, top, left = cover_placement(*image.shape[:2], size, 60)
            wanted = resized(image, (height, width), interpolation)[top : top + 60, left : left + 60]
        np.testing.assert_array_equal(canvas, wanted)


@pytest.mark.parametrize("interpolation", ["area", "cubic"])
def test_crops_end_at_their_box(device, rng, interpolation):
    """Pixels beside the box have no part in it, as in OpenCV's of a cropped image; host and device boxes alike."""
    image = random_image(rng, 90, 130)
    boxes = np.array([[0, 0, 130, 90], [3, 5, 4, 6], [10, 20, 50, 60], [129, 0, 130, 90], [7, 80, 120, 90]], np.float32)
    pre = Preprocess((24, 40), fit="stretch", interpolation=interpolation, dtype="uint8", layout="NHWC")
    batch = ImageBatch.from_arrays([image], device=device)
    tensor, _ = pre(batch, boxes=boxes)
    for (x1, y1, x2, y2), canvas in zip(boxes.astype(int), to_host(tensor), strict=True):
        np.testing.assert_array_equal(canvas, resized(image[y1:y2, x1:x2], (24, 40), interpolation))
    if device == "cuda":
        import cupy

        on_device, _ = pre(batch, boxes=cupy.asarray(boxes))
        np.testing.assert_array_equal(to_host(on_device), to_host(tensor))


# --- torch ------------------------------------------------------------------------------------------------------------


def keys(x, a):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def antialias_matrix(source, length, interpolation):
    """(length, source) weights of torch's antialiased filter, in float64."""
    scale = source / length
    widening = max(scale, 1.0)
    support = {"linear": 1, "cubic": 2}[interpolation] * widening
    weights = np.zeros((length, source))
    for index in range(length):
        center = (index + 0.5) * scale
        first, stop = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), source)
        x = (np.arange(first, stop) - center + 0.5) / widening
        row = np.maximum(1 - np.abs(x), 0) if interpolation == "linear" else keys(x, -0.5)
        weights[index, first:stop] = row / row.sum()
    return weights


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_torch_parity_is_within_a_level(device, rng, interpolation):
    """Of the filter in float64, rounded once; cubic is equal but for ties."""
    for _ in range(12):
        size = tuple(int(length) for length in random_sizes(rng, 1, 200)[0])
        images = [random_image(rng, *image) for image in random_sizes(rng, 12, 400)]
        pre = Preprocess(size, fit="stretch", interpolation=interpolation, parity="torch", dtype="uint8", layout="NHWC")
        tensor, _ = pre(ImageBatch.from_arrays(images, device=device))
        for image, canvas in zip(images, to_host(tensor), strict=True):
            down = antialias_matrix(image.shape[0], size[0], interpolation)
            across = antialias_matrix(image.shape[1], size[1], interpolation)
            exact = np.einsum("yh,hwc,xw->yxc", down, image.astype(np.float64), across, optimize=True)
            wanted = np.clip(np.rint(exact), 0, 255)
            differing = canvas != wanted
            assert np.abs(canvas - wanted).max() <= 1
            if interpolation == "cubic":
                assert np.abs(np.abs(exact - np.floor(exact)) - 0.5)[differing].max(initial=0) < 1e-3


# --- tables -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([("cv2", "area"), ("cv2", "cubic"), ("torch", "linear"), ("pil", "lanczos"), ("pil", "box")]),
    st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(["stretch", "letterbox", "cover"]),
    st.tuples(*[st.floats(0, 1) for _ in range(4)]),
)
def test_device_boxes_have_room_for_their_windows(names, image, size, fit, corners):
    """What tables are made for without a look at the boxes holds the windows of any box."""
    windows = windows_of(*names)
    height, width = image
    x1, x2 = sorted((int(corners[0] * (width - 1)), int(corners[1] * (width - 1))))
    y1, y2 = sorted((int(corners[2] * (height - 1)), int(corners[3] * (height - 1))))
    pre = Preprocess(size, fit=fit, parity=names[0], interpolation=names[1])
    geometry = pre._regions._of_host_boxes(
        np.array([image], np.int32), np.array([[x1, y1, x2 + 1, y2 + 1]], np.float32), np.zeros(1, np.int64)
    )
    most = windows.limits(pre._regions._box_scales(np.array([image], np.int32)))
    needed = windows.limits(_scales(geometry.regions))
    assert needed[0] <= most[0]
    assert needed[1] <= most[1]
    tables = windows.tables(geometry, size, most)
    for table, limit in ((tables.x, needed[0]), (tables.y, needed[1])):
        assert table[..., 1].max(initial=0) <= limit


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), max_size=4),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(["stretch", "letterbox", "cover"]),
    st.booleans(),
)
def test_scales_of_images_are_those_of_their_regions(images, size, fit, scaleup):
    """What tables are made for without a look at the regions, which a kernel makes."""
    options = {"fit": fit, "scaleup": scaleup} if fit == "letterbox" else {"fit": fit}
    regions = Preprocess(size, parity="pil", **options)._regions
    sizes = np.array(images, np.int32).reshape(-1, 2)
    sizes[(sizes == 0).any(axis=1)] = 0  # no image
    np.testing.assert_array_equal(regions._image_scales(sizes), _scales(regions.of(sizes).regions))


def test_lanczos_sums_fit_into_32_bits():
    """Weights of both signs, of white and black where it hurts most."""
    for source in [*range(1, 60), 777, 4000]:
        for length in (1, 2, 3, 7, 30, 100):
            windows = windows_of("pil", "lanczos")
            pre = Preprocess((1, length), fit="stretch", parity="pil", interpolation="lanczos")
            geometry = pre._regions.of(np.array([[1, source]], np.int32))
            limits = windows.limits(_scales(geometry.regions))
            weights = windows.tables(geometry, (1, length), limits).x[0, :, 4:].astype(np.int64)
            assert np.maximum(weights, 0).sum(1).max() * 255 + 2**21 < 2**31
            assert np.minimum(weights, 0).sum(1).min() * 255 > -(2**31)


def test_what_a_parity_does_not_have_is_said():
    for options, message in [
        ({"parity": "fast", "interpolation": "area"}, "parity 'fast', which has linear, nearest; parity 'cv2' has it"),
        ({"parity": "torch", "interpolation": "nearest"}, "parity 'cv2' or 'fast' has it"),
        ({"parity": "pil", "interpolation": "area"}, "interpolation is 'area' with parity 'pil'"),
        ({"parity": "cv2", "interpolation": "lanczos"}, "parity 'pil' or 'pil-11' has it"),
    ]:
        with pytest.raises(InputError, match=message):
            Preprocess((8, 8), **options)
