"""A pipeline in a process of its own: its Python's lock is not the one that HTTP takes, and it may die alone.

A batch gives the lock away and wants it back a hundred times, once for each kernel that it launches, and a request over
HTTP keeps it for a millisecond.  In one process each waits for the other all the time.

Items go over as they come, so that what can begin before there is a batch begins: their bytes through memory that both
share, where they are through one pipe.  A batch is a list of their numbers.  Each thread that runs batches has a line
of its own to a thread there that answers it.  The other process ends when this one has.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from nbvision.errors import EngineError, InputError, NbvisionError, OverloadError
from nbvision.runtime import memory
from nbvision.runtime.callbacks import call_all
from nbvision.runtime.child import start_python
from nbvision.runtime.device import array_module, own_stream, synchronize
from nbvision.runtime.places import Places
from nbvision.serve.pipelines import PIPELINES, Pipeline
from nbvision.serve.process import settle, share_arenas, take_short_turns
from nbvision.serve.status import RefusedError

__all__ = ["PipelineProcess", "start_pipeline"]

_DESCRIPTION = ("inputs", "outputs", "device", "digest", "decodes_ahead")
_SHARED_BYTES = 1 << 30  # of items on their way; what has never been used takes no memory
_WORD = 8  # at each place, before the item: whether the other process has read it
_TOLD = struct.Struct("qqqq")  # what goes through the pipe: one of the next three, an item's number, place and size
_BYTES, _PICKLED, _GONE = range(3)
_READY = struct.Struct("q")  # what comes back through another: the number of an item that a batch need not wait for
_END_S = 10.0  # for a process to end by itself
_RETRY_S = 5.0  # when a process that ended may have been started again


def start_pipeline(kind: str, options: Mapping[str, Any], *, threads: int) -> PipelineProcess:
    """Make a pipeline in a process of its own.

    Parameters
    ----------
    kind : str
        One of ``PIPELINES``.
    options : mapping
        Of that kind.
    threads : int
        That will run batches, at most.

    Raises
    ------
    Exception
        What making it raises.
    EngineError
        If the process ends meanwhile.
    """
    # What needs no model (how tensors are items, and results tensors) is done here, by the kind's own methods.
    stand_in = type(f"{PIPELINES[kind].__name__}Process", (PipelineProcess, PIPELINES[kind]), {})
    made: PipelineProcess = stand_in(kind, options, threads=threads)
    return made


# --- this side --------------------------------------------------------------------------------------------------------


class _Sent:
    """An item that the other process has, until nobody here holds this."""

    __slots__ = ("__weakref__", "_coming", "_gone", "number")

    def __init__(self, number: int, gone: collections.deque[int], coming: _Coming) -> None:
        self.number, self._gone, self._coming = number, gone, coming

    def add_done_callback(self, callback: Callable[[_Sent], Any]) -> None:
        """Call ``callback(self)`` once no batch would wait for the item, from any thread."""
        self._coming.tell(self.number, lambda: callback(self))

    def __del__(self) -> None:
        self._gone.append(self.number)  # a finalizer must not take locks


class _Coming:
    """Items that the other process has begun with, and who is to be told when it is done with one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: dict[int, list[Callable[[], None]]] | None = {}  # None once nothing comes any more

    def add(self, number: int) -> None:
        with self._lock:
            if self._callbacks is not None:
                self._callbacks[number] = []

    def tell(self, number: int, callback: Callable[[], None]) -> None:
        with self._lock:
            callbacks = None if self._callbacks is None else self._callbacks.get(number)
            if callbacks is not None:
                callbacks.append(callback)
                return
        callback()

    def listen(self, says: int) -> None:
        """The life of a thread: until the other process has ended."""
        while said := os.read(says, 512 * _READY.size):
            for (number,) in _READY.iter_unpack(said):
                call_all(self.drop(number))
        os.close(says)
        self.end()

    def end(self) -> None:
        """Nothing comes any more."""
        with self._lock:
            left, self._callbacks = self._callbacks or {}, None
        call_all(itertools.chain(*left.values()))

    def drop(self, number: int) -> list[Callable[[], None]]:
        """Forget an item, and who is to be told of it."""
        with self._lock:
            return [] if self._callbacks is None else self._callbacks.pop(number, [])


