"""Boxes: scores of a YOLO head, overlap, and greedy non-maximum suppression.

The pixel functions serve both devices. A head's output is ``(rows, anchors)`` float32 per image: centre x,
centre y, width, height in canvas pixels, then one score per class, then rows that nothing here reads.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from nbvision_kernels.codes import FIELDS, HEIGHT, OFFSET_X, OFFSET_Y, SCALE_X, SCALE_Y, SCALES, WIDTH, X, Y
from nbvision_kernels.pixel import clamp, pixel_function

__all__ = [
    "best_class",
    "box_iou_cpu",
    "decayed",
    "index_of_key",
    "nms_boxes_cpu",
    "nms_cpu",
    "overlap",
    "rank_key",
    "suppresses",
    "write_source_box",
]


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
def overlap(boxes, first, others, second):
    """Intersection over union of the boxes at ``boxes[first]`` and ``others[second]``; 0 where both have no area."""
    width = min(boxes[first + 2], others[second + 2]) - max(boxes[first], others[second])
    height = min(boxes[first + 3], others[second + 3]) - max(boxes[first + 1], others[second + 1])
    intersection = max(width, np.float32(0)) * max(height, np.float32(0))
    area_first = (boxes[first + 2] - boxes[first]) * (boxes[first + 3] - boxes[first + 1])
    area_second = (others[second + 2] - others[second]) * (others[second + 3] - others[second + 1])
    union = area_first + area_second - intersection
    return intersection / union if union > np.float32(0) else np.float32(0)


@pixel_function
def suppresses(boxes, labels, first, second, threshold, class_aware):
    """Whether the kept candidate ``first`` removes candidate ``second``: strictly more overlap, same class if asked."""
    same = labels[first] == labels[second] or not class_aware
    return same and overlap(boxes, first * 4, boxes, second * 4) > threshold


@pixel_function
def rank_key(score_bits, index):
    """A uint64 that orders candidates: higher score first, then lower index. No two are equal, so an order of keys
    never depends on timing, and none is 0.

    ``score_bits`` are those of the float32: no scalar is reinterpreted in a way that both targets compile, so callers
    read the scores through a uint32 pointer.
    """
    bits = np.uint32(score_bits)
    # Negative floats order backwards, below the positive.
    ordered = np.uint32(~bits) if bits >> np.uint32(31) else np.uint32(bits | np.uint32(0x80000000))
    return np.uint64((np.uint64(ordered) << np.uint64(32)) | np.uint64(np.uint32(0xFFFFFFFF) - np.uint32(index)))


@pixel_function
def index_of_key(key):
    """The index that :func:`rank_key` was given."""
    return np.int32(np.uint32(0xFFFFFFFF) - np.uint32(key & np.uint64(0xFFFFFFFF)))


@pixel_function
def decayed(score, iou, sigma):
    """Gaussian soft-NMS: a score falls smoothly with the overlap by a better box."""
    return np.float32(score * math.exp(np.float32(-(iou * iou) / sigma)))


@pixel_function
def keep_best(
    candidate_boxes,
    candidate_scores,
    candidate_labels,
    candidates,
    score_threshold,
    iou_threshold,
    soft_sigma,
    class_aware,
    max_detections,
    kept_ranks,
):
    """Suppress the ranked candidates of one image, and return how many stay; CPU only.

    ``candidate_scores`` are overwritten where ``soft_sigma`` is not 0.
    """
    gone = np.zeros(candidates, np.bool_)
    kept = 0
    while kept < max_detections:
        # Greedy suppression changes no score, so the first left one is the best.
        best = -1
        for rank in range(candidates):
            if gone[rank]:
                continue
            if best < 0 or candidate_scores[rank] > candidate_scores[best]:
                best = rank
            if soft_sigma == 0:
                break
        if best < 0:
            break
        gone[best] = True
        kept_ranks[kept] = best
        kept += 1
        for other in range(candidates):
            if gone[other]:
                continue
            if soft_sigma == 0:
                gone[other] = suppresses(candidate_boxes, candidate_labels, best, other, iou_threshold, class_aware)
            elif candidate_labels[best] == candidate_labels[other] or not class_aware:
                iou = overlap(candidate_boxes, best * 4, candidate_boxes, other * 4)
                candidate_scores[other] = decayed(candidate_scores[other], iou, soft_sigma)
                gone[other] = not candidate_scores[other] > score_threshold
    return kept


@pixel_function
def write_best(
    candidate_boxes,
    candidate_scores,
    candidate_labels,
    ranked,
    score_threshold,
    iou_threshold,
    soft_sigma,
    class_aware,
    max_detections,
    first,
    boxes,
    scores,
    labels,
    indices,
):
    """Write what is kept of one image's ranked candidates from place ``first`` on; returns how many."""
    kept_ranks = np.empty(max_detections, np.int64)
    kept = keep_best(
        candidate_boxes,
        candidate_scores,
        candidate_labels,
        len(ranked),
        score_threshold,
        iou_threshold,
        soft_sigma,
        class_aware,
        max_detections,
        kept_ranks,
    )
    for place in range(kept):
        rank = kept_ranks[place]
        to = first + place
        for side in range(4):
            boxes[to * 4 + side] = candidate_boxes[rank * 4 + side]
        scores[to] = candidate_scores[rank]
        labels[to] = candidate_labels[rank]
        indices[to] = index_of_key(ranked[rank])
    return kept


