"""Preprocess.warp: what the eager warps make, and what plans make of it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from reference import on, random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import ImageBatch
from nbvision.ops import adjust

PHOTOGRAPHS = [(60, 90), (33, 21), (5, 4), (1, 1)]


def some_matrices(rng, count, lines=2):
    """Turned, scaled and moved; of three lines also seen from the side."""
    matrices = []
    for _ in range(count):
        matrix = nbv.rotation_matrix(rng.uniform(0, 50, 2), rng.uniform(-180, 180), rng.uniform(0.3, 3))
        matrix[:, 2] += rng.uniform(-9, 9, 2)
        matrices.append(np.vstack([matrix, [*rng.uniform(-0.003, 0.003, 2), 1]])[:lines] if lines == 3 else matrix)
    return np.array(matrices)


@pytest.mark.parametrize("interpolation", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("border", ["constant", "replicate", "reflect"])
@pytest.mark.parametrize("lines", [2, 3])
def test_a_plan_warps_as_the_eager_functions_do(device, rng, interpolation, border, lines):
    """The same bytes, several canvases of an image, ragged."""
    images = [random_image(rng, *size) for size in PHOTOGRAPHS]
    batch = ImageBatch.from_arrays(images, device=device)
    matrices, owners = some_matrices(rng, 7, lines), np.array([0, 1, 2, 3, 0, 1, 0])
    options = {"interpolation": interpolation, "fill": (7, 8, 9)}
    pre = nbv.Preprocess((40, 52), dtype="uint8", layout="NHWC", **options)
    found = to_host(pre.warp(batch, matrices, matrix_images=owners, border=border))
    eager = nbv.warp_affine if lines == 2 else nbv.warp_perspective
    wanted = [
        to_host(eager(batch[int(owner)], matrix, (40, 52), border=border, **options))
        for owner, matrix in zip(owners, matrices, strict=True)
    ]
    np.testing.assert_array_equal(found, np.stack(wanted))


def test_a_warp_is_normalized_like_a_crop(device, rng):
    """Order of channels, scale, mean and std; fill in the order of the output. Matrices and images on the device."""
    image = random_image(rng, 60, 90)
    matrices, options = some_matrices(rng, 3), {"mean": (0.1, 0.2, 0.3), "std": 0.5, "color": "bgr"}
    pre = nbv.Preprocess((40, 52), scale=1 / 255, fill=(7, 8, 9), **options)
    batch = ImageBatch.from_arrays([image, image], device=device)
    owners = on(device, np.array([1, 0, 1]))
    found = to_host(pre.warp(batch, on(device, matrices), matrix_images=owners))
    for canvas, matrix in zip(found, matrices, strict=True):
        colors = to_host(nbv.warp_affine(image, matrix, (40, 52), fill=(9, 8, 7)))[..., ::-1].astype(np.float32)
        wanted = (colors / 255 - np.array([0.1, 0.2, 0.3])) / 0.5
        np.testing.assert_allclose(canvas.transpose(1, 2, 0), wanted, atol=1e-6)


def test_a_plan_aligns_faces_as_opencv_does(device, rng):
    """112 x 112 by a similarity, what face recognition wants: cv2.warpAffine's bytes but for its last columns."""
    image = random_image(rng, 480, 640)
    matrix = nbv.rotation_matrix((320, 200), 14, 0.4)
    matrix[:, 2] += (56 - 320, 60 - 200)
    pre = nbv.Preprocess((112, 112), dtype="uint8", layout="NHWC", fill=0)
    found = to_host(pre.warp(on(device, image), matrix))[0]
    wanted = cv2.warpAffine(image, matrix, (112, 112))
    np.testing.assert_array_equal(found[:, :80], wanted[:, :80])
    inverted = cv2.invertAffineTransform(matrix)
    np.testing.assert_array_equal(to_host(pre.warp(on(device, image), inverted, inverse=True))[0], found)


