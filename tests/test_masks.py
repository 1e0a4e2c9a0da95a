"""Mask extents, centroids, cut-outs and pasted masks against NumPy and OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import letterbox_placement, on, random_image, to_host

from nbvision.errors import InputError
from nbvision.image import CHANNELS, ImageBatch
from nbvision.ops.boxes import Detections, FlatDetections
from nbvision.ops.masks import argmax_map, cut_out, cut_out_rgba, mask_boxes, mask_centroids, paste_masks
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


# --- centroids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (96, 96), (31, 257)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bool", "uint8"])
def test_centroids_are_opencvs(device, rng, size, dtype):
    """OpenCV counts from the first pixel's centre, nbvision from its corner."""
    inside = rng.normal(-1, 1, (4, *size)) > 0
    inside[1] = False
    inside[2] = True
    masks = np.where(inside, 3, -3 if dtype.startswith("float") else 0).astype(dtype)
    got = mask_centroids(on(device, masks))
    assert got.dtype == np.float32
    for index, mask in enumerate(inside):
        moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
        wanted = [0, 0]
        if mask.any():
            wanted = [moments[name] / moments["m00"] + 0.5 for name in ("m10", "m01")]
        np.testing.assert_allclose(to_host(got)[index], wanted, rtol=1e-6)


def test_centroids_in_source_pixels(device, rng):
    images = [random_image(rng, 200, 300), random_image(rng, 90, 50)]
    crops = np.array([[10, 20, 110, 170], [0, 0, 50, 90], [7, 8, 9, 10]], np.float32)
    batch = ImageBatch.from_arrays(images, device=device)
    which = on(device, np.array([0, 1, 0]))
    _, geometry = Preprocess((40, 30), fit="stretch")(batch, boxes=on(device, crops), box_images=which)
    probabilities = rng.uniform(0, 1, (3, 1, 40, 30)).astype(np.float32)
    probabilities[2] = 0.3
    got = to_host(mask_centroids(on(device, probabilities), geometry, threshold=0.3))
    for index, (x1, y1, x2, y2) in enumerate(crops[:2]):
        rows, columns = np.nonzero(probabilities[index, 0] > np.float32(0.3))
        wanted = [x1 + (columns.mean() + 0.5) * (x2 - x1) / 30, y1 + (rows.mean() + 0.5) * (y2 - y1) / 40]
        np.testing.assert_allclose(got[index], wanted, rtol=1e-6)
    assert got[2].tolist() == [0, 0]


def test_centroid_of_a_huge_mask_is_exact(device):
    """The sum of its columns is far beyond 32 bits."""
    masks = np.zeros((1, 3001, 4003), bool)
    masks[0, 1:, 2:] = True
    assert to_host(mask_centroids(on(device, masks))).tolist() == [[2 + 4001 / 2, 1 + 1500]]


def test_no_centroids_and_shapes_that_do_not_fit(device, rng):
    assert mask_centroids(on(device, np.zeros((0, 5, 6), np.float32))).shape == (0, 2)
    assert to_host(mask_centroids(on(device, np.zeros((2, 0, 6), np.float32)))).tolist() == [[0, 0], [0, 0]]
    strided = rng.normal(0, 1, (2, 20, 30)).astype(np.float32)
    seen_from_the_side = mask_centroids(on(device, strided).transpose(0, 2, 1))
    np.testing.assert_array_equal(to_host(seen_from_the_side)[:, ::-1], to_host(mask_centroids(on(device, strided))))
    with pytest.raises(InputError, match=r"expected numbers \(M, 1, H, W\) or \(M, H, W\)"):
        mask_centroids(on(device, np.zeros((5, 6), bool)))
    _, geometry = Preprocess((8, 8))(ImageBatch.from_arrays([random_image(rng, 9, 9)], device=device))
    with pytest.raises(InputError, match="expected 1, one per canvas"):
        mask_centroids(on(device, np.zeros((2, 8, 8), bool)), geometry)
    with pytest.raises(InputError, match="threshold is nan"):
        mask_centroids(on(device, np.zeros((2, 8, 8), bool)), threshold=np.nan)


# --- objects with alpha -----------------------------------------------------------------------------------------------


def half_covered(mask, width, height):
    """Which pixels of a region are covered by half or more of the stretched 0-and-1 mask, and which are too close to
    say."""
    stretched = cv2.resize(mask.astype(np.float64), (width, height), interpolation=cv2.INTER_LINEAR)
    return stretched >= 0.5, np.abs(stretched - 0.5) < 1e-6


