"""Draws the demo's pictures: made-up garments, composed onto real photographs, with exact boxes and masks.

The demo needs a shop, and a shop's photographs are somebody's property; so it draws its own. A `Product` is one
article of the shop. Its look (cut, colours, fabric) follows from its seed alone, so the same product can be
"photographed" many times: `draw_scene` poses it anew each time, drapes and lights it, and lays it on a photograph.

A product is drawn in two steps:

1. a flat picture of the article, its *sprite*, drawn once and kept: the cut gives polygons in free units, the fabric
   gives a texture, and both meet in an RGBA image of about 256 pixels;
2. per photograph, the sprite goes through a perspective warp, gets folds and a shadow, and is blended in.

Only NumPy and Pillow are needed, and a 480 x 640 scene takes about 10 ms on one core.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

__all__ = ["CLASSES", "Product", "Scene", "backgrounds", "draw_scene", "make_products"]

CLASSES: tuple[str, ...] = ("t-shirt", "dress", "trousers", "skirt", "bag", "shoe")

_SPRITE = 256  # pixels on the longer side of a sprite
_SUPERSAMPLE = 2  # sprites are drawn this much larger and then averaged, which antialiases their edges
_MAX_COVERED = 0.15  # of a garment's area; a placement that hides more of another garment is dropped
_PLACEMENT_TRIES = 25
_SEEDS_PER_SET = 1_000_000  # products of one `make_products` seed; the next seed's follow after these

Rng = np.random.Generator
Points = NDArray[np.float64]  # (N, 2), x then y
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]


# ---------------------------------------------------------------------------------------------------------------------
# The nouns


@dataclass(frozen=True)
class Product:
    """One article of the made-up shop.

    Attributes
    ----------
    id : str
        The class name and a number, such as ``"dress-0042"``; unique among all products.
    class_index : int
        Index into `CLASSES`.
    seed : int
        Determines the whole appearance.
    """

    id: str
    class_index: int
    seed: int


@dataclass(frozen=True)
class Scene:
    """A photograph of M garments, and the truth about it.

    Attributes
    ----------
    image : ndarray of uint8, (H, W, 3)
        RGB.
    boxes : ndarray of float32, (M, 4)
        x1, y1, x2, y2 in pixels, half-open: the tight boxes of `masks`.
    class_indices : ndarray of int64, (M,)
        Indices into `CLASSES`.
    product_ids : tuple of str
        M product ids.
    masks : ndarray of bool, (M, H, W)
        The visible pixels of each garment.
    """

    image: Pixels
    boxes: Floats
    class_indices: NDArray[np.int64]
    product_ids: tuple[str, ...]
    masks: NDArray[np.bool_]


def make_products(count: int, *, seed: int) -> list[Product]:
    """Invent `count` products, spread evenly over the classes.

    Parameters
    ----------
    count : int
        How many, at most 1 000 000.
    seed : int
        Chooses the set, 0 or more. Two sets with different seeds have no product in common.

    Returns
    -------
    list of Product
    """
    if not 0 <= count <= _SEEDS_PER_SET:
        raise ValueError(f"count must lie in 0..{_SEEDS_PER_SET}, got {count}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    first = seed * _SEEDS_PER_SET
    classes = (i % len(CLASSES) for i in range(count))
    return [Product(f"{CLASSES[c]}-{first + i:04d}", c, first + i) for i, c in enumerate(classes)]


def backgrounds(split: Literal["train", "test"]) -> list[Pixels]:
    """Read the photographs of one split; no picture serves both splits (``photos/README.md`` lists the sources).

    Returns
    -------
    list of ndarray of uint8, (H, W, 3)
        RGB, each of its own size, in the order of the file names.
    """
    folder = resources.files(__package__).joinpath("photos")
    files = sorted((f for f in folder.iterdir() if f.name.startswith(f"{split}_")), key=lambda f: f.name)
    if not files:
        raise ValueError(f"no photographs for split {split!r}")
    pictures = []
    for file in files:
        with file.open("rb") as stream, Image.open(stream) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# Cuts: what shape an article has. Units are free, y points down; a cut is scaled to the sprite afterwards.

_MAIN, _SECOND, _ACCENT, _LINING = 0, 1, 2, 3  # rows of a palette


@dataclass
class _Cut:
    """The pattern pieces of one article.

    `pieces` make up the silhouette and show the fabric; `straps` (line, width, palette row) add to the silhouette in a
    plain colour; `patches` (polygon, palette row) and `stitches` (line, width, palette row) are painted on top and end
    at the silhouette's edge.
    """

    pieces: list[Points] = field(default_factory=list)
    straps: list[tuple[Points, float, int]] = field(default_factory=list)
    patches: list[tuple[Points, int]] = field(default_factory=list)
    stitches: list[tuple[Points, float, int]] = field(default_factory=list)

    def extent(self) -> tuple[Points, Points]:
        """The corners of the box around the silhouette."""
        grown = [line + side * width / 2 for line, width, _ in self.straps for side in (-1, 1)]
        points = np.concatenate(self.pieces + grown)
        return points.min(axis=0), points.max(axis=0)


def _points(*pairs: tuple[float, float]) -> Points:
    return np.array(pairs, dtype=np.float64)


def _mirror(points: Points) -> Points:
    """The same points on the other side of the axis x = 0."""
    return points * (-1.0, 1.0)


def _symmetric(*half: tuple[float, float]) -> Points:
    """A closed outline from its right half, which runs from the axis x = 0 down and back to it."""
    right = _points(*half)
    return np.concatenate([right, _mirror(right)[::-1]])


def _round_off(polygon: Points, times: int = 2) -> Points:
    """Cut the corners of a closed polygon (Chaikin): cloth has no sharp ones."""
    for _ in range(times):
        after = np.roll(polygon, -1, axis=0)
        polygon = np.stack([0.8 * polygon + 0.2 * after, 0.2 * polygon + 0.8 * after], axis=1).reshape(-1, 2)
    return polygon


def _arc(centre: tuple[float, float], radii: tuple[float, float], start: float, stop: float) -> Points:
    """A line along an ellipse; angles in degrees, 0 to the right, 90 down."""
    angles = np.radians(np.linspace(start, stop, 25))
    return np.stack([centre[0] + radii[0] * np.cos(angles), centre[1] + radii[1] * np.sin(angles)], axis=1)


def _band(y: float, half_width: float, height: float) -> Points:
    """A horizontal rectangle across the axis."""
    return _points((-half_width, y), (half_width, y), (half_width, y + height), (-half_width, y + height))


def _sleeve(rng: Rng, shoulder: tuple[float, float], length: float, width: float) -> tuple[Points, Points]:
    """The right sleeve and its cuff."""
    tilt = np.radians(rng.uniform(38, 66))
    along, across = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
    top = np.array(shoulder)
    taper = rng.uniform(0.62, 1.1)
    end, inner_end = top + length * along, top + length * along + taper * width * across
    cuff = np.stack([end, inner_end, inner_end - 0.045 * along, end - 0.045 * along])
    return np.stack([top - (0.02, 0.0), end, inner_end, top + width * 1.3 * across]), cuff


def _neckline(rng: Rng, half_width: float, depth: float) -> list[tuple[float, float]]:
    """The right half of a neckline, from the axis up to the shoulder: round, pointed or square."""
    middle: list[list[tuple[float, float]]] = [
        [(half_width * 0.45, depth * 0.92), (half_width * 0.85, depth * 0.55)],
        [],
        [(half_width * 0.8, depth)],
    ]
    return [(0.0, depth), *middle[rng.integers(3)], (half_width, 0.0)]


def _t_shirt(rng: Rng) -> _Cut:
    neck, depth = rng.uniform(0.08, 0.15), rng.uniform(0.05, 0.2)
    shoulder, chest = rng.uniform(0.23, 0.29), rng.uniform(0.2, 0.27)
    hem, bottom = chest * rng.uniform(0.88, 1.25), rng.uniform(0.55, 0.85)
    line = _neckline(rng, neck, depth)
    cut = _Cut()
    back = [(0.0, 0.025), *reversed(line[1:]), line[0]]  # the inside of the back, seen through the neckline
    body = [*line, (shoulder, 0.06), (chest, 0.28), (chest * 0.97, 0.4), (hem, bottom), (0.0, bottom + 0.02)]
    cut.pieces = [_round_off(_symmetric(*body), 1), _symmetric(*back)]
    cut.patches.append((_symmetric(*back), _LINING))

    sleeve, cuff = _sleeve(
        rng, (shoulder, 0.06), float(rng.choice([0.14, 0.2, 0.27, 0.46, 0.56])), rng.uniform(0.13, 0.18)
    )
    two_tone, cuffs = rng.random() < 0.25, rng.random() < 0.4
    for piece, edge in ((sleeve, cuff), (_mirror(sleeve), _mirror(cuff))):
        cut.pieces.append(piece)
        if two_tone:
            cut.patches.append((piece, _SECOND))
        if cuffs:
            cut.patches.append((edge, _ACCENT if two_tone else _SECOND))
        cut.stitches.append((piece[[0, 3]], 0.006, _LINING))  # the armhole seam
    if rng.random() < 0.6:  # a knitted rib along the neckline
        cut.stitches.append((_symmetric(*line[::-1])[: 2 * len(line)], 0.03, int(rng.integers(0, 3))))
    if rng.random() < 0.3:  # a button strip
        cut.patches.append((_band(depth, 0.022, rng.uniform(0.15, 0.7)), _SECOND))
        cut.stitches += [(_points((0, y), (0, y + 0.012)), 0.014, _ACCENT) for y in depth + np.arange(0.04, 0.5, 0.08)]
    if rng.random() < 0.25:  # a breast pocket
        x, y = rng.uniform(0.06, 0.09), rng.uniform(0.24, 0.3)
        cut.patches.append(
            (_points((x, y), (x + 0.1, y), (x + 0.1, y + 0.1), (x + 0.05, y + 0.12), (x, y + 0.1)), _SECOND)
        )
    return cut


def _dress(rng: Rng) -> _Cut:
    neck, depth = rng.uniform(0.06, 0.12), rng.uniform(0.05, 0.17)
    shoulder, chest = neck + rng.uniform(0.03, 0.09), rng.uniform(0.15, 0.19)
    waist, waist_y = chest * rng.uniform(0.66, 0.9), rng.uniform(0.33, 0.45)
    hem, bottom = rng.uniform(0.2, 0.46), rng.uniform(0.85, 1.25)
    bulge = rng.uniform(0.35, 0.75)  # how early the skirt widens: a straight cone lies at 0.5
    hip = (waist + bulge * (hem - waist), waist_y + 0.5 * (bottom - waist_y))
    line = _neckline(rng, neck, depth)
    cut = _Cut()
    body = [
        *line,
        (shoulder, 0.03),
        (chest, 0.2),
        (waist, waist_y),
        hip,
        (hem, bottom),
        (0.0, bottom + rng.uniform(-0.04, 0.06)),
    ]
    cut.pieces.append(_round_off(_symmetric(*body), 1))
    if rng.random() < 0.55:
        sleeve, cuff = _sleeve(rng, (shoulder, 0.03), float(rng.choice([0.12, 0.2, 0.42])), rng.uniform(0.1, 0.15))
        colour = int(rng.choice([_MAIN, _SECOND]))
        for piece, edge in ((sleeve, cuff), (_mirror(sleeve), _mirror(cuff))):
            cut.pieces.append(piece)
            cut.patches.append((edge, colour))
    if rng.random() < 0.55:
        cut.patches.append((_band(waist_y - 0.02, chest, rng.uniform(0.03, 0.06)), int(rng.choice([_SECOND, _ACCENT]))))
    if rng.random() < 0.35:
        cut.patches.append((_band(bottom - rng.uniform(0.06, 0.16), 0.6, 0.5), _SECOND))
    if rng.random() < 0.2:  # a bodice of another colour
        cut.patches.insert(0, (_band(-0.1, 0.6, waist_y + 0.1), _SECOND))
    folds = int(rng.integers(0, 7))
    for x in np.linspace(-0.8, 0.8, folds):
        cut.stitches.append((_points((x * waist, waist_y + 0.05), (x * hem, bottom)), 0.006, _LINING))
    return cut


def _trousers(rng: Rng) -> _Cut:
    waist, hip = rng.uniform(0.15, 0.19), rng.uniform(0.2, 0.25)
    crotch, length = rng.uniform(0.27, 0.34), float(rng.choice([0.48, 0.58, 0.8, 1.0, 1.08]))
    inner, leg = rng.uniform(0.02, 0.1), rng.uniform(0.1, 0.24)
    if length < 0.6:  # shorts: wide legs that hang straight
        inner, leg = 0.02, rng.uniform(0.2, 0.26)
    knee_y = 0.5 * (crotch + length)
    outer = inner + leg
    knee = 0.5 * min(hip, inner / 2 + 0.18) + 0.5 * outer
    cut = _Cut()
    half = [
        (0.0, 0.0),
        (waist, 0.0),
        (hip, 0.2),
        (knee, knee_y),
        (outer, length),
        (inner, length),
        (inner / 2, knee_y),
        (0.0, crotch),
    ]
    cut.pieces.append(_round_off(_symmetric(*half), 1))
    band = int(rng.choice([_MAIN, _SECOND, _LINING]))
    cut.patches.append((_band(-0.02, 0.3, rng.uniform(0.05, 0.08)), band))
    stripe, cuffs = rng.random() < 0.3, rng.random() < 0.35
    for side in (1.0, -1.0):
        turn = np.array([side, 1.0])
        edge = _points((waist, 0.04), (hip, 0.2), (knee, knee_y), (outer, length)) * turn
        if stripe:
            cut.stitches.append((edge - (0.03 * side, 0.0), rng.uniform(0.025, 0.05), _SECOND))
        if cuffs:
            cut.patches.append(
                (_points((0, length - 0.06), (0.6, length - 0.06), (0.6, 1.5), (0, 1.5)) * turn, _ACCENT)
            )
        cut.stitches.append((_points((waist * 0.55, 0.05), (hip * 0.95, 0.16)) * turn, 0.008, _LINING))
        crease = _points((hip / 2, 0.24), ((outer + inner) / 2, length)) * turn
        cut.stitches.append((crease, 0.005, _LINING))
    cut.stitches.append((_points((0.0, 0.05), (0.0, crotch)), 0.008, _LINING))
    cut.stitches.append((_points((0.0, 0.02), (0.0, 0.035)), 0.022, _ACCENT))  # the button
    return cut


def _skirt(rng: Rng) -> _Cut:
    waist, length = rng.uniform(0.17, 0.24), rng.uniform(0.38, 0.85)
    hem = waist * rng.uniform(1.0, 2.3)
    hip = waist + (hem - waist) * rng.uniform(0.4, 0.75) + 0.02
    droop, waves = rng.uniform(0.0, 0.08), int(rng.integers(0, 6))
    x = np.linspace(1.0, 0.0, 12)
    ripple = 0.018 * np.cos(2 * np.pi * waves * x) if waves else 0.0 * x
    bottom = list(zip(x * hem, length + droop * (1 - x**2) + ripple, strict=True))
    cut = _Cut()
    cut.pieces.append(_round_off(_symmetric((0.0, 0.0), (waist, 0.0), (hip, length * 0.45), *bottom), 1))
    cut.patches.append((_band(-0.02, 0.6, rng.uniform(0.05, 0.1)), int(rng.choice([_MAIN, _SECOND, _ACCENT]))))
    cut.stitches.append((_points((-waist, 0.07), (waist, 0.07)), 0.007, _LINING))
    if rng.random() < 0.4:
        cut.patches.append((_band(length - rng.uniform(0.05, 0.16), 0.7, 0.5), _SECOND))
    for at in np.linspace(-0.85, 0.85, int(rng.choice([0, 2, 3, 6, 9]))):  # pleats
        cut.stitches.append(
            (_points((at * waist, 0.08), (at * hip, length * 0.45), (at * hem, length + 0.06)), 0.008, _LINING)
        )
    if rng.random() < 0.25:  # a row of buttons
        cut.stitches += [(_points((0, y), (0, y + 0.014)), 0.026, _ACCENT) for y in np.arange(0.1, length, 0.09)]
    return cut


def _bag(rng: Rng) -> _Cut:
    top, bottom, height = rng.uniform(0.22, 0.36), rng.uniform(0.24, 0.38), rng.uniform(0.32, 0.62)
    thick, rise = rng.uniform(0.022, 0.045), rng.uniform(0.16, 0.42)
    spread = top * rng.uniform(0.45, 0.85)
    handle = int(rng.choice([_SECOND, _ACCENT, _LINING]))
    cut = _Cut()
    body = _symmetric(
        (0.0, 0.0), (top, 0.0), ((top + bottom) / 2 + 0.01, height / 2), (bottom, height), (0.0, height + 0.01)
    )
    cut.pieces.append(_round_off(body, int(rng.integers(1, 4))))
    cut.straps.append((_arc((0.0, 0.03), (spread, rise), 180, 360), thick, handle))
    if rng.random() < 0.4:  # the second handle stands a little off
        cut.straps.append((_arc((0.03, 0.03), (spread, rise * 0.82), 180, 360), thick, handle))
    if rng.random() < 0.5:
        reach = rng.uniform(0.35, 0.65) * height
        point = rng.uniform(0.6, 1.0)
        flap = _symmetric((0.0, -0.02), (0.5, -0.02), (top * 0.98, 0.05), (top * 0.95, reach * point), (0.0, reach))
        cut.patches.append((flap, _SECOND))
        cut.stitches.append((flap[2:-2], 0.008, _LINING))
        cut.patches.append((_band(reach - 0.03, 0.035, 0.06), _ACCENT))  # the clasp
    elif rng.random() < 0.6:
        width, y = top * rng.uniform(0.5, 0.8), height * rng.uniform(0.4, 0.5)
        cut.patches.append((_band(y, width, height * 0.42), int(rng.choice([_MAIN, _SECOND]))))
        cut.stitches.append((_points((-width, y), (width, y)), 0.01, _LINING))
    if rng.random() < 0.35:
        cut.patches.append((_band(height * rng.uniform(0.75, 0.88), 0.6, 0.5), _ACCENT))
    cut.stitches.append((_points((-top, 0.035), (top, 0.035)), 0.006, _LINING))
    return cut


def _shoe(rng: Rng) -> _Cut:
    """Seen from the side, the toe to the right; the ground lies at y = 0."""
    shaft = float(rng.choice([0.3, 0.34, 0.38, 0.62, 0.8]))
    sole, heel = rng.uniform(0.04, 0.09), float(rng.choice([0.0, 0.0, 0.06, 0.16]))
    toe, opening = rng.uniform(0.13, 0.2), rng.uniform(0.3, 0.38)
    lift = heel + sole
    cut = _Cut()
    upper = _points(
        (0.06, -lift), (0.03, -lift - 0.14), (0.05, -lift - shaft),  # the back
        (opening, -lift - shaft + 0.03), (opening + 0.04, -lift * 0.9 - 0.27),  # where the foot goes in
        (0.62, -lift * 0.5 - toe - 0.05), (0.85, -sole - toe), (0.98, -sole - toe * 0.55), (0.99, -sole),
    )  # fmt: skip
    arch = _points((0.36, -lift * 0.75), (0.6, -sole))
    outer = _round_off(np.concatenate([upper, arch[::-1]]), 1)
    bottom = _points(
        (0.03, -lift - 0.01),
        (0.36, -lift * 0.75 - 0.01),
        (0.6, -sole - 0.01),
        (1.01, -sole - 0.01),
        (0.99, 0.0),
        (0.58, 0.0),
    )
    rest = _points((0.34, -heel * 0.8), (0.05, -heel))
    tread = np.concatenate([bottom, rest])
    cut.pieces = [outer, tread]
    cut.patches.append((tread, _SECOND))
    if heel:
        block = _points((0.05, -lift), (rng.uniform(0.12, 0.26), -lift), (rng.uniform(0.1, 0.22), 0.0), (0.06, 0.0))
        cut.pieces.append(block)
        cut.patches.append((block, _SECOND))
    if rng.random() < 0.5:  # a toe cap
        cut.patches.insert(0, (_arc((0.99, -sole), (0.22, 0.3), 90, 270), _ACCENT))
    if rng.random() < 0.4:  # a heel counter
        cut.patches.insert(0, (_points((0.0, -lift), (0.2, -lift), (0.12, -lift - 0.2), (0.0, -lift - 0.2)), _ACCENT))
    if rng.random() < 0.45:  # stripes on the side
        for x in np.linspace(0.42, 0.56, int(rng.integers(1, 4))):
            cut.stitches.append((_points((x - 0.06, -lift * 0.7), (x + 0.04, -lift * 0.8 - 0.22)), 0.028, _SECOND))
    if rng.random() < 0.65:  # laces
        for t in np.linspace(0.15, 0.9, 5):
            x, y = opening + 0.03 + t * (0.58 - opening), -lift * 0.8 - 0.29 + t * (0.27 - toe - 0.03)
            cut.stitches.append((_points((x - 0.07, y + 0.07), (x + 0.02, y)), 0.02, _ACCENT))
    cut.stitches.append((_points((0.04, -lift - shaft + 0.03), (opening, -lift - shaft + 0.06)), 0.016, _LINING))
    return cut


_CUTTERS: tuple[Callable[[Rng], _Cut], ...] = (_t_shirt, _dress, _trousers, _skirt, _bag, _shoe)


# ---------------------------------------------------------------------------------------------------------------------
# Fabrics: what an article is made of. A fabric gives, per pixel, how much of the second and the third colour shows.

_NEUTRALS: tuple[Colour, ...] = (
    (28, 28, 32), (238, 236, 230), (128, 128, 130), (200, 180, 148),  # black, white, grey, beige
    (30, 40, 80), (92, 62, 42), (86, 92, 60), (188, 196, 206),  # navy, brown, olive, pale blue
)  # fmt: skip


def _colour(rng: Rng) -> Colour:
    if rng.random() < 0.3:
        return _NEUTRALS[rng.integers(len(_NEUTRALS))]
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.25, 0.9), rng.uniform(0.35, 0.95))
    return int(255 * red), int(255 * green), int(255 * blue)


def _palette(rng: Rng) -> list[Colour]:
    """Main, second and accent colour, each plainly different from those before it, and a dark lining."""
    chosen = [_colour(rng)]
    while len(chosen) < 3:
        candidate = _colour(rng)
        if all(sum(abs(a - b) for a, b in zip(candidate, other, strict=True)) > 140 for other in chosen):
            chosen.append(candidate)
    red, green, blue = (int(0.42 * channel) for channel in chosen[0])
    return [*chosen, (red, green, blue)]


def _soft_step(signal: Any, sharpness: float) -> Any:
    """0 where the signal is negative, 1 where positive, with an edge about one pixel wide."""
    return np.clip(signal * sharpness + 0.5, 0.0, 1.0)


def _stripes(coordinate: Any, period: float, share: float) -> Any:
    """Stripes `period` apart, the second colour taking `share` of each."""
    distance = np.abs((coordinate / period) % 1.0 - 0.5)
    return _soft_step(share / 2 - distance, period * _SPRITE)


def _dots(x: Any, y: Any, period: float, radius: float) -> Any:
    """A lattice of dots, every other row shifted by half a period."""
    row = np.floor(y / period)
    u, v = (x / period + 0.5 * (row % 2)) % 1.0 - 0.5, (y / period) % 1.0 - 0.5
    return _soft_step(radius - np.hypot(u, v), period * _SPRITE)


def _blobs(rng: Rng, cells: int) -> Floats:
    """A smooth random field in about -0.5..0.5, as large as a sprite."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((_SPRITE, _SPRITE), Image.Resampling.BICUBIC), dtype=np.float32)
    return (smooth / 255 - 0.5).astype(np.float32)


