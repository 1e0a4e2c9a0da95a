"""Boxes: scores of a YOLO head, overlap, and greedy non-maximum suppression.

The pixel functions serve both devices. A head's output is ``(4 + classes, anchors)`` float32 per image: centre x,
centre y, width, height in canvas pixels, then one score per class.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from nbvision_kernels.pixel import clamp, pixel_function
from nbvision_kernels.regions import FIELDS, HEIGHT, OFFSET_X, OFFSET_Y, SCALE_X, SCALE_Y, SCALES, WIDTH, X, Y

__all__ = ["best_class", "comes_before", "nms_cpu", "overlap", "suppresses", "write_source_box"]


@pixel_function
def best_class(predictions, start, anchors, anchor, classes):
    """The class with the highest score at ``anchor``; the first of equals."""
    best = np.int32(0)
    best_score = predictions[start + np.int64(4) * anchors + anchor]
    for index in range(1, classes):
        score = predictions[start + np.int64(4 + index) * anchors + anchor]
        if score > best_score:
            best_score = score
            best = np.int32(index)
    return best


@pixel_function
def write_source_box(predictions, start, anchors, anchor, regions, scales, image, boxes, to):
    """x1, y1, x2, y2 of ``anchor`` in source pixels, clipped to the source region, at ``boxes[to]``."""
    center_x = predictions[start + anchor]
    center_y = predictions[start + anchors + anchor]
    half_width = predictions[start + 2 * anchors + anchor] * np.float32(0.5)
    half_height = predictions[start + 3 * anchors + anchor] * np.float32(0.5)
    scale_row = np.int64(image) * SCALES
    row = np.int64(image) * FIELDS
    x_first = np.float32(regions[row + X])
    y_first = np.float32(regions[row + Y])
    x_last = x_first + np.float32(regions[row + WIDTH])
    y_last = y_first + np.float32(regions[row + HEIGHT])
    scale_x = scales[scale_row + SCALE_X]
    scale_y = scales[scale_row + SCALE_Y]
    offset_x = scales[scale_row + OFFSET_X]
    offset_y = scales[scale_row + OFFSET_Y]
    boxes[to] = clamp((center_x - half_width) * scale_x + offset_x, x_first, x_last)
    boxes[to + 1] = clamp((center_y - half_height) * scale_y + offset_y, y_first, y_last)
    boxes[to + 2] = clamp((center_x + half_width) * scale_x + offset_x, x_first, x_last)
    boxes[to + 3] = clamp((center_y + half_height) * scale_y + offset_y, y_first, y_last)


@pixel_function
def overlap(boxes, first, second):
    """Intersection over union of the boxes at ``boxes[first]`` and ``boxes[second]``; 0 where both have no area."""
    width = min(boxes[first + 2], boxes[second + 2]) - max(boxes[first], boxes[second])
    height = min(boxes[first + 3], boxes[second + 3]) - max(boxes[first + 1], boxes[second + 1])
    intersection = max(width, np.float32(0)) * max(height, np.float32(0))
    area_first = (boxes[first + 2] - boxes[first]) * (boxes[first + 3] - boxes[first + 1])
    area_second = (boxes[second + 2] - boxes[second]) * (boxes[second + 3] - boxes[second + 1])
    union = area_first + area_second - intersection
    return intersection / union if union > 0 else np.float32(0)


@pixel_function
def suppresses(boxes, labels, first, second, threshold, class_aware):
    """Whether the kept candidate ``first`` removes candidate ``second``: strictly more overlap, same class if asked."""
    same = labels[first] == labels[second] or not class_aware
    return same and overlap(boxes, first * 4, second * 4) > threshold


@pixel_function
def comes_before(score_a, index_a, score_b, index_b):
    """Order of candidates: higher score first, then lower anchor, so that equal scores never depend on timing."""
    return score_a > score_b or (score_a == score_b and index_a < index_b)


def nms_cpu(
    predictions,
    images,
    classes,
    anchors,
    regions,
    scales,
    score_threshold,
    iou_threshold,
    class_aware,
    max_candidates,
    max_detections,
    boxes,
    scores,
    labels,
    counts,
):
    """Head output -> the kept boxes of each image, images in parallel."""
    for image in prange(images):
        start = np.int64(image) * (4 + classes) * anchors
        found_anchor = np.empty(anchors, np.int32)
        found_score = np.empty(anchors, np.float32)
        found = 0
        for anchor in range(anchors):
            label = best_class(predictions, start, anchors, anchor, classes)
            score = predictions[start + (4 + label) * anchors + anchor]
            if score > score_threshold:
                found_anchor[found] = anchor
                found_score[found] = score
                found += 1
        # A stable sort keeps equal scores in the order of their anchors.
        order = np.argsort(-found_score[:found], kind="mergesort")[:max_candidates]
        candidates = len(order)
        candidate_boxes = np.empty(candidates * 4, np.float32)
        candidate_labels = np.empty(candidates, np.int32)
        for rank in range(candidates):
            anchor = np.int64(found_anchor[order[rank]])
            candidate_labels[rank] = best_class(predictions, start, anchors, anchor, classes)
            write_source_box(
                predictions,
                start,
                anchors,
                anchor,
                regions,
                scales,
                image,
                candidate_boxes,
                np.int64(rank) * 4,
            )
        removed = np.zeros(candidates, np.bool_)
        kept = 0
        for rank in range(candidates):
            if removed[rank] or kept == max_detections:
                continue
            to = np.int64(image) * max_detections + kept
            for side in range(4):
                boxes[to * 4 + side] = candidate_boxes[rank * 4 + side]
            scores[to] = found_score[order[rank]]
            labels[to] = candidate_labels[rank]
            kept += 1
            for other in range(rank + 1, candidates):
                if suppresses(candidate_boxes, candidate_labels, rank, other, iou_threshold, class_aware):
                    removed[other] = True
        counts[image] = kept