@pytest.mark.parametrize("color", ["rgb", "bgr", "rgba", "bgra", "gray"])
def test_objects_have_their_pixels_and_their_mask_as_alpha(device, rng, color):
    images = [random_image(rng, height, width, CHANNELS[color]) for height, width in [(60, 91), (1, 1), (33, 20)]]
    boxes = np.array([[5.5, 6.2, 60, 44], [0, 0, 1, 1], [-9, -9, 99, 30.5], [80, 50, 91, 60]], np.float32)
    which = np.array([0, 1, 2, 0])
    parts = [(5, 6, 60, 44), (0, 0, 1, 1), (0, 0, 20, 31), (80, 50, 91, 60)]
    logits = rng.normal(0, 1, (4, 1, 14, 14)).astype(np.float32)
    logits[1] = 1
    batch = ImageBatch.from_arrays([on(device, image) for image in images], color=color)
    objects = cut_out_rgba(batch, on(device, boxes), on(device, logits), box_images=on(device, which))
    assert objects.color == "rgba"
    assert objects.device == device
    for got, image, (x1, y1, x2, y2), mask in zip(objects, which, parts, logits[:, 0] > 0, strict=True):
        source = images[image][y1:y2, x1:x2]
        alpha = source[..., 3] if len(color) == 4 and color != "gray" else np.full(source.shape[:2], 255)
        rgb = np.repeat(source, 3, 2) if color == "gray" else source[..., :3]
        np.testing.assert_array_equal(to_host(got)[..., :3], rgb[..., ::-1] if color[:3] == "bgr" else rgb)
        inside, doubtful = half_covered(mask, x2 - x1, y2 - y1)
        assert ((to_host(got)[..., 3] == np.where(inside, alpha, 0)) | doubtful).all()


def test_masks_of_other_regions_than_the_boxes(device, rng):
    """Masks of the whole image are not resampled at all; a region may lie anywhere, and be none."""
    image = random_image(rng, 40, 50)
    boxes = np.array([[10, 5, 30, 25]] * 5, np.float32)
    regions = np.array([[0, 0, 50, 40], [20, 5, 99, 25.4], [np.nan, 0, 1, 1], [31, 0, 40, 9], [9, 9, 9, 20]])
    masks = rng.random((5, 40, 50)) < 0.5
    masks[1] = True
    objects = cut_out_rgba(on(device, image), boxes, on(device, masks), mask_regions=on(device, regions))
    alphas = [to_host(got)[..., 3] for got in objects]
    np.testing.assert_array_equal(alphas[0], masks[0, 5:25, 10:30] * 255)
    assert (alphas[1] == np.repeat([0, 255], 10)).all()
    assert not np.any(alphas[2:])


def test_objects_of_flat_detections(device, rng):
    images = [random_image(rng, 20, 30), random_image(rng, 30, 20)]
    boxes, which = on(device, np.array([[1, 2, 9, 8], [3, 4, 15, 26]], np.float32)), on(device, np.array([0, 1]))
    rest = on(device, np.zeros(2, np.float32)), on(device, np.zeros(2, np.int32))
    found = FlatDetections(boxes, *rest, which)
    batch = ImageBatch.from_arrays([on(device, image) for image in images])
    masks = on(device, np.ones((2, 3, 3), bool))
    objects = cut_out_rgba(batch, found, masks)
    np.testing.assert_array_equal(to_host(objects[1])[..., :3], images[1][4:26, 3:15])
    assert [to_host(got)[..., 3].min() for got in objects] == [255, 255]
    with pytest.raises(InputError, match="which have their own"):
        cut_out_rgba(batch, found, masks, box_images=which)
    padded = Detections(boxes[None], *(array[None] for array in rest), on(device, np.array([2], np.int32)), device)
    with pytest.raises(InputError, match=r"call their flat\(\)"):
        cut_out_rgba(batch, padded, masks)


def test_no_objects_and_objects_that_cannot_be(device, rng):
    image = on(device, random_image(rng, 20, 30))
    none = cut_out_rgba(image, np.zeros((0, 4), np.float32), on(device, np.zeros((0, 9, 9), bool)))
    assert (len(none), none.color, none.device) == (0, "rgba", device)
    one = on(device, np.ones((1, 9, 9), bool))
    for box in ([np.nan, 0, 5, 5], [5, 5, 5, 9], [30, 0, 40, 9], [9, 9, 3, 12]):
        with pytest.raises(InputError, match=r"box 0 is .* with a part inside the image"):
            cut_out_rgba(image, [box], one)
    with pytest.raises(InputError, match=r"expected \(2, H, W\), one mask per box"):
        cut_out_rgba(image, [[0, 0, 5, 5]] * 2, one)
    with pytest.raises(InputError, match=r"expected \(1, H, W\), one mask per box"):
        cut_out_rgba(image, [[0, 0, 5, 5]], on(device, np.zeros((1, 0, 4), bool)))
    with pytest.raises(InputError, match="one region per box"):
        cut_out_rgba(image, [[0, 0, 5, 5]], one, mask_regions=np.zeros((2, 4)))


