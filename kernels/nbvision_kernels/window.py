"""The window family: each output pixel sums its own window of the source, straight through.  OpenCV's area and cubic,
and torch's antialiased cubic, which do not round between the two axes as Pillow does.

An axis has a tap table, laid out as in ``resample.py``; an entry's weights are integers or the bits of floats, by its
``MODE``.  A window is a pixel function of one channel of one output pixel.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import prange

from nbvision_kernels import codes as region
from nbvision_kernels.chain import make_shade
from nbvision_kernels.codes import (
    CV2_AREA,
    CV2_CUBIC,
    HEADER,
    TORCH_CUBIC,
)
from nbvision_kernels.pixel import (
    bits_to_float,
    clamp,
    compiled_apart,
    float_to_bits,
    pixel_function,
    pointer_from_address,
    rint32,
)
from nbvision_kernels.preprocess import make_store
from nbvision_kernels.resample import cubic_value
from nbvision_kernels.sampling import exact_blend

__all__ = [
    "WINDOWS",
    "fill_windows_cpu",
    "make_cpu_loop",
    "make_window_export",
    "write_window",
]

FIRST, COUNT, MODE, NUMBER = range(4)  # of an entry; HEADER counts them
# How an area window sums: weights as floats; the mean of a whole number of pixels, whose factor is the x entry's
# NUMBER; that of 2 x 2; or, where an axis is enlarged, OpenCV's linear weights.
WEIGHTED, MEAN, MEAN_OF_FOUR, BLENDED = range(4)
WEIGHT_BITS = 11  # of OpenCV's integer weights
VECTOR = 8  # values that OpenCV's cubic makes at once, in float32; those left over of a line it makes in integers
THIN = 1e-3  # what of a pixel OpenCV's area leaves out


# --- tables -----------------------------------------------------------------------------------------------------------


@pixel_function
def bits_of(value):
    """The bits of a number as float32."""
    return float_to_bits(np.float32(value))


@pixel_function
def opencv_scale(source_length, length):
    """As OpenCV computes it: the inverse of the inverse."""
    return np.float64(1.0) / (np.float64(length) / np.float64(source_length))


@pixel_function
def whole_ratio(scale):
    """The scale as a whole number, or 0."""
    nearest = np.int64(scale + 0.5)
    whole = np.int32(0)
    if abs(scale - np.float64(nearest)) < 2.220446049250313e-16:
        whole = np.int32(nearest)
    return whole


@pixel_function
def write_area(table, at, limit, index, source_length, length, other_scale):
    """OpenCV's ``computeResizeAreaTab``, entry by entry, and what it does instead of it."""
    scale = opencv_scale(source_length, length)
    if scale < 1.0 or other_scale < 1.0:
        # OpenCV's linear, whose fraction is what an output pixel has beyond the border of a source pixel.
        first = np.int64(math.floor(np.float64(index) * scale))
        beyond = np.float32(np.float64(index + 1) - np.float64(first + 1) * (np.float64(length) / source_length))
        fraction = np.float32(0)
        if beyond > np.float32(0):
            fraction = beyond - np.float32(math.floor(beyond))
        steps = np.float32(1 << WEIGHT_BITS)
        table[at + FIRST] = np.int32(first)
        table[at + COUNT] = np.int32(2)
        table[at + MODE] = np.int32(BLENDED)
        table[at + HEADER] = np.int32(rint32((np.float32(1) - fraction) * steps))
        table[at + HEADER + 1] = np.int32(rint32(fraction * steps))
    else:
        whole = whole_ratio(scale)
        other_whole = whole_ratio(other_scale)
        if whole > 0 and other_whole > 0:
            table[at + FIRST] = np.int32(index * whole)
            table[at + COUNT] = whole
            table[at + MODE] = np.int32(MEAN_OF_FOUR if whole == 2 and other_whole == 2 else MEAN)
            table[at + NUMBER] = bits_of(np.float32(1) / np.float32(np.int32(whole * other_whole)))
        else:
            start = np.float64(index) * scale
            stop = start + scale
            cell = min(scale, np.float64(source_length) - start)
            last = min(np.int64(math.floor(stop)), np.int64(source_length - 1))
            inner = min(np.int64(math.ceil(start)), last)
            first = inner
            count = np.int64(0)
            if np.float64(inner) - start > THIN:
                first = inner - 1
                table[at + HEADER] = bits_of((np.float64(inner) - start) / cell)
                count = np.int64(1)
            for _ in range(inner, last):
                if count < limit:
                    table[at + HEADER + count] = bits_of(np.float64(1.0) / cell)
                    count += 1
            if stop - np.float64(last) > THIN and count < limit:
                table[at + HEADER + count] = bits_of(min(min(stop - np.float64(last), 1.0), cell) / cell)
                count += 1
            table[at + FIRST] = np.int32(first)
            table[at + COUNT] = np.int32(count)
            table[at + MODE] = np.int32(WEIGHTED)


