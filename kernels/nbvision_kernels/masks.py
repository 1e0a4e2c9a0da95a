"""Masks: from logits to a mask's extent and centroid, cut-outs, and masks of crops pasted into their sources.

A mask's logits are ``(height, width)`` float32 on the canvas of its crop; more than the threshold is inside.

A cut-out's record is ``RECORD`` int32: the image, the left and top of the part that is cut out, and the rectangle that
the mask is stretched over, in whole pixels. A pasted mask's place is ``PLACE`` float32: the left, top, width and height
of what it covers of the source, and those of the part of the mask that lies on it.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from nbvision_kernels.codes import OFFSET_X, OFFSET_Y, SCALE_X, SCALE_Y, SCALES
from nbvision_kernels.draw import inside_mask
from nbvision_kernels.instances import HEIGHT, LEFT, OFFSET, ROW, TOP, WIDTH, mix
from nbvision_kernels.pixel import clamp, pixel_function, pointer_from_address

__all__ = [
    "PLACE",
    "RECORD",
    "argmax_map_cpu",
    "best_plane",
    "cut_out_cpu",
    "cut_out_rgba_cpu",
    "cut_out_value",
    "line_of",
    "mask_boxes_cpu",
    "mask_centroids_cpu",
    "object_pixel",
    "paste_masks_cpu",
    "pasted_pixel",
    "place_along",
    "position_along",
    "write_centroid",
    "write_mask_box",
]

RECORD = 7
PLACE = 8


@pixel_function
def write_mask_box(boxes, areas, mask, left, top, right, bottom, area, scales):
    """The extent of ``mask`` in source pixels: columns left..right-1 and rows top..bottom-1 of its canvas.

    An empty mask has the box 0, 0, 0, 0. Areas are in canvas pixels.
    """
    to = np.int64(mask) * 4
    row = np.int64(mask) * SCALES
    if area == 0:
        for side in range(4):
            boxes[to + side] = np.float32(0)
    else:
        boxes[to] = np.float32(left) * scales[row + SCALE_X] + scales[row + OFFSET_X]
        boxes[to + 1] = np.float32(top) * scales[row + SCALE_Y] + scales[row + OFFSET_Y]
        boxes[to + 2] = np.float32(right) * scales[row + SCALE_X] + scales[row + OFFSET_X]
        boxes[to + 3] = np.float32(bottom) * scales[row + SCALE_Y] + scales[row + OFFSET_Y]
    areas[mask] = area


@pixel_function
def mean_place(total, area):
    """The mean of ``area`` pixels' centres, whose indices sum to ``total``: the whole part exact, the rest rounded."""
    whole = total // np.int64(area)
    rest = np.float32(total - whole * np.int64(area))
    return np.float32(whole) + (rest / np.float32(area) + np.float32(0.5))


@pixel_function
def write_centroid(centroids, mask, area, sum_x, sum_y, scales, mapped):
    """The centroid of ``mask``, in source pixels if ``mapped``; 0, 0 of an empty mask."""
    to = np.int64(mask) * 2
    x = np.float32(0)
    y = np.float32(0)
    if area > 0:
        x = mean_place(sum_x, area)
        y = mean_place(sum_y, area)
        if mapped:
            row = np.int64(mask) * SCALES
            x = x * scales[row + SCALE_X] + scales[row + OFFSET_X]
            y = y * scales[row + SCALE_Y] + scales[row + OFFSET_Y]
    centroids[to] = x
    centroids[to + 1] = y


@pixel_function
def cut_out_value(value, logit, threshold, fill, gain, bias):
    """A crop's value where the mask is, ``fill`` where it is not; then normalised."""
    kept = value if logit > threshold else fill
    return kept * gain + bias


def mask_boxes_cpu(logits, masks, height, width, threshold, scales, boxes, areas):
    """The extent and area of each mask, masks in parallel."""
    for mask in prange(masks):
        start = np.int64(mask) * height * width
        left = width
        top = height
        right = 0
        bottom = 0
        area = np.int32(0)
        for y in range(height):
            for x in range(width):
                if logits[start + y * width + x] > threshold:
                    left = min(left, x)
                    right = max(right, x + 1)
                    top = min(top, y)
                    bottom = y + 1
                    area += np.int32(1)
        write_mask_box(boxes, areas, mask, left, top, right, bottom, area, scales)


