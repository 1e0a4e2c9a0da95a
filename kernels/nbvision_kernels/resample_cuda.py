"""Tap tables on the device: one thread an entry. The frames that read them are ``resample.cu`` and ``window.cu``."""

from __future__ import annotations

import numpy as np
from numba import cuda

from nbvision_kernels.catalog import PACK_TAPS, PACK_TAPS_ARGUMENTS, WRITE_TAPS, WRITE_TAPS_ARGUMENTS, WRITE_WINDOW
from nbvision_kernels.codes import HEADER
from nbvision_kernels.pixel import linked_function
from nbvision_kernels.resample import pack_taps, write_taps
from nbvision_kernels.window import write_window

__all__ = ["fill_taps", "fill_windows"]

_pack_taps = linked_function(PACK_TAPS, pack_taps, PACK_TAPS_ARGUMENTS)
_write_taps = linked_function(WRITE_TAPS, write_taps, WRITE_TAPS_ARGUMENTS)
_write_window = linked_function(WRITE_WINDOW, write_window, WRITE_TAPS_ARGUMENTS)


def fill_taps(table, regions, canvas_length, limit, vertical, kind):
    """The tap tables of one axis, packed. Grid: columns or lines of a canvas, canvases."""
    across = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    item = cuda.blockIdx.y
    if across < canvas_length:
        _write_taps(table, regions, item, across, canvas_length, limit, vertical, kind)
        entry = (np.int64(item) * np.int64(canvas_length) + np.int64(across)) * np.int64(limit + HEADER)
        _pack_taps(table, entry, limit)


def fill_windows(table, regions, canvas_length, limit, vertical, kind):
    """The tap tables of one axis of the window family. Grid: columns or lines of a canvas, canvases."""
    across = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if across < canvas_length:
        _write_window(table, regions, cuda.blockIdx.y, across, canvas_length, limit, vertical, kind)