# --- pasted masks -----------------------------------------------------------------------------------------------------


def pasted(mask, box, size, threshold):
    """In float64: the mask stretched over the box, and which pixels are too close to the threshold or to the box's
    border to say."""
    x1, y1, x2, y2 = (np.float64(side) for side in box)
    (height, width), (rows, columns) = size, mask.shape
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    across = ((x - x1) / (x2 - x1) * columns - 0.5).clip(0, columns - 1)
    down = ((y - y1) / (y2 - y1) * rows - 0.5).clip(0, rows - 1)
    left, top = np.floor(across).astype(int), np.floor(down).astype(int)
    right, bottom = (left + 1).clip(0, columns - 1), (top + 1).clip(0, rows - 1)
    share_x, share_y = across - left, (down - top)[:, None]
    above = mask[top][:, left] * (1 - share_x) + mask[top][:, right] * share_x
    below = mask[bottom][:, left] * (1 - share_x) + mask[bottom][:, right] * share_x
    values = above * (1 - share_y) + below * share_y
    inside = ((x >= x1) & (x < x2))[None] & ((y >= y1) & (y < y2))[:, None]
    at_border = [np.minimum(abs(centers - a), abs(centers - b)) < 1e-4 for centers, a, b in ((x, x1, x2), (y, y1, y2))]
    doubtful = (np.abs(values - threshold) < 1e-4 * np.abs(mask).max()) | at_border[0][None] | at_border[1][:, None]
    return (values > threshold) & inside, doubtful


