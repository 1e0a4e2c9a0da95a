"""The fused plan: region -> sampler -> chain of pixel functions -> gain and bias -> store.

:func:`make_span_writer` builds the body for one *type* of plan; every number (sizes, boxes, mean, fill, channel
order) stays an argument.  The CPU loop here and the Numba kernel in ``preprocess_cuda.py`` call that body; the CUDA C
frame ``preprocess.cu`` calls the same samplers through LTO.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import prange

from nbvision_kernels import codes as region
from nbvision_kernels.chain import make_shade
from nbvision_kernels.codes import (
    LINEAR_EXACT,
    LINEAR_FAST,
    NEAREST,
    SOURCE_CHW,
    SOURCE_F16,
    SOURCE_F32,
    SOURCE_NV12,
    SOURCE_U8,
    STORE_BF16,
    STORE_F16,
    STORE_HALF_BITS,
    STORE_I8,
    STORE_U8,
)
from nbvision_kernels.nv12 import make_nv12_reader
from nbvision_kernels.pixel import (
    bfloat_bits,
    compiled_apart,
    floats_from_address,
    half_bits,
    half_value,
    halves_from_address,
    pixel_function,
    pointer_from_address,
    round_to_i8,
    round_to_u8,
)
from nbvision_kernels.sampling import (
    exact_along_x,
    exact_along_y,
    exact_blend,
    fast_along,
    fast_blend,
    nearest_along,
    nearest_blend,
)

__all__ = [
    "SAMPLERS",
    "make_blend_export",
    "make_cpu_loop",
    "make_span_writer",
    "make_taps_export",
]

# sampler -> (along_x, along_y, blend), see sampling.py
SAMPLERS = {
    NEAREST: (nearest_along, nearest_along, nearest_blend),
    LINEAR_EXACT: (exact_along_x, exact_along_y, exact_blend),
    LINEAR_FAST: (fast_along, fast_along, fast_blend),
}


@functools.cache
def make_taps_export(along):
    """``along`` for C, which knows no tuples: the pixels go to ``taps[0:2]``, their weights to ``weights[0:2]``."""

    @pixel_function
    def taps_export(index, step, start, unit, length, taps, weights):
        first, second, first_weight, second_weight = along(index, step, start, unit, length)
        taps[0] = first
        taps[1] = second
        weights[0] = first_weight
        weights[1] = second_weight

    return taps_export


@functools.cache
def make_blend_export(blend):
    """``blend`` for C: ``pixels`` are top left, top right, bottom left, bottom right."""

    @pixel_function
    def blend_export(pixels, weights_x, weights_y):
        return blend(
            pixels[0],
            pixels[1],
            pixels[2],
            pixels[3],
            weights_x[0],
            weights_x[1],
            weights_y[0],
            weights_y[1],
        )

    return blend_export


def make_store(store):
    """``save(out, at, value)``: convert and write one value."""

    @pixel_function
    def save(out, at, value):
        if store == STORE_U8:
            out[at] = round_to_u8(value)
        elif store == STORE_I8:
            out[at] = round_to_i8(value)
        elif store == STORE_F16:
            out[at] = np.float16(value)
        elif store == STORE_HALF_BITS:
            out[at] = half_bits(value)
        elif store == STORE_BF16:
            out[at] = bfloat_bits(value)
        else:
            out[at] = np.float32(value)

    return save


def make_reader(source):
    """``read(pixels, at)``: the number at a byte's address. ``pixels`` are bytes, or the source's floats."""

    @pixel_function
    def read(pixels, at):
        if source == SOURCE_F32:
            value = pixels[at >> 2]
        elif source == SOURCE_F16:
            value = half_value(pixels[at >> 1])
        else:
            value = pixels[at]
        return value

    return read


def make_span_writer(sampler, store, chain=None, source_type=SOURCE_U8):
    """The body of the plan: write output pixels ``x_first <= x < x_stop`` of line ``y`` of canvas ``item``.

    Planes and NV12 have a ``pixel_bytes`` of 1; the ``matrix`` is read for NV12 alone. ``strides`` are those of
    :func:`canvas_strides`: where values go decides nothing about how they are made.
    """
    nv12 = source_type == SOURCE_NV12
    read = make_reader(source_type)
    channel_bytes = {SOURCE_F16: 2, SOURCE_F32: 4}.get(source_type, 1)
    along_x, along_y, blend = SAMPLERS[sampler]
    read_nv12 = make_nv12_reader(blend, exact=sampler != LINEAR_FAST)
    shade = make_shade(chain)
    save = make_store(store)

    @pixel_function
    def write_span(
        pixels,
        sources,
        regions,
        steps,
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
        bgr,
        numbers,
        matrix,
        strides,
    ):
        row = np.int64(item) * region.FIELDS
        step_row = np.int64(item) * region.STEPS
        scale_row = np.int64(item) * region.SCALES
        left = regions[row + region.LEFT]
        right = np.int32(left + regions[row + region.OUT_WIDTH])
        region_width = regions[row + region.WIDTH]
        step_x = steps[step_row + region.STEP_X]
        start_x = steps[step_row + region.START_X]
        unit_x = scales[scale_row + region.UNIT_X]
        source = np.int64(regions[row + region.IMAGE]) * 4
        pitch = sources[source + 1]
        # A row is under 2**31 bytes, so columns are 32-bit; an image may be larger, so lines are 64-bit.
        column_0 = np.int64(np.int32(regions[row + region.X] * pixel_bytes))
        origin = sources[source] + np.int64(regions[row + region.Y]) * pitch + column_0

        line = np.int32(y - regions[row + region.TOP])
        line_inside = line >= 0 and line < regions[row + region.OUT_HEIGHT]
        top, bottom, top_weight, bottom_weight = along_y(
            line,
            steps[step_row + region.STEP_Y],
            steps[step_row + region.START_Y],
            scales[scale_row + region.UNIT_Y],
            regions[row + region.HEIGHT],
        )
        above = origin + np.int64(top) * pitch
        below = origin + np.int64(bottom) * pitch
        # From a source's channel to its next.
        to_next = np.int64(channel_bytes)
        if source_type == SOURCE_CHW:
            to_next = sources[source + 2] * pitch
        if nv12:  # positions in the picture, not in the region, decide which chroma a pixel has
            region_x = regions[row + region.X]
            region_y = regions[row + region.Y]
            above = above - column_0
            below = below - column_0
            chroma = sources[source] + sources[source + 2] * pitch
            chroma_above = chroma + np.int64(np.int32(region_y + top) >> 1) * pitch
            chroma_below = chroma + np.int64(np.int32(region_y + bottom) >> 1) * pitch
        to_canvas, to_pixel, to_channel, stored = strides
        canvas = np.int64(item) * to_canvas
        line_start = np.int64(y) * np.int64(width)
        for x in range(x_first, x_stop):
            value_0 = fill[0]
            value_1 = fill[1]
            value_2 = fill[2]
            inside = line_inside and x >= left and x < right
            if nv12:
                if inside:
                    first, second, left_weight, right_weight = along_x(
                        np.int32(x - left), step_x, start_x, unit_x, region_width
                    )
                    value_0, value_1, value_2 = read_nv12(
                        pixels,
                        above,
                        below,
                        chroma_above,
                        chroma_below,
                        np.int32(region_x + first),
                        np.int32(region_x + second),
                        left_weight,
                        right_weight,
                        top_weight,
                        bottom_weight,
                        matrix,
                    )
                    if swap:
                        value_0, value_2 = value_2, value_0
            elif inside:
                first, second, left_weight, right_weight = along_x(
                    np.int32(x - left), step_x, start_x, unit_x, region_width
                )
                to_first = np.int64(np.int32(first * pixel_bytes))
                to_second = np.int64(np.int32(second * pixel_bytes))
                value_0 = blend(
                    read(pixels, above + to_first),
                    read(pixels, above + to_second),
                    read(pixels, below + to_first),
                    read(pixels, below + to_second),
                    left_weight,
                    right_weight,
                    top_weight,
                    bottom_weight,
                )
                value_1 = value_0
                value_2 = value_0
                if not gray:
                    value_1 = blend(
                        read(pixels, above + to_first + to_next),
                        read(pixels, above + to_second + to_next),
                        read(pixels, below + to_first + to_next),
                        read(pixels, below + to_second + to_next),
                        left_weight,
                        right_weight,
                        top_weight,
                        bottom_weight,
                    )
                    value_2 = blend(
                        read(pixels, above + to_first + 2 * to_next),
                        read(pixels, above + to_second + 2 * to_next),
                        read(pixels, below + to_first + 2 * to_next),
                        read(pixels, below + to_second + 2 * to_next),
                        left_weight,
                        right_weight,
                        top_weight,
                        bottom_weight,
                    )
                if swap:
                    value_0, value_2 = value_2, value_0
            value_0, value_1, value_2 = shade(value_0, value_1, value_2, x, y, bgr, numbers)
            at = canvas + (line_start + np.int64(x)) * to_pixel
            save(out, at, value_0 * gain[0] + bias[0])
            if stored > 1:
                save(out, at + to_channel, value_1 * gain[1] + bias[1])
                save(out, at + 2 * to_channel, value_2 * gain[2] + bias[2])
            if stored > 3:
                save(out, at + 3, np.float32(0))

    return write_span


def make_cpu_loop(sampler, store, chain=None, source_type=SOURCE_U8):
    """The plan as a parallel CPU loop over output lines.

    ``base`` is what the table's addresses count from: 0, but as an argument, because the compiler takes a constant null
    pointer for one that is never read.
    """
    write_span = compiled_apart(make_span_writer(sampler, store, chain, source_type))

    def loop(
        base,
        sources,
        regions,
        steps,
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
        bgr,
        numbers,
        matrix,
        strides,
    ):
        for line in prange(items * height):
            if source_type == SOURCE_F32:
                pixels = floats_from_address(base)
            elif source_type == SOURCE_F16:
                pixels = halves_from_address(base)
            else:
                pixels = pointer_from_address(base)
            item = line // height
            write_span(
                pixels,
                sources,
                regions,
                steps,
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
                bgr,
                numbers,
                matrix,
                strides,
            )

    return loop
