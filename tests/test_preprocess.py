"""Preprocess against OpenCV: same bits in parity mode, on both devices."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    INTERPOLATIONS,
    TOLERANCE,
    cover_placement,
    letterbox_placement,
    on,
    preprocess_u8,
    random_image,
    to_host,
)

from nbvision.errors import InputError
from nbvision.image import ImageBatch
from nbvision.ops.preprocess import Preprocess

SIZES = [(1, 1), (1, 7), (9, 1), (37, 53), (333, 517), (480, 640), (641, 427)]


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_cv2_parity_is_bit_exact(device, rng, fit, interpolation):
    """500 random sizes up and down for each fit, in batches of ragged images: no value differs from OpenCV's."""
    differing = 0
    for _ in range(25):
        size = (int(rng.integers(1, 400)), int(rng.integers(1, 400)))
        images = [random_image(rng, *rng.integers(1, 700, 2)) for _ in range(20)]
        pre = Preprocess(size, fit=fit, interpolation=interpolation, dtype="uint8", layout="NHWC")
        tensor, _ = pre(ImageBatch.from_arrays(images, device=device))
        for image, canvas in zip(images, to_host(tensor), strict=True):
            differing += int((canvas != preprocess_u8(image, size, fit=fit, interpolation=interpolation)).sum())
    assert differing == 0


def test_nearest_is_exact_however_much_it_enlarges(device, rng):
    """Where positions are whole numbers, which the scale's last bit decides."""
    image = random_image(rng, 3, 2)
    batch = ImageBatch.from_arrays([image], device=device)
    for length in [*range(1026, 9000, 114), 12_345, 32_766]:
        pre = Preprocess((length, 4), fit="stretch", interpolation="nearest", dtype="uint8", layout="NHWC")
        wanted = preprocess_u8(image, (length, 4), fit="stretch", interpolation="nearest")
        np.testing.assert_array_equal(to_host(pre(batch)[0])[0], wanted)


@pytest.mark.parametrize("size", [(640, 640), (608, 352), (224, 224), (1, 1), (17, 1023)])
def test_cv2_parity_at_sizes_people_use(device, rng, size):
    images = [random_image(rng, h, w) for h, w in [(1080, 1920), (427, 640), (1417, 1913), (3, 2000)]]
    for fit in ("letterbox", "stretch"):
        tensor, _ = Preprocess(size, fit=fit, dtype="uint8", layout="NHWC")(
            ImageBatch.from_arrays(images, device=device)
        )
        for image, canvas in zip(images, to_host(tensor), strict=True):
            np.testing.assert_array_equal(canvas, preprocess_u8(image, size, fit=fit))


