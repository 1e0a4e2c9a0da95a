"""Instance masks of a YOLO-style segmentation head: only the pixels of each box are computed and stored."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbvision.errors import InputError
from nbvision.image import to_device
from nbvision.ops.geometry import Geometry
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel
from nbvision.runtime.device import Device, array_module, device_of

__all__ = ["Masks", "instance_masks", "mask_table"]

_THREADS = 256
_BLOCKS_A_MASK = 8
_MAX_GRID_Y = 65535


@dataclass(frozen=True)
class Masks:
    """M masks of different sizes in one buffer.

    Attributes
    ----------
    pixels : (bytes,) uint8
        1 inside, 0 outside; row after row of each mask, mask after mask. Bytes from ``needed`` on mean nothing.
    table : (M, 5) int64
        Of each mask: where its pixels start, then height, width, x and y of its place on the canvas.
    needed : (1,) int64
        Bytes that all masks need.
    size : (int, int)
        Height and width of the canvas.
    device : {"cpu", "cuda"}
        Where the arrays are.
    """

    pixels: Any
    table: Any
    needed: Any
    size: tuple[int, int]
    device: Device

    def __len__(self) -> int:
        return int(self.table.shape[0])

    def overflowed(self) -> bool:
        """Whether ``limit_bytes`` was too small, so that some masks have no pixels. Waits for the device."""
        return int(self.needed[0]) > int(self.pixels.shape[0])

    def dense(self) -> Any:
        """(M, H, W) uint8 on the same device: every mask on a canvas of its own."""
        height, width = self.size
        shape = (len(self), height, width)
        out = memory.acquire(math.prod(shape), device=self.device).view(shape, dtype=np.uint8)
        if out.size and self.device == "cpu":
            _loop("dense_masks_cpu")(self.pixels, self.table.reshape(-1), len(self), height, width, out.reshape(-1))
        elif out.size:
            from nbvision_kernels.catalog import dense_masks_kernel

            grid = (-(-height * width // _THREADS), min(len(self), _MAX_GRID_Y))
            numbers = (np.int32(len(self)), np.int32(height), np.int32(width))
            load_kernel(dense_masks_kernel(), out.device.id)(
                grid, (_THREADS,), (self.pixels, self.table, *numbers, out)
            )
        return out

    def to_list(self) -> list[Any]:
        """Each mask's pixels on the host, (height, width) uint8. Waits for the device."""
        pixels, table = to_device(self.pixels, "cpu"), to_device(self.table, "cpu")
        return [
            pixels[start : start + height * width].reshape(height, width)
            for start, height, width, _, _ in table.tolist()
        ]


