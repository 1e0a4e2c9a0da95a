"""What each request goes through by itself before it may join a batch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor

from nbvision.batching.policy import Request, RequestLine
from nbvision.errors import DeadlineError

__all__ = ["GIVEN_UP", "PROBE_S", "Preparation"]

GIVEN_UP = "the request was given up: it could not be answered before its deadline"
PROBE_S = 1.0  # without any that was run, though requests come: then one is run whatever its time is said to be
_SMOOTHING = 16  # items over which the time to prepare one is averaged


class Preparation:
    """Threads that prepare requests one by one, and the requests that wait for them.

    Who has too little time left, by how long it took lately, is given up unprepared. But if no other waits, only who
    has less than hardly anyone needs.

    Parameters
    ----------
    function : callable
        Takes a request and prepares its item.
    threads : int
    aging_s : float
    lock : Condition
        Of whom these requests are. It is held for every call of a method and of what follows here.
    has_room : callable
        Whether one more request may be prepared, beside as many as it is told are being prepared.
    time_after_s : callable
        What a request needs at least once it is prepared.
    settle : callable
        Is given each request, and what ended it: None, for one that is prepared; DeadlineError, for one that was given
        up; CancelledError; or what the function raised.
    """

    def __init__(
        self,
        function: Callable[[Request], None],
        *,
        threads: int,
        aging_s: float,
        lock: threading.Condition,
        has_room: Callable[[int], bool],
        time_after_s: Callable[[], float],
        settle: Callable[[Request, BaseException | None], None],
    ) -> None:
        self._function, self._threads = function, threads
        self._lock, self._has_room, self._time_after_s, self._settle = lock, has_room, time_after_s, settle
        self._line = RequestLine(aging_s=aging_s)
        self._pool = ThreadPoolExecutor(threads, "nbvision-prepare")
        self._working = 0  # threads
        self._mean_s = self._deviation_s = 0.0  # of the last items' times
        self._ended_s = -math.inf  # when one was prepared last

    def __len__(self) -> int:
        return len(self._line)

    @property
    def is_idle(self) -> bool:
        return not self._line and not self._working

    def add(self, request: Request) -> None:
        self._line.add(request)
        self.go_on(1)

    def go_on(self, threads: int | None = None) -> None:
        """Put so many more threads to work, or as many as there is work for, where there is room."""
        for _ in range(len(self._line) if threads is None else threads):
            if self._working == self._threads or not self._has_room(self._working):
                return
            self._working += 1
            self._pool.submit(self._work)

    def take_all(self) -> list[Request]:
        """Take out those that wait."""
        return self._line.take_all()

    def close(self) -> None:
        """Wait for the threads, without the lock."""
        self._pool.shutdown()

    def _work(self) -> None:
        """A thread's: one request after another, until none waits or there is no room."""
        while True:
            ended: list[tuple[Request, BaseException]] = []
            with self._lock:
                request = self._next(ended)
                if request is None:
                    self._working -= 1
                    if self.is_idle:
                        self._lock.notify_all()  # who closes waits for that
            _raise(ended)
            if request is None:
                return
            failure: BaseException | None = None
            started_s = time.monotonic()
            try:
                self._function(request)
            except BaseException as error:  # whatever it is, somebody waits for it
                failure = error
            with self._lock:
                self._count(time.monotonic() - started_s)
                self._settle(request, failure)
            if failure is not None:
                _raise([(request, failure)])
            del request, failure  # not to be kept while this thread waits

    def _next(self, ended: list[tuple[Request, BaseException]]) -> Request | None:
        """The next request that has time enough; those before it that have not, or were cancelled, have ended."""
        now_s = time.monotonic()
        while self._line and self._has_room(self._working - 1):
            request = self._line.take(now_s)
            needed_s = self._expected_s(at_least=not self._line) + self._time_after_s()
            error: BaseException
            if request.future.cancelled():
                error = CancelledError()
            elif request.deadline_s < now_s + needed_s and now_s - self._ended_s < PROBE_S:
                error = DeadlineError(GIVEN_UP)
            else:
                return request
            self._settle(request, error)
            ended.append((request, error))
        return None

    def _count(self, seconds: float) -> None:
        self._mean_s = self._mean_s or seconds
        self._deviation_s += (abs(seconds - self._mean_s) - self._deviation_s) / _SMOOTHING
        self._mean_s += (seconds - self._mean_s) / _SMOOTHING
        self._ended_s = time.monotonic()

    def _expected_s(self, *, at_least: bool) -> float:
        """What most items need; or at least: what hardly any does without."""
        return max(self._mean_s + (-2 if at_least else 1) * self._deviation_s, 0.0)


def _raise(ended: list[tuple[Request, BaseException]]) -> None:
    """Tell those who wait, without the lock."""
    for request, error in ended:
        if request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)
