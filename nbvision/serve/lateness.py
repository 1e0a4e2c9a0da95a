"""How late HTTP is: what comes in while everybody is busy waits where no batcher sees it, in the system's buffers."""

from __future__ import annotations

import asyncio
import time

__all__ = ["Lateness"]

# In turns of the event loop: what a request has waited for on average before it is read, and what its answer will.
_BEFORE, _AFTER = 1.25, 2.5
_FADES = 0.7  # of a long turn is left in the next measurement; they are not all alike


class Lateness:
    """Measures how long whatever is ready waits for its turn of the event loop.

    Beyond what one process can read, each turn finds more to do than the one before, and soon every answer is late,
    though as many come as ever. So a deadline counts from when all of its request has come, and ends where its answer
    has to begin its way out; and who has too little left is turned away before anything else is done for him.
    """

    def __init__(self) -> None:
        self._turn_s = 0.0  # the last that was measured
        self._ended_s = 0.0  # when that was
        self._is_asked = False
        self._began_s: float | None = None  # the turn that is being measured

    def measure(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ask how long the loop's next turn takes: from what it does first to what the one after it does first."""
        if self._is_asked:
            return
        if time.perf_counter() - self._ended_s > self._turn_s:  # nothing came for as long: the loop had time
            self._turn_s = 0.0
        self._is_asked = True
        loop.call_soon(self._begin, loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._began_s = time.perf_counter()
        loop.call_soon(self._end, self._began_s)

    def _end(self, began_s: float) -> None:
        self._ended_s = time.perf_counter()
        self._turn_s = max(self._ended_s - began_s, _FADES * self._turn_s)
        self._is_asked, self._began_s = False, None

    @property
    def turn_s(self) -> float:
        """How long a turn takes: the last one, or the present one if that has taken longer by now."""
        began_s = self._began_s
        return self._turn_s if began_s is None else max(self._turn_s, time.perf_counter() - began_s)

    def of_ms(self, read_s: float) -> float:
        """What HTTP takes of the time of a request that was read then, by :func:`time.perf_counter`, in all."""
        return (time.perf_counter() - read_s + (_BEFORE + _AFTER) * self.turn_s) * 1e3
