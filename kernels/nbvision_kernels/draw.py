"""Drawing: which pixels a detection covers, and how strongly. Integers only, so that both devices give the same bytes.

A detection becomes a *record* of int32: three rectangles in whole pixels of its image (the box, the region that its
mask covers, the bar behind its text), the text's two *strips*, and its row of the palette. A strip is one piece of
text as 8-bit coverage, ``text_height`` lines of its own width, back to back with the others in the atlas.
A palette row is eight bytes: the colour and the colour of text on it, each in the images' channel order.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from nbvision_kernels.codes import DRAW_FIELDS as FIELDS
from nbvision_kernels.pixel import clamp, pixel_function, pointer_from_address, rint32

__all__ = [
    "ABOVE_ONE",
    "BAR",
    "BELOW_ZERO",
    "BOX",
    "COLOR",
    "NAME",
    "NOT_A_NUMBER",
    "PALETTE_BYTES",
    "REGION",
    "SCORE",
    "SCORE_STRIPS",
    "TEXT_MARGIN",
    "blend",
    "coverage",
    "inside_mask",
    "lay_out_cpu",
    "paint_cpu",
    "paint_pixel",
    "score_strip",
    "touches",
    "write_record",
]

BOX, REGION, BAR, NAME, SCORE, COLOR = 0, 4, 8, 12, 13, 14  # fields of a record
BELOW_ZERO, ABOVE_ONE, NOT_A_NUMBER, SCORE_STRIPS = 101, 102, 103, 104  # after the strips of 0.00 to 1.00
PALETTE_BYTES = 8
TEXT_MARGIN = 1  # lines of the bar above and below its text
_FARTHEST = 1 << 20  # coordinates beyond are moved here, so that no sum of them overflows


# --- where a detection lies -------------------------------------------------------------------------------------------


@pixel_function
def whole(coordinate):
    """A coordinate rounded half to even."""
    return np.int32(rint32(clamp(coordinate, np.float32(-_FARTHEST), np.float32(_FARTHEST))))


@pixel_function
def write_whole_box(records, to, boxes, start):
    """The box at ``boxes[start]`` in whole pixels; zeros if it is NaN, inverted or rounds to nothing."""
    x1 = boxes[start]
    y1 = boxes[start + 1]
    x2 = boxes[start + 2]
    y2 = boxes[start + 3]
    good = x1 < x2 and y1 < y2
    left = whole(x1) if good else np.int32(0)
    top = whole(y1) if good else np.int32(0)
    right = whole(x2) if good else np.int32(0)
    bottom = whole(y2) if good else np.int32(0)
    if right <= left or bottom <= top:
        left = top = right = bottom = np.int32(0)
    records[to] = left
    records[to + 1] = top
    records[to + 2] = right
    records[to + 3] = bottom


@pixel_function
def touches(records, rectangle, left, top, right, bottom):
    """Whether the rectangle at ``records[rectangle]`` shares a pixel with another one."""
    across = min(records[rectangle + 2], right) > max(records[rectangle], left)
    return across and min(records[rectangle + 3], bottom) > max(records[rectangle + 1], top)


@pixel_function
def score_strip(score):
    """The strip of a score: its hundredths, rounded as Python's ``f"{score:.2f}"`` does."""
    strip = np.int32(NOT_A_NUMBER)
    if score < np.float32(-0.005):
        strip = np.int32(BELOW_ZERO)
    elif score > np.float32(1.005):
        strip = np.int32(ABOVE_ONE)
    elif score == score:
        # In units of 2**-40 every score of 0.005 or more is a whole number.
        hundredths = np.int64(max(score, np.float32(0)) * np.float32(1 << 40)) * np.int64(100)
        strip = np.int32(hundredths >> np.int64(40))
        rest = hundredths - (np.int64(strip) << np.int64(40))
        half = np.int64(1 << 39)
        if rest > half or (rest == half and strip % np.int32(2) == 1):
            strip = np.int32(strip + 1)
    return strip


