"""Rings of buffers, one for each source, and what may be in them together."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from nbvision.errors import FrozenMemoryError, InputError, MemoryLimitError
from nbvision.runtime.device import Device, require_cupy

__all__ = ["Buffer", "Manager", "MemoryStats", "Place", "Source", "SourceStats", "asked_at", "size_class"]

Place: TypeAlias = Device | Literal["pinned"]

_SIZE_CLASSES_PER_OCTAVE = 4  # at most 19 % of a buffer is slack, and similar batches share buffers

_NONE = -1  # no stream's address
_IDLE_S = 60.0  # a buffer that was not used for so long is given back when any ring grows


@dataclass(frozen=True, slots=True)
class Source:
    """Who asks, and what is to be done when there is no room."""

    name: str = "default"
    budget_bytes: int | None = None
    wait_ms: float = 0.0


@dataclass(frozen=True)
class SourceStats:
    """Of one ring, all in bytes but ``allocations``, the times it grew, and ``waits``, the times it waited for room."""

    held_bytes: int
    used_bytes: int
    peak_bytes: int
    budget_bytes: int | None
    allocations: int
    waits: int


@dataclass(frozen=True)
class MemoryStats:
    """A snapshot of the buffers in one place, all in bytes; as text, a table.

    ``held_bytes`` is what the rings own, ``used_bytes`` what callers hold of it now, ``asked_bytes`` what they asked
    for, ``peak_bytes`` the most the rings ever owned; ``sources`` splits them.  ``allocations`` counts the times a ring
    had to grow, ``waits`` the times the host waited for a stream before a buffer could be used.
    """

    device: Place
    held_bytes: int
    used_bytes: int
    asked_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    allocations: int
    waits: int
    sources: dict[str, SourceStats]

    def __str__(self) -> str:
        def megabytes(size_bytes: int | None) -> str:
            return "" if size_bytes is None else f"{size_bytes / 1e6:.1f}"

        rows = [[f"MB on {self.device}", "held", "used", "peak", "at most", "growths"]]
        for name, ring in sorted(self.sources.items(), key=lambda item: -item[1].held_bytes):
            sizes = (ring.held_bytes, ring.used_bytes, ring.peak_bytes, ring.budget_bytes)
            rows.append([name, *map(megabytes, sizes), str(ring.allocations)])
        sizes = (self.held_bytes, self.used_bytes, self.peak_bytes, self.limit_bytes)
        rows.append(["all", *map(megabytes, sizes), str(self.allocations)])
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{row[0]:{width}}" + "".join(f" {cell:>9}" for cell in row[1:]) for row in rows)


@dataclass(eq=False)
class Slot:
    """One reusable block: its storage, and the events of the streams that used it last."""

    storage: Any  # what owns the memory: a flat uint8 array, NumPy or CuPy; a pointer of CuPy's if pinned
    size_bytes: int
    address: int
    source: str
    # By the address of the stream that they are of, which lives as long: no other stream may get that address.
    events: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    spare: list[Any] = field(default_factory=list)  # events to be recorded again: to make one takes longer
    streams: dict[int, Any] = field(default_factory=dict)  # that use it now, by address
    free_since_s: float = 0.0  # of time.monotonic()
    device_id: int = -1  # of the streams, and so of the events; -1 without CUDA

    def is_idle_for(self, stream: int) -> bool:
        """Whether work on a stream may use it at once."""
        return all(address == stream or event.done for address, (_, event) in self.events.items())

    def is_idle(self) -> bool:
        return all(event.done for _, event in self.events.values())

    def mark(self) -> None:
        """Note where the streams are now, which used it; another device may be the current one meanwhile."""
        if not self.streams:
            return
        with _on_device(self.device_id):
            for address, stream in self.streams.items():
                self.events[address] = stream, stream.record(self.spare.pop() if self.spare else _new_event())
        self.streams = {}

    def move_to(self, device_id: int) -> None:
        """Let streams of this device use it from now on."""
        if device_id != self.device_id:
            self.device_id = device_id
            self.spare.clear()  # events of another device's streams

    def let_wait(self, stream: Any) -> None:
        """Let a stream wait for all others."""
        for address, (_, event) in self.events.items():
            if address != stream.ptr:
                stream.wait_event(event)
        self._forget()

    def wait(self) -> None:
        """Wait on the host."""
        for _, event in self.events.values():
            event.synchronize()
        self._forget()

    def _forget(self) -> None:
        self.spare += [event for _, event in self.events.values()]
        self.events.clear()


@dataclass(eq=False)
class Ring:
    """The buffers of one source in one place."""

    free: list[Slot] = field(default_factory=list)
    # Those that are out, so that their streams live: of a cycle that is collected, a stream may go before its buffer.
    used: set[Slot] = field(default_factory=set)
    held_bytes: int = 0
    used_bytes: int = 0
    peak_bytes: int = 0
    budget_bytes: int | None = None
    allocations: int = 0
    waits: int = 0
    waiting: int = 0  # threads


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

    def __init__(self, slot: Slot, manager: Manager, asked_bytes: int) -> None:
        self.address = slot.address
        self.size_bytes = slot.size_bytes
        self.device: Place = manager.device
        self._device_id = slot.storage.data.device_id if manager.device == "cuda" else -1
        self._lease = manager, slot, asked_bytes

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # when CUDA may be gone
            manager, slot, asked_bytes = self._lease
            manager.release(slot, asked_bytes)

    def record_stream(self, stream: Any = None) -> None:
        """Say that work queued on ``stream`` (default: CuPy's current one) uses this buffer."""
        if self.device != "cpu":
            stream = stream or require_cupy("a CUDA stream").cuda.get_current_stream()
            self._lease[1].streams.setdefault(stream.ptr, stream)

    def view(self, shape: tuple[int, ...], *, dtype: Any = np.uint8, offset_bytes: int = 0) -> Any:
        """An array over part of the buffer, of CuPy for ``"cuda"``, else of NumPy; it keeps the lease alive.

        Raises
        ------
        InputError
            If the view would end past the buffer.
        """
        dtype = np.dtype(dtype)
        size = math.prod([int(length) for length in shape]) * dtype.itemsize  # int: NumPy's own would overflow
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


class Manager:
    """All rings of one place. Every method may be called from any thread."""

    def __init__(self, device: Place) -> None:
        self.device: Place = device
        self.limit_bytes: int | None = None
        self.frozen = 0  # contexts that forbid growth
        self.watchers: list[Callable[[str, int], None]] = []  # told of a source what it uses, at each change
        # Re-entrant: a finalizer may run while the lock is held.
        self._room = threading.Condition(threading.RLock())
        self._rings: dict[str, Ring] = {}
        self._asked_bytes = 0
        self._peak_bytes = 0
        self._allocations = 0
        self._waits = 0
        self._waiting = 0  # threads, for room

    def acquire(self, size_bytes: int, source: Source, *, wait_on_host: bool = False) -> Buffer:
        """See :func:`nbvision.memory.acquire`."""
        wanted = size_class(size_bytes)
        stream = None if self.device == "cpu" else require_cupy("a CUDA stream").cuda.get_current_stream()
        wait_on_host = wait_on_host or self.device == "pinned"
        with self._room:
            slot = self._take_or_grow(source, wanted, _NONE if stream is None or wait_on_host else stream.ptr)
            ring = self._rings[source.name]
            ring.used.add(slot)
            ring.used_bytes += slot.size_bytes
            self._asked_bytes += size_bytes
            self._tell(source.name, ring)
        if stream is not None:
            if wait_on_host:
                self._waits += not slot.is_idle()
                slot.wait()
            else:
                slot.let_wait(stream)
            if self.device == "pinned":  # which the devices share
                slot.move_to(require_cupy("a CUDA device").cuda.runtime.getDevice())
            slot.streams[stream.ptr] = stream
        return Buffer(slot, self, size_bytes)

    def release(self, slot: Slot, asked_bytes: int) -> None:
        slot.mark()
        slot.free_since_s = time.monotonic()
        with self._room:
            ring = self._rings[slot.source]
            ring.used.remove(slot)
            ring.used_bytes -= slot.size_bytes
            self._asked_bytes -= asked_bytes
            ring.free.append(slot)
            self._tell(slot.source, ring)
            if self._waiting:
                self._room.notify_all()

    def _take_or_grow(self, source: Source, wanted: int, stream: int) -> Slot:
        ring = self._rings.get(source.name)
        if ring is None:
            ring = self._rings[source.name] = Ring()
        ring.budget_bytes = source.budget_bytes
        deadline_s = None
        while True:
            if not self._is_greedy(ring, wanted):
                slot = self._take(ring, wanted, stream)
                if slot is not None:
                    return slot
                if self._makes_room(ring, wanted):
                    return self._grow(source.name, ring, wanted)
            deadline_s = deadline_s or time.monotonic() + source.wait_ms / 1e3
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise MemoryLimitError(self._refusal(source, ring, wanted))
            ring.waits += 1
            ring.waiting += 1
            self._waiting += 1
            try:
                self._room.wait(left_s)
            finally:
                ring.waiting -= 1
                self._waiting -= 1

    def _take(self, ring: Ring, wanted: int, stream: int) -> Slot | None:
        """The smallest free slot that fits, of those whose streams have passed if there are any.

        A slot more than twice too large is left for whom it was made. Where nothing may grow, the smallest one comes
        first, whether or not it has to be waited for: a larger one that is taken in its place would be missing later.
        """
        best, best_key = None, (sys.maxsize, sys.maxsize)
        for slot in ring.free:
            if wanted <= slot.size_bytes <= 2 * wanted:
                is_busy = not slot.is_idle_for(stream)
                key = (slot.size_bytes, is_busy) if self.frozen else (is_busy, slot.size_bytes)
                if key < best_key:
                    best, best_key = slot, key
                    if slot.size_bytes == wanted and not is_busy:
                        break
        if best is not None:
            ring.free.remove(best)
        return best

    def _makes_room(self, ring: Ring, wanted: int) -> bool:
        """Whether the ring may grow, once idle buffers have been given back: its own for its budget, anybody's for the
        limit, those first that have been idle for longest.
        """
        if self.frozen:
            return True  # so that growing says what is wrong
        budget = ring.budget_bytes
        if budget is not None:
            self._give_back_until(lambda: ring.held_bytes + wanted <= budget, ring.free)
            if ring.held_bytes + wanted > budget:
                return False
        limit = self.limit_bytes
        if limit is None:
            return True
        free = [slot for other in self._rings.values() for slot in other.free]
        self._give_back_until(lambda: self._held_bytes() + wanted <= limit, free)
        return self._held_bytes() + wanted <= limit

    def _is_greedy(self, ring: Ring, wanted: int) -> bool:
        """Whether the ring would have more than an equal share while another waits that has less than its own."""
        if self.limit_bytes is None or not self._waiting:
            return False
        hungry = [other for other in self._rings.values() if other.waiting and other is not ring]
        if not hungry:
            return False
        active = sum(bool(other.used_bytes or other.waiting or other is ring) for other in self._rings.values())
        share = self.limit_bytes // active
        return ring.used_bytes + wanted > share and any(other.used_bytes < share for other in hungry)

    def _give_back_until(self, is_enough: Callable[[], bool], slots: list[Slot]) -> None:
        for slot in sorted(slots, key=lambda slot: slot.free_since_s):
            if is_enough():
                return
            self._give_back(slot)

    def _give_back(self, slot: Slot) -> None:
        ring = self._rings[slot.source]
        ring.free.remove(slot)
        slot.wait()
        ring.held_bytes -= slot.size_bytes

    def _held_bytes(self) -> int:
        return sum(ring.held_bytes for ring in self._rings.values())

    def _refusal(self, source: Source, ring: Ring, wanted: int) -> str:
        over_budget = ring.budget_bytes is not None and ring.held_bytes + wanted > ring.budget_bytes
        what = "its budget" if over_budget else "the limit"
        limit = ring.budget_bytes if over_budget else self.limit_bytes
        waited = f", also after {source.wait_ms:.0f} ms" if source.wait_ms else ""
        return (
            f"{wanted / 1e6:.1f} MB wanted for source {source.name!r} on {self.device}; {what} is "
            f"{(limit or 0) / 1e6:.1f} MB{waited}. Release batches earlier, use smaller ones, or raise {what}, in "
            f"memory.{'source' if over_budget else 'set_limit'}()\n{self.stats()}"
        )

    def _grow(self, name: str, ring: Ring, wanted: int) -> Slot:
        if self.frozen:
            raise FrozenMemoryError(
                f"{wanted / 1e6:.1f} MB are missing on {self.device} for source {name!r} while memory is frozen, at "
                f"{asked_at()}. Run batches of that size before, or take the work out of memory.frozen()"
            )
        self._give_back_idle(_IDLE_S)
        storage, address, streams = self._allocate(wanted)
        ring.held_bytes += wanted
        ring.peak_bytes = max(ring.peak_bytes, ring.held_bytes)
        ring.allocations += 1
        self._peak_bytes = max(self._peak_bytes, self._held_bytes())
        self._allocations += 1
        device_id = -1 if self.device == "cpu" else require_cupy("a CUDA device").cuda.runtime.getDevice()
        slot = Slot(storage, wanted, address, name, streams=streams, device_id=device_id)
        slot.mark()
        return slot

    def _allocate(self, size_bytes: int) -> tuple[Any, int, dict[int, Any]]:
        """New storage, its address, and the streams to wait for before its first use."""
        if self.device == "cpu":
            array = np.empty(size_bytes, np.uint8)
            return array, array.ctypes.data, {}
        cupy = require_cupy("a CUDA array")
        if self.device == "pinned":
            try:
                pinned = cupy.cuda.alloc_pinned_memory(size_bytes)
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise MemoryLimitError(
                    f"the host pins no {size_bytes / 1e6:.1f} MB of memory: {error}\n{self.stats()}"
                ) from error
            return pinned, pinned.ptr, {}
        try:
            block = cupy.empty(size_bytes, np.uint8)
        except cupy.cuda.memory.OutOfMemoryError:
            self._give_back_idle(0)
            cupy.get_default_memory_pool().free_all_blocks()
            try:
                block = cupy.empty(size_bytes, np.uint8)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise MemoryLimitError(
                    f"the device has no {size_bytes / 1e6:.1f} MB left: {error}\n{self.stats()}"
                ) from error
        # CuPy's pool hands out blocks that work queued on the current stream may still use: it counts as the last user.
        stream = cupy.cuda.get_current_stream()
        return block, block.data.ptr, {stream.ptr: stream}

    def _give_back_idle(self, idle_s: float) -> None:
        before_s = time.monotonic() - idle_s
        for ring in self._rings.values():
            for slot in [slot for slot in ring.free if slot.free_since_s <= before_s]:
                self._give_back(slot)

    def trim(self, idle_s: float) -> None:
        with self._room:
            self._give_back_idle(idle_s)
            # Of a source that is gone, nothing shall be left.
            self._rings = {name: ring for name, ring in self._rings.items() if ring.held_bytes or ring.waiting}

    def stats(self) -> MemoryStats:
        with self._room:
            return MemoryStats(
                device=self.device,
                held_bytes=self._held_bytes(),
                used_bytes=sum(ring.used_bytes for ring in self._rings.values()),
                asked_bytes=self._asked_bytes,
                peak_bytes=self._peak_bytes,
                limit_bytes=self.limit_bytes,
                allocations=self._allocations,
                waits=self._waits,
                sources={
                    name: SourceStats(
                        ring.held_bytes,
                        ring.used_bytes,
                        ring.peak_bytes,
                        ring.budget_bytes,
                        ring.allocations,
                        ring.waits,
                    )
                    for name, ring in self._rings.items()
                },
            )

    def _tell(self, name: str, ring: Ring) -> None:
        for watcher in self.watchers:
            watcher(name, ring.used_bytes)


def asked_at() -> str:
    """The file, line and function outside of this package, and of CuPy, that asked for memory."""
    package, cupy = str(Path(__file__).parent.parent), f"{os.sep}cupy{os.sep}"
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(package) or cupy in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _on_device(device_id: int) -> contextlib.AbstractContextManager[Any]:
    """Make a device CuPy's current one, if it is not."""
    cuda = require_cupy("a CUDA device").cuda
    return contextlib.nullcontext() if cuda.runtime.getDevice() == device_id else cuda.Device(device_id)


def _new_event() -> Any:
    return require_cupy("a CUDA event").cuda.Event(disable_timing=True)


@functools.lru_cache(maxsize=4096)
def size_class(size_bytes: int) -> int:
    """Round up to one of four sizes per power of two, at least 4 KiB."""
    size = max(int(size_bytes), 4096)
    step = 1 << max((size - 1).bit_length() - 1, 0)
    quantum = max(step // _SIZE_CLASSES_PER_OCTAVE, 256)
    return -(-size // quantum) * quantum
