"""Mixed abuse of a service for a long time, among which well-behaved clients ask and count.

    python tests/soak_serve.py [--minutes 30] [--out soak.json]

Poison, broken pictures, malformed bodies, clients that go away, uploads that break off, bursts beyond the queue, an
engine that fails now and then, a pipeline whose process dies, and loads anew, some of which are broken. Exits with 1 if
a well-behaved client lost an answer or got another's, if what the service counted is not what clients saw, or if its
memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import hashlib
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from serving import Server
from test_serve_faults import resident_bytes

from nbvision.demo.catalogue import make_catalogue
from nbvision.indexing import image_files

GROWTH_BYTES = 64 << 20
WARM_UP = 0.2  # of the time, in which everything has happened that is kept


class Abuse:
    """What is done to the service, each by a thread of its own, and what came of it."""

    def __init__(self, server: Server, directory: Path) -> None:
        self._server, self._switch = server, directory / "on"
        self._host, port = server.url.removeprefix("http://").split(":")
        self._port = int(port)
        make_catalogue(directory, products=2, photographs=2, queries=2, seed=11)
        self._pictures = [path.read_bytes() for path in image_files(directory / "queries")]
        self._client = httpx.Client(base_url=server.url, timeout=60)
        self._expected = [len(self._ask("garments", data).json()["objects"]) for data in self._pictures]
        self.ended = threading.Event()
        self.seen: collections.Counter[str] = collections.Counter()
        self.asked: collections.Counter[int] = collections.Counter()  # of `slow`, by status

    def _ask(self, model: str, content: bytes, **options: Any) -> httpx.Response:
        return self._client.post(f"/v1/{model}", content=content, **options)

    def good(self) -> None:
        """A well-behaved client: what it asks is answered, rightly."""
        data = os.urandom(random.randint(1, 5000))
        answer = self._ask("poisonable", data)
        right = answer.status_code == 200 and answer.json()["sha256"] == hashlib.sha256(data).hexdigest()
        self.seen["right" if right else f"wrong: {answer.status_code}"] += 1

    def pictures(self) -> None:
        """The same with pictures, each another file, so that none comes from the cache."""
        which = random.randrange(len(self._pictures))
        answer = self._ask("garments", self._pictures[which] + os.urandom(8))
        right = answer.status_code == 200 and len(answer.json()["objects"]) == self._expected[which]
        self.seen["right" if right else f"wrong: {answer.status_code}"] += 1

    def poison(self) -> None:
        assert self._ask("poisonable", b"POISON").status_code == 500
        self.seen["poison"] += 1

    def broken(self) -> None:
        data = random.choice(self._pictures)
        assert self._ask("garments", data[: random.randrange(len(data) // 2)]).status_code == 422
        self._client.post("/v2/models/echo/infer", content=os.urandom(300))
        self._client.post("/v1/echo", content=b"[" * 9999, headers={"Content-Type": "application/json"})
        self.seen["broken"] += 1

    def dropped(self) -> None:
        with socket.create_connection((self._host, self._port)) as connection:
            connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n" + bytes(5000))
        self.seen["dropped"] += 1

    def impatient(self) -> None:
        try:
            self._ask("sleeping", b"200 " + os.urandom(8), timeout=0.05)
        except httpx.TimeoutException:
            self.seen["gone away"] += 1

    def burst(self) -> None:
        async def ask_all() -> list[int]:
            async with httpx.AsyncClient(base_url=self._server.url, timeout=60) as client:
                asked = [client.post("/v1/slow", content=os.urandom(8)) for _ in range(40)]
                return [answer.status_code for answer in await asyncio.gather(*asked)]

        self.asked.update(asyncio.run(ask_all()))
        self.seen["bursts"] += 1

    def failing(self) -> None:
        self._switch.touch()
        self._ask("breaking", b"x")
        time.sleep(0.5)
        self._switch.unlink(missing_ok=True)
        self._server.until(lambda: self._server.status("/v2/models/breaking/ready") == 200, seconds=30)
        self.seen["engine failures"] += 1

    def deaths(self) -> None:
        answer = self._ask("dying", b"DIE")
        assert answer.status_code == 500, answer.text
        while (answer := self._ask("dying", b"x" + os.urandom(8))).status_code != 200:  # else the cache would answer
            assert answer.status_code == 503, answer.text
            time.sleep(0.1)
        self.seen["deaths of a pipeline's process"] += 1

    def loads(self) -> None:
        for name, status in (("echo", 200), ("garments", 200), ("poisonable", 200), ("nobody", 404)):
            assert self._client.post(f"/v2/repository/models/{name}/load").status_code == status
        self.seen["loads"] += 1

    def run(self, what: Callable[[], None], pause_s: float) -> threading.Thread:
        def again_and_again() -> None:
            while not self.ended.wait(random.uniform(0.5, 1.5) * pause_s):
                try:
                    what()
                except Exception as error:
                    self.seen[f"wrong: {what.__name__}: {type(error).__name__}: {error}"] += 1

        thread = threading.Thread(target=again_and_again, name=what.__name__)
        thread.start()
        return thread


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp())
    functions = ("echo", "poisonable", "slow", "sleeping", "breaking", "dying")
    top = "cache_bytes: 4000000\nupload_s: 2\npipelines:\n  garments: {kind: recognizer, device: cpu}\n"
    limits = "max_batch: 4, max_queue_items: 16"
    config = top + "\n".join(
        f"  {name}: {{kind: python, device: cpu, function: 'serve_functions:{name}', {limits}}}" for name in functions
    )
    seconds = options.minutes * 60
    with Server(config, directory, SERVE_TEST_SWITCH=str(directory / "on")) as server:
        abuse = Abuse(server, directory)
        schedule = {
            abuse.good: 0.02,
            abuse.pictures: 0.3,
            abuse.poison: 0.1,
            abuse.broken: 0.2,
            abuse.dropped: 0.2,
            abuse.impatient: 0.3,
            abuse.burst: 3.0,
            abuse.failing: 7.0,
            abuse.deaths: 9.0,
            abuse.loads: 13.0,
        }
        start_s = time.monotonic()
        threads = [abuse.run(what, pause_s) for what, pause_s in schedule.items()]
        held: list[tuple[float, int]] = []
        while (now_s := time.monotonic() - start_s) < seconds:
            held.append((round(now_s, 1), resident_bytes(server.process.pid)))
            time.sleep(min(5.0, seconds / 50))
            print(f"\r{now_s / 60:5.1f} min  {held[-1][1] / 1e6:6.0f} MB  {dict(abuse.seen)}", end="", file=sys.stderr)
        abuse.ended.set()
        for thread in threads:
            thread.join()
        print(file=sys.stderr)
        slow = server.stats("slow")
        counted = slow["success"] == abuse.asked[200] and slow["rejected"] == abuse.asked[503]
        status = server.stop()
    later = [size for now_s, size in held if now_s > WARM_UP * seconds]
    half = len(later) // 2
    growth_bytes = max(later[half:]) - max(later[:half])
    wrong = {name: count for name, count in abuse.seen.items() if name.startswith("wrong")}
    figures = {
        "minutes": options.minutes,
        "seen": dict(abuse.seen),
        "bursts by status": {str(status): count for status, count in abuse.asked.items()},
        "counts add up": counted,
        "growth_bytes": growth_bytes,
        "held_bytes": held[:: max(1, len(held) // 60)],
        "exit status": status,
    }
    print(json.dumps({**figures, "held_bytes": f"{len(held)} readings"}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1))
    return int(bool(wrong) or not counted or growth_bytes > GROWTH_BYTES or status != 0)


if __name__ == "__main__":
    sys.exit(main())
