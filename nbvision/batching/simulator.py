"""The batcher's policy on a clock that is made up: what a deployment would do, before there is one."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nbvision.batching.policy import QUANTILE_99, PolicyName, Request, RequestQueue, make_policy
from nbvision.errors import InputError

__all__ = ["Simulation", "arrivals", "goodput", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """What became of the requests.

    Attributes
    ----------
    in_time, late, dropped : int
        Answered within the deadline, answered after it, and not answered.
    waited_s : (N,) float64 array
        From arrival to answer, of each request that was answered.
    batches : int
    seconds : float
        From the first arrival to the last answer.
    """

    in_time: int
    late: int
    dropped: int
    waited_s: npt.NDArray[np.float64]
    batches: int
    seconds: float

    @property
    def share_in_time(self) -> float:
        """Of all requests."""
        return self.in_time / max(self.in_time + self.late + self.dropped, 1)

    def __str__(self) -> str:
        count = self.in_time + self.late + self.dropped
        answered = max(self.in_time + self.late, 1)
        p50, p99 = np.quantile(self.waited_s, [0.5, 0.99]) * 1e3 if len(self.waited_s) else (math.nan, math.nan)
        return (
            f"{count} requests in {self.seconds:.1f} s: {self.share_in_time:.1%} in time, {self.late} late, "
            f"{self.dropped} given up; p50 {p50:.1f} ms, p99 {p99:.1f} ms; "
            f"{answered / max(self.batches, 1):.1f} a batch"
        )


def arrivals(rate: float, count: int, *, burst: int = 1, seed: int = 0) -> npt.NDArray[np.float64]:
    """Seconds at which ``count`` requests come: bursts of a size, at random (Poisson), ``rate`` requests a second."""
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(burst / rate, -(-count // burst)))
    return np.repeat(starts, burst)[:count]


def simulate(
    arrived_s: npt.NDArray[np.float64],
    latency: Callable[[int], float],
    *,
    deadline_ms: float,
    policy: PolicyName = "deadline",
    max_batch: int = 64,
    cards: int = 1,
    jitter: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Let requests come, be batched and be answered.

    Parameters
    ----------
    arrived_s : (N,) float array
        When they come, rising; see :func:`arrivals`.
    latency : callable
        Seconds that a batch of a size takes, such as a :class:`LatencyCurve`.
    deadline_ms : float
        After its arrival, of every request.
    policy : {"deadline", "eager", "delay", "delay and reject", "eager and reject"}
        The batcher's own; as many as there are as soon as a card is free; the same once there is a full batch or the
        oldest has waited 10 ms; and both with requests turned away that were queued for 20 ms.
    max_batch, cards : int
        Cards take batches from one queue.
    jitter : float
        Deviation of the logarithm of a batch's time from what ``latency`` says. The batcher's policy knows of it: it
        plans with the time that one batch in a hundred exceeds.
    seed : int
        Of the jitter.

    Raises
    ------
    InputError
        For an unknown policy, or numbers that are not positive.
    """
    for name, value in (("deadline_ms", deadline_ms), ("max_batch", max_batch), ("cards", cards)):
        if not value > 0:
            raise InputError(f"{name} is {value!r}; expected a positive number")
    rng = np.random.default_rng(seed)
    spread = math.exp(QUANTILE_99 * jitter)

    def slowest(size: int) -> float:
        return latency(size) * spread

    rule = make_policy(policy, slowest, latency, max_batch=max_batch)
    queue = RequestQueue(aging_s=math.inf)
    coming = [Request(None, float(at), float(at) + deadline_ms / 1e3) for at in arrived_s]
    free_s = [0.0] * cards  # when each card has nothing to do
    next_in, in_time, late, dropped, batches = 0, 0, 0, 0, 0
    waited: list[float] = []
    end_s = 0.0
    while next_in < len(coming) or len(queue):
        now_s = free_s[0]
        if not len(queue):
            now_s = max(now_s, coming[next_in].arrived_s)  # such a request finds none ahead, and is let in
        while True:
            while next_in < len(coming) and coming[next_in].arrived_s <= now_s:
                request = coming[next_in]
                expected_s = rule.answered_in_s(queue.before(request), request.arrived_s, servers=cards)
                if request.arrived_s + expected_s > request.deadline_s:
                    dropped += 1
                else:
                    queue.add(request)
                next_in += 1
            others_end_s = min((end_s for end_s in free_s[1:] if end_s > now_s), default=math.inf)
            start_s = rule.start_s(queue.first(now_s), is_busy=others_end_s < math.inf)
            if start_s <= now_s:
                break
            next_s = coming[next_in].arrived_s if next_in < len(coming) else math.inf
            now_s = min(start_s, next_s, others_end_s)
        release = rule.next_batch(queue.first(now_s), now_s)
        queue.remove(release.batch + release.late)
        dropped += len(release.late)
        if not release.batch:
            continue
        done_s = now_s + latency(len(release.batch)) * (float(rng.lognormal(0, jitter)) if jitter else 1.0)
        heapq.heapreplace(free_s, done_s)
        batches += 1
        end_s = max(end_s, done_s)
        for request in release.batch:
            waited.append(done_s - request.arrived_s)
            in_time += done_s <= request.deadline_s
            late += done_s > request.deadline_s
    seconds = max(end_s - float(arrived_s[0]), 0.0) if len(arrived_s) else 0.0
    return Simulation(in_time, late, dropped, np.array(waited), batches, seconds)


def goodput(
    latency: Callable[[int], float],
    *,
    deadline_ms: float,
    policy: PolicyName = "deadline",
    share: float = 0.99,
    burst: int = 1,
    max_batch: int = 64,
    cards: int = 1,
    jitter: float = 0.0,
    count: int = 20_000,
    seed: int = 0,
) -> float:
    """The highest rate, in requests a second and to 1 %, at which ``share`` of them is answered in time.

    ``count`` requests are simulated for each rate that is tried; the other parameters are those of :func:`simulate`.
    """

    def is_met(rate: float) -> bool:
        found = simulate(
            arrivals(rate, count, burst=burst, seed=seed),
            latency,
            deadline_ms=deadline_ms,
            policy=policy,
            max_batch=max_batch,
            cards=cards,
            jitter=jitter,
            seed=seed,
        )
        return found.share_in_time >= share

    low, high = 0.0, 1.02 * cards * max(size / latency(size) for size in range(1, max_batch + 1))
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low
