"""NV12 frames against OpenCV's cvtColor and resize, and the matrices against their float formulas."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from reference import INTERPOLATIONS, TOLERANCE, letterbox_placement, on, preprocess_u8, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import ImageBatch, as_batch
from nbvision.ops.preprocess import Preprocess

# Shares of red and blue in luma, and whether luma and chroma use the whole range.
STANDARDS = {
    "bt601": (0.299, 0.114, False),
    "bt601-full": (0.299, 0.114, True),
    "bt709": (0.2126, 0.0722, False),
    "bt709-full": (0.2126, 0.0722, True),
}


def random_frame(rng, height, width):
    return rng.integers(0, 256, (height * 3 // 2, width), dtype=np.uint8)


def random_size(rng, most):
    return tuple(2 * int(length) for length in rng.integers(1, most // 2, 2))


def calm_frame(rng, height, width):
    """A frame of soft colours, none of which saturates."""
    luma = cv2.resize(rng.integers(90, 160, (5, 5), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    chroma = cv2.resize(rng.integers(110, 146, (5, 5, 2), dtype=np.uint8), (width // 2, height // 2))
    return np.concatenate([luma, chroma.reshape(height // 2, width)])


def rgb_of(frame):
    return cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_NV12)


def yuv_of(frame):
    """(H, W, 3) float64: each pixel's luma and chroma."""
    height = frame.shape[0] * 2 // 3
    chroma = frame[height:].reshape(height // 2, -1, 2).repeat(2, 0).repeat(2, 1)
    return np.concatenate([frame[:height, :, None], chroma], axis=2).astype(np.float64)


def float_rgb(yuv, standard):
    """The standard's own formula in float64, saturated, not rounded."""
    kr, kb, full = STANDARDS[standard]
    luma = yuv[..., 0] / 255 if full else np.maximum(yuv[..., 0] - 16, 0) / 219
    blue_minus_luma, red_minus_luma = np.moveaxis((yuv[..., 1:] - 128) / (255 if full else 224), -1, 0)
    red, blue = luma + 2 * (1 - kr) * red_minus_luma, luma + 2 * (1 - kb) * blue_minus_luma
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue], -1), 0, 1) * 255


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_cv2_parity_is_bit_exact(device, rng, fit, interpolation):
    """Noise, which saturates everywhere, up and down, in ragged batches: no value differs from cvtColor and resize."""
    differing = 0
    for _ in range(15):
        size = (int(rng.integers(1, 400)), int(rng.integers(1, 400)))
        frames = [random_frame(rng, *random_size(rng, 700)) for _ in range(20)]
        pre = Preprocess(size, fit=fit, interpolation=interpolation, dtype="uint8", layout="NHWC")
        tensor, _ = pre(ImageBatch.from_arrays(frames, color="nv12", device=device))
        for frame, canvas in zip(frames, to_host(tensor), strict=True):
            wanted = preprocess_u8(rgb_of(frame), size, fit=fit, interpolation=interpolation)
            differing += int((canvas != wanted).sum())
    assert differing == 0


@pytest.mark.parametrize("size", [(640, 640), (608, 352), (224, 224), (1, 1), (17, 1023)])
def test_cv2_parity_at_sizes_people_use(device, rng, size):
    frames = [random_frame(rng, height, width) for height, width in [(1080, 1920), (720, 1280), (2, 2), (2, 3000)]]
    batch = ImageBatch.from_arrays(frames, color="nv12", device=device)
    tensor, _ = Preprocess(size, dtype="uint8", layout="NHWC")(batch)
    for frame, canvas in zip(frames, to_host(tensor), strict=True):
        np.testing.assert_array_equal(canvas, preprocess_u8(rgb_of(frame), size, fit="letterbox"))


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("boxes_on", ["host", "device"])
def test_regions_of_any_origin(device, rng, boxes_on, interpolation):
    """Odd and even corners and lengths, down to one pixel at each border: the chroma stays the picture's."""
    frame = random_frame(rng, 20, 24)
    corners = [
        (x, y, x + width, y + height)
        for x, y, width, height in itertools.product(range(5), range(3), (1, 2, 5), (1, 4))
    ]
    corners += [(24 - width, 20 - height, 24, 20) for width in (1, 2, 3, 7) for height in (1, 2, 3)]
    boxes = np.array(corners, np.float32)
    pre = Preprocess((13, 11), fit="stretch", interpolation=interpolation, dtype="uint8", layout="NHWC")
    batch = ImageBatch.from_arrays([frame], color="nv12", device=device)
    tensor, geometry = pre(batch, boxes=boxes if boxes_on == "host" else on(device, boxes))
    assert to_host(geometry.valid).all()
    picture = rgb_of(frame)
    for (x1, y1, x2, y2), got in zip(corners, to_host(tensor), strict=True):
        crop = np.ascontiguousarray(picture[y1:y2, x1:x2])
        np.testing.assert_array_equal(got, cv2.resize(crop, (11, 13), interpolation=INTERPOLATIONS[interpolation]))


