"""The memory manager: reused buffers per source, over CuPy's pools (or NumPy on the CPU).

A *source* is whatever produces images at its own rhythm: a film, an article, a folder.  Each has a *ring* of
buffers.  A buffer that nobody holds any more goes back to its ring, and is handed out again only once every stream
that used it has passed the point of release.

One rule for streams: memory is used on the stream it was acquired on; who uses it on another stream says so with
:meth:`Buffer.record_stream` or :func:`record_use`.

Buffers are in one of three places: ``"cpu"``; ``"cuda"``; ``"pinned"``, which is host memory that the GPU copies from
and to while the host goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from nbvision.errors import InputError, MemoryLimitError
from nbvision.runtime.device import Device, require_cupy

__all__ = [
    "Buffer",
    "MemoryStats",
    "Place",
    "acquire",
    "clear",
    "limit_bytes",
    "record_use",
    "set_limit",
    "source",
    "stats",
]

Place: TypeAlias = Device | Literal["pinned"]

DEFAULT_SOURCE = "default"
_SIZE_CLASSES_PER_OCTAVE = 4  # at most 19 % of a buffer is slack, and similar batches share buffers

_current_source: contextvars.ContextVar[str] = contextvars.ContextVar("nbvision_source", default=DEFAULT_SOURCE)


@dataclass(frozen=True)
class MemoryStats:
    """A snapshot of the buffers in one place, all in bytes.

    ``held_bytes`` is what the rings own, ``used_bytes`` what callers hold of it now, ``peak_bytes`` the most the
    rings ever owned; ``by_source`` splits ``held_bytes``.  ``allocations`` counts the times a ring had to grow,
    ``waits`` the times the host waited for a stream before a buffer could be used.
    """

    device: Place
    held_bytes: int
    used_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    allocations: int
    waits: int
    by_source: dict[str, int]


@dataclass(eq=False)
class _Slot:
    """One reusable block: its storage, and the events of the streams that used it last."""

    storage: Any  # what owns the memory: a flat uint8 array, NumPy or CuPy; a pointer of CuPy's if pinned
    size_bytes: int
    address: int
    source: str
    events: list[Any] = field(default_factory=list)

    def is_idle(self) -> bool:
        return all(event.done for event in self.events)

    def wait(self) -> None:
        for event in self.events:
            event.synchronize()
        self.events.clear()


class Buffer:
    """A lease on one slot of a ring. Dropping the last reference to it, and to every view of it, ends the lease.

    Attributes
    ----------
    address : int
        Address of the first byte.
    size_bytes : int
        Usable bytes, at least what was asked for.
    device : {"cpu", "cuda", "pinned"}
    """

    def __init__(self, slot: _Slot, device: Place, streams: dict[int, Any]) -> None:
        self.address = slot.address
        self.size_bytes = slot.size_bytes
        self.device: Place = device
        self._device_id = slot.storage.data.device_id if device == "cuda" else -1
        self._streams = streams
        weakref.finalize(self, _managers[device].release, slot, streams).atexit = False

    def record_stream(self, stream: Any = None) -> None:
        """Say that work queued on ``stream`` (default: CuPy's current one) uses this buffer."""
        if self.device != "cpu":
            stream = stream or require_cupy("a CUDA stream").cuda.get_current_stream()
            self._streams.setdefault(stream.ptr, stream)

    def view(self, shape: tuple[int, ...], *, dtype: Any = np.uint8, offset_bytes: int = 0) -> Any:
        """An array over part of the buffer, of CuPy for ``"cuda"``, else of NumPy; it keeps the lease alive.

        Raises
        ------
        InputError
            If the view would end past the buffer.
        """
        dtype = np.dtype(dtype)
        size = math.prod(map(int, shape)) * dtype.itemsize  # int: NumPy's own would overflow
        if offset_bytes < 0 or offset_bytes + size > self.size_bytes:
            raise InputError(f"a view of {size} bytes at {offset_bytes} ends past a buffer of {self.size_bytes} bytes")
        if self.device != "cuda":
            return np.asarray(_HostView(self, shape, dtype, offset_bytes))
        cupy = require_cupy("a CUDA array")
        memory = cupy.cuda.UnownedMemory(self.address, self.size_bytes, self, self._device_id)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, offset_bytes))


