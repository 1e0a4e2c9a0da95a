"""Run lengths and polygons against pycocotools: the same text, the same masks."""

from __future__ import annotations

import sys
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from reference import on

from nbvision.errors import InputError, MissingExtraError
from nbvision.ops.rle import mask_to_polygons, mask_to_rle, rle_to_mask


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


# --- polygons ---------------------------------------------------------------------------------------------------------


def without_holes(mask: np.ndarray) -> np.ndarray:
    """Everything that cannot be reached from outside by steps to the four sides."""
    padded = np.pad(mask.astype(np.uint8), 1)
    cv2.floodFill(padded, None, (0, 0), 2, flags=4)
    return padded[1:-1, 1:-1] != 2


def drawn(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """What COCO makes of an annotation."""
    if not polygons:
        return np.zeros(size, bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools under NumPy 2
        return coco.decode(coco.merge(coco.frPyObjects(polygons, *size))).astype(bool)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (37, 53), (200, 150)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_polygons_are_the_masks_without_holes(device, rng, size, share):
    masks = rng.random((3, *size)) < share
    for mask, polygons in zip(masks, mask_to_polygons(on(device, masks)), strict=True):
        np.testing.assert_array_equal(drawn(polygons, size), without_holes(mask))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_polygons_of_any_mask(height, width, data):
    bits = data.draw(st.integers(0, 2 ** (height * width) - 1))
    mask = np.array([bits >> shift & 1 for shift in range(height * width)], np.uint8).reshape(height, width)
    (polygons,) = mask_to_polygons(mask[None])
    np.testing.assert_array_equal(drawn(polygons, (height, width)), without_holes(mask))
    for polygon in polygons:
        corners = np.array(polygon).reshape(-1, 2)
        steps = corners - np.roll(corners, 1, axis=0)
        assert ((steps != 0).sum(axis=1) == 1).all()  # each along one axis: no corner twice, none left out


def test_polygons_of_simple_shapes():
    mask = np.zeros((2, 6, 8), np.int32)
    mask[0, 1:4, 2:7] = -1
    mask[1, 5, 7] = 1
    mask[1, 0, 0] = 9
    rectangle, corners = mask_to_polygons(mask)
    assert rectangle == [[2, 1, 2, 4, 7, 4, 7, 1]]
    assert sorted(corners) == [[0, 0, 0, 1, 1, 1, 1, 0], [7, 5, 7, 6, 8, 6, 8, 5]]
    assert all(isinstance(number, float) for polygon in corners for number in polygon)


def test_no_polygons(device, monkeypatch):
    assert mask_to_polygons(on(device, np.zeros((0, 4, 5), bool))) == []
    assert mask_to_polygons(on(device, np.zeros((2, 0, 5), bool))) == [[], []]
    with pytest.raises(InputError, match=r"expected \(M, H, W\) bool or integers"):
        mask_to_polygons(on(device, np.ones((1, 4, 5), np.float32)))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nbvision\[polygons\]'"):
        mask_to_polygons(on(device, np.ones((1, 4, 5), bool)))
