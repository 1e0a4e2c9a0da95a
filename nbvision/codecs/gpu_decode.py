"""Decode JPEGs on the GPU with nvImageCodec, into memory the caller owns.

Only what the GPU is good at goes here.  PNG and its like are unpacked on the host even by nvImageCodec, and so are the
codes of progressive JPEGs, which is most of their work.  They take :mod:`nbvision.codecs.host`, where no image waits
for another, and give the same pixels and the same errors on every device.

Two things share the work: the card's JPEG engine, and nvJPEG's CUDA decoder, which unpacks codes on host threads and
makes pixels of them on the GPU.  The engine takes baseline JPEGs; the CUDA decoder extended ones, what the engine
refuses, and as much of the baseline ones as makes the batch faster.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from nbvision.codecs._balance import FEWEST, Balance, Measured, cost_of
from nbvision.codecs._nvimgcodec import SAMPLES, DecoderHandle, Opened
from nbvision.codecs._threads import Turns
from nbvision.codecs.headers import Header
from nbvision.errors import DeviceError
from nbvision.image import Color
from nbvision.runtime.device import CUDA_EXTRA, array_module, available_cores

__all__ = ["decode_into", "takes"]

# nvJPEG always interpolates subsampled colours. libjpeg repeats them where a row has two or fewer (4:2:2 and 4:2:0),
# that is up to a width of 4; there the two would differ by whole colours, so the host decodes such slivers.
_SMOOTHED_FROM_WIDTH = 5

_SLICE = 32  # images of a call of the engine; with fewer large ones, some of its seven parts run idle
_BUSY_SLICE_COST = _SLICE * cost_of(1920 * 1080)  # of a call, while another batch is under way
_ENGINE_THREADS = 4  # take a tenth less than one with large images, and not more with small ones


def takes(header: Header, color: Color) -> bool:
    """Whether the GPU shall try this image."""
    return (
        header.format == "jpeg"
        and header.bits == 8
        and header.variant in ("baseline", "extended")
        and header.colorspace in ("gray", "ycbcr")
        and header.width >= _SMOOTHED_FROM_WIDTH
        and color in SAMPLES
    )


def decode_into(
    addresses: Sequence[int],
    datas: Sequence[bytes],
    headers: Sequence[Header],
    *,
    color: Color,
    deterministic: bool = False,
) -> list[bool]:
    """Decode JPEGs, upright, into the caller's device memory, ordered before what CuPy's current stream gets next.

    Parameters
    ----------
    addresses : sequence of int
        Where each image of ``header.oriented_size`` pixels starts, without gaps between its lines, in memory acquired
        with ``wait_on_host=True``: the engine does not wait for work that is queued on a stream.
    datas : sequence of bytes
    headers : sequence of Header
        All of them complete, and taken by :func:`takes`.
    color : {"rgb", "bgr", "gray"}
    deterministic : bool
        Whether all that the engine can decode is decoded by it, so that the same file always gives the same pixels: the
        two decoders round differently.

    Returns
    -------
    list of bool
        Which images the GPU decoded. The others it refused, without a reason: ask the host, which gives one.

    Raises
    ------
    MissingExtraError
        Without nvImageCodec.
    DeviceError
        If nvImageCodec fails as a whole.
    """
    if not headers:
        return []  # nvImageCodec is imported, and asked whether it knows the colour, only for images
    costs = [cost_of(header.pixels) for header in headers]
    jobs = [_Job(*job) for job in zip(addresses, datas, headers, costs, strict=True)]
    _decoders_of(array_module("cuda").cuda.Device().id).decode(jobs, color, deterministic)
    return [job.done for job in jobs]


@dataclass(slots=True, eq=False)
class _Job:
    address: int
    data: bytes
    header: Header
    cost: int
    done: bool = False

    @property
    def is_turned(self) -> bool:
        return self.header.orientation != 1


class _Decoders:
    """The decoders of one device, for all threads of the process.

    The engine has two, so that it is busy while the host opens files for one of them: two batches of two threads, or
    the slices of one.  Threads take turns at each.
    """

    def __init__(self, device_id: int) -> None:
        self._device_id = device_id
        self._lock = threading.Lock()
        self._balance = Balance()
        self._unread: collections.deque[_Batch] = collections.deque(maxlen=8)  # the last, some still under way
        self._done_s = 0.0  # when the last batch that was read was done
        self._engine: list[_Lane] = []
        with contextlib.suppress(RuntimeError):  # the card has none, or no memory for a second
            for _ in range(2):
                self._engine.append(_Lane("HW_GPU_ONLY", device_id, threads=_ENGINE_THREADS))
        # In which a batch's other decoders are waited for: the engine's second, and the CUDA decoder.
        use_device = array_module("cuda").cuda.Device(device_id).use
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="nbvision-engine", initializer=use_device)
        self._cuda_helper = ThreadPoolExecutor(1, thread_name_prefix="nbvision-cuda-decoder", initializer=use_device)

    @functools.cached_property
    def _cuda(self) -> _Lane:
        """Asked for in its own thread alone, so that there is one."""
        try:
            return _Lane("HYBRID_CPU_GPU", self._device_id, threads=max(1, available_cores() * 3 // 4))
        except RuntimeError as error:
            raise DeviceError(
                f"nvImageCodec makes no JPEG decoder on device {self._device_id}: {error}; is nvJPEG installed? "
                f"pip install 'nbvision[{CUDA_EXTRA}]'"
            ) from error

    def decode(self, jobs: Sequence[_Job], color: Color, deterministic: bool) -> None:
        """Decode all that can be; ``done`` says which."""
        started_s = time.perf_counter()
        for_engine, for_cuda, costs = self._divide(jobs, deterministic)
        try:
            by_engine, by_cuda = self._decode_side_by_side(for_engine, for_cuda, color)
            refused = [job for job in for_engine if not job.done]
            if refused:
                by_cuda += self._decode_side_by_side([], refused, color)[1]
        except BaseException:
            array_module("cuda").cuda.Device(self._device_id).synchronize()  # nobody else knows what is under way
            raise
        stream = array_module("cuda").cuda.get_current_stream()
        for turn in by_engine + by_cuda:
            stream.wait_event(turn.end)
        if costs and not refused:
            batch = _Batch(costs, by_engine, by_cuda, started_s, time.perf_counter())
            with self._lock:
                self._unread.append(batch)

    def _decode_side_by_side(
        self, for_engine: list[_Job], for_cuda: list[_Job], color: Color
    ) -> tuple[list[_Turn], list[_Turn]]:
        """The turns of the engine, and of the CUDA decoder."""
        slices = _sliced(for_engine, self._least(for_engine))
        queue = iter(slices)  # whose steps Python's lock makes atomic
        lanes = sorted(self._engine, key=lambda lane: lane.load)[: len(slices)]
        cuda, helping = [], []
        try:
            if for_cuda:
                cuda.append(self._cuda_helper.submit(self._decode_by_cuda, for_cuda, color))
            helping += [self._helpers.submit(lane.decode, queue, color) for lane in lanes[1:] if not lane.load]
            by_engine = [lane.decode(queue, color) for lane in lanes[:1]]
        finally:
            helping = [future for future in helping if not future.cancel()]  # not those that have not begun
            if cuda or helping:
                wait(cuda + helping)  # all others, also if one fails: they write to the caller's memory
        by_engine += [future.result() for future in helping]
        return [turn for turn in by_engine if turn], [turn for future in cuda if (turn := future.result())]

    def _least(self, jobs: list[_Job]) -> int:
        """Images of a call of the engine, so that both of its decoders have some."""
        if all(not lane.load for lane in self._engine):
            return _SLICE
        # Another batch keeps one of them busy. Calls take the host longer than small images take the engine.
        return max(_SLICE, _BUSY_SLICE_COST * len(jobs) // (sum(job.cost for job in jobs) or 1))

    def _decode_by_cuda(self, jobs: list[_Job], color: Color) -> _Turn | None:
        return self._cuda.decode(iter(_sliced(jobs, len(jobs))), color)

    def _divide(self, jobs: Sequence[_Job], deterministic: bool) -> tuple[list[_Job], list[_Job], list[int]]:
        """What the engine gets, what the CUDA decoder gets, and the costs from which their balance may learn."""
        if not self._engine:
            return [], list(jobs), []
        for_engine = [job for job in jobs if job.header.variant == "baseline"]
        for_cuda = [job for job in jobs if job.header.variant != "baseline"]
        if deterministic or for_cuda:
            return for_engine, for_cuda, []
        if len(for_engine) < FEWEST:
            return for_engine, [], []
        costs = [job.cost for job in for_engine]
        with self._lock:
            while self._unread and self._unread[0].is_done:
                batch = self._unread.popleft()
                self._balance.learn(batch.costs, batch.measured(self._done_s))
                self._done_s = max(self._done_s, batch.end_s)
            wanted = self._balance.share(costs) * sum(costs)
        if wanted:
            # The largest: images cost the CUDA decoder more for being many than for being large.
            order = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
            moved: set[int] = set()
            for index in order:
                if wanted < costs[index] / 2:
                    break
                wanted -= costs[index]
                moved.add(index)
            for_cuda = [for_engine[index] for index in sorted(moved)]
            for_engine = [job for index, job in enumerate(for_engine) if index not in moved]
        return for_engine, for_cuda, costs


_making = threading.Lock()
_by_device: dict[int, _Decoders] = {}


def _decoders_of(device_id: int) -> _Decoders:
    with _making:
        if device_id not in _by_device:
            _by_device[device_id] = _Decoders(device_id)
        return _by_device[device_id]


class _Lane:
    """One decoder of nvImageCodec with a stream of its own.

    A decoder of two backends would be simpler, but it keeps giving the engine as many images as the first batch had,
    be it one, and the others to the slower decoder.
    """

    def __init__(self, backend: str, device_id: int, *, threads: int) -> None:
        self._decoder = DecoderHandle(backend, device_id, threads=threads)
        self._turns = Turns()  # a decoder that two threads use at once loses images, or the process
        self.stream = array_module("cuda").cuda.Stream(non_blocking=True)

    @property
    def load(self) -> int:
        """How many threads have a turn, or wait for one."""
        return self._turns.load

    def decode(self, slices: Iterator[list[_Job]], color: Color) -> _Turn | None:
        """Decode slices until others have taken the rest, and say in each job whether this decoder could."""
        part = next(slices, None)
        if part is None:
            return None
        opened: list[Opened] = []
        cost = 0
        try:
            opened.append(self._open(part, color))
            with self._turns:
                begun_s = time.perf_counter()
                begin = self.stream.record()
                while part is not None:
                    done = self._decoder.decode(opened[-1], apply_orientation=part[0].is_turned)
                    for job, is_done in zip(part, done, strict=True):
                        job.done = is_done
                        cost += job.cost
                    part = next(slices, None)
                    if part is not None:
                        opened.append(self._open(part, color))
                end = self.stream.record()
        except RuntimeError as error:
            raise DeviceError(f"nvImageCodec failed on a batch as a whole: {error}") from error
        finally:
            for batch in opened:
                batch.close()
        return _Turn(begin, end, cost, begun_s)

    def _open(self, jobs: list[_Job], color: Color) -> Opened:
        return self._decoder.open(
            [job.data for job in jobs],
            [(job.header.height, job.header.width) for job in jobs],
            [job.header.oriented_size for job in jobs],
            [job.address for job in jobs],
            color=color,
            stream=self.stream.ptr,
        )


def _sliced(jobs: Sequence[_Job], least: int) -> list[list[_Job]]:
    """In calls of a decoder, of so many images or more if there are.

    Upright ones apart: for them nvImageCodec shall not look into the EXIF, where it might read another orientation.
    """
    slices = []
    for is_turned in (False, True):
        group = [job for job in jobs if job.is_turned is is_turned]
        count = max(1, len(group) // least) if group else 0
        slices += [group[len(group) * at // count : len(group) * (at + 1) // count] for at in range(count)]
    return slices


class _Turn(NamedTuple):
    """What a decoder was given at once, between two events on its stream."""

    begin: Any
    end: Any
    cost: int
    begun_s: float

    @property
    def ms(self) -> float:
        elapsed_ms: float = array_module("cuda").cuda.get_elapsed_time(self.begin, self.end)
        return elapsed_ms


class _Batch(NamedTuple):
    """One that was shared out."""

    costs: list[int]
    by_engine: list[_Turn]
    by_cuda: list[_Turn]
    started_s: float
    ended_s: float  # for the host, which may be done before the GPU

    @property
    def is_done(self) -> bool:
        return all(turn.end.done for turn in self.by_engine + self.by_cuda)

    @property
    def end_s(self) -> float:
        return max(self.ended_s, max(turn.begun_s + turn.ms / 1e3 for turn in self.by_engine + self.by_cuda))

    def measured(self, done_s: float) -> Measured:
        """How long it took, from when the batch before it was done if that was under way when this one began."""
        engine_ms, cuda_ms = (max((turn.ms for turn in one), default=0.0) for one in (self.by_engine, self.by_cuda))
        engine_cost, cuda_cost = (sum(turn.cost for turn in one) for one in (self.by_engine, self.by_cuda))
        batch_ms = max(0.0, self.end_s - max(self.started_s, done_s)) * 1e3
        return Measured(engine_cost, engine_ms, cuda_cost, cuda_ms, batch_ms)