def mask_centroids_cpu(logits, masks, height, width, threshold, scales, mapped, centroids):
    """The centroid of each mask, masks in parallel."""
    for mask in prange(masks):
        start = np.int64(mask) * height * width
        area = np.int64(0)
        sum_x = np.int64(0)
        sum_y = np.int64(0)
        for y in range(height):
            before = area
            for x in range(width):
                if logits[start + y * width + x] > threshold:
                    area += 1
                    sum_x += x
            sum_y += y * (area - before)
        write_centroid(centroids, mask, area, sum_x, sum_y, scales, mapped)


def cut_out_cpu(crops, logits, crops_count, plane, threshold, fill, gain, bias, out):
    """Cut every crop (3 planes) out along its mask, crops in parallel."""
    for crop in prange(crops_count):
        for c in range(3):
            start = (np.int64(crop) * 3 + c) * plane
            for pixel in range(plane):
                out[start + pixel] = cut_out_value(
                    crops[start + pixel],
                    logits[np.int64(crop) * plane + pixel],
                    threshold,
                    fill,
                    gain[c],
                    bias[c],
                )


@pixel_function
def best_plane(logits, start, planes, plane):
    """Which of ``planes`` values, ``plane`` apart, is the largest; the first of equals. A NaN is never larger."""
    best = np.int32(0)
    best_value = logits[start]
    for index in range(1, planes):
        value = logits[start + np.int64(index) * plane]
        if value > best_value or (best_value != best_value and value == value):
            best_value = value
            best = np.int32(index)
    return best


def argmax_map_cpu(logits, images, planes, plane, out):
    """The best class of each pixel, images' pixels in parallel."""
    for pixel in prange(images * plane):
        image = pixel // plane
        out[pixel] = best_plane(logits, np.int64(image) * planes * plane + pixel % plane, planes, plane)


# --- objects with alpha -----------------------------------------------------------------------------------------------


@pixel_function
def rgba_word(pixels, at, channels, swap, inside):
    """The pixel at ``pixels[at]`` as red, green, blue and alpha, the lowest byte first. Outside alpha is 0, inside the
    pixel's own, or full."""
    first = np.uint32(pixels[at])
    second = first
    third = first
    alpha = np.uint32(255)
    if channels >= 3:
        second = np.uint32(pixels[at + 1])
        third = np.uint32(pixels[at + 2])
    if channels == 4:
        alpha = np.uint32(pixels[at + 3])
    if swap:
        first, third = third, first
    if not inside:
        alpha = np.uint32(0)
    low = np.uint32(first | np.uint32(second << np.uint32(8)))
    high = np.uint32(third | np.uint32(alpha << np.uint32(8)))
    return np.uint32(low | np.uint32(high << np.uint32(16)))


@pixel_function
def object_pixel(pixels, sources, records, index, x, y, channels, swap, masks, mask_height, mask_width, threshold):
    """Pixel (x, y) of cut-out ``index``, as :func:`rgba_word` has it."""
    record = np.int64(index) * RECORD
    image = np.int64(records[record])
    x_source = np.int32(records[record + 1] + x)
    y_source = np.int32(records[record + 2] + y)
    left = records[record + 3]
    top = records[record + 4]
    right = records[record + 5]
    bottom = records[record + 6]
    inside = False
    if x_source >= left and x_source < right and y_source >= top and y_source < bottom:
        inside = inside_mask(
            masks,
            np.int64(index) * np.int64(mask_height) * np.int64(mask_width),
            mask_height,
            mask_width,
            np.int32(x_source - left),
            np.int32(y_source - top),
            np.int32(right - left),
            np.int32(bottom - top),
            threshold,
        )
    at = sources[image * 4] + np.int64(y_source) * sources[image * 4 + 1] + np.int64(x_source) * np.int64(channels)
    return rgba_word(pixels, at, channels, swap, inside)