class _HostView:
    """Memory of a buffer as NumPy wants it described. The array made of it keeps this object, and so the lease.

    A view of the storage would not do: NumPy shortens chains of views to the array that owns the memory.
    """

    def __init__(self, lease: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any], offset_bytes: int) -> None:
        self.lease = lease
        address = (lease.address + offset_bytes, False)
        self.__array_interface__ = {"data": address, "shape": shape, "typestr": dtype.str, "version": 3}


class _Manager:
    """All rings of one place. Every method may be called from any thread."""

    def __init__(self, device: Place) -> None:
        self.device: Place = device
        self.limit_bytes: int | None = None
        self._lock = threading.RLock()  # re-entrant: a finalizer may run while the lock is held
        self._free: dict[str, list[_Slot]] = {}
        self._held: dict[str, int] = {}
        self._used_bytes = 0
        self._peak_bytes = 0
        self._allocations = 0
        self._waits = 0

    def acquire(self, size_bytes: int, *, wait_on_host: bool = False) -> Buffer:
        source = _current_source.get()
        wanted = size_class(size_bytes)
        with self._lock:
            slot = self._take(source, wanted) or self._grow(source, wanted)
            self._used_bytes += slot.size_bytes
        streams: dict[int, Any] = {}
        if self.device != "cpu":
            stream = require_cupy("a CUDA stream").cuda.get_current_stream()
            streams[stream.ptr] = stream
            if wait_on_host or self.device == "pinned":
                self._waits += not slot.is_idle()
                slot.wait()
            for event in slot.events:
                stream.wait_event(event)
            slot.events.clear()
        return Buffer(slot, self.device, streams)

    def release(self, slot: _Slot, streams: dict[int, Any]) -> None:
        if self.device != "cpu":
            slot.events = [_mark(stream) for stream in streams.values()]
        with self._lock:
            self._used_bytes -= slot.size_bytes
            self._free.setdefault(slot.source, []).append(slot)

    def _take(self, source: str, wanted: int) -> _Slot | None:
        """The smallest free slot that fits, those whose streams have passed before the others.

        A slot more than twice too large is left for whom it was made.
        """
        free = self._free.get(source, [])
        fitting = [slot for slot in free if wanted <= slot.size_bytes <= 2 * wanted]
        if not fitting:
            return None
        best = min(fitting, key=lambda slot: (not slot.is_idle(), slot.size_bytes))
        free.remove(best)
        return best

    def _grow(self, source: str, wanted: int) -> _Slot:
        if self.limit_bytes is not None and sum(self._held.values()) + wanted > self.limit_bytes:
            self.clear()
        held = sum(self._held.values())
        if self.limit_bytes is not None and held + wanted > self.limit_bytes:
            table = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(self._held.items()))
            raise MemoryLimitError(
                f"{wanted / 1e6:.1f} MB wanted for source {source!r} on {self.device}; the limit is "
                f"{self.limit_bytes / 1e6:.1f} MB, of which are held: {table or 'nothing'}. "
                "Release batches earlier, use smaller ones, or raise the limit with memory.set_limit()"
            )
        storage, address, events = self._allocate(wanted)
        self._held[source] = self._held.get(source, 0) + wanted
        self._peak_bytes = max(self._peak_bytes, held + wanted)
        self._allocations += 1
        return _Slot(storage, wanted, address, source, events)

    def _allocate(self, size_bytes: int) -> tuple[Any, int, list[Any]]:
        """New storage, its address, and the events to wait for before its first use."""
        if self.device == "cpu":
            array = np.empty(size_bytes, np.uint8)
            return array, array.ctypes.data, []
        cupy = require_cupy("a CUDA array")
        if self.device == "pinned":
            try:
                pinned = cupy.cuda.alloc_pinned_memory(size_bytes)
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise MemoryLimitError(f"the host pins no {size_bytes / 1e6:.1f} MB of memory: {error}") from error
            return pinned, pinned.ptr, []
        try:
            block = cupy.empty(size_bytes, np.uint8)
        except cupy.cuda.memory.OutOfMemoryError:
            self.clear()
            cupy.get_default_memory_pool().free_all_blocks()
            try:
                block = cupy.empty(size_bytes, np.uint8)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise MemoryLimitError(f"the device has no {size_bytes / 1e6:.1f} MB left: {error}") from error
        # CuPy's pool hands out blocks that work queued on the current stream may still use: it counts as the last user.
        return block, block.data.ptr, [_mark(cupy.cuda.get_current_stream())]

    def clear(self) -> None:
        with self._lock:
            for name, slots in self._free.items():
                for slot in slots:
                    slot.wait()
                    self._held[name] -= slot.size_bytes
                slots.clear()
            self._held = {name: size for name, size in self._held.items() if size}

    def stats(self) -> MemoryStats:
        with self._lock:
            return MemoryStats(
                device=self.device,
                held_bytes=sum(self._held.values()),
                used_bytes=self._used_bytes,
                peak_bytes=self._peak_bytes,
                limit_bytes=self.limit_bytes,
                allocations=self._allocations,
                waits=self._waits,
                by_source=dict(self._held),
            )


