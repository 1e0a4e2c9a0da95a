"""How late HTTP is: what comes in while everybody is busy waits where no batcher sees it, in the system's buffers."""

from __future__ import annotations

import asyncio
import collections
import time

__all__ = ["Lateness"]

# In turns of the event loop: what a request has waited for before it is read, and what its answer will.
_BEFORE, _AFTER = 1.25, 2.5
_TURNS = 3  # that are remembered
_UNLIKE = 1.5  # times the one in the middle is as long as the longest may count
_PAUSE_S = 0.02  # in which nothing comes, and they are forgotten


class Lateness:
    """Measures how long whatever is ready waits for its turn of the event loop.

    Beyond what one process can read, each turn finds more to do than the one before, and soon every answer is late,
    though as many come as ever. So a deadline counts from when all of its request has come, and ends where its answer
    has to begin its way out; and who has too little left is turned away before anything else is done for him.

    One long turn says nothing of the next: it may have read a burst, or one large body. So the longest of the last
    three counts as no more than a half longer than the one in the middle.
    """

    def __init__(self) -> None:
        self._turns_s: collections.deque[float] = collections.deque(maxlen=_TURNS)
        self._ended_s = 0.0  # the last of them
        self._is_asked = False

    def measure(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ask how long the loop's next turn takes: from what it does first to what the one after it does first."""
        if self._is_asked:
            return
        if self._turns_s and time.perf_counter() - self._ended_s > _PAUSE_S + 3 * max(self._turns_s):
            self._turns_s.clear()
        self._is_asked = True
        loop.call_soon(self._begin, loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon(self._end, time.perf_counter())

    def _end(self, began_s: float) -> None:
        self._ended_s = time.perf_counter()
        self._turns_s.append(self._ended_s - began_s)
        self._is_asked = False

    @property
    def turn_s(self) -> float:
        """How long a turn takes; 0 as long as two were not measured in a row."""
        if len(self._turns_s) < 2:
            return 0.0
        *_, middle_s, longest_s = sorted([0.0, *self._turns_s][-_TURNS:])
        return min(longest_s, _UNLIKE * middle_s)

    def of_ms(self, read_s: float) -> float:
        """What HTTP takes of the time of a request that was read then, by :func:`time.perf_counter`, in all."""
        return (time.perf_counter() - read_s + (_BEFORE + _AFTER) * self.turn_s) * 1e3