@pixel_function
def write_cubic(table, at, index, source_length, length):
    """OpenCV's cubic, Keys' a = -0.75, in 1/2048. Taps outside the region are the border's."""
    x = np.float32((np.float64(index) + 0.5) * opencv_scale(source_length, length) - 0.5)
    first = np.int32(math.floor(x))
    f = x - np.float32(first)
    a = np.float32(-0.75)
    one = np.float32(1)
    far = f + one
    near = one - f
    weight_0 = ((a * far - np.float32(5) * a) * far + np.float32(8) * a) * far - np.float32(4) * a
    weight_1 = ((a + np.float32(2)) * f - (a + np.float32(3))) * f * f + one
    weight_2 = ((a + np.float32(2)) * near - (a + np.float32(3))) * near * near + one
    weight_3 = one - weight_0 - weight_1 - weight_2
    steps = np.float32(1 << WEIGHT_BITS)
    table[at + FIRST] = np.int32(first - 1)
    table[at + COUNT] = np.int32(4)
    table[at + HEADER] = np.int32(rint32(weight_0 * steps))
    table[at + HEADER + 1] = np.int32(rint32(weight_1 * steps))
    table[at + HEADER + 2] = np.int32(rint32(weight_2 * steps))
    table[at + HEADER + 3] = np.int32(rint32(weight_3 * steps))


@pixel_function
def write_antialiased_cubic(table, at, limit, index, source_length, length):
    """torch's antialiased cubic: Pillow's windows, with weights in float32."""
    scale = np.float64(source_length) / np.float64(length)
    widening = max(scale, np.float64(1.0))
    support = np.float64(2.0) * widening
    narrowing = np.float64(1.0) / widening
    center = (np.float64(index) + 0.5) * scale
    first = max(np.int64(center - support + 0.5), np.int64(0))
    stop = min(np.int64(center + support + 0.5), np.int64(source_length))
    count = clamp(stop - first, np.int64(0), np.int64(limit))
    table[at + FIRST] = np.int32(first)
    table[at + COUNT] = np.int32(count)
    total = np.float64(0.0)
    for step in range(2 * count):  # first their sum, then the weights: in one loop, which compiles once
        tap = np.int32(step if step < count else step - count)
        weight = cubic_value(abs((np.float64(tap + first) - center + 0.5) * narrowing))
        if step < count:
            total += weight
        else:
            table[at + HEADER + tap] = bits_of(weight / total if total != 0.0 else weight)


@pixel_function
def write_window(table, regions, item, across, canvas_length, limit, vertical, kind):
    """The entry of column (or line) ``across`` of canvas ``item``; outside the image it has no taps."""
    row = np.int64(item) * region.FIELDS
    place = regions[row + (region.TOP if vertical else region.LEFT)]
    length = regions[row + (region.OUT_HEIGHT if vertical else region.OUT_WIDTH)]
    source_length = regions[row + (region.HEIGHT if vertical else region.WIDTH)]
    at = (np.int64(item) * np.int64(canvas_length) + np.int64(across)) * np.int64(limit + HEADER)
    for field in range(limit + HEADER):
        table[at + field] = np.int32(0)
    index = np.int32(across - place)
    if index >= 0 and index < length and source_length > 0:
        if kind == CV2_AREA:
            other_length = regions[row + (region.OUT_WIDTH if vertical else region.OUT_HEIGHT)]
            other_source = regions[row + (region.WIDTH if vertical else region.HEIGHT)]
            other_scale = opencv_scale(other_source, other_length)
            write_area(table, at, limit, index, source_length, length, other_scale)
        elif kind == CV2_CUBIC:
            write_cubic(table, at, index, source_length, length)
        else:
            write_antialiased_cubic(table, at, limit, index, source_length, length)


def fill_windows_cpu(table, regions, canvas_length, limit, vertical, kind):
    """The tap tables of one axis, of all canvases."""
    items = regions.size // region.FIELDS
    for entry in prange(items * canvas_length):
        item = entry // canvas_length
        write_window(table, regions, item, entry - item * canvas_length, canvas_length, limit, vertical, kind)


# --- windows: one channel of one output pixel -------------------------------------------------------------------------


