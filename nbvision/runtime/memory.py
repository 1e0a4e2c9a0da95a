"""The memory manager: reused buffers per source, over CuPy's pools (or NumPy on the CPU).

A *source* is whatever produces images at its own rhythm: a film, an article, a folder.  Each has a *ring* of
buffers.  A buffer that nobody holds any more goes back to its ring, and is handed out again only once every stream
that used it has passed the point of release.  A ring grows when none of its buffers is free, as far as its budget and
the limit of all rings allow; buffers that lie idle are given back first.

One rule for streams: memory is used on the stream it was acquired on; who uses it on another stream says so with
:meth:`Buffer.record_stream` or :func:`record_use`.

Buffers are in one of three places: ``"cpu"``; ``"cuda"``; ``"pinned"``, which is host memory that the GPU copies from
and to while the host goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

from nbvision.errors import FrozenMemoryError, InputError
from nbvision.runtime._rings import Buffer, Manager, MemoryStats, Place, Source, SourceStats, asked_at, size_class
from nbvision.runtime._timeline import Timeline
from nbvision.runtime.device import require_cupy

__all__ = [
    "Buffer",
    "MemoryStats",
    "Place",
    "SourceStats",
    "Timeline",
    "acquire",
    "clear",
    "frozen",
    "limit_bytes",
    "record_use",
    "set_limit",
    "share_with_torch",
    "size_class",
    "source",
    "stats",
    "timeline",
    "trim",
]

_DEFAULT = Source()
_current_source: contextvars.ContextVar[Source] = contextvars.ContextVar("nbvision_source", default=_DEFAULT)


_PLACES: tuple[Place, ...] = ("cpu", "cuda", "pinned")
_managers: dict[tuple[Place, int], Manager] = {}
_making = threading.Lock()


def _manager(device: Place) -> Manager:
    """The manager of a place: of "cuda" that of CuPy's current device."""
    if device not in _PLACES:
        raise InputError(f"device is {device!r}; expected one of {_PLACES}")
    key = (device, require_cupy("CUDA memory").cuda.runtime.getDevice() if device == "cuda" else -1)
    if key not in _managers:
        with _making:
            _managers.setdefault(key, Manager(device))
    return _managers[key]


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
        If the ring would pass its budget or the limit of :func:`set_limit`, or the device has no memory left; with a
        table of who holds what.
    FrozenMemoryError
        If the ring would have to grow within :func:`frozen`.
    """
    return _manager(device).acquire(size_bytes, _current_source.get(), wait_on_host=wait_on_host)


def record_use(array: Any, stream: Any = None) -> None:
    """Say that work queued on ``stream`` (default: CuPy's current one) uses an array.

    Arrays that are no views of a :class:`Buffer` are left alone.
    """
    lease = getattr(getattr(array.data, "mem", None), "_owner", None)  # CuPy keeps it under no public name
    if isinstance(lease, Buffer):
        lease.record_stream(stream)


@contextlib.contextmanager
def source(name: str, *, budget_bytes: int | None = None, wait_ms: float = 0.0) -> Iterator[None]:
    """Within this context, buffers come from the ring named ``name``.

    Parameters
    ----------
    name : str
    budget_bytes : int, optional
        What the ring may hold in any one place; default: what the limit leaves.
    wait_ms : float
        How long a call that finds no room waits for others to let go of theirs. 0, the default, is an error at once:
        to shed work, catch it. Of several that wait under a limit, none takes more than an equal share while another
        has less than its own.

    Raises
    ------
    InputError
        For a budget that is not positive, or a negative wait.
    """
    if not wait_ms >= 0:
        raise InputError(f"wait_ms is {wait_ms!r}; expected 0 or more milliseconds")
    token = _current_source.set(Source(name, _checked_bytes("budget_bytes", budget_bytes), wait_ms))
    try:
        yield
    finally:
        _current_source.reset(token)


@contextlib.contextmanager
def frozen(*, device: Place) -> Iterator[None]:
    """Within this context no ring of this place may grow: what is needed has to be there, from a warm-up.

    On ``"cuda"``, CuPy's pool may not grow either.  An allocation of this thread is refused where it is asked for;
    that another thread let CuPy's pool grow is noticed at the end.

    Raises
    ------
    FrozenMemoryError
        From the call that would allocate, with the place that asked.
    """
    manager = _manager(device)
    manager.frozen += 1
    try:
        with _frozen_pool() if device == "cuda" else contextlib.nullcontext():
            yield
    finally:
        manager.frozen -= 1


@contextlib.contextmanager
def _frozen_pool() -> Iterator[None]:
    cupy = require_cupy("CUDA memory")

    class Refuse(cupy.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        name = "nbvision.memory.frozen"

        def alloc_preprocess(self, **request: Any) -> None:  # malloc_preprocess is also called for what the pool has
            raise FrozenMemoryError(
                f"CuPy's pool needs {request['mem_size'] / 1e6:.1f} MB more while memory is frozen, at {asked_at()}. "
                "Do the same work before, or take it out of memory.frozen()"
            )

    pool = cupy.get_default_memory_pool()
    before = pool.total_bytes()
    with Refuse():
        yield
    if pool.total_bytes() > before:
        grown = (pool.total_bytes() - before) / 1e6
        raise FrozenMemoryError(f"CuPy's pool grew by {grown:.1f} MB while memory was frozen, for another thread")


def set_limit(limit_bytes: int | None, *, device: Place) -> None:
    """Limit what all rings in one place may hold, in bytes; None lifts the limit.

    Raises
    ------
    InputError
        For a limit that is not positive.
    """
    _manager(device).limit_bytes = _checked_bytes("limit_bytes", limit_bytes)


def _checked_bytes(name: str, size_bytes: Any) -> int | None:
    if size_bytes is not None and (not isinstance(size_bytes, int) or size_bytes <= 0):
        raise InputError(f"{name} is {size_bytes!r}; expected a positive number, or None for no limit")
    return size_bytes


def limit_bytes(*, device: Place) -> int | None:
    """The limit set by :func:`set_limit`."""
    return _manager(device).limit_bytes


def stats(*, device: Place) -> MemoryStats:
    """What the rings in one place hold now."""
    return _manager(device).stats()


@contextlib.contextmanager
def timeline(*, device: Place) -> Iterator[Timeline]:
    """Note what each source uses in this place, at every change within this context.

    Yields
    ------
    Timeline
        Whose ``save(path)`` draws it.
    """
    manager, noted = _manager(device), Timeline()
    for name, ring in manager.stats().sources.items():
        noted.note(name, ring.used_bytes)
    manager.watchers.append(noted.note)
    try:
        yield noted
    finally:
        manager.watchers.remove(noted.note)


def trim(*, device: Place, idle_s: float) -> None:
    """Give every buffer of one place back that has been free for ``idle_s`` seconds.

    Rings do so by themselves, with a minute, whenever one of them grows.
    """
    _manager(device).trim(idle_s)


def clear(*, device: Place) -> None:
    """Give every free buffer of one place back, waiting for the streams that used it last."""
    _manager(device).trim(0)


def share_with_torch() -> None:
    """Let CuPy, and so every ring on ``"cuda"``, take its memory from torch's caching allocator from now on.

    One pool then serves both libraries, and what one gives back the other may have.  What CuPy holds already stays
    where it is; :func:`frozen` watches the rings, but not torch's allocator.  For RMM, CuPy's own call does the same:
    ``cupy.cuda.set_allocator(rmm.allocators.cupy.rmm_cupy_allocator)``.

    Raises
    ------
    MissingExtraError
        If CuPy is not installed.
    InputError
        If torch is not installed.
    """
    cupy = require_cupy("memory of torch")
    try:
        import torch
    except ImportError as error:
        raise InputError("torch is not installed, and share_with_torch() takes its memory; install it first") from error

    def allocate(size_bytes: int, device_id: int) -> int:
        stream = cupy.cuda.get_current_stream().ptr
        try:
            return int(torch.cuda.caching_allocator_alloc(size_bytes, device_id, stream))
        except torch.OutOfMemoryError:
            free, total = cupy.cuda.runtime.memGetInfo()
            raise cupy.cuda.memory.OutOfMemoryError(size_bytes, total - free) from None

    def give_back(address: int, device_id: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    cupy.cuda.set_allocator(cupy.cuda.PythonFunctionAllocator(allocate, give_back).malloc)
