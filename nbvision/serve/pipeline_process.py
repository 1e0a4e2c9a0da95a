"""A pipeline in a process of its own: its Python's lock is not the one that HTTP takes, and it may die alone.

A batch gives the lock away and wants it back a hundred times, once for each kernel that it launches, and a request over
HTTP keeps it for a millisecond.  In one process each waits for the other all the time.

Items go over as they come, through one socket, in the order in which they came, so that what can begin before there is
a batch begins.  A batch is a list of their numbers, and each thread that runs batches has a socket of its own and a
thread there that answers it.  The other process ends when this one has.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from nbvision.errors import EngineError, NbvisionError
from nbvision.runtime import memory
from nbvision.runtime.device import array_module, own_stream, synchronize
from nbvision.serve.pipelines import PIPELINES, Pipeline
from nbvision.serve.process import settle, share_arenas, take_short_turns
from nbvision.serve.status import RefusedError

__all__ = ["PipelineProcess", "start_pipeline"]

_DESCRIPTION = ("inputs", "outputs", "device", "digest", "decodes_ahead")
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

    __slots__ = ("_gone", "number")

    def __init__(self, number: int, gone: collections.deque[int]) -> None:
        self.number, self._gone = number, gone

    def __del__(self) -> None:
        self._gone.append(self.number)  # it is told with the next item; a finalizer must not wait


class PipelineProcess(Pipeline):
    """Stands for a pipeline of another process; :func:`start_pipeline` makes it.

    Attributes
    ----------
    held_bytes : int
        Of the other process' memory manager, after its last batch.
    """

    held_bytes = 0

    def __init__(self, kind: str, options: Mapping[str, Any], *, threads: int) -> None:
        self._control, theirs = Pipe()
        pairs = [Pipe() for _ in range(threads)]
        others = [theirs, *(other for _, other in pairs)]
        self._lines = collections.deque(line for line, _ in pairs)
        self._all_lines = list(self._lines)
        self._own = threading.local()
        self._numbers = itertools.count()
        self._gone: collections.deque[int] = collections.deque()
        self._outgoing: queue.SimpleQueue[tuple[_Sent, Any] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name=f"nbvision sends to {kind}", daemon=True)
        # It finds what this process finds, and nothing in the directory where it happens to be.
        path = [str(entry) for entry in sys.path if entry]
        code = f"import sys; sys.path[:] = {path!r}; from {__name__} import main; main(*sys.argv[1:])"
        descriptors = [other.fileno() for other in others]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is for whom it serves
            )
        finally:
            for other in others:
                other.close()
        self._writer.start()
        try:
            self._control.send((kind, dict(options)))
            said = self._control.recv()
        except (EOFError, OSError):
            self.close()
            raise self._ended() from None
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
        return self._process.poll() is None

    def open(self, item: Any) -> _Sent:
        """Hand an item over; the other process opens it.

        Raises
        ------
        RefusedError
            If the process has ended: 503, for another one is started.
        """
        if not self.is_alive:
            raise RefusedError(f"{self._ended()}; it is started again", 503, retry_after_s=_RETRY_S)
        sent = _Sent(next(self._numbers), self._gone)
        self._outgoing.put((sent, item))
        return sent

    def run(self, items: list[Any]) -> list[Any]:
        return self._ask("run", items)

    def warm_up(self, items: list[Any]) -> list[Any]:
        return self._ask("warm_up", items)

    def close(self) -> None:
        """End the process."""
        self._outgoing.put(None)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._writer.join()
        for line in self._all_lines:
            line.close()

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
            raise outcome
        results: list[Any] = outcome
        return results

    def _write(self) -> None:
        """The life of the thread that hands items over, which may have to wait for the other process to take them."""
        with contextlib.suppress(OSError):  # the process has ended, and who waits for it hears of that
            while (outgoing := self._outgoing.get()) is not None:
                sent, item = outgoing
                gone = [self._gone.popleft() for _ in range(len(self._gone))]
                is_bytes = isinstance(item, bytes)
                self._control.send((sent.number, gone, None if is_bytes else item))
                if is_bytes:  # without a copy
                    self._control.send_bytes(item)
                del outgoing, sent, item
        self._control.close()

    def _ended(self) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        return EngineError(f"the pipeline's process has ended, with status {self._process.returncode}")


# --- the other side ---------------------------------------------------------------------------------------------------


class _Items:
    """What has come, by number."""

    def __init__(self) -> None:
        self._items: dict[int, Any] = {}
        self._changed = threading.Condition()

    def put(self, number: int, item: Any, gone: Iterable[int]) -> None:
        with self._changed:
            for other in gone:
                self._items.pop(other, None)
            self._items[number] = item
            self._changed.notify_all()

    def get(self, numbers: list[int]) -> list[Any]:
        """Items, once all of them have come; raises for the first that could not be opened."""
        with self._changed:
            self._changed.wait_for(lambda: all(number in self._items for number in numbers))
            items = [self._items[number] for number in numbers]
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return items


def main(control: str, *lines: str) -> None:
    """Serve a pipeline to the process that started this one, until that has closed the other end of ``control``."""
    from nbvision.serve.server import log_as_json

    log_as_json()
    share_arenas()
    take_short_turns()
    channel: Connection[Any, Any] = Connection(int(control))
    with contextlib.suppress(EOFError, OSError):
        kind, options = channel.recv()
        try:
            pipeline = PIPELINES[kind](**options)
        except BaseException as error:
            channel.send(_sendable(error))
            return
        items = _Items()
        for line in lines:
            threading.Thread(target=_answer, args=(Connection(int(line)), pipeline, items), daemon=True).start()
        channel.send({name: getattr(pipeline, name) for name in _DESCRIPTION})
        while True:
            number, gone, item = channel.recv()
            item = channel.recv_bytes() if item is None else item
            try:
                item = pipeline.open(item)
            except Exception as error:
                item = error
            items.put(number, item, gone)
    sys.stderr.flush()
    os._exit(0)  # threads may be in the middle of a batch that nobody waits for


def _answer(line: Connection[Any, Any], pipeline: Pipeline, items: _Items) -> None:
    """The life of a thread: run what is asked for on one line, on a stream of its own."""
    device_id = array_module("cuda").cuda.Device().id if pipeline.device == "cuda" else None
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, numbers = line.recv()
            outcome: Any
            try:
                with contextlib.nullcontext() if device_id is None else own_stream(device_id):
                    results = getattr(pipeline, what)(items.get(numbers))
                    synchronize(pipeline.device)
                outcome = [_sendable(result) if isinstance(result, BaseException) else result for result in results]
            except BaseException as error:  # whatever it is, somebody waits for it
                outcome = _sendable(error)
            held_bytes = memory.stats(device=pipeline.device).held_bytes
            try:
                line.send((outcome, held_bytes))
            except (pickle.PicklingError, TypeError, AttributeError) as error:  # somebody's own type
                line.send((_sendable(error), held_bytes))
            if what == "warm_up":
                settle()


# --- errors on their way ----------------------------------------------------------------------------------------------


class _ForeignError(Exception):
    """An exception of a type that the other process alone may know; its own is named like that."""


class _TracebackError(Exception):
    """What the other process would have printed."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _sendable(error: BaseException) -> Any:
    """The error, or something that becomes one like it on the other side."""
    if isinstance(error, NbvisionError) and type(error).__module__.startswith("nbvision."):
        return error
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return _Foreign(type(error).__name__, str(error), trace)


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
