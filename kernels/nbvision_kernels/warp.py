"""Warps, flips and quarter turns: where an output pixel comes from, and the value found there.

A warp reads nine float32 *coefficients* an image, which map output to source.  Their arithmetic is the one of OpenCV
5's vector kernels, roundings and fused multiply-adds included, so nearest and linear give its very bytes: the part of
a line is rounded twice, the part of a column once.

A *packed* pixel is its channels in 32 bits, the first in the lowest byte, and a *pair* two of them back to back, as
they lie in memory.  Where all taps are inside, pairs are read in whole words.  Elsewhere a *column* is an offset in
bytes and a *line* an address; one that lies outside is -1 where the border is constant.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from nbvision_kernels.codes import (
    COEFFICIENTS,
)
from nbvision_kernels.codes import (
    WARP_CUBIC as CUBIC,
)
from nbvision_kernels.codes import (
    WARP_LINEAR as LINEAR,
)
from nbvision_kernels.codes import (
    WARP_NEAREST as NEAREST,
)
from nbvision_kernels.pixel import (
    clamp,
    compiled_apart,
    fma32,
    pixel_function,
    pointer_from_address,
    rint32,
    round_to_u8,
    words_from_address,
)

__all__ = [
    "CONSTANT",
    "REFLECT",
    "REPLICATE",
    "SAMPLERS",
    "coefficients_cpu",
    "make_move_cpu",
    "make_warp_cpu",
    "moved_from",
    "warp_position",
    "write_coefficients",
]

CONSTANT, REPLICATE, REFLECT = 0, 1, 2
_FARTHEST = np.float32(1 << 21)  # positions beyond are moved here, where rounding and taps still fit
_TILE = 32


# --- positions --------------------------------------------------------------------------------------------------------


@pixel_function
def write_coefficients(matrices, row, lines, inverse, coefficients):
    """Coefficients of matrix ``row``, of two or three ``lines``; ``inverse`` if it maps output to source already.

    Inverted in float64 as OpenCV does it. NaN where the matrix is singular or not finite: nothing is found there.
    """
    at = np.int64(row) * np.int64(lines * 3)
    to = np.int64(row) * np.int64(COEFFICIENTS)
    a, b, c = matrices[at], matrices[at + 1], matrices[at + 2]
    d, e, f = matrices[at + 3], matrices[at + 4], matrices[at + 5]
    g, h, i = np.float64(0), np.float64(0), np.float64(1)
    if lines == 3:
        g, h, i = matrices[at + 6], matrices[at + 7], matrices[at + 8]
    good = np.float64(0)  # becomes NaN if any number is NaN or infinite
    for index in range(lines * 3):
        good += matrices[at + index] * np.float64(0)
    if inverse == 0:
        if lines == 2:
            determinant = a * e - b * d
            scale = np.float64(1) / determinant
            a, e = e * scale, a * scale
            b, d = b * -scale, d * -scale
            c, f = -a * c - b * f, -d * c - e * f
        else:
            determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
            scale = np.float64(1) / determinant
            a, b, c, d, e, f, g, h, i = (
                (e * i - f * h) * scale,
                (c * h - b * i) * scale,
                (b * f - c * e) * scale,
                (f * g - d * i) * scale,
                (a * i - c * g) * scale,
                (c * d - a * f) * scale,
                (d * h - e * g) * scale,
                (b * g - a * h) * scale,
                (a * e - b * d) * scale,
            )
        if not (determinant < 0 or determinant > 0):
            good = np.float64(np.nan)
    coefficients[to] = np.float32(a + good)
    coefficients[to + 1] = np.float32(b + good)
    coefficients[to + 2] = np.float32(c + good)
    coefficients[to + 3] = np.float32(d + good)
    coefficients[to + 4] = np.float32(e + good)
    coefficients[to + 5] = np.float32(f + good)
    coefficients[to + 6] = np.float32(g + good)
    coefficients[to + 7] = np.float32(h + good)
    coefficients[to + 8] = np.float32(i + good)


@pixel_function
def along(coefficients, at, x, y):
    """One line of the matrix times (x, y, 1)."""
    line = np.float32(y) * coefficients[at + 1] + coefficients[at + 2]
    return fma32(coefficients[at], np.float32(x), line)


@pixel_function
def warp_position(coefficients, at, x, y, perspective):
    """Source position of output pixel (x, y), limited to what taps can be counted from; NaN if there is none."""
    source_x = along(coefficients, at, x, y)
    source_y = along(coefficients, at + 3, x, y)
    if perspective:
        depth = along(coefficients, at + 6, x, y)
        source_x = source_x / depth
        source_y = source_y / depth
    known = source_x == source_x and source_y == source_y
    source_x = clamp(source_x, -_FARTHEST, _FARTHEST) if known else np.float32(np.nan)
    source_y = clamp(source_y, -_FARTHEST, _FARTHEST)
    return source_x, source_y


@pixel_function
def border_index(index, length, border):
    """The pixel that stands for ``index`` of a line of ``length``; -1 for none."""
    result = np.int32(index)
    if index < 0 or index >= length:
        if border == CONSTANT:
            result = np.int32(-1)
        elif border == REPLICATE:
            result = clamp(np.int32(index), np.int32(0), np.int32(length - 1))
        else:
            period = np.int32(max(2 * (length - 1), 1))
            result = np.int32(np.int32(abs(np.int32(index))) % period)
            if result >= length:
                result = np.int32(period - result)
    return result


@pixel_function
def tap_column(index, width, border, channels):
    """Offset of a column in bytes, or -1."""
    column = border_index(index, width, border)
    return np.int32(column * channels) if column >= 0 else np.int32(-1)


@pixel_function
def tap_line(index, height, border, base, pitch):
    """Address of a line, or -1."""
    line = border_index(index, height, border)
    return base + np.int64(line) * pitch if line >= 0 else np.int64(-1)


@pixel_function
def packed_pixel(pixels, line, column, channels, fill):
    """All channels of the pixel where a line and a column cross, the first in the lowest byte."""
    packed = np.uint32(fill)
    if line >= 0 and column >= 0:
        packed = np.uint32(0)
        for channel in range(channels):
            value = np.uint32(pixels[line + np.int64(column) + np.int64(channel)])
            packed = np.uint32(packed | np.uint32(value << np.uint32(8 * channel)))
    return packed


@pixel_function
def border_pair(pixels, line, first, second, channels, fill):
    """Two packed pixels of a line."""
    low = np.uint64(packed_pixel(pixels, line, first, channels, fill))
    high = np.uint64(packed_pixel(pixels, line, second, channels, fill))
    return low | (high << np.uint64(8 * channels))


@pixel_function
def inner_pair(words, address, channels):
    """Two packed pixels side by side, read in as few words as hold a byte of them."""
    at = address >> np.int64(2)
    offset = np.int32(address & np.int64(3))
    stop = np.int32(offset + 2 * channels)
    shift = np.uint64(8 * offset)
    pair = np.uint64(words[at]) >> shift
    if stop > 4:
        pair = pair | (np.uint64(words[at + 1]) << (np.uint64(32) - shift))
    if stop > 8:
        pair = pair | (np.uint64(words[at + 2]) << (np.uint64(64) - shift))
    return pair


@pixel_function
def of_pair(pair, pixel, channel, channels):
    """One channel of the first or the second pixel of a pair, as float32."""
    return np.float32(np.int32((pair >> np.uint64(8 * (pixel * channels + channel))) & np.uint64(255)))


# --- samplers: all channels of a pixel, packed into 32 bits -----------------------------------------------------------


@pixel_function
def linear_value(top_left, top_right, bottom_left, bottom_right, share_x, share_y):
    """Bilinear value of four float32."""
    above = fma32(share_x, top_right - top_left, top_left)
    below = fma32(share_x, bottom_right - bottom_left, bottom_left)
    return fma32(share_y, below - above, above)


@pixel_function
def cubic_near(distance):
    """Weight of Keys' cubic with a = -0.75 for a distance of 0 to 1."""
    one, two_and_quarter = np.float32(1.25), np.float32(2.25)
    return fma32(fma32(one, distance, -two_and_quarter), distance * distance, np.float32(1))