@pytest.mark.parametrize("ratio", [2, 3, 5, 49, 98])
def test_nearest_takes_opencvs_side_at_whole_ratios(device, rng, ratio):
    """OpenCV's float64 scale falls just short of some whole numbers; so must ours."""
    image = random_image(rng, 4 * ratio, 7 * ratio)
    pre = Preprocess((4, 7), fit="stretch", interpolation="nearest", dtype="uint8", layout="NHWC")
    tensor, _ = pre(ImageBatch.from_arrays([image], device=device))
    np.testing.assert_array_equal(
        to_host(tensor)[0], preprocess_u8(image, (4, 7), fit="stretch", interpolation="nearest")
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("width", [64, 63])
def test_layouts_and_dtypes(device, rng, layout, dtype, width):
    """Every store, with widths that do and do not take wide stores."""
    images = [random_image(rng, h, w) for h, w in SIZES]
    scale, mean, std = (1.0, 0.0, 1.0) if dtype == "uint8" else (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pre = Preprocess((48, width), scale=scale, mean=mean, std=std, dtype=dtype, layout=layout)
    tensor, _ = pre(ImageBatch.from_arrays(images, device=device))
    assert tensor.shape == pre.output_shape(len(images))
    assert tensor.dtype == np.dtype(dtype)
    for image, got in zip(images, to_host(tensor), strict=True):
        canvas = preprocess_u8(image, (48, width), fit="letterbox").astype(np.float64)
        wanted = (canvas * scale - np.asarray(mean)) / np.asarray(std)
        if layout == "NCHW":
            wanted = wanted.transpose(2, 0, 1)
        tolerance = TOLERANCE[dtype] / 0.224 * np.maximum(np.abs(wanted), 1)
        assert (np.abs(got.astype(np.float64) - wanted) <= tolerance).all()


@pytest.mark.parametrize(("source", "channels"), [("rgb", 3), ("bgr", 3), ("rgba", 4), ("bgra", 4), ("gray", 1)])
@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_channel_orders(device, rng, source, channels, color):
    image = random_image(rng, 21, 34, channels)
    order = {"rgb": [0, 1, 2], "rgba": [0, 1, 2], "bgr": [2, 1, 0], "bgra": [2, 1, 0], "gray": [0, 0, 0]}[source]
    wanted = image[:, :, order if color == "rgb" else order[::-1]]
    pre = Preprocess((21, 34), fit="stretch", color=color, dtype="uint8", layout="NHWC")
    tensor, _ = pre(ImageBatch.from_arrays([image], color=source, device=device))
    np.testing.assert_array_equal(to_host(tensor)[0], wanted)


def test_fast_is_within_a_level_of_exact(device, rng):
    images = [random_image(rng, h, w) for h, w in SIZES]
    batch = ImageBatch.from_arrays(images, device=device)
    exact, _ = Preprocess((160, 144), fit="stretch")(batch)
    fast, _ = Preprocess((160, 144), fit="stretch", parity="fast")(batch)
    assert np.abs(to_host(exact) - to_host(fast)).max() <= 1.0


@pytest.mark.parametrize("scaleup", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_letterbox_geometry_is_ultralytics(device, rng, scaleup, center):
    images = [random_image(rng, h, w) for h, w in [(427, 640), (100, 90), (768, 9), (31, 1000), (640, 640)]]
    pre = Preprocess((640, 608), scaleup=scaleup, center=center, dtype="uint8", layout="NHWC", fill=(1, 2, 3))
    tensor, geometry = pre(ImageBatch.from_arrays(images, device=device))
    regions = to_host(geometry.regions)
    for index, image in enumerate(images):
        height, width, top, left = letterbox_placement(*image.shape[:2], (640, 608), scaleup=scaleup, center=center)
        assert regions[index, [8, 7, 6, 5]].tolist() == [height, width, top, left]
        outside = to_host(tensor)[index].copy()
        outside[top : top + height, left : left + width] = (1, 2, 3)
        assert (outside == (1, 2, 3)).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 5000), width=st.integers(1, 5000), size=st.tuples(st.integers(1, 2000), st.integers(1, 2000))
)
def test_letterbox_rounding_is_pythons(height, width, size):
    """Geometry alone, so that sizes can be large: the same integers as Python's float arithmetic and round()."""
    geometry = Preprocess(size)._regions.of(np.array([[height, width]], np.int32))
    new_height, new_width, top, left = letterbox_placement(height, width, size)
    assert geometry.regions[0, [8, 7, 6, 5]].tolist() == [new_height, new_width, top, left]


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize(("size", "crop_pct", "shorter"), [(224, 0.875, 256), (64, 1.0, 64), (33, 0.9, 36)])
def test_cover_is_resize_and_center_crop(device, rng, interpolation, size, crop_pct, shorter):
    images = [random_image(rng, h, w) for h, w in [(427, 640), (640, 427), (100, 101), (256, 256), (31, 500), (7, 3)]]
    options = {"fit": "cover", "crop_pct": crop_pct, "interpolation": interpolation, "dtype": "uint8", "layout": "NHWC"}
    tensor, geometry = Preprocess((size, size), **options)(ImageBatch.from_arrays(images, device=device))
    corners = to_host(geometry.to_source(on(device, np.tile(np.float32([0, 0, size, size]), (len(images), 1, 1)))))
    for index, image in enumerate(images):
        height, width, top, left = cover_placement(*image.shape[:2], (size, size), shorter)
        resized = cv2.resize(image, (width, height), interpolation=INTERPOLATIONS[interpolation])
        np.testing.assert_array_equal(to_host(tensor)[index], resized[top : top + size, left : left + size])
        x_scale, y_scale = image.shape[1] / width, image.shape[0] / height
        wanted = [left * x_scale, top * y_scale, (left + size) * x_scale, (top + size) * y_scale]
        np.testing.assert_allclose(corners[index, 0], wanted, rtol=1e-4, atol=1e-3)


def test_cover_fills_any_canvas(device, rng):
    """Not square, too: nothing of the fill is seen, and one side is not cut at all."""
    images = [random_image(rng, h, w) for h, w in [(40, 97), (97, 40), (1, 1), (3, 500)]]
    for size in [(20, 60), (60, 20), (1, 7)]:
        pre = Preprocess(size, fit="cover", fill=0, dtype="float32")
        tensor, geometry = pre(ImageBatch.from_arrays([np.maximum(image, 1) for image in images], device=device))
        assert to_host(tensor).min() >= 1
        for row in to_host(geometry.regions):
            new_width, new_height = row[7], row[8]
            assert new_height >= size[0]
            assert new_width >= size[1]
            assert (new_height == size[0]) or (new_width == size[1])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_quantized_outputs(device, rng, dtype):
    """NumPy's formula of a quantized tensor, saturated; a value at a rounding border may differ by one step."""
    image = random_image(rng, 60, 80)
    quantum, zero_point = 0.0187, -11 if dtype == "int8" else 117
    options = {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    plain = to_host(Preprocess((48, 64), **options)(on(device, image))[0])
    got = to_host(Preprocess((48, 64), dtype=dtype, quantize=(quantum, zero_point), **options)(on(device, image))[0])
    limits = np.iinfo(dtype)
    exact = (plain.astype(np.float64) / quantum + zero_point).clip(limits.min, limits.max)
    assert got.dtype == dtype
    assert np.abs(got - exact).max() <= 0.501


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32", "quantize": (0.1, 0)}, "quantize is for int8 and uint8"),
        ({"dtype": "int8", "quantize": (0.0, 0)}, "expected"),
        ({"dtype": "int8", "quantize": (0.1, 0.5)}, "expected"),
        ({"dtype": "int8", "quantize": 0.1}, "expected"),
        ({"fit": "cover", "crop_pct": 0}, "crop_pct is 0"),
        ({"fit": "cover", "crop_pct": 1.5}, "crop_pct is 1.5"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        Preprocess((8, 8), **options)


@pytest.mark.parametrize("boxes_on", ["host", "device"])
def test_crops_equal_opencv_on_the_crop(device, rng, boxes_on):
    """Ragged crops of several images: clamped to the region, not to the image."""
    images = [random_image(rng, 200, 300), random_image(rng, 150, 90)]
    boxes = np.array([[10, 20, 60, 90], [0, 0, 90, 150], [5.5, 7.25, 33.1, 40.9], [-20, -5, 12, 30]], np.float32)
    which = np.array([0, 1, 1, 0])
    pre = Preprocess((32, 48), fit="stretch", dtype="uint8", layout="NHWC")
    batch = ImageBatch.from_arrays(images, device=device)
    given_boxes, given_which = (boxes, which) if boxes_on == "host" else (on(device, boxes), on(device, which))
    tensor, geometry = pre(batch, boxes=given_boxes, box_images=given_which)
    corners = [(10, 20, 60, 90), (0, 0, 90, 150), (5, 7, 34, 41), (0, 0, 12, 30)]
    for got, image, (x1, y1, x2, y2) in zip(to_host(tensor), which, corners, strict=True):
        np.testing.assert_array_equal(got, preprocess_u8(images[image][y1:y2, x1:x2], (32, 48), fit="stretch"))
    assert to_host(geometry.images).tolist() == which.tolist()
    assert to_host(geometry.valid).all()


def test_box_margin_enlarges_and_clips(device, rng):
    image = random_image(rng, 100, 100)
    pre = Preprocess((20, 20), fit="stretch", dtype="uint8", layout="NHWC", box_margin=0.1)
    batch = ImageBatch.from_arrays([image], device=device)
    tensor, _ = pre(batch, boxes=on(device, np.array([[20, 40, 40, 90], [0, 0, 100, 100]], np.float32)))
    np.testing.assert_array_equal(to_host(tensor)[0], preprocess_u8(image[35:95, 18:42], (20, 20), fit="stretch"))
    np.testing.assert_array_equal(to_host(tensor)[1], preprocess_u8(image, (20, 20), fit="stretch"))


def test_geometry_maps_boxes_back(device, rng):
    """A box of the whole placed image maps to the whole source."""
    images = [random_image(rng, 123, 457), random_image(rng, 300, 80)]
    _, geometry = Preprocess((96, 128))(ImageBatch.from_arrays(images, device=device))
    for index, image in enumerate(images):
        height, width, top, left = letterbox_placement(*image.shape[:2], (96, 128))
        canvas_box = np.array([[[left, top, left + width, top + height]]] * 2, np.float32)
        source = to_host(geometry.to_source(on(device, canvas_box)))[index, 0]
        np.testing.assert_allclose(source, [0, 0, image.shape[1], image.shape[0]], atol=1e-3)


def test_missing_image_gives_fill_and_nothing_else_changes(device, rng):
    image = random_image(rng, 30, 40)
    batch = ImageBatch.allocate([(30, 40), (0, 0), (30, 40)], device=device)
    for index in (0, 2):
        batch[index][...] = on(device, image)
    tensor, geometry = Preprocess((16, 16), fill=7, dtype="uint8")(batch)
    assert (to_host(tensor)[1] == 7).all()
    assert to_host(geometry.valid).tolist() == [True, False, True]
    np.testing.assert_array_equal(to_host(tensor)[0], to_host(tensor)[2])


def test_non_contiguous_and_strided_images(device, rng):
    wide = random_image(rng, 90, 120)
    views = [wide[10:50, 20:90], wide[::2], wide[:, ::2], wide[::-1], wide[:, :, ::-1]]
    batch = ImageBatch.from_arrays([on(device, wide)[10:50, 20:90], *views[1:]], device=device)
    tensor, _ = Preprocess((33, 31), fit="stretch", dtype="uint8", layout="NHWC")(batch)
    for view, got in zip(views, to_host(tensor), strict=True):
        np.testing.assert_array_equal(got, preprocess_u8(np.ascontiguousarray(view), (33, 31), fit="stretch"))


def test_empty_batch_and_empty_boxes(device, rng):
    pre = Preprocess((8, 8))
    tensor, geometry = pre(ImageBatch.from_arrays([], device=device))
    assert tensor.shape == (0, 3, 8, 8)
    assert len(geometry) == 0
    batch = ImageBatch.from_arrays([random_image(rng, 5, 5)], device=device)
    tensor, _ = pre(batch, boxes=on(device, np.zeros((0, 4), np.float32)))
    assert tensor.shape == (0, 3, 8, 8)


def test_out_is_written_and_returned(device, rng):
    pre = Preprocess((16, 24), dtype="float32")
    batch = ImageBatch.from_arrays([random_image(rng, 50, 60)] * 2, device=device)
    wanted, _ = pre(batch)
    out = on(device, np.full((2, 3, 16, 24), np.nan, np.float32))
    got, _ = pre(batch, out=out)
    assert got is out
    np.testing.assert_array_equal(to_host(out), to_host(wanted))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 3, 16, 24), np.float32), ((2, 3, 16, 24), np.float64), ((2, 3, 24, 16), np.float32)]
)
def test_out_that_does_not_fit_is_refused(device, rng, shape, dtype):
    batch = ImageBatch.from_arrays([random_image(rng, 50, 60)] * 2, device=device)
    with pytest.raises(InputError, match=r"expected a contiguous float32 array of shape \(2, 3, 16, 24\)"):
        Preprocess((16, 24))(batch, out=on(device, np.zeros(shape, dtype)))