@pixel_function
def write_record(
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
):
    """The record of detection ``row``. It stays empty if its image is none of the batch.

    The bar stands on the box, inside it where there is no room above, and is moved left if it would leave the image.
    """
    to = np.int64(row) * FIELDS
    for index in range(FIELDS):
        records[to + index] = np.int32(0)
    image = images[row]
    if image >= 0 and image < image_count:
        height = np.int32(sources[np.int64(image) * 4 + 2])
        width = np.int32(sources[np.int64(image) * 4 + 3])
        write_whole_box(records, to + BOX, boxes, np.int64(row) * 4)
        visible = touches(records, to + BOX, np.int32(0), np.int32(0), width, height)
        if visible:
            write_whole_box(records, to + REGION, regions, np.int64(row) * 4)
        label = labels[row]
        records[to + COLOR] = np.int32(label % colors)
        name = np.int32(-1)
        text_width = np.int32(0)
        if label >= 0 and label < names and strips[label * 2 + 1] > 0:
            name = np.int32(label)
            text_width = np.int32(strips[name * 2 + 1])
        score = np.int32(-1)
        if with_scores:
            score = np.int32(names + score_strip(scores[row]))
            gap = padding if name >= 0 else np.int32(0)
            text_width = np.int32(text_width + gap + strips[score * 2 + 1])
        records[to + NAME] = name
        records[to + SCORE] = score
        if visible and text_width > 0:
            bar_width = np.int32(text_width + 2 * padding)
            bar_height = np.int32(text_height + 2 * TEXT_MARGIN)
            left = np.int32(max(min(records[to + BOX], width - bar_width), 0))
            top = np.int32(records[to + BOX + 1] - bar_height)
            if top < 0:
                top = np.int32(max(records[to + BOX + 1], 0))
            records[to + BAR] = left
            records[to + BAR + 1] = top
            records[to + BAR + 2] = np.int32(left + bar_width)
            records[to + BAR + 3] = np.int32(top + bar_height)
        if not visible:
            for index in range(4):
                records[to + BOX + index] = np.int32(0)


# --- what it does to a pixel ------------------------------------------------------------------------------------------


@pixel_function
def strip_at(atlas, strips, text_height, strip, line, column):
    """Coverage 0..255 of a strip's text; 0 outside it and for strip -1."""
    value = np.int32(0)
    if strip >= 0 and line >= 0 and line < text_height and column >= 0:
        width = strips[strip * 2 + 1]
        if column < width:
            value = np.int32(atlas[np.int64(strips[strip * 2]) + np.int64(line) * np.int64(width) + np.int64(column)])
    return value


@pixel_function
def inside_mask(masks, start, mask_height, mask_width, x, y, width, height, threshold):
    """Whether pixel (x, y) of a region of ``width`` x ``height`` pixels is inside the mask stretched over it.

    The mask's pixels are 1 or 0; between their centres that is interpolated, and a half or more is inside.
    """
    unit_x = np.int64(2) * np.int64(width)  # a mask pixel has so many steps
    unit_y = np.int64(2) * np.int64(height)
    along = (np.int64(2) * np.int64(x) + np.int64(1)) * np.int64(mask_width) - np.int64(width)
    down = (np.int64(2) * np.int64(y) + np.int64(1)) * np.int64(mask_height) - np.int64(height)
    column = along // unit_x
    line = down // unit_y
    share_x = along - column * unit_x
    share_y = down - line * unit_y
    last_column = np.int64(mask_width) - np.int64(1)
    last_line = np.int64(mask_height) - np.int64(1)
    left = clamp(column, np.int64(0), last_column)
    right = clamp(column + np.int64(1), np.int64(0), last_column)
    upper = start + clamp(line, np.int64(0), last_line) * np.int64(mask_width)
    lower = start + clamp(line + np.int64(1), np.int64(0), last_line) * np.int64(mask_width)
    above = np.int64(0)
    below = np.int64(0)
    if masks[upper + left] > threshold:
        above += unit_x - share_x
    if masks[upper + right] > threshold:
        above += share_x
    if masks[lower + left] > threshold:
        below += unit_x - share_x
    if masks[lower + right] > threshold:
        below += share_x
    return np.int64(2) * ((unit_y - share_y) * above + share_y * below) >= unit_x * unit_y


