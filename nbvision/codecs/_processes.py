"""Processes that decode on the host, so that their Python does not wait for ours, nor ours for theirs.

Files and pixels are in memory that all of them share, in blocks: a page that says what to do and what came of it, the
file, the pixels.  Places of blocks go to the processes through one pipe; whoever is free takes the next.  A process
ends when nobody holds the other end of the pipe any more, so none outlives who started it, and their forks.

Processes are those of who made them.  A forked child has copies of this memory's owner, and uses none of them.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import itertools
import json
import math
import mmap
import os
import pickle
import select
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nbvision.errors import DecodeError, DeviceError
from nbvision.runtime.callbacks import call_all
from nbvision.runtime.child import start_python
from nbvision.runtime.device import require_cupy
from nbvision.runtime.places import Places

if TYPE_CHECKING:
    from nbvision.codecs.open import CompressedImage, How

__all__ = ["HostJob", "Processes", "Shared", "post", "processes"]

_PAGE = 4096
_NUMBERS_AT, _TEXT_AT = 64, 192  # in a block's first page; before them is a semaphore
# The numbers, of 8 bytes each. A worker's last word is HAS_LEFT; before it, it may still touch the page.
STATE, WORKER, IS_WANTED, HAS_LEFT, TICKET, FILE_BYTES, HOW_BYTES, HEIGHT, WIDTH, CHANNELS = range(10)
# States: a REFUSED image has a DecodeError, at a FAILED one the process is at fault.
QUEUED, RUNNING, DONE, REFUSED, FAILED = range(5)

JOB = struct.Struct("qq")  # what goes through the pipe: a block's place, and its ticket
DONE_AT = struct.Struct("q")  # and what comes back through another: the place

_LOOK_S = 0.1  # between looks at whether the process still lives that one waits for
_REPLACE_S = 1.0  # and at all of them
_RECLAIM_S = 0.005  # between looks at blocks that were let go of
_LEFT_ALONE = 64  # of those, before there is need
_START_S = 60.0  # to import what it decodes with, on a busy machine
_LARGEST = 4  # no block is larger than this part of the memory: what is, threads decode
_LOST_S = 10.0  # after which a process that has taken a block, and not said so, has ended
_STARTS = 3  # in a row that come to nothing, and no more are tried
_LOOK = -1  # no place; so that who waits for places looks at the clock
_PATIENCE_S = 0.5  # for a process to say that it is done; who waits for that is told then all the same
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


# Who copies from a block: by its place, the last event of each stream, by address.
Reads: TypeAlias = "dict[int, dict[int, tuple[Any, Any]]]"


class Shared:
    """Memory of several processes, as each of them sees it."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.descriptor, self.size_bytes = descriptor, size_bytes
        self._map = mmap.mmap(descriptor, size_bytes)
        self._words = memoryview(self._map).cast("q")
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.address: int = self._bytes.ctypes.data

    def number(self, place: int, name: int) -> int:
        """What a block's page says."""
        return self._words[(place + _NUMBERS_AT) // 8 + name]

    def say(self, place: int, name: int, number: int) -> None:
        self._words[(place + _NUMBERS_AT) // 8 + name] = number

    def write(self, place: int, how: bytes, file: bytes, shape: tuple[int, int, int]) -> None:
        """What is to be done. A copy by NumPy would let go of Python's lock, and get it back when others like to."""
        for name, number in enumerate((QUEUED, 0, 1, 0, 0, len(file), len(how), *shape)):
            self.say(place, name, number)
        self._map[place + _TEXT_AT : place + _TEXT_AT + len(how)] = how
        self._map[place + _PAGE : place + _PAGE + len(file)] = file

    def how(self, place: int) -> bytes:
        return self._map[place + _TEXT_AT : place + _TEXT_AT + self.number(place, HOW_BYTES)]

    def file(self, place: int) -> bytes:
        return self._map[place + _PAGE : place + _PAGE + self.number(place, FILE_BYTES)]

    def pixels(self, place: int) -> npt.NDArray[np.uint8]:
        """(H, W, C)"""
        shape = [self.number(place, name) for name in (HEIGHT, WIDTH, CHANNELS)]
        begin = place + _PAGE + _whole_pages(self.number(place, FILE_BYTES))
        return self._bytes[begin : begin + math.prod(shape)].reshape(shape)

    def text(self, place: int) -> str:
        """What is wrong, in JSON."""
        return self._map[place + _TEXT_AT : place + _PAGE].rstrip(b"\0").decode()

    def write_text(self, place: int, text: str) -> None:
        room = _PAGE - _TEXT_AT
        self._map[place + _TEXT_AT : place + _PAGE] = text.encode()[:room].ljust(room, b"\0")


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE) * _PAGE


# --- the C library's semaphores, for Python's own are no part of such memory ------------------------------------------


@functools.cache
def _libc(keeps_lock: bool) -> Any:
    """The C library, whose functions are called without Python's lock, or, if they never wait, with it."""
    library = ctypes.PyDLL(None, use_errno=True) if keeps_lock else ctypes.CDLL(None, use_errno=True)
    library.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    library.sem_post.argtypes = library.sem_trywait.argtypes = [ctypes.c_void_p]
    library.sem_timedwait.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Time)]
    library.write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
    library.write.restype = ctypes.c_ssize_t
    return library


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def make_semaphore(address: int) -> None:
    if _libc(True).sem_init(address, 1, 0):
        raise OSError(ctypes.get_errno(), "sem_init")