@pytest.mark.parametrize(
    "box", [[10, 10, 10, 20], [30, 10, 20, 20], [100, 0, 120, 10], [-9, -9, 0, 5], [np.nan, 0, 5, 5], [0, 51, 5, 60]]
)
def test_host_box_without_area_names_itself(device, rng, box):
    batch = ImageBatch.from_arrays([random_image(rng, 50, 60)], device=device)
    with pytest.raises(InputError, match=r"box 1 is .* expected x1 < x2 and y1 < y2 with a part inside the image"):
        Preprocess((8, 8))(batch, boxes=[[0, 0, 5, 5], box])


@pytest.mark.needs_cuda
def test_device_box_without_area_is_fill_and_invalid(rng):
    batch = ImageBatch.from_arrays([random_image(rng, 50, 60)], device="cuda")
    boxes = np.array([[0, 0, 60, 50], [10, 10, 10, 20], [np.nan, 0, 5, 5], [100, 0, 120, 10]], np.float32)
    tensor, geometry = Preprocess((8, 8), fill=9, dtype="uint8", fit="stretch")(batch, boxes=on("cuda", boxes))
    assert to_host(geometry.valid).tolist() == [True, False, False, False]
    assert (to_host(tensor)[1:] == 9).all()


def test_bad_arguments_say_what_was_expected(rng):
    image = random_image(rng, 5, 5)
    for arguments, message in [
        ({"size": (0, 5)}, "expected .height, width."),
        ({"size": 8}, "expected .height, width."),
        ({"size": (8, 2.5)}, "expected .height, width."),
        ({"size": (8, 8), "dtype": "float99"}, "expected one of"),
        ({"size": (8, 8), "mean": "rgb"}, "one finite number, or three"),
        ({"size": (8, 8), "scale": None}, "scale"),
        ({"size": (8, 8), "fit": "contain"}, "expected one of .'cover', 'letterbox', 'stretch'."),
        ({"size": (8, 8), "dtype": "float64"}, "expected one of"),
        ({"size": (8, 8), "std": 0}, "other than 0"),
        ({"size": (8, 8), "mean": (1, 2)}, "one finite number, or three"),
        ({"size": (8, 8), "box_margin": -1}, "0 or more"),
    ]:
        with pytest.raises(InputError, match=message):
            Preprocess(**arguments)
    with pytest.raises(InputError, match="box_images is missing"):
        Preprocess((8, 8))([image, image], boxes=[[0, 0, 2, 2]])
    with pytest.raises(InputError, match="the batch has 1 images"):
        Preprocess((8, 8))([image], boxes=[[0, 0, 2, 2]], box_images=[1])
    with pytest.raises(InputError, match=r"expected \(M, 4\)"):
        Preprocess((8, 8))([image], boxes=[[0, 0, 2]])
    with pytest.raises(InputError, match="uint8"):
        Preprocess((8, 8))(image.astype(np.float64))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("parity", ["cv2", "fast"])
