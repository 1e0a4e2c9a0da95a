"""The resample family: separable windows of any width, as Pillow resizes.  Antialiased, because a window grows with the
scale.  torch's antialiased linear is one of them to a level: no weight is negative, so rounding between the passes
costs no more.

An axis has a *tap table*: an entry for each column (or line) of the canvas, with the first source column, the count,
and the weights in fixed point.  :func:`write_taps` fills it in float64, as Pillow does; the images are integers only.
Pillow rounds to uint8 between the two passes, and runs the vertical one first when the height shrinks by more than
twice what the width does (since version 13); :func:`vertical_first` knows.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from nbvision_kernels import codes as region
from nbvision_kernels.chain import make_shade
from nbvision_kernels.codes import (
    FILTER_BOX as BOX,
)
from nbvision_kernels.codes import (
    FILTER_CUBIC as CUBIC,
)
from nbvision_kernels.codes import (
    FILTER_HAMMING as HAMMING,
)
from nbvision_kernels.codes import (
    FILTER_LANCZOS as LANCZOS,
)
from nbvision_kernels.codes import (
    FILTER_LINEAR as LINEAR,
)
from nbvision_kernels.codes import (
    HEADER,
    PACKED_TAPS,
    TAP_WEIGHT_BITS,
)
from nbvision_kernels.pixel import clamp, compiled_apart, pixel_function, pointer_from_address
from nbvision_kernels.preprocess import make_store

__all__ = [
    "fill_taps_cpu",
    "make_cpu_loop",
    "pack_taps",
    "saturate_sum",
    "vertical_first",
    "write_taps",
]

HAMMING_MEAN, HAMMING_SWING = float(np.float32(0.54)), float(np.float32(0.46))  # Pillow has them in single precision
STRIP = 16  # lines of a canvas that the CPU makes at a time


@pixel_function
def filter_support(kind):
    """Half a window, in units of the wider of source and output pixels."""
    support = np.float64(1.0)
    if kind == BOX:
        support = np.float64(0.5)
    elif kind == CUBIC:
        support = np.float64(2.0)
    elif kind == LANCZOS:
        support = np.float64(3.0)
    return support


@pixel_function
def sinc(x):
    """``sin(pi x) / (pi x)``."""
    result = np.float64(1.0)
    if x != 0:
        turned = x * math.pi
        result = math.sin(turned) / turned
    return result


@pixel_function
def cubic_value(distance):
    """Keys' cubic with a = -0.5."""
    value = np.float64(0.0)
    if distance < 1.0:
        value = (1.5 * distance - 2.5) * distance * distance + 1.0
    elif distance < 2.0:
        value = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    return value


@pixel_function
def filter_value(kind, x):
    """Pillow's windows, operation by operation; ``x`` in units of the support's."""
    value = np.float64(0.0)
    distance = abs(x)
    if kind == BOX:
        if x > -0.5 and x <= 0.5:
            value = np.float64(1.0)
    elif kind == LINEAR:
        if distance < 1.0:
            value = 1.0 - distance
    elif kind == HAMMING:
        if distance == 0.0:
            value = np.float64(1.0)
        elif distance < 1.0:
            turned = distance * math.pi
            value = math.sin(turned) / turned * (HAMMING_MEAN + HAMMING_SWING * math.cos(turned))
    elif kind == CUBIC:
        value = cubic_value(distance)
    elif x >= -3.0 and x < 3.0:
        value = np.float64(1.0)
        for width in range(1, 4, 2):  # a loop, as what is inlined twice compiles twice
            value *= sinc(x / width)
    return value


