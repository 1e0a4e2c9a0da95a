"""The heap of a process that lives long.

glibc's: each version of a model has threads of its own, and each thread's memory comes from an arena that keeps what
was freed in it. A service whose models are loaded anew would seem to grow.

Python's: its collector goes through all objects now and then, of which CuPy, Numba and the engines have 180,000, and
that stops every thread for longer than a request may take: 65 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading

__all__ = ["give_back", "settle", "share_arenas"]

_settling = threading.Lock()
_ARENAS = 2
_M_ARENA_MAX = -8  # of malloc.h


def share_arenas() -> None:
    """All threads to come share two arenas, instead of eight for each core."""
    with contextlib.suppress(OSError, AttributeError):  # another system
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """What is free goes back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def settle() -> None:
    """What lives now is not gone through any more, until this is called again."""
    with _settling:  # a collection during another one returns at once, and rubbish would be frozen
        gc.unfreeze()
        gc.collect()
        gc.freeze()
