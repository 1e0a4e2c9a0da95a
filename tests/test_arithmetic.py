"""Arithmetic on images against OpenCV and NumPy."""

from __future__ import annotations

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import on, random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import ImageBatch

SIZES = [(1, 1), (3, 5), (31, 18), (7, 64), (120, 161)]
MODES = {
    "binary": cv2.THRESH_BINARY,
    "binary_inv": cv2.THRESH_BINARY_INV,
    "trunc": cv2.THRESH_TRUNC,
    "tozero": cv2.THRESH_TOZERO,
    "tozero_inv": cv2.THRESH_TOZERO_INV,
}
every_size = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def batches(rng, device, channels):
    """Two ragged batches of one shape, one of them with gaps between its lines."""
    color = {1: "gray", 3: "rgb", 4: "rgba"}[channels]
    images = [random_image(rng, *size, channels) for size in SIZES]
    wide = [on(device, random_image(rng, height, width + 3, channels))[:, 2 : width + 2] for height, width in SIZES]
    return (
        ImageBatch.from_arrays(images, color=color, device=device),
        ImageBatch.from_arrays(wide, color=color, device=device),
    )


def of_opencv(batch, function, *others):
    for index, image in enumerate(batch):
        arrays = [np.ascontiguousarray(to_host(other[index])) for other in others]
        yield function(np.ascontiguousarray(to_host(image)), *arrays).reshape(image.shape)


@every_size
@given(
    st.floats(-300, 600),
    st.floats(-50, 400),
    st.sampled_from(list(MODES)),
    st.sampled_from([1, 3, 4]),
    st.integers(0, 99),
)
def test_threshold(device, threshold, max_value, mode, channels, seed):
    image = random_image(np.random.default_rng(seed), 9, 31, channels)
    wanted = cv2.threshold(image, threshold, max_value, MODES[mode])[1].reshape(image.shape)
    found = nbv.threshold(on(device, image), threshold, max_value=max_value, mode=mode)
    np.testing.assert_array_equal(to_host(found), wanted)


@every_size
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-300, 300), st.integers(0, 2**32))
def test_add_weighted(device, alpha, beta, gamma, seed):
    rng = np.random.default_rng(seed)
    first, second = (random_image(rng, 23, 67, 3) for _ in range(2))
    wanted = cv2.addWeighted(first, alpha, second, beta, gamma)
    found = nbv.add_weighted(on(device, first), alpha, on(device, second), beta, gamma)
    np.testing.assert_array_equal(to_host(found), wanted)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_ragged_batches(device, rng, channels):
    first, second = batches(rng, device, channels)
    for one, other in ((first, second), (second, first)):
        found = nbv.add_weighted(one, 0.7, other, 0.6, -20)
        for image, wanted in zip(
            found, of_opencv(one, lambda a, b: cv2.addWeighted(a, 0.7, b, 0.6, -20), other), strict=True
        ):
            np.testing.assert_array_equal(to_host(image), wanted)
        found = nbv.threshold(one, 99, mode="tozero")
        for image, wanted in zip(found, of_opencv(one, lambda a: cv2.threshold(a, 99, 0, 3)[1]), strict=True):
            np.testing.assert_array_equal(to_host(image), wanted)
        table = rng.integers(0, 256, (256, channels), dtype=np.uint8)
        found = nbv.lut(one, on(device, table))
        for image, given_image in zip(found, one, strict=True):
            wanted = np.stack([table[to_host(given_image)[..., c], c] for c in range(channels)], -1)
            np.testing.assert_array_equal(to_host(image), wanted)
        np.testing.assert_array_equal(to_host(nbv.lut(one, table[:, 0].copy())[4]), table[:, 0][to_host(one[4])])


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_blend(device, rng, channels, dtype):
    first, second = batches(rng, device, channels)
    shares = [rng.random(size, np.float32) for size in SIZES]
    if dtype == "bool":
        masks = [share > 0.5 for share in shares]
        shares = [mask.astype(np.float32) for mask in masks]
    elif dtype == "uint8":
        masks = [np.rint(share * 255).astype(np.uint8) for share in shares]
        shares = [mask / np.float32(255) for mask in masks]
    else:
        masks = shares
    found = nbv.blend(first, second, [on(device, mask) for mask in masks])
    for image, one, other, share in zip(found, first, second, shares, strict=True):
        one, other = (to_host(array).astype(np.float32) for array in (one, other))
        np.testing.assert_array_equal(to_host(image), np.rint(other + (one - other) * share[..., None]))


def test_blend_of_bytes_is_pillows_composite(device, rng):
    one, other, mask = random_image(rng, 200, 300), random_image(rng, 200, 300), random_image(rng, 200, 300, 1)[..., 0]
    pictures = [PIL.Image.fromarray(array) for array in (one, other, mask)]
    found = nbv.blend(*(on(device, array) for array in (one, other, mask)))
    np.testing.assert_array_equal(to_host(found), np.asarray(PIL.Image.composite(*pictures)))