@pixel_function
def write_taps(table, regions, item, across, canvas_length, limit, vertical, kind):
    """The entry of column (or line) ``across`` of canvas ``item``: first, count, two unused, then ``limit`` weights.
    Outside the image it has no taps."""
    row = np.int64(item) * region.FIELDS
    place = regions[row + (region.TOP if vertical else region.LEFT)]
    length = regions[row + (region.OUT_HEIGHT if vertical else region.OUT_WIDTH)]
    source_length = regions[row + (region.HEIGHT if vertical else region.WIDTH)]
    at = (np.int64(item) * np.int64(canvas_length) + np.int64(across)) * np.int64(limit + HEADER)
    index = np.int32(across - place)
    first = np.int64(0)
    count = np.int64(0)
    center = np.float64(0.0)
    narrowing = np.float64(1.0)
    if index >= 0 and index < length:
        scale = np.float64(source_length) / np.float64(length)
        widening = max(scale, np.float64(1.0))
        support = filter_support(kind) * widening
        narrowing = np.float64(1.0) / widening
        center = (np.float64(index) + 0.5) * scale
        first = max(np.int64(center - support + 0.5), np.int64(0))
        stop = min(np.int64(center + support + 0.5), np.int64(source_length))
        count = clamp(stop - first, np.int64(0), np.int64(limit))
    table[at] = np.int32(first)
    table[at + 1] = np.int32(count)
    table[at + 2] = np.int32(0)
    table[at + 3] = np.int32(0)
    total = np.float64(0.0)
    for step in range(count + limit):  # first their sum, then the weights: in one loop, which compiles once
        tap = np.int32(step if step < count else step - count)
        weight = np.float64(0.0)
        if tap < count:
            weight = filter_value(kind, (np.float64(tap + first) - center + 0.5) * narrowing)
        if step < count:
            total += weight
        else:
            if total != 0.0:
                weight = weight / total
            fixed = weight * np.float64(1 << TAP_WEIGHT_BITS)
            table[at + HEADER + tap] = np.int32(fixed - 0.5 if fixed < 0 else fixed + 0.5)


@pixel_function
def pack_taps(table, entry, limit):
    """The weights in groups of eight: two words of their low bytes, two of the middle ones, two of the high ones, which
    is how the frame multiplies eight pixels at once; two words stay unused. Groups start at multiples of eight pixels:
    up to seven zeros come first, and ``limit`` has room for them."""
    zeros = table[entry] % PACKED_TAPS
    last = np.int32(limit - PACKED_TAPS)
    for before in range(0, limit, PACKED_TAPS):  # from the last group, as weights move towards the end
        group = np.int32(last - before)
        low_0 = low_1 = middle_0 = middle_1 = high_0 = high_1 = np.uint32(0)
        for tap in range(PACKED_TAPS):
            place = np.int32(group - zeros + tap)
            weight = np.uint32(table[entry + HEADER + place] if place >= 0 else np.int32(0))
            shift = np.uint32(8 * (tap & 3))
            low = np.uint32(np.uint32(weight & np.uint32(255)) << shift)
            middle = np.uint32(np.uint32(np.uint32(weight >> np.uint32(8)) & np.uint32(255)) << shift)
            high = np.uint32(np.uint32(np.uint32(weight >> np.uint32(16)) & np.uint32(255)) << shift)
            if tap < 4:
                low_0, middle_0, high_0 = np.uint32(low_0 | low), np.uint32(middle_0 | middle), np.uint32(high_0 | high)
            else:
                low_1, middle_1, high_1 = np.uint32(low_1 | low), np.uint32(middle_1 | middle), np.uint32(high_1 | high)
        at = entry + HEADER + group
        table[at] = np.int32(low_0)
        table[at + 1] = np.int32(low_1)
        table[at + 2] = np.int32(middle_0)
        table[at + 3] = np.int32(middle_1)
        table[at + 4] = np.int32(high_0)
        table[at + 5] = np.int32(high_1)


def fill_taps_cpu(table, regions, canvas_length, limit, vertical, kind):
    """The tap tables of one axis, of all canvases."""
    items = regions.size // region.FIELDS
    for entry in prange(items * canvas_length):
        item = entry // canvas_length
        write_taps(table, regions, item, entry - item * canvas_length, canvas_length, limit, vertical, kind)


@pixel_function
def vertical_first(width, height, out_width, out_height):
    """Whether Pillow 13 shrinks the height before the width, which Pillow 11 and 12 never do, nor torch."""
    shrinks = np.int32(height - out_height)
    return shrinks > 0 and shrinks > 2 * np.int32(width - out_width)


@pixel_function
def saturate_sum(total):
    """A weighted sum in fixed point, to which a half has been added, as uint8."""
    value = np.int32(np.int32(total) >> TAP_WEIGHT_BITS)
    return max(min(value, np.int32(255)), np.int32(0))  # in this order sm_90 has one instruction


@njit(error_model="numpy")  # not inlined: the loop calls it in five places, and would compile for 20 seconds
def sum_of_taps(values, at, to_next, table, entry):
    """Weighted sum of bytes, each ``to_next`` behind the one before, rounded."""
    total = np.int32(1 << (TAP_WEIGHT_BITS - 1))
    for tap in range(table[entry + 1]):
        total += np.int32(np.int32(values[at + tap * to_next]) * table[entry + HEADER + tap])
    return saturate_sum(total)


