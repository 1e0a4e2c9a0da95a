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
from typing import TYPE_CHECKING

from nbvision.errors import InputError

if TYPE_CHECKING:
    from nbvision.engines import EngineProfile

__all__ = ["LatencyCurve"]

_WINDOW = 200  # calls of a size that are remembered: a clock that is throttled shows within as many
_FORGET_S = (
    60.0  # a size that was not run for so long is as if it had never been: its last call may have been a bad one
)
_QUANTILE = 0.99


class LatencyCurve:
    """The 99th percentile of a batch's time against its size, from what is measured while it runs.

    Between sizes that were seen it is linear, beyond them in proportion, and it never falls as batches grow. A size
    that has been seen counts by its last 200 calls, until it has not been seen for a minute.

    Parameters
    ----------
    seconds : dict of int to float, optional
        Batch sizes and what they took, to begin with; replaced as soon as a size is measured.

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
        self._calls: dict[int, collections.deque[float]] = {}
        self._measured: dict[int, tuple[float, float]] = {}  # by size: when it ran last, and its quantile
        self._lock = threading.Lock()
        self._points = self._fitted()

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
        """Seconds that a batch of ``size`` takes; 0 as long as nothing is known."""
        sizes, times = self._points
        if not sizes:
            return 0.0
        index = bisect.bisect_left(sizes, size)
        if index == len(sizes):
            return times[-1] * size / sizes[-1]
        if sizes[index] == size or index == 0:
            return times[index]
        share = (size - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
        return times[index - 1] + share * (times[index] - times[index - 1])

    def update(self, size: int, seconds: float) -> None:
        """Count one call."""
        _check(size, seconds)
        now_s = time.monotonic()
        with self._lock:
            calls = self._calls.setdefault(size, collections.deque(maxlen=_WINDOW))
            calls.append(seconds)
            self._measured[size] = now_s, _quantile(calls)
            for other in [other for other, (last_s, _) in self._measured.items() if now_s - last_s > _FORGET_S]:
                self._drop(other)
            self._points = self._fitted()

    def forget(self, size: int) -> None:
        """Count the calls of a size no more."""
        with self._lock:
            self._drop(size)
            self._points = self._fitted()

    def _drop(self, size: int) -> None:
        self._calls.pop(size, None)
        self._measured.pop(size, None)

    def _fitted(self) -> tuple[list[int], list[float]]:
        known = self._seeds | {size: quantile_s for size, (_, quantile_s) in self._measured.items()}
        sizes = sorted(known)
        return sizes, list(itertools.accumulate((known[size] for size in sizes), max))


def _quantile(calls: collections.deque[float]) -> float:
    ordered = sorted(calls)
    return ordered[math.ceil(_QUANTILE * len(ordered)) - 1]


def _check(size: int, seconds: float) -> None:
    if not isinstance(size, int) or size < 1 or not seconds > 0:
        raise InputError(f"a batch of {size!r} in {seconds!r} s; expected a positive size and time")
