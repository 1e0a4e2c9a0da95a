"""Mask kernels: extents and centroids by one block a mask, everything else by one thread a pixel."""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from nbvision_kernels.codes import MASK_BLOCK_LINES as BLOCK_LINES
from nbvision_kernels.codes import MASK_BLOCK_WIDTH as BLOCK_WIDTH
from nbvision_kernels.instances import HEIGHT, LEFT, OFFSET, ROW, TOP, WIDTH
from nbvision_kernels.masks import (
    PLACE,
    best_plane,
    cut_out_value,
    line_of,
    object_pixel,
    pasted_pixel,
    place_along,
    position_along,
    write_centroid,
    write_mask_box,
)

__all__ = [
    "argmax_map",
    "cut_out",
    "cut_out_rgba",
    "mask_boxes",
    "mask_centroids",
    "paste_masks",
]

_BLOCK = BLOCK_WIDTH * BLOCK_LINES


def mask_boxes(logits, height, width, threshold, scales, boxes, areas):
    """The extent and area of mask ``blockIdx.x``. Minima, maxima and counts do not depend on the order of threads."""
    mask = np.int64(cuda.blockIdx.x)
    thread = np.int32(cuda.threadIdx.x)
    extent = cuda.shared.array(5, types.int32)  # left, top, right, bottom, area
    if thread == 0:
        extent[0] = width
        extent[1] = height
        extent[2] = 0
        extent[3] = 0
        extent[4] = 0
    cuda.syncthreads()
    plane = np.int32(height * width)
    start = mask * np.int64(plane)
    left = width
    top = height
    right = np.int32(0)
    bottom = np.int32(0)
    area = np.int32(0)
    pixel = thread
    while pixel < plane:
        if logits[start + np.int64(pixel)] > threshold:
            y = np.int32(pixel // width)
            x = np.int32(pixel - np.int32(y * width))
            left = min(left, x)
            top = min(top, y)
            right = max(right, np.int32(x + 1))
            bottom = max(bottom, np.int32(y + 1))
            area = np.int32(area + 1)
        pixel = np.int32(pixel + cuda.blockDim.x)
    if area > 0:
        cuda.atomic.min(extent, 0, left)
        cuda.atomic.min(extent, 1, top)
        cuda.atomic.max(extent, 2, right)
        cuda.atomic.max(extent, 3, bottom)
        cuda.atomic.add(extent, 4, area)
    cuda.syncthreads()
    if thread == 0:
        write_mask_box(boxes, areas, mask, extent[0], extent[1], extent[2], extent[3], extent[4], scales)


def mask_centroids(logits, height, width, threshold, scales, mapped, centroids):
    """The centroid of mask ``blockIdx.x``, by a block of BLOCK_WIDTH x BLOCK_LINES threads: integer sums."""
    mask = np.int64(cuda.blockIdx.x)
    thread = np.int32(cuda.threadIdx.y * BLOCK_WIDTH + cuda.threadIdx.x)
    area = np.int64(0)
    sum_x = np.int64(0)
    sum_y = np.int64(0)
    y = np.int32(cuda.threadIdx.y)
    while y < height:
        line = mask * np.int64(height) * np.int64(width) + np.int64(y) * np.int64(width)
        here = np.int32(0)
        x = np.int32(cuda.threadIdx.x)
        while x < width:
            if logits[line + np.int64(x)] > threshold:
                here = np.int32(here + 1)
                sum_x += np.int64(x)
            x = np.int32(x + BLOCK_WIDTH)
        area += np.int64(here)
        sum_y += np.int64(y) * np.int64(here)
        y = np.int32(y + BLOCK_LINES)
    sums = cuda.shared.array((3, _BLOCK), types.int64)
    sums[0, thread] = area
    sums[1, thread] = sum_x
    sums[2, thread] = sum_y
    step = np.int32(_BLOCK // 2)
    while step > 0:
        cuda.syncthreads()
        if thread < step:
            for which in range(3):
                sums[which, thread] += sums[which, np.int32(thread + step)]
        step = np.int32(step // 2)
    if thread == 0:
        write_centroid(centroids, mask, sums[0, 0], sums[1, 0], sums[2, 0], scales, mapped)


def cut_out(crops, logits, plane, threshold, fill, gain_0, gain_1, gain_2, bias_0, bias_1, bias_2, out):
    """Cut crop ``blockIdx.y`` out along its mask; three planes a thread."""
    pixel = np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)
    if pixel < plane:
        crop = np.int64(cuda.blockIdx.y)
        logit = logits[crop * np.int64(plane) + pixel]
        at = crop * 3 * np.int64(plane) + pixel
        out[at] = cut_out_value(crops[at], logit, threshold, fill, gain_0, bias_0)
        at += np.int64(plane)
        out[at] = cut_out_value(crops[at], logit, threshold, fill, gain_1, bias_1)
        at += np.int64(plane)
        out[at] = cut_out_value(crops[at], logit, threshold, fill, gain_2, bias_2)


def argmax_map(logits, planes, plane, out):
    """The best class of pixel ``blockIdx.x * blockDim.x + threadIdx.x`` of image ``blockIdx.y``."""
    pixel = np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)
    if pixel < plane:
        image = np.int64(cuda.blockIdx.y)
        start = image * np.int64(planes) * np.int64(plane) + pixel
        out[image * np.int64(plane) + pixel] = best_plane(logits, start, planes, np.int64(plane))


def cut_out_rgba(
    pixels, words, sources, targets, records, channels, swap, masks, mask_height, mask_width, threshold, first
):
    """A tile of cut-out ``first + blockIdx.z``. ``words`` is the same memory as ``pixels``, four bytes each."""
    index = np.int64(first) + np.int64(cuda.blockIdx.z)
    x = np.int32(cuda.blockIdx.x * BLOCK_WIDTH + cuda.threadIdx.x)
    y = np.int32(cuda.blockIdx.y * BLOCK_LINES + cuda.threadIdx.y)
    if y < targets[index * 4 + 2] and x < targets[index * 4 + 3]:
        to = targets[index * 4] + np.int64(y) * targets[index * 4 + 1] + np.int64(4) * np.int64(x)
        words[to >> np.int64(2)] = object_pixel(
            pixels, sources, records, index, x, y, channels, swap, masks, mask_height, mask_width, threshold
        )


def paste_masks(logits, places, table, masks, rows, columns, threshold, out_plane, pitch, out):
    """BLOCK_LINES lines of mask ``blockIdx.y``, from ``blockIdx.x * BLOCK_LINES`` on; further lines and masks by the
    grid's strides. See :func:`nbvision_kernels.masks.paste_masks_cpu`."""
    mask = np.int64(cuda.blockIdx.y)
    while mask < masks:
        row = mask * ROW
        mask_height = np.int32(table[row + HEIGHT])
        mask_width = np.int32(table[row + WIDTH])
        left = np.int32(table[row + LEFT])
        top = np.int32(table[row + TOP])
        place = mask * np.int64(PLACE)
        x_first, x_step, first, low, high = place_along(places, place, columns)
        y_first, y_step, line_first, line_low, line_high = place_along(places, place + np.int64(1), rows)
        y = np.int32(cuda.blockIdx.x * BLOCK_LINES + cuda.threadIdx.y)
        while y < mask_height:
            to = table[row + OFFSET] + np.int64(y) * np.int64(mask_width)
            if pitch > 0:
                to = mask * out_plane + (np.int64(top) + np.int64(y)) * np.int64(pitch) + np.int64(left)
            down = position_along(np.int32(top + y), y_first, y_step, line_first, line_low, line_high)
            upper, lower, share = line_of(mask, rows, columns, down)
            x = np.int32(cuda.threadIdx.x)
            while x < mask_width:
                across = position_along(np.int32(left + x), x_first, x_step, first, low, high)
                inside = pasted_pixel(logits, upper, lower, share, columns, across, threshold)
                out[to + np.int64(x)] = np.uint8(1) if inside else np.uint8(0)
                x = np.int32(x + BLOCK_WIDTH)
            y = np.int32(y + cuda.gridDim.x * BLOCK_LINES)
        mask += np.int64(cuda.gridDim.y)
