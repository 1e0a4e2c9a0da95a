"""Regions made on the device: one thread an image, or a box that lives there."""

from __future__ import annotations

import numpy as np
from numba import cuda

from nbvision_kernels.regions import write_box_region, write_region

__all__ = ["fill_box_regions", "fill_image_regions"]


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
        write_region(
            regions,
            steps,
            scales,
            image,
            image,
            0,
            0,
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
    """One region per box; see :func:`nbvision_kernels.regions.write_box_region`."""
    index = cuda.grid(1)
    if index < count:
        write_box_region(
            regions,
            steps,
            scales,
            index,
            sources,
            images,
            boxes,
            margin,
            out_height,
            out_width,
            fit,
            cover_height,
            cover_width,
            scaleup,
            center,
            linear,
        )
