"""The deadline batcher: its policy by properties, its simulation beside others, and threads, futures and failures."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import gc
import math
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nbvision.batching import Batcher, BatcherTimeline, BatchRecord, LatencyCurve, goodput, simulate
from nbvision.batching.latency import UsualTimes
from nbvision.batching.policy import Request, RequestQueue, hold_until_s, make_policy, next_batch
from nbvision.batching.simulator import arrivals
from nbvision.errors import DeadlineError, InputError, OverloadError

# --- the curve --------------------------------------------------------------------------------------------------------


def test_between_and_beyond_what_is_known() -> None:
    curve = LatencyCurve({4: 0.010, 16: 0.022})
    assert [curve(size) for size in (1, 4, 16, 32)] == [0.010, 0.010, 0.022, 0.044]
    assert curve(10) == pytest.approx(0.016)
    assert LatencyCurve()(5) == 0.0


def test_what_is_measured_replaces_what_was_said() -> None:
    curve = LatencyCurve({1: 1.0, 7: 2.0})
    for _ in range(50):
        curve.update(1, 0.010)
    assert curve(1) == 0.010
    assert curve(7) == pytest.approx(0.070)  # rather what seven single ones take than what was said
    for _ in range(50):
        curve.update(1, 0.020)
        curve.update(8, 0.030)  # near 7
    assert curve(1) == 0.020
    assert curve(8) == 0.030
    assert 0.020 < curve(7) < 0.030


def test_the_slowest_in_a_hundred_calls_of_all_sizes_counts() -> None:
    """A few calls of each size do not say it; those of all sizes together do. One bad call says nothing."""
    rng = np.random.default_rng(0)
    curve = LatencyCurve()
    for _ in range(25):
        for size in (1, 2, 3, 4, 8, 16, 32, 64):
            curve.update(size, (0.010 + 0.001 * size) * rng.uniform(0.9, 1.3))
    for size in (1, 4, 16, 64):
        assert 1.15 < curve(size) / (0.010 + 0.001 * size) < 1.35
    before_s = curve(4)
    curve.update(4, 5.0)
    assert curve(4) < 1.1 * before_s
    curve = LatencyCurve()
    curve.update(1, 5.0)
    curve.update(1, 0.010)
    curve.update(1, 0.010)
    assert curve(1) == 0.010


def test_sizes_that_scatter_do_not_make_others_slow() -> None:
    """One picture takes 2 to 10 ms by its format; sixteen always have all of them, and take 20."""
    rng = np.random.default_rng(1)
    curve = LatencyCurve()
    for _ in range(50):
        curve.update(1, float(rng.choice([0.002, 0.004, 0.010])))
        curve.update(16, float(rng.normal(0.020, 0.0005)))
    assert curve(1) == pytest.approx(0.010)
    assert 0.020 < curve(16) < 0.022
    assert curve.typical(16) == pytest.approx(0.020, rel=0.02)


def test_a_few_bad_calls_do_not_make_a_size_slow() -> None:
    curve = LatencyCurve()
    for _ in range(8):
        curve.update(8, 0.010)
    for _ in range(7):
        curve.update(16, 0.030)
        assert curve.typical(16) == pytest.approx(0.020)
    curve.update(16, 0.030)  # it is slow
    assert curve.typical(16) == 0.030


@pytest.mark.parametrize("known", [(16,), (8, 16), (1, 8, 16)])
@pytest.mark.parametrize("bad", [1, 2, 4])
def test_one_bad_call_of_a_small_size_does_not_make_larger_ones_slow(known: tuple[int, ...], bad: int) -> None:
    curve = LatencyCurve()
    for size in known:
        for _ in range(20):
            curve.update(size, 0.0065 + 0.0003 * size)
    if bad not in known:
        curve.update(bad, 0.200)
    assert curve.typical(16) == pytest.approx(0.0113)
    waiting = [Request(number, 0.0, 0.040) for number in range(16)]
    assert len(next_batch(waiting, 0.0, curve, max_batch=16, typical=curve.typical).batch) == 16


def test_one_bad_call_does_not_keep_batches_small() -> None:
    """The batches that run are those of which the curve learns, so what it wrongly avoids it could never learn."""
    curve = LatencyCurve({1: 0.005, 16: 0.020})

    def run() -> int:
        waiting = [Request(number, 0.0, 0.040) for number in range(16)]
        size = len(next_batch(waiting, 0.0, curve, max_batch=16, typical=curve.typical).batch)
        curve.update(size, 0.0065 + 0.0003 * size)
        return size

    for size in (1, 8, 12):
        for _ in range(8):
            curve.update(size, 0.0065 + 0.0003 * size)
    curve.update(16, 0.035)
    assert [run() for _ in range(3)] == [16, 16, 16]
    assert curve.typical(16) == pytest.approx(0.0113)


def test_of_sizes_that_are_nearly_as_good_the_largest_goes() -> None:
    waiting = [Request(number, 0.0, 0.040) for number in range(16)]
    in_proportion = next_batch(
        waiting, 0.0, lambda size: 0.0011 * size, max_batch=16, typical=lambda size: 0.001 * size
    )
    assert len(in_proportion.batch) == 16


def test_a_size_that_is_not_run_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("nbvision.batching.latency.time.monotonic", lambda: now_s)
    curve = LatencyCurve({16: 0.020})
    curve.update(8, 9.0)
    curve.update(1, 0.010)
    assert curve(8) == curve(16) == 9.0
    now_s += 61
    curve.update(1, 0.010)
    assert curve(16) == 0.020
    assert 0.010 < curve(8) < 0.020
    curve.forget(1)
    assert curve(1) == 0.020


@given(
    st.dictionaries(st.integers(1, 100), st.floats(1e-4, 1.0), min_size=1), st.lists(st.integers(1, 200), min_size=2)
)
def test_larger_batches_never_count_as_faster(seconds: dict[int, float], sizes: list[int]) -> None:
    curve = LatencyCurve(seconds)
    times = [curve(size) for size in sorted(sizes)]
    assert times == sorted(times)


@pytest.mark.parametrize("seconds", [{0: 1.0}, {1: 0.0}, {1: -1.0}, {1: math.nan}, {1.5: 1.0}])
def test_times_that_are_none(seconds: Any) -> None:
    with pytest.raises(InputError, match="expected a positive size and time"):
        LatencyCurve(seconds)


# --- the policy -------------------------------------------------------------------------------------------------------

requests = st.lists(
    st.builds(
        Request,
        item=st.none(),
        arrived_s=st.floats(-1, 0),
        deadline_s=st.one_of(st.floats(-0.01, 0.2), st.just(math.inf)),
        priority=st.integers(0, 2),
    ),
    max_size=30,
)
curves = st.builds(lambda first, each: lambda size: first + each * size, st.floats(0.001, 0.02), st.floats(0, 0.005))


@given(requests, curves, st.integers(1, 16), st.floats(0.3, 1.0))
def test_what_is_released_is_in_time_and_nothing_is_lost(
    waiting: list[Request], latency: Callable[[int], float], max_batch: int, share: float
) -> None:
    def typical(size: int) -> float:
        return share * latency(size)

    queue = RequestQueue()
    for request in waiting:
        queue.add(request)
    ordered = queue.first(0.0)
    assert sorted(map(id, ordered)) == sorted(map(id, waiting))
    release = next_batch(ordered, 0.0, latency, max_batch=max_batch, typical=typical)
    size, chosen = len(release.batch), set(release.batch)
    assert size <= max_batch
    assert len(chosen | set(release.late)) == size + len(release.late)
    # Given up is who would be late even if the batch were as quick as one in fifty. If others wait, a batch goes.
    quick = typical(1) * (typical(1) / latency(1)) ** (2.3 / 2.326)
    assert all(request.deadline_s < max(quick, 0.97 * typical(1)) for request in release.late)
    assert all(request in set(release.late) for request in ordered if request.deadline_s < 0.9 * quick)
    assert bool(release.batch) == (len(release.late) < len(waiting))
    # Nobody runs who is late for sure, and where all can be in time together they go together.
    assert all(request.deadline_s >= 0.9 * quick for request in release.batch)
    if waiting and len(waiting) <= max_batch and latency(len(waiting)) <= 0.7 * min(r.deadline_s for r in waiting):
        assert release.batch == ordered
        assert release.reason == ("full" if len(waiting) == max_batch else "drained")
    # Of one priority the first go before the others, but for those that are left out.
    for priority in range(3):
        same = [request for request in ordered if request.priority == priority and request in chosen]
        assert same == [request for request in release.batch if request.priority == priority]
    queue.remove(release.batch + release.late)
    assert len(queue) == len(waiting) - size - len(release.late)


def test_what_may_be_in_time_runs_if_nothing_is_sure_to_be() -> None:
    """A curve with one bad call in it: requests that could well be in time are not given up unseen."""
    waiting = [Request(number, 0.0, 0.040) for number in range(6)]
    release = next_batch(waiting, 0.0, lambda size: 0.080, max_batch=4, typical=lambda size: 0.030 + 0.001 * size)
    assert (release.batch, release.late, release.reason) == (waiting[:4], [], "full")


def test_a_deadline_makes_a_batch_smaller_only_where_that_saves_time() -> None:
    tight, others = Request("tight", 0.0, 0.0245), [Request(number, 0.0, 0.070) for number in range(15)]
    flat = next_batch([tight, *others], 0.0, lambda size: 0.024, max_batch=16)
    assert flat.batch == [tight, *others]
    steep = next_batch([tight, *others], 0.0, lambda size: 0.020 + 0.003 * size, max_batch=16)
    assert steep.batch == others  # for one more in time all the others would wait
    assert steep.late == []
    alone = next_batch([tight, others[0]], 0.0, lambda size: 0.0155 * size, max_batch=16)
    assert alone.batch == [tight]
    assert alone.reason == "deadline"


def test_at_the_door_those_count_that_will_take_time() -> None:
    """Full batches at what is typical, the own one at its slowest; who will be given up keeps nobody out."""
    policy = make_policy("deadline", lambda size: 0.02 + 0.01 * size, lambda size: 0.01 * size, max_batch=4)
    late, living = [Request(0, 0.0, 1.0) for _ in range(40)], [Request(0, 0.0, 3.0) for _ in range(9)]
    assert policy.answered_in_s(living[:3], 2.0, servers=1) == 0.0
    assert policy.answered_in_s(living, 2.0, servers=1) == pytest.approx(2 * 0.04 + 0.04)
    assert policy.answered_in_s(living, 2.0, servers=2) == pytest.approx(0.04 + 0.04)
    assert policy.answered_in_s(late, 2.0, servers=1) == 0.0
    assert policy.answered_in_s(late + living, 2.0, servers=1) == pytest.approx(2 * 0.04 + 0.04)
    assert policy.answered_in_s(late + living, 0.5, servers=1) == pytest.approx(12 * 0.04 + 0.04)
    assert policy.answered_in_s(living[:3], 2.0, servers=1, prepared_in_s=0.1) == pytest.approx(0.1 + 0.04)
    assert policy.answered_in_s(living, 2.0, servers=1, prepared_in_s=0.1) == pytest.approx(0.1 + 0.04)
    assert policy.answered_in_s(living, 2.0, servers=1, prepared_in_s=0.01) == pytest.approx(2 * 0.04 + 0.04)
    for name in ("eager", "delay and reject"):
        other = make_policy(name, lambda size: 1.0, lambda size: 1.0, max_batch=4)
        assert other.answered_in_s(late + living, 2.0, servers=1, prepared_in_s=9.0) == 0.0
    unknown = make_policy("deadline", lambda size: 0.0, lambda size: 0.0, max_batch=4)
    assert unknown.answered_in_s(living, 2.0, servers=1) == 0.0


def test_others_may_join_while_a_batch_runs_until_a_deadline_calls() -> None:
    waiting = [Request(number, 0.0, 0.040 + 0.001 * number) for number in range(3)]
    assert hold_until_s(waiting, lambda size: 0.010 + 0.001 * size, max_batch=8) == pytest.approx(0.040 - 0.014)
    assert hold_until_s(waiting, lambda size: 0.010, max_batch=3) == -math.inf
    assert hold_until_s([Request("any time", 0.0)], lambda size: 0.010, max_batch=3) == math.inf


def test_nobody_waits_forever() -> None:
    """A request without a deadline, of the lowest priority, among ever new ones of the highest."""
    queue, old = RequestQueue(aging_s=0.5), Request("old", 0.0, priority=9)
    queue.add(old)
    now_s, rounds = 0.0, 0
    while len(queue) and old in queue.all():
        for _ in range(4):
            queue.add(Request("new", now_s, now_s + 1.0, priority=0))
        release = next_batch(queue.first(now_s), now_s, lambda size: 0.01, max_batch=2)
        queue.remove(release.batch + release.late)
        now_s, rounds = now_s + 0.01, rounds + 1
        assert rounds < 100
    assert rounds > 10


def test_priorities_deadlines_and_buckets() -> None:
    queue = RequestQueue()
    given = [("a", 1, 0.3), ("a", 0, 0.9), ("b", 0, 0.8), ("a", 0, 0.5), ("b", 2, 0.1)]
    for number, (bucket, priority, deadline_s) in enumerate(given):
        queue.add(Request(number, 0.0, deadline_s, priority, bucket))
    assert [request.item for request in queue.first(0.0)] == [3, 1, 0]
    queue.remove(queue.first(0.0))
    assert [request.item for request in queue.first(0.0)] == [2, 4]
    assert len(queue) == 2


# --- the simulation ---------------------------------------------------------------------------------------------------


def card(size: int) -> float:
    """2 ms and a quarter for each item: 3,556 items a second at 64."""
    return 0.002 + 0.00025 * size


CAPACITY = 64 / card(64)


@pytest.mark.parametrize("burst", [1, 8, 16])
def test_goodput_is_the_best_of_all_policies(burst: int) -> None:
    def of(policy: Any) -> float:
        return goodput(card, deadline_ms=40, policy=policy, burst=burst, count=8000)

    deadline = of("deadline")
    assert all(deadline >= 0.98 * of(policy) for policy in ("eager", "delay", "eager and reject", "delay and reject"))
    if burst > 1:
        assert deadline > 1.05 * of("eager")
    assert deadline >= (0.95 if burst == 1 else 0.75) * CAPACITY


@pytest.mark.parametrize("burst", [1, 8])
def test_overload_is_shed(burst: int) -> None:
    coming = arrivals(1.5 * CAPACITY, 8000, burst=burst, seed=1)
    found = simulate(coming, card, deadline_ms=40)
    assert found.in_time / 8000 >= 0.9 / 1.5
    assert simulate(coming, card, deadline_ms=40, policy="eager").in_time / 8000 < 0.1


def test_two_cards_are_nearly_two() -> None:
    one, two = (goodput(card, deadline_ms=40, cards=cards, count=8000) for cards in (1, 2))
    assert two > 1.9 * one


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["deadline", "eager", "delay", "delay and reject", "eager and reject"]),
    st.floats(10, 10_000),
    st.integers(1, 20),
    st.integers(1, 3),
    st.floats(0, 0.3),
)
def test_no_request_is_lost_or_doubled(policy: Any, rate: float, burst: int, cards: int, jitter: float) -> None:
    coming = arrivals(rate, 300, burst=burst, seed=2)
    found = simulate(coming, card, deadline_ms=40, policy=policy, cards=cards, jitter=jitter)
    assert found.in_time + found.late + found.dropped == 300
    assert len(found.waited_s) == found.in_time + found.late
    assert len(found.waited_s) == 0 or found.waited_s.min() > 0
    if policy == "deadline" and jitter == 0:
        assert found.late == 0
    assert "requests in" in str(found)


def test_numbers_that_are_none() -> None:
    for options in ({"deadline_ms": 0}, {"deadline_ms": 40, "cards": 0}, {"deadline_ms": 40, "policy": "lucky"}):
        with pytest.raises(InputError):
            simulate(np.zeros(1), card, **options)  # type: ignore[arg-type]


# --- threads and futures ----------------------------------------------------------------------------------------------


class Gate:
    """A function that waits until it is let go, and notes the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.entered, self.open = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items)
        self.entered.release()
        assert self.open.acquire(timeout=60)
        return [item * 10 for item in items]


