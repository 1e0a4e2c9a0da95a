"""Preprocess with parity "pil" against Pillow itself: no value differs, on both devices.

Versions before 13 are those of parity "pil-11".
"""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import cover_placement, letterbox_placement, on, random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError

FILTERS = {
    "box": Image.Resampling.BOX,
    "linear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "cubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
PARITY = "pil" if int(PIL.__version__.split(".")[0]) >= 13 else "pil-11"
BYTES = {"dtype": "uint8", "layout": "NHWC", "parity": PARITY}


def by_pillow(image: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """(H, W, 3) uint8."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if PARITY == "pil-11":  # its order; 12.2 and 12.3 shrink the height first if it is 100 times the width
        picture = picture.resize((width, picture.height), FILTERS[interpolation])
    resized = picture.resize((width, height), FILTERS[interpolation])
    return np.asarray(resized.convert("RGB"))


def resized(images, size, device, interpolation, **options):
    pre = nbv.Preprocess(size, interpolation=interpolation, **{"fit": "stretch", **BYTES, **options})
    return to_host(pre(nbv.ImageBatch.from_arrays([on(device, image) for image in images]))[0])


@pytest.mark.parametrize("interpolation", FILTERS)
def test_random_sizes_are_bit_exact(device, rng, interpolation):
    """2,000 images of random sizes for each filter, up and down, both orders of passes."""
    differing = 0
    for _ in range(100):
        size = tuple(int(side) for side in 2 ** rng.uniform(0, 7, 2))
        images = [random_image(rng, *(int(side) for side in 2 ** rng.uniform(0, 8, 2))) for _ in range(20)]
        for image, got in zip(images, resized(images, size, device, interpolation), strict=True):
            differing += int((got != by_pillow(image, *size, interpolation)).sum())
    assert differing == 0


@pytest.mark.parametrize("interpolation", ["box", "linear", "cubic"])
def test_the_order_of_pillow_11(device, rng, interpolation):
    """The width first whatever the ratio, which any Pillow does when it is asked for one side after the other."""
    for source, size in [((3000, 5), (3, 7)), ((900, 800), (30, 700)), ((400, 90), (20, 224)), ((5, 3000), (7, 3))]:
        image = random_image(rng, *source)
        picture = Image.fromarray(image).resize((size[1], source[0]), FILTERS[interpolation])
        wanted = np.asarray(picture.resize(size[::-1], FILTERS[interpolation]))
        found = resized([image], size, device, interpolation, parity="pil-11")[0]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((1080, 1920), (224, 224)),
        ((427, 640), (256, 384)),
        ((224, 224), (224, 224)),
        ((31, 17), (640, 608)),
        ((3000, 5), (3, 7)),  # the height first
        ((5, 3000), (7, 3)),
        ((2999, 1), (1, 1)),
        ((40, 2900), (40, 1)),  # a window wider than shared memory
        ((700, 60), (11, 61)),
    ],
)
def test_sizes_people_use_and_sizes_nobody_does(device, rng, source, size, interpolation):
    image = random_image(rng, *source)
    np.testing.assert_array_equal(
        resized([image], size, device, interpolation)[0], by_pillow(image, *size, interpolation)
    )


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("lines", [18, 23])
def test_every_weight_is_pillows(device, rng, interpolation, lines):
    """A weight that is off by its last bit changes one value in 30,000; of hamming at a third one lies near a half."""
    image = random_image(rng, lines, 20_000)
    got = resized([image], (6, 20_000), device, interpolation)[0]
    assert int((got != by_pillow(image, 6, 20_000, interpolation)).sum()) == 0


@pytest.mark.parametrize("size", [(2, 3), (300, 2)])
def test_windows_wider_than_shared_memory(device, rng, size):
    """20,000 columns to 3 and to 2, and with the height first."""
    image = np.ascontiguousarray(random_image(rng, 1, 20_000).repeat(301, axis=0)) ^ random_image(rng, 301, 1)
    np.testing.assert_array_equal(resized([image], size, device, "linear")[0], by_pillow(image, *size, "linear"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    interpolation=st.sampled_from(sorted(FILTERS)),
    seed=st.integers(0, 1000),
)
def test_small_sizes(device, source, size, interpolation, seed):
    image = random_image(np.random.default_rng(seed), *source)
    np.testing.assert_array_equal(
        resized([image], size, device, interpolation)[0], by_pillow(image, *size, interpolation)
    )


@pytest.mark.parametrize(("color", "channels"), [("rgb", 3), ("bgr", 3), ("rgba", 4), ("bgra", 4), ("gray", 1)])
@pytest.mark.parametrize("output", ["rgb", "bgr"])
def test_orders_of_channels(device, rng, color, channels, output):
    """Alpha is dropped before: Pillow would weight with it."""
    image = random_image(rng, 61, 83, channels)
    batch = nbv.ImageBatch.from_arrays([on(device, image)], color=color)
    got = to_host(nbv.Preprocess((24, 40), fit="stretch", color=output, **BYTES)(batch)[0])[0]
    expected = by_pillow(np.ascontiguousarray(image[:, :, :3]), 24, 40, "linear")
    reverse = channels > 1 and color[:3] != output
    np.testing.assert_array_equal(got, expected[:, :, ::-1] if reverse else expected)


def test_letterbox_and_cover(device, rng):
    images = [random_image(rng, h, w) for h, w in [(427, 640), (640, 427), (33, 500), (9, 9)]]
    batch = nbv.ImageBatch.from_arrays([on(device, image) for image in images])
    boxed = to_host(nbv.Preprocess((96, 80), fill=7, **BYTES)(batch)[0])
    covered = to_host(nbv.Preprocess((64, 64), fit="cover", crop_pct=0.875, **BYTES)(batch)[0])
    for image, got_boxed, got_covered in zip(images, boxed, covered, strict=True):
        height, width, top, left = letterbox_placement(*image.shape[:2], (96, 80))
        canvas = np.full((96, 80, 3), 7, np.uint8)
        canvas[top : top + height, left : left + width] = by_pillow(image, height, width, "linear")
        np.testing.assert_array_equal(got_boxed, canvas)
        height, width, top, left = cover_placement(*image.shape[:2], (64, 64), 73)
        whole = by_pillow(image, height, width, "linear")
        np.testing.assert_array_equal(got_covered, whole[top : top + 64, left : left + 64])


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "cover"])
@pytest.mark.parametrize("boxes_on", ["host", "device"])
def test_crops_are_pillows_of_the_crop(device, rng, boxes_on, fit):
    """No pixel outside the box counts, wherever the boxes live; an invalid one on the device is all fill."""
    images = [random_image(rng, 200, 300), random_image(rng, 150, 90)]
    boxes = np.array([[10, 20, 160, 90], [0, 0, 90, 150], [5, 7, 6, 140], [250, 100, 300, 200]], np.float32)
    which = np.array([0, 1, 1, 0])
    batch = nbv.ImageBatch.from_arrays([on(device, image) for image in images])
    pre = nbv.Preprocess((32, 48), fit=fit, **BYTES)
    given = (boxes, which) if boxes_on == "host" else (on(device, boxes), on(device, which))
    got, geometry = pre(batch, boxes=given[0], box_images=given[1])
    regions = to_host(geometry.regions)
    for index, (box, image) in enumerate(zip(boxes.astype(int), which, strict=True)):
        x1, y1, x2, y2 = box
        left, top, width, height = regions[index, 5:9]
        whole = by_pillow(np.ascontiguousarray(images[image][y1:y2, x1:x2]), height, width, "linear")
        if fit == "cover":
            expected = whole[-top : -top + 32, -left : -left + 48]
        else:
            expected = np.full((32, 48, 3), 114, np.uint8)
            expected[top : top + height, left : left + width] = whole
        np.testing.assert_array_equal(to_host(got)[index], expected)


@pytest.mark.parametrize("width", [160, 161])
def test_crops_that_begin_and_end_anywhere_in_16_bytes(device, rng, width):
    """Of 160 columns every line begins alike, of 161 each elsewhere; the last ones end with the image."""
    image = random_image(rng, 40, width)
    boxes = np.array([[x, 0, stop, 40] for x in range(17) for stop in (x + 70, 143 + x, width)], np.float32)
    pre = nbv.Preprocess((16, 32), fit="stretch", interpolation="cubic", **BYTES)
    batch = nbv.ImageBatch.from_arrays([on(device, image)])
    got, _ = pre(batch, boxes=boxes, box_images=np.zeros(len(boxes), np.int64))
    for canvas, (x, _, stop, _) in zip(to_host(got), boxes.astype(int), strict=True):
        np.testing.assert_array_equal(canvas, by_pillow(np.ascontiguousarray(image[:, x:stop]), 16, 32, "cubic"))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("fit", ["stretch", "letterbox", "cover"])
@pytest.mark.parametrize("size", [(208, 70), (33, 224)])
def test_blocks_that_make_several_tiles_of_lines(rng, monkeypatch, size, fit, channels):
    """As of large batches: an odd number of tiles, tiles that are all fill before and behind others, both orders."""
    monkeypatch.setattr("nbvision.ops.preprocess._MANY_BLOCKS", 1)
    color = {1: "gray", 3: "rgb", 4: "rgba"}[channels]
    images = [random_image(rng, h, w, channels) for h, w in [(90, 501), (501, 90), (700, 700), (900, 40), (17, 19)]]
    tensors = []
    for device in ("cpu", "cuda"):
        batch = nbv.ImageBatch.from_arrays([on(device, image) for image in images], color=color)
        pre = nbv.Preprocess(size, fit=fit, interpolation="lanczos", **BYTES)
        tensors.append(to_host(pre(batch)[0]))
    np.testing.assert_array_equal(*tensors)


@pytest.mark.needs_cuda
def test_boxes_of_no_area_on_the_device_are_fill(rng):
    boxes = on("cuda", np.array([[5, 5, 5, 9], [np.nan, 0, 4, 4], [0, 0, 9, 9]], np.float32))
    image = random_image(rng, 40, 40)
    got, geometry = nbv.Preprocess((8, 8), fill=3, **BYTES)(on("cuda", image), boxes=boxes)
    assert to_host(geometry.valid).tolist() == [False, False, True]
    assert (to_host(got)[:2] == 3).all()
    np.testing.assert_array_equal(to_host(got)[2], by_pillow(np.ascontiguousarray(image[:9, :9]), 8, 8, "linear"))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "float16", "float32"])
def test_stores_and_pixel_functions(device, rng, dtype, layout):
    @nbv.pixel
    def function(r, g, b, x, y):
        return g + x, b - y, r * 0.5

    image = random_image(rng, 90, 70)
    plain = by_pillow(image, 33, 35, "cubic").astype(np.float32)
    y, x = np.mgrid[:33, :35].astype(np.float32)
    expected = np.stack([plain[..., 1] + x, plain[..., 2] - y, plain[..., 0] * np.float32(0.5)], -1) * np.float32(0.25)
    if dtype in ("uint8", "int8"):
        expected = np.rint(expected).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    options = {"dtype": dtype, "layout": layout, "scale": 0.25, "pixel": function}
    got = resized([image], (33, 35), device, "cubic", **options)[0]
    np.testing.assert_array_equal(
        got, expected.astype(dtype) if layout == "NHWC" else expected.astype(dtype).transpose(2, 0, 1)
    )


def test_missing_images_and_empty_batches(device, rng):
    batch = nbv.decode([b"no image"], device=device)
    tensor, geometry = nbv.Preprocess((5, 4), fill=9, **BYTES)(batch)
    assert (to_host(tensor) == 9).all()
    assert not to_host(geometry.valid).any()
    assert nbv.Preprocess((5, 4), **BYTES)(batch.select([]))[0].shape == (0, 5, 4, 3)


def test_views_with_a_pitch(device, rng):
    image = random_image(rng, 120, 200)
    view = on(device, image)[7:107, 31:171]
    got = resized([image], (20, 30), device, "lanczos")[0]
    np.testing.assert_array_equal(got, by_pillow(image, 20, 30, "lanczos"))
    pre = nbv.Preprocess((20, 30), fit="stretch", interpolation="lanczos", **BYTES)
    expected = by_pillow(np.ascontiguousarray(image[7:107, 31:171]), 20, 30, "lanczos")
    np.testing.assert_array_equal(to_host(pre(view)[0])[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "nearest", "parity": "pil"}, "parity 'cv2' or 'fast' has it"),
        ({"interpolation": "lanczos"}, "parity 'pil' or 'pil-11' has it"),
        ({"interpolation": "cubic", "parity": "fast"}, "parity 'cv2' or 'pil' or 'pil-11' or 'torch' has it"),
        ({"interpolation": "area", "parity": "pil-11"}, "parity 'cv2' has it"),
        ({"interpolation": "bilinear"}, "expected one of"),
    ],
)
def test_combinations_that_are_none(options, message):
    with pytest.raises(InputError, match=message):
        nbv.Preprocess((8, 8), **options)
