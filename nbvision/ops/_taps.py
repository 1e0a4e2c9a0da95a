"""Tap tables: for each column and line of a canvas, the window of the source that it sums, with its weights."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nbvision.ops.geometry import Geometry
from nbvision.runtime import memory
from nbvision.runtime.compile import cpu_loop, load_kernel

if TYPE_CHECKING:
    from nbvision_kernels.catalog import NumbaKernel

__all__ = ["TapTables", "Windows", "windows_of"]

_MAX_GRID_Y = 65535


@dataclass(frozen=True)
class TapTables:
    """``x`` is (N, width, taps + 4) int32, ``y`` (N, height, taps + 4), entries as ``nbvision_kernels.resample`` and
    ``.window`` lay them out; ``numbers`` are the taps of x and y, and what else the kernel takes beside the tables."""

    x: Any
    y: Any
    numbers: tuple[np.int32, ...]


@dataclass(frozen=True)
class Windows:
    """One filter: what its tables are filled with, and how wide they must be.

    Attributes
    ----------
    loop, kernel : str
        What fills them on the host, a function of the kernels' module, and on the device, one of their catalogue.
    module : str
    kind : int
        The filter, in the module's words.
    support : float or None
        Half a window, in the wider of source and output pixels; None for a window of four source pixels.
    numbers : tuple of numpy.int32
        What else its kernel takes.
    """

    module: str
    loop: str
    kernel: str
    kind: int
    support: float | None
    numbers: tuple[np.int32, ...] = ()

    def limits(self, scales: npt.NDArray[np.float64]) -> tuple[np.int32, np.int32]:
        """Taps that the widest window can have, along x and y, in whole groups that may start before it; ``scales`` is
        (N, 2), source pixels to an output pixel along y and x."""
        y_scale, x_scale = scales.max(axis=0, initial=1)
        return self._taps_at(x_scale), self._taps_at(y_scale)

    def tables(self, geometry: Geometry, size: tuple[int, int], limits: tuple[np.int32, np.int32]) -> TapTables:
        """Windows and weights for every column and line of every canvas, made on the geometry's device."""
        from nbvision_kernels.codes import HEADER

        tables = []
        for vertical, (length, limit) in enumerate(zip(size[::-1], limits, strict=True)):
            shape = (len(geometry), length, int(limit) + HEADER)
            table = memory.acquire(math.prod(shape) * 4, device=geometry.device).view(shape, dtype=np.int32)
            numbers = [np.int32(number) for number in (length, limit, vertical, self.kind)]
            if geometry.device == "cpu":
                _loop(self.module, self.loop)(table.reshape(-1), geometry.regions.reshape(-1), *numbers)
            else:
                kernel = load_kernel(_kernel(self.kernel), table.device.id)
                for first in range(0, len(geometry), _MAX_GRID_Y):
                    part = slice(first, first + _MAX_GRID_Y)
                    grid = (-(-length // 64), len(table[part]))
                    kernel(grid, (64,), (table[part], geometry.regions[part], *numbers))
            tables.append(table)
        return TapTables(tables[0], tables[1], (*limits, *self.numbers))

    def _taps_at(self, scale: float) -> np.int32:
        from nbvision_kernels.codes import PACKED_TAPS, TAP_GROUP

        taps = 4 if self.support is None else math.ceil(self.support * max(scale, 1.0)) * 2 + 1
        group = PACKED_TAPS if self.module == "resample" else TAP_GROUP
        limit: np.int32 = np.int32(math.ceil((taps + group - 1) / group) * group)
        return limit


def windows_of(parity: str, interpolation: str) -> Windows | None:
    """The filter of a parity and an interpolation that has one."""
    from nbvision_kernels.codes import FILTERS, KINDS

    if parity.startswith("pil") or (parity, interpolation) == ("torch", "linear"):
        code, half_window = FILTERS[interpolation]
        width_first = np.int32(parity != "pil")  # only Pillow 13 at times begins with the height
        return Windows("resample", "fill_taps_cpu", "fill_taps_kernel", code, half_window, (width_first,))
    if (parity, interpolation) not in KINDS:
        return None
    kind, support = KINDS[parity, interpolation]
    return Windows("window", "fill_windows_cpu", "fill_windows_kernel", kind, support)


@functools.cache
def _loop(module: str, name: str) -> Any:
    import importlib

    return cpu_loop(name, getattr(importlib.import_module(f"nbvision_kernels.{module}"), name))


def _kernel(name: str) -> NumbaKernel:
    from nbvision_kernels import catalog

    kernel: NumbaKernel = getattr(catalog, name)()
    return kernel
