"""NMS against a plain greedy loop, bit for bit the same choice on both devices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import geometry_on, greedy_nms, iou, on, to_host

from nbvision.errors import InputError
from nbvision.ops.boxes import Detections, box_iou, nms, nms_boxes
from nbvision.ops.geometry import Geometry
from nbvision.ops.preprocess import Preprocess


def canvas_geometry(device: str, sizes: list[tuple[int, int]], canvas: tuple[int, int] = (320, 320)) -> Geometry:
    geometry = Preprocess(canvas)._regions.of(np.array(sizes, np.int32).reshape(-1, 2))
    return geometry_on(device, geometry)


def random_head(rng: np.random.Generator, images: int, classes: int, anchors: int) -> np.ndarray:
    """Boxes in clusters, so that many overlap; scores with ties."""
    centers = rng.uniform(40, 280, (images, 1, 8, 2)).repeat(-(-anchors // 8), 1).reshape(images, -1, 2)[:, :anchors]
    boxes = np.concatenate([centers + rng.normal(0, 6, centers.shape), rng.uniform(20, 90, centers.shape)], axis=2)
    scores = np.round(rng.uniform(0, 1, (images, anchors, classes)) ** 4, 2)
    return np.ascontiguousarray(np.concatenate([boxes, scores], axis=2).transpose(0, 2, 1), dtype=np.float32)


def expected(head: np.ndarray, size: tuple[int, int], *, score: float, overlap: float, aware: bool, most: int):
    """Boxes, scores and labels of one image by the plain loop."""
    height, width = size
    ratio = min(320 / height, 320 / width)
    new = np.array([round(width * ratio), round(height * ratio)])
    pad = np.array([round((320 - new[0]) / 2 - 0.1), round((320 - new[1]) / 2 - 0.1)])
    center, half = head[:2].T.astype(np.float64), head[2:4].T.astype(np.float64) / 2
    scale = np.array([width, height]) / new
    corners = [np.clip((center + sign * half - pad) * scale, 0, [width, height]) for sign in (-1, 1)]
    boxes = np.concatenate(corners, axis=1)
    labels, scores = head[4:].argmax(0), head[4:].max(0)
    chosen = np.flatnonzero(scores > np.float32(score))
    kept = greedy_nms(boxes[chosen], scores[chosen], labels[chosen], iou_threshold=overlap, class_aware=aware)
    keep = chosen[kept][:most]
    return boxes[keep], scores[keep], labels[keep]


@pytest.mark.parametrize("class_aware", [True, False])
@pytest.mark.parametrize(("classes", "anchors"), [(1, 1), (3, 77), (6, 2100), (80, 513)])
def test_nms_is_greedy(device, rng, class_aware, classes, anchors):
    sizes = [(480, 640), (333, 100), (320, 320)]
    head = random_head(rng, len(sizes), classes, anchors)
    found = nms(
        on(device, head),
        canvas_geometry(device, sizes),
        score_threshold=0.3,
        iou_threshold=0.5,
        class_aware=class_aware,
        max_detections=50,
        max_candidates=anchors,
    ).to_host()
    for index, size in enumerate(sizes):
        boxes, scores, labels = expected(head[index], size, score=0.3, overlap=0.5, aware=class_aware, most=50)
        count = int(found.counts[index])
        assert count == len(boxes)
        np.testing.assert_array_equal(found.scores[index, :count], scores)
        np.testing.assert_array_equal(found.labels[index, :count], labels)
        np.testing.assert_allclose(found.boxes[index, :count], boxes, atol=2e-3)
        assert not found.boxes[index, count:].any()


def test_nms_ties_and_repeats_are_deterministic(device):
    """Equal scores go by anchor, and a second run gives the same bytes."""
    head = np.zeros((1, 5, 400), np.float32)
    head[0, 0] = np.arange(400) % 20 * 15 + 8
    head[0, 1] = np.arange(400) // 20 * 15 + 8
    head[0, 2:4] = 14
    head[0, 4] = 0.5
    geometry = canvas_geometry(device, [(320, 320)])
    runs = [nms(on(device, head), geometry, max_detections=30).to_host() for _ in range(3)]
    assert runs[0].counts[0] == 30
    np.testing.assert_allclose(runs[0].boxes[0, 1], [16, 1, 30, 15])
    for run in runs[1:]:
        np.testing.assert_array_equal(run.boxes, runs[0].boxes)


def test_candidates_are_limited_to_the_best(device, rng):
    head = random_head(rng, 1, 2, 600)
    geometry = canvas_geometry(device, [(320, 320)])
    few = nms(on(device, head), geometry, max_candidates=5, iou_threshold=1.0, score_threshold=0).to_host()
    best = np.sort(head[0, 4:].max(0))[::-1][:5]
    np.testing.assert_array_equal(few.scores[0, :5], best)
    assert few.counts[0] == 5


def test_flat_lists_detections_in_order(device):
    arrays = [np.arange(24, dtype=np.float32).reshape(3, 2, 4), np.array([[3, 2], [0, 0], [1, 0]], np.float32)]
    labels, counts = np.array([[1, 2], [0, 0], [5, 0]], np.int32), np.array([2, 0, 1], np.int32)
    flat = Detections(*(on(device, a) for a in (*arrays, labels, counts)), device=device).flat()
    assert to_host(flat.images).tolist() == [0, 0, 2]
    assert to_host(flat.scores).tolist() == [3, 2, 1]
    assert to_host(flat.labels).tolist() == [1, 2, 5]
    np.testing.assert_array_equal(to_host(flat.boxes), arrays[0].reshape(-1, 4)[[0, 1, 4]])


def test_missing_image_and_empty_batch_find_nothing(device, rng):
    head = random_head(rng, 2, 3, 50)
    found = nms(on(device, head), canvas_geometry(device, [(0, 0), (320, 320)])).to_host()
    assert not found.boxes[0].any()  # a missing image has no place to map to: every box is empty
    empty = nms(on(device, head[:0]), canvas_geometry(device, []))
    assert empty.boxes.shape == (0, 100, 4)
    assert len(empty.flat()) == 0


@pytest.mark.parametrize("shape", [(2, 7, 50), (1, 4, 50), (1, 50), (1, 7, 50, 1)])
def test_bad_predictions_are_refused(device, shape):
    with pytest.raises(InputError, match=r"expected floats of shape \(1, 4 \+ classes, anchors\)"):
        nms(on(device, np.zeros(shape, np.float32)), canvas_geometry(device, [(9, 9)]))


boxes = st.lists(st.tuples(*[st.floats(0, 50, width=32)] * 4), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=boxes, second=boxes)
def test_box_iou_of_any_boxes(device, first, second):
    a, b = np.array(first, np.float32), np.array(second, np.float32)
    a, b = (np.concatenate([np.minimum(x[:, :2], x[:, 2:]), np.maximum(x[:, :2], x[:, 2:])], 1) for x in (a, b))
    matrix = to_host(box_iou(on(device, a), on(device, b)))
    wanted = [[iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(matrix, wanted, atol=1e-5)
    assert (matrix >= 0).all()
    assert (matrix <= 1 + 1e-5).all()


def test_box_iou_refuses_what_are_no_boxes():
    with pytest.raises(InputError, match=r"second has shape \(2, 3\); expected \(N, 4\)"):
        box_iou(np.zeros((2, 4)), np.zeros((2, 3)))
    assert box_iou([[0, 0, 2, 2]], [[0, 0, 2, 1]]).tolist() == [[0.5]]


def soft_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, *, sigma: float, score: float, most: int):
    """Places kept and their lowered scores, by a plain loop in float64."""
    left, scores, kept = list(np.flatnonzero(scores > score)), scores.astype(np.float64), []
    while left and len(kept) < most:
        best = max(left, key=lambda index: (scores[index], -index))
        kept.append(best)
        left.remove(best)
        for other in left:
            if labels[other] == labels[best]:
                scores[other] *= np.exp(-(iou(boxes[best], boxes[other]) ** 2) / sigma)
        left = [index for index in left if scores[index] > score]
    return kept, scores[kept]


def random_boxes(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    corner = rng.uniform(0, 100, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (count, 2))], axis=1).astype(np.float32)
    return boxes, rng.permutation(count).astype(np.float32) / max(count, 1), rng.integers(0, 3, count)


@pytest.mark.parametrize("count", [1, 2, 33, 257, 3000])
@pytest.mark.parametrize("labelled", [True, False])
def test_nms_of_plain_boxes_is_greedy(device, rng, count, labelled):
    boxes, scores, labels = random_boxes(rng, count)
    scores = np.round(scores - 0.2, 2)  # ties, and scores below 0
    given = on(device, labels) if labelled else None
    kept, found = nms_boxes(on(device, boxes), on(device, scores), given, iou_threshold=0.4, max_detections=60)
    wanted = greedy_nms(boxes, scores, labels, iou_threshold=0.4, class_aware=labelled)[:60]
    assert to_host(kept)[: int(found)].tolist() == wanted
    assert (to_host(kept)[int(found) :] == -1).all()


def test_nms_of_a_batch_is_that_of_each_image(device, rng):
    """Counts say how much of each row is filled; candidates are limited to the best."""
    boxes, scores, labels = (np.stack(part) for part in zip(*[random_boxes(rng, 90) for _ in range(3)], strict=True))
    counts = np.array([90, 0, 17])
    arrays = [on(device, array) for array in (boxes, scores, labels)]
    kept, found = nms_boxes(*arrays, counts=on(device, counts), iou_threshold=0.3, max_candidates=40)
    assert kept.shape == (3, 90)
    for index, count in enumerate(counts):
        best = np.argsort(-scores[index, :count])[:40]
        wanted = greedy_nms(
            boxes[index, best], scores[index, best], labels[index, best], iou_threshold=0.3, class_aware=True
        )
        assert to_host(kept)[index, : int(found[index])].tolist() == best[wanted].tolist()


@pytest.mark.parametrize("count", [1, 40, 700])
def test_soft_nms_lowers_scores(device, rng, count):
    boxes, scores, labels = random_boxes(rng, count)
    arrays = [on(device, array) for array in (boxes, scores, labels)]
    kept, found = nms_boxes(*arrays, soft_sigma=0.5, score_threshold=0.05, max_detections=50)
    wanted, _ = soft_nms(boxes, scores, labels, sigma=0.5, score=0.05, most=50)
    assert to_host(kept)[: int(found)].tolist() == wanted


def test_soft_nms_of_a_head(device, rng):
    head = random_head(rng, 1, 2, 300)
    head[:, 4:] = rng.permutation(600).reshape(1, 2, 300) / 600
    options = {"score_threshold": 0.3, "soft_sigma": 0.4, "max_candidates": 300}
    found = nms(on(device, head), canvas_geometry(device, [(320, 320)]), **options).to_host()
    center, half = head[0, :2].T, head[0, 2:4].T / 2
    boxes = np.clip(np.concatenate([center - half, center + half], axis=1), 0, 320)
    scores, labels = head[0, 4:].max(0), head[0, 4:].argmax(0)
    kept, lowered = soft_nms(boxes, scores, labels, sigma=0.4, score=0.3, most=100)
    count = int(found.counts[0])
    assert found.anchors[0, :count].tolist() == kept
    np.testing.assert_allclose(found.scores[0, :count], lowered, rtol=1e-5)


def test_rows_after_the_classes_are_left_alone(device, rng):
    """A head with mask coefficients: ``anchors`` says which columns to take them from."""
    head = random_head(rng, 2, 3, 80)
    longer = np.concatenate([head, rng.uniform(5, 9, (2, 32, 80)).astype(np.float32)], axis=1)
    geometry = canvas_geometry(device, [(320, 320)] * 2)
    plain = nms(on(device, head), geometry).to_host()
    found = nms(on(device, longer), geometry, classes=3).to_host()
    np.testing.assert_array_equal(found.boxes, plain.boxes)
    np.testing.assert_array_equal(found.anchors, plain.anchors)
    flat = found.flat()
    np.testing.assert_array_equal(head[flat.images, 4 + flat.labels, flat.anchors], flat.scores)


def test_bad_options_of_nms_are_refused(device):
    boxes, scores = on(device, np.zeros((3, 4), np.float32)), on(device, np.zeros(3, np.float32))
    with pytest.raises(InputError, match=r"scores \(2,\); expected \(K, 4\) and \(K,\)"):
        nms_boxes(boxes, scores[:2])
    with pytest.raises(InputError, match="expected floats"):
        nms_boxes(boxes, on(device, np.zeros(3, np.int32)))
    with pytest.raises(InputError, match="expected integers of shape"):
        nms_boxes(boxes, scores, scores)
    with pytest.raises(InputError, match="soft_sigma is -1; expected more than 0"):
        nms_boxes(boxes, scores, soft_sigma=-1)
    with pytest.raises(InputError, match="classes is 4; expected 1 to 3"):
        nms(on(device, np.zeros((1, 7, 5), np.float32)), canvas_geometry(device, [(9, 9)]), classes=4)
    kept, count = nms_boxes(boxes[:0], scores[:0])
    assert to_host(kept).tolist() == [-1]
    assert int(count) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": "much"}, "score_threshold is 'much'; expected a number"),
        ({"score_threshold": float("nan")}, "score_threshold is nan; expected a number"),
        ({"iou_threshold": None}, "iou_threshold is None; expected a number"),
        ({"max_detections": 2.5}, "max_detections is 2.5; expected an integer, 1 or more"),
        ({"classes": "x"}, "classes is 'x'; expected an integer, 1 or more"),
        ({"max_candidates": 0}, "max_candidates is 0; expected an integer, 1 or more"),
    ],
)
def test_limits_of_nms_are_numbers(device, options, message):
    geometry = canvas_geometry(device, [(9, 9)])
    with pytest.raises(InputError, match=message):
        nms(on(device, np.zeros((1, 7, 5), np.float32)), geometry, **options)


def test_a_geometry_is_one(device):
    with pytest.raises(InputError, match="geometry is a NoneType; expected what Preprocess returned"):
        nms(on(device, np.zeros((1, 7, 5), np.float32)), None)
