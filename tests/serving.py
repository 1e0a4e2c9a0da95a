"""Starts the real service for tests: ``nbvision serve`` in a process of its own, and what it writes to its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

START_S = 120.0
COMMAND = [sys.executable, "-m", "nbvision", "serve"]


def surroundings() -> dict[str, str]:
    """The environment of a service: it finds ``serve_functions`` here, and nbvision where this process found it."""
    here = str(Path(__file__).parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}


def is_running(process_id: int) -> bool:
    """Whether there is such a process, and it has not ended, whoever has still to hear of that."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Server:
    """A service that runs until :meth:`stop`; use it as a context manager.

    Attributes
    ----------
    url : str
    log : list of dict
        What it has logged so far.
    """

    def __init__(self, config: str, directory: Path, *options: str, wait: bool = True, **environment: str) -> None:
        self.path = directory / "serve.yaml"
        self.path.write_text(config)
        self.log: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*COMMAND, str(self.path), "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            env=surroundings() | {"PYTHONUNBUFFERED": "1"} | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url: str = self.wait_for("serving")["url"]
            if wait:
                self.until(lambda: self.status("/v2/health/ready") == 200)
        except BaseException:
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.log.append({"message": line.rstrip()})

    def wait_for(self, message: str, *, after: int = 0) -> dict[str, Any]:
        """The first line of the log that says so."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [line for line in self.log[after:] if line["message"] == message]
            return bool(found)

        self.until(look)
        return found[0]

    def until(self, condition: Any, *, seconds: float = START_S) -> None:
        """Wait for a condition; fails if it does not come, or the service ends."""
        end_s = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the service ended with {self.process.returncode}: {self.log[-5:]}"
            assert time.monotonic() < end_s, f"waited {seconds} s: {self.log[-5:]}"
            time.sleep(0.02)

    def status(self, path: str) -> int:
        try:
            return httpx.get(self.url + path, timeout=5, verify=False).status_code
        except httpx.TransportError:
            return 0

    def stats(self, model: str) -> dict[str, Any]:
        stats: dict[str, Any] = httpx.get(f"{self.url}/v1/stats", verify=False).json()["models"][model]
        return stats

    def ask(self, model: str, content: bytes, **options: Any) -> httpx.Response:
        """One image to ``POST /v1/{model}``, over a connection of its own; without certificates, which take 50 ms."""
        return httpx.post(f"{self.url}/v1/{model}", content=content, timeout=60, verify=False, **options)

    def rewrite(self, config: str) -> None:
        self.path.write_text(config)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and give its exit status."""
        self.process.send_signal(number)
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
        self._close()
        return status

    def _close(self) -> None:
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._close()
