"""NV12, what video decoders give: a plane of luma, below it one of interleaved chroma pairs, each for 2 x 2 pixels.

Pixel functions to RGB, and the numbers of the matrices they take as arguments: ``(luma_zero, luma_gain, v_to_r,
u_to_g, v_to_g, u_to_b)``, in ``SHIFT`` bits fixed point or as floats.
"""

from __future__ import annotations

import functools

import numpy as np

from nbvision_kernels.codes import SHIFT
from nbvision_kernels.pixel import clamp, pixel_function

__all__ = ["exact_rgb", "fast_rgb", "make_convert_export", "make_nv12_reader"]

_HALF = np.int32(1 << (SHIFT - 1))


@pixel_function
def level(value):
    """A fixed-point value rounded down and saturated to 0..255."""
    return max(min(np.int32(value >> SHIFT), np.int32(255)), np.int32(0))  # in this order sm_90 has one instruction


@pixel_function
def exact_rgb(y, u, v, matrix):
    """Red, green and blue as ``cv2.cvtColor`` computes them, int32 of 0..255."""
    luma_zero, luma_gain, v_to_r, u_to_g, v_to_g, u_to_b = matrix
    luma = np.int32(max(np.int32(np.int32(y) - luma_zero), np.int32(0)) * luma_gain)
    # The zero of chroma and the half that rounds depend on no pixel, so they are outside the product.
    red = np.int32(np.int32(np.int32(v) * v_to_r) + np.int32(_HALF - np.int32(v_to_r * np.int32(128))))
    blue = np.int32(np.int32(np.int32(u) * u_to_b) + np.int32(_HALF - np.int32(u_to_b * np.int32(128))))
    zero = np.int32(np.int32(u_to_g * np.int32(128)) + np.int32(v_to_g * np.int32(128)))
    green = np.int32(np.int32(np.int32(np.int32(u) * u_to_g) + np.int32(_HALF - zero)) + np.int32(np.int32(v) * v_to_g))
    return level(np.int32(luma + red)), level(np.int32(luma + green)), level(np.int32(luma + blue))


@pixel_function
def fast_rgb(y, u, v, matrix):
    """Red, green and blue in float32, saturated to 0..255, not rounded."""
    luma_zero, luma_gain, v_to_r, u_to_g, v_to_g, u_to_b = matrix
    low = np.float32(0)
    high = np.float32(255)
    luma = max(y - luma_zero, low) * luma_gain
    from_u = u - np.float32(128)
    from_v = v - np.float32(128)
    red = luma + from_v * v_to_r
    green = luma + (from_u * u_to_g + from_v * v_to_g)
    blue = luma + from_u * u_to_b
    return clamp(red, low, high), clamp(green, low, high), clamp(blue, low, high)


@functools.cache
def make_convert_export(convert):
    """``convert`` for C, which knows no tuples: ``yuv[0:3]`` to ``rgb[0:3]`` by ``matrix[0:6]``."""

    @pixel_function
    def convert_export(yuv, matrix, rgb):
        numbers = (matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5])
        red, green, blue = convert(yuv[0], yuv[1], yuv[2], numbers)
        rgb[0] = red
        rgb[1] = green
        rgb[2] = blue

    return convert_export


def make_nv12_reader(blend, *, exact):
    """``read(...)``: red, green and blue where two lines and two columns cross.

    Lines are offsets of their first pixel in the picture, columns count from there.  Exact: each of the four pixels is
    converted, then blended, as ``cvtColor`` and ``resize`` one after the other do.  Else each of Y, U and V is blended
    and one pixel converted.
    """

    @pixel_function
    def read(
        pixels,
        above,
        below,
        chroma_above,
        chroma_below,
        first,
        second,
        left_weight,
        right_weight,
        top_weight,
        bottom_weight,
        matrix,
    ):
        to_first = np.int64(first)
        to_second = np.int64(second)
        chroma_first = np.int64(first & ~1)
        chroma_second = np.int64(second & ~1)
        y_0 = pixels[above + to_first]
        y_1 = pixels[above + to_second]
        y_2 = pixels[below + to_first]
        y_3 = pixels[below + to_second]
        u_0 = pixels[chroma_above + chroma_first]
        u_1 = pixels[chroma_above + chroma_second]
        u_2 = pixels[chroma_below + chroma_first]
        u_3 = pixels[chroma_below + chroma_second]
        v_0 = pixels[chroma_above + chroma_first + 1]
        v_1 = pixels[chroma_above + chroma_second + 1]
        v_2 = pixels[chroma_below + chroma_first + 1]
        v_3 = pixels[chroma_below + chroma_second + 1]
        if exact:
            red_0, green_0, blue_0 = exact_rgb(y_0, u_0, v_0, matrix)
            red_1, green_1, blue_1 = exact_rgb(y_1, u_1, v_1, matrix)
            red_2, green_2, blue_2 = exact_rgb(y_2, u_2, v_2, matrix)
            red_3, green_3, blue_3 = exact_rgb(y_3, u_3, v_3, matrix)
            red = blend(red_0, red_1, red_2, red_3, left_weight, right_weight, top_weight, bottom_weight)
            green = blend(green_0, green_1, green_2, green_3, left_weight, right_weight, top_weight, bottom_weight)
            blue = blend(blue_0, blue_1, blue_2, blue_3, left_weight, right_weight, top_weight, bottom_weight)
        else:
            y = blend(y_0, y_1, y_2, y_3, left_weight, right_weight, top_weight, bottom_weight)
            u = blend(u_0, u_1, u_2, u_3, left_weight, right_weight, top_weight, bottom_weight)
            v = blend(v_0, v_1, v_2, v_3, left_weight, right_weight, top_weight, bottom_weight)
            red, green, blue = fast_rgb(y, u, v, matrix)
        return red, green, blue

    return read
