"""Runs the kernels of :mod:`nbvision_kernels.pointwise` over batches, one launch for all images."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from nbvision.image import ImageBatch, address_of
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import array_module

__all__ = ["run_pointwise"]

_MAX_GRID = 65535
_MOST_BYTES = 2**31 - 1  # of a line that the kernel counts in 32 bits


def run_pointwise(
    operation: int,
    batch: ImageBatch,
    target: ImageBatch,
    *numbers: float,
    second: ImageBatch | None = None,
    table: Any = None,
    mask: ImageBatch | None = None,
) -> None:
    """Write ``target``, whose images have the sizes of ``batch``, on CuPy's current stream.

    ``second`` and ``mask`` have those sizes, too; ``table`` is an array of bytes in place of ``second``. ``numbers``,
    up to three, are what the operation takes them for.
    """
    height, width = target.sizes.max(axis=0, initial=0).tolist()
    if not height:
        return
    given = [batch, target, *(images for images in (second, mask) if images is not None)]
    channels = (batch.channels, target.channels)
    values = [np.float32(number) for number in (*numbers, 0, 0, 0)[:3]]
    seconds = (batch if second is None else second).table
    if table is not None:
        seconds = array_module(batch.device).zeros_like(seconds)
        seconds[:, 0] = address_of(table)
    tables = (batch.table, seconds, (batch if mask is None else mask).table, target.table)
    if batch.device == "cpu":
        flat_tables = (rows.reshape(-1) for rows in tables)
        _loop(operation, *channels)(np.int64(0), *flat_tables, len(batch), height, *values)
        return
    from nbvision_kernels.catalog import pointwise_kernel
    from nbvision_kernels.codes import POINTWISE_BLOCK

    for images in given:
        images.use_on_current_stream()
    most = int(target.sizes.astype(np.int64).prod(axis=1).max()) * target.channels
    flat = most <= _MOST_BYTES and all(images.dense for images in given)
    line_bytes, lines = (most, 1) if flat else (width * target.channels, height)
    kernel = load_kernel(pointwise_kernel(operation, *channels), target.table.device.id)
    for first in range(0, len(batch), _MAX_GRID):
        part = slice(first, first + _MAX_GRID)
        grid = (-(-line_bytes // (4 * POINTWISE_BLOCK)), min(lines, _MAX_GRID), len(batch.sizes[part]))
        kernel(grid, (POINTWISE_BLOCK,), (0, 0, 0, *(rows[part] for rows in tables), np.int32(flat), *values))


@functools.cache
def _loop(operation: int, channels: int, out_channels: int) -> Any:
    from nbvision_kernels.pointwise import make_pointwise_cpu

    name = f"pointwise-{operation}-{channels}-{out_channels}"
    return cpu_loop(name, make_pointwise_cpu(operation, channels, out_channels))
