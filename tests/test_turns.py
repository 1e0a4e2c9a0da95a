"""The lock before the JPEG engine: one at a time, and the next one is in before the last one goes on."""

from __future__ import annotations

import threading
import time

import pytest

from nbvision.codecs._threads import Turns


def test_one_at_a_time() -> None:
    turns, inside, most = Turns(), [0], [0]

    def work() -> None:
        for _ in range(60):
            with turns:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1]


def test_the_next_one_is_in_before_the_last_one_goes_on() -> None:
    turns, entered, in_time = Turns(), threading.Event(), 0

    def next_one() -> None:
        with turns:
            entered.set()
            time.sleep(0.001)  # as the engine would, without the GIL

    for _ in range(50):
        entered.clear()
        with turns:
            thread = threading.Thread(target=next_one)
            thread.start()
            while not turns._waiting:
                time.sleep(0.0001)
        # Not a line of Python between: a thread that kept the GIL here would keep the engine idle.
        in_time += entered.is_set()
        thread.join()
    assert in_time >= 45  # with a plain lock: 0


def test_an_error_inside_is_nobody_elses() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        pass


def test_nobody_waits_for_nobody() -> None:
    turns = Turns()
    started = time.perf_counter()
    for _ in range(100):
        with turns:
            pass
    assert time.perf_counter() - started < 0.5
