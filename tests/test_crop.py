"""crop, center_crop and pad against NumPy, OpenCV and torchvision's rounding."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import on, random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import ImageBatch

any_size = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BORDERS = {"constant": cv2.BORDER_CONSTANT, "replicate": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101}


def test_crops_share_the_image(device, rng):
    images = [on(device, random_image(rng, 30, 40)), on(device, random_image(rng, 9, 8))]
    batch = ImageBatch.from_arrays(images)
    boxes = np.array([[1.5, 2, 10.2, 20], [-5, -5, 3, 400], [0, 0, 8, 9]], np.float32)
    crops = nbv.crop(batch, boxes, box_images=[0, 0, 1])
    for found, wanted in zip(crops, [images[0][2:20, 1:11], images[0][:, :3], images[1]], strict=True):
        np.testing.assert_array_equal(to_host(found), to_host(wanted))
    images[0][5, 2] = 77
    assert (to_host(crops[0])[3, 1] == 77).all()


def test_crop_is_what_preprocess_crops(device, rng):
    """The same rounding of boxes: a crop resized alone is the crop of the fused kernel."""
    image = on(device, random_image(rng, 60, 70))
    boxes = np.sort(rng.uniform(-5, 70, (20, 2, 2)), axis=1).reshape(20, 4).astype(np.float32)
    boxes = boxes[(boxes[:, 0] < 70) & (boxes[:, 1] < 60) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)]
    pre = nbv.Preprocess((16, 16), fit="stretch", dtype="uint8")
    fused, _ = pre(image, boxes=boxes)
    cropped, _ = pre(nbv.crop(image, boxes))
    np.testing.assert_array_equal(to_host(fused), to_host(cropped))


def test_boxes_that_are_none(device, rng):
    image = on(device, random_image(rng, 8, 8))
    for box in ([3, 3, 3, 5], [5, 5, 2, 2], [np.nan, 0, 1, 1], [8, 0, 9, 1], [-3, -3, 0, 4]):
        with pytest.raises(InputError, match=r"box 1 is .* expected x1 < x2"):
            nbv.crop(image, [[0, 0, 1, 1], box])
    assert len(nbv.crop(image, np.zeros((0, 4)))) == 0
    with pytest.raises(InputError, match="box_images is missing"):
        nbv.crop([image, image], [[0, 0, 1, 1]])


@pytest.mark.needs_cuda
def test_boxes_on_a_gpu_are_for_preprocess(rng):
    image = on("cuda", random_image(rng, 8, 8))
    with pytest.raises(InputError, match=r"Preprocess\(size\)\(images, boxes=boxes\)"):
        nbv.crop(image, on("cuda", np.array([[0, 0, 4, 4]], np.float32)))


def torchvision_center_crop(image, size):
    """Its formula, in NumPy: pad by halves, the odd one below and right; then round the corner half to even."""
    lines, columns = max(size[0] - image.shape[0], 0), max(size[1] - image.shape[1], 0)
    sides = ((lines // 2, (lines + 1) // 2), (columns // 2, (columns + 1) // 2), (0, 0))
    padded = np.pad(image, sides)
    top = round((padded.shape[0] - size[0]) / 2.0)
    left = round((padded.shape[1] - size[1]) / 2.0)
    return padded[top : top + size[0], left : left + size[1]]


@any_size
@given(st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 40)] * 2), st.sampled_from([1, 3, 4]))
def test_center_crop(device, source, size, channels):
    image = random_image(np.random.default_rng(5), *source, channels)
    found = nbv.center_crop(on(device, image), size)
    np.testing.assert_array_equal(to_host(found), torchvision_center_crop(image, size))


def test_center_crop_of_batches(device, rng):
    images = [random_image(rng, 9, 30), random_image(rng, 20, 5)]
    found = nbv.center_crop(ImageBatch.from_arrays(images, color="bgr", device=device), (10, 12))
    assert found.color == "bgr"
    for part, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(to_host(part), torchvision_center_crop(image, (10, 12)))
    gray = on(device, np.arange(20, dtype=np.uint8).reshape(4, 5))
    assert to_host(nbv.center_crop(gray, (2, 1))).tolist() == [[7], [12]]


@any_size
@given(
    st.tuples(*[st.integers(5, 40)] * 2),
    st.tuples(*[st.integers(0, 4)] * 4),
    st.sampled_from(list(BORDERS)),
    st.sampled_from([1, 3, 4]),
)
def test_pad(device, source, padding, mode, channels):
    image = random_image(np.random.default_rng(6), *source, channels)
    wanted = cv2.copyMakeBorder(image, *padding, BORDERS[mode], value=[9, 8, 7, 6][:channels])
    fill = [9, 8, 7, 6][:channels]
    found = nbv.pad(on(device, image), padding, mode=mode, fill=fill)
    np.testing.assert_array_equal(to_host(found), wanted.reshape(found.shape))


def test_pad_of_ragged_batches_and_far_borders(device, rng):
    images = [random_image(rng, 3, 4), random_image(rng, 50, 2), random_image(rng, 1, 1)]
    for mode in ("constant", "replicate"):
        found = nbv.pad(ImageBatch.from_arrays(images, device=device), (70, 3, 0, 200), mode=mode, fill=4)
        for part, image in zip(found, images, strict=True):
            wanted = cv2.copyMakeBorder(image, 70, 3, 0, 200, BORDERS[mode], value=(4, 4, 4))
            np.testing.assert_array_equal(to_host(part), wanted)
    same = nbv.pad(on(device, images[1]), 0)
    np.testing.assert_array_equal(to_host(same), images[1])


def test_pad_says_what_does_not_fit(device, rng):
    image = on(device, random_image(rng, 4, 6))
    for padding in (-1, (1, 2), (1, 2, 3, -4), 1.5, "all"):
        with pytest.raises(InputError, match="padding is"):
            nbv.pad(image, padding)
    with pytest.raises(InputError, match="mode is 'wrap'; expected one of"):
        nbv.pad(image, 1, mode="wrap")
    with pytest.raises(InputError, match="image 0 is 4 x 6; 'reflect' takes fewer lines"):
        nbv.pad(image, (4, 0, 0, 0), mode="reflect")
    with pytest.raises(InputError, match="fill is"):
        nbv.pad(image, 1, fill=300)
