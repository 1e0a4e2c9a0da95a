"""What a service takes of a request: a round trip to a pipeline without work, and the protocol's bytes to arrays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .common import ROOT, need, wall_us

SERVICES = ["nbvision serve", "FastAPI by itself"]
PICTURE_BYTES = 60_000
CONNECTIONS = 400

CONFIG = """
cache_bytes: 0
pipelines:
  nothing: {kind: python, device: cpu, function: 'benchmarks.serve:nothing'}
"""


def nothing(items: list[bytes]) -> list[dict[str, int]]:
    """A pipeline without work of its own."""
    return [{"bytes": len(item)} for item in items]


def fastapi_by_itself() -> Any:
    """An application that gives the same answers."""
    from fastapi import FastAPI, Request

    app = FastAPI()

    async def answer(request: Request) -> Any:
        return nothing([await request.body()])[0]

    answer.__annotations__["request"] = Request  # which is known here alone
    app.post("/v1/nothing")(answer)
    app.get("/v2/health/ready")(lambda: True)
    return app


# --- services and their client ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*command: str) -> Iterator[int]:
    """A service in a process of its own, which is told its ``--port``; gives the port, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = [str(ROOT / folder) for folder in (".", "kernels", "asv_bench", "examples")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *command, "--port", str(port)], stderr=log, env=environment)
        try:
            while not asyncio.run(is_ready(port)):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{command} ended with {process.returncode}: {log.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextlib.contextmanager
def nbvision_service(config: str, *, workers: int = 1) -> Iterator[tuple[int, Path]]:
    """``nbvision serve``: its port, and the file of the configuration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "serve.yaml")
        path.write_text(config)
        with running("-m", "nbvision", "serve", str(path), "--workers", str(workers)) as port:
            seen: set[int] = set()
            while len(seen) < workers:  # each connection is taken by one of those that are ready
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/stats", timeout=60) as answer:
                    seen.add(json.loads(answer.read())["worker"])
                time.sleep(0.05)
            yield port, path


async def is_ready(port: int) -> bool:
    client = Client(port)
    try:
        return await client.ask("GET", "/v2/health/ready") == 200
    except OSError:
        return False
    finally:
        client.close()


class Client:
    """HTTP over connections that stay open; little of it, so that it takes little of the machine from the service."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, method: str, target: str, body: bytes = b"") -> int:
        """The status of an answer, which is read to its end."""
        head = f"{method} {target} HTTP/1.1\r\nHost: here\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}"
        while True:
            is_used = bool(self._free)
            connection = self._free.pop() if is_used else await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = connection
            writer.write(head.encode() + b"\r\n\r\n" + body)
            try:
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                break
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                if not is_used:  # else it was idle for so long that the service had closed it
                    raise
        await reader.readexactly(int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        if len(self._free) < CONNECTIONS:
            self._free.append(connection)
        else:
            writer.close()
        return int(answer.split(None, 2)[1])

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


async def one_after_another(port: int, target: str, files: Sequence[bytes], count: int) -> list[float]:
    """Milliseconds of each answer."""
    client, times_ms = Client(port), []
    for number in range(count):
        started_s = time.perf_counter()
        status = await client.ask("POST", target, files[number % len(files)])
        times_ms.append((time.perf_counter() - started_s) * 1e3)
        if status != 200:
            raise RuntimeError(f"{target} answers {status}")
    client.close()
    return times_ms


# --- benchmarks -------------------------------------------------------------------------------------------------------


class RoundTrip:
    """A picture there and a small answer back, one after another over one connection."""

    params = (SERVICES,)
    param_names = ("service",)
    timeout = 300
    requests = 500

    def setup(self, service: str) -> None:
        need("fastapi")
        need("uvicorn")
        if service == SERVICES[0]:
            need("yaml")

    def track_time(self, service: str) -> float:
        """Median microseconds, the client's own among them."""
        with contextlib.ExitStack() as stack:
            if service == SERVICES[0]:
                port, _ = stack.enter_context(nbvision_service(CONFIG))
            else:
                factory = ("-m", "uvicorn", "--factory", "benchmarks.serve:fastapi_by_itself", "--log-level", "warning")
                port = stack.enter_context(running(*factory))
            picture = [os.urandom(PICTURE_BYTES)]
            asyncio.run(one_after_another(port, "/v1/nothing", picture, self.requests // 5))
            return statistics.median(asyncio.run(one_after_another(port, "/v1/nothing", picture, self.requests))) * 1e3

    track_time.unit = "us"


class Protocol:
    """A request's bytes to arrays, and arrays to an answer's bytes: 3 x 640 x 640 floats, or 16 pictures."""

    params = (["640 x 640 floats", "16 pictures"], ["read", "write"], ["binary", "JSON"])
    param_names = ("tensor", "what", "how")
    floats = 3 * 640 * 640

    def setup(self, tensor: str, what: str, how: str) -> None:
        from nbvision.serve.protocol import tensor_to_bytes

        if tensor == "16 pictures":
            array = np.empty(16, object)
            letters = np.random.default_rng(0).integers(32, 127, PICTURE_BYTES, np.uint8).tobytes()
            array[:] = [letters] * 16
        else:
            array = np.random.default_rng(0).random((1, self.floats), np.float32)
        described: dict[str, Any] = {"name": "X", "shape": list(array.shape), "datatype": "FP32"}
        if array.dtype == object:
            described["datatype"] = "BYTES"
        data = tensor_to_bytes(array) if how == "binary" else b""
        if how == "binary":
            described["parameters"] = {"binary_data_size": len(data)}
        else:
            described["data"] = [item.decode() for item in array] if array.dtype == object else array[0].tolist()
        header = json.dumps({"inputs": [described], "parameters": {"binary_data_output": how == "binary"}}).encode()
        self.call = self._made(what, array, header + data, len(header) if how == "binary" else None)

    def _made(self, what: str, array: np.ndarray, body: bytes, length: int | None) -> Callable[[], Any]:
        from nbvision.serve.protocol import read_request, write_response

        if what == "read":
            return lambda: read_request(body, length)
        request = read_request(body, length)
        return lambda: write_response({"X": array}, model="m", version="1", request=request)

    def track_time(self, *_: str) -> float:
        """Median microseconds."""
        return wall_us(self.call)

    track_time.unit = "us"