def test_what_comes_while_a_batch_runs_is_the_next() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=4, in_flight=1) as batcher:
        first = batcher.submit(0)
        assert gate.entered.acquire(timeout=60)
        others = [batcher.submit(n) for n in range(1, 7)]
        assert batcher.stats().waiting == 6
        assert batcher.stats().running == 1
        for _ in range(3):
            gate.open.release()
        assert [future.result(60) for future in [first, *others]] == [10 * n for n in range(7)]
    assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]
    stats = batcher.stats()
    assert (stats.submitted, stats.answered, stats.batches) == (7, 7, 3)
    assert stats.sizes == {1: 1, 4: 1, 2: 1}
    assert stats.reasons == {"drained": 2, "full": 1}
    assert stats.queue_p99_ms >= stats.queue_p50_ms >= 0
    assert "7" in str(stats).splitlines()[0]


def test_two_batches_at_once() -> None:
    meeting = threading.Barrier(2)

    def meet(items: list[int]) -> list[int]:
        meeting.wait(timeout=60)
        return items

    with Batcher(meet, max_batch=1, in_flight=2) as batcher:
        assert [future.result(60) for future in [batcher.submit(n) for n in range(6)]] == list(range(6))


@pytest.mark.needs_cuda
def test_results_on_a_gpu_are_there_when_they_are_given() -> None:
    import cupy

    streams = set()
    meeting = threading.Barrier(2)

    def long_work(items: list[int]) -> list[Any]:
        streams.add(cupy.cuda.get_current_stream().ptr)
        meeting.wait(timeout=60)
        values = [cupy.full(1 << 22, item, np.float32) for item in items]
        for value in values:
            for _ in range(200):
                value += 1
        return values

    with Batcher(long_work, max_batch=1, in_flight=2, device="cuda") as batcher:
        for number, future in enumerate([batcher.submit(n) for n in range(6)]):
            with cupy.cuda.Stream(non_blocking=True):
                assert bool((future.result(60) == number + 200).all())
    assert len(streams) == 2
    assert 0 not in streams


