"""Warps, flips and quarter turns on the GPU.

A block makes a tile of 32 columns.  Its threads compute a pixel each and put it into shared memory as 32 bits; then
every line of the tile leaves in whole words, as many as its bytes fill.  Byte stores would take the memory three
times as many transactions.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from nbvision_kernels.codes import COEFFICIENTS, MOVE_LINES, WARP_LINES
from nbvision_kernels.codes import WARP_TILE as TILE
from nbvision_kernels.pixel import pixel_function
from nbvision_kernels.warp import SAMPLERS, moved_from, warp_position, write_coefficients

__all__ = ["make_move", "make_warp", "warp_coefficients"]

_PITCH = TILE + 1  # of a tile in shared memory, so that a column lies in 32 banks
_WARP_TILE, _MOVE_TILE = _PITCH * WARP_LINES, _PITCH * TILE


def warp_coefficients(matrices, count, lines, inverse, coefficients):
    """One thread a matrix; see :func:`nbvision_kernels.warp.write_coefficients`."""
    row = cuda.grid(1)
    if row < count:
        write_coefficients(matrices, row, lines, inverse, coefficients)


@pixel_function
def store_line(pixels, words, target, tile, at, lane, columns, channels):
    """Write a line of ``columns`` packed pixels, ``tile[at]`` and on, to address ``target``; 32 threads do it."""
    if columns == TILE and target & np.int64(3) == 0:
        if lane < 8 * channels:
            word = np.uint32(0)
            for index in range(4):
                byte = np.int32(4 * lane + index)
                column = np.int32(byte // channels)
                shift = np.uint32(8 * (byte - column * channels))
                value = np.uint32((tile[at + column] >> shift) & np.uint32(255))
                word = np.uint32(word | np.uint32(value << np.uint32(8 * index)))
            words[(target >> np.int64(2)) + np.int64(lane)] = word
    elif lane < columns:
        packed = tile[at + lane]
        for channel in range(channels):
            value = np.uint32((packed >> np.uint32(8 * channel)) & np.uint32(255))
            pixels[target + np.int64(lane * channels + channel)] = np.uint8(value)


def make_warp(interpolation, channels):
    """The kernel of one interpolation and number of channels. Blocks are of TILE x WARP_LINES threads, one a pixel."""
    sample = SAMPLERS[interpolation]

    def warp(pixels, words, sources, targets, coefficients, perspective, border, fill):
        image = np.int64(cuda.blockIdx.z)
        out_height = np.int32(targets[image * 4 + 2])
        out_width = np.int32(targets[image * 4 + 3])
        first_x = np.int32(cuda.blockIdx.x * TILE)
        first_y = np.int32(cuda.blockIdx.y * WARP_LINES)
        if first_x >= out_width or first_y >= out_height:
            return  # the whole block
        lane = np.int32(cuda.threadIdx.x)
        line = np.int32(cuda.threadIdx.y)
        x = np.int32(first_x + lane)
        y = np.int32(first_y + line)
        packed = np.uint32(fill)
        if x < out_width and y < out_height:
            at = image * np.int64(COEFFICIENTS)
            source_x, source_y = warp_position(coefficients, at, x, y, perspective)
            if source_x == source_x:
                base, pitch = sources[image * 4], sources[image * 4 + 1]
                height, width = np.int32(sources[image * 4 + 2]), np.int32(sources[image * 4 + 3])
                packed = sample(pixels, words, base, pitch, height, width, channels, source_x, source_y, border, fill)
        tile = cuda.shared.array(_WARP_TILE, types.uint32)
        at_line = np.int32(line * _PITCH)
        tile[at_line + lane] = packed
        cuda.syncthreads()
        if y < out_height:
            target = targets[image * 4] + np.int64(y) * targets[image * 4 + 1] + np.int64(first_x * channels)
            columns = np.int32(min(out_width - first_x, TILE))
            store_line(pixels, words, target, tile, at_line, lane, columns, channels)

    return warp


def make_move(channels):
    """The kernel that flips and turns pixels of ``channels`` bytes. Blocks are of TILE x MOVE_LINES threads; a block
    moves a square tile, whose lines are read and written in order even if it is transposed."""

    def move(pixels, words, sources, targets, transpose, mirror_x, mirror_y):
        image = np.int64(cuda.blockIdx.z)
        height = np.int32(sources[image * 4 + 2])
        width = np.int32(sources[image * 4 + 3])
        out_height = np.int32(targets[image * 4 + 2])
        out_width = np.int32(targets[image * 4 + 3])
        first_x = np.int32(cuda.blockIdx.x * TILE)
        first_y = np.int32(cuda.blockIdx.y * TILE)
        if first_x >= out_width or first_y >= out_height:
            return  # the whole block
        lane = np.int32(cuda.threadIdx.x)
        tile = cuda.shared.array(_MOVE_TILE, types.uint32)
        for line in range(cuda.threadIdx.y, TILE, MOVE_LINES):
            # Neighbouring threads read neighbours of a source line: of an output column if transposed.
            inside_x = np.int32(line) if transpose else lane
            inside_y = lane if transpose else np.int32(line)
            x = np.int32(first_x + inside_x)
            y = np.int32(first_y + inside_y)
            if x < out_width and y < out_height:
                column, source_line = moved_from(x, y, height, width, transpose, mirror_x, mirror_y)
                source = sources[image * 4] + np.int64(source_line) * sources[image * 4 + 1]
                packed = np.uint32(0)
                for channel in range(channels):
                    value = np.uint32(pixels[source + np.int64(column * channels + channel)])
                    packed = np.uint32(packed | np.uint32(value << np.uint32(8 * channel)))
                tile[inside_y * _PITCH + inside_x] = packed
        cuda.syncthreads()
        columns = np.int32(min(out_width - first_x, TILE))
        for line in range(cuda.threadIdx.y, TILE, MOVE_LINES):
            y = np.int32(first_y + line)
            if y < out_height:
                target = targets[image * 4] + np.int64(y) * targets[image * 4 + 1] + np.int64(first_x * channels)
                store_line(pixels, words, target, tile, np.int32(line * _PITCH), lane, columns, channels)

    return move
