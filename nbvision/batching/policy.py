"""Which requests to run now: the part of the batcher that the simulator shares. It knows no clock and no thread."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np

from nbvision.errors import InputError

__all__ = [
    "POLICIES",
    "QUANTILE_99",
    "Policy",
    "PolicyName",
    "Reason",
    "Release",
    "Request",
    "RequestQueue",
    "hold_until_s",
    "make_policy",
    "next_batch",
]

PolicyName = Literal["deadline", "eager", "delay", "delay and reject", "eager and reject"]

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
DELAY_S = 0.010  # of the policies that wait for more
REJECT_S = 0.020  # queued for longer is turned away, by those that do

QUANTILE_99 = 2.326  # of the normal distribution

# Why no more requests are in a batch: there were none, none fit in, or fewer together have better chances.
Reason = Literal["drained", "full", "deadline"]

GIVE_UP = 0.02  # a request with a smaller chance to be in time, even alone, is given up
NEARLY = 0.98  # of the best: good enough for those that come first
AS_GOOD = 0.99  # of the best: good enough for a larger batch
LOOK_AT = 4  # batches full of requests, of those that come first


@dataclass(eq=False)
class Request:
    """One item that waits.

    Attributes
    ----------
    item : object
    arrived_s, deadline_s : float
        Of one clock; no deadline is infinity.
    priority : int
        Smaller ones go first.
    bucket : hashable
        Only requests of one bucket share a batch.
    size_bytes : int
    """

    item: Any
    arrived_s: float
    deadline_s: float = math.inf
    priority: int = 0
    bucket: Hashable = None
    size_bytes: int = 0
    future: Any = field(default=None, repr=False)

    def goes_before(self, other: Request) -> bool:
        """Of one bucket, and if neither has aged."""
        return _rank(self) <= _rank(other)


@dataclass(frozen=True)
class Release:
    """What :func:`next_batch` decided: ``batch`` shall run now, ``late`` not at all."""

    batch: list[Request]
    late: list[Request]
    reason: Reason


class RequestQueue:
    """Requests by bucket, in the order in which they shall go.

    That is by priority, then by deadline, then as they came. A request that has waited for ``aging_s`` goes before all
    others, so none waits forever.
    """

    def __init__(self, *, aging_s: float = 1.0) -> None:
        self.aging_s = aging_s
        self._buckets: dict[Hashable, list[Request]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, request: Request) -> None:
        waiting = self._buckets.setdefault(request.bucket, [])
        bisect.insort(waiting, request, key=_rank)
        self._count += 1

    def before(self, request: Request) -> list[Request]:
        """Those of its bucket that would go before it, if none has aged."""
        waiting = self._buckets.get(request.bucket, [])
        return waiting[: bisect.bisect_right(waiting, _rank(request), key=_rank)]

    def remove(self, requests: Iterable[Request]) -> None:
        """Take out requests of one bucket."""
        gone = set(requests)
        for request in gone:
            waiting = self._buckets[request.bucket]
            waiting[:] = [other for other in waiting if other not in gone]
            if not waiting:
                del self._buckets[request.bucket]
            break
        self._count -= len(gone)

    def first(self, now_s: float) -> list[Request]:
        """The requests of the bucket whose turn it is, in their order."""
        if not self._buckets:
            return []

        def is_young(request: Request) -> bool:
            return now_s - request.arrived_s < self.aging_s

        def turn(request: Request) -> tuple[bool, tuple[int, float, float]]:
            return is_young(request), _rank(request)

        ordered = [
            list(waiting) if all(map(is_young, waiting)) else sorted(waiting, key=turn)
            for waiting in self._buckets.values()
        ]
        return min(ordered, key=lambda waiting: turn(waiting[0]))

    def all(self) -> list[Request]:
        return [request for waiting in self._buckets.values() for request in waiting]


class Policy(Protocol):
    """When a batch begins, and which requests are in it; always of one bucket, in the order in which they shall go."""

    def answered_in_s(self, before: list[Request], now_s: float, *, servers: int, prepared_in_s: float = 0.0) -> float:
        """How long a request has to wait for its answer that comes now, with those to go before it, from so many
        threads or cards, once it is prepared; 0 if that is not known, or no reason to turn it away."""

    def start_s(self, waiting: list[Request], *, is_busy: bool) -> float:
        """When a free thread or card begins a batch if nothing changes; ``is_busy`` says whether another runs one."""

    def next_batch(self, waiting: list[Request], now_s: float) -> Release:
        """What runs now."""


@dataclass(frozen=True)
class _Deadline:
    """The batcher's own: nobody waits while nothing runs, and as many as can be are in time."""

    latency: Callable[[int], float]
    typical: Callable[[int], float]
    max_batch: int

    def answered_in_s(self, before: list[Request], now_s: float, *, servers: int, prepared_in_s: float = 0.0) -> float:
        if self.typical(1) <= 0 or (len(before) < self.max_batch and not prepared_in_s):
            return 0.0
        # Those that are given up when the next batch is chosen take no time.
        latest_s = now_s + _quickest(self.typical(1), self.latency(1))
        batches, rest = divmod(sum(request.deadline_s >= latest_s for request in before), self.max_batch)
        if not batches:
            return prepared_in_s + self.typical(rest + 1) if prepared_in_s else 0.0
        # One of the servers is taken to be free at once, their batches to end evenly, and nobody to come into its own
        # batch, which may be a slow one: it costs something to begin with who is given up later.
        return max(prepared_in_s, batches / servers * self.typical(self.max_batch)) + self.latency(rest + 1)

    def start_s(self, waiting: list[Request], *, is_busy: bool) -> float:
        return hold_until_s(waiting, self.latency, max_batch=self.max_batch) if is_busy else -math.inf

    def next_batch(self, waiting: list[Request], now_s: float) -> Release:
        return next_batch(waiting, now_s, self.latency, max_batch=self.max_batch, typical=self.typical)