def _print_weights(rng: Rng, x: Floats, y: Floats) -> tuple[Any, Any]:
    """One large motif: a disc, a ring, a diamond, a bar pair or a star."""
    cx, cy, r = rng.uniform(0.42, 0.58), rng.uniform(0.38, 0.6), rng.uniform(0.09, 0.17)
    u, v = (x - cx) / r, (y - cy) / r
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    motifs = (
        1 - radius,
        0.22 - np.abs(radius - 0.8),
        1 - np.abs(u) - np.abs(v),
        np.minimum(0.28 - np.abs(np.abs(v) - 0.5), 1.4 - np.abs(u)),
        0.75 + 0.3 * np.cos(int(rng.integers(3, 8)) * angle) - radius,
    )
    first = _soft_step(motifs[rng.integers(len(motifs))], r * _SPRITE)
    second = _soft_step(rng.uniform(0.25, 0.5) - radius, r * _SPRITE)
    return first, second if rng.random() < 0.6 else 0.0


def _fabric_weights(rng: Rng, x: Floats, y: Floats) -> tuple[Any, Any]:
    """How much of the second and of the third colour shows at each pixel, 0..1."""
    period, share = float(np.exp(rng.uniform(np.log(0.045), np.log(0.2)))), rng.uniform(0.25, 0.6)
    diagonal = (x + y if rng.random() < 0.5 else x - y) * 0.7071
    kind = rng.choice(
        ["plain", "across", "down", "diagonal", "dots", "plaid", "check", "fade", "print", "chevron", "blobs", "block"],
        p=[0.14, 0.11, 0.07, 0.07, 0.1, 0.09, 0.06, 0.08, 0.12, 0.05, 0.06, 0.05],
    )
    if kind in ("across", "down", "diagonal"):
        coordinate = {"across": y, "down": x, "diagonal": diagonal}[str(kind)]
        thin = _stripes(coordinate + period / 2, period, share / 3) if rng.random() < 0.4 else 0.0
        return _stripes(coordinate, period, share), thin
    if kind == "dots":
        other = _dots(x + period / 2, y, 2 * period, 0.2) if rng.random() < 0.4 else 0.0
        return _dots(x, y, period, rng.uniform(0.2, 0.38)), other
    if kind == "plaid":
        broad = 0.45 * (_stripes(x, 1.5 * period, 0.5) + _stripes(y, 1.5 * period, 0.5))
        return broad, 0.8 * np.maximum(_stripes(x, 1.5 * period, 0.08), _stripes(y, 1.5 * period, 0.08))
    if kind == "check":
        return np.abs(_stripes(x, period, 0.5) - _stripes(y, period, 0.5)), 0.0
    if kind == "fade":
        return np.clip((diagonal if rng.random() < 0.3 else y) * 1.4 - 0.2, 0, 1), 0.0
    if kind == "print":
        return _print_weights(rng, x, y)
    if kind == "chevron":
        return _stripes(y + np.abs((x / period) % 2.0 - 1.0) * period * 0.6, period, share), 0.0
    if kind == "blobs":
        cells = int(rng.integers(6, 18))
        return _soft_step(_blobs(rng, cells), 40.0), _soft_step(_blobs(rng, cells) - 0.15, 40.0)
    if kind == "block":
        edge = rng.uniform(0.35, 0.65)
        return _soft_step(y - edge, _SPRITE), _soft_step(0.03 - np.abs(y - edge), _SPRITE)
    return 0.0, 0.0


