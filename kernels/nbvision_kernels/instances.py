"""Instance masks: prototypes combined, enlarged to the canvas, cropped to a box and thresholded.

A mask's table row is ``ROW`` int64: where its pixels start, then height, width, x and y of its place on the canvas.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from nbvision_kernels.codes import OFFSET_X, OFFSET_Y, SCALE_X, SCALE_Y, SCALES
from nbvision_kernels.pixel import clamp, pixel_function

__all__ = [
    "HEIGHT",
    "LEFT",
    "OFFSET",
    "ROW",
    "TOP",
    "WIDTH",
    "cell_logit",
    "dense_masks_cpu",
    "dense_pixel",
    "instance_masks_cpu",
    "mask_table_cpu",
    "mix",
    "prototype_position",
    "write_extent",
    "write_offset",
]

OFFSET, HEIGHT, WIDTH, LEFT, TOP = range(5)
ROW = 5


@pixel_function
def first_index(value, size):
    """The first of the pixels 0..size-1 at or after ``value``; ``size`` if none is. NaN counts as 0."""
    if not value > np.float32(0):
        return np.int32(0)
    if value >= np.float32(size):
        return np.int32(size)
    whole = np.int32(value)
    return np.int32(whole + 1) if np.float32(whole) < value else whole


@pixel_function
def write_extent(boxes, images, image_count, scales, in_source, mask, height, width, table):
    """The canvas pixels whose index is in a box, into the mask's row, and how many they are."""
    image = images[mask]
    row = np.int64(mask) * ROW
    left = np.int32(0)
    top = np.int32(0)
    right = np.int32(0)
    bottom = np.int32(0)
    if image >= 0 and image < image_count:
        at = np.int64(mask) * 4
        x1, y1, x2, y2 = boxes[at], boxes[at + 1], boxes[at + 2], boxes[at + 3]
        if in_source:
            scale = np.int64(image) * SCALES
            x1 = (x1 - scales[scale + OFFSET_X]) / scales[scale + SCALE_X]
            y1 = (y1 - scales[scale + OFFSET_Y]) / scales[scale + SCALE_Y]
            x2 = (x2 - scales[scale + OFFSET_X]) / scales[scale + SCALE_X]
            y2 = (y2 - scales[scale + OFFSET_Y]) / scales[scale + SCALE_Y]
        left = first_index(x1, width)
        top = first_index(y1, height)
        right = first_index(x2, width)
        bottom = first_index(y2, height)
    rows = np.int64(max(bottom - top, 0))
    columns = np.int64(max(right - left, 0))
    table[row + HEIGHT] = rows
    table[row + WIDTH] = columns
    table[row + LEFT] = left
    table[row + TOP] = top
    return rows * columns


@pixel_function
def write_offset(table, mask, start, capacity):
    """Where a mask's pixels start; one that does not fit gets no pixels."""
    row = np.int64(mask) * ROW
    table[row + OFFSET] = start
    if start + table[row + HEIGHT] * table[row + WIDTH] > capacity:
        table[row + OFFSET] = 0
        table[row + HEIGHT] = 0
        table[row + WIDTH] = 0


@pixel_function
def prototype_position(index, size, canvas):
    """Where the centre of a canvas pixel falls between the centres of ``size`` prototype cells; at least 0."""
    position = (np.float32(index) + np.float32(0.5)) * (np.float32(size) / np.float32(canvas)) - np.float32(0.5)
    return clamp(position, np.float32(0), np.float32(size - 1))


@pixel_function
def cell_logit(coefficients, prototypes, mask, image, channels, plane, cell):
    """One cell of a mask's combination of prototypes."""
    total = np.float32(0)
    at = np.int64(image) * channels * plane + cell
    first = np.int64(mask) * channels
    for channel in range(channels):
        total += coefficients[first + channel] * prototypes[at]
        at += plane
    return total


@pixel_function
def mix(first, second, share):
    """From ``first`` to ``second``."""
    return first * (np.float32(1) - share) + second * share


@pixel_function
def dense_pixel(pixels, table, mask, y, x):
    """A mask's value on the canvas."""
    row = np.int64(mask) * ROW
    inner_y = y - table[row + TOP]
    inner_x = x - table[row + LEFT]
    inside = inner_y >= 0 and inner_y < table[row + HEIGHT] and inner_x >= 0 and inner_x < table[row + WIDTH]
    return pixels[table[row + OFFSET] + inner_y * table[row + WIDTH] + inner_x] if inside else np.uint8(0)


def mask_table_cpu(boxes, images, image_count, scales, in_source, masks, height, width, capacity, table, needed):
    """Every mask's row, and the bytes that all need."""
    total = np.int64(0)
    for mask in range(masks):
        size = write_extent(boxes, images, image_count, scales, in_source, mask, height, width, table)
        write_offset(table, mask, total, capacity)
        total += size
    needed[0] = total


def instance_masks_cpu(
    coefficients,
    prototypes,
    images,
    table,
    masks,
    channels,
    rows,
    columns,
    height,
    width,
    threshold,
    pixels,
):
    """The pixels of every mask, masks in parallel."""
    plane = np.int64(rows) * columns
    for mask in prange(masks):
        row = np.int64(mask) * ROW
        mask_height = table[row + HEIGHT]
        mask_width = table[row + WIDTH]
        if mask_height > 0 and mask_width > 0:
            left, top = table[row + LEFT], table[row + TOP]
            first_x = np.int64(prototype_position(left, columns, width))
            first_y = np.int64(prototype_position(top, rows, height))
            last_x = min(np.int64(prototype_position(left + mask_width - 1, columns, width)) + 1, columns - 1)
            last_y = min(np.int64(prototype_position(top + mask_height - 1, rows, height)) + 1, rows - 1)
            across = last_x - first_x + 1
            cells = np.empty((last_y - first_y + 1) * across, np.float32)
            for cell in range(len(cells)):
                at = (first_y + cell // across) * columns + first_x + cell % across
                cells[cell] = cell_logit(coefficients, prototypes, mask, images[mask], channels, plane, at)
            for y in range(mask_height):
                position_y = prototype_position(top + y, rows, height)
                cell_y = np.int64(position_y)
                share_y = position_y - np.float32(cell_y)
                upper = (cell_y - first_y) * across
                lower = (min(cell_y + 1, rows - 1) - first_y) * across
                for x in range(mask_width):
                    position_x = prototype_position(left + x, columns, width)
                    cell_x = np.int64(position_x)
                    share_x = position_x - np.float32(cell_x)
                    a = cell_x - first_x
                    b = min(cell_x + 1, columns - 1) - first_x
                    above = mix(cells[upper + a], cells[upper + b], share_x)
                    below = mix(cells[lower + a], cells[lower + b], share_x)
                    logit = mix(above, below, share_y)
                    pixels[table[row + OFFSET] + y * mask_width + x] = np.uint8(logit > threshold)


def dense_masks_cpu(pixels, table, masks, height, width, out):
    """Masks on whole canvases, masks in parallel."""
    for mask in prange(masks):
        for y in range(height):
            for x in range(width):
                out[(np.int64(mask) * height + y) * width + x] = dense_pixel(pixels, table, mask, y, x)
