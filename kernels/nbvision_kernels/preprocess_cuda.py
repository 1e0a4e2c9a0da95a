"""The fused plan as a Numba CUDA kernel over flat pointers: one output pixel a thread.

The portable version of ``preprocess.cu``, and the one that the simulator checks for out-of-range access. It takes no
chain of pixel functions, and sources of bytes only.
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from nbvision_kernels.codes import NCHW, OUT_CHANNELS, SOURCE_U8
from nbvision_kernels.preprocess import make_span_writer

__all__ = ["make_kernel"]


def make_kernel(sampler, layout, store, source_type=SOURCE_U8):
    """The kernel for one type of plan. Grid: columns, lines, canvases. The last six numbers are read for NV12 alone."""
    write_span = make_span_writer(sampler, store, source_type=source_type)
    channels = OUT_CHANNELS.get(layout, 3)

    def preprocess(
        pixels,
        sources,
        regions,
        steps,
        scales,
        out,
        height,
        width,
        pixel_bytes,
        gray,
        swap,
        gain_0,
        gain_1,
        gain_2,
        bias_0,
        bias_1,
        bias_2,
        fill_0,
        fill_1,
        fill_2,
        luma_zero,
        luma_gain,
        v_to_r,
        u_to_g,
        v_to_g,
        u_to_b,
    ):
        x = np.int32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        y = np.int32(cuda.blockIdx.y * cuda.blockDim.y + cuda.threadIdx.y)
        plane = np.int64(height) * np.int64(width)
        to_pixel, to_channel = (np.int64(1), plane) if layout == NCHW else (np.int64(channels), np.int64(1))
        if x < width and y < height:
            write_span(
                pixels,
                sources,
                regions,
                steps,
                scales,
                out,
                cuda.blockIdx.z,
                y,
                x,
                np.int32(x + 1),
                height,
                width,
                pixel_bytes,
                gray,
                swap,
                (gain_0, gain_1, gain_2),
                (bias_0, bias_1, bias_2),
                (fill_0, fill_1, fill_2),
                False,
                (np.float32(0),),
                (luma_zero, luma_gain, v_to_r, u_to_g, v_to_g, u_to_b),
                (channels * plane, to_pixel, to_channel, channels),
            )

    return preprocess
