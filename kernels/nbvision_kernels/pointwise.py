"""Operations that make each byte of an image from the bytes at the same place: arithmetic and colour.

A byte is a pixel function; the loop and the kernel around it move words and know of lines.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from nbvision_kernels.codes import (
    ADD_WEIGHTED,
    BLEND_BYTES,
    COLOR,
    LUT,
    THRESHOLD,
)
from nbvision_kernels.pixel import (
    clamp,
    compiled_apart,
    floats_from_address,
    fma32,
    pixel_function,
    pointer_from_address,
    rint32,
)

__all__ = [
    "make_byte",
    "make_pointwise_cpu",
]


@pixel_function
def rounded_byte(value):
    """Half to even, saturated."""
    return np.int32(rint32(clamp(value, np.float32(0), np.float32(255))))


@pixel_function
def luma(red, green, blue):
    """Gray as ``cv2.cvtColor`` makes it: BT.601 in 15-bit fixed point, halves up."""
    total = np.int32(np.int32(red) * np.int32(9798)) + np.int32(np.int32(green) * np.int32(19235))
    return np.int32(np.int32(total + np.int32(np.int32(blue) * np.int32(3735)) + np.int32(16384)) >> 15)


@pixel_function
def threshold_byte(value, limit, most, mode):
    """OpenCV's five kinds."""
    over = value > limit
    result = value
    if mode == 0:
        result = most if over else np.int32(0)
    elif mode == 1:
        result = np.int32(0) if over else most
    elif mode == 2:
        result = limit if over else value
    elif mode == 3:
        result = value if over else np.int32(0)
    else:
        result = np.int32(0) if over else value
    return result


def make_byte(operation, channels, out_channels):
    """``byte(pixels, floats, first, second, mask, index, n0, n1, n2)``: byte ``index`` of an output line as int32.

    ``first``, ``second`` and ``mask`` are the addresses of the inputs' lines, or ``second`` that of a table of bytes;
    the numbers are float32, and what they mean is the operation's.
    """

    @pixel_function
    def byte(pixels, floats, first, second, mask, index, n0, n1, n2):
        pixel = np.int32(index // out_channels)
        channel = np.int32(index - np.int32(pixel * out_channels))
        if operation == COLOR:  # n0: whether red and blue change places
            at = first + np.int64(np.int32(pixel * channels))
            if channels == 1:
                result = np.int32(255) if channel == 3 else np.int32(pixels[at])
            elif out_channels == 1:
                blue_first = n0 > np.float32(0)
                red = pixels[at + 2] if blue_first else pixels[at]
                blue = pixels[at] if blue_first else pixels[at + 2]
                result = luma(red, pixels[at + 1], blue)
            elif channel == 3:
                result = np.int32(pixels[at + 3]) if channels == 4 else np.int32(255)
            else:
                from_channel = np.int32(2 - channel) if n0 > np.float32(0) else channel
                result = np.int32(pixels[at + np.int64(from_channel)])
        elif operation == LUT:  # n0: columns of the table, 1 or one for each channel
            value = np.int32(pixels[first + np.int64(index)])
            columns = np.int32(n0)
            column = channel if columns > 1 else np.int32(0)
            result = np.int32(pixels[second + np.int64(np.int32(value * columns) + column)])
        elif operation == THRESHOLD:  # limit, the value above it, the mode
            result = threshold_byte(np.int32(pixels[first + np.int64(index)]), np.int32(n0), np.int32(n1), np.int32(n2))
        else:
            one = np.float32(pixels[first + np.int64(index)])
            other = np.float32(pixels[second + np.int64(index)])
            if operation == ADD_WEIGHTED:  # OpenCV's vector code: alpha, beta, gamma, each product fused with its sum
                result = rounded_byte(fma32(one, n0, fma32(other, n1, n2)))
            else:
                if operation == BLEND_BYTES:
                    share = np.float32(pixels[mask + np.int64(pixel)]) / np.float32(255)
                else:
                    share = floats[(mask >> 2) + np.int64(pixel)]
                    share = min(share, np.float32(1)) if share > np.float32(0) else np.float32(0)  # so is NaN
                result = rounded_byte(other + (one - other) * share)
        return result

    return byte


def make_pointwise_cpu(operation, channels, out_channels):
    """The operation as a parallel CPU loop over lines. Rows of the tables are address, pitch, height, width; a table of
    no meaning for the operation is that of the first images."""
    byte = make_byte(operation, channels, out_channels)

    @compiled_apart
    def write_line(base, firsts, seconds, masks, targets, row, y, n0, n1, n2):
        pixels = pointer_from_address(base)
        floats = floats_from_address(base)
        first = firsts[row] + y * firsts[row + 1]
        second = seconds[row] + y * seconds[row + 1]
        mask = masks[row] + y * masks[row + 1]
        target = targets[row] + y * targets[row + 1]
        for index in range(np.int32(targets[row + 3] * out_channels)):
            value = byte(pixels, floats, first, second, mask, np.int32(index), n0, n1, n2)
            pixels[target + index] = np.uint8(value)

    def loop(base, firsts, seconds, masks, targets, images, height, n0, n1, n2):
        for job in prange(images * height):
            image = job // height
            y = job - image * height
            if y < targets[image * 4 + 2]:
                write_line(base, firsts, seconds, masks, targets, image * 4, y, n0, n1, n2)

    return loop
