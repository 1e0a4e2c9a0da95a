"""Stages that work on different batches at the same time: decode the next one while this one is inferred."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nbvision.errors import InputError
from nbvision.runtime.device import Device, require_cupy, resolve_device

__all__ = ["Pipeline", "PipelineReport", "StageReport"]

OnError = Literal["raise", "return"]


@dataclass(frozen=True)
class StageReport:
    """What one stage did: milliseconds are means of an item.

    Attributes
    ----------
    name : str
    items : int
    host_ms : float
        In the stage's function, on the host.
    gpu_ms : float or None
        From its first to its last work on the GPU; None on the CPU.
    input_wait_ms : float
        The thread had nothing to do: the stage before, or the source, is slower.
    output_wait_ms : float
        The thread had no room for its result, or the GPU was too far behind: what comes after is slower.
    output_bytes : float
        In the arrays that it returned.
    """

    name: str
    items: int
    host_ms: float
    gpu_ms: float | None
    input_wait_ms: float
    output_wait_ms: float
    output_bytes: float

    @property
    def busy_ms(self) -> float:
        """What the stage alone would take: the larger of its times on the host and on the GPU."""
        return max(self.host_ms, self.gpu_ms or 0.0)


@dataclass(frozen=True)
class PipelineReport:
    """What the stages of a pipeline did in one pass; as text, a table.

    Attributes
    ----------
    stages : tuple of StageReport
    items : int
        That came out, errors included.
    seconds : float
        From the start of the pass until its last item came out, or until now.
    """

    stages: tuple[StageReport, ...]
    items: int
    seconds: float

    @property
    def slowest(self) -> StageReport:
        """The stage that bounds the others."""
        return max(self.stages, key=lambda stage: stage.busy_ms)

    def __str__(self) -> str:
        header = ["stage", "items", "host ms", "GPU ms", "input wait ms", "output wait ms", "output MB"]
        rows = [header]
        for stage in self.stages:
            times = (stage.host_ms, stage.gpu_ms, stage.input_wait_ms, stage.output_wait_ms)
            cells = ["" if time_ms is None else f"{time_ms:.3f}" for time_ms in times]
            rows.append([stage.name, str(stage.items), *cells, f"{stage.output_bytes / 1e6:.2f}"])
        width = max(len(row[0]) for row in rows)
        lines = [f"{row[0]:{width}}" + "".join(f" {cell:>14}" for cell in row[1:]) for row in rows]
        rate = f"{self.items} items in {self.seconds:.2f} s"
        if self.items and self.seconds:
            rate += f", {self.seconds / self.items * 1e3:.3f} ms an item; slowest stage: {self.slowest.name}"
        return "\n".join([*lines, rate])


class Pipeline:
    """Named stages, each with a thread and, on CUDA, a stream of its own.

    A stage is a plain callable that takes what the one before returned. While one stage works on an item, the stage
    before works on the next. Between two stages wait ``depth`` items at most, so memory is bounded.

    Parameters
    ----------
    stages : dict of str to callable
        In the order in which the data flows. Each is called by one thread at a time, and in the order of the items.
    depth : int
        Items that may wait before a stage, and items whose work on the GPU may be queued in it.
    device : {"cpu", "cuda"}, optional
        Where the stages work; default as everywhere. On ``"cpu"`` there are no streams.

    Raises
    ------
    InputError
        For no stages, a stage that cannot be called, or a depth that is no positive integer.
    DeviceError
        If CUDA was asked for and cannot be used.

    Notes
    -----
    Each stage's function runs with the stage's stream as CuPy's current one, after the work of the stage before, on the
    GPU. What a stage was given is kept until its work with it is done, so that memory of any kind (of
    :mod:`nbvision.memory`, of CuPy, of torch) may be let go in one stage and taken again in another. The context
    variables of the caller, and with them ``memory.source``, hold in the stages.

    Examples
    --------
    >>> pipeline = nbv.Pipeline({"decode": nbv.decode, "letterbox": lambda batch: plan(batch)[0], "detect": detector})
    ... # doctest: +SKIP
    >>> for heads in pipeline.stream(batches_of_files): ...  # doctest: +SKIP
    >>> print(pipeline.report())  # doctest: +SKIP
    """

    def __init__(
        self, stages: Mapping[str, Callable[[Any], Any]], *, depth: int = 2, device: Device | None = None
    ) -> None:
        if not isinstance(stages, Mapping) or not stages or not all(map(callable, stages.values())):
            raise InputError(f"stages are {stages!r}; expected a dict of names and callables, one at least")
        if not isinstance(depth, int) or depth < 1:
            raise InputError(f"depth is {depth!r}; expected a positive integer")
        self.device: Device = resolve_device(device)
        self.depth = depth
        self._gpu = _Gpu() if self.device == "cuda" else None
        self._stages = [
            _Stage(str(name), call, self._gpu.new_stream() if self._gpu else None) for name, call in stages.items()
        ]
        self._pass: _Pass | None = None

    def __call__(self, item: Any) -> Any:
        """One item through all stages, one after the other, in the caller's thread and on its stream."""
        for stage in self._stages:
            item = stage.call(item)
        return item

    def stream(self, items: Iterable[Any], *, on_error: OnError = "raise") -> Iterator[Any]:
        """All items through all stages, which overlap; results come in the order of the items.

        Parameters
        ----------
        items : iterable
            Read by the first stage's thread, no further ahead than there is room for.
        on_error : {"raise", "return"}
            Whether an exception of a stage is raised in its item's turn, which ends the pass, or comes out in place of
            the result, which costs the other items nothing. An exception of ``items`` itself is always raised.

        Yields
        ------
        object
            What the last stage returned. On CUDA it is ready for CuPy's current stream of the caller, and its memory is
            kept until the work is done that the caller has queued before it asks for the next result.

        Raises
        ------
        InputError
            For an unknown ``on_error``.
        """
        if on_error not in get_args(OnError):
            raise InputError(f"on_error is {on_error!r}; expected one of {get_args(OnError)}")
        self._pass = _Pass(self._stages, iter(items), self.depth, self._gpu)
        return self._pass.results(on_error)

    def report(self) -> PipelineReport:
        """What the stages did in the last pass of :meth:`stream`, or have done so far in one that is under way.

        Raises
        ------
        InputError
            If there was none.
        """
        if self._pass is None:
            raise InputError("the pipeline has not run; expected a pass of stream() before report()")
        return self._pass.report()


