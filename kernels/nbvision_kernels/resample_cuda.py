"""Tap tables on the device: one thread an entry. The frames that read them are ``resample.cu`` and ``window.cu``."""

from __future__ import annotations

import numpy as np
from numba import cuda

from nbvision_kernels.codes import HEADER
from nbvision_kernels.resample import pack_taps, write_taps_of
from nbvision_kernels.window import write_window_of

__all__ = ["fill_taps", "fill_windows"]


def fill_taps(table, regions, canvas_length, limit, vertical, kind):
    """The tap tables of one axis, packed. Grid: columns or lines of a canvas, canvases."""
    across = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if across < canvas_length:
        write_taps_of(table, regions, cuda.blockIdx.y, across, canvas_length, limit, vertical, kind)
        entry = (np.int64(cuda.blockIdx.y) * np.int64(canvas_length) + np.int64(across)) * np.int64(limit + HEADER)
        pack_taps(table, entry, limit)


def fill_windows(table, regions, canvas_length, limit, vertical, kind):
    """The tap tables of one axis of the window family. Grid: columns or lines of a canvas, canvases."""
    across = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if across < canvas_length:
        write_window_of(table, regions, cuda.blockIdx.y, across, canvas_length, limit, vertical, kind)
