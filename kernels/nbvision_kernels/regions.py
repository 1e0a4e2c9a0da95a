"""Regions: which part of which source goes where in an output canvas.

One row per output of three flat tables that every kernel reads: :data:`FIELDS` int32 numbers in ``regions``,
:data:`STEPS` int64 numbers in ``steps`` and :data:`SCALES` float32 numbers in ``scales``.  The functions that fill a
row run once per output, on the host or in a kernel of one thread per box; they use float64, because OpenCV and
Ultralytics do and a rounding there moves a border.
"""

from __future__ import annotations

import math

import numpy as np

from nbvision_kernels.codes import (
    FIELDS,
    FIT_COVER,
    FIT_LETTERBOX,
    HEIGHT,
    IMAGE,
    LEFT,
    OFFSET_X,
    OFFSET_Y,
    OUT_HEIGHT,
    OUT_WIDTH,
    SCALE_X,
    SCALE_Y,
    SCALES,
    START_X,
    START_Y,
    STEP_X,
    STEP_Y,
    STEPS,
    TOP,
    UNIT_X,
    UNIT_Y,
    WIDTH,
    X,
    Y,
)
from nbvision_kernels.pixel import clamp, pixel_function, rint64

__all__ = [
    "fill_box_regions_cpu",
    "fill_regions_cpu",
]


@pixel_function
def bit_length(value):
    """Bits of a non-negative integer."""
    length = np.int64(0)
    while value > 0:
        value = value >> np.int64(1)
        length += 1
    return length


@pixel_function
def power_of_two(exponent):
    """2 ** exponent as float64, for 0 to 62."""
    return np.float64(np.int64(1) << np.int64(exponent))


@pixel_function
def linear_bits(source_length):
    """Bits behind the point of a linear step: as many as keep twice the source length within 62 bits."""
    return min(np.int64(62) - bit_length(np.int64(source_length)), np.int64(55))


@pixel_function
def write_axis(steps, scales, step_at, start_at, unit_at, source_length, length, linear):
    """The fixed-point positions of one axis, from OpenCV's float64 scale ``1 / (length / source_length)``.

    Linear: output ``d`` falls at ``(d * STEP + START) * UNIT``. Nearest: STEP has the 53 bits of the scale, START says
    how many of them are behind the point.
    """
    scale = np.float64(1.0) / (np.float64(length) / np.float64(source_length))
    if linear:
        bits = linear_bits(source_length)
        half_step = np.int64(rint64(scale * power_of_two(bits - 1)))
        steps[step_at] = 2 * half_step
        steps[start_at] = half_step - (np.int64(1) << (bits - 1))
        scales[unit_at] = np.float32(np.float64(1.0) / power_of_two(bits))
    else:
        mantissa, exponent = math.frexp(scale)
        bits = min(np.int64(53) - np.int64(exponent), np.int64(62))  # 62: only when enlarging more than 512 times
        steps[step_at] = np.int64(mantissa * power_of_two(bits + np.int64(exponent)))
        steps[start_at] = bits
        scales[unit_at] = np.float32(0)


