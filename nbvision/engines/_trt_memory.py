"""The device memory of TensorRT's engines, all of it from the memory manager: weights, and slabs for activations."""

from __future__ import annotations

import collections
import functools
import math
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbvision.engines.spec import TensorSpec
from nbvision.runtime import memory
from nbvision.runtime.device import require_cupy

__all__ = ["SOURCE", "Allocations", "DeferredOutput", "Slabs", "Stage", "slabs"]

SOURCE = "TensorRT"  # its name among the sources of the memory manager

_MOST_SLABS = 8


class Allocations:
    """What TensorRT asks for by itself: weights, and what contexts keep. Called from inside of it, by any thread."""

    def __init__(self) -> None:
        self._leases: dict[int, memory.Buffer] = {}
        self._failure: Exception | None = None

    def allocate(self, size_bytes: int) -> int:
        """An address that any stream may write to; 0 if there is none, and `raise_failure` says why."""
        try:
            with memory.source(SOURCE):
                lease = memory.acquire(size_bytes, device="cuda", wait_on_host=True)
        except Exception as error:  # TensorRT would print it and go on
            self._failure = error
            return 0
        self._leases[lease.address] = lease
        return lease.address

    def free(self, address: int) -> bool:
        lease = self._leases.pop(address, None)
        if lease is not None and not sys.is_finalizing():
            # Nothing says which streams still read it, and this happens when an engine goes.
            require_cupy("CUDA memory").cuda.Device().synchronize()
        return True

    def raise_failure(self) -> None:
        """Raise what went wrong in a callback since the last call, if anything did."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class DeferredOutput:
    """An output whose shape, and so its memory, is known while the call is queued. Called from inside TensorRT."""

    def __init__(self) -> None:
        self._lease: memory.Buffer | None = None
        self._shape: tuple[int, ...] = ()
        self._failure: Exception | None = None

    def allocate(self, size_bytes: int) -> int:
        """An address that CuPy's current stream may write to; 0 if there is none."""
        try:
            self._lease = memory.acquire(size_bytes, device="cuda")
        except Exception as error:  # TensorRT would print it and go on
            self._failure = error
            return 0
        return self._lease.address

    def notify(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def take(self, dtype: np.dtype[Any]) -> Any:
        """The output of the last call; raises what kept it from getting its memory."""
        (lease, self._lease), (failure, self._failure) = (self._lease, None), (self._failure, None)
        if failure is not None:
            raise failure
        return None if lease is None else lease.view(self._shape, dtype=dtype)


class Stage:
    """Memory for the inputs and outputs of one call, which a graph always finds in the same place.

    Parameters
    ----------
    inputs, outputs : sequence of TensorSpec
        All of them with a batch, and of known sizes beyond it.
    batch : int
    stream : stream
        Of the first call.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], batch: int, stream: Any) -> None:
        self.batch = batch
        self._last_stream = stream.ptr
        with stream, memory.source(SOURCE):
            self._arrays = [
                memory.acquire(math.prod(shape) * spec.dtype.itemsize, device="cuda").view(shape, dtype=spec.dtype)
                for spec in (*inputs, *outputs)
                for shape in [(batch, *spec.shape[1:])]
            ]
            for array in self._arrays:
                array.fill(0)  # rows that no call has filled yet are computed, too
        self._inputs, self._outputs = self._arrays[: len(inputs)], self._arrays[len(inputs) :]
        self.shapes = tuple([array.shape for array in self._inputs])
        self.addresses = tuple([array.data.ptr for array in self._arrays])

    def take(self, arrays: Sequence[Any], stream: Any) -> None:
        """Copy a call's inputs in."""
        if stream.ptr != self._last_stream:
            self._last_stream = stream.ptr
            for own in self._arrays:
                memory.record_use(own, stream)
        for own, array in zip(self._inputs, arrays, strict=True):
            own.data.copy_from_device_async(array.data, array.nbytes, stream)

    def give(self, arrays: Sequence[Any], stream: Any) -> None:
        """Copy the outputs out: as much as fits into each array, whose first dimension is the call's batch."""
        for own, array in zip(self._outputs, arrays, strict=True):
            array.data.copy_from_device_async(own.data, array.nbytes, stream)


class Slabs:
    """One block of scratch memory for each stream of a device, as large as any engine wants.

    Engines that run on one stream run one after the other, and so can share it. The oldest block is let go when there
    are too many.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._size_bytes = 0
        self._of_stream: collections.OrderedDict[int, memory.Buffer] = collections.OrderedDict()

    def reserve(self, size_bytes: int) -> None:
        """Let every slab be at least so large from now on."""
        with self._lock:
            self._size_bytes = max(self._size_bytes, size_bytes)

    def of(self, stream: Any) -> memory.Buffer:
        """The slab of a stream of CuPy's current device."""
        key = stream.ptr
        slab = self._of_stream.get(key)
        if slab is not None and slab.size_bytes >= self._size_bytes:
            return slab
        with self._lock, stream, memory.source(SOURCE):
            slab = memory.acquire(self._size_bytes, device="cuda")
            self._of_stream[key] = slab
            if len(self._of_stream) > _MOST_SLABS:
                self._of_stream.popitem(last=False)
        return slab


@functools.cache
def slabs(device_id: int) -> Slabs:
    """Those of a device."""
    return Slabs()