def cut_out_rgba_cpu(
    base, sources, targets, records, count, max_height, channels, swap, masks, mask_height, mask_width, threshold
):
    """Every cut-out, lines in parallel. ``base`` is 0, which the compiler must not know: to it a store there is
    one that cannot happen."""
    for line in prange(count * max_height):
        pixels = pointer_from_address(base)
        index = line // max_height
        y = np.int32(line - index * max_height)
        if y < targets[index * 4 + 2]:
            to = targets[index * 4] + np.int64(y) * targets[index * 4 + 1]
            for x in range(targets[index * 4 + 3]):
                word = object_pixel(
                    pixels,
                    sources,
                    records,
                    index,
                    np.int32(x),
                    y,
                    channels,
                    swap,
                    masks,
                    mask_height,
                    mask_width,
                    threshold,
                )
                for byte in range(4):
                    pixels[to + 4 * x + byte] = np.uint8((word >> np.uint32(8 * byte)) & np.uint32(255))


# --- masks of crops in their sources ----------------------------------------------------------------------------------


@pixel_function
def place_along(places, at, size):
    """One axis of a mask's place, every other number from ``places[at]`` on: where it begins in the source, mask pixels
    a source pixel, where they begin, and the first and the last that count. None is beyond ``size``, whatever a
    geometry of other canvases says."""
    first = places[at + 4]
    last = np.float32(size - 1)
    step = places[at + 6] / places[at + 2]
    return places[at], step, first, min(first, last), min(first + places[at + 6] - np.float32(1), last)


@pixel_function
def position_along(index, source_first, step, first, low, high):
    """Where the centre of source pixel ``index`` falls between the centres of a mask's pixels; the outermost that count
    continue outwards."""
    return clamp(first + (np.float32(index) + np.float32(0.5) - source_first) * step - np.float32(0.5), low, high)


@pixel_function
def line_of(mask, rows, columns, down):
    """Where the two lines of a mask begin between which a position lies, and the share of the lower one."""
    top = np.int32(down)
    start = np.int64(mask) * np.int64(rows) * np.int64(columns)
    upper = start + np.int64(top) * np.int64(columns)
    lower = start + np.int64(min(np.int32(top + 1), np.int32(rows - 1))) * np.int64(columns)
    return upper, lower, down - np.float32(top)


@pixel_function
def pasted_pixel(logits, upper, lower, share_y, columns, across, threshold):
    """Whether a position of a mask is inside: interpolated first, compared then."""
    left = np.int32(across)
    right = np.int64(min(np.int32(left + 1), np.int32(columns - 1)))
    share_x = across - np.float32(left)
    above = mix(logits[upper + np.int64(left)], logits[upper + right], share_x)
    below = mix(logits[lower + np.int64(left)], logits[lower + right], share_x)
    return mix(above, below, share_y) > threshold


def paste_masks_cpu(logits, places, table, masks, rows, columns, threshold, lines, out_plane, pitch, out):
    """The pixels of every mask's row of ``table``, lines in parallel.

    With ``pitch`` each mask has a canvas of ``out_plane`` pixels, ``pitch`` a line; with 0 it has only the pixels of
    its row, where the row says.
    """
    for index in prange(masks * lines):
        mask = index // lines
        y = index - mask * lines
        row = np.int64(mask) * ROW
        if y < table[row + HEIGHT]:
            place = np.int64(mask) * PLACE
            left = table[row + LEFT]
            top = table[row + TOP]
            to = table[row + OFFSET] + y * table[row + WIDTH]
            if pitch > 0:
                to = mask * out_plane + (top + y) * pitch + left
            x_first, x_step, first, low, high = place_along(places, place, columns)
            y_first, y_step, line_first, line_low, line_high = place_along(places, place + 1, rows)
            down = position_along(np.int32(top + y), y_first, y_step, line_first, line_low, line_high)
            upper, lower, share = line_of(mask, rows, columns, down)
            for x in range(table[row + WIDTH]):
                across = position_along(np.int32(left + x), x_first, x_step, first, low, high)
                out[to + x] = np.uint8(pasted_pixel(logits, upper, lower, share, columns, across, threshold))
