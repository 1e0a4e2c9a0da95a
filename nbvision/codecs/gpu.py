"""Decode JPEGs on the GPU with nvImageCodec, into memory the caller owns.

Only what the GPU is good at goes here.  PNG and its like are unpacked on the host even by nvImageCodec, so they take
:mod:`nbvision.codecs.host` and give the same pixels and the same errors on every device.

Two decoders share the work: the card's JPEG engine, and nvJPEG's CUDA decoder, which unpacks codes on host threads and
makes pixels of them on the GPU.  The engine takes baseline JPEGs; the CUDA decoder all others, what the engine refuses,
and as much of the baseline ones as makes the batch faster.
"""

from __future__ import annotations

import collections
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nbvision.codecs._balance import Balance, Measured, cost_of
from nbvision.codecs._threads import available_cores
from nbvision.codecs.headers import Header
from nbvision.errors import DeviceError, MissingExtraError
from nbvision.image import CHANNELS, Color
from nbvision.runtime.device import CUDA_EXTRA, array_module

__all__ = ["decode_into", "takes"]

# nvImageCodec's names of the sample format and the colour space, by ours. It cannot add an alpha channel.
_SAMPLES: dict[Color, tuple[str, str]] = {
    "rgb": ("I_RGB", "SRGB"),
    "bgr": ("I_BGR", "SRGB"),
    "gray": ("I_Y", "GRAY"),
}

# nvJPEG always interpolates subsampled colours. libjpeg repeats them where a row has two or fewer (4:2:2 and 4:2:0),
# that is up to a width of 4; there the two would differ by whole colours, so the host decodes such slivers.
_SMOOTHED_FROM_WIDTH = 5

_decoders = threading.local()  # a Decoder shared by threads loses images, or the process