@pixel_function
def coverage(
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
):
    """How detection ``row`` covers pixel (x, y): ``text << 8 | colour``, each 0..255.

    The bar lies over the outline, the outline over the mask.
    """
    at = np.int64(row) * FIELDS
    x_stop = np.int32(x + 1)
    y_stop = np.int32(y + 1)
    result = np.int32(0)
    if touches(records, at + BAR, x, y, x_stop, y_stop):
        line = np.int32(y - records[at + BAR + 1] - TEXT_MARGIN)
        column = np.int32(x - records[at + BAR] - padding)
        name = records[at + NAME]
        text = strip_at(atlas, strips, text_height, name, line, column)
        if name >= 0:
            column = np.int32(column - strips[name * 2 + 1] - padding)
        text = np.int32(max(text, strip_at(atlas, strips, text_height, records[at + SCORE], line, column)))
        result = np.int32((text << 8) | 255)
    else:
        outlined = touches(records, at + BOX, x, y, x_stop, y_stop) and (
            x < records[at + BOX] + thickness
            or y < records[at + BOX + 1] + thickness
            or x >= records[at + BOX + 2] - thickness
            or y >= records[at + BOX + 3] - thickness
        )
        if outlined:
            result = np.int32(255)
        elif mask_height > 0 and touches(records, at + REGION, x, y, x_stop, y_stop):
            left = records[at + REGION]
            top = records[at + REGION + 1]
            width = np.int32(records[at + REGION + 2] - left)
            height = np.int32(records[at + REGION + 3] - top)
            start = np.int64(row) * np.int64(mask_height) * np.int64(mask_width)
            x_inside = np.int32(x - left)
            y_inside = np.int32(y - top)
            if inside_mask(masks, start, mask_height, mask_width, x_inside, y_inside, width, height, threshold):
                result = np.int32(opacity)
    return result


@pixel_function
def blend(under, over, share):
    """``(under * (255 - share) + over * share + 127) // 255`` for bytes."""
    total = np.int32(np.int32(under) * np.int32(np.int32(255) - share) + np.int32(over) * share + 127)
    return np.int32((total + 1 + (total >> 8)) >> 8)


@pixel_function
def paint_pixel(pixels, at, channels, palette, color, cover):
    """Put the colour, and the text over it, on the pixel at ``pixels[at]``."""
    share = np.int32(cover & 255)
    text = np.int32(cover >> 8)
    first = np.int64(color) * PALETTE_BYTES
    for channel in range(channels):
        value = blend(pixels[at + channel], palette[first + channel], share)
        pixels[at + channel] = np.uint8(blend(value, palette[first + 4 + channel], text))


# --- CPU loops --------------------------------------------------------------------------------------------------------


def lay_out_cpu(
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
    """The records of all detections."""
    for row in range(count):
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


def paint_cpu(
    base,
    sources,
    targets,
    image_count,
    max_height,
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
    """Copy every image and draw its detections on it, lines in parallel. ``base`` is 0, which the compiler must not
    know: to it a store there is one that cannot happen."""
    for index in prange(image_count * max_height):
        pixels = pointer_from_address(base)
        image = index // max_height
        y = np.int32(index - image * max_height)
        width = np.int32(sources[image * 4 + 3])
        if y < sources[image * 4 + 2]:
            source = sources[image * 4] + y * sources[image * 4 + 1]
            target = targets[image * 4] + y * targets[image * 4 + 1]
            if source != target:
                for byte in range(np.int64(width) * channels):
                    pixels[target + byte] = pixels[source + byte]
            for rank in range(counts[image]):  # the first of the list comes last, and so lies on top
                row = rows[starts[image] + counts[image] - 1 - rank]
                at = np.int64(row) * FIELDS
                left = width
                right = np.int32(0)
                for rectangle in range(3):
                    side = at + rectangle * 4
                    if touches(records, side, np.int32(0), y, width, np.int32(y + 1)):
                        left = min(left, records[side])
                        right = max(right, records[side + 2])
                # Between the sides of a box there is nothing to do on a line without mask or text.
                hole = records[at + BOX] + thickness
                beyond = records[at + BOX + 2] - thickness
                on_side = y < records[at + BOX + 1] + thickness or y >= records[at + BOX + 3] - thickness
                if on_side or mask_height > 0 or touches(records, at + BAR, np.int32(0), y, width, np.int32(y + 1)):
                    beyond = hole
                x = max(left, 0)
                while x < min(right, width):
                    if hole <= x < beyond:
                        x = beyond
                        continue
                    cover = coverage(
                        records,
                        row,
                        np.int32(x),
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
                        at_pixel = target + np.int64(x) * channels
                        paint_pixel(pixels, at_pixel, channels, palette, records[at + COLOR], cover)
                    x += 1