def test_pixel_functions_gray_and_other_sources_of_a_warp(device, rng):
    """What follows the sampling is the plan's own: chain, gray, gray sources."""
    image = random_image(rng, 30, 40)
    matrix = some_matrices(rng, 1)[0]
    options = {"dtype": "uint8", "layout": "NHWC"}
    inverted = nbv.Preprocess((16, 20), pixel=adjust.invert, fill=3, **options)
    plain = nbv.Preprocess((16, 20), fill=252, **options)
    found = inverted.warp(on(device, 255 - image), matrix)
    np.testing.assert_array_equal(to_host(found), to_host(plain.warp(on(device, image), matrix)))
    gray = nbv.Preprocess((16, 20), dtype="uint8", color="gray", fill=50)
    for color in ("rgb", "bgr"):
        colored = ImageBatch.from_arrays([image], color=color, device=device)
        canvas = to_host(
            nbv.Preprocess((16, 20), dtype="uint8", layout="NHWC", color=color, fill=50).warp(colored, matrix)
        )[0]
        code = cv2.COLOR_RGB2GRAY if color == "rgb" else cv2.COLOR_BGR2GRAY
        np.testing.assert_array_equal(to_host(gray.warp(colored, matrix))[0, 0], cv2.cvtColor(canvas, code))
    one = ImageBatch.from_arrays([image[..., 1]], color="gray", device=device)
    np.testing.assert_array_equal(
        to_host(plain.warp(one, matrix))[0, ..., 2],
        to_host(nbv.warp_affine(image[..., 1].copy(), matrix, (16, 20), fill=252)),
    )


@pytest.mark.needs_cuda
@pytest.mark.parametrize("interpolation", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_both_devices_warp_to_the_same_bits(rng, interpolation, channels):
    images = [random_image(rng, *size, channels) for size in PHOTOGRAPHS]
    matrices, owners = some_matrices(rng, 9, 3), rng.integers(0, 4, 9)
    pre = nbv.Preprocess((50, 66), dtype="float16", scale=1 / 255, interpolation=interpolation, fill=11)
    color = {1: "gray", 3: "rgb", 4: "rgba"}[channels]
    batches = [ImageBatch.from_arrays(images, color=color, device=where) for where in ("cpu", "cuda")]
    host, gpu = (to_host(pre.warp(batch, matrices, matrix_images=owners, border="reflect")) for batch in batches)
    np.testing.assert_array_equal(gpu, host)


@pytest.mark.needs_cuda
def test_a_matrix_on_the_device_that_is_none_gives_fill(rng):
    batch = ImageBatch.from_arrays([random_image(rng, 9, 9)], device="cuda")
    matrices = on("cuda", np.array([np.zeros((2, 3)), np.eye(2, 3), np.eye(2, 3)]))
    found = nbv.Preprocess((4, 4), dtype="uint8", fill=77).warp(
        batch, matrices, matrix_images=on("cuda", np.array([0, 5, -1]))
    )
    assert (to_host(found) == 77).all()


def test_warps_of_a_plan_say_what_does_not_fit(device, rng):
    image = on(device, random_image(rng, 8, 8))
    pre = nbv.Preprocess((4, 4))
    for call, message in [
        (lambda: pre.warp(image, np.eye(3, 4)), "matrix has shape"),
        (lambda: pre.warp([image, image], np.zeros((3, 2, 3))), r"or \(2, 2, 3\), one for each"),
        (lambda: pre.warp(image, np.zeros((2, 3))), "cannot be inverted"),
        (lambda: pre.warp(image, np.eye(2, 3), matrix_images=[1]), "matrix_images go from 1 to 1; the batch has 1"),
        (lambda: pre.warp(image, np.eye(2, 3), matrix_images=[0.5]), "expected \\(M,\\) integers"),
        (lambda: pre.warp(image, np.eye(2, 3), border="wrap"), "border is 'wrap'"),
        (lambda: nbv.Preprocess((4, 4), parity="pil").warp(image, np.eye(2, 3)), "warps have 'linear'"),
        (lambda: nbv.Preprocess((4, 4), interpolation="area").warp(image, np.eye(2, 3)), "interpolation 'area'"),
        (lambda: pre.warp(image.astype(np.float32), np.eye(2, 3)), "the images are HWC float32"),
        (lambda: pre.warp(image, np.eye(2, 3), out=on(device, np.zeros((1, 4, 4), np.float32))), "out has shape"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert pre.warp([], np.zeros((0, 2, 3))).shape == (0, 3, 4, 4)
