"""How long a batch takes, by its size: l(b)."""

from __future__ import annotations

import bisect
import collections
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nbvision.engines.spec import batch_class
from nbvision.errors import InputError

if TYPE_CHECKING:
    from nbvision.engines import EngineProfile

__all__ = ["LatencyCurve", "UsualTimes"]

_WINDOW = 50  # calls that are remembered of sizes near each other: a clock that is throttled shows within half as many
_FORGET_S = 60.0  # sizes that were not run for so long are as if never run: their last call may have been a bad one
_QUANTILE = 0.99
_ENOUGH = 25  # calls that say how much times scatter
_BELIEVED = 8  # calls of a size: fewer may all have been bad ones

_NEWS = 0.1  # weight of the latest in a mean
_FRESH_S = 1.0

_Points: TypeAlias = "tuple[list[int], list[float]]"  # sizes, and their seconds; both rise


class LatencyCurve:
    """The 99th percentile of a batch's time against its size, from what is measured while it runs.

    Sizes near each other (1, 2, 3, 4, 5 to 6, 7 to 8, 9 to 12, ...) count together, by the median of their last 50,
    until they have not been run for a minute. How much longer than its median the slowest call in a hundred takes is
    taken from the calls of all sizes from half to twice as large, or of all, if those are few: one picture may take
    three times as long as another, of which sixteen together show nothing. A size that ran fewer than eight times is
    not taken to be slower than a larger one that did, nor, item by item, than a smaller one: else one bad call would
    keep the size from ever being run again. Between sizes that were seen the curve is linear, beyond them in
    proportion, and it never falls as batches grow.

    Parameters
    ----------
    seconds : dict of int to float, optional
        Batch sizes and what they took, to begin with; replaced as soon as a size is measured, and no more believed
        than a size that ran fewer than eight times.

    Raises
    ------
    InputError
        For sizes or times that are not positive.

    Examples
    --------
    >>> curve = LatencyCurve({1: 0.004, 16: 0.010})
    >>> round(curve(4) * 1e3, 1)
    5.2
    """

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        for size, time_s in (seconds or {}).items():
            _check(size, time_s)
        self._seeds = dict(seconds or {})
        self._measured: dict[int, _Calls] = {}  # by the largest of sizes near each other
        self._lock = threading.Lock()
        self._points, self._medians = self._fitted()

    @classmethod
    def of_profile(cls, profile: EngineProfile, *, precision: str | None = None) -> LatencyCurve:
        """What :func:`nbvision.profile_engine` measured: the 99th percentiles of one precision (default: the first)."""
        chosen = precision or profile.times[0].precision
        return cls({time.batch: time.p99_ms / 1e3 for time in profile.times if time.precision == chosen})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, precision: str | None = None) -> LatencyCurve:
        """From what :meth:`nbvision.EngineProfile.save` wrote, or a JSON object of batch sizes and milliseconds.

        Raises
        ------
        InputError
            If the file holds neither.
        """
        try:
            written = json.loads(Path(path).read_text())
            times = written.get("times") or [{"batch": int(size), "p99_ms": ms} for size, ms in written.items()]
            chosen = precision or times[0].get("precision")
            points = {time["batch"]: time["p99_ms"] / 1e3 for time in times if time.get("precision") == chosen}
            if not points:
                raise ValueError(f"it has no precision {chosen!r}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} says no times of batches ({error}); expected what `nbvision profile-engine --json` wrote, or "
                'an object such as {"1": 4.2, "16": 9.9}, in milliseconds'
            ) from error
        return cls(points)

    def __call__(self, size: int) -> float:
        """Seconds that a batch of ``size`` takes, but for one in a hundred; 0 as long as nothing is known."""
        return _between(*self._points, size)

    def typical(self, size: int) -> float:
        """The same of every other batch: the median."""
        return _between(*self._medians, size)

    def update(self, size: int, seconds: float) -> None:
        """Count one call."""
        _check(size, seconds)
        now_s = time.monotonic()
        with self._lock:
            self._measured.setdefault(batch_class(size), _Calls()).add(seconds, now_s)
            self._measured = {
                group: calls for group, calls in self._measured.items() if now_s - calls.last_s <= _FORGET_S
            }
            self._points, self._medians = self._fitted()

    def forget(self, size: int) -> None:
        """Count the calls of a size, and of those near it, no more."""
        with self._lock:
            self._measured.pop(batch_class(size), None)
            self._points, self._medians = self._fitted()

    def _fitted(self) -> tuple[_Points, _Points]:
        """Of the slowest and of the median calls."""
        known = {size: time_s for size, time_s in self._seeds.items() if batch_class(size) not in self._measured}
        medians = known | {group: calls.median_s for group, calls in self._measured.items()}
        believed = {group: medians[group] for group, calls in self._measured.items() if len(calls.ratios) >= _BELIEVED}
        for size in medians.keys() - believed.keys():
            medians[size] = min([medians[size], *(time_s * max(size / other, 1) for other, time_s in believed.items())])
        most = {size: self._scatter_of(size) * time_s for size, time_s in medians.items() if size in self._measured}
        return _rising(medians | most), _rising(medians)

    def _scatter_of(self, group: int) -> float:
        """How many times its median a call of such a size takes, but for one in a hundred."""
        near = [calls.ratios for other, calls in self._measured.items() if group <= 2 * other <= 4 * group]
        if sum(map(len, near)) < _ENOUGH:
            near = [calls.ratios for calls in self._measured.values()]
        ratios = np.sort(np.concatenate(near))
        # Rounded down: of a few calls the slowest, such as one that compiled something, does not count.
        return max(float(ratios[int(_QUANTILE * (len(ratios) - 1))]), 1.0)