@pixel_function
def area_window(pixels, at, pitch, pixel_bytes, x_table, x_entry, y_table, y_entry, width, height, place, values):
    """OpenCV's ``INTER_AREA``."""
    columns = x_table[x_entry + COUNT]
    lines = y_table[y_entry + COUNT]
    mode = x_table[x_entry + MODE]
    corner = at + np.int64(y_table[y_entry]) * pitch + np.int64(np.int32(x_table[x_entry] * pixel_bytes))
    result = np.float32(0)
    if mode == BLENDED:
        last = np.int32(width - 1)
        first = clamp(x_table[x_entry], np.int32(0), last)
        left_weight = x_table[x_entry + HEADER]
        right_weight = x_table[x_entry + HEADER + 1]
        if x_table[x_entry] >= last:
            left_weight = np.int32(1 << WEIGHT_BITS)
            right_weight = np.int32(0)
        second = min(np.int32(first + 1), last)
        top = clamp(y_table[y_entry], np.int32(0), np.int32(height - 1))
        bottom = clamp(np.int32(y_table[y_entry] + 1), np.int32(0), np.int32(height - 1))
        above = at + np.int64(top) * pitch
        below = at + np.int64(bottom) * pitch
        to_first = np.int64(np.int32(first * pixel_bytes))
        to_second = np.int64(np.int32(second * pixel_bytes))
        result = exact_blend(
            pixels[above + to_first],
            pixels[above + to_second],
            pixels[below + to_first],
            pixels[below + to_second],
            left_weight,
            right_weight,
            y_table[y_entry + HEADER],
            y_table[y_entry + HEADER + 1],
        )
    elif mode == WEIGHTED:
        for line in range(lines):
            start = corner + np.int64(line) * pitch
            along = np.float32(0)
            for column in range(columns):
                weight = bits_to_float(x_table[x_entry + HEADER + column])
                along += np.float32(pixels[start + np.int64(np.int32(column * pixel_bytes))]) * weight
            result += along * bits_to_float(y_table[y_entry + HEADER + line])
        result = rint32(clamp(result, np.float32(0), np.float32(255)))
    else:
        total = np.int32(0)
        for line in range(lines):
            start = corner + np.int64(line) * pitch
            for column in range(columns):
                total = np.int32(total + np.int32(pixels[start + np.int64(np.int32(column * pixel_bytes))]))
        if mode == MEAN_OF_FOUR:
            result = np.float32(np.int32(np.int32(total + 2) >> 2))
        else:
            factor = bits_to_float(x_table[x_entry + NUMBER])
            result = rint32(clamp(np.float32(total) * factor, np.float32(0), np.float32(255)))
    return result


@pixel_function
def cubic_line(pixels, start, pixel_bytes, x_table, x_entry, last):
    """Four pixels of a line times their weights."""
    total = np.int32(0)
    for tap in range(4):
        column = clamp(np.int32(x_table[x_entry] + tap), np.int32(0), last)
        value = np.int32(pixels[start + np.int64(np.int32(column * pixel_bytes))])
        total = np.int32(total + np.int32(value * x_table[x_entry + HEADER + tap]))
    return total


@pixel_function
def cubic_window(pixels, at, pitch, pixel_bytes, x_table, x_entry, y_table, y_entry, width, height, place, values):
    """OpenCV's own ``INTER_CUBIC``, in integers along the lines and, but for the end of a line, in floats across."""
    last = np.int32(width - 1)
    in_vector = place < np.int32(values & ~np.int32(VECTOR - 1))
    total = np.int32(0)
    result = np.float32(0)
    unit = np.float32(1.0 / (1 << (2 * WEIGHT_BITS)))
    for back in range(4):  # OpenCV adds the last line's product first
        tap = np.int32(3 - back)
        line = clamp(np.int32(y_table[y_entry] + tap), np.int32(0), np.int32(height - 1))
        along = cubic_line(pixels, at + np.int64(line) * pitch, pixel_bytes, x_table, x_entry, last)
        weight = y_table[y_entry + HEADER + tap]
        total = np.int32(total + np.int32(along * weight))
        result = np.float32(along) * (np.float32(weight) * unit) + result
    result = rint32(clamp(result, np.float32(0), np.float32(255)))
    if not in_vector:
        rounded = np.int32(np.int32(total + (1 << (2 * WEIGHT_BITS - 1))) >> (2 * WEIGHT_BITS))
        result = np.float32(clamp(rounded, np.int32(0), np.int32(255)))
    return result


