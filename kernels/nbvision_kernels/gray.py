"""Gray of red, green and blue, as the last link of a chain.  Sums of whole numbers 0..255 are exact in float32."""

from __future__ import annotations

import numpy as np

from nbvision_kernels.chain import Link
from nbvision_kernels.pixel import pixel_function

__all__ = ["GRAY_CV2", "GRAY_PIL", "GRAY_UNROUNDED"]


@pixel_function
def rounded(value):
    """To the nearest whole number, halves up."""
    moved = value + np.float32(0.5)
    whole = np.float32(np.int32(moved))
    return whole - np.float32(1) if whole > moved else whole


@pixel_function
def luma_15_bits(r, g, b):
    """BT.601's shares of red, green and blue in 1/32768, as OpenCV rounds them."""
    return (r * np.float32(9798) + g * np.float32(19235) + b * np.float32(3735)) * np.float32(1 / 32768)


@pixel_function
def gray_cv2(r, g, b):
    """The values of ``cv2.cvtColor``."""
    gray = rounded(luma_15_bits(r, g, b))
    return gray, gray, gray


@pixel_function
def gray_pil(r, g, b):
    """The values of Pillow's ``convert("L")``, which has the shares in 1/65536."""
    luma = (r * np.float32(19595) + g * np.float32(38470) + b * np.float32(7471)) * np.float32(1 / 65536)
    gray = rounded(luma)
    return gray, gray, gray


@pixel_function
def gray_unrounded(r, g, b):
    """Of values that are no whole numbers."""
    gray = luma_15_bits(r, g, b)
    return gray, gray, gray


GRAY_CV2 = Link("gray_cv2", gray_cv2, wants_position=False, number_count=0)
GRAY_PIL = Link("gray_pil", gray_pil, wants_position=False, number_count=0)
GRAY_UNROUNDED = Link("gray", gray_unrounded, wants_position=False, number_count=0)