@pytest.mark.parametrize("margin", range(8))
def test_any_address_and_pitch(device, rng, margin):
    """Frames inside wider memory, at each alignment; every other byte of that memory is of another value."""
    frames, views = [], []
    for width, padding in itertools.product((2, 4, 6, 22), (7, 8)):
        memory = np.full((30, width + margin + padding), 255, np.uint8)
        memory[:, margin : margin + width] = random_frame(rng, 20, width)
        frames.append(memory[:, margin : margin + width])
        views.append(on(device, memory)[:, margin : margin + width])
    batch = ImageBatch.from_arrays(views, color="nv12", device=device)
    pitches = to_host(batch.table)[:, 1].tolist()
    for view, pitch in zip(views, pitches, strict=True):  # wrapped where a chroma's two bytes are one load
        assert pitch == (view.shape[1] if margin % 2 or view.strides[0] % 2 else view.strides[0])
    tensor, _ = Preprocess((15, 19), fit="stretch", dtype="uint8", layout="NHWC")(batch)
    for frame, got in zip(frames, to_host(tensor), strict=True):
        np.testing.assert_array_equal(got, cv2.resize(rgb_of(np.ascontiguousarray(frame)), (19, 15)))


def test_views_whose_rows_are_not_dense_are_copied(device, rng):
    whole = random_frame(rng, 40, 60)
    views = [on(device, whole)[:, ::2], on(device, whole)[::-1]]
    tensor, _ = Preprocess((9, 9), fit="stretch", dtype="uint8", layout="NHWC")(as_batch(views, color="nv12"))
    for view, got in zip(views, to_host(tensor), strict=True):
        picture = rgb_of(np.ascontiguousarray(to_host(view)))
        np.testing.assert_array_equal(got, cv2.resize(picture, (9, 9)))