@dataclass(frozen=True)
class _Stage:
    name: str
    call: Callable[[Any], Any]
    stream: Any


@dataclass
class _Totals:
    items: int = 0
    host_s: float = 0.0
    gpu_ms: float = 0.0
    input_wait_s: float = 0.0
    output_wait_s: float = 0.0
    output_bytes: int = 0


@dataclass
class _Item:
    """What goes from stage to stage: a value and the event after which it is there, or an exception.

    A fatal one is no single item's: the source failed, or the GPU.
    """

    value: Any = None
    ready: Any = None
    error: BaseException | None = None
    is_fatal: bool = False


_END = _Item()


class _Channel:
    """A queue of bounded length between two threads, either of which may leave."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: collections.deque[_Item] = collections.deque()
        self._changed = threading.Condition()
        self._is_abandoned = False

    def put(self, item: _Item) -> bool:
        """Wait for room; False if nobody takes items any more. The end always has room."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._depth or self._is_abandoned or item is _END)
            if not self._is_abandoned:
                self._items.append(item)
                self._changed.notify_all()
            return not self._is_abandoned

    def take(self) -> _Item:
        """Wait for an item; the end if nobody shall take more."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_abandoned)
            if self._is_abandoned:
                return _END
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def abandon(self) -> None:
        with self._changed:
            self._is_abandoned = True
            self._items.clear()
            self._changed.notify_all()


class _Gpu:
    """Streams, events and NVTX ranges of the device that was current when the pipeline was made."""

    def __init__(self) -> None:
        self._cuda = require_cupy("a pipeline on CUDA").cuda
        self._device = self._cuda.Device()

    def new_stream(self) -> Any:
        return self._cuda.Stream(non_blocking=True)

    def mark(self) -> Any:
        """An event at the present end of the current stream."""
        event = self._cuda.Event(block=True)  # who waits for it leaves the core to the other stages
        event.record()
        return event

    def wait(self, event: Any) -> None:
        """Let the current stream wait for an event."""
        self._cuda.get_current_stream().wait_event(event)

    def elapsed_ms(self, first: Any, last: Any) -> float:
        return float(self._cuda.get_elapsed_time(first, last))

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with self._device, stream:
            yield

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """A named range in the timeline of NVIDIA's profilers."""
        nvtx = self._cuda.nvtx
        if not nvtx.available:
            yield
            return
        nvtx.RangePush(name)
        try:
            yield
        finally:
            nvtx.RangePop()


@dataclass
class _Held:
    """Values that work on the GPU still reads, the oldest first, each with the events around that work."""

    gpu: _Gpu | None
    values: collections.deque[tuple[Any, Any, Any]] = field(default_factory=collections.deque)

    def add(self, value: Any, first: Any, last: Any) -> None:
        if self.gpu is not None:
            self.values.append((value, first, last))

    def let_go(self, *, keep: int) -> float:
        """Drop what is done, and wait until no more than ``keep`` are left; returns the milliseconds that it took."""
        took_ms = 0.0
        while self.values and (len(self.values) > keep or self.values[0][2].done):
            _, first, last = self.values[0]
            last.synchronize()
            if first is not None and self.gpu is not None:
                took_ms += self.gpu.elapsed_ms(first, last)
            self.values.popleft()
        return took_ms