def nms_cpu(
    predictions,
    bits,
    images,
    rows,
    classes,
    anchors,
    regions,
    scales,
    score_threshold,
    iou_threshold,
    soft_sigma,
    class_aware,
    max_candidates,
    max_detections,
    boxes,
    scores,
    labels,
    indices,
    counts,
):
    """Head output -> the kept boxes of each image, images in parallel."""
    for image in prange(images):
        start = np.int64(image) * rows * anchors
        keys = np.empty(anchors, np.uint64)
        found = 0
        for anchor in range(anchors):
            label = best_class(predictions, start, anchors, anchor, classes)
            at = start + (4 + label) * anchors + anchor
            if predictions[at] > score_threshold:
                keys[found] = rank_key(bits[at], anchor)
                found += 1
        ranked = np.sort(keys[:found])[::-1][:max_candidates]
        candidates = len(ranked)
        candidate_boxes = np.empty(candidates * 4, np.float32)
        candidate_scores = np.empty(candidates, np.float32)
        candidate_labels = np.empty(candidates, np.int32)
        for rank in range(candidates):
            anchor = np.int64(index_of_key(ranked[rank]))
            label = best_class(predictions, start, anchors, anchor, classes)
            candidate_scores[rank] = predictions[start + (4 + label) * anchors + anchor]
            candidate_labels[rank] = label
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
        counts[image] = write_best(
            candidate_boxes,
            candidate_scores,
            candidate_labels,
            ranked,
            score_threshold,
            iou_threshold,
            soft_sigma,
            class_aware,
            max_detections,
            np.int64(image) * max_detections,
            boxes,
            scores,
            labels,
            indices,
        )


def nms_boxes_cpu(
    given_boxes,
    given_scores,
    given_bits,
    given_labels,
    given_counts,
    images,
    width,
    score_threshold,
    iou_threshold,
    soft_sigma,
    class_aware,
    max_candidates,
    max_detections,
    boxes,
    scores,
    labels,
    indices,
    counts,
):
    """Plain boxes, ``width`` places an image -> the kept ones of each image, images in parallel."""
    for image in prange(images):
        first = np.int64(image) * width
        keys = np.empty(width, np.uint64)
        found = 0
        for index in range(min(given_counts[image], width)):
            if given_scores[first + index] > score_threshold:
                keys[found] = rank_key(given_bits[first + index], index)
                found += 1
        ranked = np.sort(keys[:found])[::-1][:max_candidates]
        candidates = len(ranked)
        candidate_boxes = np.empty(candidates * 4, np.float32)
        candidate_scores = np.empty(candidates, np.float32)
        candidate_labels = np.empty(candidates, np.int32)
        for rank in range(candidates):
            index = first + index_of_key(ranked[rank])
            candidate_scores[rank] = given_scores[index]
            candidate_labels[rank] = given_labels[index]
            for side in range(4):
                candidate_boxes[rank * 4 + side] = given_boxes[index * 4 + side]
        counts[image] = write_best(
            candidate_boxes,
            candidate_scores,
            candidate_labels,
            ranked,
            score_threshold,
            iou_threshold,
            soft_sigma,
            class_aware,
            max_detections,
            np.int64(image) * max_detections,
            boxes,
            scores,
            labels,
            indices,
        )


def box_iou_cpu(first, second, first_count, second_count, out):
    """Overlap of every pair, rows in parallel."""
    for row in prange(first_count):
        for column in range(second_count):
            out[np.int64(row) * second_count + column] = overlap(first, np.int64(row) * 4, second, np.int64(column) * 4)
