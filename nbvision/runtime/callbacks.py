"""Telling those who wait, from a thread that others depend on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable

__all__ = ["call_all"]


def call_all(callbacks: Iterable[Callable[[], object]]) -> None:
    """Call each. What one raises is printed: the others are called, and the thread goes on, all the same."""
    for callback in callbacks:
        try:
            callback()
        except BaseException:
            traceback.print_exc()
