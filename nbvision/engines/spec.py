"""What goes into a model and what comes out: names, dtypes, shapes; and the batch sizes it is made for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from nbvision.errors import EngineError, InputError
from nbvision.runtime.device import Device, device_of

__all__ = ["Batch", "BatchRange", "Precision", "TensorSpec", "batch_class"]

Precision = Literal["fp32", "fp16"]


class BatchRange(NamedTuple):
    """The batch sizes an engine takes; it is fastest at ``opt``."""

    min: int
    opt: int
    max: int


def batch_class(batch: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ...: sizes that count as one."""
    power = 1 << (batch - 1).bit_length()
    return power * 3 // 4 if power >= 4 and batch <= power * 3 // 4 else power


Batch: TypeAlias = tuple[int, int, int] | Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype
    shape : tuple of int
        -1 stands for a dimension that changes from call to call.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def batched(self) -> bool:
        """Whether the first dimension is the batch, of any size."""
        return bool(self.shape) and self.shape[0] == -1

    @property
    def fixed_beyond_batch(self) -> bool:
        """Whether every dimension but the first is a known number."""
        return -1 not in self.shape[1:]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits."""
        return len(shape) == len(self.shape) and all(
            want in (-1, got) for want, got in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype} {self.shape}"


def checked_batches(batch: Batch) -> tuple[BatchRange, ...]:
    """``batch`` as ranges, if each has 1 <= min <= opt <= max, and they rise without a gap."""
    ranges: list[Any] = [batch] if batch and isinstance(batch[0], int) else list(batch)
    found: list[BatchRange] = []
    for sizes in ranges:
        is_range = isinstance(sizes, Sequence) and len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2]
        if not is_range or (found and not found[-1].min < sizes[0] <= found[-1].max + 1 <= sizes[2]):
            break
        found.append(BatchRange(*(int(size) for size in sizes)))
    if not found or len(found) < len(ranges):
        raise InputError(
            f"batch is {batch!r}; expected (min, opt, max) with 1 <= min <= opt <= max, or several of them that rise "
            "without a gap"
        )
    return tuple(found)


def check_model_inputs(file_name: str, inputs: Iterable[TensorSpec]) -> None:
    """Refuse a model in which more than the batch is dynamic, whichever runtime would run it."""
    for spec in inputs:
        if not spec.fixed_beyond_batch:
            raise EngineError(
                f"{file_name}: input {spec} has dynamic dimensions beyond the first; only the batch may be "
                "dynamic. Export the model with fixed sizes, or fix them with "
                "python -m onnxruntime.tools.make_dynamic_shape_fixed"
            )


def check_out(spec: TensorSpec, array: Any, *, shape: tuple[int, ...], device: Device) -> None:
    """Refuse an ``out`` array that cannot take the output ``spec``, whose shape in this call is ``shape``."""
    wanted = TensorSpec(spec.name, spec.dtype, shape)
    if not hasattr(array, "shape") or not hasattr(array, "flags"):
        raise InputError(f"out[{spec.name!r}] is a {type(array).__name__}; expected an array {wanted}")
    fits = array.dtype == spec.dtype and wanted.accepts(tuple(array.shape)) and device_of(array) == device
    if not fits or not array.flags.c_contiguous:
        order = "contiguous" if array.flags.c_contiguous else "not contiguous"
        raise InputError(
            f"out[{spec.name!r}] is {array.dtype} {tuple(array.shape)} on {device_of(array)}, {order}; "
            f"expected {spec.dtype} {shape} on {device}, contiguous"
        )
