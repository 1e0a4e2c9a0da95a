"""The fused plan through matrices: each canvas is an image warped, then shaded and stored as every plan does.

The frame is ``warp_plan.cu``; positions and values are those of ``warp.py``.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import prange

from nbvision_kernels.chain import make_shade
from nbvision_kernels.codes import COEFFICIENTS
from nbvision_kernels.pixel import compiled_apart, pixel_function, pointer_from_address, words_from_address
from nbvision_kernels.preprocess import make_store
from nbvision_kernels.warp import SAMPLERS, warp_position

__all__ = ["make_cpu_loop", "make_warp_export"]


@functools.cache
def make_warp_export(interpolation, channels):
    """The packed pixel of canvas position (x, y); ``fill`` where the matrix gives none. For C: ``coefficients`` points
    to the canvas' own."""
    sample = SAMPLERS[interpolation]

    @pixel_function
    def warp_export(pixels, words, base, pitch, height, width, coefficients, x, y, perspective, border, fill):
        packed = np.uint32(fill)
        source_x, source_y = warp_position(coefficients, np.int64(0), x, y, perspective)
        if source_x == source_x:
            packed = sample(pixels, words, base, pitch, height, width, channels, source_x, source_y, border, fill)
        return packed

    return warp_export


def make_cpu_loop(interpolation, channels, store, chain=None):
    """The plan as a parallel CPU loop over output lines."""
    sample = compiled_apart(SAMPLERS[interpolation])
    shade = make_shade(chain)
    save = make_store(store)

    @compiled_apart
    def make_line(
        job,
        base,
        sources,
        images,
        coefficients,
        out,
        items,
        height,
        width,
        swap,
        gain,
        bias,
        perspective,
        border,
        fill,
        bgr,
        numbers,
        strides,
    ):
        pixels = pointer_from_address(base)
        words = words_from_address(base)
        item = job // height
        y = np.int32(job - item * height)
        source = images[item] * 4
        start = sources[source]
        pitch = sources[source + 1]
        source_height = np.int32(sources[source + 2])
        source_width = np.int32(sources[source + 3])
        to_canvas, to_pixel, to_channel, stored = strides
        canvas = np.int64(item) * to_canvas
        for x in range(width):
            packed = np.uint32(fill)
            at = np.int64(item) * COEFFICIENTS
            source_x, source_y = warp_position(coefficients, at, np.int32(x), y, perspective)
            if source_x == source_x and source_height > 0:
                packed = np.uint32(
                    sample(
                        pixels,
                        words,
                        start,
                        pitch,
                        source_height,
                        source_width,
                        np.int32(channels),
                        source_x,
                        source_y,
                        border,
                        fill,
                    )
                )
            value_0 = np.float32(np.int32(packed & np.uint32(255)))
            value_1 = value_0
            value_2 = value_0
            if channels > 1:
                value_1 = np.float32(np.int32((packed >> np.uint32(8)) & np.uint32(255)))
                value_2 = np.float32(np.int32((packed >> np.uint32(16)) & np.uint32(255)))
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
        images,
        coefficients,
        out,
        items,
        height,
        width,
        swap,
        gain,
        bias,
        perspective,
        border,
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
                images,
                coefficients,
                out,
                items,
                height,
                width,
                swap,
                gain,
                bias,
                perspective,
                border,
                fill,
                bgr,
                numbers,
                strides,
            )

    return loop