@pixel_function
def cubic_far(distance):
    """Weight of the same cubic for a distance of 1 to 2."""
    a = np.float32(-0.75)
    inner = fma32(fma32(a, distance, np.float32(3.75)), distance, np.float32(-6))
    return fma32(inner, distance, np.float32(3))


@pixel_function
def nearest_sample(pixels, words, base, pitch, height, width, channels, x, y, border, fill):
    """The pixel nearest to a position; halves go to the even one."""
    column = tap_column(np.int32(rint32(x)), width, border, channels)
    line = tap_line(np.int32(rint32(y)), height, border, base, pitch)
    return packed_pixel(pixels, line, column, channels, fill)


@pixel_function
def linear_sample(pixels, words, base, pitch, height, width, channels, x, y, border, fill):
    """Bilinear between the four pixels around a position, rounded half to even."""
    first_x = np.int32(math.floor(x))
    first_y = np.int32(math.floor(y))
    share_x = x - np.float32(first_x)
    share_y = y - np.float32(first_y)
    if first_x >= 0 and first_x < width - 1 and first_y >= 0 and first_y < height - 1:
        start = base + np.int64(first_y) * pitch + np.int64(first_x * channels)
        top = inner_pair(words, start, channels)
        bottom = inner_pair(words, start + pitch, channels)
    else:
        left = tap_column(first_x, width, border, channels)
        right = tap_column(np.int32(first_x + 1), width, border, channels)
        line = tap_line(first_y, height, border, base, pitch)
        top = border_pair(pixels, line, left, right, channels, fill)
        line = tap_line(np.int32(first_y + 1), height, border, base, pitch)
        bottom = border_pair(pixels, line, left, right, channels, fill)
    packed = np.uint32(0)
    for channel in range(channels):
        value = linear_value(
            of_pair(top, 0, channel, channels),
            of_pair(top, 1, channel, channels),
            of_pair(bottom, 0, channel, channels),
            of_pair(bottom, 1, channel, channels),
            share_x,
            share_y,
        )
        packed = np.uint32(packed | np.uint32(np.uint32(round_to_u8(value)) << np.uint32(8 * channel)))
    return packed


