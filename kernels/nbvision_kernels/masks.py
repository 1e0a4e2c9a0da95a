"""Masks: from logits to a mask's extent, and cut-outs.

A mask's logits are ``(height, width)`` float32 on the canvas of its crop; more than the threshold is inside.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from nbvision_kernels.pixel import pixel_function
from nbvision_kernels.regions import OFFSET_X, OFFSET_Y, SCALE_X, SCALE_Y, SCALES

__all__ = ["argmax_map_cpu", "best_plane", "cut_out_cpu", "cut_out_value", "mask_boxes_cpu", "write_mask_box"]


@pixel_function
def write_mask_box(boxes, areas, mask, left, top, right, bottom, area, scales):
    """The extent of ``mask`` in source pixels: columns left..right-1 and rows top..bottom-1 of its canvas.

    An empty mask has the box 0, 0, 0, 0. Areas are in canvas pixels.
    """
    to = np.int64(mask) * 4
    row = np.int64(mask) * SCALES
    if area == 0:
        for side in range(4):
            boxes[to + side] = np.float32(0)
    else:
        boxes[to] = np.float32(left) * scales[row + SCALE_X] + scales[row + OFFSET_X]
        boxes[to + 1] = np.float32(top) * scales[row + SCALE_Y] + scales[row + OFFSET_Y]
        boxes[to + 2] = np.float32(right) * scales[row + SCALE_X] + scales[row + OFFSET_X]
        boxes[to + 3] = np.float32(bottom) * scales[row + SCALE_Y] + scales[row + OFFSET_Y]
    areas[mask] = area


@pixel_function
def cut_out_value(value, logit, threshold, fill, gain, bias):
    """A crop's value where the mask is, ``fill`` where it is not; then normalised."""
    kept = value if logit > threshold else fill
    return kept * gain + bias


def mask_boxes_cpu(logits, masks, height, width, threshold, scales, boxes, areas):
    """The extent and area of each mask, masks in parallel."""
    for mask in prange(masks):
        start = np.int64(mask) * height * width
        left = width
        top = height
        right = 0
        bottom = 0
        area = np.int32(0)
        for y in range(height):
            for x in range(width):
                if logits[start + y * width + x] > threshold:
                    left = min(left, x)
                    right = max(right, x + 1)
                    top = min(top, y)
                    bottom = y + 1
                    area += np.int32(1)
        write_mask_box(boxes, areas, mask, left, top, right, bottom, area, scales)


def cut_out_cpu(crops, logits, crops_count, plane, threshold, fill, gain, bias, out):
    """Cut every crop (3 planes) out along its mask, crops in parallel."""
    for crop in prange(crops_count):
        for c in range(3):
            start = (np.int64(crop) * 3 + c) * plane
            for pixel in range(plane):
                out[start + pixel] = cut_out_value(
                    crops[start + pixel],
                    logits[np.int64(crop) * plane + pixel],
                    threshold,
                    fill,
                    gain[c],
                    bias[c],
                )


@pixel_function
def best_plane(logits, start, planes, plane):
    """Which of ``planes`` values, ``plane`` apart, is the largest; the first of equals. A NaN is never larger."""
    best = np.int32(0)
    best_value = logits[start]
    for index in range(1, planes):
        value = logits[start + np.int64(index) * plane]
        if value > best_value or (best_value != best_value and value == value):
            best_value = value
            best = np.int32(index)
    return best


def argmax_map_cpu(logits, images, planes, plane, out):
    """The best class of each pixel, images' pixels in parallel."""
    for pixel in prange(images * plane):
        image = pixel // plane
        out[pixel] = best_plane(logits, np.int64(image) * planes * plane + pixel % plane, planes, plane)
