"""A process that serves for long: its memory, Python's collector, and Python's lock.

glibc's heap: each version of a model has threads of its own, and each thread's memory comes from an arena that keeps
what was freed in it. A service whose models are loaded anew would seem to grow.

Python's heap: its collector goes through all objects now and then, of which CuPy, Numba and the engines have 180,000,
and that stops every thread for longer than a request may take: 65 ms.

Python's lock: a thread that wants it while another computes waits for 5 ms before it asks for it, an eighth of a
deadline of 40 ms, and a request passes through several threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading

__all__ = ["give_back", "settle", "share_arenas", "take_short_turns"]

_settling = threading.Lock()
_ARENAS = 2
_M_ARENA_MAX = -8  # of malloc.h
_TURN_S = 5e-4  # streams of decoding gain as much by 1 ms and by 0.2 ms, and less by 0.05


def share_arenas() -> None:
    """All threads to come share two arenas, instead of eight for each core."""
    with contextlib.suppress(OSError, AttributeError):  # another system
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, _ARENAS)


def take_short_turns() -> None:
    """A thread that computes in Python lets others have the lock after half a millisecond."""
    sys.setswitchinterval(_TURN_S)


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