@pixel_function
def cubic_weights(share):
    """Weights of the four pixels around a position that is ``share`` behind the second."""
    one = np.float32(1)
    return cubic_far(one + share), cubic_near(share), cubic_near(one - share), cubic_far(np.float32(2) - share)


@pixel_function
def cubic_line(left, right, weights, channel, channels):
    """Four pixels of a line, weighted."""
    total = of_pair(left, 0, channel, channels) * weights[0]
    total = fma32(of_pair(left, 1, channel, channels), weights[1], total)
    total = fma32(of_pair(right, 0, channel, channels), weights[2], total)
    return fma32(of_pair(right, 1, channel, channels), weights[3], total)


@pixel_function
def cubic_sample(pixels, words, base, pitch, height, width, channels, x, y, border, fill):
    """Bicubic over the sixteen pixels around a position, rounded half to even and saturated."""
    first_x = np.int32(math.floor(x))
    first_y = np.int32(math.floor(y))
    across = cubic_weights(x - np.float32(first_x))
    down = cubic_weights(y - np.float32(first_y))
    inside = first_x >= 1 and first_x < width - 2 and first_y >= 1 and first_y < height - 2
    start = base + np.int64(first_y - 1) * pitch + np.int64((first_x - 1) * channels)
    red = green = blue = alpha = np.float32(0)
    for row in range(4):
        if inside:
            left = inner_pair(words, start, channels)
            right = inner_pair(words, start + np.int64(2 * channels), channels)
            start += pitch
        else:
            line = tap_line(np.int32(first_y + row - 1), height, border, base, pitch)
            columns = (
                tap_column(np.int32(first_x - 1), width, border, channels),
                tap_column(first_x, width, border, channels),
                tap_column(np.int32(first_x + 1), width, border, channels),
                tap_column(np.int32(first_x + 2), width, border, channels),
            )
            left = border_pair(pixels, line, columns[0], columns[1], channels, fill)
            right = border_pair(pixels, line, columns[2], columns[3], channels, fill)
        # Not down[row]: tuples cannot be indexed by a variable on the GPU.
        weight = down[0] if row == 0 else down[1] if row == 1 else down[2] if row == 2 else down[3]
        red = fma32(cubic_line(left, right, across, 0, channels), weight, red)
        if channels > 1:
            green = fma32(cubic_line(left, right, across, 1, channels), weight, green)
            blue = fma32(cubic_line(left, right, across, 2, channels), weight, blue)
        if channels > 3:
            alpha = fma32(cubic_line(left, right, across, 3, channels), weight, alpha)
    packed = np.uint32(round_to_u8(red))
    if channels > 1:
        packed = np.uint32(packed | np.uint32(np.uint32(round_to_u8(green)) << np.uint32(8)))
        packed = np.uint32(packed | np.uint32(np.uint32(round_to_u8(blue)) << np.uint32(16)))
    if channels > 3:
        packed = np.uint32(packed | np.uint32(np.uint32(round_to_u8(alpha)) << np.uint32(24)))
    return packed