def test_frame_and_numba_kernel_agree(rng, dtype, layout, parity):
    """The CUDA C frame and the Numba kernel are two movers of the same pixel functions: the same values."""
    from nbvision_kernels.catalog import preprocess_kernel

    from nbvision.runtime.compile import load_kernel

    images = [random_image(rng, h, w) for h, w in SIZES]
    batch = ImageBatch.from_arrays(images, device="cuda")
    pre = Preprocess((50, 66), dtype=dtype, layout=layout, parity=parity, scale=1.0 if dtype == "uint8" else 1 / 255)
    framed, geometry = pre(batch)
    plain = on("cuda", np.zeros(framed.shape, framed.dtype))
    kernel = load_kernel(preprocess_kernel(*pre._types(batch), frame=False))
    numbers = (*pre._int_size, *pre._channels(batch), *pre._gain, *pre._bias, *pre._fill, *pre._matrix(batch))
    tables = (batch.table, geometry.regions, geometry.steps, geometry.scales)
    kernel((3, 7, len(images)), (32, 8, 1), (0, *tables, plain, *numbers))
    np.testing.assert_array_equal(to_host(plain), to_host(framed))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_address_and_width(device, rng, channels):
    """Views that start and end at any byte, down to one column: what loads of whole words could get wrong."""
    color = {1: "gray", 3: "rgb", 4: "rgba"}[channels]
    whole = on(device, random_image(rng, 40, 60, channels))
    views, wanted = [], []
    for x in range(9):
        for width in range(1, 8):
            views.append(whole[x : 40 - x, x : x + width])
            source = to_host(views[-1])[..., :3]
            wanted.append(cv2.resize(np.ascontiguousarray(source), (11, 13)).reshape(13, 11, -1))
    tensor, _ = Preprocess((13, 11), fit="stretch", dtype="uint8", layout="NHWC")(
        ImageBatch.from_arrays(views, color=color, device=device)
    )
    np.testing.assert_array_equal(to_host(tensor), np.broadcast_to(np.stack(wanted), tensor.shape))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize(("interpolation", "parity"), [("nearest", "cv2"), ("linear", "cv2"), ("linear", "fast")])
