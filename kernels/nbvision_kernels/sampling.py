"""Where an output pixel falls in the source, and the value found there.  Pixel functions only.

Positions follow pixel centres: output ``d`` falls at ``(d + 0.5) * scale - 0.5``.  OpenCV computes that in float64 and
rounds it once to float32.  :func:`position` gets the same float32 from integers, because float64 is slow on most GPUs:
a 64-bit fixed-point product, rounded once by its conversion to float32.  Checked against OpenCV for all sources up to
4096 pixels a side; beyond, outputs that are multiples of 2048 can differ by one weight in 2048.

A sampler is three functions.  ``along_x`` and ``along_y`` turn an output column or line, counted from the region's
first, into its *taps*: the two source columns or lines that are read, each with its weight.  ``blend`` makes one value
of the four pixels where they cross.  A loop that walks along a line computes the line's taps once.
"""

from __future__ import annotations

import math

import numpy as np

from nbvision_kernels.pixel import clamp, pixel_function, rint32

__all__ = [
    "exact_along_x",
    "exact_along_y",
    "exact_blend",
    "exact_down",
    "fast_along",
    "fast_blend",
    "nearest_along",
    "nearest_blend",
    "nearest_index",
    "position",
]

WEIGHT_BITS = 11  # of OpenCV's integer weights


@pixel_function
def position(index, step, start, unit):
    """Source position of output ``index`` as OpenCV rounds it: fixed point, whose last bit is worth ``unit``."""
    return np.float32(np.int64(index) * step + start) * unit


@pixel_function
def nearest_index(index, step, bits):
    """``floor(index * scale)`` as OpenCV's float64 gives it: a product within half a unit in the last place below an
    integer counts as that integer.

    ``step`` holds the 53 bits of the scale, and the last is worth ``2 ** -bits`` (37 to 68 for sides below 65,536).
    """
    low = np.int64(index) * (step & np.int64(0xFFFFFFFF))
    high = np.int64(index) * (step >> np.int64(32)) + (low >> np.int64(32))
    low = low & np.int64(0xFFFFFFFF)
    whole = high >> np.int64(bits - 32)
    missing = (np.int64(1) << np.int64(32)) - low  # to the next integer, if it is so near
    if missing <= (np.int64(1) << np.int64(16)) and (high + np.int64(1)) >> np.int64(bits - 32) != whole:  # rare
        exponent = np.int64(-1)
        rest = whole
        while rest > 0:
            exponent += 1
            rest = rest >> np.int64(1)
        if bits + exponent >= 53 and missing <= (np.int64(1) << np.int64(bits + exponent - 53)):
            whole += 1
    return np.int32(whole)


@pixel_function
def nearest_along(index, step, start, unit, length):
    """Taps of OpenCV's ``INTER_NEAREST``: one pixel, twice."""
    here = clamp(nearest_index(index, step, start), np.int32(0), np.int32(length - 1))
    return here, here, np.int32(0), np.int32(0)


@pixel_function
def nearest_blend(top_left, top_right, bottom_left, bottom_right, left_weight, right_weight, top_weight, bottom_weight):
    """The pixel itself."""
    return np.float32(top_left)


@pixel_function
def exact_weights(fraction):
    """``cv2.resize``'s integer weights, in 1/2048, of the taps on both sides of a position."""
    one = np.float32(1)
    scale = np.float32(1 << WEIGHT_BITS)
    return np.int32(rint32((one - fraction) * scale)), np.int32(rint32(fraction * scale))


@pixel_function
def exact_along_x(index, step, start, unit, length):
    """Taps of ``cv2.resize``'s uint8 linear along a line: left of the first and right of the last column that column
    counts alone."""
    x = position(index, step, start, unit)
    last = np.int32(length - 1)
    left = np.int32(math.floor(x))
    fraction = x - np.float32(left)
    if left < 0 or left >= last:
        left = clamp(left, np.int32(0), last)
        fraction = np.float32(0)
    left_weight, right_weight = exact_weights(fraction)
    return left, min(np.int32(left + 1), last), left_weight, right_weight


@pixel_function
def exact_along_y(index, step, start, unit, length):
    """Taps across lines: above the first and below the last line both are the same, but their weights stay."""
    y = position(index, step, start, unit)
    last = np.int32(length - 1)
    top = np.int32(math.floor(y))
    top_weight, bottom_weight = exact_weights(y - np.float32(top))
    bottom = clamp(np.int32(top + 1), np.int32(0), last)
    return clamp(top, np.int32(0), last), bottom, top_weight, bottom_weight


@pixel_function
def exact_blend(top_left, top_right, bottom_left, bottom_right, left_weight, right_weight, top_weight, bottom_weight):
    """Bilinear value as ``cv2.resize`` computes it for uint8: exact along the lines, truncating across them."""
    # Numba widens int32 products to int64; every one is cast back, or the kernel is a quarter slower.
    above = np.int32(np.int32(np.int32(top_left) * left_weight) + np.int32(np.int32(top_right) * right_weight))
    below = np.int32(np.int32(np.int32(bottom_left) * left_weight) + np.int32(np.int32(bottom_right) * right_weight))
    return exact_down(above, below, top_weight, bottom_weight)


@pixel_function
def exact_down(above, below, top_weight, bottom_weight):
    """The second half of :func:`exact_blend`: of the weighted sums along two lines."""
    # All terms are positive and sum to at most 255.5 * 4, so there is nothing to saturate.
    above = np.int32(np.int32(np.int32(np.int32(above >> 4) * top_weight) + (2 << 16)) >> 16)  # 2: half of the last 4
    below = np.int32(np.int32(np.int32(below >> 4) * bottom_weight) >> 16)
    return np.float32(np.int32(np.int32(above + below) >> 2))


@pixel_function
def fast_along(index, step, start, unit, length):
    """Taps in float32, for either axis; the region's border pixels continue outwards."""
    last = np.int32(length - 1)
    here = clamp(position(index, step, start, unit), np.float32(0), np.float32(last))
    first = np.int32(here)
    fraction = here - np.float32(first)
    return first, min(np.int32(first + 1), last), np.float32(1) - fraction, fraction


@pixel_function
def fast_blend(top_left, top_right, bottom_left, bottom_right, left_weight, right_weight, top_weight, bottom_weight):
    """Bilinear value in float32, not rounded. Exact where the four are equal, as weights that sum to 1 are not."""
    left = np.float32(top_left)
    above = left + (np.float32(top_right) - left) * right_weight
    left = np.float32(bottom_left)
    below = left + (np.float32(bottom_right) - left) * right_weight
    return above + (below - above) * bottom_weight
