"""A picture people can judge: each query with its boxes and masks, beside its best matches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

__all__ = ["Match", "Row", "draw_report"]

_COLOURS = [(230, 57, 70), (29, 120, 208), (240, 150, 20), (140, 70, 190), (20, 160, 170), (110, 90, 70)]
_QUERY_HEIGHT, _MATCH_SIZE, _GAP, _CAPTION = 348, (128, 96), 18, 20
_INK, _FAINT, _PAPER, _GOOD = (30, 30, 34), (125, 125, 130), (252, 252, 250), (42, 157, 80)
_LEGEND = "Green frames: the same product, photographed elsewhere. Numbers: cosine similarity."
_FILE_COLOURS = 256  # with dithering, a third of the bytes of the whole picture, and hardly to be seen


@dataclass(frozen=True)
class Match:
    """One answer: a catalogue photograph, its product, the similarity, and whether it is the right product."""

    path: Path
    product: str
    score: float
    right: bool


@dataclass(frozen=True)
class Row:
    """One query: its image, and for each object the box, the mask in source pixels, a caption and the answers."""

    image: npt.NDArray[np.uint8]
    boxes: npt.NDArray[np.float32]
    masks: Sequence[npt.NDArray[np.bool_]]
    captions: Sequence[str]
    matches: Sequence[Sequence[Match]]


def draw_report(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw the rows into a PNG at ``path``."""
    heading = _draw_heading(title)
    pictures = [heading, *(_draw_row(row) for row in rows)]
    width = max(picture.width for picture in pictures) + 2 * _GAP
    height = sum(picture.height + _GAP for picture in pictures) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    top = _GAP
    for picture in pictures:
        sheet.paste(picture, (_GAP, top))
        top += picture.height + _GAP
    palette = sheet.quantize(_FILE_COLOURS)  # Pillow dithers only to a palette that it is given
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def _draw_heading(title: str) -> Image.Image:
    large, small = ImageFont.load_default(20), ImageFont.load_default(14)
    width = max(large.getlength(title), small.getlength(_LEGEND))
    heading = Image.new("RGB", (round(width) + 1, 50), _PAPER)
    draw = ImageDraw.Draw(heading)
    draw.text((0, 0), title, fill=_INK, font=large)
    draw.text((0, 29), _LEGEND, fill=_FAINT, font=small)
    return heading


def _draw_row(row: Row) -> Image.Image:
    query = _draw_query(row)
    lines = [_draw_matches(matches, _COLOURS[index % len(_COLOURS)]) for index, matches in enumerate(row.matches)]
    width = query.width + _GAP + max((line.width for line in lines), default=0)
    height = max(query.height, sum(line.height for line in lines))
    picture = Image.new("RGB", (width, height), _PAPER)
    picture.paste(query, (0, 0))
    top = 0
    for line in lines:
        picture.paste(line, (query.width + _GAP, top))
        top += line.height
    return picture


def _draw_query(row: Row) -> Image.Image:
    scale = _QUERY_HEIGHT / row.image.shape[0]
    size = (round(row.image.shape[1] * scale), _QUERY_HEIGHT)
    picture = Image.fromarray(row.image).resize(size, Image.Resampling.LANCZOS)
    for index, mask in enumerate(row.masks):
        inside = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR)
        inside = inside.filter(ImageFilter.GaussianBlur(2)).point(lambda level: 255 * (level > 127))
        outline = ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(5)), inside)
        picture.paste(_COLOURS[index % len(_COLOURS)], mask=outline)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for index, (box, caption) in enumerate(zip(row.boxes * scale, row.captions, strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        draw.rectangle(box.tolist(), outline=colour, width=2)
        width = font.getlength(caption) + 8
        x, y = max(min(float(box[0]), size[0] - width), 0.0), max(float(box[1]) - 19, 0.0)
        draw.rectangle([x, y, x + width, y + 19], fill=colour)
        draw.text((x + 4, y + 1), caption, fill=(255, 255, 255), font=font)
    return picture


def _draw_matches(matches: Sequence[Match], colour: tuple[int, int, int]) -> Image.Image:
    width, height = _MATCH_SIZE
    line = Image.new("RGB", (12 + len(matches) * (width + 8), height + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(line)
    draw.rectangle([0, 0, 4, height - 1], fill=colour)
    for index, match in enumerate(matches):
        with Image.open(match.path) as photograph:
            thumbnail = photograph.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        x = 12 + index * (width + 8)
        line.paste(thumbnail, (x, 0))
        if match.right:
            draw.rectangle([x, 0, x + width - 1, height - 1], outline=_GOOD, width=3)
        text = f"{match.product}  {match.score:.2f}"
        draw.text((x, height + 1), text, fill=_GOOD if match.right else _FAINT, font=ImageFont.load_default(13))
    return line
