"""HTTP's own time is taken off deadlines, and is measured as what a turn of the event loop takes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
import types
from typing import Any

import pytest

from nbvision.errors import OverloadError
from nbvision.serve.lateness import Lateness
from nbvision.serve.service import Counts, Service


def measured_beside(work_s: float, turns: int = 6) -> Lateness:
    """Of a loop in which each turn has so much work."""
    lateness = Lateness()

    async def work() -> None:
        for _ in range(turns):
            lateness.measure(asyncio.get_running_loop())
            time.sleep(work_s)
            await asyncio.sleep(0)

    asyncio.run(work())
    return lateness


def test_a_turn_is_all_that_is_done_in_it() -> None:
    assert 0.03 <= measured_beside(0.03).turn_s < 0.3
    assert measured_beside(0.0).turn_s < 0.02


def test_a_turn_that_does_not_end_counts_as_it_is() -> None:
    lateness, seen = Lateness(), []

    async def hang() -> None:
        lateness.measure(asyncio.get_running_loop())
        await asyncio.sleep(0)
        time.sleep(0.05)
        seen.append(lateness.turn_s)

    asyncio.run(hang())
    assert seen[0] >= 0.05


def test_a_long_turn_fades() -> None:
    lateness = Lateness()

    async def one_long_turn() -> None:
        lateness.measure(asyncio.get_running_loop())
        await asyncio.sleep(0)
        time.sleep(0.05)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert lateness.turn_s >= 0.05
        for _ in range(100):
            lateness.measure(asyncio.get_running_loop())
            for _ in range(3):
                await asyncio.sleep(0)

    asyncio.run(one_long_turn())
    assert lateness.turn_s < 0.01


def test_a_long_turn_of_long_ago_does_not_count() -> None:
    """The first request after a pause meets a loop that has nothing else to do."""
    lateness, seen = Lateness(), []
    lateness._turn_s, lateness._ended_s = 0.05, time.perf_counter() - 0.06

    async def one_request() -> None:
        lateness.measure(asyncio.get_running_loop())
        seen.append(lateness.turn_s)

    asyncio.run(one_request())
    assert seen[0] < 0.02


def test_all_of_it_counts() -> None:
    lateness = Lateness()
    assert lateness.of_ms(time.perf_counter() - 0.02) == pytest.approx(20, abs=5)
    lateness._turn_s = 0.01
    assert lateness.of_ms(time.perf_counter() - 0.02) == pytest.approx(57.5, abs=5)


def service_of(turn_s: float) -> Any:
    lateness = Lateness()
    lateness._turn_s = turn_s
    return types.SimpleNamespace(lateness=lateness, counts=collections.defaultdict(Counts))


@pytest.mark.parametrize(
    ("turn_s", "answer_ms", "deadline_ms", "is_refused"),
    [
        (0.0, 30.0, 40.0, False),  # HTTP has time
        (0.008, 5.0, 40.0, False),  # 10 ms are left, enough for an answer
        (0.008, 15.0, 40.0, True),
        (0.020, 0.0, 40.0, True),  # nothing is left
        (0.008, 60.0, 40.0, False),  # hopeless as it is, or not, by its priority: the batcher knows
        (0.001, 39.0, 40.0, False),  # it is not HTTP that takes the time
        (0.020, 15.0, None, False),
    ],
)
def test_who_is_turned_away(turn_s: float, answer_ms: float, deadline_ms: float | None, is_refused: bool) -> None:
    service = service_of(turn_s)
    served: Any = types.SimpleNamespace(
        name="one", answer_ms=answer_ms, turned_away=0, batcher=types.SimpleNamespace(deadline_ms=None)
    )
    with pytest.raises(OverloadError) if is_refused else contextlib.nullcontext():
        Service.refuse_if_late(service, served, deadline_ms, read_s=time.perf_counter())
    assert served.turned_away == service.counts["one"].failure == is_refused


def test_the_pipelines_own_deadline_counts_too() -> None:
    served: Any = types.SimpleNamespace(
        name="one", answer_ms=15.0, turned_away=0, batcher=types.SimpleNamespace(deadline_ms=40.0)
    )
    with pytest.raises(OverloadError, match="that 10 of"):
        Service.refuse_if_late(service_of(0.008), served, None, read_s=time.perf_counter())
