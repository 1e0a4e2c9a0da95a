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
    IMAGE,
    LEFT,
    OFFSET_X,
    OUT_WIDTH,
    SCALE_X,
    SCALES,
    STEP_X,
    STEPS,
    UNIT_X,
    WIDTH,
    X,
)
from nbvision_kernels.pixel import pixel_function, rint64

__all__ = [
    "fill_box_regions_cpu",
    "fill_regions_cpu",
    "region_of_box",
    "write_region",
]


@pixel_function
def write_step(steps, scales, step_at, unit_at, source_length, length, linear):
    """The fixed-point positions of one axis, from OpenCV's float64 scale ``1 / (length / source_length)``.

    Linear: output ``d`` falls at ``(d * STEP + START) * UNIT``, with as many bits behind the point as keep twice the
    source length within 62. Nearest: STEP has the 53 bits of the scale, START says that the last is worth
    ``2 ** -START``.
    """
    scale = np.float64(1.0) / (np.float64(length) / np.float64(source_length))
    _, exponent = math.frexp(np.float64(source_length) if linear else scale)
    if linear:
        bits = min(np.int64(62) - np.int64(exponent), np.int64(55))
        half_step = np.int64(rint64(scale * np.float64(np.int64(1) << (bits - 1))))
        steps[step_at] = 2 * half_step
        steps[step_at + 1] = half_step - (np.int64(1) << (bits - 1))
        scales[unit_at] = np.float32(np.float64(1.0) / np.float64(np.int64(1) << bits))
    else:
        bits = np.int64(53) - np.int64(exponent)
        steps[step_at] = np.int64(math.ldexp(scale, int(bits)))  # int: uncompiled, Python takes no other
        steps[step_at + 1] = bits
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

    Fields of x and y are neighbours in every table, and one loop over the two compiles in half the time of two copies.
    """
    row = np.int64(index) * FIELDS
    step_row = np.int64(index) * STEPS
    scale_row = np.int64(index) * SCALES
    has_area = width > 0 and height > 0
    ratio = np.float64(1.0)
    if has_area and fit == FIT_LETTERBOX:
        ratio = min(np.float64(out_height) / np.float64(height), np.float64(out_width) / np.float64(width))
        if not scaleup:
            ratio = min(ratio, np.float64(1.0))
    is_height_exact = np.int64(cover_height) * np.int64(width) >= np.int64(cover_width) * np.int64(height)
    regions[row + IMAGE] = np.int32(image)
    for axis in range(2):
        start, length, out_length = np.int64(x), np.int64(width), np.int64(out_width)
        other_length, cover_length, other_cover = np.int64(height), np.int64(cover_width), np.int64(cover_height)
        if axis == 1:
            start, length, out_length = np.int64(y), np.int64(height), np.int64(out_height)
            other_length, cover_length, other_cover = np.int64(width), np.int64(cover_height), np.int64(cover_width)
        lead = np.int64(0)
        new_length = out_length
        if has_area and fit == FIT_LETTERBOX:
            # A very thin region still gets one pixel, where Ultralytics' rounding would leave none.
            new_length = min(max(np.int64(rint64(np.float64(length) * ratio)), np.int64(1)), out_length)
            if center:
                lead = np.int64(rint64(np.float64(out_length - new_length) / 2 - np.float64(0.1)))
        if has_area and fit == FIT_COVER:
            new_length = cover_length
            if is_height_exact == (axis == 0):
                exact = np.float64(other_cover * length) / np.float64(other_length)
                new_length = max(np.int64(exact), out_length)
            lead = -np.int64(rint64(np.float64(new_length - out_length) / 2))
        regions[row + X + axis] = np.int32(start)
        regions[row + WIDTH + axis] = np.int32(length)
        regions[row + LEFT + axis] = np.int32(lead)
        regions[row + OUT_WIDTH + axis] = np.int32(new_length if has_area else 0)
        step_at = step_row + STEP_X + 2 * axis
        scale_at = scale_row + axis
        if has_area:
            write_step(steps, scales, step_at, scale_at + UNIT_X, length, new_length, linear)
            scale = np.float64(length) / np.float64(new_length)
            scales[scale_at + SCALE_X] = np.float32(scale)
            scales[scale_at + OFFSET_X] = np.float32(np.float64(start) - np.float64(lead) * scale)
        else:
            steps[step_at] = np.int64(0)
            steps[step_at + 1] = np.int64(0)
            scales[scale_at + UNIT_X] = np.float32(0)
            scales[scale_at + SCALE_X] = np.float32(0)
            scales[scale_at + OFFSET_X] = np.float32(0)


@pixel_function
def region_of_box(sources, images, boxes, index, margin):
    """Image, x, y, width and height of box ``index``: enlarged by ``margin`` of its size on each side, to whole pixels,
    clipped.

    ``boxes`` holds x1, y1, x2, y2 float32; a box that is NaN, outside its image or of no area has no width or height.
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
    return image, x, y, width, height


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
        image, x, y, width, height = region_of_box(sources, images, boxes, index, margin)
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
