"""Numbers on which kernels and their callers agree: codes, fields of tables, sizes of blocks.

Imports nothing of Numba, nor does ``catalog.py``: a kernel that is compiled already is found and launched without it.
Numba takes a quarter of a second to import.
"""

from __future__ import annotations

import numpy as np

# --- regions: a row of each of three tables for each canvas -----------------------------------------------------------

# Fields of a row of `regions`. The source region is (X, Y, WIDTH, HEIGHT); it is resized to (OUT_WIDTH, OUT_HEIGHT) and
# placed at (LEFT, TOP) of the canvas. A row is three loads of 16 bytes; the last three numbers are unused. In all of
# these tables what is of y comes right after what is of x; regions.py counts on it.
IMAGE, X, Y, WIDTH, HEIGHT, LEFT, TOP, OUT_WIDTH, OUT_HEIGHT = range(9)
FIELDS = 12

# Fields of a row of `steps`: positions in fixed point, see sampling.py.
STEP_X, START_X, STEP_Y, START_Y = range(4)
STEPS = 4

# Fields of a row of `scales`: UNIT is the worth of a step's last bit; canvas -> source is x * SCALE_X + OFFSET_X.
UNIT_X, UNIT_Y, SCALE_X, SCALE_Y, OFFSET_X, OFFSET_Y = range(6)
SCALES = 6

FIT_STRETCH, FIT_LETTERBOX, FIT_COVER = 0, 1, 2

# --- the fused plan ---------------------------------------------------------------------------------------------------

NEAREST, LINEAR_EXACT, LINEAR_FAST = 0, 1, 2
NCHW, NHWC, NHWC4, GRAY = range(4)  # NHWC4 has a fourth channel, of zeros; gray has the first alone
OUT_CHANNELS = {NHWC4: 4, GRAY: 1}  # of the others 3
STORE_U8, STORE_F16, STORE_F32, STORE_HALF_BITS, STORE_I8, STORE_BF16 = range(6)
# How a source lies in memory: bytes side by side, planes of bytes, halves or floats side by side, or NV12.
SOURCE_U8, SOURCE_CHW, SOURCE_F16, SOURCE_F32, SOURCE_NV12 = range(5)


def pixel_bytes_of(source_type, channels):
    """Bytes from a pixel to the next on its line."""
    if source_type in (SOURCE_CHW, SOURCE_NV12):
        return 1
    return channels * {SOURCE_F16: 2, SOURCE_F32: 4}.get(source_type, 1)


def canvas_strides(layout, height, width):
    """Values from a canvas to the next, from a pixel to the next, from a channel to the next; and channels stored."""
    plane, channels = height * width, OUT_CHANNELS.get(layout, 3)
    if layout == NCHW:
        return np.int64(channels * plane), np.int64(1), np.int64(plane), np.int64(channels)
    return np.int64(channels * plane), np.int64(channels), np.int64(1), np.int64(channels)


# --- NV12 -------------------------------------------------------------------------------------------------------------

SHIFT = 20  # bits behind the point of fixed-point numbers: OpenCV's, for all matrices
_ONE = 1 << SHIFT


def _fixed_point(kr, kb, *, full_range):
    """The fixed-point numbers of a standard from the shares of red and blue in its luma."""
    kg = 1 - kr - kb
    luma, chroma = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    to_r, to_b = 2 * (1 - kr) * chroma, 2 * (1 - kb) * chroma
    factors = (luma, to_r, -to_b * kb / kg, -to_r * kr / kg, to_b)
    return (0 if full_range else 16, *(round(factor * _ONE) for factor in factors))


# ``(luma_zero, luma_gain, v_to_r, u_to_g, v_to_g, u_to_b)``
MATRICES = {
    "bt601": (16, 1220542, 1673527, -409993, -852492, 2116026),  # OpenCV's, of factors with three decimals
    "bt601-full": _fixed_point(0.299, 0.114, full_range=True),
    "bt709": _fixed_point(0.2126, 0.0722, full_range=False),
    "bt709-full": _fixed_point(0.2126, 0.0722, full_range=True),
}


def matrix_numbers(name, *, exact):
    """A matrix as a kernel takes it: int32 for ``nv12.exact_rgb``, float32 for ``nv12.fast_rgb``."""
    zero, *factors = MATRICES[name]
    if exact:
        return tuple(np.int32(number) for number in (zero, *factors))
    return (np.float32(zero), *(np.float32(factor / _ONE) for factor in factors))


# --- filters and windows: tap tables ----------------------------------------------------------------------------------

FILTER_BOX, FILTER_LINEAR, FILTER_HAMMING, FILTER_CUBIC, FILTER_LANCZOS = range(5)
FILTERS = {  # interpolation -> code, and half a window in output pixels
    "box": (FILTER_BOX, 0.5),
    "linear": (FILTER_LINEAR, 1.0),
    "hamming": (FILTER_HAMMING, 1.0),
    "cubic": (FILTER_CUBIC, 2.0),
    "lanczos": (FILTER_LANCZOS, 3.0),
}
HEADER = 4  # numbers of an entry before its weights, so that these can be read 16 bytes at a time
TAP_GROUP, PACKED_TAPS = 4, 8  # tables are whole groups, which is what a frame reads at once; of packed ones eight
TAP_WEIGHT_BITS = 22  # of a filter's weight, in fixed point as Pillow has it

CV2_AREA, CV2_CUBIC, TORCH_CUBIC = range(3)
# parity, interpolation -> kind, and half a window in the wider of source and output pixels; None is four source pixels
KINDS = {
    ("cv2", "area"): (CV2_AREA, 0.5),
    ("cv2", "cubic"): (CV2_CUBIC, None),
    ("torch", "cubic"): (TORCH_CUBIC, 2.0),
}

# --- warps ------------------------------------------------------------------------------------------------------------

WARP_NEAREST, WARP_LINEAR, WARP_CUBIC = 0, 1, 2
COEFFICIENTS = 9  # of a matrix

# --- one byte at a time -----------------------------------------------------------------------------------------------

COLOR, THRESHOLD, ADD_WEIGHTED, BLEND_BYTES, BLEND_FLOATS, LUT = range(6)
OPERATIONS = {
    COLOR: "color",
    THRESHOLD: "threshold",
    ADD_WEIGHTED: "add-weighted",
    BLEND_BYTES: "blend-bytes",
    BLEND_FLOATS: "blend-floats",
    LUT: "lut",
}
THRESHOLDS = {"binary": 0, "binary_inv": 1, "trunc": 2, "tozero": 3, "tozero_inv": 4}  # as OpenCV numbers them

# --- drawing ----------------------------------------------------------------------------------------------------------

DRAW_FIELDS = 15  # of a record, see draw.py

# --- blocks of threads ------------------------------------------------------------------------------------------------

LINE_THREADS = (
    32,
    56,
)  # of the plan's blocks, each for four pixels: for canvases of any width, and of 224 columns or so
WARP_TILE, WARP_LINES = 32, 8
RESAMPLE_LINES, RESAMPLE_WARPS = 16, 4
MOVE_LINES = 8  # lines of threads; each moves four lines of a square tile
MASK_BLOCK_WIDTH, MASK_BLOCK_LINES = 32, 8
TILE_CELLS = 16  # a side of a tile of instance masks
TABLE_THREADS = 512
DRAW_TILE_WIDTH, DRAW_TILE_HEIGHT = 32, 8
POINTWISE_BLOCK = 256
SOFT_THREADS = 256