SAMPLERS = {NEAREST: nearest_sample, LINEAR: linear_sample, CUBIC: cubic_sample}


# --- flips and quarter turns ------------------------------------------------------------------------------------------


@pixel_function
def moved_from(x, y, height, width, transpose, mirror_x, mirror_y):
    """Column and line of a source of ``height`` x ``width`` that output pixel (x, y) shows: the source is transposed
    first, then its columns and lines are mirrored."""
    across = height if transpose else width
    down = width if transpose else height
    column = np.int32(across - 1 - x) if mirror_x else np.int32(x)
    line = np.int32(down - 1 - y) if mirror_y else np.int32(y)
    if transpose:
        column, line = line, column
    return column, line


# --- CPU loops --------------------------------------------------------------------------------------------------------


def coefficients_cpu(matrices, count, lines, inverse, coefficients):
    """Coefficients of all matrices."""
    for row in range(count):
        write_coefficients(matrices, row, lines, inverse, coefficients)


def make_warp_cpu(interpolation, channels):
    """The loop of one interpolation and number of channels over all images, lines in parallel."""
    sample = SAMPLERS[interpolation]

    @compiled_apart
    def warp_line(sources, targets, image, y, coefficients, perspective, border, fill):
        pixels = pointer_from_address(np.int64(0))
        words = words_from_address(np.int64(0))
        base, pitch = sources[image * 4], sources[image * 4 + 1]
        height, width = np.int32(sources[image * 4 + 2]), np.int32(sources[image * 4 + 3])
        target = targets[image * 4] + y * targets[image * 4 + 1]
        at = np.int64(image) * np.int64(COEFFICIENTS)
        for x in range(np.int32(targets[image * 4 + 3])):
            source_x, source_y = warp_position(coefficients, at, np.int32(x), y, perspective)
            packed = np.uint32(fill)
            if source_x == source_x:
                packed = sample(pixels, words, base, pitch, height, width, channels, source_x, source_y, border, fill)
            for channel in range(channels):
                shift = np.uint32(8 * channel)
                pixels[target + np.int64(x) * channels + channel] = np.uint8((packed >> shift) & np.uint32(255))

    def warp_cpu(sources, targets, image_count, max_height, coefficients, perspective, border, fill):
        for index in prange(image_count * max_height):
            image = index // max_height
            y = np.int32(index - image * max_height)
            if y < targets[image * 4 + 2]:
                warp_line(sources, targets, image, y, coefficients, perspective, border, fill)

    return warp_cpu


def make_move_cpu(channels):
    """The loop that flips and turns pixels of ``channels`` bytes: tiles of lines in parallel, so that a column that is
    read stays in the cache."""

    def move_cpu(sources, targets, image_count, max_height, transpose, mirror_x, mirror_y):
        tile_lines = (max_height + _TILE - 1) // _TILE
        for index in prange(image_count * tile_lines):
            pixels = pointer_from_address(np.int64(0))
            image = index // tile_lines
            first_y = (index - image * tile_lines) * _TILE
            height, width = np.int32(sources[image * 4 + 2]), np.int32(sources[image * 4 + 3])
            out_height, out_width = targets[image * 4 + 2], targets[image * 4 + 3]
            base, pitch = sources[image * 4], sources[image * 4 + 1]
            for first_x in range(0, out_width, _TILE):
                for y in range(first_y, min(first_y + _TILE, out_height)):
                    target = targets[image * 4] + y * targets[image * 4 + 1]
                    for x in range(first_x, min(first_x + _TILE, out_width)):
                        column, line = moved_from(
                            np.int32(x), np.int32(y), height, width, transpose, mirror_x, mirror_y
                        )
                        source = base + line * pitch + np.int64(column) * channels
                        for channel in range(channels):
                            pixels[target + x * channels + channel] = pixels[source + channel]

    return move_cpu