def test_one_bad_item_fails_alone() -> None:
    calls = []

    def fragile(items: list[int]) -> list[Any]:
        calls.append(len(items))
        if 13 in items:
            raise ZeroDivisionError("13")
        return [KeyError(item) if item == 5 else item for item in items]

    gate = threading.Event()
    with Batcher(lambda items: (gate.wait(60), fragile(items))[1], max_batch=64, in_flight=1) as batcher:
        batcher.submit(-1)
        futures = [batcher.submit(n) for n in range(32)]
        gate.set()
        errors = [future.exception(60) for future in futures]
    assert [type(error) for error in errors if error] == [KeyError, ZeroDivisionError]
    assert isinstance(errors[13], ZeroDivisionError)
    assert isinstance(errors[5], KeyError)
    assert len(calls) <= 1 + 2 * 6 + 1
    assert batcher.stats().failed == 2
    assert batcher.stats().answered == 31


def test_an_engine_that_fails_is_not_asked_forever() -> None:
    calls = []

    def broken(items: list[int]) -> list[int]:
        calls.append(len(items))
        raise RuntimeError("no GPU")

    gate = threading.Event()
    with Batcher(lambda items: (gate.wait(60), broken(items))[1], max_batch=64, in_flight=1) as batcher:
        futures = [batcher.submit(n) for n in range(65)]
        gate.set()
        assert all(isinstance(future.exception(60), RuntimeError) for future in futures)
    assert len(calls) < 70
    wrong = Batcher(lambda items: items[:-1])
    with wrong, pytest.raises(Exception, match="returned 0 results for 1 items"):
        wrong(1)


