"""Pipelines: order, overlap, errors, bounds, what they measure; on the GPU, that memory crosses streams unharmed."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference import to_host

import nbvision as nbv
from nbvision import memory, pipeline
from nbvision.errors import InputError
from nbvision.image import to_device
from nbvision.runtime.device import array_module


def test_results_in_order(device: Any) -> None:
    xp = array_module(device)
    made = nbv.Pipeline(
        {"up": lambda n: xp.full((100, 7), n, xp.int64), "add": lambda x: x + 1, "down": lambda x: to_host(x.sum())},
        device=device,
    )
    assert [int(total) for total in made.stream(range(200))] == [700 * (n + 1) for n in range(200)]
    assert [int(made(n)) for n in (5, 6)] == [4200, 4900]
    assert list(made.stream([])) == []


def test_stages_overlap(device: Any) -> None:
    """Each stage waits for the other to be at the item after, which only threads of their own can do."""
    meeting = threading.Barrier(2)

    def meet(n: int) -> int:
        meeting.wait(timeout=60)
        return n

    made = nbv.Pipeline(
        {"first": lambda n: meet(n) if n else n, "second": lambda n: meet(n) if n < 9 else n}, device=device
    )
    assert list(made.stream(range(10))) == list(range(10))


@pytest.mark.parametrize("depth", [1, 3])
def test_no_further_ahead_than_there_is_room(device: Any, depth: int) -> None:
    taken = []

    def source() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Value:
        def __init__(self, n: int) -> None:
            self.n = n
            alive.add(self)

    stages = {"make": Value, "same": lambda value: value, "last": lambda value: value}
    made = nbv.Pipeline(stages, depth=depth, device=device)
    most = 0
    for done, value in enumerate(made.stream(source())):
        assert value.n == done
        assert len(taken) - done <= 3 * (depth + 1) + 1  # in each stage's channel, in its hands, and here
        most = max(most, len(alive))
    assert most <= 3 * (2 * depth + 1) + depth + 2  # and held until the GPU is done


class BadItemError(Exception):
    pass


def fail_at(*bad: int) -> Any:
    def stage(n: int) -> int:
        if n in bad:
            raise BadItemError(n)
        return n

    return stage


def test_an_exception_is_raised_in_its_turn(device: Any) -> None:
    results = []
    made = nbv.Pipeline({"first": fail_at(7), "second": fail_at(3)}, device=device)
    with pytest.raises(BadItemError, match="3") as caught:
        results.extend(made.stream(range(10)))
    assert results == [0, 1, 2]
    if sys.version_info >= (3, 11):
        assert "in stage 'second'" in caught.value.__notes__[0]
    assert list(made.stream(range(3))) == [0, 1, 2]


def test_exceptions_come_out_in_place_of_results(device: Any) -> None:
    made = nbv.Pipeline({"first": fail_at(7), "second": fail_at(3, 4)}, device=device)
    results = list(made.stream(range(10), on_error="return"))
    assert [n for n, result in enumerate(results) if isinstance(result, BadItemError)] == [3, 4, 7]
    assert [result for result in results if isinstance(result, int)] == [0, 1, 2, 5, 6, 8, 9]


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_an_exception_of_the_source(device: Any, on_error: Any) -> None:
    def source() -> Iterator[int]:
        yield from range(4)
        raise BadItemError("source")

    results = []
    made = nbv.Pipeline({"only": lambda n: n}, device=device)
    with pytest.raises(BadItemError, match="source"):
        results.extend(made.stream(source(), on_error=on_error))
    assert results == [0, 1, 2, 3]


def test_who_leaves_early_leaves_no_thread(device: Any) -> None:
    before = set(threading.enumerate())
    endless = iter(int, 1)
    made = nbv.Pipeline({"first": lambda n: n, "second": lambda n: n}, device=device)
    for _ in made.stream(endless):
        break
    gc.collect()
    with pytest.raises(ZeroDivisionError):
        list(map(lambda n: 1 // n, made.stream(endless)))  # noqa: C417  (the consumer raises)
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_the_callers_source_of_memory_holds_in_the_stages(device: Any) -> None:
    def take(n: int) -> int:
        return memory.acquire(1000, device=device).size_bytes

    with memory.source("a film"):
        results = list(nbv.Pipeline({"take": take}, device=device).stream(range(3)))
    assert results == [4096] * 3
    assert memory.stats(device=device).sources["a film"].peak_bytes >= 4096


def test_report(device: Any) -> None:
    xp = array_module(device)
    made = nbv.Pipeline(
        {
            "up": lambda n: {"x": xp.zeros((n, 10), np.float32), "others": [np.zeros(4, np.int16)]},
            "plain": lambda value: (value["x"], "text", None),
            "batch": lambda value: nbv.as_batch([xp.zeros((3, 5, 3), np.uint8)]),
        },
        device=device,
    )
    with pytest.raises(InputError, match="expected a pass"):
        made.report()
    assert len(list(made.stream([1, 2, 3, 4]))) == 4
    report = made.report()
    assert [stage.name for stage in report.stages] == ["up", "plain", "batch"]
    assert [stage.items for stage in report.stages] == [4, 4, 4]
    assert [stage.output_bytes for stage in report.stages] == [100 + 8, 100, 45]
    assert report.items == 4
    for stage in report.stages:
        assert 0 < stage.host_ms < report.seconds * 1e3
        assert 0 <= stage.input_wait_ms <= report.seconds * 1e3
        assert (stage.gpu_ms is None) == (device == "cpu")
        assert stage.busy_ms >= stage.host_ms
    assert report.slowest in report.stages
    table = str(report).splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["up", "plain", "batch"]
    assert table[4].startswith("4 items in")
    assert report.slowest.name in table[4]


def test_what_is_refused(device: Any) -> None:
    for stages in ({}, None, [len], {"a": 5}):
        with pytest.raises(InputError, match="expected a dict of names and callables"):
            nbv.Pipeline(stages, device=device)  # type: ignore[arg-type]
    for depth in (0, -1, 1.5):
        with pytest.raises(InputError, match="depth is"):
            nbv.Pipeline({"a": len}, depth=depth, device=device)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="on_error is 'ignore'"):
        nbv.Pipeline({"a": len}, device=device).stream([], on_error="ignore")  # type: ignore[arg-type]


def test_bytes_of_batches() -> None:
    for color, shape, size in [("rgb", (4, 6, 3), 72), ("gray", (4, 6, 1), 24), ("nv12", (6, 6), 36)]:
        yuv: Any = {"yuv": "bt709"} if color == "nv12" else {}
        array = np.zeros(shape, np.uint8)
        assert nbv.as_batch([array, array], color=color, **yuv).nbytes == 2 * size  # type: ignore[arg-type]


def test_the_road_from_files_to_vectors(device: Any, rng: np.random.Generator) -> None:
    """Decode, shrink and sum, all at once, are what they are one after the other."""

    def png(height: int, width: int) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    files = [[png(40 + n, 50 + 3 * n + image) for image in range(3)] for n in range(12)]
    plan = nbv.Preprocess((32, 32), scale=1 / 255)
    made = nbv.Pipeline(
        {
            "decode": lambda sources: nbv.decode(sources, device=device),
            "letterbox": lambda batch: plan(batch)[0],
            "sum": lambda x: x.sum(axis=(2, 3)),
        },
        device=device,
    )
    at_once = [to_host(sums) for sums in made.stream(files)]
    for sources, sums in zip(files, at_once, strict=True):
        np.testing.assert_array_equal(sums, to_host(made(sources)))


# --- on the GPU -------------------------------------------------------------------------------------------------------


def overwritten(made: nbv.Pipeline) -> int:
    """How many of 40 items were not what the first stage had written when the second read them."""
    return sum(int(to_host(wrong)) for wrong in made.stream(range(1, 41)))


def slow_reader() -> nbv.Pipeline:
    """The first stage fills memory at once; the second keeps its stream busy for milliseconds before it reads it."""
    import cupy

    filler = cupy.ones((2048, 2048), np.float32)
    cupy.cuda.Device().synchronize()

    def fill(n: int) -> Any:
        value = memory.acquire(1 << 20, device="cuda").view((1 << 18,), dtype=np.int32) if n % 2 else None
        value = cupy.empty(1 << 18, np.int32) if value is None else value
        value.fill(n)
        return n, value

    def read(item: Any) -> Any:
        n, value = item
        busy = filler
        for _ in range(60):
            busy = cupy.sin(busy)
        return (value != n).any()

    return nbv.Pipeline({"fill": fill, "read": read}, device="cuda")


@pytest.mark.needs_cuda
def test_memory_is_not_taken_again_while_a_stage_reads_it() -> None:
    assert overwritten(slow_reader()) == 0


@pytest.mark.needs_cuda
def test_that_would_happen_without_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline._Held, "add", lambda self, value, first, last: None)
    assert overwritten(slow_reader()) > 0


@pytest.mark.needs_cuda
def test_results_are_ready_for_the_callers_stream() -> None:
    import cupy

    def make(n: int) -> Any:
        busy = cupy.ones((2048, 2048), np.float32)
        for _ in range(60):
            busy = cupy.sin(busy)
        return cupy.full(1000, n, np.int32)

    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream)
            sums = [value.sum() for value in nbv.Pipeline({"make": make}, device="cuda").stream(range(20))]
            assert [int(total) for total in sums] == [1000 * n for n in range(20)]


@pytest.mark.needs_cuda
def test_stages_time_the_gpu() -> None:
    import cupy

    def work(count: int) -> Any:
        def stage(x: Any) -> Any:
            for _ in range(count):
                x = cupy.sin(x)
            return x

        return stage

    # Much, for others may use the GPU at the same time, and then even a little takes a millisecond.
    made = nbv.Pipeline({"little": work(1), "much": work(500)}, device="cuda")
    ones = to_device(np.ones((2048, 2048), np.float32), "cuda")
    for _ in range(2):  # the first pass loads the kernel
        for _ in made.stream([ones] * 10):
            pass
    little, much = made.report().stages
    assert little.gpu_ms is not None
    assert much.gpu_ms is not None
    assert much.gpu_ms > 2 * little.gpu_ms > 0
    assert made.report().slowest.name == "much"
