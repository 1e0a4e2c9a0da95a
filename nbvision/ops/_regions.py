"""Regions: which part of which source goes where on each canvas, made where the images are, but on the host for boxes
that live there.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError
from nbvision.image import ImageBatch, to_device
from nbvision.ops._taps import TapTables, Windows
from nbvision.ops.geometry import Geometry
from nbvision.runtime.compile import by_value, cpu_loop, load_kernel
from nbvision.runtime.device import Device, array_module, device_of, require_cupy

__all__ = ["Regions", "checked_host_boxes"]

_KNOWN_SIZES = 64  # sets of image sizes whose regions are kept; video has one, a shop's batches many

# A kernel, and what it takes of a plan: the margin, and the numbers of the fit.
_Launch: TypeAlias = tuple[Any, tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True)
class Regions:
    """Makes the geometry of canvases, and their tap tables where a plan has windows.

    Attributes
    ----------
    size : (int, int)
    fit : {"cover", "letterbox", "stretch"}
    cover_size : (int, int)
        What ``"cover"`` resizes to before it cuts.
    scaleup, center, linear : bool
    box_margin : numpy.float32
    windows : Windows or None
    """

    size: tuple[int, int]
    fit: str
    cover_size: tuple[int, int]
    scaleup: bool
    center: bool
    linear: bool
    box_margin: np.float32
    windows: Windows | None
    _known: OrderedDict[tuple[bytes, int], tuple[Geometry, TapTables | None]] = field(
        default_factory=OrderedDict, compare=False
    )
    _launches: dict[tuple[str, int], _Launch] = field(default_factory=dict, compare=False, repr=False)

    def on_host(self, batch: ImageBatch, boxes: Any, box_images: Any) -> tuple[Geometry, TapTables | None]:
        """Of whole images or boxes on the host."""
        geometry = self._of_host_boxes(batch.sizes, boxes, box_images) if boxes is not None else self.of(batch.sizes)
        return geometry, self._taps(geometry, _scales, geometry.regions)

    def on_device(
        self, batch: ImageBatch, boxes: Any, box_images: Any, stream: int
    ) -> tuple[Geometry, TapTables | None]:
        """Of whole images, boxes on the host, or boxes on the device, which never come to the host."""
        if boxes is None:
            return self._of_images_on_device(batch, stream)
        if device_of(boxes) == "cuda":
            return self._of_device_boxes(batch, boxes, box_images)
        host = self._of_host_boxes(batch.sizes, boxes, box_images)
        geometry = _on_device(host)
        return geometry, self._taps(geometry, _scales, host.regions)

    def of(self, sizes: npt.NDArray[np.int32]) -> Geometry:
        """Of whole images of these sizes, on the host."""
        geometry = _empty_geometry(len(sizes), "cpu")
        _loop("fill_regions_cpu")(_sources(sizes), *flat_tables(geometry), *self._fit_numbers())
        return geometry

    def _of_images_on_device(self, batch: ImageBatch, stream: int) -> tuple[Geometry, TapTables | None]:
        """Kept per set of sizes, so that a film or a repeated batch computes nothing; and per stream, so that no
        stream reads a table before another has filled it."""
        key = (batch.sizes.tobytes(), stream)
        known = self._known.get(key)
        if known is None:
            geometry = self._of_table(batch)
            known = geometry, self._taps(geometry, self._image_scales, batch.sizes)
            self._known[key] = known
            if len(self._known) > _KNOWN_SIZES:
                self._known.popitem(last=False)
        return known

    def _of_host_boxes(self, sizes: npt.NDArray[np.int32], boxes: Any, box_images: Any) -> Geometry:
        boxes, box_images = checked_host_boxes(boxes, box_images, sizes)
        geometry = _empty_geometry(len(boxes), "cpu")
        given = (_sources(sizes), box_images, boxes.reshape(-1), self.box_margin)
        _loop("fill_box_regions_cpu")(*given, *flat_tables(geometry), *self._fit_numbers())
        return geometry

    def _of_table(self, batch: ImageBatch) -> Geometry:
        """Of whole images, on their device."""
        geometry = _empty_geometry(len(batch), "cuda")
        if len(batch):
            kernel, _, numbers = self._launch_of("images", batch.table.device.id)
            arguments = (batch.table, np.int32(len(batch)), *tables_of(geometry), *numbers)
            kernel((-(-len(batch) // 64),), (64,), arguments)
        return geometry

    def _of_device_boxes(self, batch: ImageBatch, boxes: Any, box_images: Any) -> tuple[Geometry, TapTables | None]:
        cupy = require_cupy("boxes on a CUDA device")
        boxes = cupy.ascontiguousarray(to_device(boxes, "cuda"), dtype=np.float32)
        box_images = _box_images_or_zeros(box_images, boxes.shape, len(batch), cupy)
        geometry = _empty_geometry(len(boxes), "cuda")
        if len(boxes):
            kernel, margin, numbers = self._launch_of("boxes", boxes.device.id)
            arguments = (batch.table, box_images, boxes, np.int32(len(boxes)), *margin)
            kernel((-(-len(boxes) // 64),), (64,), (*arguments, *tables_of(geometry), *numbers))
        return geometry, self._taps(geometry, self._box_scales, batch.sizes)

    def _launch_of(self, what: Literal["images", "boxes"], device_id: int) -> _Launch:
        """Kept, for to look it up and to make the numbers takes longer than to launch it."""
        from nbvision_kernels.catalog import box_regions_kernel, image_regions_kernel

        if (what, device_id) not in self._launches:
            kernel = load_kernel({"images": image_regions_kernel, "boxes": box_regions_kernel}[what](), device_id)
            numbers = by_value(np.int32(number) for number in self._fit_numbers())
            self._launches[what, device_id] = kernel, by_value([self.box_margin]), numbers
        return self._launches[what, device_id]

    def _image_scales(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """(N, 2) source pixels to an output pixel along y and x, of whole images: what their regions, which are made on
        the device, will say.
        """
        sides = np.maximum(sizes, 1).astype(np.float64)
        new = np.broadcast_to(np.array(self.size, np.float64), sides.shape)
        if self.fit == "letterbox":
            ratio = (new / sides).min(axis=1, keepdims=True)
            new = np.clip(np.rint(sides * (ratio if self.scaleup else np.minimum(ratio, 1))), 1, new)
        if self.fit == "cover":
            height, width = np.array(self.cover_size, np.float64)
            exact_height = height * sides[:, 1] >= width * sides[:, 0]
            by_height = np.column_stack([np.full(len(sides), height), np.trunc(height * sides[:, 1] / sides[:, 0])])
            by_width = np.column_stack([np.trunc(width * sides[:, 0] / sides[:, 1]), np.full(len(sides), width)])
            new = np.maximum(np.where(exact_height[:, None], by_height, by_width), new)
        scales: npt.NDArray[np.float64] = sizes / new
        return scales

    def _box_scales(self, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """The most that any boxes in images of these sizes can have: what is known of boxes that live on the device.

        A side that a fit rounds to one pixel is scaled by at most twice its ratio.
        """
        most: npt.NDArray[np.float64] = sizes.max(axis=0, initial=1, keepdims=True) / np.array(self.size)
        return most if self.fit == "stretch" else np.full_like(most, 2 * most.max())

    def _taps(
        self,
        geometry: Geometry,
        scales: Callable[[npt.NDArray[np.int32]], npt.NDArray[np.float64]],
        known: npt.NDArray[np.int32],
    ) -> TapTables | None:
        """The tables of a geometry; how wide they must be, ``scales`` of what is ``known`` on the host says."""
        if self.windows is None:
            return None
        return self.windows.tables(geometry, self.size, self.windows.limits(scales(known)))

    def _fit_numbers(self) -> tuple[int, int, int, int, int, bool, bool, bool]:
        from nbvision_kernels.codes import FIT_COVER, FIT_LETTERBOX, FIT_STRETCH

        fit = {"cover": FIT_COVER, "letterbox": FIT_LETTERBOX, "stretch": FIT_STRETCH}[self.fit]
        return (*self.size, fit, *self.cover_size, self.scaleup, self.center, self.linear)


@functools.cache
def _loop(name: str) -> Any:
    from nbvision_kernels import regions

    return cpu_loop(name, getattr(regions, name), parallel=False)


def _sources(sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """A batch's table of which only the sizes are read."""
    sources = np.zeros((len(sizes), 4), np.int64)
    sources[:, 2:] = sizes
    return sources.reshape(-1)


