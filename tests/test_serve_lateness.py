"""HTTP's own time is taken off deadlines, and is measured as what a turn of the event loop takes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import time
import types
from typing import Any

import pytest

from nbvision.errors import OverloadError
from nbvision.serve.lateness import Lateness
from nbvision.serve.served import Served
from nbvision.serve.service import Counts, Service


def measured_beside(*works_s: float) -> Lateness:
    """Of a loop in which a request comes in each turn, which has so much work."""
    lateness = Lateness()

    async def work() -> None:
        for work_s in works_s:
            lateness.measure(asyncio.get_running_loop())
            time.sleep(work_s)
            await asyncio.sleep(0)

    asyncio.run(work())
    return lateness


def test_a_turn_is_all_that_is_done_in_it() -> None:
    assert 0.03 <= measured_beside(*[0.03] * 8).turn_s < 0.3
    assert measured_beside(*[0.0] * 8).turn_s < 0.02


def test_one_long_turn_says_nothing_of_the_next() -> None:
    """It may have read a burst, whose requests are on their way by then, or one large body."""
    for at in range(8):
        assert measured_beside(*[0.0] * at, 0.1, *[0.0] * (8 - at)).turn_s < 0.05


def test_turns_of_long_ago_do_not_count() -> None:
    """The first request after a pause meets a loop that has nothing else to do."""
    lateness, seen = Lateness(), []
    lateness._turns_s.extend([0.05] * 3)
    lateness._ended_s = time.perf_counter() - 1

    async def one_request() -> None:
        lateness.measure(asyncio.get_running_loop())
        seen.append(lateness.turn_s)

    asyncio.run(one_request())
    assert seen == [0.0]


def test_all_of_it_counts() -> None:
    lateness = Lateness()
    assert 20 <= lateness.of_ms(time.perf_counter() - 0.02) < 120
    lateness._turns_s.extend([0.01, 0.3, 0.0])
    assert 57.5 <= lateness.of_ms(time.perf_counter() - 0.02) < 160


def service_of(turn_s: float) -> Any:
    lateness = Lateness()
    lateness._turns_s.extend([turn_s] * 3)
    service = types.SimpleNamespace(lateness=lateness, counts=collections.defaultdict(Counts))
    service._turned_away = functools.partial(Service._turned_away, service)
    return service


def served_of(answer_ms: float) -> Any:
    served = types.SimpleNamespace(
        name="one", answer_ms=answer_ms, turned_away=0, batcher=types.SimpleNamespace(deadline_ms=40.0)
    )
    served.forget = functools.partial(Served.forget, served)
    return served


@pytest.mark.parametrize(
    ("turn_s", "answer_ms", "deadline_ms", "is_refused"),
    [
        (0.0, 30.0, 100.0, False),  # HTTP has time
        (0.020, 5.0, 100.0, False),  # 25 ms are left, enough for an answer
        (0.020, 35.0, 100.0, True),
        (0.020, 150.0, 100.0, False),  # hopeless as it is, or not, by its priority: the batcher knows
        (0.030, 0.0, 100.0, True),  # nothing is left
        (0.030, 150.0, 100.0, True),
        (0.002, 98.0, 100.0, False),  # it is not HTTP that takes the time
        (0.008, 35.0, None, True),  # the pipeline's own
        (0.020, 15.0, 0.0, False),  # the batcher says that it has passed
    ],
)
def test_who_is_turned_away(turn_s: float, answer_ms: float, deadline_ms: float | None, is_refused: bool) -> None:
    service, served = service_of(turn_s), served_of(answer_ms)
    with pytest.raises(OverloadError) if is_refused else contextlib.nullcontext():
        Service.refuse_if_late(service, served, deadline_ms, read_s=time.perf_counter())
    assert served.turned_away == service.counts["one"].failure == is_refused


def test_who_is_never_asked_is_asked_again() -> None:
    """What an answer took lately is believed less with each request that is turned away for it."""
    service, served = service_of(0.020), served_of(90.0)
    for _ in range(600):
        with contextlib.suppress(OverloadError):
            Service.refuse_if_late(service, served, 100.0, read_s=time.perf_counter())
    assert served.turned_away < 400
