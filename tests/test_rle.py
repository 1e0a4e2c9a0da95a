"""Run lengths against pycocotools: the same text, the same masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from reference import on

from nbvision.errors import InputError
from nbvision.ops.rle import mask_to_rle, rle_to_mask


def encoded(masks: np.ndarray) -> list[dict]:
    return [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (37, 53), (640, 480)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_same_text_as_coco(device, rng, size, share):
    masks = rng.random((4, *size)) < share
    masks[1] = np.arange(size[0])[:, None] < size[0] // 2  # long runs
    assert mask_to_rle(on(device, masks)) == encoded(masks)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_there_and_back(height, width, data):
    bits = data.draw(st.integers(0, 2 ** (height * width) - 1))
    flat = [bits >> shift & 1 for shift in range(height * width)]
    mask = np.array(flat, np.uint8).reshape(1, height, width)
    runs = mask_to_rle(mask)
    assert runs == encoded(mask)
    np.testing.assert_array_equal(rle_to_mask(runs), mask)


def test_blobs_and_huge_runs():
    y, x = np.mgrid[:3000, :4000]
    masks = np.stack([(y - 900) ** 2 + (x - 2000) ** 2 < 800**2, (y > 2990) & (x > 3990), y * 0 > 1])
    runs = mask_to_rle(masks)
    assert runs == encoded(masks)
    np.testing.assert_array_equal(rle_to_mask(runs), masks)
    np.testing.assert_array_equal(coco.area(runs), masks.sum(axis=(1, 2)))


def test_strided_masks_and_other_integers(device, rng):
    masks = rng.integers(-1, 2, (3, 40, 30), dtype=np.int32)
    given_masks = on(device, masks)[:, ::2, ::-1]
    assert mask_to_rle(given_masks) == encoded(masks[:, ::2, ::-1] != 0)


def test_text_or_counts_can_be_given():
    mask = np.array([[[0, 1, 1], [0, 0, 1]]], np.uint8)
    (run,) = mask_to_rle(mask)
    text = {"size": run["size"], "counts": run["counts"].decode()}
    numbers = {"size": [2, 3], "counts": [2, 1, 1, 2]}
    np.testing.assert_array_equal(rle_to_mask([run, text, numbers]), np.repeat(mask, 3, axis=0))


def test_nothing(device):
    assert mask_to_rle(on(device, np.zeros((0, 4, 5), bool))) == []
    assert mask_to_rle(on(device, np.zeros((1, 0, 5), bool))) == encoded(np.zeros((1, 0, 5), bool))
    assert rle_to_mask([]).shape == (0, 0, 0)


def test_bad_masks_are_refused(device):
    for masks in (np.zeros((4, 5), bool), np.zeros((1, 4, 5), np.float32)):
        with pytest.raises(InputError, match=r"expected \(M, H, W\) bool or integers"):
            mask_to_rle(on(device, masks))


@pytest.mark.parametrize("counts", [b"", b"\x00", b"P", b"3", b"ooooooooo0", [3, -3, 6], [1.5, 4.5], "\u00e9", [7]])
def test_bad_counts_are_refused(counts):
    with pytest.raises(InputError, match=r"runs\[0\] do not fill its size 2 x 3"):
        rle_to_mask([{"size": [2, 3], "counts": counts}])


def test_bad_runs_are_refused():
    with pytest.raises(InputError, match=r"runs\[1\] is None; expected a mapping"):
        rle_to_mask([{"size": [1, 1], "counts": [1]}, None])
    with pytest.raises(InputError, match="expected one size"):
        rle_to_mask([{"size": [1, 1], "counts": [1]}, {"size": [1, 2], "counts": [2]}])
