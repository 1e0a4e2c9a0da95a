"""Resizing and letterboxing against OpenCV and Ultralytics' formulas."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import INTERPOLATIONS, letterbox_placement, on, to_host

from nbvision import ImageBatch, decode, letterbox, resize
from nbvision.errors import DecodeError, InputError

any_device = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def noise(rng, height, width, channels=3):
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def by_opencv(image, size, interpolation="linear"):
    resized = cv2.resize(image, size[::-1], interpolation=INTERPOLATIONS[interpolation])
    return resized.reshape(*size, *image.shape[2:])


def by_ultralytics(image, size, *, fill=114, scaleup=True, center=True, auto=False, stride=32):
    """LetterBox, written from its formulas; alpha is opaque."""
    height, width, top, left = letterbox_placement(*image.shape[:2], size, scaleup=scaleup, center=center)
    lacking = [size[0] - height, size[1] - width]
    if auto:
        lacking = [side % stride for side in lacking]
        if center:
            top, left = (round(side / 2 - 0.1) for side in lacking)
    canvas = np.empty((height + lacking[0], width + lacking[1], image.shape[2]), np.uint8)
    canvas[:] = np.append(np.broadcast_to(fill, 3), 255)[: image.shape[2]]
    canvas[top : top + height, left : left + width] = by_opencv(image, (height, width))
    return canvas


@any_device
@given(
    source=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    channels=st.sampled_from([1, 3, 4]),
    interpolation=st.sampled_from(sorted(INTERPOLATIONS)),
)
def test_resize_is_opencvs(device, source, size, channels, interpolation):
    image = noise(np.random.default_rng(sum(source)), *source, channels)
    result = to_host(resize(on(device, image), size, interpolation=interpolation))
    np.testing.assert_array_equal(result, by_opencv(image, size, interpolation))


@any_device
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    channels=st.sampled_from([1, 3, 4]),
    options=st.fixed_dictionaries(
        {"scaleup": st.booleans(), "center": st.booleans(), "auto": st.booleans(), "stride": st.sampled_from([8, 32])}
    ),
)
def test_letterbox_is_ultralytics(device, source, size, channels, options):
    image = noise(np.random.default_rng(sum(source)), *source, channels)
    result = to_host(letterbox(on(device, image), size, **options))
    np.testing.assert_array_equal(result, by_ultralytics(image, size, **options))


def test_what_comes_in_goes_out(device, rng):
    gray, colour = noise(rng, 31, 44)[..., 0], noise(rng, 31, 44)
    several = [noise(rng, 9, 7), noise(rng, 50, 33), noise(rng, 1, 1)]
    expected = np.stack([by_opencv(image, (12, 17)) for image in several])
    for images, wanted in [
        (gray, by_opencv(gray, (12, 17))),
        (colour[::-1, 2:40], by_opencv(colour[::-1, 2:40].copy(), (12, 17))),
        (colour[None], by_opencv(colour, (12, 17))[None]),
    ]:
        result = resize(on(device, images), (12, 17))
        assert type(result) is type(on(device, images))
        np.testing.assert_array_equal(to_host(result), wanted)
    stack = resize([on(device, image) for image in several], (12, 17))
    np.testing.assert_array_equal(to_host(stack), expected)
    batch = resize(ImageBatch.from_arrays(several, color="bgr", device=device), (12, 17))
    assert isinstance(batch, ImageBatch)
    assert (batch.color, batch.device, batch.sizes.tolist()) == ("bgr", device, [[12, 17]] * 3)
    np.testing.assert_array_equal(np.stack([to_host(image) for image in batch]), expected)
    assert len(resize(ImageBatch.from_arrays([], device=device), (12, 17))) == 0
    assert len(resize([], (12, 17))) == 0


def test_missing_images_stay_missing(device, rng):
    good = cv2.imencode(".png", noise(rng, 20, 30)[..., ::-1])[1].tobytes()
    batch = decode([b"no image", good], device=device)
    for result in (resize(batch, (5, 6)), letterbox(batch, (64, 64)), letterbox(batch, (64, 64), auto=True)):
        assert result.ok.tolist() == [False, True]
        with pytest.raises(DecodeError):
            result[0]
        assert result[1].shape[2] == 3


def test_smallest_canvases_of_several_sizes(device, rng):
    several = [noise(rng, 20, 60), noise(rng, 60, 20), noise(rng, 33, 33), noise(rng, 40, 120)]
    wanted = [by_ultralytics(image, (96, 96), auto=True) for image in several]
    assert len({canvas.shape for canvas in wanted}) > 2
    listed = letterbox([on(device, image) for image in several], (96, 96), auto=True)
    batch = letterbox(ImageBatch.from_arrays(several, device=device), (96, 96), auto=True)
    for result in (listed, batch):
        for canvas, expected in zip(result, wanted, strict=True):
            np.testing.assert_array_equal(to_host(canvas), expected)
    with pytest.raises(InputError, match=r"several|sizes"):
        letterbox(several, (96, 96), auto=True, out=np.empty((4, 96, 96, 3), np.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_out(device, rng, channels):
    images = noise(rng, 2 * 13, 17, channels).reshape(2, 13, 17, channels)
    expected = np.stack([by_opencv(image, (20, 9)) for image in images])
    out = on(device, np.zeros((2, 20, 9, channels), np.uint8))
    assert resize(on(device, images), (20, 9), out=out) is out
    np.testing.assert_array_equal(to_host(out), expected)
    out[:] = 0
    color = {1: "gray", 3: "rgb", 4: "rgba"}[channels]
    batch = resize(ImageBatch.from_arrays(images, color=color, device=device), (20, 9), out=out)
    np.testing.assert_array_equal(to_host(out), expected)
    np.testing.assert_array_equal(to_host(batch[1]), expected[1])


def test_fill_is_in_the_images_order(device, rng):
    batch = ImageBatch.from_arrays([noise(rng, 10, 20)], color="bgr", device=device)
    canvas = to_host(letterbox(batch, (20, 20), fill=(1, 2, 3))[0])
    assert canvas[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("call", [resize, letterbox])
@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ((0, 5), {}, "size"),
        (5, {}, "size"),
        ((5, 5), {"interpolation": "sharp"}, "interpolation"),
        ((5, 5), {"parity": "exact"}, "parity"),
        ((5, 5), {"out": np.zeros((5, 5, 3), np.float32)}, "out"),
        ((5, 5), {"out": np.zeros((6, 5, 3), np.uint8)}, "out"),
    ],
)
def test_bad_input(device, call, size, options, words):
    image = on(device, np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(InputError, match=words):
        call(image, size, **options)
    with pytest.raises(InputError):
        call(on(device, np.zeros((4, 4, 2), np.uint8)), (5, 5))
    with pytest.raises(InputError):
        call(on(device, np.zeros((4, 4, 3), np.float32)), (5, 5))