def test_shares_beyond_all_and_nothing(device):
    """Limited, NaN too, on both devices alike."""
    mask = np.array([[-2, -np.inf, np.nan, 0.5, 7, np.inf]], np.float32)
    one, other = np.full((1, 6), 200, np.uint8), np.full((1, 6), 100, np.uint8)
    found = nbv.blend(on(device, one), on(device, other), on(device, mask))
    assert to_host(found).tolist() == [[100, 100, 100, 150, 200, 200]]


def test_blend_of_all_and_nothing_is_the_image_itself(device, rng):
    one, other = random_image(rng, 20, 33), random_image(rng, 20, 33)
    for share, wanted in [(1, one), (0, other)]:
        for mask in (np.full((20, 33), share, bool), np.full((20, 33), share, np.float32)):
            found = nbv.blend(on(device, one), on(device, other), on(device, mask))
            np.testing.assert_array_equal(to_host(found), wanted)


def test_out_and_stacks(device, rng):
    stack = np.stack([random_image(rng, 6, 7) for _ in range(3)])
    out = on(device, np.zeros_like(stack))
    assert nbv.add_weighted(on(device, stack), 0.5, on(device, stack[::-1].copy()), 0.5, out=out) is out
    np.testing.assert_array_equal(to_host(out)[0], cv2.addWeighted(stack[0], 0.5, stack[2], 0.5, 0))
    with pytest.raises(InputError, match="out shares memory with the images"):
        nbv.add_weighted(on(device, stack), 0.5, out, 0.5, out=out)
    assert nbv.threshold(on(device, stack[..., 0].copy().reshape(3, 6, 7, 1)), 3).shape == (3, 6, 7, 1)
    assert nbv.threshold([], 3).shape[0] == 0


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_normalize_keeps_the_order_of_channels(device, rng, color, layout):
    channels = 1 if color == "gray" else 3
    images = [random_image(rng, 13, 18, channels) for _ in range(3)]
    mean, std = (0.4, 0.5) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = ImageBatch.from_arrays(images, color=color, device=device)
    found = to_host(nbv.normalize(batch, mean, std, layout=layout))
    wanted = (np.stack(images).astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(found, wanted.transpose(0, 3, 1, 2) if layout == "NCHW" else wanted, atol=2e-6)


def test_normalize_of_arrays_and_of_several_sizes(device, rng):
    image = random_image(rng, 13, 18)
    assert nbv.normalize(on(device, image), 0.5, 0.5, dtype="float16").dtype == np.float16
    assert nbv.normalize(on(device, image[..., 0].copy()), 0.5, 0.5).shape == (1, 1, 13, 18)
    with pytest.raises(InputError, match="expected one size: Preprocess resizes"):
        nbv.normalize([on(device, image), on(device, image[:5])], 0, 1)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float16", "float32"])
def test_convert(device, rng, dtype):
    """OpenCV's convertTo where it has the dtype: halves go to even, what is too much stays at the limit."""
    values = np.concatenate([rng.normal(0, 300, 500), np.arange(-6, 6) / 2]).astype(np.float32)
    found = nbv.convert(on(device, values), dtype, scale=1.5, bias=3)
    assert found.dtype == dtype
    scaled = values * np.float32(1.5) + np.float32(3)
    if dtype.startswith("float"):
        np.testing.assert_array_equal(to_host(found), scaled.astype(dtype))
    else:
        limits = np.iinfo(dtype)
        np.testing.assert_array_equal(to_host(found), np.clip(np.rint(scaled), limits.min, limits.max))
    with pytest.raises(InputError, match="dtype is int64; expected uint8"):
        nbv.convert(on(device, values), np.int64)


def test_bad_input(device, rng):
    one, other = on(device, random_image(rng, 4, 5)), on(device, random_image(rng, 5, 4))
    mask = on(device, np.ones((4, 5), bool))
    for call, message in [
        (lambda: nbv.add_weighted(one, 1, other, 1), r"second has sizes \[\[5, 4\]\]"),
        (lambda: nbv.add_weighted(one, 1, one[..., 0], 1), "and 1 channels"),
        (lambda: nbv.add_weighted(one, float("nan"), one, 1), "alpha is nan"),
        (
            lambda: nbv.blend(one, one, mask[:3]),
            r"expected one channel of bool, uint8 or float32 and sizes \[\[4, 5\]\]",
        ),
        (lambda: nbv.blend(one, one, mask.astype(np.float16)), "mask is gray float16"),
        (lambda: nbv.threshold(one, 3, mode="otsu"), "mode is 'otsu'; expected one of"),
        (lambda: nbv.lut(one, np.zeros((256, 2), np.uint8)), r"expected \(256,\) or \(256, 3\) uint8"),
        (lambda: nbv.lut(one, np.zeros(256)), "dtype float64"),
        (lambda: nbv.threshold(one.astype(np.float32), 3), "the images are HWC float32"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