@dataclass(frozen=True)
class _InTurn:
    """As many as there are, once a batch is full or the oldest has waited; those that waited too long not at all."""

    max_batch: int
    delay_s: float
    reject_s: float

    def answered_in_s(self, before: list[Request], now_s: float, *, servers: int, prepared_in_s: float = 0.0) -> float:
        return 0.0

    def start_s(self, waiting: list[Request], *, is_busy: bool) -> float:
        if not self.delay_s or len(waiting) >= self.max_batch:
            return -math.inf
        return min(request.arrived_s for request in waiting) + self.delay_s

    def next_batch(self, waiting: list[Request], now_s: float) -> Release:
        late = [request for request in waiting if now_s - request.arrived_s > self.reject_s]
        able = [request for request in waiting if now_s - request.arrived_s <= self.reject_s]
        return Release(able[: self.max_batch], late, "full" if len(able) >= self.max_batch else "drained")


def make_policy(
    name: PolicyName, latency: Callable[[int], float], typical: Callable[[int], float], *, max_batch: int
) -> Policy:
    """A policy by its name; :func:`next_batch` says what ``latency`` and ``typical`` are.

    Raises
    ------
    InputError
        For an unknown name.
    """
    if name not in POLICIES:
        raise InputError(f"policy is {name!r}; expected one of {POLICIES}")
    if name == "deadline":
        return _Deadline(latency, typical, max_batch)
    delay_s = DELAY_S if name.startswith("delay") else 0.0
    return _InTurn(max_batch, delay_s, REJECT_S if name.endswith("reject") else math.inf)


def _rank(request: Request) -> tuple[int, float, float]:
    return request.priority, request.deadline_s, request.arrived_s


