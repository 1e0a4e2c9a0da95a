"""Non-maximum suppression and overlaps on the GPU; nothing leaves the device.

Three steps. *Gather*: a thread an anchor, over the whole GPU, writes the key of every candidate. *Rank*: a block an
image selects the best keys digit by digit and sorts them; keys are unique, so what comes out does not depend on the
timing of threads. *Suppress*: a block an image walks the ranks.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from nbvision_kernels.boxes import (
    best_class,
    decayed,
    index_of_key,
    overlap,
    rank_key,
    suppresses,
    write_source_box,
)
from nbvision_kernels.codes import SOFT_THREADS

__all__ = [
    "box_candidates",
    "box_iou",
    "head_candidates",
    "rank_candidates",
    "soft_suppress",
    "suppress",
]

SHARED_KEYS = 2048  # more are sorted in global memory
WORDS = 1024  # of 32 candidates each, in shared memory


def head_candidates(
    predictions,
    bits,
    rows,
    classes,
    anchors,
    regions,
    scales,
    score_threshold,
    keys,
    boxes,
    scores,
    labels,
):
    """Anchor ``blockIdx.x * blockDim.x + threadIdx.x`` of image ``blockIdx.y``: its key, or 0 where its best score is
    not over the threshold; for a candidate also its box in source pixels, score and label. ``bits`` are ``predictions``
    as uint32."""
    anchor = np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)
    if anchor >= anchors:
        return
    image = np.int64(cuda.blockIdx.y)
    start = image * np.int64(rows) * np.int64(anchors)
    here = image * np.int64(anchors) + anchor
    label = best_class(predictions, start, np.int64(anchors), anchor, classes)
    at = start + np.int64(4 + label) * np.int64(anchors) + anchor
    key = np.uint64(0)
    if predictions[at] > score_threshold:
        key = rank_key(bits[at], anchor)
        scores[here] = predictions[at]
        labels[here] = label
        write_source_box(
            predictions, start, np.int64(anchors), anchor, regions, scales, image, boxes, here * np.int64(4)
        )
    keys[here] = key


def box_candidates(scores, bits, counts, width, score_threshold, keys):
    """The same for plain boxes, ``width`` places an image of which the first ``counts`` are filled."""
    index = np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)
    if index >= width:
        return
    image = np.int64(cuda.blockIdx.y)
    here = image * np.int64(width) + index
    key = np.uint64(0)
    if index < counts[image] and scores[here] > score_threshold:
        key = rank_key(bits[here], index)
    keys[here] = key


def rank_candidates(
    keys,
    width,
    most,
    padded,
    boxes,
    scores,
    labels,
    sorted_keys,
    candidate_boxes,
    candidate_scores,
    candidate_labels,
    candidate_indices,
    candidate_counts,
):
    """The best ``most`` keys of image ``blockIdx.x``, best first, with their boxes, scores and labels.

    ``sorted_keys`` is scratch of ``padded`` keys an image; ``padded`` is a power of two, at least ``most``.
    """
    image = np.int64(cuda.blockIdx.x)
    thread = np.int32(cuda.threadIdx.x)
    threads = np.int32(cuda.blockDim.x)
    first = image * np.int64(width)
    first_sorted = image * np.int64(padded)

    bins = cuda.shared.array(256, types.int32)
    chosen = cuda.shared.array(2, types.int32)  # the digit, and how many keys of it are still wanted
    shared_keys = cuda.shared.array(SHARED_KEYS, types.uint64)

    if thread == 0:
        chosen[0] = 0
    cuda.syncthreads()
    mine = np.int32(0)
    entry = thread
    while entry < width:
        if keys[first + np.int64(entry)] != np.uint64(0):
            mine += np.int32(1)
        entry += threads
    cuda.atomic.add(chosen, 0, mine)
    cuda.syncthreads()
    total = np.int32(chosen[0])

    # Find the last key that is wanted, eight bits at a time.
    lowest = np.uint64(1)  # 0 is no candidate
    if total > most:
        lowest = np.uint64(0)
        wanted = np.int32(most)
        for digit in range(8):
            shift = np.uint64(56 - 8 * digit)
            above_shift = ~((np.uint64(256) << shift) - np.uint64(1)) if digit > 0 else np.uint64(0)
            bin_ = thread
            while bin_ < 256:
                bins[bin_] = 0
                bin_ += threads
            cuda.syncthreads()
            entry = thread
            while entry < width:
                key = keys[first + np.int64(entry)]
                if key != np.uint64(0) and (key & above_shift) == lowest:
                    cuda.atomic.add(bins, np.int32((key >> shift) & np.uint64(255)), 1)
                entry += threads
            cuda.syncthreads()
            bin_ = thread
            while bin_ < 256:
                above = np.int32(0)
                for other in range(bin_ + 1, 256):
                    above += bins[other]
                if above < wanted and wanted <= above + bins[bin_]:
                    chosen[0] = bin_
                    chosen[1] = np.int32(wanted - above)
                bin_ += threads
            cuda.syncthreads()
            lowest |= np.uint64(chosen[0]) << shift
            wanted = np.int32(chosen[1])

    # Collect them; an atomic counter again, since the sort follows.
    candidates = np.int32(min(total, most))
    size = np.int32(2)
    while size < candidates:
        size = np.int32(size * 2)
    in_shared = size <= SHARED_KEYS
    cuda.syncthreads()
    if thread == 0:
        chosen[0] = 0
    entry = np.int32(candidates + thread)
    while entry < size:  # the rest of the power of two sorts last
        if in_shared:
            shared_keys[entry] = np.uint64(0)
        else:
            sorted_keys[first_sorted + np.int64(entry)] = np.uint64(0)
        entry += threads
    cuda.syncthreads()
    entry = thread
    while entry < width:
        key = keys[first + np.int64(entry)]
        if key >= lowest:
            slot = cuda.atomic.add(chosen, 0, 1)
            if in_shared:
                shared_keys[slot] = key
            else:
                sorted_keys[first_sorted + np.int64(slot)] = key
        entry += threads
    cuda.syncthreads()

    # Bitonic sort, falling.
    run = np.int32(2)
    while run <= size:
        distance = np.int32(run // 2)
        while distance > 0:
            entry = thread
            while entry < size:
                partner = np.int32(entry ^ distance)
                if partner > entry:
                    falling = (entry & run) == 0
                    if in_shared:
                        low, high = shared_keys[entry], shared_keys[partner]
                        if (low < high) == falling:
                            shared_keys[entry] = high
                            shared_keys[partner] = low
                    else:
                        low = sorted_keys[first_sorted + np.int64(entry)]
                        high = sorted_keys[first_sorted + np.int64(partner)]
                        if (low < high) == falling:
                            sorted_keys[first_sorted + np.int64(entry)] = high
                            sorted_keys[first_sorted + np.int64(partner)] = low
                entry += threads
            cuda.syncthreads()
            distance = np.int32(distance // 2)
        run = np.int32(run * 2)

    rank = thread
    while rank < candidates:
        key = shared_keys[rank] if in_shared else sorted_keys[first_sorted + np.int64(rank)]
        index = index_of_key(key)
        here = first + np.int64(index)
        to = image * np.int64(most) + np.int64(rank)
        candidate_indices[to] = index
        candidate_scores[to] = scores[here]
        candidate_labels[to] = labels[here]
        for side in range(4):
            candidate_boxes[to * np.int64(4) + side] = boxes[here * np.int64(4) + side]
        rank += threads
    if thread == 0:
        candidate_counts[image] = candidates


def suppress(
    candidate_boxes,
    candidate_scores,
    candidate_labels,
    candidate_indices,
    candidate_counts,
    most,
    iou_threshold,
    class_aware,
    max_detections,
    boxes,
    scores,
    labels,
    indices,
    counts,
):
    """Greedy suppression of image ``blockIdx.x``: the best left one is kept and removes what it overlaps, all threads
    together; a bit in shared memory says who is removed."""
    image = np.int64(cuda.blockIdx.x)
    thread = np.int32(cuda.threadIdx.x)
    threads = np.int32(cuda.blockDim.x)
    first = image * np.int64(most)
    candidates = np.int32(candidate_counts[image])
    removed = cuda.shared.array(WORDS, types.uint32)
    word = thread
    while word < WORDS:
        removed[word] = np.uint32(0)
        word += threads
    cuda.syncthreads()

    kept = np.int32(0)
    rank = np.int32(0)
    while rank < candidates and kept < max_detections:
        # One barrier a kept box is enough: a thread that is ahead sets bits of later ranks only.
        if (removed[rank >> 5] >> np.uint32(rank & 31)) & np.uint32(1):
            rank = np.int32(rank + 1)
            continue
        here = first + np.int64(rank)
        if thread == 0:
            to = image * np.int64(max_detections) + np.int64(kept)
            scores[to] = candidate_scores[here]
            labels[to] = candidate_labels[here]
            indices[to] = candidate_indices[here]
            for side in range(4):
                boxes[to * np.int64(4) + side] = candidate_boxes[here * np.int64(4) + side]
        other = np.int32(rank + 1 + thread)
        while other < candidates:
            if suppresses(candidate_boxes, candidate_labels, here, first + np.int64(other), iou_threshold, class_aware):
                cuda.atomic.or_(removed, other >> 5, np.uint32(np.uint32(1) << np.uint32(other & 31)))
            other += threads
        kept = np.int32(kept + 1)
        rank = np.int32(rank + 1)
        cuda.syncthreads()
    if thread == 0:
        counts[image] = kept


def soft_suppress(
    candidate_boxes,
    candidate_scores,
    candidate_labels,
    candidate_indices,
    candidate_counts,
    most,
    score_threshold,
    soft_sigma,
    class_aware,
    max_detections,
    boxes,
    scores,
    labels,
    indices,
    counts,
):
    """Gaussian soft-NMS of image ``blockIdx.x``: the best left one is kept and lowers the scores of what it overlaps.

    ``candidate_scores`` are overwritten. ``blockDim.x`` is ``SOFT_THREADS``.
    """
    image = np.int64(cuda.blockIdx.x)
    thread = np.int32(cuda.threadIdx.x)
    first = image * np.int64(most)
    candidates = np.int32(candidate_counts[image])
    best_scores = cuda.shared.array(SOFT_THREADS, types.float32)
    best_ranks = cuda.shared.array(SOFT_THREADS, types.int32)

    kept = np.int32(0)
    last = np.int32(-1)
    going = candidates > 0
    while going:
        # Each thread lowers its own candidates and finds the best of them; then the best of all, first of equals.
        best = score_threshold
        best_rank = np.int32(-1)
        rank = thread
        while rank < candidates:
            here = first + np.int64(rank)
            score = candidate_scores[here]
            if rank == last:
                score = score_threshold  # taken
            elif last >= 0 and score > score_threshold:
                there = first + np.int64(last)
                if candidate_labels[here] == candidate_labels[there] or not class_aware:
                    iou = overlap(candidate_boxes, there * np.int64(4), candidate_boxes, here * np.int64(4))
                    score = decayed(score, iou, soft_sigma)
            candidate_scores[here] = score
            if score > best:
                best = score
                best_rank = rank
            rank += np.int32(SOFT_THREADS)
        best_scores[thread] = best
        best_ranks[thread] = best_rank
        cuda.syncthreads()
        half = np.int32(SOFT_THREADS // 2)
        while half > 0:
            if thread < half:
                score = best_scores[thread + half]
                rank = best_ranks[thread + half]
                better = score > best_scores[thread]
                if score == best_scores[thread] and rank >= 0 and rank < best_ranks[thread]:
                    better = True
                if better:
                    best_scores[thread] = score
                    best_ranks[thread] = rank
            cuda.syncthreads()
            half = np.int32(half // 2)
        last = np.int32(best_ranks[0])
        if last >= 0:
            if thread == 0:
                here = first + np.int64(last)
                to = image * np.int64(max_detections) + np.int64(kept)
                scores[to] = best_scores[0]
                labels[to] = candidate_labels[here]
                indices[to] = candidate_indices[here]
                for side in range(4):
                    boxes[to * np.int64(4) + side] = candidate_boxes[here * np.int64(4) + side]
            kept = np.int32(kept + 1)
        going = last >= 0 and kept < max_detections
        cuda.syncthreads()
    if thread == 0:
        counts[image] = kept


def box_iou(first, second, first_count, second_count, out):
    """Overlap of pair (``blockIdx.y``, ``blockIdx.x * blockDim.x + threadIdx.x``); rows beyond the grid by stride."""
    column = np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)
    row = np.int64(cuda.blockIdx.y)
    while row < first_count and column < second_count:
        out[row * np.int64(second_count) + column] = overlap(first, row * np.int64(4), second, column * np.int64(4))
        row += np.int64(cuda.gridDim.y)
