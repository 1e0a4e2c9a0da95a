"""Warps, flips and quarter turns against OpenCV and NumPy."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import on, to_host

from nbvision import ImageBatch, decode, flip, rotate, rotation_matrix, warp_affine, warp_perspective
from nbvision.errors import DecodeError, InputError

INTERPOLATIONS = {"nearest": cv2.INTER_NEAREST, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
BORDERS = {"constant": cv2.BORDER_CONSTANT, "replicate": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101}
FILL = (3, 200, 77, 255)
VECTOR = 32  # columns that OpenCV computes at once, at most; those behind the last full vector round differently

same_arithmetic = pytest.mark.skipif(
    int(cv2.__version__.split(".")[0]) < 5, reason="OpenCV 4 rounds positions to 1/32 of a pixel"
)


def noise(rng, height, width, channels=3):
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def random_matrix(rng, height, width, *, perspective):
    matrix = np.eye(3)
    matrix[:2, :2] += rng.normal(0, 0.4, (2, 2))
    matrix[:2, 2] = rng.uniform(-0.2, 0.4, 2) * [width, height]
    if perspective:
        matrix[2, :2] = rng.normal(0, 0.3, 2) / [width, height]
    return matrix


def by_opencv(image, matrix, size, *, interpolation="linear", border="constant", fill=FILL, inverse=False):
    flags = INTERPOLATIONS[interpolation] | (cv2.WARP_INVERSE_MAP if inverse else 0)
    warp = cv2.warpAffine if len(matrix) == 2 else cv2.warpPerspective
    fill = fill[: image.shape[2]]
    shape = (*size, image.shape[2])
    return warp(image, matrix, size[::-1], flags=flags, borderMode=BORDERS[border], borderValue=fill).reshape(shape)


def by_nbvision(device, image, matrix, size, *, fill=FILL, **options):
    warp = warp_affine if len(matrix) == 2 else warp_perspective
    return to_host(warp(on(device, image), matrix, size, fill=fill[: image.shape[2]], **options))


def differences(ours, theirs):
    """Levels by which values differ: in the columns of full vectors, and in the others."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    apart = np.abs(ours.astype(int) - theirs)
    full = ours.shape[1] // VECTOR * VECTOR
    return apart[:, :full], apart[:, full:]


# --- warps ------------------------------------------------------------------------------------------------------------


@same_arithmetic
@pytest.mark.parametrize("lines", [2, 3], ids=["affine", "perspective"])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_nearest_and_linear_are_opencvs_bytes(device, rng, interpolation, border, lines):
    for channels, inverse in ((1, False), (3, True), (4, False), (3, False)):
        height, width = (int(side) for side in rng.integers(90, 300, 2))
        image = noise(rng, height, width, channels)
        matrix = random_matrix(rng, height, width, perspective=lines == 3)[:lines]
        options = {"interpolation": interpolation, "border": border, "inverse": inverse}
        size = (int(rng.integers(50, 200)), int(rng.integers(50, 300)))
        theirs = by_opencv(image, matrix, size, **options)
        full, tail = differences(by_nbvision(device, image, matrix, size, **options), theirs)
        assert not full.any()
        if interpolation == "linear":
            assert tail.max(initial=0) <= 1
        assert np.mean(tail > 0) < 0.01
        assert len(np.unique(theirs)) > 200