def next_batch(
    waiting: list[Request],
    now_s: float,
    latency: Callable[[int], float],
    *,
    max_batch: int,
    typical: Callable[[int], float] | None = None,
) -> Release:
    """Choose the batch to start now: that of which most answers in time a second are expected.

    Parameters
    ----------
    waiting : list of Request
        Of one bucket, in the order in which they shall go.
    now_s : float
    latency : callable
        Seconds that a batch of a size takes at most, but for one in a hundred; it does not fall with the size.
    max_batch : int
    typical : callable, optional
        Seconds that every other batch takes at most, no more than ``latency``; default: the same.

    Returns
    -------
    Release
        ``late`` are those that have no chance to be in time even alone. They are given up.

    Notes
    -----
    The time of a batch is taken as log-normal. For each size the batch begins with the first request from which on the
    sum of the chances is at least 0.98 of the best such sum; those before it have the worst chances, and are left out.
    Of all sizes that with the most such answers for its typical time goes, or a larger one that has nearly as many: of
    what has not been tried lately little is known, and others wait. So a deadline makes a batch smaller only where that
    saves time, and nobody is given up for a call that once took long.
    """
    typical = typical or latency
    most = min(len(waiting), max_batch)
    if not waiting or typical(1) <= 0:  # nothing is known yet
        return Release(waiting[:most], [], "full" if most < len(waiting) else "drained")
    latest_s = now_s + _quickest(typical(1), latency(1))
    late = [request for request in waiting if request.deadline_s < latest_s]
    able = [request for request in waiting if request.deadline_s >= latest_s][: LOOK_AT * max_batch]
    if not able:
        return Release([], late, "drained")
    if len(able) == 1:  # there is nothing to choose
        return Release(able, late, "full" if max_batch == 1 else "drained")
    sizes = range(1, min(len(able), max_batch) + 1)
    typical_s, slowest_s = (np.array([time_of(size) for size in sizes]) for time_of in (typical, latency))
    left_s = np.array([request.deadline_s for request in able]) - now_s
    chances = _chances(left_s, typical_s[:, None], slowest_s[:, None])
    chances[chances < GIVE_UP] = 0
    sums = np.concatenate([np.zeros((len(sizes), 1)), np.cumsum(chances, axis=1)], axis=1)
    # Only those of the first's priority are left out for the others.
    same = next((index for index, request in enumerate(able) if request.priority != able[0].priority), len(able))
    firsts, rates = [], []
    for size, seconds in zip(sizes, typical_s.tolist(), strict=True):
        expected = (sums[size - 1, size:] - sums[size - 1, : len(able) + 1 - size])[:same]
        firsts.append(int(np.argmax(expected >= NEARLY * expected.max())))
        rates.append(float(expected[firsts[-1]]) / seconds)
    size = max(size for size, rate in zip(sizes, rates, strict=True) if rate >= AS_GOOD * max(rates))
    first = firsts[size - 1]
    reason: Reason = "full" if size == max_batch else "drained" if size == len(able) else "deadline"
    hopeful = [request for request, chance in zip(able[first:], chances[size - 1, first:], strict=True) if chance]
    return Release(hopeful[:size], late, reason)


def hold_until_s(waiting: list[Request], latency: Callable[[int], float], *, max_batch: int) -> float:
    """Until when others may join a batch of all that wait, of one bucket, if nothing is gained by starting it at once.

    That is while other batches run: those that come meanwhile go along nearly for free, and so the next ones find more
    room.
    """
    if len(waiting) >= max_batch:
        return -math.inf
    return min(request.deadline_s for request in waiting) - latency(len(waiting) + 1)


def _chances(left_s: Any, typical_s: Any, slowest_s: Any) -> Any:
    """That a batch ends before the time that is left, by the logistic curve that is nearest to the normal one."""
    with np.errstate(over="ignore"):
        deviations = (np.log(np.maximum(left_s, 1e-9)) - np.log(typical_s)) / _deviation(typical_s, slowest_s)
        return 1 / (1 + np.exp(-1.702 * deviations))


def _deviation(typical_s: Any, slowest_s: Any) -> Any:
    """Of the logarithm of a time, of which one in a hundred is slower than ``slowest_s``."""
    return np.maximum(np.log(slowest_s / typical_s) / QUANTILE_99, 1e-6)


def _quickest(typical_s: float, slowest_s: float) -> float:
    """The time within which a batch ends with a chance of ``GIVE_UP``."""
    odds = math.log(GIVE_UP / (1 - GIVE_UP)) / 1.702
    return float(typical_s * math.exp(odds * float(_deviation(typical_s, slowest_s))))
