"""Instance masks on the GPU: the table by one block, pixels by blocks that share a tile of combined prototypes."""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from nbvision_kernels.codes import TABLE_THREADS, TILE_CELLS
from nbvision_kernels.instances import (
    HEIGHT,
    LEFT,
    OFFSET,
    ROW,
    TOP,
    WIDTH,
    cell_logit,
    dense_pixel,
    mix,
    prototype_position,
    write_extent,
    write_offset,
)

__all__ = ["dense_masks", "instance_masks", "mask_table"]

_TILE_AREA = TILE_CELLS * TILE_CELLS


def mask_table(boxes, images, image_count, scales, in_source, masks, height, width, capacity, table, needed):
    """Every mask's row, and the bytes that all need. One block of ``TABLE_THREADS``: each thread sums a run of masks,
    then the sums of the runs before it are where it starts."""
    thread = np.int32(cuda.threadIdx.x)
    run = np.int32((masks + TABLE_THREADS - 1) // TABLE_THREADS)
    first = np.int32(min(thread * run, masks))
    last = np.int32(min(first + run, masks))
    sums = cuda.shared.array(TABLE_THREADS, types.int64)
    mine = np.int64(0)
    for mask in range(first, last):
        mine += write_extent(boxes, images, image_count, scales, in_source, mask, height, width, table)
    sums[thread] = mine
    cuda.syncthreads()
    start = np.int64(0)
    for before in range(thread):
        start += sums[before]
    if thread == TABLE_THREADS - 1:
        needed[0] = start + mine
    for mask in range(first, last):
        row = np.int64(mask) * ROW
        size = table[row + HEIGHT] * table[row + WIDTH]
        write_offset(table, mask, start, capacity)
        start += size


def instance_masks(
    coefficients,
    prototypes,
    images,
    table,
    masks,
    channels,
    rows,
    columns,
    height,
    width,
    threshold,
    tile_height,
    tile_width,
    pixels,
):
    """Tiles ``blockIdx.x``, and further by the grid's stride, of mask ``blockIdx.y``, likewise. A tile of the canvas
    must fall on at most ``TILE_CELLS`` prototype cells each way."""
    thread = np.int32(cuda.threadIdx.x)
    threads = np.int32(cuda.blockDim.x)
    plane = np.int64(rows) * np.int64(columns)
    cells = cuda.shared.array(_TILE_AREA, types.float32)
    mask = np.int32(cuda.blockIdx.y)
    while mask < masks:
        row = np.int64(mask) * ROW
        mask_height = np.int32(table[row + HEIGHT])
        mask_width = np.int32(table[row + WIDTH])
        offset = table[row + OFFSET]
        tiles_across = np.int32((mask_width + tile_width - 1) // tile_width)
        tiles = np.int32(tiles_across * ((mask_height + tile_height - 1) // tile_height))
        tile = np.int32(cuda.blockIdx.x)
        while tile < tiles:
            tile_row = np.int32(tile // tiles_across)
            y_in_mask = np.int32(tile_row * tile_height)
            x_in_mask = np.int32((tile - np.int32(tile_row * tiles_across)) * tile_width)
            rows_here = np.int32(min(tile_height, mask_height - y_in_mask))
            columns_here = np.int32(min(tile_width, mask_width - x_in_mask))
            top = np.int32(table[row + TOP] + y_in_mask)
            left = np.int32(table[row + LEFT] + x_in_mask)
            first_x = np.int32(prototype_position(left, columns, width))
            first_y = np.int32(prototype_position(top, rows, height))
            cell = thread
            while cell < _TILE_AREA:
                cell_y = np.int32(first_y + cell // TILE_CELLS)
                cell_x = np.int32(first_x + cell % TILE_CELLS)
                if cell_y < rows and cell_x < columns:
                    at = np.int64(cell_y) * np.int64(columns) + np.int64(cell_x)
                    cells[cell] = cell_logit(
                        coefficients, prototypes, mask, images[mask], np.int64(channels), plane, at
                    )
                cell += threads
            cuda.syncthreads()
            pixel = thread
            while pixel < rows_here * columns_here:
                y = np.int32(pixel // columns_here)
                x = np.int32(pixel - np.int32(y * columns_here))
                position_y = prototype_position(np.int32(top + y), rows, height)
                position_x = prototype_position(np.int32(left + x), columns, width)
                cell_y = np.int32(position_y)
                cell_x = np.int32(position_x)
                share_y = position_y - np.float32(cell_y)
                share_x = position_x - np.float32(cell_x)
                upper = np.int32((cell_y - first_y) * TILE_CELLS)
                lower = np.int32((min(np.int32(cell_y + 1), np.int32(rows - 1)) - first_y) * TILE_CELLS)
                a = np.int32(cell_x - first_x)
                b = np.int32(min(np.int32(cell_x + 1), np.int32(columns - 1)) - first_x)
                above = mix(cells[upper + a], cells[upper + b], share_x)
                below = mix(cells[lower + a], cells[lower + b], share_x)
                inside = mix(above, below, share_y) > threshold
                to = offset + np.int64(y_in_mask + y) * np.int64(mask_width) + np.int64(x_in_mask + x)
                pixels[to] = np.uint8(1) if inside else np.uint8(0)
                pixel = np.int32(pixel + threads)
            cuda.syncthreads()
            tile = np.int32(tile + cuda.gridDim.x)
        mask = np.int32(mask + cuda.gridDim.y)


def dense_masks(pixels, table, masks, height, width, out):
    """Canvas pixel ``blockIdx.x * blockDim.x + threadIdx.x`` of mask ``blockIdx.y``, and further masks by stride."""
    pixel = np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)
    plane = np.int64(height) * np.int64(width)
    mask = np.int64(cuda.blockIdx.y)
    while pixel < plane and mask < masks:
        y = pixel // np.int64(width)
        out[mask * plane + pixel] = dense_pixel(pixels, table, mask, y, pixel - y * np.int64(width))
        mask += np.int64(cuda.gridDim.y)