class PipelineProcess(Pipeline):
    """Stands for a pipeline of another process; :func:`start_pipeline` makes it.

    Attributes
    ----------
    held_bytes : int
        Of the other process' memory manager, after its last batch.
    """

    held_bytes = 0

    def __init__(self, kind: str, options: Mapping[str, Any], *, threads: int) -> None:
        self._numbers = itertools.count()
        self._gone: collections.deque[int] = collections.deque()  # what nobody here holds any more
        self._unread: collections.deque[tuple[int, int]] = collections.deque()  # places and sizes, in order
        self._places = Places(_SHARED_BYTES)
        self._sending = threading.Lock()
        self._is_closed = False
        self._own = threading.local()
        self._coming = _Coming()
        pairs = [Pipe() for _ in range(threads)]
        self._all_lines = [line for line, _ in pairs]
        self._lines = collections.deque(self._all_lines)
        with _shared_file() as file:
            self._map = mmap.mmap(file, _SHARED_BYTES)
            self._words = memoryview(self._map).cast("q")
            hears, self._tells = os.pipe()
            os.set_blocking(self._tells, False)
            said_to_us, says = os.pipe()
            descriptors = [file, hears, says, *(other.fileno() for _, other in pairs)]
            try:
                self._process = start_python(__name__, descriptors, descriptors=descriptors)
            except BaseException:
                os.close(self._tells)
                os.close(said_to_us)
                raise
            finally:
                os.close(hears)
                os.close(says)
                for _, other in pairs:
                    other.close()
        self._watcher = threading.Thread(target=self._watch, name=f"nbvision watches {kind}", daemon=True)
        self._watcher.start()
        listen = functools.partial(self._coming.listen, said_to_us)
        threading.Thread(target=listen, name=f"nbvision hears {kind}", daemon=True).start()
        try:
            self._all_lines[0].send((kind, dict(options)))
            said = self._all_lines[0].recv()
        except (EOFError, OSError):
            said = self._ended()
        except BaseException:
            self.close()
            raise
        if isinstance(said, BaseException):
            self.close()
            raise said
        for name, value in said.items():
            setattr(self, name, value)

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.returncode is None

    def open(self, item: Any) -> _Sent:
        """Hand an item over; the other process opens it.

        Raises
        ------
        RefusedError
            If the process has ended: 503, for another one is started.
        OverloadError
            If more is on its way than there is memory for, or the process takes nothing.
        InputError
            If this is closed.
        """
        if not self.is_alive:
            message = f"the pipeline's process has ended, with status {self._process.returncode}; it is started again"
            raise RefusedError(message, 503, retry_after_s=_RETRY_S)
        kind, data = (_BYTES, item) if isinstance(item, bytes) else (_PICKLED, pickle.dumps(item, 5))
        size_bytes = -(-(_WORD + len(data)) // _WORD) * _WORD
        self.let_go()
        with self._sending:
            if self._is_closed:
                raise InputError("this pipeline is closed; make one here")
            place = self._places.take(size_bytes)
            if place is None:
                raise OverloadError("too many bytes are on their way to the pipeline", retry_after_s=_RETRY_S)
            sent = _Sent(next(self._numbers), self._gone, self._coming)
            if self.decodes_ahead:
                self._coming.add(sent.number)
            self._words[place // _WORD] = 0
            self._map[place + _WORD : place + _WORD + len(data)] = data
            if not self._tell(kind, sent.number, place, len(data)):
                self._places.give_back(place, size_bytes)
                self._coming.drop(sent.number)
                raise OverloadError("the pipeline takes no more items now", retry_after_s=_RETRY_S)
            self._unread.append((place, size_bytes))
        return sent

    def let_go(self) -> None:
        """Use places again whose items have been read, and tell the other process of those that nobody holds here."""
        with self._sending:
            if self._is_closed:
                return
            while self._unread and self._words[self._unread[0][0] // _WORD]:
                self._places.give_back(*self._unread.popleft())
            while self._gone and self._tell(_GONE, self._gone[0], 0, 0):
                self._gone.popleft()

    def run(self, items: list[Any]) -> list[Any]:
        return self._ask("run", items)

    def warm_up(self, items: list[Any]) -> list[Any]:
        return self._ask("warm_up", items)

    def close(self) -> None:
        """End the process; once more, and nothing happens."""
        with self._sending:
            if self._is_closed:
                return
            self._is_closed = True
            os.close(self._tells)
        self._watcher.join(_END_S)
        if self.is_alive:
            self._process.kill()
        self._watcher.join()
        for line in self._all_lines:
            line.close()
        self._words.release()
        self._map.close()

    def _ask(self, what: str, items: list[Any]) -> list[Any]:
        """Let a method of the pipeline have items, and wait for what it returns.

        Raises
        ------
        EngineError
            If the process ends meanwhile.
        Exception
            What the method raises.
        """
        sent = [item if isinstance(item, _Sent) else self.open(item) for item in items]
        if not hasattr(self._own, "line"):
            self._own.line = self._lines.popleft()
        try:
            self._own.line.send((what, [item.number for item in sent]))
            outcome, self.held_bytes = self._own.line.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(outcome, BaseException):
            try:
                raise outcome
            finally:
                del outcome, sent, items  # which its traceback would keep, and itself
        results: list[Any] = outcome
        return results

    def _watch(self) -> None:
        """Once the process has ended, so have those that it has forked, and its lines, whose other ends they held."""
        if hasattr(os, "waitid"):
            with contextlib.suppress(ChildProcessError, ProcessLookupError, PermissionError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
                os.killpg(self._process.pid, signal.SIGKILL)  # its number is its own until it is reaped
        self._process.wait()
        self._coming.end()  # also if something that it has started still holds the pipe
        for line in self._all_lines:
            ours = socket.socket(fileno=line.fileno())
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
            ours.detach()

    def _tell(self, kind: int, number: int, place: int, size_bytes: int) -> bool:
        """Whether there was room in the pipe."""
        try:
            os.write(self._tells, _TOLD.pack(kind, number, place, size_bytes))
        except BlockingIOError:
            return False
        except BrokenPipeError:  # it has ended, and who waits for it hears of that
            pass
        return True

    def _ended(self) -> EngineError:
        self._watcher.join(1)  # until there is a status
        return EngineError(f"the pipeline's process has ended, with status {self._process.returncode}")


@contextlib.contextmanager
def _shared_file() -> Iterator[int]:
    """A file that two processes can map; in memory, where the system has such."""
    with tempfile.TemporaryFile() if not hasattr(os, "memfd_create") else _file_in_memory() as file:
        file.truncate(_SHARED_BYTES)
        yield file.fileno()


def _file_in_memory() -> Any:
    return open(os.memfd_create("nbvision-items"), "w+b")


# --- the other side ---------------------------------------------------------------------------------------------------


class _Items:
    """What has come, by number."""

    def __init__(self) -> None:
        self._items: dict[int, Any] = {}
        self._changed = threading.Condition()

    def put(self, number: int, item: Any) -> None:
        with self._changed:
            self._items[number] = item
            self._changed.notify_all()

    def forget(self, number: int) -> None:
        with self._changed:
            self._items.pop(number, None)

    def get(self, numbers: list[int]) -> list[Any]:
        """Items, once all of them have come; raises for the first that could not be opened."""
        with self._changed:
            self._changed.wait_for(lambda: all(number in self._items for number in numbers))
            items = [self._items[number] for number in numbers]
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return items


def main(shared: str, hears: str, says: str, *lines: str) -> None:
    """Serve a pipeline to the process that started this one, until that has closed the other end of the pipe."""
    from nbvision.serve.server import log_as_json

    _leave_signals_to_the_first()
    log_as_json()
    share_arenas()
    take_short_turns()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # whoever started it has ended
        _serve(int(shared), int(hears), int(says), [Connection(int(line)) for line in lines])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads may be in the middle of a batch that nobody waits for


def _leave_signals_to_the_first() -> None:
    """What is sent to all processes of a service is for the one that answers HTTP."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # which a program that is started here does not inherit
    os.register_at_fork(after_in_child=lambda: [signal.signal(number, signal.SIG_DFL) for number in numbers])


def _serve(shared: int, hears: int, says: int, lines: list[Connection[Any, Any]]) -> None:
    kind, options = lines[0].recv()
    try:
        pipeline = PIPELINES[kind](**options)
    except BaseException as error:
        lines[0].send(_sendable(error))
        return
    lines[0].send({name: getattr(pipeline, name) for name in _DESCRIPTION})
    items = _Items()
    for line in lines:
        threading.Thread(target=_answer, args=(line, pipeline, items), daemon=True).start()
    with mmap.mmap(shared, _SHARED_BYTES) as shared_map:
        while told := os.read(hears, 128 * _TOLD.size):  # each is written at once, so they come whole
            for message in _TOLD.iter_unpack(told):
                _hear(message, shared_map, pipeline, items, says)


def _hear(message: tuple[int, ...], shared: mmap.mmap, pipeline: Pipeline, items: _Items, says: int) -> None:
    """Open an item, or forget one."""
    kind, number, place, size_bytes = message
    if kind == _GONE:
        items.forget(number)
        return
    item: Any = shared[place + _WORD : place + _WORD + size_bytes]
    shared[place : place + _WORD] = (1).to_bytes(_WORD, sys.byteorder)
    try:
        item = pipeline.open(item if kind == _BYTES else pickle.loads(item))
    except Exception as error:
        item = error
    items.put(number, item)
    if pipeline.decodes_ahead:
        if hasattr(item, "add_done_callback"):
            item.add_done_callback(lambda _: _say(says, number))
        else:
            _say(says, number)


def _say(says: int, number: int) -> None:
    """That no batch would wait for an item."""
    with contextlib.suppress(BrokenPipeError):  # nobody waits
        os.write(says, _READY.pack(number))


def _answer(line: Connection[Any, Any], pipeline: Pipeline, items: _Items) -> None:
    """The life of a thread: run what is asked for on one line, on a stream of its own."""
    device_id = array_module("cuda").cuda.Device().id if pipeline.device == "cuda" else None
    try:
        while True:
            what, numbers = line.recv()
            outcome = _outcome(getattr(pipeline, what), numbers, items, device_id)
            held_bytes = memory.stats(device=pipeline.device).held_bytes
            try:
                line.send((outcome, held_bytes))
            except OSError:
                raise
            except Exception as error:  # it does not pickle
                line.send((_sendable(error), held_bytes))
            del outcome  # what it holds is not kept until the next batch has ended
            if what == "warm_up":
                settle()
    except (EOFError, OSError):  # whoever asked has ended
        return
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # or somebody would wait for ever


def _outcome(
    function: Callable[[list[Any]], list[Any]], numbers: list[int], items: _Items, device_id: int | None
) -> Any:
    """The function's results, or its exception, as they can be sent."""
    try:
        with contextlib.nullcontext() if device_id is None else own_stream(device_id):
            results = function(items.get(numbers))
            synchronize("cpu" if device_id is None else "cuda")
        return [_sendable(result) if isinstance(result, BaseException) else result for result in results]
    except BaseException as error:  # whatever it is, somebody waits for it
        return _sendable(error)


# --- errors on their way ----------------------------------------------------------------------------------------------


class _ForeignError(Exception):
    """An exception of a type that the other process alone may know; its own is named like that."""


class _TracebackError(Exception):
    """What the other process would have printed."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _sendable(error: BaseException) -> Any:
    """The error as one that both processes know, or something that becomes one like it on the other side."""
    for kind in type(error).__mro__:
        if isinstance(error, NbvisionError) and kind.__module__.startswith("nbvision."):
            known: NbvisionError = kind.__new__(kind, *error.args)
            known.__dict__.update(error.__dict__)
            return known
    try:
        text = str(error)
    except Exception:
        text = "it does not say what"
    trace = traceback.format_exception(type(error), error, error.__traceback__)
    return _Foreign(type(error).__name__, text, "".join(trace))


class _Foreign:
    """Pickles to a :class:`_ForeignError`."""

    def __init__(self, name: str, text: str, trace: str) -> None:
        self._described = name, text, trace

    def __reduce__(self) -> Any:
        return _foreign, self._described


def _foreign(name: str, text: str, trace: str) -> BaseException:
    error: BaseException = type(name, (_ForeignError,), {})(text)
    error.__cause__ = _TracebackError(trace)
    return error