def post(address: int) -> None:
    _libc(True).sem_post(address)


def wait_for(address: int, seconds: float) -> None:
    """Until it is posted, but no longer than so many seconds."""
    if _libc(True).sem_trywait(address):
        ends_s = time.time() + seconds
        until = _Time(int(ends_s), int(ends_s % 1 * 1e9))
        _libc(False).sem_timedwait(address, ctypes.byref(until))


# --- the processes ---------------------------------------------------------------------------------------------------


class _Worker:
    """A process, and whether it has imported what it decodes with."""

    def __init__(self, shared: Shared, jobs: int, done: int) -> None:
        self._said, says = os.pipe()
        os.set_blocking(self._said, False)
        self._is_ready = False
        descriptors = (shared.descriptor, jobs, says, done)
        try:
            self.process = start_python(
                "nbvision.codecs._worker",
                (shared.descriptor, shared.size_bytes, jobs, says, done),
                descriptors=descriptors,
                environment=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )
        except OSError:
            os.close(self._said)
            raise
        finally:
            os.close(says)

    def is_ready(self) -> bool:
        if not self._is_ready:
            with contextlib.suppress(BlockingIOError):
                self._is_ready = bool(os.read(self._said, 1))
        return self._is_ready

    def end(self) -> None:
        """End it, whatever it does, unless it has ended."""
        os.close(self._said)
        self.process.kill()
        self.process.wait()


class _Done:
    """Who is to be told that a block is done with. Processes write its place into a pipe, which a thread reads."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        os.set_blocking(self.write, False)  # for all that have this end: nobody reads it before somebody waits
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[HostJob, list[Callable[[], None]], float]] = {}  # by place
        self._thread: threading.Thread | None = None

    def tell(self, place: int, job: HostJob, callback: Callable[[], None]) -> None:
        """Call back once a job is over; after half a second in any case."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._listen, name="nbvision-decoded", daemon=True)
                with contextlib.suppress(RuntimeError):  # there can be no more threads
                    thread.start()
                    self._thread = thread
            if is_heard := self._thread is not None:
                was_idle = not self._waiting
                until_s = time.monotonic() + _PATIENCE_S
                self._waiting.setdefault(place, (job, [], until_s))[1].append(callback)
        if not is_heard:
            callback()
            return
        if was_idle:
            self._say(_LOOK)
        self._call(place, if_over=True)  # it may have said so before

    def end(self) -> None:
        """Nobody will be done any more. The processes have ended."""
        os.close(self.write)
        if self._thread is None:
            os.close(self._read)

    def _say(self, place: int) -> None:
        with contextlib.suppress(BlockingIOError):  # then there is enough to read
            os.write(self.write, DONE_AT.pack(place))

    def _listen(self) -> None:
        """The life of the thread: until the last process and this one have closed the other end."""
        poll, is_open, looked_s = select.poll(), True, 0.0
        poll.register(self._read, select.POLLIN)
        while is_open:
            if poll.poll(_LOOK_S * 1e3 if self._waiting else None):
                said = os.read(self._read, 512 * DONE_AT.size)
                is_open = bool(said)
                for (place,) in DONE_AT.iter_unpack(said):
                    self._call(place, if_over=True)  # another job may have the place by now
            if not is_open or time.monotonic() - looked_s > _LOOK_S:
                looked_s = time.monotonic()
                for place in self._waited_for_in_vain(is_open):
                    self._call(place)
        os.close(self._read)

    def _waited_for_in_vain(self, is_open: bool) -> list[int]:
        """Places of which nothing was said. Apart, so that the thread holds no job while it waits."""
        now_s = time.monotonic()
        with self._lock:
            waiting = list(self._waiting.items())
        return [place for place, (job, _, until_s) in waiting if now_s > until_s or not is_open or job.is_over]

    def _call(self, place: int, *, if_over: bool = False) -> None:
        with self._lock:
            found = self._waiting.get(place)
            if found is None or (if_over and not found[0].is_over):
                return
            del self._waiting[place]
        call_all(found[1])