@same_arithmetic
@pytest.mark.parametrize("lines", [2, 3], ids=["affine", "perspective"])
@pytest.mark.parametrize("border", BORDERS)
def test_cubic_is_opencvs_to_one_level(device, rng, border, lines):
    for channels in (1, 3, 4):
        image = noise(rng, 211, 257, channels)
        matrix = random_matrix(rng, 211, 257, perspective=False)
        matrix[2, :2] = (rng.normal(0, 0.05, 2) / 200) if lines == 3 else 0
        options = {"interpolation": "cubic", "border": border, "inverse": True}
        # Near the image: OpenCV's cubic reflects once only.
        matrix[:2, :2] = np.clip(matrix[:2, :2], -0.4, 0.7)
        theirs = by_opencv(image, matrix[:lines], (150, 222), **options)
        apart = np.abs(by_nbvision(device, image, matrix[:lines], (150, 222), **options).astype(int) - theirs)
        assert apart.max() <= 1
        assert np.mean(apart > 0) < 2e-3


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_whole_steps_only_move_pixels(device, rng, interpolation):
    """On any version of OpenCV."""
    image = noise(rng, 37, 53)
    matrix = np.array([[1, 0, 5], [0, 1, -3]], np.float64)
    expected = np.full((40, 60, 3), FILL[:3], np.uint8)
    expected[:34, 5:58] = image[3:]
    options = {"interpolation": interpolation, "fill": FILL}
    np.testing.assert_array_equal(by_nbvision(device, image, matrix, (40, 60), **options), expected)
    np.testing.assert_array_equal(by_opencv(image, matrix, (40, 60), **options), expected)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("border", BORDERS)
def test_one_pixel(device, rng, interpolation, border):
    image = noise(rng, 1, 1)
    matrix = [[7.3, 0.2, 11.1], [0.1, 5, 3]]
    result = to_host(warp_affine(on(device, image), matrix, (13, 40), interpolation=interpolation, border=border))
    if border == "constant":
        assert (result[3, 11] != 0).any()
        assert not result[:, 39].any()
    else:
        assert (result == image).all()


@pytest.mark.parametrize("border", ["replicate", "reflect"])
def test_far_outside(device, rng, border):
    """Against NumPy's index arithmetic; up to two million pixels away, which OpenCV refuses in part."""
    image = noise(rng, 9, 14)
    across, down = 1_500_001, -70_003
    matrix = [[1, 0, across], [0, 1, down]]
    x, y = np.arange(21) + across, np.arange(17) + down
    if border == "replicate":
        x, y = np.clip(x, 0, 13), np.clip(y, 0, 8)
    else:
        x, y = np.abs((x + 13) % 26 - 13), np.abs((y + 8) % 16 - 8)
    result = warp_affine(on(device, image), matrix, (17, 21), interpolation="nearest", border=border, inverse=True)
    np.testing.assert_array_equal(to_host(result), image[y][:, x])


@pytest.mark.parametrize("border", BORDERS)
def test_beyond_everything(device, rng, border):
    """Infinitely far is outside; 0 / 0 is nowhere."""
    image = noise(rng, 9, 14)
    options = {"border": border, "fill": 9, "inverse": True}
    far = to_host(warp_perspective(on(device, image), [[1, 0, 1], [0, 1, 1], [0, 0, 0]], (5, 6), **options))
    assert (far == (9 if border == "constant" else image[8, 13] if border == "replicate" else far[0, 0])).all()
    nowhere = to_host(warp_perspective(on(device, image), [[1, 0, 0], [0, 1, 0], [0, 0, 0]], (1, 1), **options))
    assert (nowhere == 9).all()
    huge = to_host(warp_affine(on(device, image), [[1e300, 0, 0], [0, 1e300, 0]], (4, 4), **options))
    assert (
        huge[1:, 1:] == (9 if border == "constant" else image[8, 13] if border == "replicate" else huge[1, 1])
    ).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_matrix_gives_values_of_the_image_or_the_fill(device, data):
    """No matrix, however odd, reads elsewhere: the image's bytes are all odd, everything around them even."""
    number = st.one_of(st.floats(-1e4, 1e4), st.sampled_from([0.0, 1.0, 1e-30, 1e30, -1e15, 65535.0]))
    matrix = np.array(data.draw(st.lists(number, min_size=9, max_size=9))).reshape(3, 3)
    border = data.draw(st.sampled_from(sorted(BORDERS)))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    frame = np.zeros((height + 4, width + 4, 3), np.uint8)
    frame[2:-2, 2:-2] = np.random.default_rng(1).integers(0, 128, (height, width, 3)) * 2 + 1
    image = on(device, frame)[2:-2, 2:-2]
    options = {"interpolation": "nearest", "border": border, "fill": 7, "inverse": True}
    assert (to_host(warp_perspective(image, matrix, (7, 33), **options)) % 2 == 1).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(degrees=st.floats(-720, 720), scale=st.floats(0.2, 4), x=st.floats(-50, 90), y=st.floats(-50, 90))
