"""Boxes, names, scores and masks drawn on a batch, for people to look at."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError
from nbvision.image import CHANNELS, Color, ImageBatch, as_batch, interleaved_color, to_device
from nbvision.ops.boxes import Detections, FlatDetections
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import Device, array_module, device_of, require_cupy

__all__ = ["PALETTE", "draw"]

_COLORS = 20


def _palette_color(index: int) -> tuple[int, int, int]:
    """Steps of 7/20 around the colour circle: classes that follow each other differ much, hues side by side differ in
    lightness."""
    red, green, blue = colorsys.hls_to_rgb(index * 7 / _COLORS % 1, (0.42, 0.62)[index % 2], 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


PALETTE: tuple[tuple[int, int, int], ...] = tuple(_palette_color(index) for index in range(_COLORS))

_MAX_GRID_Z = 65535
_DARK_INK_FROM = 140  # luma of a colour on which text is black
_THREADS = 64


def draw(
    images: Any,
    boxes: Any = None,
    *,
    labels: Any = None,
    scores: Any = None,
    box_images: Any = None,
    names: Sequence[str] | None = None,
    masks: Any = None,
    mask_regions: Any = None,
    mask_threshold: float = 0.0,
    color: Any = None,
    thickness: int = 2,
    opacity: float = 0.45,
    font: str | None = None,
    font_size: int = 14,
    out: ImageBatch | None = None,
) -> ImageBatch:
    """Draw detections on images: outlines, names with scores, and masks.

    Both devices give the same bytes. On CUDA nothing waits on the host and nothing comes back to it: labels, scores
    and counts may live on the device, and the kernel puts the text together.

    Parameters
    ----------
    images : ImageBatch, array or iterable of arrays
        See :func:`nbvision.as_batch`. Where they are, the drawing is done.
    boxes : Detections, FlatDetections or (M, 4) array, optional
        In pixels of the images, rounded to whole ones. Detections bring labels, scores and images with them. A box
        that is NaN, inverted, without a whole pixel or outside its image is not drawn.
    labels : (M,) integer array, optional
        Choose colour and name.
    scores : (M,) float array, optional
        Written with two digits; below 0 as ``<0``, above 1 as ``>1``. The best lies on top; without scores, the first.
    box_images : (M,) integer array, optional
        The image of each box; may be left out for a single image. A box of no image of the batch is not drawn if the
        array is on a CUDA device, and an error if it is on the host.
    names : sequence of str, optional
        One per label. A label beyond them is drawn without a name.
    masks : (M, H, W), (M, 1, H, W) or, with Detections, (N, K, H, W) array, optional
        One per box, of a mask head on crops: logits, probabilities, or 0 and 1. Each is stretched over its region, so
        that pixels covered by half or more are tinted.
    mask_regions : array of the boxes' shape, optional
        Where each mask lies in its image; default: its box. For crops with a margin, or letterboxed ones, what
        :meth:`Geometry.to_source <nbvision.Geometry.to_source>` gives of the whole canvas; for masks of the image's
        size, the whole image.
    mask_threshold : float
        More is inside: 0 for logits and for 0 and 1, 0.5 for probabilities.
    color : (3,) or (P, 3) sequence of int, optional
        Red, green, blue of 0..255 whatever the order in the images; row ``label % P`` is taken. Default: ``PALETTE``,
        20 colours. On gray images the luma is drawn.
    thickness : int
        Pixels of the outline, which lies inside the box; 0 draws none.
    opacity : float
        Of masks, 0..1.
    font : str, optional
        Path of a TrueType or OpenType font. Default: the one that Pillow brings, which knows ASCII only.
    font_size : int
        Pixels, 1..256.
    out : ImageBatch, optional
        Where to draw, of the images' sizes, colour order and device; ``images`` itself for drawing in place.

    Returns
    -------
    ImageBatch
        ``out``, or a new one. Missing images stay missing, with their errors.

    Raises
    ------
    InputError
        If shapes, dtypes, ranges or devices do not fit.

    Examples
    --------
    >>> import numpy as np, nbvision as nbv
    >>> image = np.zeros((60, 90, 3), np.uint8)
    >>> drawn = nbv.draw(image, [[10, 20, 80, 55]], labels=[0], scores=[0.87], names=["shirt"])
    >>> drawn[0].shape
    (60, 90, 3)
    """
    batch = as_batch(images)
    order = interleaved_color(batch)
    device = batch.device
    listed = _listed(boxes, labels, scores, box_images, batch)
    planes, regions = _checked_masks(masks, mask_regions, listed, device)
    numbers = _Numbers(
        thickness=np.int32(_in_range("thickness", thickness, 0, 1 << 16, whole=True)),
        threshold=np.float32(_in_range("mask_threshold", mask_threshold, -np.inf, np.inf)),
        opacity=np.int32(round(_in_range("opacity", opacity, 0, 1) * 255)),
    )
    colors = PALETTE if color is None else _checked_colors(color)
    captions = _checked_names(names)
    font_size = int(_in_range("font_size", font_size, 1, 256, whole=True))
    target = _target(batch, out)
    stream = None
    if device == "cuda":
        stream = batch.use_on_current_stream()
        target.use_on_current_stream()
    place = None if stream is None else (listed.rows.device.id, stream.ptr)
    tables = _tables(captions, font, font_size, colors, order, place)
    if len(batch):
        (_draw_cpu if device == "cpu" else _draw_cuda)(batch, target, listed, planes, regions, numbers, tables)
    return target


# --- the two devices --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    thickness: np.int32
    threshold: np.float32
    opacity: np.int32


@dataclass(frozen=True)
class _Listed:
    """M detections on the batch's device, and for each image which of them are its own, best first."""

    boxes: Any  # (M, 4) float32
    labels: Any  # (M,) int32
    scores: Any  # (M,) float32, or None
    images: Any  # (M,) int32
    rows: Any  # (M,) int32: image i has rows[starts[i] : starts[i] + counts[i]]
    starts: Any  # (N,) int32
    counts: Any  # (N,) int32
    lead: tuple[int, ...]  # (M,) or (N, K): how the caller counts them


