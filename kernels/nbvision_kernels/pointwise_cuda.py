"""The kernel of pointwise operations: a thread makes four bytes of a line, and stores them as a word where it can."""

from __future__ import annotations

import numpy as np
from numba import cuda

from nbvision_kernels.pointwise import make_byte

__all__ = ["make_pointwise"]


def make_pointwise(operation, channels, out_channels):
    """Grid: words of a line, lines (those beyond it in turns), images. ``flat``: no image has gaps between its lines,
    so each counts as one line."""
    byte = make_byte(operation, channels, out_channels)

    def pointwise(pixels, words, floats, firsts, seconds, masks, targets, flat, n0, n1, n2):
        row = np.int64(cuda.blockIdx.z) * 4
        height = np.int32(targets[row + 2])
        line_bytes = np.int32(np.int32(targets[row + 3]) * out_channels)
        lines = height
        if flat:
            line_bytes = np.int32(line_bytes * height)
            lines = np.int32(min(height, 1))
        start = np.int32(4 * np.int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x))
        if start < line_bytes:
            for y in range(cuda.blockIdx.y, lines, cuda.gridDim.y):
                line = np.int64(y)
                first = firsts[row] + line * firsts[row + 1]
                second = seconds[row] + line * seconds[row + 1]
                mask = masks[row] + line * masks[row + 1]
                target = targets[row] + line * targets[row + 1] + np.int64(start)
                packed = np.uint32(0)
                for k in range(4):
                    index = np.int32(start + k)
                    if index < line_bytes:
                        value = np.uint32(byte(pixels, floats, first, second, mask, index, n0, n1, n2))
                        packed = np.uint32(packed | np.uint32(value << np.uint32(8 * k)))
                if start + 4 <= line_bytes and target & 3 == 0:
                    words[target >> 2] = packed
                else:
                    for k in range(4):
                        if start + k < line_bytes:
                            pixels[target + k] = np.uint8(np.uint32(packed >> np.uint32(8 * k)) & np.uint32(255))

    return pointwise
