"""Where each canvas of a preprocessed batch came from, so that boxes find their way back."""

from __future__ import annotations

from typing import Any

from nbvision.errors import InputError
from nbvision.image import to_device
from nbvision.runtime.device import Device, array_module

__all__ = ["Geometry", "checked_geometry"]


class Geometry:
    """The map from N canvases back to their sources.

    Attributes
    ----------
    regions : (N, 12) int32 array on ``device``
        Source image, source region and placement of each canvas; the columns of this table and the next two are
        those of ``nbvision_kernels.codes``.
    steps : (N, 4) int64 array on ``device``
        Source positions in fixed point.
    scales : (N, 6) float32 array on ``device``
        ``x_source = x_canvas * scales[:, 2] + scales[:, 4]``, likewise y with columns 3 and 5.
    device : {"cpu", "cuda"}
    """

    def __init__(self, regions: Any, steps: Any, scales: Any, device: Device) -> None:
        self.regions = regions
        self.steps = steps
        self.scales = scales
        self.device: Device = device

    def __len__(self) -> int:
        return int(self.regions.shape[0])

    @property
    def images(self) -> Any:
        """(N,) int32: the source image of each canvas."""
        return self.regions[:, 0]

    @property
    def valid(self) -> Any:
        """(N,) bool: False where the source was missing or the box had no area; such a canvas is all fill."""
        return (self.regions[:, 3] > 0) & (self.regions[:, 4] > 0)

    def to_host(self) -> Geometry:
        """The same on the CPU; waits for the device."""
        if self.device == "cpu":
            return self
        regions, steps, scales = (to_device(table, "cpu") for table in (self.regions, self.steps, self.scales))
        return Geometry(regions, steps, scales, "cpu")

    def to_source(self, boxes: Any) -> Any:
        """Map boxes from canvas to source pixels.

        Parameters
        ----------
        boxes : (N, ..., 4) float32 array
            x1, y1, x2, y2 in pixels of the canvas, first axis one row per canvas.

        Returns
        -------
        Array of the same shape, in pixels of the source image; not clipped to it.

        Raises
        ------
        InputError
            If the first axis is not N or the last is not 4.
        """
        xp = array_module(self.device)
        boxes = xp.asarray(to_device(boxes, self.device), dtype=xp.float32)
        if boxes.ndim < 2 or boxes.shape[0] != len(self) or boxes.shape[-1] != 4:
            raise InputError(f"boxes have shape {boxes.shape}; expected ({len(self)}, ..., 4), one row per canvas")
        lead = (len(self),) + (1,) * (boxes.ndim - 2)
        scale = self.scales[:, [2, 3, 2, 3]].reshape(*lead, 4)
        offset = self.scales[:, [4, 5, 4, 5]].reshape(*lead, 4)
        return boxes * scale + offset


def checked_geometry(geometry: Any) -> Geometry:
    """``geometry`` itself, or an error that says where one comes from."""
    if not isinstance(geometry, Geometry):
        raise InputError(f"geometry is a {type(geometry).__name__}; expected what Preprocess returned with the tensor")
    return geometry
