"""Regions made on the device: one thread an image, or a box that lives there."""

from __future__ import annotations

import numpy as np
from numba import cuda

from nbvision_kernels.catalog import WRITE_REGION, WRITE_REGION_ARGUMENTS
from nbvision_kernels.pixel import numba_type
from nbvision_kernels.regions import region_of_box, write_region

__all__ = ["fill_box_regions", "fill_image_regions"]

# A function of its own, linked into both kernels: inlined by Numba it would take twice as long to compile, and in each.
_linked_write_region = cuda.declare_device(
    WRITE_REGION, numba_type("void")(*map(numba_type, WRITE_REGION_ARGUMENTS)), abi="c"
)
_write_region = _linked_write_region or write_region  # the simulator declares nothing


def fill_image_regions(
    sources,
    count,
    regions,
    steps,
    scales,
    out_height,
    out_width,
    fit,
    cover_height,
    cover_width,
    scaleup,
    center,
    linear,
):
    """One whole-image region per source."""
    index = cuda.grid(1)
    if index < count:
        image = np.int64(index)
        _write_region(
            regions,
            steps,
            scales,
            image,
            image,
            np.int64(0),
            np.int64(0),
            sources[image * 4 + 3],
            sources[image * 4 + 2],
            out_height,
            out_width,
            fit,
            cover_height,
            cover_width,
            scaleup,
            center,
            linear,
        )


def fill_box_regions(
    sources,
    images,
    boxes,
    count,
    margin,
    regions,
    steps,
    scales,
    out_height,
    out_width,
    fit,
    cover_height,
    cover_width,
    scaleup,
    center,
    linear,
):
    """One region per box; see :func:`nbvision_kernels.regions.region_of_box`."""
    index = cuda.grid(1)
    if index < count:
        image, x, y, width, height = region_of_box(sources, images, boxes, index, margin)
        _write_region(
            regions,
            steps,
            scales,
            np.int64(index),
            image,
            x,
            y,
            width,
            height,
            out_height,
            out_width,
            fit,
            cover_height,
            cover_width,
            scaleup,
            center,
            linear,
        )