def test_rotation_matrix_is_opencvs(degrees, scale, x, y):
    expected = cv2.getRotationMatrix2D((np.float32(x).item(), np.float32(y).item()), degrees, scale)
    ours = rotation_matrix((np.float32(x).item(), np.float32(y).item()), degrees, scale)
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_inverse_undoes(device, rng):
    image = cv2.GaussianBlur(noise(rng, 120, 150), (0, 0), 4)
    matrix = rotation_matrix((75, 60), 25, 1.3)
    there = warp_affine(on(device, image), matrix, (120, 150))
    back = to_host(warp_affine(there, matrix, (120, 150), inverse=True))
    inner = np.abs(back.astype(int) - image)[45:75, 60:90]
    assert inner.max() <= 4


# --- what comes in goes out -------------------------------------------------------------------------------------------


def test_ragged_batch_with_a_missing_image(device, rng):
    images = [noise(rng, 40, 64), noise(rng, 9, 31)]
    encoded = [cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() for image in images]
    batch = decode([encoded[0], b"nothing", encoded[1]], device=device)
    matrices = np.stack([random_matrix(rng, 40, 64, perspective=False)[:2] for _ in range(3)])
    warped = warp_affine(batch, matrices, (32, 64))
    assert isinstance(warped, ImageBatch)
    assert warped.sizes.tolist() == [[32, 64], [0, 0], [32, 64]]
    with pytest.raises(DecodeError):
        warped[1]
    for index, image in ((0, images[0]), (2, images[1])):
        single = warp_affine(on(device, image), matrices[index], (32, 64))
        np.testing.assert_array_equal(to_host(warped[index]), to_host(single))
    turned, mirrored = rotate(batch, 1), flip(batch, vertical=True)
    assert turned.sizes.tolist() == [[64, 40], [0, 0], [31, 9]]
    np.testing.assert_array_equal(to_host(turned[2]), np.rot90(images[1]))
    np.testing.assert_array_equal(to_host(mirrored[0]), images[0][::-1])
    assert str(mirrored.errors[1]) == str(batch.errors[1])


def test_color_order_is_kept(device, rng):
    batch = ImageBatch.from_arrays([on(device, noise(rng, 5, 6, 4))], color="bgra")
    assert warp_affine(batch, np.eye(2, 3), (3, 4)).color == "bgra"
    assert rotate(batch, 2).color == "bgra"


@pytest.mark.parametrize("shape", [(20, 33), (20, 33, 1), (20, 33, 3), (20, 33, 4), (3, 20, 33, 3), (2, 20, 33, 1)])
def test_shapes_of_arrays(device, rng, shape):
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    lines = 0 if len(shape) < 4 else 1
    given = on(device, images)
    warped = warp_affine(given, [[1, 0, 2], [0, 1, 1]], (25, 40))
    assert type(warped) is type(given)
    assert warped.shape == (*shape[:lines], 25, 40, *shape[lines + 2 :])
    window = (slice(None),) * lines
    np.testing.assert_array_equal(to_host(warped)[(*window, slice(1, 21), slice(2, 35))], images)
    np.testing.assert_array_equal(to_host(flip(given, horizontal=True)), np.flip(images, lines + 1))
    for turns in range(-5, 6):
        expected = np.rot90(images, turns, axes=(lines, lines + 1))
        np.testing.assert_array_equal(to_host(rotate(given, turns)), expected)
    for horizontal in (False, True):
        expected = np.flip(images, (lines, lines + 1)) if horizontal else np.flip(images, lines)
        np.testing.assert_array_equal(to_host(flip(given, horizontal=horizontal, vertical=True)), expected)
    assert not np.shares_memory(images, to_host(flip(given)))