@dataclass(frozen=True)
class _Tables:
    """Text as strips of coverage, and the palette; see :mod:`nbvision_kernels.draw`."""

    atlas: Any
    strips: Any
    palette: Any
    names: int
    colors: int
    text_height: int
    padding: int


def _draw_cpu(
    batch: ImageBatch, target: ImageBatch, listed: _Listed, masks: Any, regions: Any, numbers: _Numbers, tables: _Tables
) -> None:
    records = _records(listed, "cpu")
    arguments = _lay_out_arguments(batch, listed, regions, tables, records)
    _loop("lay_out_cpu", parallel=False)(*(_flat(argument) for argument in arguments))
    arguments = (
        np.int64(0),
        batch.table,
        target.table,
        len(batch),
        int(batch.sizes[:, 0].max()),
        np.int32(batch.channels),
        *(listed.rows, listed.starts, listed.counts),
        *_paint_arguments(records, masks, numbers, tables),
    )
    _loop("paint_cpu", parallel=True)(*(_flat(argument) for argument in arguments))


def _draw_cuda(
    batch: ImageBatch, target: ImageBatch, listed: _Listed, masks: Any, regions: Any, numbers: _Numbers, tables: _Tables
) -> None:
    from nbvision_kernels.catalog import lay_out_kernel, paint_kernel
    from nbvision_kernels.codes import DRAW_TILE_HEIGHT, DRAW_TILE_WIDTH

    device_id = listed.rows.device.id
    records = _records(listed, "cuda")
    count = len(listed.rows)
    if count:
        kernel = load_kernel(lay_out_kernel(), device_id)
        arguments = _lay_out_arguments(batch, listed, regions, tables, records)
        kernel((-(-count // _THREADS),), (_THREADS,), arguments)
    height, width = batch.sizes.max(axis=0).tolist()
    if not height:
        return
    kernel = load_kernel(paint_kernel(), device_id)
    last = _paint_arguments(records, masks, numbers, tables)
    for first in range(0, len(batch), _MAX_GRID_Z):
        part = slice(first, first + _MAX_GRID_Z)
        lists = (listed.rows, listed.starts[part], listed.counts[part])
        arguments = (0, batch.table[part], target.table[part], np.int32(batch.channels), *lists, *last)
        grid = (-(-width // DRAW_TILE_WIDTH), -(-height // DRAW_TILE_HEIGHT), len(batch.sizes[part]))
        kernel(grid, (DRAW_TILE_WIDTH, DRAW_TILE_HEIGHT), arguments)


def _records(listed: _Listed, device: Device) -> Any:
    from nbvision_kernels.codes import DRAW_FIELDS

    count = len(listed.rows)
    return memory.acquire(count * DRAW_FIELDS * 4, device=device).view((count, DRAW_FIELDS), dtype=np.int32)


def _lay_out_arguments(
    batch: ImageBatch, listed: _Listed, regions: Any, tables: _Tables, records: Any
) -> tuple[Any, ...]:
    scores = listed.boxes if listed.scores is None else listed.scores  # of the right type, and never read
    return (
        np.int32(len(listed.rows)),
        batch.table,
        listed.images,
        np.int32(len(batch)),
        listed.boxes,
        regions,
        listed.labels,
        scores,
        np.int32(listed.scores is not None),
        np.int32(tables.names),
        tables.strips,
        np.int32(tables.text_height),
        np.int32(tables.padding),
        np.int32(tables.colors),
        records,
    )


def _paint_arguments(records: Any, masks: Any, numbers: _Numbers, tables: _Tables) -> tuple[Any, ...]:
    return (
        records,
        tables.palette,
        numbers.thickness,
        masks,
        np.int32(masks.shape[1]),
        np.int32(masks.shape[2]),
        numbers.threshold,
        numbers.opacity,
        tables.atlas,
        tables.strips,
        np.int32(tables.text_height),
        np.int32(tables.padding),
    )


def _flat(argument: Any) -> Any:
    return argument.reshape(-1) if isinstance(argument, np.ndarray) else argument


@functools.cache
def _loop(name: str, *, parallel: bool) -> Any:
    from nbvision_kernels import draw as kernels

    return cpu_loop(f"draw-{name}", getattr(kernels, name), parallel=parallel)


# --- detections -------------------------------------------------------------------------------------------------------


def _listed(boxes: Any, labels: Any, scores: Any, box_images: Any, batch: ImageBatch) -> _Listed:
    if isinstance(boxes, Detections | FlatDetections):
        if not (labels is None and scores is None and box_images is None):
            raise InputError("labels, scores or box_images came with Detections, which have their own; leave them out")
        if isinstance(boxes, Detections):
            return _listed_by_image(boxes, batch)
        boxes, labels, scores, box_images = boxes.boxes, boxes.labels, boxes.scores, boxes.images
    device = batch.device
    xp = array_module(device)
    boxes = _numbers_on(device, "boxes", np.zeros((0, 4)) if boxes is None else boxes, np.float32)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"boxes have shape {boxes.shape}; expected (M, 4): x1, y1, x2, y2")
    count = len(boxes)
    labels = xp.zeros(count, np.int32) if labels is None else _one_per_box("labels", labels, count, device, np.int32)
    order = xp.arange(count)
    if scores is not None:
        scores = _one_per_box("scores", scores, count, device, np.float32)
        order = xp.argsort(-scores, kind="stable")
    images = _box_images(box_images, count, batch)
    order = order[xp.argsort(images[order], kind="stable")]
    edges = xp.searchsorted(images[order], xp.arange(len(batch) + 1, dtype=np.int32)).astype(np.int32)
    rows = order.astype(np.int32)
    return _Listed(boxes, labels, scores, images, rows, edges[:-1], edges[1:] - edges[:-1], (count,))


def _listed_by_image(found: Detections, batch: ImageBatch) -> _Listed:
    device = batch.device
    xp = array_module(device)
    if len(found) != len(batch):
        raise InputError(f"detections are of {len(found)} images; the batch has {len(batch)}")
    images, most = found.boxes.shape[:2]
    boxes = _numbers_on(device, "boxes", found.boxes, np.float32).reshape(images * most, 4)
    labels = _numbers_on(device, "labels", found.labels, np.int32).reshape(-1)
    scores = _numbers_on(device, "scores", found.scores, np.float32).reshape(-1)
    counts = xp.clip(_numbers_on(device, "counts", found.counts, np.int32), 0, most).astype(np.int32, copy=False)
    rows = xp.arange(images * most, dtype=np.int32)
    starts = xp.arange(images, dtype=np.int32) * np.int32(most)
    return _Listed(boxes, labels, scores, rows // np.int32(max(most, 1)), rows, starts, counts, (images, most))


def _box_images(box_images: Any, count: int, batch: ImageBatch) -> Any:
    if box_images is None:
        if len(batch) != 1 and count:
            raise InputError(f"box_images is missing; {len(batch)} images need the image of each box")
        return array_module(batch.device).zeros(count, np.int32)
    given_on = device_of(box_images)
    images = _one_per_box("box_images", box_images, count, given_on, np.int32)
    if given_on == "cpu" and count and not (images.min() >= 0 and images.max() < len(batch)):
        raise InputError(f"box_images go from {images.min()} to {images.max()}; the batch has {len(batch)} images")
    return to_device(images, batch.device)


def _checked_masks(masks: Any, regions: Any, listed: _Listed, device: Device) -> tuple[Any, Any]:
    """Masks as (M, H, W) float32, (M, 0, 0) where there are none; and their regions as (M, 4) float32."""
    count = len(listed.rows)
    if regions is None:
        regions = listed.boxes
    else:
        regions = _numbers_on(device, "mask_regions", regions, np.float32)
        if regions.shape not in {(count, 4), (*listed.lead, 4)}:
            raise InputError(f"mask_regions have shape {regions.shape}; expected {(*listed.lead, 4)}, one per box")
        regions = regions.reshape(count, 4)
    if masks is None:
        return array_module(device).zeros((count, 0, 0), np.float32), regions
    masks = _numbers_on(device, "masks", masks, np.float32)
    if masks.ndim < 3 or masks.shape[:-2] not in {(count,), (count, 1), listed.lead} or 0 in masks.shape[-2:]:
        raise InputError(f"masks have shape {masks.shape}; expected {(*listed.lead, 'H', 'W')}, one mask per box")
    return masks.reshape(count, *masks.shape[-2:]), regions


def _one_per_box(name: str, values: Any, count: int, device: Device, dtype: type[np.generic]) -> Any:
    values = _numbers_on(device, name, values, dtype)
    if values.size == 0:
        values = values.reshape(-1)
    if values.shape != (count,):
        raise InputError(f"{name} have shape {values.shape}; expected ({count},), one per box")
    return values


def _numbers_on(device: Device, name: str, values: Any, dtype: type[np.generic]) -> Any:
    """A contiguous array of ``dtype`` on ``device``; integers beyond int32 become its limits."""
    try:
        array = to_device(values, device)
        kinds = "iu" if dtype is np.int32 and array.size else "fiub"
        if array.dtype.kind not in kinds:
            raise TypeError(f"dtype {array.dtype}")
    except (TypeError, ValueError) as error:
        wanted = "integers" if dtype is np.int32 else "numbers"
        raise InputError(f"{name} are no array of {wanted} ({error})") from None
    xp = array_module(device)
    if dtype is np.int32 and array.dtype.itemsize > 2 and array.dtype != np.int32:
        limits = np.iinfo(np.int32)
        low = limits.min if array.dtype.kind != "u" else 0
        array = xp.clip(array, low, limits.max)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
        return xp.ascontiguousarray(array, dtype=dtype)


# --- options ----------------------------------------------------------------------------------------------------------


def _target(batch: ImageBatch, out: ImageBatch | None) -> ImageBatch:
    if out is None:
        target = ImageBatch.allocate(batch.sizes, color=interleaved_color(batch), device=batch.device)
        target.errors = batch.errors
        return target
    if not isinstance(out, ImageBatch):
        raise InputError(f"out is a {type(out).__name__}; expected an ImageBatch: ImageBatch.from_arrays wraps arrays")
    if out.color != batch.color or out.device != batch.device or not np.array_equal(out.sizes, batch.sizes):
        raise InputError(
            f"out is {out!r} with sizes {out.sizes.tolist()}; expected {batch.color} images on {batch.device} of sizes "
            f"{batch.sizes.tolist()}"
        )
    if out.device == "cpu" and not all(out[int(index)].flags.writeable for index in np.flatnonzero(out.ok)):
        raise InputError("out has read-only images; expected arrays that can be written")
    return out


def _in_range(name: str, value: float, low: float, high: float, *, whole: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not low <= number <= high or (whole and number != int(number)):
        raise InputError(f"{name} is {value!r}; expected {'a whole' if whole else 'a'} number from {low} to {high}")
    return number


def _checked_names(names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(f"names are {names!r}; expected several strings, one per label")
    names = tuple(names)
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"name {index} is {name!r}; expected a string")
    return names


def _checked_colors(color: Any) -> tuple[tuple[int, int, int], ...]:
    try:
        array = np.asarray(color)
    except ValueError:
        array = np.zeros(0)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[1] != 3 or not len(array) or array.dtype.kind not in "iu":
        raise InputError(f"color is {color!r}; expected three integers, or rows of three: red, green, blue")
    if array.min() < 0 or array.max() > 255:
        raise InputError(f"color goes from {array.min()} to {array.max()}; expected 0 to 255")
    return tuple((int(red), int(green), int(blue)) for red, green, blue in array)


# --- tables -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _tables(
    names: tuple[str, ...],
    font: str | None,
    font_size: int,
    colors: tuple[tuple[int, int, int], ...],
    order: Color,
    place: tuple[int, int] | None,
) -> _Tables:
    """The tables on the host, or, for a device and a stream, uploaded on it: no stream reads another's upload."""
    atlas, strips, text_height = _text(names, font, font_size)
    palette = _palette(colors, order)
    if place is not None:
        cupy = require_cupy("a CUDA array")
        atlas, strips, palette = cupy.asarray(atlas), cupy.asarray(strips), cupy.asarray(palette)
    padding = -(-font_size // 4)
    return _Tables(atlas, strips, palette, len(names), len(colors), text_height, padding)


@functools.lru_cache(maxsize=16)
def _text(
    names: tuple[str, ...], font: str | None, font_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32], int]:
    """Every text there can be, as Pillow draws it: the names, the scores in hundredths, and what is no such score."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        face = ImageFont.load_default(font_size) if font is None else ImageFont.truetype(font, font_size)
    except OSError as error:
        raise InputError(f"font {font!r} cannot be read ({error}); expected the path of a font file") from None
    text_height = sum(face.getmetrics()) if isinstance(face, ImageFont.FreeTypeFont) else font_size
    pieces, strips, start = [], [], 0
    for text in (*names, *(f"{value / 100:.2f}" for value in range(101)), "<0", ">1", "nan"):
        left, _, right, _ = face.getbbox(text)
        indent = max(-int(left), 0)  # of a letter that reaches back over its origin
        strip = Image.new("L", (int(right) + indent, text_height))
        ImageDraw.Draw(strip).text((indent, 0), text, fill=255, font=face)
        pieces.append(np.asarray(strip, np.uint8).reshape(-1))
        strips.append((start, strip.width))
        start += len(pieces[-1])
    return np.concatenate(pieces), np.array(strips, np.int32), text_height


def _palette(colors: tuple[tuple[int, int, int], ...], order: Color) -> npt.NDArray[np.uint8]:
    """(P, 8): each colour and the ink of text on it, in the images' channel order; alpha is full."""
    rgb = np.array(colors, np.int64)
    luma = (rgb @ [299, 587, 114] + 500) // 1000
    ink = np.where(luma < _DARK_INK_FROM, 255, 0)
    table = np.full((len(colors), 8), 255, np.uint8)
    if order == "gray":
        table[:, 0] = luma
    else:
        table[:, :3] = rgb if order[:3] == "rgb" else rgb[:, ::-1]
    table[:, 4 : 4 + min(CHANNELS[order], 3)] = ink[:, None]
    return table
