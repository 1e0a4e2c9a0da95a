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

KEEP = 0.8  # a request that would shrink the batch below this share of what could be released is given up


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


def next_batch(waiting: list[Request], now_s: float, latency: Callable[[int], float], *, max_batch: int) -> Release:
    """Choose the batch to start now: the largest that meets the tightest deadline in it.

    Parameters
    ----------
    waiting : list of Request
        Of one bucket, in the order in which they shall go.
    now_s : float
    latency : callable
        Seconds that a batch of a size takes; it does not fall with the size.
    max_batch : int

    Returns
    -------
    Release
        ``late`` are those that cannot make it even alone, and those whose deadline would shrink the batch below 0.8 of
        what could go otherwise: they are given up, so that more of the others are in time.
    """
    alone_s = now_s + latency(1)
    late = [request for request in waiting if request.deadline_s < alone_s]
    candidates = [request for request in waiting if request.deadline_s >= alone_s] if late else list(waiting)
    while candidates:
        most = min(len(candidates), max_batch)
        size = _largest_in_time(candidates[:most], now_s, latency)
        if size >= KEEP * most:
            reason: Reason = "deadline" if size < most else "full" if most < len(candidates) else "drained"
            return Release(candidates[:size], late, reason)
        tightest = min(candidates[: size + 1], key=lambda request: request.deadline_s)
        candidates.remove(tightest)
        late.append(tightest)
    return Release([], late, "drained")


def _largest_in_time(candidates: list[Request], now_s: float, latency: Callable[[int], float]) -> int:
    """How many from the front can go together before the first deadline among them."""
    size, tightest = 0, math.inf
    for count, request in enumerate(candidates, 1):
        tightest = min(tightest, request.deadline_s)
        if now_s + latency(count) > tightest:
            break
        size = count
    return size