@pixel_function
def write_region(
    regions,
    steps,
    scales,
    index,
    image,
    x,
    y,
    width,
    height,
    out_height,
    out_width,
    fit,
    cover_height,
    cover_width,
    scaleup,
    center,
    linear,
):
    """Row ``index``: the region (x, y, width, height) of ``image`` fitted into an (out_height, out_width) canvas.

    ``FIT_LETTERBOX`` is Ultralytics' geometry: one ratio, sizes rounded half to even, odd padding to the bottom and
    the right.  ``FIT_COVER`` is torchvision's ``Resize`` and ``CenterCrop``: the side that just covers (cover_height,
    cover_width) is exact, the other is truncated, and the canvas is the middle of that.  A region of no area gets an
    empty row: its canvas is all fill and maps to no place.
    """
    row = np.int64(index) * FIELDS
    step_row = np.int64(index) * STEPS
    scale_row = np.int64(index) * SCALES
    left = np.int64(0)
    top = np.int64(0)
    new_width = np.int64(out_width)
    new_height = np.int64(out_height)
    if fit == FIT_LETTERBOX and width > 0 and height > 0:
        ratio = min(np.float64(out_height) / np.float64(height), np.float64(out_width) / np.float64(width))
        if not scaleup:
            ratio = min(ratio, np.float64(1.0))
        # A very thin region still gets one pixel, where Ultralytics' rounding would leave none.
        new_width = clamp(np.int64(rint64(np.float64(width) * ratio)), np.int64(1), np.int64(out_width))
        new_height = clamp(np.int64(rint64(np.float64(height) * ratio)), np.int64(1), np.int64(out_height))
        if center:
            left = np.int64(rint64(np.float64(out_width - new_width) / 2 - np.float64(0.1)))
            top = np.int64(rint64(np.float64(out_height - new_height) / 2 - np.float64(0.1)))
    if fit == FIT_COVER and width > 0 and height > 0:
        if np.int64(cover_height) * np.int64(width) >= np.int64(cover_width) * np.int64(height):
            new_height = np.int64(cover_height)
            new_width = max(np.int64(np.float64(cover_height * width) / np.float64(height)), np.int64(out_width))
        else:
            new_width = np.int64(cover_width)
            new_height = max(np.int64(np.float64(cover_width * height) / np.float64(width)), np.int64(out_height))
        left = -np.int64(rint64(np.float64(new_width - out_width) / 2))
        top = -np.int64(rint64(np.float64(new_height - out_height) / 2))
    regions[row + IMAGE] = np.int32(image)
    regions[row + X] = np.int32(x)
    regions[row + Y] = np.int32(y)
    regions[row + WIDTH] = np.int32(width)
    regions[row + HEIGHT] = np.int32(height)
    regions[row + LEFT] = np.int32(left)
    regions[row + TOP] = np.int32(top)
    if width <= 0 or height <= 0:
        regions[row + OUT_WIDTH] = np.int32(0)
        regions[row + OUT_HEIGHT] = np.int32(0)
        for field in range(STEPS):
            steps[step_row + field] = np.int64(0)
        for field in range(SCALES):
            scales[scale_row + field] = np.float32(0)
    else:
        regions[row + OUT_WIDTH] = np.int32(new_width)
        regions[row + OUT_HEIGHT] = np.int32(new_height)
        unit_at = scale_row + UNIT_X
        write_axis(steps, scales, step_row + STEP_X, step_row + START_X, unit_at, width, new_width, linear)
        unit_at = scale_row + UNIT_Y
        write_axis(steps, scales, step_row + STEP_Y, step_row + START_Y, unit_at, height, new_height, linear)
        scale_x = np.float64(width) / np.float64(new_width)
        scale_y = np.float64(height) / np.float64(new_height)
        scales[scale_row + SCALE_X] = np.float32(scale_x)
        scales[scale_row + SCALE_Y] = np.float32(scale_y)
        scales[scale_row + OFFSET_X] = np.float32(np.float64(x) - np.float64(left) * scale_x)
        scales[scale_row + OFFSET_Y] = np.float32(np.float64(y) - np.float64(top) * scale_y)


@pixel_function
def write_box_region(
    regions,
    steps,
    scales,
    index,
    sources,
    images,
    boxes,
    margin,
    out_height,
    out_width,
    fit,
    cover_height,
    cover_width,
    scaleup,
    center,
    linear,
):
    """Row ``index`` for box ``index``: enlarged by ``margin`` of its size on each side, to whole pixels, clipped.

    ``boxes`` holds x1, y1, x2, y2 float32; a box that is NaN, outside its image or of no area gives an empty row.
    """
    image = np.int64(images[index])
    image_height = np.float32(sources[image * 4 + 2])
    image_width = np.float32(sources[image * 4 + 3])
    x1 = np.float32(boxes[np.int64(index) * 4])
    y1 = np.float32(boxes[np.int64(index) * 4 + 1])
    x2 = np.float32(boxes[np.int64(index) * 4 + 2])
    y2 = np.float32(boxes[np.int64(index) * 4 + 3])
    margin_x = (x2 - x1) * margin
    margin_y = (y2 - y1) * margin
    width = np.int64(0)
    height = np.int64(0)
    x = np.int64(0)
    y = np.int64(0)
    if x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0 and x1 < image_width and y1 < image_height:
        x = np.int64(math.floor(max(x1 - margin_x, np.float32(0))))
        y = np.int64(math.floor(max(y1 - margin_y, np.float32(0))))
        width = np.int64(math.ceil(min(x2 + margin_x, image_width))) - x
        height = np.int64(math.ceil(min(y2 + margin_y, image_height))) - y
    write_region(
        regions,
        steps,
        scales,
        index,
        image,
        x,
        y,
        width,
        height,
        out_height,
        out_width,
        fit,
        cover_height,
        cover_width,
        scaleup,
        center,
        linear,
    )


def fill_regions_cpu(
    sources,
    regions,
    steps,
    scales,
    out_height,
    out_width,
    fit,
    cover_height,
    cover_width,
    scaleup,
    center,
    linear,
):
    """One whole-image region per source; host, sequential (tens of nanoseconds a row)."""
    for index in range(sources.size // 4):
        write_region(
            regions,
            steps,
            scales,
            index,
            index,
            0,
            0,
            sources[index * 4 + 3],
            sources[index * 4 + 2],
            out_height,
            out_width,
            fit,
            cover_height,
            cover_width,
            scaleup,
            center,
            linear,
        )


def fill_box_regions_cpu(
    sources,
    images,
    boxes,
    margin,
    regions,
    steps,
    scales,
    out_height,
    out_width,
    fit,
    cover_height,
    cover_width,
    scaleup,
    center,
    linear,
):
    """One region per box, on the host."""
    for index in range(images.size):
        write_box_region(
            regions,
            steps,
            scales,
            index,
            sources,
            images,
            boxes,
            margin,
            out_height,
            out_width,
            fit,
            cover_height,
            cover_width,
            scaleup,
            center,
            linear,
        )
