"""Mask kernels: extents by one block a mask, cut-outs by one thread a pixel."""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from nbvision_kernels.masks import best_plane, cut_out_value, write_mask_box

__all__ = ["argmax_map", "cut_out", "mask_boxes"]


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
    pixel = thread
    while pixel < plane:
        if logits[start + np.int64(pixel)] > threshold:
            y = np.int32(pixel // width)
            x = np.int32(pixel - np.int32(y * width))
            cuda.atomic.min(extent, 0, x)
            cuda.atomic.min(extent, 1, y)
            cuda.atomic.max(extent, 2, np.int32(x + 1))
            cuda.atomic.max(extent, 3, np.int32(y + 1))
            cuda.atomic.add(extent, 4, 1)
        pixel = np.int32(pixel + cuda.blockDim.x)
    cuda.syncthreads()
    if thread == 0:
        write_mask_box(boxes, areas, mask, extent[0], extent[1], extent[2], extent[3], extent[4], scales)


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