@pytest.mark.parametrize("parity", ["cv2", "fast"])
@pytest.mark.parametrize("standard", STANDARDS)
def test_matrices_are_the_standards(device, standard, parity):
    """Every luma with chroma in steps of 5, one frame pixel an output pixel: within a level of the float formula."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    u, v = np.meshgrid(levels, levels)
    luma = np.arange(256, dtype=np.uint8)[:, None].repeat(2 * u.size, 1)
    chroma = np.stack([u.ravel(), v.ravel()], -1).reshape(1, -1).repeat(128, 0)
    frame = np.concatenate([luma, chroma])
    pre = Preprocess(luma.shape, fit="stretch", layout="NHWC", parity=parity)
    tensor, _ = pre(ImageBatch.from_arrays([frame], color="nv12", yuv=standard, device=device))
    error = np.abs(to_host(tensor)[0] - float_rgb(yuv_of(frame), standard)).max()
    rounded_factors = 0.2 if standard == "bt601" else 0  # OpenCV's have three decimals
    assert error <= (1e-3 + rounded_factors if parity == "fast" else 0.51 + rounded_factors)


@pytest.mark.parametrize("standard", STANDARDS)
def test_gray_ramp_is_gray(device, standard):
    """Without chroma the channels are equal, black is 0 and white is 255."""
    low, high = (0, 255) if STANDARDS[standard][2] else (16, 235)
    luma = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)
    frame = np.concatenate([luma, np.full((1, 256), 128, np.uint8)])
    tensor, _ = Preprocess((2, 256), fit="stretch", dtype="uint8", layout="NHWC")(
        ImageBatch.from_arrays([frame], color="nv12", yuv=standard, device=device)
    )
    line = to_host(tensor)[0, 0].astype(int)
    assert (line == line[:, :1]).all()
    assert (np.diff(line[:, 0]) >= 0).all()
    assert (line[: low + 1] == 0).all()
    assert (line[high:] == 255).all()


@pytest.mark.parametrize("standard", STANDARDS)
def test_fast_is_the_formula_of_the_blended_values(device, rng, standard):
    """Noise: Y, U and V blended in float64 by OpenCV, and converted once."""
    frames = [random_frame(rng, *random_size(rng, 300)) for _ in range(8)]
    pre = Preprocess((97, 83), fit="stretch", parity="fast")
    tensor, _ = pre(ImageBatch.from_arrays(frames, color="nv12", yuv=standard, device=device))
    for frame, got in zip(frames, to_host(tensor), strict=True):
        blended = cv2.resize(yuv_of(frame), (83, 97))
        wanted = float_rgb(blended, standard).transpose(2, 0, 1)
        assert np.abs(got - wanted).max() <= (0.2 if standard == "bt601" else 0.01)


def test_fast_is_near_exact_where_nothing_saturates(device, rng):
    frames = [calm_frame(rng, *size) for size in [(480, 640), (1080, 1920), (34, 58)]]
    batch = ImageBatch.from_arrays(frames, color="nv12", device=device)
    exact, _ = Preprocess((160, 144))(batch)
    fast, _ = Preprocess((160, 144), parity="fast")(batch)
    assert np.abs(to_host(exact) - to_host(fast)).max() <= 1.5


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize(("color", "width"), [("rgb", 64), ("bgr", 63)])
def test_layouts_dtypes_and_channel_orders(device, rng, layout, dtype, color, width):
    frames = [random_frame(rng, *random_size(rng, 200)) for _ in range(5)]
    scale = 1.0 if dtype == "uint8" else 1 / 255
    mean, std = (0.0, 1.0) if dtype == "uint8" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    options = {"fill": (3, 14, 159), "scale": scale, "mean": mean, "std": std}
    pre = Preprocess((48, width), color=color, dtype=dtype, layout=layout, **options)
    tensor, _ = pre(as_batch(frames, color="nv12", device=device))
    assert tensor.shape == pre.output_shape(len(frames))
    for frame, got in zip(frames, to_host(tensor), strict=True):
        picture = rgb_of(frame)[..., :: 1 if color == "rgb" else -1]
        height, columns, top, left = letterbox_placement(*picture.shape[:2], (48, width))
        canvas = np.full((48, width, 3), (3, 14, 159), np.float64)
        canvas[top : top + height, left : left + columns] = cv2.resize(picture, (columns, height))
        wanted = (canvas * scale - np.asarray(mean)) / np.asarray(std)
        wanted = wanted if layout == "NHWC" else wanted.transpose(2, 0, 1)
        tolerance = TOLERANCE[dtype] / 0.224 * np.maximum(np.abs(wanted), 1)
        assert (np.abs(got.astype(np.float64) - wanted) <= tolerance).all()


def test_cover_and_pixel_functions_take_frames(device, rng):
    """Everything behind the sampler is the same as of the converted picture."""
    frame = random_frame(rng, 50, 90)
    picture = rgb_of(frame)

    @nbv.pixel
    def mixed(r, g, b):
        return r * 0.5, b, g

    for color in ("rgb", "bgr"):
        pre = Preprocess((24, 32), fit="cover", color=color, pixel=mixed, dtype="float32")
        got, _ = pre(ImageBatch.from_arrays([frame], color="nv12", device=device))
        wanted, _ = pre(ImageBatch.from_arrays([picture], device=device))
        np.testing.assert_array_equal(to_host(got), to_host(wanted))


def test_a_batch_is_the_same_from_one_array_and_from_several(device, rng):
    frames = np.stack([random_frame(rng, 30, 44) for _ in range(3)])
    batch = as_batch(on(device, frames), color="nv12", yuv="bt709")
    assert (len(batch), batch.color, batch.yuv, batch.device) == (3, "nv12", "bt709", device)
    assert batch.sizes.tolist() == [[30, 44]] * 3
    np.testing.assert_array_equal(to_host(batch[1]), frames[1])
    single = as_batch(on(device, frames[2]), color="nv12", yuv="bt709")
    assert (len(single), single.yuv) == (1, "bt709")
    pre = Preprocess((16, 16))
    whole = to_host(pre(batch)[0])
    np.testing.assert_array_equal(whole[2:], to_host(pre(single)[0]))
    np.testing.assert_array_equal(whole[[2, 0]], to_host(pre(batch.select([2, 0]))[0]))
    np.testing.assert_array_equal(whole, to_host(pre(batch.to("cpu"))[0]))
    assert "nv12 bt709" in repr(batch)
    assert as_batch(frames[0, :, :, None].repeat(3, 2)).yuv is None


def test_one_plan_serves_all_matrices_and_colors(device, rng):
    """What the plan keeps of one batch is not taken for another's."""
    frame = random_frame(rng, 30, 44)
    picture = rgb_of(frame)
    pre = Preprocess((16, 16), dtype="uint8")
    results = {}
    for _ in range(2):
        for standard in STANDARDS:
            got = to_host(pre(ImageBatch.from_arrays([frame], color="nv12", yuv=standard, device=device))[0])
            np.testing.assert_array_equal(got, results.setdefault(standard, got))
        rgb = to_host(pre(ImageBatch.from_arrays([picture], device=device))[0])
        np.testing.assert_array_equal(rgb, results["bt601"])
        gray = to_host(pre(ImageBatch.from_arrays([frame], color="gray", device=device))[0])
        assert (gray[:, 0] == gray[:, 2]).all()
    assert len({result.tobytes() for result in results.values()}) == 4