class UsualTimes:
    """How long it usually takes until one of several that are under way is done, by how many there are.

    It is asked, and told, of each request, so it keeps one number for numbers near each other: a mean, for which what
    took longer than twice as long counts as twice as long. What nothing was heard of for a second counts no more: who
    is turned away for it would never find it to be quicker.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, float]] = {}  # by the largest of numbers near each other; and since when

    def __call__(self, count: int) -> float:
        """Seconds; the longest of as many or fewer, 0 if nothing is known of them."""
        most, since_s = batch_class(count), time.monotonic() - _FRESH_S
        known = list(self._known.items())
        return max((time_s for group, (time_s, at_s) in known if group <= most and at_s > since_s), default=0.0)

    def update(self, count: int, seconds: float) -> None:
        """Count one that began when there were ``count`` with it."""
        group, now_s = batch_class(count), time.monotonic()
        known_s, at_s = self._known.get(group, (0.0, -math.inf))
        if now_s - at_s <= _FRESH_S:
            seconds = known_s + _NEWS * (min(seconds, 2 * known_s) - known_s)
        self._known[group] = seconds, now_s


class _Calls:
    """The last calls of sizes near each other."""

    def __init__(self) -> None:
        self._seconds: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    def add(self, seconds: float, now_s: float) -> None:
        self._seconds.append(seconds)
        self.last_s = now_s
        times_s = np.array(self._seconds)
        self.median_s = float(np.median(times_s))
        self.ratios = times_s / self.median_s


def _rising(seconds: Mapping[int, float]) -> _Points:
    sizes = sorted(seconds)
    return sizes, list(itertools.accumulate((seconds[size] for size in sizes), max))


def _between(sizes: list[int], times: list[float], size: int) -> float:
    if not sizes:
        return 0.0
    index = bisect.bisect_left(sizes, size)
    if index == len(sizes):
        return times[-1] * size / sizes[-1]
    if sizes[index] == size or index == 0:
        return times[index]
    share = (size - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
    return times[index - 1] + share * (times[index] - times[index - 1])


def _check(size: int, seconds: float) -> None:
    if not isinstance(size, int) or size < 1 or not seconds > 0:
        raise InputError(f"a batch of {size!r} in {seconds!r} s; expected a positive size and time")
