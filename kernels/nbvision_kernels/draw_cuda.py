"""Drawing on the GPU: one thread a detection lays out, one thread a pixel paints.

A block paints a tile. Its threads first find, each for one detection, which of them touch the tile; a tile far from
every detection only copies.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, types

from nbvision_kernels.codes import DRAW_FIELDS as FIELDS
from nbvision_kernels.codes import DRAW_TILE_HEIGHT as TILE_HEIGHT
from nbvision_kernels.codes import DRAW_TILE_WIDTH as TILE_WIDTH
from nbvision_kernels.draw import BAR, BOX, COLOR, REGION, coverage, paint_pixel, touches, write_record

__all__ = ["lay_out", "paint"]

_WORD_BITS = 32
_WORDS = TILE_WIDTH * TILE_HEIGHT // _WORD_BITS


def lay_out(
    count,
    sources,
    images,
    image_count,
    boxes,
    regions,
    labels,
    scores,
    with_scores,
    names,
    strips,
    text_height,
    padding,
    colors,
    records,
):
    """The records of all detections; see :func:`nbvision_kernels.draw.write_record`."""
    row = cuda.grid(1)
    if row < count:
        write_record(
            records,
            row,
            sources,
            images,
            image_count,
            boxes,
            regions,
            labels,
            scores,
            with_scores,
            names,
            strips,
            text_height,
            padding,
            colors,
        )


def paint(
    pixels,
    sources,
    targets,
    channels,
    rows,
    starts,
    counts,
    records,
    palette,
    thickness,
    masks,
    mask_height,
    mask_width,
    threshold,
    opacity,
    atlas,
    strips,
    text_height,
    padding,
):
    """Copy image ``blockIdx.z`` and draw its detections on it. Blocks are of TILE_WIDTH x TILE_HEIGHT threads."""
    image = np.int64(cuda.blockIdx.z)
    height = np.int32(sources[image * 4 + 2])
    width = np.int32(sources[image * 4 + 3])
    tile_left = np.int32(cuda.blockIdx.x * TILE_WIDTH)
    tile_top = np.int32(cuda.blockIdx.y * TILE_HEIGHT)
    if tile_left >= width or tile_top >= height:
        return  # the whole block
    thread = np.int32(cuda.threadIdx.y * TILE_WIDTH + cuda.threadIdx.x)
    tile_right = np.int32(min(tile_left + TILE_WIDTH, width))
    tile_bottom = np.int32(min(tile_top + TILE_HEIGHT, height))
    x = np.int32(tile_left + cuda.threadIdx.x)
    y = np.int32(tile_top + cuda.threadIdx.y)
    inside = x < width and y < height
    source = sources[image * 4] + np.int64(y) * sources[image * 4 + 1] + np.int64(x) * np.int64(channels)
    target = targets[image * 4] + np.int64(y) * targets[image * 4 + 1] + np.int64(x) * np.int64(channels)
    if inside and source != target:
        for channel in range(channels):
            pixels[target + channel] = pixels[source + channel]

    # One bit per detection of a group that touches the tile; bits are set in any order and read in one.
    found = cuda.shared.array(_WORDS, types.uint32)
    start = np.int64(starts[image])
    count = np.int32(counts[image])
    first = np.int32(0)
    while first < count:
        if thread < _WORDS:
            found[thread] = np.uint32(0)
        cuda.syncthreads()
        rank = np.int32(first + thread)
        if rank < count:
            at = np.int64(rows[start + np.int64(count - 1 - rank)]) * np.int64(FIELDS)
            hollow = (
                tile_left >= records[at + BOX] + thickness
                and tile_top >= records[at + BOX + 1] + thickness
                and tile_right <= records[at + BOX + 2] - thickness
                and tile_bottom <= records[at + BOX + 3] - thickness
            )
            near = touches(records, at + BAR, tile_left, tile_top, tile_right, tile_bottom)
            if not hollow:
                near = near or touches(records, at + BOX, tile_left, tile_top, tile_right, tile_bottom)
            if mask_height > 0:
                near = near or touches(records, at + REGION, tile_left, tile_top, tile_right, tile_bottom)
            if near:
                cuda.atomic.or_(found, thread // _WORD_BITS, np.uint32(np.uint32(1) << np.uint32(thread % _WORD_BITS)))
        cuda.syncthreads()
        if inside:
            for word in range(_WORDS):
                bits = found[word]
                while bits != 0:
                    bit = np.int32(cuda.ffs(bits) - 1)
                    bits = np.uint32(bits & np.uint32(bits - np.uint32(1)))
                    rank = np.int32(first + word * _WORD_BITS + bit)
                    row = rows[start + np.int64(count - 1 - rank)]
                    cover = coverage(
                        records,
                        row,
                        x,
                        y,
                        thickness,
                        masks,
                        mask_height,
                        mask_width,
                        threshold,
                        opacity,
                        atlas,
                        strips,
                        text_height,
                        padding,
                    )
                    if cover > 0:
                        color = records[np.int64(row) * np.int64(FIELDS) + np.int64(COLOR)]
                        paint_pixel(pixels, target, channels, palette, color, cover)
        cuda.syncthreads()
        first = np.int32(first + TILE_WIDTH * TILE_HEIGHT)
