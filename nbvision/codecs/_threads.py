"""One pool of host threads for every decode of the process."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["available_cores", "in_background", "map_all", "run_all"]

T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_cores(), thread_name_prefix="nbvision-decode")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool object without its threads


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
    with in_background(function, items, min(threads, len(items)) - 1):
        pass


def map_all(function: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """The results of :func:`run_all`, in the order of the items."""
    results: list[Any] = [None] * len(items)

    def keep(index: int) -> None:
        results[index] = function(items[index])

    run_all(keep, range(len(items)), threads)
    return results
