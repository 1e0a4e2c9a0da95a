"""The fused plan: region -> sampler -> value chain -> store.

:func:`make_span_writer` builds the body for one *type* of plan; every number (sizes, boxes, mean, fill, channel
order) stays an argument.  The CPU loop here and the Numba kernel in ``preprocess_cuda.py`` call that body; the CUDA C
frame ``preprocess.cu`` calls the same samplers through LTO.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from nbvision_kernels import regions as region
from nbvision_kernels.pixel import half_bits, pixel_function, pointer_from_address, round_to_u8
from nbvision_kernels.sampling import (
    exact_position,
    fast_position,
    linear_exact,
    linear_fast,
    nearest,
    nearest_index,
)

__all__ = [
    "LINEAR_EXACT",
    "LINEAR_FAST",
    "NCHW",
    "NEAREST",
    "NHWC",
    "STORE_F16",
    "STORE_F32",
    "STORE_HALF_BITS",
    "STORE_U8",
    "make_cpu_loop",
    "make_position",
    "make_sampler",
    "make_span_writer",
]

NEAREST, LINEAR_EXACT, LINEAR_FAST = 0, 1, 2
NCHW, NHWC = 0, 1
STORE_U8, STORE_F16, STORE_F32, STORE_HALF_BITS = 0, 1, 2, 3


def make_position(sampler):
    """``position(index, step, start, unit, scale)`` -> float32 source position, for one kind of sampler."""

    @pixel_function
    def position(index, step, start, unit, scale):
        if sampler == NEAREST:
            result = np.float32(nearest_index(index, step, start))
        elif sampler == LINEAR_EXACT:
            result = exact_position(index, step, start, unit)
        else:
            result = fast_position(index, scale)
        return result

    return position


def make_sampler(sampler):
    """``sample(pixels, origin, pitch, pixel_bytes, channel, width, height, x, y)`` -> float32 value in 0..255."""
    if sampler == NEAREST:
        return nearest
    return linear_exact if sampler == LINEAR_EXACT else linear_fast


def make_store(store):
    """``save(out, at, value)``: convert and write one value."""

    @pixel_function
    def save(out, at, value):
        if store == STORE_U8:
            out[at] = round_to_u8(value)
        elif store == STORE_F16:
            out[at] = np.float16(value)
        elif store == STORE_HALF_BITS:
            out[at] = half_bits(value)
        else:
            out[at] = np.float32(value)

    return save


def make_span_writer(sampler, layout, store):
    """The body of the plan: write output pixels ``x_first <= x < x_stop`` of line ``y`` of canvas ``item``."""
    position = make_position(sampler)
    sample = make_sampler(sampler)
    save = make_store(store)

    @pixel_function
    def write_span(
        pixels,
        sources,
        regions,
        scales,
        out,
        item,
        y,
        x_first,
        x_stop,
        height,
        width,
        pixel_bytes,
        gray,
        swap,
        gain,
        bias,
        fill,
    ):
        row = np.int64(item) * region.FIELDS
        scale_row = np.int64(item) * region.SCALES
        left = np.int32(regions[row + region.LEFT])
        right = np.int32(left + np.int32(regions[row + region.OUT_WIDTH]))
        region_width = np.int32(regions[row + region.WIDTH])
        region_height = np.int32(regions[row + region.HEIGHT])
        step_x = regions[row + region.STEP_X]
        start_x = regions[row + region.START_X]
        unit_x = scales[scale_row + region.UNIT_X]
        scale_x = scales[scale_row + region.SCALE_X]
        source = regions[row + region.IMAGE] * np.int64(4)
        pitch = sources[source + 1]
        origin = sources[source] + regions[row + region.Y] * pitch + regions[row + region.X] * np.int64(pixel_bytes)

        line = np.int32(y - regions[row + region.TOP])
        line_inside = line >= 0 and line < regions[row + region.OUT_HEIGHT]
        source_y = position(
            line,
            regions[row + region.STEP_Y],
            regions[row + region.START_Y],
            scales[scale_row + region.UNIT_Y],
            scales[scale_row + region.SCALE_Y],
        )
        plane = np.int64(height) * np.int64(width)
        canvas = np.int64(item) * 3 * plane
        line_start = np.int64(y) * np.int64(width)
        # The second channel's distance to the first, and a pixel's to the next.
        to_channel = plane if layout == NCHW else np.int64(1)
        to_pixel = np.int64(1) if layout == NCHW else np.int64(3)
        for x in range(x_first, x_stop):
            value_0 = fill[0]
            value_1 = fill[1]
            value_2 = fill[2]
            if line_inside and x >= left and x < right:
                source_x = position(np.int32(x - left), step_x, start_x, unit_x, scale_x)
                value_0 = sample(
                    pixels, origin, pitch, pixel_bytes, np.int32(0), region_width, region_height, source_x, source_y
                )
                value_1 = value_0
                value_2 = value_0
                if not gray:
                    value_1 = sample(
                        pixels, origin, pitch, pixel_bytes, np.int32(1), region_width, region_height, source_x, source_y
                    )
                    value_2 = sample(
                        pixels, origin, pitch, pixel_bytes, np.int32(2), region_width, region_height, source_x, source_y
                    )
                if swap:
                    value_0, value_2 = value_2, value_0
            at = canvas + (line_start + np.int64(x)) * to_pixel
            save(out, at, value_0 * gain[0] + bias[0])
            save(out, at + to_channel, value_1 * gain[1] + bias[1])
            save(out, at + 2 * to_channel, value_2 * gain[2] + bias[2])

    return write_span


def make_cpu_loop(sampler, layout, store):
    """The plan as a parallel CPU loop over output lines."""
    write_span = make_span_writer(sampler, layout, store)

    def loop(
        sources,
        regions,
        scales,
        out,
        items,
        height,
        width,
        pixel_bytes,
        gray,
        swap,
        gain,
        bias,
        fill,
    ):
        for line in prange(items * height):
            pixels = pointer_from_address(np.int64(0))
            item = line // height
            write_span(
                pixels,
                sources,
                regions,
                scales,
                out,
                item,
                line - item * height,
                np.int32(0),
                width,
                height,
                width,
                pixel_bytes,
                gray,
                swap,
                gain,
                bias,
                fill,
            )

    return loop