_managers: dict[Place, _Manager] = {"cpu": _Manager("cpu"), "cuda": _Manager("cuda"), "pinned": _Manager("pinned")}


def _mark(stream: Any) -> Any:
    """An event at the present end of a stream."""
    return stream.record(require_cupy("a CUDA event").cuda.Event(disable_timing=True))


def size_class(size_bytes: int) -> int:
    """Round up to one of four sizes per power of two, at least 4 KiB."""
    size = max(int(size_bytes), 4096)
    step = 1 << max((size - 1).bit_length() - 1, 0)
    quantum = max(step // _SIZE_CLASSES_PER_OCTAVE, 256)
    return -(-size // quantum) * quantum


def _manager(device: Place) -> _Manager:
    try:
        return _managers[device]
    except KeyError:
        raise InputError(f"device is {device!r}; expected one of {tuple(_managers)}") from None


def acquire(size_bytes: int, *, device: Place, wait_on_host: bool = False) -> Buffer:
    """Take a buffer from the ring of the current source; the ring grows when none is free.

    Parameters
    ----------
    size_bytes : int
        Bytes needed; the buffer may be larger.
    device : {"cpu", "cuda", "pinned"}
    wait_on_host : bool
        Wait on the host, not on the stream, until earlier users of the memory are done; those of a new buffer are what
        is queued on the current stream.  For writers that ignore stream order, such as the hardware JPEG engine.
        Pinned memory, which the host itself writes, is always waited for.

    Raises
    ------
    MemoryLimitError
        If the ring would pass the limit of :func:`set_limit`, or the device has no memory left.
    """
    return _manager(device).acquire(size_bytes, wait_on_host=wait_on_host)


def record_use(array: Any, stream: Any = None) -> None:
    """Say that work queued on ``stream`` (default: CuPy's current one) uses an array.

    Arrays that are no views of a :class:`Buffer` are left alone.
    """
    lease = getattr(getattr(array.data, "mem", None), "_owner", None)  # CuPy keeps it under no public name
    if isinstance(lease, Buffer):
        lease.record_stream(stream)


@contextlib.contextmanager
def source(name: str) -> Iterator[None]:
    """Within this context, buffers come from the ring named ``name``."""
    token = _current_source.set(name)
    try:
        yield
    finally:
        _current_source.reset(token)


def set_limit(limit_bytes: int | None, *, device: Place) -> None:
    """Limit what all rings in one place may hold, in bytes; None lifts the limit.

    Raises
    ------
    InputError
        For a limit that is not positive.
    """
    if limit_bytes is not None and (not isinstance(limit_bytes, int) or limit_bytes <= 0):
        raise InputError(f"limit_bytes is {limit_bytes!r}; expected a positive number, or None for no limit")
    _manager(device).limit_bytes = limit_bytes


def limit_bytes(*, device: Place) -> int | None:
    """The limit set by :func:`set_limit`."""
    return _manager(device).limit_bytes


def stats(*, device: Place) -> MemoryStats:
    """What the rings in one place hold now."""
    return _manager(device).stats()


def clear(*, device: Place) -> None:
    """Give every free buffer of one place back, waiting for the streams that used it last."""
    _manager(device).clear()
