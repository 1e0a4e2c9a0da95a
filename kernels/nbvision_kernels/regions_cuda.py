"""Regions of boxes that live on the device: one thread a box."""

from __future__ import annotations

from numba import cuda

from nbvision_kernels.regions import write_box_region

__all__ = ["fill_box_regions"]


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
