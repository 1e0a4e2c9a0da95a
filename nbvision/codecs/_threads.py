"""The host threads of every decode of the process."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from nbvision.runtime.device import available_cores

__all__ = ["Turns", "ahead", "in_background", "map_all", "run_all"]

T = TypeVar("T")
R = TypeVar("R")

_HANDOVER_S = 0.01  # should the next one be held up

AHEAD = 2  # batches that are decoded while one is used: with one, threads idle while its last image is decoded


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_cores(), thread_name_prefix="nbvision-decode")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool without its threads


@contextlib.contextmanager
def in_background(function: Callable[[T], None], items: Sequence[T], helpers: int) -> Iterator[None]:
    """Call ``function`` on every item in up to ``helpers`` threads, while the body of the ``with`` does something else.

    The caller's thread joins in after the body, so the work ends even if the pool is busy.
    """
    # The GIL makes an iterator's steps atomic, so threads can share it. At its end it lets go of the list: the pool may
    # keep work() a moment longer, but not the function and the memory behind it.
    queue = iter([(function, item) for item in items])

    def work() -> None:
        for call, item in queue:
            call(item)

    futures = [_pool().submit(work) for _ in range(min(helpers, len(items)))]
    try:
        yield
        work()
    finally:
        for future in futures:
            if not future.cancel():
                future.result()


def run_all(function: Callable[[T], None], items: Sequence[T], threads: int) -> None:
    """Call ``function`` on every item, in up to ``threads`` threads, of which the caller's is one."""
    if not items:
        return
    with in_background(function, items, min(threads, len(items)) - 1):
        pass


def map_all(function: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """The results of :func:`run_all`, in the order of the items."""
    results: list[Any] = [None] * len(items)

    def keep(index: int) -> None:
        results[index] = function(items[index])

    run_all(keep, range(len(items)), threads)
    return results


def ahead(submit: Callable[[T], Future[R]], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Each item and its future's result, in order; the next two are under way while the caller uses one.

    What a future raises is raised at its item.
    """
    source = iter(items)
    under_way: collections.deque[tuple[T, Future[R]]] = collections.deque()
    try:
        while True:
            for item in itertools.islice(source, AHEAD + 1 - len(under_way)):
                under_way.append((item, submit(item)))
            if not under_way:
                return
            item, future = under_way.popleft()
            yield item, future.result()
    finally:
        for _, future in under_way:
            future.cancel()


class Turns:
    """A lock for calls that let go of the GIL: who leaves it waits until the next one is in.

    With a plain lock the next one would be told, but not get the GIL while the last one has Python to run, which may
    keep it for 5 ms at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._entered = threading.Event()

    @property
    def load(self) -> int:
        """How many threads are in, or wait."""
        return self._waiting + self._lock.locked()

    def __enter__(self) -> None:
        with self._counting:
            self._waiting += 1
        try:
            self._lock.acquire()
        finally:
            with self._counting:
                self._waiting -= 1
        self._entered.set()

    def __exit__(self, *exception: object) -> None:
        self._entered.clear()
        others = self._waiting > 0
        self._lock.release()
        if others:
            self._entered.wait(_HANDOVER_S)
