"""Pixel functions that come along, under torchvision's names and with its formulas, for ``Preprocess(pixel=...)``.

Values are 0..255 and are not rounded in between. Bind other numbers: ``adjust.brightness.bind(factor=1.2)``.
"""

from __future__ import annotations

import math

from nbvision.ops.pixel import pixel

RGB = tuple[float, float, float]

__all__ = [
    "brightness",
    "contrast",
    "gamma",
    "grayscale",
    "hue",
    "invert",
    "saturation",
    "to_hsv",
    "to_ycbcr",
]


def _limited(value: float) -> float:
    return min(max(value, 0.0), 255.0)


def _luma(r: float, g: float, b: float) -> float:
    """ITU-R BT.601, with torchvision's four digits."""
    return r * 0.2989 + g * 0.587 + b * 0.114


@pixel
def brightness(r: float, g: float, b: float, factor: float = 1.0) -> RGB:
    """Every channel times ``factor``: 0 is black."""
    return _limited(r * factor), _limited(g * factor), _limited(b * factor)


@pixel
def contrast(r: float, g: float, b: float, factor: float = 1.0, center: float = 127.5) -> RGB:
    """Distances to ``center`` times ``factor``. torchvision's center is the mean luma of the image, which no function
    of one pixel knows: bind it."""
    rest = center * (1.0 - factor)
    return _limited(r * factor + rest), _limited(g * factor + rest), _limited(b * factor + rest)


@pixel
def saturation(r: float, g: float, b: float, factor: float = 1.0) -> RGB:
    """Distances to the pixel's luma times ``factor``: 0 is gray."""
    rest = _luma(r, g, b) * (1.0 - factor)
    return _limited(r * factor + rest), _limited(g * factor + rest), _limited(b * factor + rest)


def _turn(r: float, g: float, b: float) -> float:
    """The hue in sixths of a turn, -1 to 5: how far the pixel is past red, green or blue, whichever is the highest."""
    high = max(r, max(g, b))
    spread = max(high - min(r, min(g, b)), 1e-6)
    if high == r:
        angle = (g - b) / spread
    elif high == g:
        angle = (b - r) / spread + 2.0
    else:
        angle = (r - g) / spread + 4.0
    return angle


@pixel
def hue(r: float, g: float, b: float, shift: float = 0.0) -> RGB:
    """The hue moved by ``shift`` turns of the colour circle, -0.5 to 0.5."""
    low = min(r, min(g, b))
    spread = max(r, max(g, b)) - low
    # Not with math.floor, whose integers Numba's CPU target computes with in float64.
    angle = _turn(r, g, b) + shift * 6.0
    if angle < 0.0:
        angle = angle + 6.0
    if angle >= 6.0:
        angle = angle - 6.0
    # Each channel is a trapezoid over the circle, between the pixel's lowest and highest value.
    red = min(max(abs(angle - 3.0) - 1.0, 0.0), 1.0)
    green = min(max(2.0 - abs(angle - 2.0), 0.0), 1.0)
    blue = min(max(2.0 - abs(angle - 4.0), 0.0), 1.0)
    return low + red * spread, low + green * spread, low + blue * spread


@pixel
def gamma(r: float, g: float, b: float, gamma: float = 1.0, gain: float = 1.0) -> RGB:
    """``gain * value ** gamma``, of values 0..1: gamma above 1 makes shadows darker."""
    scale = 255.0 * gain
    red = math.pow(max(r, 0.0) * (1.0 / 255.0), gamma) * scale
    green = math.pow(max(g, 0.0) * (1.0 / 255.0), gamma) * scale
    blue = math.pow(max(b, 0.0) * (1.0 / 255.0), gamma) * scale
    return _limited(red), _limited(green), _limited(blue)


@pixel
def grayscale(r: float, g: float, b: float) -> RGB:
    """The luma in all three channels."""
    luma = _luma(r, g, b)
    return luma, luma, luma


@pixel
def invert(r: float, g: float, b: float) -> RGB:
    """The negative: 255 less the value."""
    return 255.0 - r, 255.0 - g, 255.0 - b


@pixel
def to_hsv(r: float, g: float, b: float) -> RGB:
    """Hue, saturation and value, each 0..255, which is Pillow's scale, in place of red, green and blue."""
    high = max(r, max(g, b))
    spread = high - min(r, min(g, b))
    turn = _turn(r, g, b) * (1.0 / 6.0)
    if turn < 0.0:
        turn = turn + 1.0
    return turn * 255.0, spread / max(high, 1e-6) * 255.0, high


@pixel
def to_ycbcr(r: float, g: float, b: float) -> RGB:
    """JPEG's luma and chroma (ITU-R BT.601, full range), each 0..255, in place of red, green and blue."""
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    return luma, (b - luma) * (0.5 / 0.886) + 128.0, (r - luma) * (0.5 / 0.701) + 128.0