def _empty_geometry(count: int, device: Device) -> Geometry:
    from nbvision_kernels.codes import FIELDS, SCALES, STEPS

    xp = array_module(device)
    regions, steps = xp.empty((count, FIELDS), np.int32), xp.empty((count, STEPS), np.int64)
    return Geometry(regions, steps, xp.empty((count, SCALES), np.float32), device)


def tables_of(geometry: Geometry) -> tuple[Any, Any, Any]:
    return geometry.regions, geometry.steps, geometry.scales


def flat_tables(geometry: Geometry) -> tuple[Any, ...]:
    return tuple(table.reshape(-1) for table in tables_of(geometry))


def _scales(regions: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """(N, 2) source pixels to an output pixel along y and x."""
    from nbvision_kernels.codes import HEIGHT, OUT_HEIGHT, OUT_WIDTH, WIDTH

    scales: npt.NDArray[np.float64] = regions[:, [HEIGHT, WIDTH]] / np.maximum(regions[:, [OUT_HEIGHT, OUT_WIDTH]], 1)
    return scales


def _on_device(geometry: Geometry) -> Geometry:
    cupy = require_cupy("a CUDA array")
    regions, steps, scales = (cupy.asarray(table) for table in tables_of(geometry))
    return Geometry(regions, steps, scales, "cuda")


def checked_host_boxes(
    boxes: Any, box_images: Any, sizes: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Boxes on the host as float32, each known to cover a part of its image."""
    try:
        boxes = np.ascontiguousarray(to_device(boxes, "cpu"), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"boxes are no array of numbers ({error}); expected (M, 4): x1, y1, x2, y2") from None
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    images = np.ascontiguousarray(_box_images_or_zeros(box_images, boxes.shape, len(sizes), np), dtype=np.int64)
    if len(images) and not (images.min() >= 0 and images.max() < len(sizes)):
        raise InputError(f"box_images go from {images.min()} to {images.max()}; the batch has {len(sizes)} images")
    height, width = sizes[images].T.astype(np.float32)
    x1, y1, x2, y2 = boxes.T
    good = (x1 < x2) & (y1 < y2) & (x2 > 0) & (y2 > 0) & (x1 < width) & (y1 < height)
    if not good.all():
        index = int(np.argmin(good))
        raise InputError(
            f"box {index} is {boxes[index].tolist()} in image {images[index]} of height {height[index]:.0f} and width "
            f"{width[index]:.0f}; expected x1 < x2 and y1 < y2 with a part inside the image"
        )
    return boxes, images


def _box_images_or_zeros(box_images: Any, box_shape: tuple[int, ...], image_count: int, xp: Any) -> Any:
    if len(box_shape) != 2 or box_shape[1] != 4:
        raise InputError(f"boxes have shape {box_shape}; expected (M, 4): x1, y1, x2, y2")
    if box_images is None:
        if image_count != 1 and box_shape[0]:
            raise InputError(f"box_images is missing; {image_count} images need the image of each box")
        return xp.zeros(box_shape[0], np.int64)
    box_images = xp.ascontiguousarray(to_device(box_images, "cpu" if xp is np else "cuda"))
    if box_images.shape != (box_shape[0],) or box_images.dtype.kind not in "iu":
        raise InputError(
            f"box_images have shape {box_images.shape} and dtype {box_images.dtype}; "
            f"expected ({box_shape[0]},) integers, one per box"
        )
    return box_images.astype(np.int64, copy=False)