def takes(header: Header, color: Color) -> bool:
    """Whether the GPU shall try this image."""
    return (
        header.format == "jpeg"
        and header.bits == 8
        and header.variant in ("baseline", "extended", "progressive")
        and header.colorspace in ("gray", "ycbcr")
        and header.width >= _SMOOTHED_FROM_WIDTH
        and color in _SAMPLES
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
    jobs = [_Job(*job) for job in zip(addresses, datas, headers, strict=True)]
    device_id = array_module("cuda").cuda.Device().id
    by_device: dict[int, _Decoders] = _decoders.__dict__.setdefault("by_device", {})
    if device_id not in by_device:
        by_device[device_id] = _Decoders(device_id)
    by_device[device_id].decode(jobs, color, deterministic)
    return [job.done for job in jobs]


@dataclass(slots=True, eq=False)
class _Job:
    address: int
    data: bytes
    header: Header
    done: bool = False


class _Decoders:
    """A thread's decoders for one device."""

    def __init__(self, device_id: int) -> None:
        self._device_id = device_id
        self._balance = Balance()
        # The last batches, of which some may still be under way.
        self._unread: collections.deque[tuple[list[int], _Stopwatch]] = collections.deque(maxlen=4)
        try:
            self._engine: _Lane | None = _Lane("HW_GPU_ONLY", device_id, threads=1)  # more do not feed it faster
        except RuntimeError:  # the card has none
            self._engine = None

    @functools.cached_property
    def _cuda(self) -> _Lane:
        try:
            return _Lane("HYBRID_CPU_GPU", self._device_id, threads=max(1, available_cores() // 2))
        except RuntimeError as error:
            raise DeviceError(
                f"nvImageCodec makes no JPEG decoder on device {self._device_id}: {error}; is nvJPEG installed? "
                f"pip install 'nbvision[{CUDA_EXTRA}]'"
            ) from error

    @functools.cached_property
    def _helper(self) -> ThreadPoolExecutor:
        """The thread that waits for the CUDA decoder while the caller's waits for the engine."""
        return ThreadPoolExecutor(1, thread_name_prefix="nbvision-cuda-decoder")

    def decode(self, jobs: Sequence[_Job], color: Color, deterministic: bool) -> None:
        """Decode all that can be; ``done`` says which."""
        engine = self._engine
        if engine is None:
            self._cuda.decode(jobs, color)
            self._cuda.join()
            return
        for_engine, for_cuda, costs = self._divide(jobs, deterministic)
        watch = _Stopwatch()
        watch.start(engine)
        helping = self._helper.submit(self._decode_by_cuda, for_cuda, color, watch) if for_cuda else None
        try:
            engine.decode(for_engine, color)
            watch.stop(engine, sum(cost_of(job.header.pixels) for job in for_engine))
        finally:
            engine.join()
            if helping is not None:
                helping.result()
                self._cuda.join()
        refused = [job for job in for_engine if not job.done]
        if refused:
            self._cuda.decode(refused, color)
            self._cuda.join()
        elif costs:
            self._unread.append((costs, watch))

    def _decode_by_cuda(self, jobs: Sequence[_Job], color: Color, watch: _Stopwatch) -> None:
        with array_module("cuda").cuda.Device(self._device_id):
            self._cuda.decode(jobs, color)
            watch.stop(self._cuda, sum(cost_of(job.header.pixels) for job in jobs))

    def _divide(self, jobs: Sequence[_Job], deterministic: bool) -> tuple[list[_Job], list[_Job], list[int]]:
        """What the engine gets, what the CUDA decoder gets, and the costs from which their balance may learn."""
        for_engine = [job for job in jobs if job.header.variant == "baseline"]
        for_cuda = [job for job in jobs if job.header.variant != "baseline"]
        if deterministic or for_cuda:
            return for_engine, for_cuda, []
        while self._unread and (measured := self._unread[0][1].read()) is not None:
            self._balance.learn(self._unread.popleft()[0], measured)
        costs = [cost_of(job.header.pixels) for job in for_engine]
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


class _Lane:
    """One decoder of nvImageCodec with a stream of its own; one thread at a time may use it.

    A decoder of two backends would be simpler, but it keeps giving the engine as many images as the first batch had,
    be it one, and the others to the slower decoder.
    """

    def __init__(self, kind: str, device_id: int, *, threads: int) -> None:
        codec = _nvimgcodec()
        backends = [codec.Backend(getattr(codec.BackendKind, kind))]
        self._decoder = codec.Decoder(device_id=device_id, max_num_cpu_threads=threads, backends=backends)
        self.stream = array_module("cuda").cuda.Stream(non_blocking=True)

    def decode(self, jobs: Sequence[_Job], color: Color) -> None:
        # Upright ones apart: for them nvImageCodec shall not look into the EXIF, where it might read another
        # orientation.
        for upright in (True, False):
            group = [job for job in jobs if (job.header.orientation == 1) is upright]
            if group:
                self._decode_group(group, color, _params(color, not upright))

    def _decode_group(self, jobs: Sequence[_Job], color: Color, params: Any) -> None:
        """Decode images that share their parameters."""
        codec = _nvimgcodec()
        streams = [codec.CodeStream(job.data) for job in jobs]
        agree = [_agrees(stream, job.header) for stream, job in zip(streams, jobs, strict=True)]
        if not all(agree):  # one wrong size would fail the whole batch
            streams = [stream for stream, ok in zip(streams, agree, strict=True) if ok]
            jobs = [job for job, ok in zip(jobs, agree, strict=True) if ok]
            if not jobs:
                return
        outs = [_Pixels(job.address, (*job.header.oriented_size, CHANNELS[color])) for job in jobs]
        pointer = self.stream.ptr
        try:
            images = codec.as_images(outs, pointer)
            results = self._decoder.decode(streams, images=images, params=params, cuda_stream=pointer)
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"nvImageCodec failed on {len(jobs)} images as a whole: {error}") from error
        for job, result, out in zip(jobs, results, outs, strict=True):
            job.done = result is not None and tuple(result.shape) == out.shape

    def join(self) -> None:
        """Let CuPy's current stream wait for what was decoded."""
        array_module("cuda").cuda.get_current_stream().wait_event(self.stream.record())


class _Pixels:
    """Device memory as nvImageCodec wants it described; an array of CuPy's takes four times as long to make."""

    __slots__ = ("__cuda_array_interface__", "shape")

    def __init__(self, address: int, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "|u1", "data": (address, False), "version": 3}


class _Stopwatch:
    """How long each decoder took, by events on its stream: nobody waits for them."""

    def __init__(self) -> None:
        self._begin: Any = None
        self._ends: dict[_Lane, tuple[float, Any]] = {}

    def start(self, lane: _Lane) -> None:
        self._begin = lane.stream.record()

    def stop(self, lane: _Lane, cost: float) -> None:
        self._ends[lane] = cost, lane.stream.record()

    def read(self) -> Measured | None:
        """None while the GPU is at it."""
        if not all(event.done for _, event in self._ends.values()):
            return None
        elapsed_ms = array_module("cuda").cuda.get_elapsed_time
        flat = [number for cost, end in self._ends.values() for number in (cost, elapsed_ms(self._begin, end))]
        return Measured(*flat)


@functools.cache
def _params(color: Color, apply_orientation: bool) -> Any:
    codec = _nvimgcodec()
    samples, space = _SAMPLES[color]
    return codec.DecodeParams(
        apply_exif_orientation=apply_orientation,
        color_spec=getattr(codec.ColorSpec, space),
        sample_format=getattr(codec.SampleFormat, samples),
    )


def _agrees(stream: Any, header: Header) -> bool:
    """Whether nvImageCodec reads the size that our header pass read."""
    try:
        return bool((stream.height, stream.width) == (header.height, header.width))
    except RuntimeError:  # it cannot parse the file
        return False


@functools.cache
def _nvimgcodec() -> ModuleType:
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # read at import; it would log every refused image
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        raise MissingExtraError("nvidia.nvimgcodec", extra=CUDA_EXTRA, needed_for="decoding on the GPU") from error
    module: ModuleType = nvimgcodec
    return module