def test_both_devices_give_the_same_bits(rng, dtype, interpolation, parity):
    """Floats included: no multiply-add is fused on either device."""
    images = [random_image(rng, h, w) for h, w in [*SIZES, (1080, 1920)]]
    scale = 1 if dtype == "uint8" else 1 / 255
    pre = Preprocess(
        (65, 130), dtype=dtype, parity=parity, interpolation=interpolation, scale=scale, mean=0.4, std=(0.2, 0.3, 0.7)
    )
    results = [to_host(pre(ImageBatch.from_arrays(images, device=device))[0]) for device in ("cpu", "cuda")]
    np.testing.assert_array_equal(*results)


@pytest.mark.needs_cuda
def test_one_launch_and_no_upload_for_known_sizes(rng):
    """A second batch of the same sizes launches one kernel and copies nothing."""
    import cupy

    pre = Preprocess((64, 64), dtype="float16")
    batch = ImageBatch.from_arrays([random_image(rng, 50, 60)] * 3, device="cuda")
    out, _ = pre(batch)
    graph_stream = cupy.cuda.Stream(non_blocking=True)
    wanted = to_host(out)
    cupy.cuda.get_current_stream().synchronize()
    batch._stream = graph_stream  # the batch is complete; capture must not look back at the default stream
    with graph_stream:
        pre(batch, out=out)  # uploads this stream's table
        graph_stream.synchronize()
        out.fill(0)
        graph_stream.begin_capture()  # any upload, allocation or wait would end the capture with an error
        pre(batch, out=out)
        graph = graph_stream.end_capture()
        graph.launch(graph_stream)
        graph_stream.synchronize()
    np.testing.assert_array_equal(to_host(out), wanted)