def test_the_batcher_recovers() -> None:
    failing = threading.Event()
    failing.set()

    def sometimes(items: list[int]) -> list[int]:
        if failing.is_set():
            raise RuntimeError("out of order")
        return items

    with Batcher(sometimes) as batcher:
        with pytest.raises(RuntimeError, match="out of order"):
            batcher(1)
        failing.clear()
        assert batcher(2) == 2


def test_one_slow_call_does_not_stop_it_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call takes longer than any deadline allows, as one that compiles does; the next ones do not."""
    monkeypatch.setattr("nbvision.batching.batcher._PROBE_S", 0.05)
    slow = [True]

    def function(items: list[int]) -> list[int]:
        if slow:
            slow.clear()
            time.sleep(0.5)
        return items

    answers = 0
    with Batcher(function, deadline_ms=250, in_flight=1) as batcher:
        assert batcher(0, deadline_ms=10_000) == 0
        for n in range(100):
            try:
                answers += batcher(n) == n
            except DeadlineError:
                time.sleep(0.01)
        assert batcher.latency(1) < 0.25
    assert 0 < batcher.stats().late < 50
    assert answers == 100 - batcher.stats().late


def test_cancelled_requests_do_not_run() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=8, in_flight=1) as batcher:
        first = batcher.submit(0)
        assert gate.entered.acquire(timeout=60)
        futures = [batcher.submit(n) for n in range(1, 4)]
        assert futures[1].cancel()
        gate.open.release()
        gate.open.release()
        assert [futures[0].result(60), futures[2].result(60), first.result(60)] == [10, 30, 0]
    assert gate.batches == [[0], [1, 3]]
    assert batcher.stats().cancelled == 1


def test_who_cannot_be_in_time_is_told_so() -> None:
    gate = Gate()
    with Batcher(gate, in_flight=1, latency=LatencyCurve({1: 0.005})) as batcher:
        batcher.submit(0)
        assert gate.entered.acquire(timeout=60)
        hopeless, patient = batcher.submit(1, deadline_ms=6), batcher.submit(2)
        time.sleep(0.02)
        gate.open.release()
        gate.open.release()
        with pytest.raises(DeadlineError, match="given up"):
            hopeless.result(60)
        assert patient.result(60) == 20
        for deadline_ms in (0, -1):
            with pytest.raises(DeadlineError, match="has passed"):
                batcher.submit(3, deadline_ms=deadline_ms)
    assert gate.batches == [[0], [2]]
    assert batcher.stats().late == 1


def test_full_queues_turn_requests_away() -> None:
    gate = Gate()
    batcher = Batcher(gate, in_flight=1, max_queue_items=3, max_queue_bytes=100, size_of=len)
    batcher.submit([0] * 90)
    assert gate.entered.acquire(timeout=60)
    futures = [batcher.submit([1] * 30) for _ in range(3)]
    for size in (20, 1):  # too many bytes; too many items
        with pytest.raises(OverloadError, match="Come again later") as caught:
            batcher.submit([2] * size)
        assert caught.value.retry_after_s >= 0
    gate.open.release()
    gate.open.release()
    assert [len(future.result(60)) for future in futures] == [300] * 3
    assert batcher.stats().rejected == 2
    gate.open.release()
    assert batcher([3]) == [3] * 10
    with pytest.raises(TypeError):
        batcher.submit(5)  # has no length: the caller's mistake, and nobody else's
    gate.open.release()
    assert batcher([4]) == [4] * 10
    batcher.close()


def test_who_comes_behind_too_many_is_turned_away_at_once() -> None:
    """Not prepared, not queued, and told when to come again; who may wait, or goes before the others, is let in."""
    gate, prepared = Gate(), []

    def prepare(item: int) -> int:
        prepared.append(item)
        return item

    curve = LatencyCurve({1: 0.010, 4: 0.020})
    with Batcher(gate, prepare=prepare, max_batch=4, in_flight=1, latency=curve) as batcher:
        batcher.submit(0)
        assert gate.entered.acquire(timeout=60)
        futures = [batcher.submit(item) for item in range(1, 9)]
        # Two full batches go before it, of 20 ms each, and its own takes 10.
        with pytest.raises(OverloadError, match=r"not to be had before 50 ms; .* in 45 ms") as caught:
            batcher.submit(9, deadline_ms=45, priority=1)
        assert caught.value.retry_after_s == pytest.approx(0.005, abs=1e-6)
        futures += [batcher.submit(10, deadline_ms=60_000), batcher.submit(11, deadline_ms=5_000, priority=-1)]
        for _ in range(11):  # batches of any size
            gate.open.release()
        assert [future.result(60) for future in futures] == [*range(10, 90, 10), 100, 110]
    assert prepared == [*range(9), 10, 11]
    stats = batcher.stats()
    assert (stats.rejected, stats.submitted, stats.answered, stats.late) == (1, 11, 11, 0)


def test_items_are_prepared_where_they_are_handed_in() -> None:
    threads = []

    def prepare(item: int) -> int:
        threads.append(threading.current_thread())
        if item == 2:
            raise ValueError("no item")
        return item * 100

    with Batcher(lambda items: [item + 1 for item in items], prepare=prepare, max_queue_items=1) as batcher:
        assert batcher(1) == 101
        for _ in range(3):  # more than there is room for: who was not let in after all takes none
            with pytest.raises(ValueError, match="no item"):
                batcher.submit(2)
        assert batcher(3) == 301
    assert set(threads) == {threading.current_thread()}
    stats = batcher.stats()
    assert (stats.submitted, stats.answered, stats.rejected, stats.waiting) == (2, 2, 0, 0)


@pytest.mark.parametrize("drain", [True, False])
def test_closing_waits_for_who_is_let_in(drain: bool) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def prepare(item: int) -> int:
        entered.set()
        assert go_on.wait(60)
        return item

    batcher = Batcher(lambda items: [item * 10 for item in items], prepare=prepare)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        handed_in = pool.submit(batcher.submit, 7)
        assert entered.wait(60)
        closed = pool.submit(batcher.close, drain=drain)
        while not batcher._closing:
            time.sleep(0.001)
        with pytest.raises(concurrent.futures.TimeoutError):
            closed.result(0.1)
        go_on.set()
        closed.result(60)
        if drain:
            assert handed_in.result(60).result(60) == 70
        else:
            with pytest.raises(concurrent.futures.CancelledError):
                handed_in.result(60).result(60)
    stats = batcher.stats()
    assert stats.submitted == stats.answered + stats.cancelled == 1
    assert stats.waiting == stats.running == 0


def test_who_is_prepared_counts_for_those_only_that_it_goes_before() -> None:
    entered, go_on = threading.Semaphore(0), threading.Event()

    def prepare(item: int) -> int:
        if item:
            entered.release()
            assert go_on.wait(60)
        return item

    curve = LatencyCurve({1: 0.020, 2: 0.030})
    batcher = Batcher(lambda items: items, prepare=prepare, max_batch=2, bucket=lambda item: item > 4, latency=curve)
    with batcher, concurrent.futures.ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(batcher.submit, item, priority=1) for item in (1, 2, 3, 4, 5, 6, 7, 8)]
        for _ in slow:
            assert entered.acquire(timeout=60)
        with pytest.raises(OverloadError):
            batcher.submit(0, deadline_ms=40, priority=2)
        assert batcher.submit(0, deadline_ms=40, priority=0).result(60) == 0
        go_on.set()
        assert [each.result(60).result(60) for each in slow] == [1, 2, 3, 4, 5, 6, 7, 8]


class Slow:
    """What is prepared somewhere else, until it is ``done``."""

    def __init__(self, number: int, done: bool = False) -> None:
        self.number, self.done = number, done
        self._callbacks: list[Callable[[Slow], None]] = []

    def add_done_callback(self, callback: Callable[[Slow], None]) -> None:
        if self.done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def finish(self) -> None:
        self.done = True
        for callback in self._callbacks:
            callback(self)
            callback(self)  # once more is none


def numbers_of(items: list[Slow]) -> list[int]:
    assert all(item.done for item in items)
    return [item.number for item in items]


def finish_elsewhere(item: Slow) -> None:
    thread = threading.Thread(target=item.finish)
    thread.start()
    thread.join()


def test_no_batch_waits_for_what_is_being_prepared() -> None:
    items = [Slow(0), Slow(1, done=True), Slow(2)]
    with Batcher(numbers_of, prepare=items.__getitem__, max_queue_items=2) as batcher:
        slow, quick = batcher.submit(0), batcher.submit(1)
        assert quick.result(60) == 1
        other = batcher.submit(2)
        with pytest.raises(OverloadError):  # those that are prepared take room
            batcher.submit(0)
        items[2].finish()
        assert other.result(60) == 2
        assert not slow.done()
        finish_elsewhere(items[0])
        assert slow.result(60) == 0
    stats = batcher.stats()
    assert (stats.submitted, stats.answered, stats.rejected, stats.waiting) == (3, 3, 1, 0)


def test_a_future_is_waited_for_as_well() -> None:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    with Batcher(lambda items: [item.result(0) for item in items], prepare=lambda _: future) as batcher:
        answer = batcher.submit("anything")
        with pytest.raises(concurrent.futures.TimeoutError):
            answer.result(0.05)
        future.set_result(7)
        assert answer.result(60) == 7


@pytest.mark.parametrize("drain", [True, False])
def test_closing_waits_for_what_is_being_prepared_or_cancels_it(drain: bool) -> None:
    items = [Slow(0), Slow(1)]
    batcher = Batcher(numbers_of, prepare=items.__getitem__)
    futures = [batcher.submit(0), batcher.submit(1)]
    assert futures[1].cancel()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        closed = pool.submit(batcher.close, drain=drain)
        while not batcher._closing:
            time.sleep(0.001)
        for item in items if drain else ():
            with pytest.raises(concurrent.futures.TimeoutError):
                closed.result(0.05)
            item.finish()
        closed.result(60)
    assert futures[0].cancelled() is not drain
    assert (futures[0].result() == 0) if drain else True
    stats = batcher.stats()
    assert (stats.answered, stats.cancelled) == ((1, 1) if drain else (0, 2))
    assert stats.submitted == 2
    assert stats.waiting == stats.running == 0


def test_what_fails_while_it_is_asked_to_call_back_is_not_waited_for() -> None:
    class Broken(Slow):
        def add_done_callback(self, callback: Callable[[Slow], None]) -> None:
            super().add_done_callback(callback)
            raise ValueError("no more")

    item = Broken(3)
    with Batcher(numbers_of, prepare=lambda _: item) as batcher:
        with pytest.raises(ValueError, match="no more"):
            batcher.submit(0)
        item.finish()  # too late, and nobody minds
    assert batcher.stats().submitted == 0


def test_who_would_be_prepared_too_late_is_turned_away_unless_nobody_else_is() -> None:
    items = [Slow(number) for number in range(6)]
    curve = LatencyCurve({1: 0.001, 16: 0.002})
    with Batcher(numbers_of, prepare=items.__getitem__, latency=curve) as batcher:
        batcher._done_in.update(2, 0.100)
        first = batcher.submit(0, deadline_ms=50)  # or it would never be found to be quicker
        with pytest.raises(OverloadError, match="not to be had before 131 ms"):
            batcher.submit(1, deadline_ms=50)
        second = batcher.submit(2, deadline_ms=60_000)
        finish_elsewhere(items[2])
        assert second.result(60) == 2
        assert batcher._done_in(2) < 0.100
        finish_elsewhere(items[0])
        assert first.exception(60) is None or isinstance(first.exception(), DeadlineError)
        known_s = batcher._done_in(1)
        items[3].done = True
        assert batcher(3) == 3
        assert batcher._done_in(1) == known_s  # it shows nothing of the others


def test_what_several_usually_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 5.0
    monkeypatch.setattr("nbvision.batching.latency.time.monotonic", lambda: now_s)
    usual = UsualTimes()
    assert usual(5) == 0.0
    usual.update(4, 0.010)
    assert usual(3) == 0.0
    assert usual(4) == usual(100) == 0.010
    usual.update(4, 5.0)  # a hiccup
    assert usual(4) == pytest.approx(0.011)
    usual.update(16, 0.004)  # more cannot be quicker: others were in the way
    assert usual(16) == usual(4)
    for _ in range(100):
        usual.update(4, 0.002)
    assert usual(4) == pytest.approx(0.002, rel=0.01)
    assert usual(16) == 0.004
    now_s = 5.9
    usual.update(4, 0.002)
    now_s = 6.1  # for a second nobody was one of sixteen: they may all be turned away for it
    assert usual(16) == usual(4) > 0
    now_s = 7.0
    assert usual(16) == 0.0
    usual.update(4, 5.0)
    assert usual(4) == 5.0


def test_what_takes_too_long_to_be_prepared_is_given_up() -> None:
    items = [Slow(number) for number in range(3)]
    with Batcher(numbers_of, prepare=items.__getitem__, in_flight=1) as batcher:
        first = batcher.submit(0, deadline_ms=30_000)
        second = batcher.submit(1, deadline_ms=50)
        with pytest.raises(DeadlineError, match="took too long to be prepared"):
            second.result(60)
        third = batcher.submit(2, deadline_ms=50)
        assert third.cancel()
        while batcher.stats().cancelled == 0:
            time.sleep(0.001)
        assert batcher.stats().waiting == 1
        for item in items:
            item.finish()
        assert first.result(60) == 0
    stats = batcher.stats()
    assert (stats.submitted, stats.answered, stats.late, stats.cancelled, stats.waiting) == (3, 1, 1, 1, 0)


def test_what_has_no_place_in_the_queue_fails_and_nobody_waits_for_it() -> None:
    items = [Slow(0), Slow(1)]
    with Batcher(numbers_of, prepare=items.__getitem__, bucket=lambda item: [] if item else 0) as batcher:
        odd, fine = batcher.submit(1), batcher.submit(0)
        for item in items:
            finish_elsewhere(item)
        with pytest.raises(TypeError, match="unhashable"):
            odd.result(60)
        assert fine.result(60) == 0
    stats = batcher.stats()
    assert (stats.submitted, stats.answered, stats.failed, stats.running) == (2, 1, 1, 0)


def test_a_little_that_is_prepared_turns_nobody_away_that_would_not_be_otherwise() -> None:
    curve = LatencyCurve()
    for size in (1, 8):
        for number in range(50):
            curve.update(size, 0.060 if number % 10 == 0 else 0.020)
    assert curve.typical(8) < 0.050 < curve(1)
    items = [Slow(number) for number in range(8)]
    with Batcher(numbers_of, prepare=items.__getitem__, latency=curve) as batcher:
        batcher._done_in.update(1, 0.001)
        futures = [batcher.submit(number, deadline_ms=50) for number in range(8)]
        for item in items:
            item.finish()
        assert [future.result(60) for future in futures] == list(range(8))


def test_closing_from_within_prepare() -> None:
    def prepare(item: int) -> int:
        batcher.close()
        return item

    batcher = Batcher(lambda items: items, prepare=prepare)
    with batcher, pytest.raises(InputError, match="from within prepare"):
        batcher.submit(1)


def test_an_interrupt_while_it_is_handed_in_lets_close_end() -> None:
    def prepare(item: int) -> int:
        raise KeyboardInterrupt

    with Batcher(lambda items: items, prepare=prepare) as batcher, pytest.raises(KeyboardInterrupt):
        batcher.submit(1)
    assert batcher.stats().submitted == 0


def test_buckets_do_not_mix() -> None:
    gate = Gate()
    # Eager: the deadline's policy makes batches smaller if the first one happens to take long.
    with Batcher(gate, in_flight=1, bucket=lambda item: item % 3, policy="eager") as batcher:
        batcher.submit(0)
        assert gate.entered.acquire(timeout=60)
        futures = [batcher.submit(n) for n in range(1, 10)]
        for _ in range(4):
            gate.open.release()
        assert [future.result(60) for future in futures] == [10 * n for n in range(1, 10)]
    assert sorted(map(sorted, gate.batches[1:])) == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]


def test_coroutines() -> None:
    async def main(batcher: Batcher) -> list[int]:
        answers = await asyncio.gather(*(batcher.answer(n) for n in range(50)))
        task = asyncio.ensure_future(batcher.answer(50))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answers

    with Batcher(lambda items: [item + 1 for item in items], max_batch=8) as batcher:
        assert asyncio.run(main(batcher)) == list(range(1, 51))


@pytest.mark.parametrize("drain", [True, False])
def test_closing(drain: bool) -> None:
    gate = Gate()
    batcher = Batcher(gate, in_flight=1)
    running = batcher.submit(0)
    assert gate.entered.acquire(timeout=60)
    waiting = batcher.submit(1)
    for _ in range(2):
        gate.open.release()
    batcher.close(drain=drain)
    assert running.result(60) == 0
    if drain:
        assert waiting.result(60) == 10
    else:
        with pytest.raises(concurrent.futures.CancelledError):
            waiting.result(60)
    with pytest.raises(InputError, match="closed"):
        batcher.submit(2)
    stats = batcher.stats()
    assert stats.submitted == stats.answered + stats.cancelled
    assert stats.waiting == stats.running == 0


def test_a_closed_batcher_lets_go_of_what_it_ran() -> None:
    """At once, whoever holds it: models hold memory of the GPU, which no collector of garbage knows of."""

    class Model:
        def __init__(self) -> None:
            self.batcher = Batcher(self.run, prepare=self.prepare)  # which holds the model, which holds it

        def prepare(self, item: int) -> int:
            return item

        def run(self, items: list[int]) -> list[int]:
            return items

    gc.collect()
    gc.disable()
    try:
        model = Model()
        assert model.batcher(5) == 5
        gone = weakref.ref(model)
        model.batcher.close()
        model.batcher.close()
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_many_callers_lose_and_double_nothing() -> None:
    """Twenty threads, poison, cancellation, deadlines: every future ends, and the counts add up."""

    def function(items: list[int]) -> list[int]:
        time.sleep(0.0005 * len(items))
        if any(item % 97 == 0 for item in items):
            raise ValueError("poison")
        return items

    outcomes: dict[str, int] = {}
    lock = threading.Lock()
    batcher = Batcher(function, max_batch=16, deadline_ms=200, max_queue_items=300)

    def caller(first: int) -> None:
        for n in range(first, first + 100):
            try:
                future = batcher.submit(n, priority=n % 3)
                if n % 10 == 0 and future.cancel():
                    outcome = "cancelled"
                else:
                    outcome = "right" if future.result(60) == n else "wrong"
            except (ValueError, DeadlineError, OverloadError) as error:
                outcome = type(error).__name__
                assert n % 97 == 0 or outcome != "ValueError"
            with lock:
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

    threads = [threading.Thread(target=caller, args=(1000 * number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    stats = batcher.stats()
    assert sum(outcomes.values()) == 2000
    assert "wrong" not in outcomes
    assert stats.answered == outcomes["right"]
    assert stats.failed == outcomes["ValueError"] > 0
    assert stats.submitted == stats.answered + stats.failed + stats.late + stats.cancelled


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"in_flight": 0}, {"max_queue_items": 1.5}, {"deadline_ms": -1}, {"aging_s": 0}]
)
def test_options_that_are_none(options: Any) -> None:
    with pytest.raises(InputError, match="expected a positive"):
        Batcher(list, **options)
    with pytest.raises(InputError, match="expected a callable"):
        Batcher("no function")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a callable"):
        Batcher(list, prepare="no function")  # type: ignore[arg-type]


# --- other policies in the batcher ------------------------------------------------------------------------------------


def let_go(gate: Gate) -> None:
    for _ in range(10):
        gate.open.release()


def test_an_eager_batcher_takes_all_there_are_whatever_their_deadlines() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=4, in_flight=1, policy="eager", device="cpu") as batcher:
        futures = [batcher.submit(0)]
        assert gate.entered.acquire(timeout=60)
        futures += [batcher.submit(number, deadline_ms=0.001) for number in range(1, 7)]
        let_go(gate)
        assert [future.result(60) for future in futures] == [0, 10, 20, 30, 40, 50, 60]
        stats = batcher.stats()
    assert gate.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert stats.reasons == {"drained": 2, "full": 1}
    assert (stats.missed, stats.late) == (6, 0)


def test_a_batcher_that_waits_for_more_runs_a_full_batch_and_a_part_of_one_later() -> None:
    gate = Gate()
    let_go(gate)
    with Batcher(gate, max_batch=2, in_flight=1, policy="delay", device="cpu") as batcher:
        began_s = time.monotonic()
        assert batcher.submit(0).result(60) == 0
        assert time.monotonic() - began_s >= 0.010  # alone, once the delay is over
        assert [future.result(60) for future in [batcher.submit(1), batcher.submit(2)]] == [10, 20]
        assert batcher.stats().reasons["drained"] >= 1


def test_a_batcher_that_turns_away_gives_up_who_waited_too_long() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=4, in_flight=1, policy="eager and reject", device="cpu") as batcher:
        first = batcher.submit(0)
        assert gate.entered.acquire(timeout=60)
        second = batcher.submit(1)
        time.sleep(0.030)  # more than the 20 ms that it may wait
        let_go(gate)
        with pytest.raises(DeadlineError):
            second.result(60)
        assert first.result(60) == 0
        assert batcher.stats().late == 1


def test_a_policy_that_there_is_none_of() -> None:
    with pytest.raises(InputError, match=r"policy is 'lazy'; expected one of \('deadline', 'eager'"):
        Batcher(list, policy="lazy", device="cpu")  # type: ignore[arg-type]


# --- the timeline -----------------------------------------------------------------------------------------------------


def test_a_timeline_has_every_batch_and_what_was_lost() -> None:
    def run(items: list[float]) -> list[Any]:
        time.sleep(0.05)
        return [ValueError("no") if item < 0 else item for item in items]

    with Batcher(run, max_batch=4, in_flight=1) as batcher:
        futures = [batcher.submit(item) for item in (1.0, 2.0, -3.0, 4.0, 5.0, 6.0)]
        concurrent.futures.wait(futures)
        running = batcher.submit(7.0)
        while not batcher.stats().running:
            time.sleep(0.001)
        late = batcher.submit(8.0, deadline_ms=20)
        concurrent.futures.wait([running, late])
        timeline, stats = batcher.timeline(), batcher.stats()
    batches = timeline.batches
    assert sum(batch.size for batch in batches) == stats.answered + stats.failed
    assert len(batches) == stats.batches
    assert sum(batch.failed for batch in batches) == stats.failed == 1
    assert sum(batch.missed for batch in batches) == stats.missed
    assert sum(count for _, count in timeline.given_up) == stats.late == 1
    assert collections.Counter(batch.reason for batch in batches) == stats.reasons
    for batch in batches:
        assert batch.seconds >= 0.05
        assert timeline.until_s - 60 < batch.began_s < batch.began_s + batch.seconds <= timeline.until_s
        assert 0 <= batch.waited_s < 5
    assert batcher.timeline(seconds=1e-6).batches == []


def test_the_picture_of_a_timeline(tmp_path: Path) -> None:
    """Bars where batches ran, as wide as they took, as high as they were large, in the color of their reason."""
    batches = [
        BatchRecord(100.0, 10.0, 0, 8, "full", 0.5, 0, 0),
        BatchRecord(120.0, 20.0, 1, 4, "deadline", 1.0, 1, 0),
    ]
    shown = BatcherTimeline(batches, [(150.0, 3)], until_s=160.0, seconds=60.0, max_batch=8, threads=2)
    pixels = np.asarray(shown.draw(size=(674, 320)))  # 10 pixels a second, after 64
    colors = {"full": (0x22, 0x88, 0x33), "deadline": (0xCC, 0xBB, 0x44), "lost": (0xEE, 0x66, 0x77)}
    places = {}
    for name, color in colors.items():
        rows, columns = np.nonzero((pixels[:278] == color).all(axis=2))  # above the legend
        places[name] = (columns.min() - 64, columns.max() + 1 - 64, rows.max() + 1 - rows.min(), len(set(columns)))
    assert places["full"][:2] == (0, 100)
    assert places["deadline"][:2] == (200, 400)
    assert places["full"][2] == pytest.approx(2 * places["deadline"][2], abs=2)
    assert places["lost"][0] == 400  # the end of the batch that missed
    assert places["lost"][1] == 501  # and who was given up
    assert places["lost"][3] == 2
    shown.save(tmp_path / "minute.png", size=(300, 200))
    with Image.open(tmp_path / "minute.png") as picture:
        assert picture.size == (300, 200)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_timeline_of_no_time(seconds: float) -> None:
    with Batcher(lambda items: items) as batcher, pytest.raises(InputError, match="expected a positive"):
        batcher.timeline(seconds=seconds)


def test_an_empty_timeline_is_a_picture_too() -> None:
    with Batcher(lambda items: items) as batcher:
        assert batcher.timeline().draw().size == (900, 320)


# --- warming up -------------------------------------------------------------------------------------------------------


def test_every_thread_warms_up_and_nothing_counts_it() -> None:
    threads: list[int] = []

    def run(items: list[int]) -> list[int]:
        if threading.get_ident() not in threads:
            threads.append(threading.get_ident())
            time.sleep(0.2)  # what it does at first
        return items

    with Batcher(run, in_flight=3, deadline_ms=100) as batcher:
        batcher.warm_up([1, 2])
        assert len(threads) == 3
        stats = batcher.stats()
        assert (stats.submitted, stats.batches, batcher.latency(1)) == (0, 0, 0.0)
        assert batcher.timeline().batches == []
        futures = [batcher.submit(item) for item in range(50)]
        assert [future.result() for future in futures] == list(range(50))


def test_a_warm_up_that_fails_says_so() -> None:
    def raising(items: list[int]) -> list[int]:
        raise KeyError("no such model")

    with Batcher(raising) as batcher, pytest.raises(KeyError, match="no such model"):
        batcher.warm_up([1])
    with Batcher(lambda items: [ValueError("not this one") for _ in items]) as batcher:
        with pytest.raises(ValueError, match="not this one"):
            batcher.warm_up([1, 2])
        with pytest.raises(ValueError, match="not this one"):  # and it goes on as before
            batcher(3)
    with pytest.raises(InputError, match="closed"):
        batcher.warm_up([1])


def test_a_warm_up_while_requests_come() -> None:
    with Batcher(lambda items: [item + 1 for item in items], in_flight=2) as batcher:
        asking = [batcher.submit(item) for item in range(200)]
        batcher.warm_up([0])
        asking += [batcher.submit(item) for item in range(200)]
        assert [future.result() for future in asking] == [*range(1, 201), *range(1, 201)]
        assert batcher.stats().answered == 400