def instance_masks(
    coefficients: Any,
    prototypes: Any,
    boxes: Any,
    images: Any,
    geometry: Geometry | None = None,
    *,
    size: tuple[int, int],
    threshold: float = 0.5,
    limit_bytes: int | None = None,
) -> Masks:
    """Masks as ``sigmoid(coefficients @ prototypes)``, enlarged to the canvas and cropped to their boxes.

    One launch after the table of sizes: prototypes are combined where a box is, enlarged bilinearly with half-pixel
    centres (``align_corners=False``) as logits, and compared; nothing of canvas size is made in between.

    Parameters
    ----------
    coefficients : (M, K) float array
        One row a mask; its device is where the work is done.
    prototypes : (N, K, h, w) float array
    boxes : (M, 4) float array
        x1, y1, x2, y2 in canvas pixels, or in source pixels if ``geometry`` is given. A mask has the pixels whose row
        and column index is in its box.
    images : (M,) integer array
        Which of the N images each mask belongs to; a mask of another number is empty.
    geometry : Geometry, optional
        Of the detector's input: boxes in source pixels, such as those of :func:`nbvision.nms`, are mapped to the
        canvas.
    size : (int, int)
        Height and width of the canvas, the detector's input.
    threshold : float
        Probability over which a pixel is inside, between 0 and 1.
    limit_bytes : int, optional
        Room for all masks together. The first mask that does not fit and those after it have height and width 0, and
        :meth:`Masks.overflowed` says so. By default M canvases, which always suffice; boxes on a device have no sum
        that the host knows.

    Returns
    -------
    Masks
        On the same device; nothing waits on the host.

    Raises
    ------
    InputError
        If shapes, dtypes or options do not fit.
    """
    device = device_of(coefficients)
    xp = array_module(device)
    coefficients, prototypes, boxes, images = (
        to_device(array, device) for array in (coefficients, prototypes, boxes, images)
    )
    if coefficients.ndim != 2 or prototypes.ndim != 4 or prototypes.shape[1] != coefficients.shape[1]:
        raise InputError(
            f"coefficients have shape {coefficients.shape} and prototypes {prototypes.shape}; "
            "expected (M, K) and (N, K, h, w)"
        )
    masks, channels = coefficients.shape
    if boxes.shape != (masks, 4) or images.shape != (masks,) or images.dtype.kind not in "iu":
        raise InputError(
            f"boxes have shape {boxes.shape}, images {images.shape} and {images.dtype}; "
            f"expected ({masks}, 4) and integers ({masks},), one row a mask"
        )
    if any(array.dtype.kind != "f" for array in (coefficients, prototypes, boxes)):
        kinds = f"{coefficients.dtype}, {prototypes.dtype} and {boxes.dtype}"
        raise InputError(f"coefficients, prototypes and boxes are {kinds}; expected floats")
    count, _, rows, columns = prototypes.shape
    if geometry is not None and (geometry.device != device or len(geometry) != count):
        raise InputError(
            f"geometry has {len(geometry)} canvases on {geometry.device}; expected {count} on {device}, one an image"
        )
    height, width = size
    if not 0 < threshold < 1 or height < 1 or width < 1 or rows < 1 or columns < 1:
        raise InputError(
            f"threshold is {threshold}, size {size}, prototypes {prototypes.shape}; "
            "expected a probability and no empty side"
        )
    capacity = masks * height * width if limit_bytes is None else limit_bytes
    coefficients, prototypes, boxes = (
        xp.ascontiguousarray(array, dtype=np.float32) for array in (coefficients, prototypes, boxes)
    )
    images = xp.ascontiguousarray(images, dtype=np.int64)
    scales = boxes if geometry is None else geometry.scales
    pixels = memory.acquire(capacity, device=device).view((capacity,), dtype=np.uint8)
    where = (boxes, images, count, scales, geometry is not None)
    table, needed = mask_table(*where, size=(height, width), capacity=capacity, device=device)
    logit = np.float32(math.log(threshold / (1 - threshold)))
    canvas = (np.int32(height), np.int32(width))
    if masks and device == "cpu":
        planes = (coefficients.reshape(-1), prototypes.reshape(-1), images, table.reshape(-1))
        _loop("instance_masks_cpu")(*planes, masks, channels, rows, columns, *canvas, logit, pixels)
    elif masks:
        from nbvision_kernels.catalog import instance_masks_kernel
        from nbvision_kernels.codes import TILE_CELLS

        # A tile's first and last pixel fall between cells, which takes one more; one more is for rounding.
        tiles = [
            np.int32(min(max((TILE_CELLS - 3) * side // cells, 1), 64))
            for side, cells in ((height, rows), (width, columns))
        ]
        sizes = (np.int32(value) for value in (masks, channels, rows, columns))
        grid = (_BLOCKS_A_MASK, min(masks, _MAX_GRID_Y))
        arguments = (coefficients, prototypes, images, table, *sizes, *canvas, logit, *tiles, pixels)
        load_kernel(instance_masks_kernel(), coefficients.device.id)(grid, (_THREADS,), arguments)
    return Masks(pixels, table, needed, (height, width), device)


def mask_table(
    boxes: Any,
    images: Any,
    image_count: int,
    scales: Any,
    in_source: bool,
    *,
    size: tuple[int, int],
    capacity: int,
    device: Device,
) -> tuple[Any, Any]:
    """``table`` and ``needed`` of :class:`Masks` with the canvas pixels whose row and column index is in each box.

    Boxes are (M, 4) float32, images (M,) int64, scales (N, 6) float32, which is read if boxes are ``in_source``.
    """
    masks = len(boxes)
    table = memory.acquire(masks * 40, device=device).view((masks, 5), dtype=np.int64)
    needed = memory.acquire(8, device=device).view((1,), dtype=np.int64)
    needed.fill(0)
    numbers = (np.int32(masks), np.int32(size[0]), np.int32(size[1]), np.int64(capacity))
    where = (images, np.int32(image_count), scales.reshape(-1), np.int32(in_source))
    if masks and device == "cpu":
        _loop("mask_table_cpu")(boxes.reshape(-1), *where, *numbers, table.reshape(-1), needed)
    elif masks:
        from nbvision_kernels.catalog import mask_table_kernel
        from nbvision_kernels.codes import TABLE_THREADS

        kernel = load_kernel(mask_table_kernel(), boxes.device.id)
        kernel((1,), (TABLE_THREADS,), (boxes, *where, *numbers, table, needed))
    return table, needed


@functools.cache
def _loop(name: str) -> Any:
    from nbvision_kernels import instances

    return cpu_loop(name, getattr(instances, name), parallel=name != "mask_table_cpu")  # the table is one running sum
