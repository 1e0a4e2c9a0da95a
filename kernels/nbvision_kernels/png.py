"""PNG's line filters undone: what is stored of a byte is how it differs from its neighbours to the left and above.

Formulas: PNG, third edition (W3C), section 9.  Channels do not mix, so each is written where the caller wants it, and
one that nobody wants costs nothing.
"""

from __future__ import annotations

import numpy as np

from nbvision_kernels.pixel import compiled_apart, pixel_function

__all__ = ["FILTERS", "make_cpu_loop"]

FILTERS = 5  # none, from the left, from above, from the average of the two, Paeth's


@pixel_function
def byte_of(value):
    return np.int32(value & np.int32(255))


@pixel_function
def paeth(left, above, corner):
    """The one of the three nearest to ``left + above - corner``; of two as near the first.

    The distances are |above - corner|, |left - corner| and their signed sum's.  Let ``low <= high`` be left and above.
    The corner is the nearest only where it lies between them, that is where ``left + above - corner`` does; written out
    for both ends that is one comparison each with ``t = 3 * corner - left - above``.  So no branch is taken, and little
    waits for ``left``, the byte that was only just made.
    """
    t = np.int32(np.int32(np.int32(3) * corner) - np.int32(left + above))
    low, high = min(left, above), max(left, above)
    nearest = low if high <= t else corner
    return high if t <= low else nearest


def make_cpu_loop(stored, channels, red):
    """``undo(lines, pixels)`` for one image, in the calling thread.

    ``lines`` is (H, 1 + W * stored) uint8, each line with its filter first; ``pixels`` is (H, W, channels) uint8.  Both
    have 3 or 4 channels, of which red is at 0 in ``lines`` and at ``red``, 0 or 2, in ``pixels``.  Alpha that is not
    stored is 255.
    """
    blue = 2 - red
    has_alpha = stored == 4 and channels == 4
    fills_alpha = stored == 3 and channels == 4
    is_copy = stored == channels and red == 0

    @compiled_apart
    def undo_none(line, row):
        if is_copy:
            for at in range(row.size):
                row[at] = line[at]
        else:
            for x in range(row.size // channels):
                row[x * channels + red] = line[x * stored]
                row[x * channels + 1] = line[x * stored + 1]
                row[x * channels + blue] = line[x * stored + 2]
                if has_alpha:
                    row[x * channels + 3] = line[x * stored + 3]

    @compiled_apart
    def undo_left(line, row):
        r = g = b = a = np.uint8(0)
        for x in range(row.size // channels):
            r = np.uint8(r + line[x * stored])
            g = np.uint8(g + line[x * stored + 1])
            b = np.uint8(b + line[x * stored + 2])
            row[x * channels + red], row[x * channels + 1], row[x * channels + blue] = r, g, b
            if has_alpha:
                a = np.uint8(a + line[x * stored + 3])
                row[x * channels + 3] = a

    @compiled_apart
    def undo_above(line, row, above):
        if is_copy:
            for at in range(row.size):
                row[at] = np.uint8(line[at] + above[at])
        else:
            for x in range(row.size // channels):
                at = x * channels
                row[at + red] = np.uint8(line[x * stored] + above[at + red])
                row[at + 1] = np.uint8(line[x * stored + 1] + above[at + 1])
                row[at + blue] = np.uint8(line[x * stored + 2] + above[at + blue])
                if has_alpha:
                    row[at + 3] = np.uint8(line[x * stored + 3] + above[at + 3])

    @compiled_apart
    def undo_average(line, row, above):
        r = g = b = a = np.int32(0)
        for x in range(row.size // channels):
            at = x * channels
            r = byte_of(np.int32(np.int32(r + np.int32(above[at + red])) >> 1) + np.int32(line[x * stored]))
            g = byte_of(np.int32(np.int32(g + np.int32(above[at + 1])) >> 1) + np.int32(line[x * stored + 1]))
            b = byte_of(np.int32(np.int32(b + np.int32(above[at + blue])) >> 1) + np.int32(line[x * stored + 2]))
            row[at + red], row[at + 1], row[at + blue] = r, g, b
            if has_alpha:
                a = byte_of(np.int32(np.int32(a + np.int32(above[at + 3])) >> 1) + np.int32(line[x * stored + 3]))
                row[at + 3] = a

    @compiled_apart
    def undo_paeth(line, row, above):
        r = g = b = a = np.int32(0)
        corner_r = corner_g = corner_b = corner_a = np.int32(0)
        for x in range(row.size // channels):
            at = x * channels
            above_r, above_g, above_b = np.int32(above[at + red]), np.int32(above[at + 1]), np.int32(above[at + blue])
            r = byte_of(paeth(r, above_r, corner_r) + np.int32(line[x * stored]))
            g = byte_of(paeth(g, above_g, corner_g) + np.int32(line[x * stored + 1]))
            b = byte_of(paeth(b, above_b, corner_b) + np.int32(line[x * stored + 2]))
            corner_r, corner_g, corner_b = above_r, above_g, above_b
            row[at + red], row[at + 1], row[at + blue] = r, g, b
            if has_alpha:
                above_a = np.int32(above[at + 3])
                a = byte_of(paeth(a, above_a, corner_a) + np.int32(line[x * stored + 3]))
                corner_a = above_a
                row[at + 3] = a

    def undo(lines, pixels):
        row_bytes = pixels.shape[1] * channels
        above = np.zeros(row_bytes, np.uint8)  # of the first line
        for y in range(pixels.shape[0]):
            line, row, kind = lines[y, 1:], pixels[y].reshape(row_bytes), lines[y, 0]
            if kind == 0:
                undo_none(line, row)
            elif kind == 1:
                undo_left(line, row)
            elif kind == 2:
                undo_above(line, row, above)
            elif kind == 3:
                undo_average(line, row, above)
            else:
                undo_paeth(line, row, above)
            if fills_alpha:
                for x in range(pixels.shape[1]):
                    row[x * channels + 3] = np.uint8(255)
            above = row

    return undo