def test_more_bad_arguments_say_what_was_expected(rng):
    image = random_image(rng, 5, 5)
    pre = Preprocess((8, 8))
    with pytest.raises(InputError, match="images are a NoneType"):
        pre(None)
    for boxes in ("abc", [[1, 2], [3]]):
        with pytest.raises(InputError, match="boxes are no array of numbers"):
            pre([image], boxes=boxes)
    out = np.zeros((1, 3, 8, 8), np.float32)
    out.setflags(write=False)
    with pytest.raises(InputError, match="read-only"):
        pre([image], out=out)


def test_out_in_the_images_memory_is_refused(device, rng):
    """Written while it is read, the result would depend on the order of threads."""
    memory = on(device, rng.integers(0, 256, 3 * 64 * 64 + 12, dtype=np.uint8))
    image = memory[12:].reshape(64, 64, 3)
    pre = Preprocess((2, 2), dtype="uint8", layout="NHWC")
    with pytest.raises(InputError, match="out shares memory with the images"):
        pre(image, out=memory[6:18].reshape(1, 2, 2, 3))
    beside = memory[:12].reshape(1, 2, 2, 3)
    assert pre(image, out=beside)[0] is beside


@pytest.mark.needs_cuda
@pytest.mark.parametrize("boxes", [None, [[0, 0, 20, 30], [5, 6, 50, 37], [1, 1, 2, 2]]])
def test_a_launch_is_captured_in_a_graph(rng, boxes):
    """After a call that compiled it: nothing in a call waits, copies from the host, or allocates anew."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        batch = ImageBatch.from_arrays([random_image(rng, *size) for size in SIZES], device="cuda")
        options = {} if boxes is None else {"boxes": cupy.array(boxes, np.float32), "box_images": cupy.array([4, 3, 5])}
        pre = Preprocess((40, 52), scale=1 / 255)
        wanted = to_host(pre(batch, **options)[0])
        out = cupy.zeros(wanted.shape, np.float32)
        pre(batch, out=out, **options)
        out.fill(0)
        stream.begin_capture()
        pre(batch, out=out, **options)
        graph = stream.end_capture()
        assert not to_host(out).any()
        graph.launch()
        np.testing.assert_array_equal(to_host(out), wanted)
