"""Instance masks against NumPy's float64 and OpenCV's bilinear resize."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from reference import geometry_on, on, to_host

from nbvision.errors import InputError
from nbvision.ops.instances import instance_masks
from nbvision.ops.preprocess import Preprocess


def expected(coefficients, prototypes, boxes, images, size, threshold):
    """(M, H, W) masks, and which pixels are too close to the threshold to say. OpenCV's linear resize has half-pixel
    centres and repeats the border, as ``align_corners=False`` does."""
    masks, doubtful = [], []
    rows, columns = np.mgrid[: size[0], : size[1]]
    for row, box, image in zip(coefficients, boxes, images, strict=True):
        logits = np.tensordot(row.astype(np.float64), prototypes[image].astype(np.float64), 1)
        logits = cv2.resize(logits, size[::-1], interpolation=cv2.INTER_LINEAR).reshape(size)
        distance = logits - np.log(threshold / (1 - threshold))
        inside = (columns >= box[0]) & (columns < box[2]) & (rows >= box[1]) & (rows < box[3])
        masks.append((distance > 0) & inside)
        doubtful.append(np.abs(distance) < 1e-4)
    return np.array(masks), np.array(doubtful)


def random_scene(rng, masks, size, prototypes=(2, 8, 20, 24)):
    coefficients = rng.normal(0, 1, (masks, prototypes[1])).astype(np.float32)
    planes = rng.normal(0, 1, prototypes).astype(np.float32)
    height, width = size
    ends = np.sort(rng.uniform(-0.1, 1.1, (masks, 2, 2)), axis=1) * [width, height]
    return coefficients, planes, ends.reshape(masks, 4).astype(np.float32), rng.integers(0, prototypes[0], masks)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize(
    ("size", "cells"),
    [((80, 96), (20, 24)), ((77, 131), (20, 24)), ((9, 5), (33, 47)), ((1, 1), (1, 1)), ((640, 640), (160, 160))],
)
def test_masks_are_those_of_the_whole_canvas(device, rng, size, cells, threshold):
    scene = random_scene(rng, 7, size, (2, 8, *cells))
    masks = instance_masks(*(on(device, array) for array in scene), size=size, threshold=threshold)
    wanted, doubtful = expected(*scene, size, threshold)
    got = to_host(masks.dense())
    assert ((got == wanted) | doubtful).all()
    assert not masks.overflowed()
    for index, part in enumerate(masks.to_list()):
        _, height, width, x, y = to_host(masks.table)[index]
        np.testing.assert_array_equal(part, got[index, y : y + height, x : x + width])


def test_boxes_in_source_pixels_go_back_to_the_canvas(device, rng):
    geometry = Preprocess((96, 96))._regions.of(np.array([[200, 100], [50, 333]], np.int32))
    geometry = geometry_on(device, geometry)
    coefficients, planes, boxes, images = random_scene(rng, 9, (96, 96))
    scales = to_host(geometry.scales)[images]
    in_source = boxes * scales[:, [2, 3, 2, 3]] + scales[:, [4, 5, 4, 5]]
    arrays = [on(device, array) for array in (coefficients, planes, in_source, images)]
    masks = instance_masks(*arrays, geometry, size=(96, 96))
    wanted, doubtful = expected(coefficients, planes, boxes, images, (96, 96), 0.5)
    assert ((to_host(masks.dense()) == wanted) | doubtful).all()


def test_too_little_room_is_said_and_nothing_is_written_beyond(device, rng):
    coefficients, planes, _, images = random_scene(rng, 4, (40, 40))
    boxes = np.array([[0, 0, 10, 10], [0, 0, 40, 40], [5, 5, 10, 10], [0, 0, np.nan, 4]], np.float32)
    arrays = [on(device, array) for array in (coefficients, planes, boxes, images)]
    masks = instance_masks(*arrays, size=(40, 40), limit_bytes=200)
    assert masks.overflowed()
    assert int(masks.needed[0]) == 100 + 1600 + 25
    assert to_host(masks.table)[:, 1].tolist() == [10, 0, 0, 0]
    wanted, doubtful = expected(coefficients, planes, boxes, images, (40, 40), 0.5)
    assert ((to_host(masks.dense())[0] == wanted[0]) | doubtful[0]).all()
    assert not to_host(masks.dense())[1:].any()


def test_many_masks_lie_one_after_the_other(device, rng):
    """More masks than one block has threads; those of no image are empty."""
    scene = random_scene(rng, 1300, (24, 24))
    scene[3][5], scene[3][900] = -1, 2
    masks = instance_masks(*(on(device, array) for array in scene), size=(24, 24))
    table = to_host(masks.table)
    areas = table[:, 1] * table[:, 2]
    np.testing.assert_array_equal(table[:, 0], np.cumsum(areas) - areas)
    assert areas[[5, 900]].tolist() == [0, 0]
    assert int(masks.needed[0]) == areas.sum()


def test_no_masks_and_bad_input(device, rng):
    coefficients, planes, boxes, images = (on(device, array) for array in random_scene(rng, 3, (8, 8)))
    none = instance_masks(coefficients[:0], planes, boxes[:0], images[:0], size=(8, 8))
    assert none.dense().shape == (0, 8, 8)
    assert not none.overflowed()
    with pytest.raises(InputError, match=r"expected \(M, K\) and \(N, K, h, w\)"):
        instance_masks(coefficients[:, :3], planes, boxes, images, size=(8, 8))
    with pytest.raises(InputError, match="one row a mask"):
        instance_masks(coefficients, planes, boxes[:2], images, size=(8, 8))
    with pytest.raises(InputError, match="expected floats"):
        instance_masks(coefficients, planes, boxes.astype(np.int32), images, size=(8, 8))
    with pytest.raises(InputError, match=r"threshold is 1\.0"):
        instance_masks(coefficients, planes, boxes, images, size=(8, 8), threshold=1.0)
