"""What the processes of :mod:`nbvision.codecs._processes` do."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from typing import Any

from nbvision.codecs import png
from nbvision.codecs._processes import (
    DONE,
    DONE_AT,
    FAILED,
    HAS_LEFT,
    IS_WANTED,
    JOB,
    REFUSED,
    RUNNING,
    STATE,
    TICKET,
    WORKER,
    Shared,
    post,
)
from nbvision.codecs.open import CompressedImage, decode_on_host, read_image
from nbvision.errors import DecodeError


def main(*inherited: str) -> None:
    """Decode until nobody can hand in more."""
    memory, size_bytes, jobs, ready, done = map(int, inherited)
    shared = Shared(memory, size_bytes)
    png.warm_up("rgb")
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        os.write(ready, b"1")
    os.close(ready)
    while len(job := os.read(jobs, JOB.size)) == JOB.size:
        place, ticket = JOB.unpack(job)
        if shared.number(place, TICKET) == ticket:
            work(shared, place)
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # nobody waits for it
                os.write(done, DONE_AT.pack(place))


def work(shared: Shared, place: int) -> None:
    """Do what one block says, and say in it what came of it."""
    shared.say(place, WORKER, os.getpid())
    shared.say(place, STATE, RUNNING)
    state = FAILED
    if shared.number(place, IS_WANTED):
        try:
            how = pickle.loads(shared.how(place))
            image = read_image(shared.file(place), sys.maxsize, how.recover)
            if isinstance(image, CompressedImage):
                decode_on_host(image, shared.pixels(place), how)
                said = {"error": image.error, "damage": image.damage}
                shared.write_text(place, json.dumps({name: _said(error) for name, error in said.items() if error}))
                state = DONE if image.error is None else REFUSED
        except Exception as error:  # which is told where it happens again, in who asked
            print(f"nbvision: a decoding process failed: {type(error).__name__}: {error}", file=sys.stderr)
    shared.say(place, STATE, state)
    post(shared.address + place)
    shared.say(place, HAS_LEFT, 1)


def _said(error: DecodeError) -> dict[str, Any]:
    return {"message": str(error)[:300], "kind": error.kind, "valid_rows": error.valid_rows}