@pytest.mark.parametrize(("rows", "columns"), [(28, 28), (1, 1), (7, 33), (3, 1)])
@pytest.mark.parametrize("size", [(120, 161), (1, 1), (5, 400)])
def test_masks_over_boxes(device, rng, rows, columns, size):
    height, width = size
    ends = np.sort(rng.uniform(-0.3, 1.3, (9, 2, 2)), axis=1) * [width, height]
    boxes = ends.reshape(9, 4).astype(np.float32)
    boxes[0] = [0, 0, width, height]
    logits = rng.normal(0, 1, (9, 1, rows, columns)).astype(np.float32)
    got = paste_masks(on(device, logits), on(device, boxes), size)
    assert got.dtype == np.bool_
    assert got.shape == (9, *size)
    for index, box in enumerate(boxes):
        wanted, doubtful = pasted(logits[index, 0], box, size, 0)
        assert ((to_host(got)[index] == wanted) | doubtful).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_masks_over_any_box(device, data):
    """Boxes that are nothing give nothing, others what the formula says."""
    side = st.one_of(st.floats(-50, 90, width=32), st.floats(width=32), st.sampled_from([0.0, 0.5, 40.0]))
    box = np.array([data.draw(side) for _ in range(4)], np.float32)
    size = (data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50)))
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).uniform(0, 1, (1, 5, 4)).astype(np.float32)
    got = to_host(paste_masks(on(device, mask), on(device, box[None]), size, threshold=0.5))[0]
    if not np.isfinite(box).all() or not (box[0] < box[2] and box[1] < box[3]):
        assert not got.any()
        return
    wanted, doubtful = pasted(mask[0], box, size, 0.5)
    if np.abs(box).max() < 1000:  # beyond, float32 has no room for the position inside the box
        assert ((got == wanted) | doubtful).all()


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_masks_of_crops_are_opencvs_resize(device, rng, fit):
    """Whole images and crops; what a letterbox filled is cut off first. Ragged and dense are the same masks."""
    images = [random_image(rng, 70, 101), random_image(rng, 33, 20), random_image(rng, 9, 200)]
    batch = ImageBatch.from_arrays([on(device, image) for image in images])
    plan = Preprocess((32, 40), fit=fit)
    boxes = np.array([[3, 4, 50, 61], [0, 0, 20, 33], [150, 2, 170, 8]], np.float32)
    which = np.array([0, 1, 2])
    for given_boxes in (None, boxes):
        options = {} if given_boxes is None else {"boxes": on(device, boxes), "box_images": on(device, which)}
        _, geometry = plan(batch, **options)
        logits = rng.normal(0, 1, (3, 1, 32, 40)).astype(np.float32)
        ragged = paste_masks(on(device, logits), geometry, batch.sizes)
        assert ragged.size == (70, 200)
        assert not ragged.overflowed()
        dense = to_host(paste_masks(on(device, logits), geometry, (70, 200)))
        np.testing.assert_array_equal(to_host(ragged.dense()), dense)
        for index, image in enumerate(images):
            height, width = image.shape[:2]
            x1, y1, x2, y2 = (0, 0, width, height) if given_boxes is None else boxes[index].astype(int)
            mask = logits[index, 0]
            if fit == "letterbox":
                rows, columns, top, left = letterbox_placement(y2 - y1, x2 - x1, (32, 40))
                mask = mask[top : top + rows, left : left + columns]
            values = cv2.resize(mask.astype(np.float64), (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)
            wanted = np.zeros((70, 200), bool)
            wanted[y1:y2, x1:x2] = values > 0
            doubtful = np.zeros((70, 200), bool)
            doubtful[y1:y2, x1:x2] = np.abs(values) < 1e-4
            assert ((dense[index] == wanted) | doubtful).all()
            np.testing.assert_array_equal(ragged.to_list()[index], dense[index, y1:y2, x1:x2])
            assert to_host(ragged.table)[index, 1:].tolist() == [y2 - y1, x2 - x1, x1, y1]


def test_masks_of_the_sources_size_are_not_resampled(device, rng):
    masks = rng.random((3, 37, 53)) < 0.5
    boxes = on(device, np.array([[0, 0, 53, 37]] * 3, np.float32))
    np.testing.assert_array_equal(to_host(paste_masks(on(device, masks), boxes, (37, 53), threshold=0.5)), masks)


def test_too_little_room_for_pasted_masks(device):
    batch = ImageBatch.from_arrays([on(device, np.zeros((size, size, 3), np.uint8)) for size in (10, 20)])
    _, geometry = Preprocess((8, 8))(batch)
    masks = paste_masks(on(device, np.ones((2, 8, 8), bool)), geometry, batch.sizes, limit_bytes=150)
    assert masks.overflowed()
    assert int(masks.needed[0]) == 100 + 400
    assert to_host(masks.table)[:, 1].tolist() == [10, 0]
    assert to_host(masks.dense()).sum() == 100


def test_empty_canvases_and_nothing_at_all(device):
    """A box of no area, on a device, gives a canvas of fill. Masks smaller than the canvases are not read beyond."""
    batch = ImageBatch.from_arrays([on(device, np.zeros((20, 30, 3), np.uint8))])
    full = [0, 0, 30, 20]
    boxes = np.array([full, full if device == "cpu" else [5, 5, 5, 9]], np.float32)
    _, geometry = Preprocess((8, 8))(batch, boxes=on(device, boxes))
    areas = to_host(paste_masks(on(device, np.ones((2, 3, 2), bool)), geometry, (20, 30))).sum(axis=(1, 2)).tolist()
    assert areas == [600, 600 if device == "cpu" else 0]
    none = on(device, np.zeros((0, 4), np.float32))
    assert paste_masks(on(device, np.zeros((0, 8, 8), bool)), none, (20, 30)).shape == (0, 20, 30)
    assert paste_masks(on(device, np.ones((2, 8, 8), bool)), on(device, boxes), (0, 30)).shape == (2, 0, 30)


def test_what_cannot_be_pasted(device, rng):
    masks, boxes = on(device, np.ones((2, 8, 8), bool)), on(device, np.zeros((2, 4), np.float32))
    _, geometry = Preprocess((8, 8))(ImageBatch.from_arrays([on(device, random_image(rng, 9, 9))]))
    with pytest.raises(InputError, match="expected 1, one per canvas"):
        paste_masks(masks, geometry, (9, 9))
    with pytest.raises(InputError, match=r"expected a Geometry or \(2, 4\) boxes"):
        paste_masks(masks, boxes[:1], (9, 9))
    for size in ((9,), (9.5, 9), (-1, 9), "9", [[[9, 9]]], [(9, 9), (9,)]):
        with pytest.raises(InputError, match=r"expected \(height, width\)"):
            paste_masks(masks, boxes, size)
    with pytest.raises(InputError, match="boxes do not say their sources"):
        paste_masks(masks, boxes, [(9, 9), (9, 9)])
    with pytest.raises(InputError, match="limit_bytes came with one size"):
        paste_masks(masks, boxes, (9, 9), limit_bytes=9)
    with pytest.raises(InputError, match="no empty side"):
        paste_masks(masks[:, :0], boxes, (9, 9))
