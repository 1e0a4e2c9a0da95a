"""Regions made on the device: one thread an image, or a box that lives there."""

from __future__ import annotations

import numpy as np
from numba import cuda

from nbvision_kernels.catalog import WRITE_REGION, WRITE_REGION_ARGUMENTS
from nbvision_kernels.pixel import linked_function
from nbvision_kernels.regions import region_of_box, write_region

__all__ = ["fill_box_regions", "fill_image_regions"]

_write_region = linked_function(WRITE_REGION, write_region, WRITE_REGION_ARGUMENTS)


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