def test_several_arrays(device, rng):
    images = [noise(rng, 20, 33), noise(rng, 40, 5)]
    given = [on(device, image) for image in images]
    warped = warp_affine(given, np.eye(2, 3), (50, 40), border="replicate")
    assert warped.shape == (2, 50, 40, 3)
    np.testing.assert_array_equal(to_host(warped)[0, :20, :33], images[0])
    turned = rotate(iter(given), -1)
    assert isinstance(turned, list)
    for ours, image in zip(turned, images, strict=True):
        np.testing.assert_array_equal(to_host(ours), np.rot90(image, -1))
    assert flip([]).shape[0] == 0
    assert warp_affine([], np.eye(2, 3), (4, 5)).shape[0] == 0
    assert len(rotate(ImageBatch.from_arrays([], device=device), 1)) == 0


@pytest.mark.parametrize("side", [1, 31, 32, 33, 64, 70, 129])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_turns_of_all_widths(device, rng, side, channels):
    image = noise(rng, side, 45, channels)
    for turns in range(4):
        np.testing.assert_array_equal(to_host(rotate(on(device, image), turns)), np.rot90(image, turns))


def test_views_are_read_and_written_in_place(device, rng):
    frame = noise(rng, 60, 80)
    window = on(device, frame)[7:47, 10:74]
    np.testing.assert_array_equal(to_host(rotate(window, 1)), np.rot90(frame[7:47, 10:74]))
    every_other = on(device, frame)[::2, ::-1]
    np.testing.assert_array_equal(to_host(flip(every_other, vertical=True)), frame[::2, ::-1][::-1])
    room = on(device, np.zeros((30 * 20 * 3 + 1,), np.uint8))
    for offset in (0, 1):  # of whole words, and not
        out = room[offset : offset + 30 * 20 * 3].reshape(30, 20, 3)
        assert rotate(on(device, frame[:20, :30]), 1, out=out) is out
        np.testing.assert_array_equal(to_host(out), np.rot90(frame[:20, :30]))
    batch = ImageBatch.from_arrays([window])
    target = ImageBatch.allocate([(64, 40)], device=device)
    assert rotate(batch, 1, out=target) is target
    np.testing.assert_array_equal(to_host(target[0]), np.rot90(frame[7:47, 10:74]))


