"""Which requests to run now: the part of the batcher that the simulator shares. It knows no clock and no thread."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Reason", "Release", "Request", "RequestQueue", "next_batch"]

# Why no more requests are in a batch: there were none, none fit in, or the tightest deadline allows no larger one.
Reason = Literal["drained", "full", "deadline"]

KEEP = 0.8  # a request that would shrink the batch below this share of what could be released is left out


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

        def turn(request: Request) -> tuple[bool, tuple[int, float, float]]:
            return now_s - request.arrived_s < self.aging_s, _rank(request)

        ordered = [sorted(waiting, key=turn) for waiting in self._buckets.values()]
        return min(ordered, key=lambda waiting: turn(waiting[0]))

    def all(self) -> list[Request]:
        return [request for waiting in self._buckets.values() for request in waiting]


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
    """Choose the batch to start now: the largest that meets the tightest deadline in it.

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
        ``late`` are those that cannot make it even alone in a typical time. They are given up.

    Notes
    -----
    Requests whose deadlines would shrink the batch below 0.8 of what could go without them are left out, and so are
    those that are not sure to be in time. They go along where that costs nobody else his deadline, and by themselves
    when there are no others: if nothing ran, nobody would notice that batches have become faster.
    """
    typical = typical or latency
    sure_s, alone_s = now_s + latency(1), now_s + typical(1)
    late = [request for request in waiting if request.deadline_s < alone_s]
    sure = [request for request in waiting if request.deadline_s >= sure_s]
    if not sure:
        doubtful = [request for request in waiting if alone_s <= request.deadline_s < sure_s]
        batch, reason = _largest(doubtful, now_s, typical, max_batch)
        return Release(batch, late, reason)
    batch, reason = _largest(sure, now_s, latency, max_batch)
    chosen, sure_until_s, likely_until_s = set(batch), min(request.deadline_s for request in batch), math.inf
    for request in waiting:
        size = len(batch) + 1
        end_s = now_s + typical(size)
        if size > max_batch or now_s + latency(size) > sure_until_s or end_s > likely_until_s:
            break
        if request not in chosen and end_s <= request.deadline_s:
            batch.append(request)
            likely_until_s = min(likely_until_s, request.deadline_s)
    return Release(batch, late, reason)


def _largest(
    candidates: list[Request], now_s: float, latency: Callable[[int], float], max_batch: int
) -> tuple[list[Request], Reason]:
    """Of requests that are all in time alone."""
    if not candidates:
        return [], "drained"
    ends_s = [now_s + latency(size) for size in range(1, min(len(candidates), max_batch) + 1)]
    deadlines_s = sorted(request.deadline_s for request in candidates)
    # How many can go together without those whose deadline is before each.
    sizes = [min(bisect.bisect_right(ends_s, at_s), len(deadlines_s) - index) for index, at_s in enumerate(deadlines_s)]
    least = KEEP * max(sizes)
    earliest_s = next(at_s for at_s, size in zip(deadlines_s, sizes, strict=True) if size >= least)
    kept = [request for request in candidates if request.deadline_s >= earliest_s]
    size, tightest_s = 0, math.inf
    for request, end_s in zip(kept, ends_s, strict=False):
        tightest_s = min(tightest_s, request.deadline_s)
        if end_s > tightest_s:
            break
        size += 1
    most = min(len(kept), max_batch)
    return kept[:size], "deadline" if size < most else "full" if most < len(kept) else "drained"