def test_an_empty_batch(device):
    batch = ImageBatch.from_arrays([], color="nv12", device=device)
    tensor, _ = Preprocess((8, 8))(batch)
    assert tensor.shape == (0, 3, 8, 8)


def test_bad_input_says_what_was_expected(device, rng):
    for shape, dtype in [
        ((10, 4), np.uint8),  # no thirds
        ((6, 5), np.uint8),
        ((6, 4, 1), np.uint8),
        ((6, 4), np.int16),
        ((0, 4), np.uint8),
        ((6, 0), np.uint8),
        ((6,), np.uint8),
    ]:
        with pytest.raises(InputError, match=r"image 0 has shape .* expected \(height \* 3 / 2, width\) uint8"):
            ImageBatch.from_arrays([on(device, np.zeros(shape, dtype))], color="nv12")
    frame = on(device, random_frame(rng, 4, 4))
    with pytest.raises(InputError, match="yuv is 'bt2020'; expected one of"):
        as_batch(frame, color="nv12", yuv="bt2020")
    with pytest.raises(InputError, match="the images are NV12; expected uint8 channels side by side"):
        nbv.draw(as_batch(frame, color="nv12"), np.zeros((0, 4), np.float32))
    with pytest.raises(InputError, match="color is 'nv12'; expected one of"):
        ImageBatch.allocate([(4, 4)], color="nv12", device=device)
    with pytest.raises(InputError, match="color is 'nv12'; expected one of"):
        nbv.decode([b""], color="nv12")


def test_explain_names_the_matrix(rng):
    pytest.importorskip("numba_cuda")
    frame = random_frame(rng, 90, 160)
    text = Preprocess((64, 64)).explain(as_batch(frame, color="nv12", yuv="bt709-full"), cc=(9, 0))
    assert "from NV12 bt709-full" in text
    read = (72 + 45) * 160  # two lines of luma for each of 36 output lines, and all chroma
    assert f"{read / 1e6:.1f} MB read" in text


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize(("interpolation", "parity"), [("nearest", "cv2"), ("linear", "cv2"), ("linear", "fast")])
def test_both_devices_and_kernels_give_the_same_bits(rng, dtype, interpolation, parity):
    """The CPU loop, the CUDA C frame and the Numba kernel: floats included, no multiply-add is fused."""
    from nbvision_kernels.catalog import preprocess_kernel
    from nbvision_kernels.codes import SOURCE_NV12

    from nbvision.runtime.compile import load_kernel

    frames = [random_frame(rng, *size) for size in [(2, 2), (34, 58), (480, 640), (1080, 1920)]]
    scale = 1 if dtype == "uint8" else 1 / 255
    pre = Preprocess((50, 66), dtype=dtype, parity=parity, interpolation=interpolation, scale=scale, fill=(1, 2, 3))
    batches = [ImageBatch.from_arrays(frames, color="nv12", yuv="bt709", device=where) for where in ("cpu", "cuda")]
    (on_host, _), (framed, geometry) = (pre(batch) for batch in batches)
    np.testing.assert_array_equal(to_host(framed), on_host)
    plain = on("cuda", np.zeros(framed.shape, framed.dtype))
    kernel = load_kernel(preprocess_kernel(*pre._types(batches[1]), source_type=SOURCE_NV12, frame=False))
    batch = batches[1]
    numbers = (*pre._int_size, *pre._channels(batch), *pre._gain, *pre._bias, *pre._fill, *pre._matrix(batch))
    tables = (batch.table, geometry.regions, geometry.steps, geometry.scales)
    kernel((3, 7, len(frames)), (32, 8, 1), (0, *tables, plain, *numbers))
    np.testing.assert_array_equal(to_host(plain), on_host)
