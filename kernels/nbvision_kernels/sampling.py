"""Where an output pixel falls in the source, and the value found there.  Pixel functions only.

Positions follow pixel centres: output ``d`` falls at ``(d + 0.5) * scale - 0.5``.  OpenCV computes that in float64 and
rounds it once to float32.  :func:`exact_position` gets the same float32 from integers, because float64 is slow on
most GPUs: a 64-bit fixed-point product, rounded once by its conversion to float32.  Checked against OpenCV for all
sources up to 4096 pixels a side; beyond, outputs that are multiples of 2048 can differ by one weight in 2048.
"""

from __future__ import annotations

import math

import numpy as np

from nbvision_kernels.pixel import clamp, pixel_function, rint32

__all__ = ["exact_position", "fast_position", "linear_exact", "linear_fast", "nearest", "nearest_index"]


@pixel_function
def exact_position(index, step, start, unit):
    """Source position of output ``index`` as OpenCV rounds it: fixed point, whose last bit is worth ``unit``."""
    return np.float32(np.int64(index) * step + start) * unit


@pixel_function
def fast_position(index, scale):
    """Source position of output ``index`` in plain float32."""
    return (np.float32(index) + np.float32(0.5)) * scale - np.float32(0.5)


@pixel_function
def nearest_index(index, step, bits):
    """``floor(index * scale)`` as OpenCV's float64 gives it: a product within half a unit in the last place below an
    integer counts as that integer.

    ``step`` holds the 53 bits of the scale, ``bits`` of them behind the point (21 to 62).
    """
    low = np.int64(index) * (step & np.int64(0xFFFFFFFF))
    high = np.int64(index) * (step >> np.int64(32)) + (low >> np.int64(32))
    low = low & np.int64(0xFFFFFFFF)
    whole = high >> np.int64(bits - 32)
    fraction = ((high - (whole << np.int64(bits - 32))) << np.int64(32)) | low
    missing = (np.int64(1) << np.int64(bits)) - fraction
    if missing <= (np.int64(1) << np.int64(14)):  # rare: only then is the exact threshold worth computing
        exponent = np.int64(-1)
        rest = whole
        while rest > 0:
            exponent += 1
            rest = rest >> np.int64(1)
        if bits + exponent >= 53 and missing <= (np.int64(1) << np.int64(bits + exponent - 53)):
            whole += 1
    return np.int32(whole)


@pixel_function
def nearest(pixels, origin, pitch, pixel_bytes, channel, width, height, x, y):
    """The source value at integer position (x, y), clamped to the region."""
    column = clamp(np.int32(x), np.int32(0), np.int32(width - 1))
    row = np.int64(clamp(np.int32(y), np.int32(0), np.int32(height - 1)))
    return np.float32(pixels[origin + row * pitch + np.int64(np.int32(column * pixel_bytes)) + np.int64(channel)])


@pixel_function
def linear_exact(pixels, origin, pitch, pixel_bytes, channel, width, height, x, y):
    """Bilinear value at (x, y) as ``cv2.resize`` computes it for uint8: 11-bit weights, truncating second pass.

    Positions left of the first or right of the last column take that column; above the first or below the last row
    both rows are the same, but their weights stay, as in OpenCV.
    """
    last = np.int32(width - 1)
    left = np.int32(math.floor(x))
    weight_x = x - np.float32(left)
    if left < 0 or left >= last:
        left = clamp(left, np.int32(0), last)
        weight_x = np.float32(0)
    right = min(np.int32(left + 1), last)
    top = np.int32(math.floor(y))
    weight_y = y - np.float32(top)
    bottom = clamp(np.int32(top + 1), np.int32(0), np.int32(height - 1))
    top = clamp(top, np.int32(0), np.int32(height - 1))

    scale = np.float32(2048)
    right_weight = np.int32(rint32(weight_x * scale))
    left_weight = np.int32(rint32((np.float32(1) - weight_x) * scale))
    bottom_weight = np.int32(rint32(weight_y * scale))
    top_weight = np.int32(rint32((np.float32(1) - weight_y) * scale))

    # A row is under 2**31 bytes, so columns are 32-bit; an image may be larger, so rows are 64-bit.
    to_left = np.int64(np.int32(left * pixel_bytes))
    to_right = np.int64(np.int32(right * pixel_bytes))
    to_top = origin + np.int64(top) * pitch
    to_bottom = origin + np.int64(bottom) * pitch
    c = np.int64(channel)
    # Numba widens int32 products to int64; every one is cast back, or the kernel is a quarter slower.
    above = np.int32(
        np.int32(np.int32(pixels[to_top + to_left + c]) * left_weight)
        + np.int32(np.int32(pixels[to_top + to_right + c]) * right_weight)
    )
    below = np.int32(
        np.int32(np.int32(pixels[to_bottom + to_left + c]) * left_weight)
        + np.int32(np.int32(pixels[to_bottom + to_right + c]) * right_weight)
    )
    # All terms are positive and sum to at most 255.5 * 4, so there is nothing to saturate.
    above = np.int32(np.int32(np.int32(above >> 4) * top_weight) >> 16)
    below = np.int32(np.int32(np.int32(below >> 4) * bottom_weight) >> 16)
    return np.float32(np.int32(np.int32(above + below + 2) >> 2))


@pixel_function
def linear_fast(pixels, origin, pitch, pixel_bytes, channel, width, height, x, y):
    """Bilinear value at (x, y) in float32, not rounded; the region's border pixels continue outwards."""
    x = clamp(x, np.float32(0), np.float32(np.int32(width - 1)))
    y = clamp(y, np.float32(0), np.float32(np.int32(height - 1)))
    left = np.int32(x)
    top = np.int32(y)
    right = min(np.int32(left + 1), np.int32(width - 1))
    bottom = min(np.int32(top + 1), np.int32(height - 1))
    weight_x = x - np.float32(left)
    weight_y = y - np.float32(top)
    to_left = np.int64(np.int32(left * pixel_bytes))
    to_right = np.int64(np.int32(right * pixel_bytes))
    to_top = origin + np.int64(top) * pitch
    to_bottom = origin + np.int64(bottom) * pitch
    c = np.int64(channel)
    top_left = np.float32(pixels[to_top + to_left + c])
    bottom_left = np.float32(pixels[to_bottom + to_left + c])
    above = top_left + (np.float32(pixels[to_top + to_right + c]) - top_left) * weight_x
    below = bottom_left + (np.float32(pixels[to_bottom + to_right + c]) - bottom_left) * weight_x
    return above + (below - above) * weight_y
