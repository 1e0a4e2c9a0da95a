"""Greedy non-maximum suppression on the GPU: one block an image, nothing leaves the device.

Candidates are ranked by counting how many come before each, which needs no sort, no atomics that decide an order and
gives the same result every time.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from nbvision_kernels.boxes import best_class, comes_before, suppresses, write_source_box

__all__ = ["NMS_THREADS", "nms"]

NMS_THREADS = 512


def nms(
    predictions,
    classes,
    anchors,
    regions,
    scales,
    score_threshold,
    iou_threshold,
    class_aware,
    max_candidates,
    max_detections,
    anchor_scores,
    candidate_anchors,
    candidate_scores,
    candidate_boxes,
    candidate_labels,
    removed,
    boxes,
    scores,
    labels,
    counts,
):
    """Head output of image ``blockIdx.x`` -> its kept boxes. Scratch: ``anchor_scores`` and ``candidate_anchors``
    (anchors) and the candidate tables (max_candidates) per image."""
    image = np.int64(cuda.blockIdx.x)
    thread = np.int32(cuda.threadIdx.x)
    threads = np.int32(cuda.blockDim.x)
    start = image * np.int64(4 + classes) * np.int64(anchors)
    first_anchor = image * np.int64(anchors)
    first_candidate = image * np.int64(max_candidates)

    # Gather the anchors over the threshold; their order here does not matter.
    found = cuda.shared.array(1, types.int32)
    if thread == 0:
        found[0] = 0
    cuda.syncthreads()
    anchor = thread
    while anchor < anchors:
        label = best_class(predictions, start, np.int64(anchors), np.int64(anchor), classes)
        score = predictions[start + np.int64(4 + label) * np.int64(anchors) + np.int64(anchor)]
        if score > score_threshold:
            slot = cuda.atomic.add(found, 0, 1)
            anchor_scores[first_anchor + slot] = score
            candidate_anchors[first_anchor + slot] = anchor
        anchor += threads
    cuda.syncthreads()

    # Each finds its rank and moves to its place, boxes already in source pixels.
    total = found[0]
    entry = thread
    while entry < total:
        score = anchor_scores[first_anchor + entry]
        index = candidate_anchors[first_anchor + entry]
        rank = np.int32(0)
        for other in range(total):
            if comes_before(anchor_scores[first_anchor + other], candidate_anchors[first_anchor + other], score, index):
                rank += np.int32(1)
        if rank < max_candidates:
            to = first_candidate + rank
            label = best_class(predictions, start, np.int64(anchors), np.int64(index), classes)
            candidate_scores[to] = score
            candidate_labels[to] = label
            removed[to] = np.uint8(0)
            write_source_box(
                predictions,
                start,
                np.int64(anchors),
                np.int64(index),
                regions,
                scales,
                image,
                candidate_boxes,
                to * np.int64(4),
            )
        entry += threads
    cuda.syncthreads()

    # Greedy: the best left one is kept and removes what it overlaps, all threads together.
    candidates = min(total, max_candidates)
    kept = np.int32(0)
    rank = np.int32(0)
    while rank < candidates and kept < max_detections:
        here = first_candidate + rank
        if removed[here] == 0:
            if thread == 0:
                to = image * np.int64(max_detections) + kept
                scores[to] = candidate_scores[here]
                labels[to] = candidate_labels[here]
                for side in range(4):
                    boxes[to * np.int64(4) + side] = candidate_boxes[here * np.int64(4) + side]
            kept += np.int32(1)
            other = rank + np.int32(1) + thread
            while other < candidates:
                if suppresses(
                    candidate_boxes,
                    candidate_labels,
                    here,
                    first_candidate + other,
                    iou_threshold,
                    class_aware,
                ):
                    removed[first_candidate + other] = np.uint8(1)
                other += threads
            cuda.syncthreads()
        rank += np.int32(1)
    if thread == 0:
        counts[image] = kept