def _fabric(rng: Rng, palette: Sequence[Colour]) -> Image.Image:
    """A square piece of fabric as large as a sprite."""
    y, x = np.mgrid[0:_SPRITE, 0:_SPRITE].astype(np.float32) / _SPRITE
    second, third = _fabric_weights(rng, x, y)
    weave = 1.0 + rng.uniform(0.02, 0.14) * (rng.random((_SPRITE, _SPRITE), dtype=np.float32) - 0.5)
    main, other, accent = (np.array(colour, dtype=np.float32) for colour in palette[:3])
    cloth = main + np.expand_dims(second, -1) * (other - main)
    cloth = cloth + np.expand_dims(third, -1) * (accent - cloth)
    return Image.fromarray(np.clip(cloth * weave[..., None], 0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Sprites: cut and fabric together


@lru_cache(maxsize=256)
def _sprite(class_index: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """The flat picture of a product: an RGB image and its coverage ("L"), equally large, tight around the article.

    The colours go on beyond the edge of the article, so that a warp may blend across it without a dark fringe.
    """
    rng = np.random.default_rng((class_index, seed))
    palette = _palette(rng)
    cut = _CUTTERS[class_index](rng)
    low, high = cut.extent()
    scale = float((_SPRITE * _SUPERSAMPLE - 4) / (high - low).max())
    width, height = (int(np.ceil(span)) for span in (high - low) * scale + 4)

    def place(points: Points) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in (points - low) * scale + 2]

    def stroke(target: ImageDraw.ImageDraw, line: Points, thickness: float, colour: Colour | int) -> None:
        target.line(place(line), fill=colour, width=max(2, round(thickness * scale)), joint="curve")

    side = _SPRITE * _SUPERSAMPLE
    left, top = (side - width) // 2, (side - height) // 2  # prints sit in the middle of the fabric
    fabric = _fabric(rng, palette).resize((side, side), Image.Resampling.BILINEAR)
    picture = fabric.crop((left, top, left + width, top + height))
    coverage = Image.new("L", (width, height))
    paint, cover = ImageDraw.Draw(picture), ImageDraw.Draw(coverage)
    for piece in cut.pieces:
        cover.polygon(place(piece), fill=255)
    for polygon, row in cut.patches:
        if row != _MAIN:  # a patch of the main colour is there to hide nothing: the fabric shows
            paint.polygon(place(polygon), fill=palette[row])
    for line, thickness, row in cut.stitches:
        stroke(paint, line, thickness, palette[row])
    for line, thickness, row in cut.straps:
        stroke(paint, line, thickness * 1.6, palette[row])  # wider than its coverage, again against a fringe
        stroke(cover, line, thickness, 255)
    picture, coverage = picture.reduce(_SUPERSAMPLE), coverage.reduce(_SUPERSAMPLE)
    return _round_edges(picture, coverage), coverage


def _round_edges(picture: Image.Image, coverage: Image.Image) -> Image.Image:
    """Darken an article towards its edges, as a body of some thickness is."""
    padded = Image.new("L", (coverage.width + 16, coverage.height + 16))
    padded.paste(coverage, (8, 8))
    inside = padded.filter(ImageFilter.BoxBlur(7)).crop((8, 8, 8 + coverage.width, 8 + coverage.height))
    shade = inside.point([round(140 + 115 * min(1.0, level / 235)) for level in range(256)])
    return ImageChops.multiply(picture, Image.merge("RGB", (shade,) * 3))


# ---------------------------------------------------------------------------------------------------------------------
# Scenes


def draw_scene(
    products: Sequence[Product], *, background: Pixels, size: tuple[int, int], rng: np.random.Generator
) -> Scene:
    """Photograph `products` before `background`.

    Pose, folds, light and the cut of the background are drawn from `rng`. A product for which no place is found, or
    that would hide more than about 15 % of another, is left out; the first never is.

    Parameters
    ----------
    products : sequence of Product
        Up to three find room in most scenes.
    background : ndarray of uint8, (h, w, 3)
        Any size; RGB.
    size : (int, int)
        Height and width of the scene in pixels.
    rng : numpy.random.Generator

    Returns
    -------
    Scene
    """
    height, width = size
    canvas = _background(background, size, rng)
    masks: list[NDArray[np.bool_]] = []
    placed: list[Product] = []
    taken: list[Points] = []  # the corners of the boxes so far
    for product in products:
        quad = _find_place(product, len(products), taken, size, rng)
        if quad is None:
            continue
        mask, patch = _pose(product, quad, size, rng)
        if not mask.any() or any((mask & other).sum() > _MAX_COVERED * other.sum() for other in masks):
            continue
        patch.paste_on(canvas)
        masks = [other & ~mask for other in masks] + [mask]
        taken.append(np.stack([quad.min(axis=0), quad.max(axis=0)]))
        placed.append(product)
    return Scene(
        image=np.asarray(_take_photograph(canvas, rng)),
        boxes=np.array([_tight_box(mask) for mask in masks], dtype=np.float32).reshape(-1, 4),
        class_indices=np.array([product.class_index for product in placed], dtype=np.int64),
        product_ids=tuple(product.id for product in placed),
        masks=np.array(masks, dtype=np.bool_).reshape(-1, height, width),
    )


def _tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of the smallest half-open box around the set pixels."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _background(photo: Pixels, size: tuple[int, int], rng: Rng) -> Image.Image:
    """A random part of `photo`, perhaps mirrored, scaled to `size`."""
    height, width = size
    picture = Image.fromarray(photo)
    largest = min(picture.width / width, picture.height / height)  # photo pixels per scene pixel
    step = largest * rng.uniform(0.6, 1.0)
    left = rng.uniform(0, picture.width - width * step)
    top = rng.uniform(0, picture.height - height * step)
    box = (left, top, min(left + width * step, picture.width), min(top + height * step, picture.height))
    part = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def _find_place(
    product: Product, count: int, taken: Sequence[Points], size: tuple[int, int], rng: Rng
) -> Points | None:
    """The corners of a posed sprite in the scene, (4, 2) clockwise from its top left, or None if all is full."""
    sprite, _ = _sprite(product.class_index, product.seed)
    smallest, largest = {1: (0.42, 0.9), 2: (0.34, 0.64)}.get(count, (0.26, 0.5))
    for _ in range(_PLACEMENT_TRIES):
        longest = min(size) * rng.uniform(smallest, largest)
        quad = _random_quad(sprite.size, longest, rng)
        span = np.ptp(quad, axis=0)
        room = np.array(size[::-1]) - span
        # Now and then up to 6 % of a garment leaves the picture.
        corner = rng.uniform(np.minimum(-0.06 * span, 0.5 * room), np.maximum(room + 0.06 * span, 0.5 * room))
        quad += corner - quad.min(axis=0)
        if all(_share_in_common(quad, other) < _MAX_COVERED for other in taken):
            return quad
    return None


def _random_quad(sprite_size: tuple[int, int], longest: float, rng: Rng) -> Points:
    """A rectangle of the sprite's proportions, stretched, sheared, turned, and with its corners a little displaced."""
    width, height = np.array(sprite_size) * (longest / max(sprite_size)) * rng.uniform(0.9, 1.1, 2)
    shear, angle = rng.uniform(-0.1, 0.1), np.radians(rng.uniform(-25, 25))
    cos, sin = np.cos(angle), np.sin(angle)
    corners = _points((-1, -1), (1, -1), (1, 1), (-1, 1)) * (width / 2, height / 2)
    corners = corners @ np.array([[1.0, 0.0], [shear, 1.0]]) @ np.array([[cos, sin], [-sin, cos]])
    return np.asarray(corners + rng.uniform(-0.035, 0.035, (4, 2)) * longest)


def _share_in_common(quad: Points, box: Points) -> float:
    """The overlap of two boxes as a share of the smaller one."""
    low, high = quad.min(axis=0), quad.max(axis=0)
    overlap = np.prod(np.maximum(np.minimum(high, box[1]) - np.maximum(low, box[0]), 0.0))
    return float(overlap / min(np.prod(high - low), np.prod(box[1] - box[0])))


@dataclass
class _Patch:
    """A posed garment, ready to blend: its picture and coverage, their place in the scene, and a soft shadow."""

    picture: Image.Image
    coverage: Image.Image
    corner: tuple[int, int]
    shadow: Image.Image
    shadow_corner: tuple[int, int]

    def paste_on(self, canvas: Image.Image) -> None:
        canvas.paste((12, 12, 16), self.shadow_corner, self.shadow)
        canvas.paste(self.picture, self.corner, self.coverage)


def _pose(product: Product, quad: Points, size: tuple[int, int], rng: Rng) -> tuple[NDArray[np.bool_], _Patch]:
    """Warp a product's sprite onto `quad`; returns its mask in the scene, (H, W), and what to paint."""
    picture, coverage = _sprite(product.class_index, product.seed)
    if product.class_index == CLASSES.index("shoe") and rng.random() < 0.5:  # the other side of the pair
        picture, coverage = (side.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for side in (picture, coverage))
    if np.ptp(quad, axis=0).max() < 0.6 * _SPRITE:  # a bilinear warp must not skip pixels
        picture, coverage = picture.reduce(2), coverage.reduce(2)
    left, top = (int(v) for v in np.floor(quad.min(axis=0)))
    right, bottom = (int(v) for v in np.ceil(quad.max(axis=0)))
    patch_size = right - left, bottom - top
    warp = _perspective(quad - (left, top), picture.size)
    bilinear = Image.Resampling.BILINEAR
    warped = picture.transform(patch_size, Image.Transform.PERSPECTIVE, warp, bilinear)
    alpha = coverage.transform(patch_size, Image.Transform.PERSPECTIVE, warp, bilinear)

    mask = np.zeros(size, dtype=np.bool_)
    x, y = max(left, 0), max(top, 0)
    inside = np.asarray(alpha)[y - top : size[0] - top, x - left : size[1] - left] > 127
    mask[y : y + inside.shape[0], x : x + inside.shape[1]] = inside

    margin = 12
    soft = Image.new("L", (patch_size[0] // 4 + margin // 2, patch_size[1] // 4 + margin // 2))
    soft.paste(alpha.reduce(4), (margin // 4, margin // 4))
    strength = rng.uniform(0.15, 0.6)
    soft = soft.filter(ImageFilter.BoxBlur(2)).point([int(level * strength) for level in range(256)])
    shadow = soft.resize((soft.width * 4, soft.height * 4), bilinear)
    drop = rng.integers(-8, 9), rng.integers(0, 9)
    shadow_corner = int(left - margin + drop[0]), int(top - margin + drop[1])
    return mask, _Patch(_drape(warped, rng), alpha, (left, top), shadow, shadow_corner)


def _perspective(quad: Points, sprite_size: tuple[int, int]) -> list[float]:
    """The eight coefficients with which Pillow finds, for a scene point, the sprite point to show there."""
    width, height = sprite_size
    corners = _points((0, 0), (width, 0), (width, height), (0, height))
    rows, values = [], []
    for (x, y), (u, v) in zip(quad, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(c) for c in np.linalg.solve(np.array(rows), np.array(values))]


def _drape(picture: Image.Image, rng: Rng) -> Image.Image:
    """Lay folds and a slope of light over a garment."""
    # Computed at a quarter of the size: folds are smooth, and this runs for every garment of every scene.
    width, height = max(picture.width // 4, 2), max(picture.height // 4, 2)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    shade = np.full((height, width), 0.88, dtype=np.float32)
    shade += rng.uniform(-0.16, 0.16) * (x - 0.5) + rng.uniform(-0.16, 0.16) * (y - 0.5)
    for _ in range(int(rng.integers(1, 4))):
        angle, waves, bend, phase = (
            rng.uniform(-0.7, 0.7),
            rng.uniform(2, 6),
            rng.uniform(-0.6, 0.6),
            rng.uniform(0, 6.3),
        )
        along = np.cos(angle) * x + np.sin(angle) * y + bend * (y - 0.5) ** 2
        shade += rng.uniform(0.015, 0.05) * np.sin(2 * np.pi * waves * along + phase).astype(np.float32)
    light = Image.fromarray(np.clip(255 * shade, 0, 255).astype(np.uint8))
    light = light.resize(picture.size, Image.Resampling.BILINEAR)
    return ImageChops.multiply(picture, Image.merge("RGB", (light,) * 3))


@lru_cache(maxsize=1)
def _grain() -> Image.Image:
    """A picture of film grain around 128, of which each photograph takes a part."""
    noise = np.random.default_rng(0).normal(128, 5, (1024, 1024, 3))
    return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))


def _take_photograph(canvas: Image.Image, rng: Rng) -> Image.Image:
    """What the camera does to a scene: colour of light, exposure, contrast, a bit of blur and grain."""
    exposure, warmth, gamma = rng.uniform(0.85, 1.18), rng.uniform(-0.07, 0.07), rng.uniform(0.88, 1.15)
    levels = np.linspace(0, 1, 256) ** gamma
    gains = exposure * np.array([1 + warmth, 1 + rng.uniform(-0.02, 0.02), 1 - warmth])
    table = np.clip(255 * gains[:, None] * levels, 0, 255).astype(np.uint8)
    canvas = canvas.point([int(level) for level in table.ravel()])
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.BoxBlur(float(rng.uniform(0.2, 0.8))))
    if rng.random() < 0.5 and max(canvas.size) <= 1024:
        x, y = int(rng.integers(0, 1025 - canvas.width)), int(rng.integers(0, 1025 - canvas.height))
        grain = _grain().crop((x, y, x + canvas.width, y + canvas.height))
        canvas = ImageChops.add(canvas, grain, 1.0, -128)
    return canvas