@pytest.mark.needs_cuda
def test_matrices_on_the_device(rng):
    import cupy

    images = [noise(rng, 50, 64) for _ in range(70)]
    matrices = np.stack([random_matrix(rng, 50, 64, perspective=True) for _ in images])
    for lines, warp in ((2, warp_affine), (3, warp_perspective)):
        given = np.ascontiguousarray(matrices[:, :lines])
        expected = warp(images, given, (40, 96))
        there = [cupy.asarray(image) for image in images]
        cupy.cuda.Device().synchronize()  # the stream below does not wait for the uploads
        with cupy.cuda.Stream(non_blocking=True) as stream:
            np.testing.assert_array_equal(warp(there, cupy.asarray(given), (40, 96)).get(), expected)
        np.testing.assert_array_equal(warp(there, given, (40, 96), stream=stream).get(stream=stream), expected)
        bad = cupy.asarray(given)
        bad[1, 0, 0] = np.nan
        bad[2] = 0
        bad[3, 1, 1] = np.inf
        result = warp(there, bad, (40, 96), border="replicate", fill=11).get()
        assert (result[1:4] == 11).all()
        assert (result[4:] != 11).any(axis=(1, 2, 3)).all()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": np.eye(3)}, r"shape \(3, 3\); expected \(2, 3\)"),
        ({"matrix": np.zeros((5, 2, 3))}, "or .1, 2, 3., one for each"),
        ({"matrix": [[1, 2, 3], [2, 4, 6]]}, "cannot be inverted"),
        ({"matrix": [[np.nan, 0, 0], [0, 1, 0]]}, "matrix 0 .* finite"),
        ({"matrix": [[np.inf, 0, 0], [0, 1, 0]], "inverse": True}, "finite"),
        ({"matrix": [[1, 2, 3], [1, 2]]}, "no array of numbers"),
        ({"matrix": [["a"] * 3] * 2}, "no array of numbers"),
        ({"matrix": None}, "no array of numbers"),
        ({"size": (0, 5)}, "size is"),
        ({"size": (5, 65536)}, "size is"),
        ({"size": 5}, "size is"),
        ({"interpolation": "area"}, "interpolation is 'area'"),
        ({"border": "wrap"}, "border is 'wrap'"),
        ({"fill": 256}, "fill is 256"),
        ({"fill": (1, 2)}, "3, one per channel"),
        ({"fill": "red"}, "fill is 'red'"),
        ({"fill": np.nan}, "fill is nan"),
        ({"images": np.zeros((4, 5, 2), np.uint8)}, "1, 3 or 4 channels"),
        ({"images": np.zeros((4, 5, 3), np.float32)}, "uint8"),
        ({"images": np.zeros(4, np.uint8)}, "shape"),
        ({"images": [np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)]}, "image 1"),
        ({"images": 3}, "images are a int"),
        ({"out": np.zeros((6, 7, 3), np.float32)}, "expected a contiguous uint8 array of shape"),
        ({"out": np.zeros((7, 6, 3), np.uint8)}, "shape"),
    ],
)
def test_bad_input(device, change, message):
    arguments = {"images": np.zeros((4, 5, 3), np.uint8), "matrix": np.eye(2, 3), "size": (6, 7)} | change
    for name in ("images", "out"):
        given = arguments.get(name)
        if isinstance(given, np.ndarray):
            arguments[name] = on(device, given)
        elif isinstance(given, list):
            arguments[name] = [on(device, image) for image in given]
    with pytest.raises(InputError, match=message):
        warp_affine(**arguments)


def test_more_bad_input(device, rng):
    image = on(device, noise(rng, 4, 5))
    with pytest.raises(InputError, match="cannot be inverted"):
        warp_perspective(image, np.ones((3, 3)), (4, 5))
    with pytest.raises(InputError, match="matrix 1 "):
        warp_affine([image, image], np.stack([np.eye(2, 3), np.zeros((2, 3))]), (4, 5))
    with pytest.raises(InputError, match="quarter_turns is 1"):
        rotate(image, 1.5)
    with pytest.raises(InputError, match="out shares memory with the images"):
        flip(image, out=image)
    with pytest.raises(InputError, match="contiguous=False"):
        flip(image, out=on(device, np.zeros((4, 10, 3), np.uint8))[:, ::2])
    with pytest.raises(InputError, match="several sizes"):
        flip([image, image[:2]], out=image)
    batch = ImageBatch.from_arrays([image])
    with pytest.raises(InputError, match="expected a batch of rgb"):
        rotate(batch, 1, out=ImageBatch.allocate([(4, 5)], device=device))
    with pytest.raises(InputError, match="expected a batch"):
        flip(batch, out=image)
    with pytest.raises(InputError, match="center"):
        rotation_matrix(3, 4)
    with pytest.raises(InputError, match="degrees"):
        rotation_matrix((3, 4), np.inf)


def test_read_only_out_is_refused():
    out = np.zeros((4, 5, 3), np.uint8)
    out.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        flip(np.zeros((4, 5, 3), np.uint8), out=out)


@pytest.mark.needs_cuda
def test_devices_do_not_mix(rng):
    import cupy

    image = noise(rng, 4, 5)
    with pytest.raises(InputError, match="matrix is on cuda"):
        warp_affine(image, cupy.eye(2, 3), (4, 5))
    with pytest.raises(InputError, match="out is on cpu"):
        flip(cupy.asarray(image), out=image)
