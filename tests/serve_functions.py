"""Pipelines for the tests of the service: what they answer is known, and they fail when they are told to."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from nbvision.errors import DecodeError, EngineError

# While this file is there, the engine fails; what it holds, if anything, is the version that is answered with.
SWITCH = Path(os.environ.get("SERVE_TEST_SWITCH", "/nonexistent"))


def _answer(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def echo(images: list[bytes]) -> list[Any]:
    """What an item is; an empty one is an error of its own."""
    return [_answer(data) if data else DecodeError("the file is empty", kind="empty") for data in images]


def poisonable(images: list[bytes]) -> list[Any]:
    """One item takes the whole batch with it."""
    if any(data.startswith(b"POISON") for data in images):
        raise ValueError("a secret of the pipeline")
    time.sleep(0.002)
    return echo(images)


def turns(images: list[bytes]) -> list[Any]:
    """How long a thread of this process waits for Python's lock before it asks for it."""
    return [{"turn_s": sys.getswitchinterval()} for _ in images]


def slow(images: list[bytes]) -> list[Any]:
    """A batch takes 50 ms, of whatever size."""
    time.sleep(0.05)
    return echo(images)


def sleeping(images: list[bytes]) -> list[Any]:
    """As long as an item says, in ms."""
    time.sleep(max(float(data.split(b" ")[0]) if data[:1].isdigit() else 0.0 for data in images) / 1e3)
    return echo(images)


def breaking(images: list[bytes]) -> list[Any]:
    """An engine that fails while a file is there."""
    if SWITCH.exists():
        raise EngineError("the engine failed")
    return echo(images)


class SlowAtFirst:
    """Whose first call in each thread takes one and a half seconds, as one that compiles does."""

    def __init__(self) -> None:
        self._warm = threading.local()

    def __call__(self, images: list[bytes]) -> list[Any]:
        if not hasattr(self._warm, "done"):
            time.sleep(1.5)
            self._warm.done = True
        return echo(images)


def unsendable(images: list[bytes]) -> list[Any]:
    """Results that are no JSON where an item says so, and one that not every writer of JSON can write."""
    results = {b"nan": math.nan, b"float32": np.float32(1), b"object": object(), b"large": 1 << 70}
    return [{"value": results.get(data, 1)} for data in images]


def a_dict(images: list[bytes]) -> Any:
    """One answer, not a list of them."""
    return {"images": len(images)}


def raising(images: list[bytes]) -> list[Any]:
    """Never works."""
    raise KeyError("weights")


def exiting(images: list[bytes]) -> list[Any]:
    """Never works, and wants to take the process with it."""
    raise SystemExit(5)


class Versioned:
    """Answers with what a file held when it was loaded; does not load without it."""

    def __init__(self) -> None:
        self.version = SWITCH.read_text()

    def __call__(self, images: list[bytes]) -> list[Any]:
        time.sleep(0.005)
        if self.version == "broken":
            raise ValueError("this version cannot answer")
        return [_answer(data) | {"version": self.version} for data in images]


def dying(images: list[bytes]) -> list[Any]:
    """One item takes the whole process with it."""
    if b"DIE" in images:
        os.kill(os.getpid(), signal.SIGKILL)
    return echo(images)


class StrangeError(Exception):
    def __init__(self, one: int, *, two: int) -> None:
        super().__init__(f"a secret: {one + two}")


class DumbError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class TornError(DecodeError):
    pass


class Number(int):
    pass


def strange(images: list[bytes]) -> list[Any]:
    """Exceptions and results of types that no other process knows."""
    if b"raise" in images:
        raise StrangeError(1, two=2)
    if b"dumb" in images:
        raise DumbError
    if b"pickles not" in images:
        raise EngineError(lambda: 1)
    results = {b"give": StrangeError(3, two=4), b"torn": TornError("torn", kind="corrupt", valid_rows=7)}
    return [results.get(data, {"five": Number(5)}) for data in images]


def forking(images: list[bytes]) -> list[Any]:
    """Which process it has forked; the function's own ends if an item says so."""
    forked = os.fork()
    if not forked:
        time.sleep(60)
        os._exit(0)
    if b"DIE" in images:
        os.kill(os.getpid(), signal.SIGKILL)
    return [forked]