class Processes:
    """Some processes, and the memory that they share with this one, until nobody holds this object any more.

    Parameters
    ----------
    count : int
    size_bytes : int
        Of files and pixels under way, together.

    Raises
    ------
    DeviceError
        Where there is no such memory (``memfd_create``), or not so much.
    """

    def __init__(self, count: int, size_bytes: int) -> None:
        if not hasattr(os, "memfd_create") or not sys.executable:
            raise DeviceError("processes that decode need Linux and a python executable; leave processes at 0 here")
        size_bytes = _whole_pages(size_bytes)
        memory = os.memfd_create("nbvision-decode")
        try:
            os.ftruncate(memory, size_bytes)
            self.shared = Shared(memory, size_bytes)
        except (OSError, ValueError, OverflowError) as error:
            os.close(memory)
            raise DeviceError(f"{size_bytes} bytes of memory cannot be shared: {error}; use fewer") from error
        self._owner = os.getpid()
        self.places = Places(size_bytes)
        self._released: collections.deque[tuple[int, int]] = collections.deque()  # places and sizes
        # Here and not with the jobs: of a cycle that is collected, events and streams may go before their job.
        self._reads: Reads = collections.defaultdict(dict)
        self._changing = threading.Lock()
        self.done = _Done()
        self._jobs_read, self._jobs = os.pipe()
        os.set_blocking(self._jobs, False)
        self._tickets = itertools.count(1)
        self._lost_since_s: dict[int, float] = {}  # by place
        self._useless_starts = 0
        self._looked_s = time.monotonic()
        self._reclaimed_s = 0.0
        self._pinned: list[int] = []  # the address, once it is
        self._workers: list[_Worker] = []
        files = (memory, self._jobs_read, self._jobs)
        weakref.finalize(self, _end, self._owner, self._workers, self.done, files, self._reads, self._pinned)
        for _ in range(count):
            self._start()

    def is_ours(self) -> bool:
        """Whether this is the process that made it, and not a fork of it."""
        return os.getpid() == self._owner

    def begin(self, image: CompressedImage, how: How) -> HostJob | None:
        """Let a process decode an image; None if none is ready, or there is no room for the image."""
        shape, said = how.shape(image), _pickled(how)
        size_bytes = _PAGE + _whole_pages(len(image.data)) + _whole_pages(math.prod(shape))
        place = self._take(size_bytes) if self.is_ours() else None
        if place is None:
            return None
        job = HostJob(self, place, size_bytes)
        self.shared.write(place, said, image.data, shape)
        make_semaphore(self.shared.address + place)
        return job if self.queue(place) else None

    def queue(self, place: int) -> bool:
        """Let a process take a block; False, and nobody will, if the pipe is full."""
        ticket = next(self._tickets)
        self.shared.say(place, TICKET, ticket)
        if _libc(True).write(self._jobs, JOB.pack(place, ticket), JOB.size) == JOB.size:
            return True
        self.shared.say(place, STATE, FAILED)
        self.shared.say(place, HAS_LEFT, 1)
        return False

    def pin(self) -> None:
        """Let the GPU copy from the memory while the host goes on; where the system forbids that, the host waits."""
        with self._changing:
            if not self._pinned:
                runtime = require_cupy("pinned memory").cuda.runtime
                with contextlib.suppress(runtime.CUDARuntimeError):
                    runtime.hostRegister(self.shared.address, self.shared.size_bytes, _FOR_ALL_DEVICES)
                    self._pinned.append(self.shared.address)

    def wait_until_ready(self) -> None:
        """Until all processes have imported what they decode with, or have ended."""
        ends_s = time.monotonic() + _START_S
        while time.monotonic() < ends_s and self.has_any():
            with self._changing:
                if all(worker.is_ready() for worker in self._workers):
                    return
            time.sleep(0.01)

    def has_taken_all(self) -> bool:
        """Whether no job is left for a process to take."""
        import fcntl  # not on every system
        import termios

        left = fcntl.ioctl(self._jobs_read, termios.FIONREAD, bytes(4))
        return not int.from_bytes(left, sys.byteorder)

    def has_any(self) -> bool:
        """Whether there is a process to wait for; those that have ended are replaced."""
        with self._changing:
            self._replace()
            return bool(self._workers)

    def lives(self, process_id: int) -> bool:
        with self._changing:
            self._replace()
            return self._has(process_id)

    def keep_until(self, place: int, event: Any, stream: Any) -> None:
        """A block is read on a stream until an event of it, which must not be asked once the stream is gone."""
        self._reads[place][stream.ptr] = event, stream

    def release(self, place: int, size_bytes: int) -> None:
        """Take a block back, once nobody writes or reads it any more."""
        self.shared.say(place, IS_WANTED, 0)
        self._released.append((place, size_bytes))  # called by finalizers, which must not take locks

    def _has(self, process_id: int) -> bool:
        return any(worker.process.pid == process_id for worker in self._workers)

    def _replace(self) -> None:
        self._looked_s = time.monotonic()
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._useless_starts = 0 if worker.is_ready() else self._useless_starts + 1
            self._workers.remove(worker)
            worker.end()
            if self._useless_starts < _STARTS:
                self._start()

    def _start(self) -> None:
        try:
            self._workers.append(_Worker(self.shared, self._jobs_read, self.done.write))
        except OSError:  # threads decode as well
            self._useless_starts += 1

    # --- memory

    def _take(self, size_bytes: int) -> int | None:
        if size_bytes > self.shared.size_bytes // _LARGEST:
            return None
        with self._changing:
            if time.monotonic() - self._looked_s > _REPLACE_S:
                self._replace()
            if not any(worker.is_ready() for worker in self._workers):
                return None
            if len(self._released) > _LEFT_ALONE:
                self._reclaim()
            place = self.places.take(size_bytes)
            if place is None and self._released:
                self._reclaim()
                place = self.places.take(size_bytes)
            return place

    def _reclaim(self) -> None:
        if time.monotonic() - self._reclaimed_s < _RECLAIM_S:
            return  # of what was still used then, most still is
        self._reclaimed_s = time.monotonic()
        for _ in range(len(self._released)):
            place, size_bytes = self._released[0]
            if self._is_used(place) or not all(event.done for event, _ in self._reads.get(place, {}).values()):
                self._released.rotate(-1)
                continue
            self._released.popleft()
            self._reads.pop(place, None)
            self._lost_since_s.pop(place, None)
            self.shared.say(place, TICKET, 0)
            self.places.give_back(place, size_bytes)

    def _is_used(self, place: int) -> bool:
        """Whether a process may still write to a block, or find it in the pipe."""
        if self.shared.number(place, HAS_LEFT):
            return False
        worker = self.shared.number(place, WORKER)
        if worker:
            return self._has(worker)
        if not self.has_taken_all():
            return True
        # One that was only held up finds another ticket there, and leaves the block alone.
        now_s = time.monotonic()
        return now_s - self._lost_since_s.setdefault(place, now_s) < _LOST_S


