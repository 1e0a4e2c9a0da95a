"""cvt_color against OpenCV: the same bytes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import on, random_image, to_host

import nbvision as nbv
from nbvision.errors import InputError
from nbvision.image import CHANNELS, ImageBatch

COLORS = ["rgb", "bgr", "rgba", "bgra", "gray"]


def by_opencv(image, source, to):
    """(H, W, C)."""
    if source == to:
        return image
    names = {color: color.upper() for color in COLORS}
    names["gray"] = "GRAY"
    found = cv2.cvtColor(image, getattr(cv2, f"COLOR_{names[source]}2{names[to]}"))
    return found.reshape(*image.shape[:2], -1)


@pytest.mark.parametrize("source", COLORS)
@pytest.mark.parametrize("to", COLORS)
def test_every_pair_of_colours(device, rng, source, to):
    """Ragged, dense and with gaps between the lines, of widths that end anywhere in a word."""
    images = [
        random_image(rng, height, width, CHANNELS[source]) for height, width in [(1, 1), (3, 5), (31, 18), (7, 64)]
    ]
    whole = on(device, random_image(rng, 20, 40, CHANNELS[source]))
    for arrays in (images, [whole[2:15, 3:30], whole[:, 1:8]]):
        batch = ImageBatch.from_arrays(arrays, color=source, device=device)
        found = nbv.cvt_color(batch, to)
        assert found.color == to
        for image, given_image in zip(found, arrays, strict=True):
            wanted = by_opencv(np.ascontiguousarray(to_host(given_image)), source, to)
            np.testing.assert_array_equal(to_host(image), wanted)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(COLORS), st.sampled_from(COLORS), st.integers(0, 2**32))
def test_any_size(device, height, width, source, to, seed):
    image = random_image(np.random.default_rng(seed), height, width, CHANNELS[source])
    found = nbv.cvt_color(on(device, image), to, color=source)
    wanted = by_opencv(image, source, to)
    np.testing.assert_array_equal(to_host(found), wanted[..., 0] if to == "gray" else wanted)


def test_what_comes_in_goes_out(device, rng):
    one, stack = random_image(rng, 6, 7), np.stack([random_image(rng, 6, 7) for _ in range(3)])
    assert nbv.cvt_color(on(device, one), "gray").shape == (6, 7)
    assert nbv.cvt_color(on(device, one[..., 0]), "bgr").shape == (6, 7, 3)
    assert nbv.cvt_color(on(device, stack), "gray").shape == (3, 6, 7, 1)
    found = nbv.cvt_color([on(device, one), on(device, one[:3])], "rgba")
    assert [image.shape for image in found] == [(6, 7, 4), (3, 7, 4)]
    out = on(device, np.zeros((6, 7), np.uint8))
    assert nbv.cvt_color(on(device, one), "gray", out=out) is out
    np.testing.assert_array_equal(to_host(out), cv2.cvtColor(one, cv2.COLOR_RGB2GRAY))


def test_a_missing_image_stays_missing(device):
    png = cv2.imencode(".png", np.full((4, 5, 3), 9, np.uint8))[1].tobytes()
    found = nbv.cvt_color(nbv.decode([png, b"nothing"], device=device), "gray")
    assert found.ok.tolist() == [True, False]
    assert to_host(found[0]).tolist() == [[[9]] * 5] * 4
    with pytest.raises(nbv.DecodeError):
        found[1]


def test_bad_input(device, rng):
    image = on(device, random_image(rng, 4, 4))
    with pytest.raises(InputError, match="to is 'hsv'; expected one of"):
        nbv.cvt_color(image, "hsv")
    with pytest.raises(InputError, match="color is 'rgba', the images have 3 channels"):
        nbv.cvt_color(image, "gray", color="rgba")
    with pytest.raises(InputError, match="color is 'bgr', the batch is rgb"):
        nbv.cvt_color(ImageBatch.from_arrays([image]), "gray", color="bgr")
    with pytest.raises(InputError, match="the images are NV12"):
        nbv.cvt_color(nbv.as_batch(image[..., 0][:3], color="nv12"), "rgb")
    with pytest.raises(InputError, match="out shares memory"):
        nbv.cvt_color(image, "bgr", out=image)
