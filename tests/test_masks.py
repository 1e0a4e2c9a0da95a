"""Mask extents and cut-outs against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from reference import on, random_image, to_host

from nbvision.errors import InputError
from nbvision.image import ImageBatch
from nbvision.ops.masks import argmax_map, cut_out, mask_boxes
from nbvision.ops.preprocess import Preprocess


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (96, 96), (160, 31)])
def test_mask_boxes_are_tight(device, rng, size):
    """A mask's extent, through the crop's geometry, in source pixels."""
    images = [random_image(rng, 200, 300), random_image(rng, 90, 50)]
    crops = np.array([[10, 20, 110, 170], [0, 0, 50, 90], [7, 8, 9, 10]], np.float32)
    batch = ImageBatch.from_arrays(images, device=device)
    which = on(device, np.array([0, 1, 0]))
    _, geometry = Preprocess(size, fit="stretch")(batch, boxes=on(device, crops), box_images=which)
    logits = rng.normal(-1.5, 1, (3, 1, *size)).astype(np.float32)
    logits[2] = -1
    boxes, areas = mask_boxes(on(device, logits), geometry)
    for index in range(3):
        rows, columns = np.nonzero(logits[index, 0] > 0)
        assert to_host(areas)[index] == len(rows)
        if len(rows) == 0:
            assert not to_host(boxes)[index].any()
            continue
        x1, y1, x2, y2 = crops[index]
        scale_x, scale_y = (x2 - x1) / size[1], (y2 - y1) / size[0]
        wanted = [columns.min() * scale_x + x1, rows.min() * scale_y + y1]
        wanted += [(columns.max() + 1) * scale_x + x1, (rows.max() + 1) * scale_y + y1]
        np.testing.assert_allclose(to_host(boxes)[index], wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 29), (5, 96, 96)])
@pytest.mark.parametrize("in_place", [False, True])
def test_cut_out_keeps_the_mask_and_normalises(device, rng, shape, in_place):
    count, height, width = shape
    crops = rng.uniform(0, 1, (count, 3, height, width)).astype(np.float32)
    logits = rng.normal(0, 1, (count, 1, height, width)).astype(np.float32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    given = on(device, crops.copy())
    got = cut_out(given, on(device, logits), fill=0.5, mean=mean, std=std, out=given if in_place else None)
    assert (got is given) == in_place
    kept = np.where(logits > 0, crops, 0.5)
    wanted = (kept - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(to_host(got), wanted, atol=2e-6)


def test_no_crops_at_all(device):
    empty = on(device, np.zeros((0, 3, 8, 8), np.float32))
    assert cut_out(empty, on(device, np.zeros((0, 1, 8, 8), np.float32))).shape == (0, 3, 8, 8)


def test_shapes_that_do_not_fit_are_refused(device, rng):
    crops = on(device, np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(InputError, match=r"expected \(2, 8, 8\), one mask per crop"):
        cut_out(crops, on(device, np.zeros((1, 8, 8), np.float32)))
    with pytest.raises(InputError, match=r"expected \(M, 3, H, W\) float32"):
        cut_out(crops[:, :2], on(device, np.zeros((2, 8, 8), np.float32)))
    batch = ImageBatch.from_arrays([random_image(rng, 9, 9)], device=device)
    _, geometry = Preprocess((8, 8))(batch)
    with pytest.raises(InputError, match="expected 1, one per canvas"):
        mask_boxes(on(device, np.zeros((2, 8, 8), np.float32)), geometry)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 21, 33, 47), (3, 2, 1, 257), (0, 4, 5, 5), (2, 3, 0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_argmax_map_is_the_first_of_the_best(device, rng, shape, dtype):
    logits = np.round(rng.normal(0, 1, shape), 1).astype(dtype)  # with ties
    got = to_host(argmax_map(on(device, logits)))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, logits.argmax(axis=1))
    seen_from_the_side = on(device, logits).transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(to_host(argmax_map(seen_from_the_side)), logits.argmax(axis=1).transpose(0, 2, 1))


def test_argmax_map_goes_round_nan_and_refuses_other_shapes(device):
    logits = np.array([np.nan, -1, np.nan, -2], np.float32).reshape(1, 4, 1, 1)
    assert to_host(argmax_map(on(device, logits))).tolist() == [[[1]]]
    for bad in (np.zeros((3, 4, 5), np.float32), np.zeros((1, 0, 4, 5), np.float32), np.zeros((1, 2, 4, 5), np.int32)):
        with pytest.raises(InputError, match=r"expected floats \(N, C, H, W\)"):
            argmax_map(on(device, bad))