@pixel_function
def float_window(pixels, at, pitch, pixel_bytes, x_table, x_entry, y_table, y_entry, width, height, place, values):
    """Weighted sums in float32, saturated and rounded once, as torchvision does with uint8."""
    corner = at + np.int64(y_table[y_entry]) * pitch + np.int64(np.int32(x_table[x_entry] * pixel_bytes))
    result = np.float32(0)
    for line in range(y_table[y_entry + COUNT]):
        start = corner + np.int64(line) * pitch
        along = np.float32(0)
        for column in range(x_table[x_entry + COUNT]):
            weight = bits_to_float(x_table[x_entry + HEADER + column])
            along += np.float32(pixels[start + np.int64(np.int32(column * pixel_bytes))]) * weight
        result += along * bits_to_float(y_table[y_entry + HEADER + line])
    return rint32(clamp(result, np.float32(0), np.float32(255)))


WINDOWS = {CV2_AREA: area_window, CV2_CUBIC: cubic_window, TORCH_CUBIC: float_window}


@functools.cache
def make_window_export(kind):
    """A window for C: ``x_entry`` and ``y_entry`` are pointers to the entries."""
    window = WINDOWS[kind]

    @pixel_function
    def window_export(channel, pitch, pixel_bytes, x_entry, y_entry, width, height, place, values):
        zero = np.int64(0)
        return window(channel, zero, pitch, pixel_bytes, x_entry, zero, y_entry, zero, width, height, place, values)

    return window_export


def make_cpu_loop(kind, store, chain=None):
    """The plan as a parallel CPU loop over output lines; see ``preprocess.make_cpu_loop``."""
    # Not inlined: the loop calls it in three places.
    window = compiled_apart(WINDOWS[kind])
    shade = make_shade(chain)
    save = make_store(store)

    @compiled_apart
    def make_line(
        job,
        base,
        sources,
        regions,
        x_table,
        y_table,
        x_limit,
        y_limit,
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
        strides,
    ):
        x_stride = np.int64(x_limit + HEADER)
        y_stride = np.int64(y_limit + HEADER)
        pixels = pointer_from_address(base)
        item = job // height
        y = job - item * height
        row = np.int64(item) * region.FIELDS
        source = np.int64(regions[row + region.IMAGE]) * 4
        pitch = sources[source + 1]
        origin = sources[source] + regions[row + region.Y] * pitch + np.int64(regions[row + region.X] * pixel_bytes)
        region_width = regions[row + region.WIDTH]
        region_height = regions[row + region.HEIGHT]
        left = regions[row + region.LEFT]
        values = np.int32(regions[row + region.OUT_WIDTH] * pixel_bytes)
        to_canvas, to_pixel, to_channel, stored = strides
        canvas = np.int64(item) * to_canvas
        y_entry = (np.int64(item) * height + y) * y_stride
        for x in range(width):
            x_entry = (np.int64(item) * width + x) * x_stride
            value_0 = fill[0]
            value_1 = fill[1]
            value_2 = fill[2]
            if x_table[x_entry + COUNT] > 0 and y_table[y_entry + COUNT] > 0:
                place = np.int32((x - left) * pixel_bytes)
                value_0 = window(
                    pixels,
                    origin,
                    pitch,
                    pixel_bytes,
                    x_table,
                    x_entry,
                    y_table,
                    y_entry,
                    region_width,
                    region_height,
                    place,
                    values,
                )
                value_1 = value_0
                value_2 = value_0
                if not gray:
                    value_1 = window(
                        pixels,
                        origin + 1,
                        pitch,
                        pixel_bytes,
                        x_table,
                        x_entry,
                        y_table,
                        y_entry,
                        region_width,
                        region_height,
                        np.int32(place + 1),
                        values,
                    )
                    value_2 = window(
                        pixels,
                        origin + 2,
                        pitch,
                        pixel_bytes,
                        x_table,
                        x_entry,
                        y_table,
                        y_entry,
                        region_width,
                        region_height,
                        np.int32(place + 2),
                        values,
                    )
                if swap:
                    value_0, value_2 = value_2, value_0
            value_0, value_1, value_2 = shade(value_0, value_1, value_2, x, y, bgr, numbers)
            to = canvas + (np.int64(y) * width + x) * to_pixel
            save(out, to, value_0 * gain[0] + bias[0])
            if stored > 1:
                save(out, to + to_channel, value_1 * gain[1] + bias[1])
                save(out, to + 2 * to_channel, value_2 * gain[2] + bias[2])
            if stored > 3:
                save(out, to + 3, np.float32(0))

    def loop(
        base,
        sources,
        regions,
        x_table,
        y_table,
        x_limit,
        y_limit,
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
        strides,
    ):
        for job in prange(items * height):
            make_line(
                job,
                base,
                sources,
                regions,
                x_table,
                y_table,
                x_limit,
                y_limit,
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
                strides,
            )

    return loop