def make_cpu_loop(store, chain=None):
    """The plan as a parallel CPU loop over strips of output lines; see ``preprocess.make_cpu_loop``."""
    shade = make_shade(chain)
    save = make_store(store)

    @compiled_apart
    def make_strip(
        job,
        base,
        sources,
        regions,
        x_table,
        y_table,
        x_limit,
        y_limit,
        width_first,
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
        strips = (height + STRIP - 1) // STRIP
        channels = 1 if gray else 3
        x_stride = np.int64(x_limit + HEADER)
        y_stride = np.int64(y_limit + HEADER)
        pixels = pointer_from_address(base)
        item = job // strips
        y_first = (job - item * strips) * STRIP
        y_stop = min(y_first + STRIP, height)
        row = np.int64(item) * region.FIELDS
        source = np.int64(regions[row + region.IMAGE]) * 4
        pitch = sources[source + 1]
        origin = sources[source] + regions[row + region.Y] * pitch + np.int64(regions[row + region.X] * pixel_bytes)
        x_entries = np.int64(item) * width * x_stride
        y_entries = np.int64(item) * height * y_stride
        # What the strip needs of the source.
        low = np.int64(1 << 40)
        high = np.int64(0)
        for y in range(y_first, y_stop):
            entry = y_entries + y * y_stride
            if y_table[entry + 1] > 0:
                low = min(low, np.int64(y_table[entry]))
                high = max(high, np.int64(y_table[entry] + y_table[entry + 1]))
        left = np.int64(1 << 40)
        right = np.int64(0)
        for x in range(width):
            entry = x_entries + x * x_stride
            if x_table[entry + 1] > 0:
                left = min(left, np.int64(x_table[entry]))
                right = max(right, np.int64(x_table[entry] + x_table[entry + 1]))
        anything = high > 0 and right > 0
        first_vertical = not width_first and vertical_first(
            regions[row + region.WIDTH],
            regions[row + region.HEIGHT],
            regions[row + region.OUT_WIDTH],
            regions[row + region.OUT_HEIGHT],
        )
        between = np.empty(0, np.uint8)
        if anything and first_vertical:
            columns = right - left
            between = np.empty((y_stop - y_first) * columns * channels, np.uint8)
            for y in range(y_first, y_stop):
                entry = y_entries + y * y_stride
                start = origin + np.int64(y_table[entry]) * pitch
                for column in range(columns):
                    for channel in range(channels):
                        at = start + (left + column) * pixel_bytes + channel
                        value = sum_of_taps(pixels, at, pitch, y_table, entry)
                        between[((y - y_first) * columns + column) * channels + channel] = value
        elif anything:
            between = np.empty((high - low) * width * channels, np.uint8)
            for line in range(high - low):
                start = origin + (low + line) * pitch
                for x in range(width):
                    entry = x_entries + x * x_stride
                    for channel in range(channels):
                        at = start + np.int64(x_table[entry]) * pixel_bytes + channel
                        value = sum_of_taps(pixels, at, np.int64(pixel_bytes), x_table, entry)
                        between[(line * width + x) * channels + channel] = value
        to_canvas, to_pixel, to_channel, stored = strides
        canvas = np.int64(item) * to_canvas
        for y in range(y_first, y_stop):
            y_entry = y_entries + y * y_stride
            for x in range(width):
                x_entry = x_entries + x * x_stride
                value_0 = fill[0]
                value_1 = fill[1]
                value_2 = fill[2]
                if x_table[x_entry + 1] > 0 and y_table[y_entry + 1] > 0:
                    if first_vertical:  # what is left to do is along the line, or across the lines
                        table, entry, to_next = x_table, x_entry, np.int64(channels)
                        at = ((y - y_first) * (right - left) + x_table[x_entry] - left) * channels
                    else:
                        table, entry, to_next = y_table, y_entry, np.int64(width) * channels
                        at = ((y_table[y_entry] - low) * width + x) * channels
                    value_0 = np.float32(sum_of_taps(between, at, to_next, table, entry))
                    value_1 = value_0
                    value_2 = value_0
                    if not gray:
                        value_1 = np.float32(sum_of_taps(between, at + 1, to_next, table, entry))
                        value_2 = np.float32(sum_of_taps(between, at + 2, to_next, table, entry))
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
        width_first,
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
        for job in prange(items * ((height + STRIP - 1) // STRIP)):
            make_strip(
                job,
                base,
                sources,
                regions,
                x_table,
                y_table,
                x_limit,
                y_limit,
                width_first,
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