class _Pass:
    """One pass of items through the stages: its threads, and what they measure."""

    def __init__(self, stages: list[_Stage], source: Iterator[Any], depth: int, gpu: _Gpu | None) -> None:
        self._stages, self._source, self._depth, self._gpu = stages, source, depth, gpu
        self._channels = [_Channel(depth) for _ in stages]
        self._totals = [_Totals() for _ in stages]
        self._started_s = time.perf_counter()
        self._ended_s: float | None = None
        self._came_out = 0

    def results(self, on_error: OnError) -> Iterator[Any]:
        threads = [
            # Each thread wants a copy of its own of the caller's context.
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(self._work, index),
                name=f"nbvision-stage-{stage.name}",
                daemon=True,
            )
            for index, stage in enumerate(self._stages)
        ]
        held = _Held(self._gpu)
        self._started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        try:
            while (item := self._channels[-1].take()) is not _END:
                self._came_out += 1
                self._ended_s = time.perf_counter()
                if item.error is not None:
                    if on_error == "raise" or item.is_fatal:
                        raise item.error
                    yield item.error
                    continue
                if self._gpu is None:
                    yield item.value
                    continue
                self._gpu.wait(item.ready)
                try:
                    yield item.value
                finally:
                    held.add(item.value, None, self._gpu.mark())
                held.let_go(keep=self._depth)
        finally:
            for channel in self._channels:
                channel.abandon()
            for thread in threads:
                thread.join()
            held.let_go(keep=0)

    def report(self) -> PipelineReport:
        stages = []
        for stage, totals in zip(self._stages, self._totals, strict=True):
            count = max(totals.items, 1)
            stages.append(
                StageReport(
                    stage.name,
                    totals.items,
                    host_ms=totals.host_s * 1e3 / count,
                    gpu_ms=totals.gpu_ms / count if self._gpu else None,
                    input_wait_ms=totals.input_wait_s * 1e3 / count,
                    output_wait_ms=totals.output_wait_s * 1e3 / count,
                    output_bytes=totals.output_bytes / count,
                )
            )
        seconds = (self._ended_s or time.perf_counter()) - self._started_s
        return PipelineReport(tuple(stages), self._came_out, seconds)

    def _work(self, index: int) -> None:
        """The life of a stage's thread."""
        stage, channel = self._stages[index], self._channels[index]
        take = self._next if index == 0 else self._channels[index - 1].take
        try:
            with self._gpu.on(stage.stream) if self._gpu else contextlib.nullcontext():
                self._step_by_step(stage, take, channel, self._totals[index])
        except BaseException as error:  # such as of a GPU that fell off: nobody shall wait for this thread in vain
            channel.put(_Item(error=error, is_fatal=True))
        channel.put(_END)

    def _step_by_step(self, stage: _Stage, take: Callable[[], _Item], channel: _Channel, totals: _Totals) -> None:
        held = _Held(self._gpu)
        has_room = True
        while has_room:
            asked_s = time.perf_counter()
            item = take()
            took_s = time.perf_counter()
            if item is _END:
                break
            if item.error is None:
                item = self._step(stage, item, held)
                totals.items += 1
                totals.output_bytes += _count_bytes(item.value)
            stepped_s = time.perf_counter()
            totals.gpu_ms += held.let_go(keep=self._depth)
            has_room = channel.put(item)
            totals.input_wait_s += took_s - asked_s
            totals.host_s += stepped_s - took_s
            totals.output_wait_s += time.perf_counter() - stepped_s
            del item  # while the thread waits for the next one, nothing keeps this one
        totals.gpu_ms += held.let_go(keep=0)

    def _next(self) -> _Item:
        """The next item of the source."""
        try:
            return _Item(next(self._source))
        except StopIteration:
            return _END
        except BaseException as error:
            self._source = iter(())
            return _Item(error=error, is_fatal=True)

    def _step(self, stage: _Stage, item: _Item, held: _Held) -> _Item:
        gpu = self._gpu
        first = None
        if gpu is not None:
            if item.ready is not None:
                gpu.wait(item.ready)
            first = gpu.mark()
        try:
            with gpu.range(stage.name) if gpu else contextlib.nullcontext():
                result = _Item(stage.call(item.value))
        except BaseException as error:  # raised where it is waited for
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"in stage {stage.name!r} of a pipeline")
            result = _Item(error=error)
        if gpu is not None:
            result.ready = gpu.mark()
            held.add(item.value, first, result.ready)
        return result


def _count_bytes(value: Any) -> int:
    """Of the arrays in a value: in itself, or in tuples, lists, dicts and dataclasses."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if isinstance(value, Mapping):
        return sum(map(_count_bytes, value.values()))
    if isinstance(value, (tuple, list)):
        return sum(map(_count_bytes, value))
    if dataclasses.is_dataclass(value):
        return sum(_count_bytes(getattr(value, each.name)) for each in dataclasses.fields(value))
    return 0