def _end(
    owner: int, workers: list[_Worker], done: _Done, files: tuple[int, ...], reads: Reads, pinned: list[int]
) -> None:
    """What is left to do for processes that nobody uses any more."""
    if os.getpid() != owner:
        return  # a forked child, whose parent still uses them
    while workers:  # none is left to whoever still asks
        workers.pop().end()
    done.end()
    for file in files:
        os.close(file)
    for address in pinned:
        runtime = require_cupy("pinned memory").cuda.runtime
        with contextlib.suppress(runtime.CUDARuntimeError):  # the device may be gone
            for event, _ in itertools.chain(*(streams.values() for streams in reads.values())):
                event.synchronize()
            runtime.hostUnregister(address)


@functools.lru_cache(maxsize=64)
def _pickled(how: How) -> bytes:
    return pickle.dumps(how)


class HostJob:
    """An image that a process decodes. Who lets go of it before a process has come to it calls it off."""

    def __init__(self, by: Processes, place: int, size_bytes: int) -> None:
        self._by, self._place, self._size_bytes = by, place, size_bytes
        self._waiting = threading.Lock()
        self._is_over = False
        self._is_decoded = False
        self._pipe_was_empty = False
        self._deaths = 0
        self._said: dict[str, Any] = {}

    def __del__(self) -> None:
        if self._by.is_ours():
            self._by.release(self._place, self._size_bytes)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._is_over or not self._by.is_ours() or self._by.shared.number(self._place, STATE) >= DONE

    @property
    def is_decoded(self) -> bool:
        """Whether a process has decoded it, or has found what is wrong with it."""
        return self._by.is_ours() and self._by.shared.number(self._place, STATE) in (DONE, REFUSED)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call back once :meth:`wait` would not wait any more, or after half a second, from any thread."""
        if self.is_over:
            callback()
        else:
            self._by.done.tell(self._place, self, callback)

    def wait(self) -> bool:
        """Wait for the process; False if it came to nothing, and somebody else has to decode the image."""
        if not self._by.is_ours():
            return False
        with self._waiting:
            while not self._is_over:
                # It only saves time: who ends between its last word and this leaves the word.
                wait_for(self._by.shared.address + self._place, _LOOK_S)
                if self.is_over:
                    self._end()
                else:
                    self._look()
            return self._is_decoded

    def give(self, image: CompressedImage) -> npt.NDArray[np.uint8] | None:
        """The pixels, after :meth:`wait`, for as long as this lives; None, and why in the image, if there are none."""
        for name, said in self._said.items():
            error = DecodeError(said["message"], kind=said["kind"], source=image.source, valid_rows=said["valid_rows"])
            setattr(image, name, error)
        return None if image.error is not None else self._by.shared.pixels(self._place)

    def keep_until(self, event: Any, stream: Any) -> None:
        """The pixels are copied on a stream until an event of it."""
        self._by.keep_until(self._place, event, stream)

    def _end(self) -> None:
        if self.is_decoded:
            self._said = json.loads(self._by.shared.text(self._place))
            self._is_decoded = True
        self._is_over = True

    def _look(self) -> None:
        """Nothing has come for a while: whether something still may."""
        shared, place = self._by.shared, self._place
        worker = shared.number(place, WORKER)
        if worker == 0:
            # Who took it before the last look, and has not said so since, ended in between.
            was_empty, self._pipe_was_empty = self._pipe_was_empty, self._by.has_taken_all()
            is_lost = was_empty and not shared.number(place, WORKER)
            self._is_over = is_lost or not self._by.has_any()
        elif not self._by.lives(worker) and not self.is_over:
            self._deaths += 1
            if self._deaths == 1:  # it may have been anything
                shared.say(place, WORKER, 0)
                shared.say(place, STATE, QUEUED)
                self._pipe_was_empty = False
                self._by.queue(place)
                return
            message = "two processes ended while they decoded this file; it may be damaged, or memory was short"
            self._said = {"error": {"message": message, "kind": "failed", "valid_rows": None}}
            shared.say(place, STATE, REFUSED)
            self._is_over = self._is_decoded = True


# --- those of this process -------------------------------------------------------------------------------------------

_making = threading.Lock()
_in_use: weakref.WeakValueDictionary[tuple[int, int, int], Processes] = weakref.WeakValueDictionary()


def processes(count: int, size_bytes: int) -> Processes:
    """Those that all decoders of this process share which ask for as many."""
    key = (os.getpid(), count, size_bytes)
    with _making:
        found = _in_use.get(key)
        if found is None:
            found = _in_use[key] = Processes(count, size_bytes)
        return found
