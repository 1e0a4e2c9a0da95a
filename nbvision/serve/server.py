"""The processes of a service: one, or one for each of several workers behind the same port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

from nbvision.errors import InputError, MissingExtraError
from nbvision.serve.config import read_config
from nbvision.serve.process import share_arenas, take_short_turns

__all__ = ["serve"]

_RESTART_AFTER_S = 1.0  # so that a worker that cannot start is not started all the time

logger = logging.getLogger("nbvision.serve")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "color_message", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= {name: value for name, value in vars(record).items() if name not in self._KNOWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Whatever is logged from now on goes to stderr, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def serve(
    path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    workers: int = 1,
    gpus: Sequence[str] = (),
) -> int:
    """Serve until SIGTERM or SIGINT; what is under way then is answered.

    Parameters
    ----------
    path : path
        See :func:`nbvision.serve.config.read_config`. SIGHUP loads its pipelines anew.
    host : str
    port : int
        0 takes a free one; the log says which.
    grpc_port : int, optional
        For the same protocol over gRPC; the first worker's alone.
    workers : int
        Processes that share the port. One that dies is started again, and the others do not notice.
    gpus : sequence of str
        ``CUDA_VISIBLE_DEVICES`` of each worker, in turns.

    Returns
    -------
    int
        The exit status.

    Raises
    ------
    InputError
        For a file that is none, or a port that cannot be had.
    MissingExtraError
        Without the extra ``serve``.
    """
    read_config(path)
    if workers < 1:
        raise InputError(f"workers is {workers}; expected 1 or more")
    log_as_json()
    listening = _listen(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    if workers == 1:
        logger.info("serving", extra={"url": url, "pid": os.getpid()})
        return run_worker(path, listening, worker=0, grpc=None if grpc_port is None else (host, grpc_port))
    return _Supervisor(Path(path), listening, url, workers, list(gpus), host, grpc_port).run()


def _listen(host: str, port: int) -> socket.socket:
    # The protocol is named, because only then asyncio turns off Nagle's algorithm for the connections: without that an
    # answer waits for the client's delayed acknowledgement, 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except socket.gaierror as error:
        listening.close()
        raise InputError(f"host {host!r} is not found: {error}; expected an address of this machine") from None
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"{host}:{port} cannot be had: {error}; choose another port") from None
    listening.listen(1024)
    return listening


def run_worker(
    path: str | os.PathLike[str],
    listening: socket.socket,
    *,
    worker: int,
    grpc: tuple[str, int] | None = None,
    supervisor: socket.socket | None = None,
) -> int:
    """Answer what comes in on a socket that listens, until the process is told to end, or its supervisor has ended."""
    try:
        import uvicorn

        from nbvision.serve.connections import Connection
    except ImportError as error:
        raise MissingExtraError(str(error.name), extra="serve", needed_for="a service") from error
    from nbvision.serve.app import make_app
    from nbvision.serve.service import Service

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # while there is nothing yet to load anew
    share_arenas()
    take_short_turns()
    sys.path.insert(0, str(Path(path).resolve().parent))  # for functions of one's own
    service = Service(path, worker=worker)
    app = make_app(service)
    limits = {"header_s": service.config.header_s, "upload_s": service.config.upload_s}
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        http=type("_Connection", (Connection,), limits | {"lateness": service.lateness}),
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(service.config.drain_s),
        lifespan="on",
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        # The server takes these two itself while it runs, and raises them again when it has ended, for whom it runs in.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        loop = asyncio.get_running_loop()
        background: set[asyncio.Task[Any]] = set()

        def load(name: str | None = None) -> None:
            task = loop.create_task(service.load_all() if name is None else service.follow(name))
            background.add(task)
            task.add_done_callback(background.discard)

        loop.add_signal_handler(signal.SIGHUP, load)
        async with contextlib.AsyncExitStack() as stack:
            if grpc is not None:
                from nbvision.serve.grpc import serve_grpc

                await stack.enter_async_context(serve_grpc(service, *grpc))
            if supervisor is not None:
                stack.enter_context(_told_by(supervisor, service, load, server))
            await server.serve(sockets=[listening])

    asyncio.run(run())
    return 0 if server.started else 1


@contextlib.contextmanager
def _told_by(supervisor: socket.socket, service: Any, load: Any, server: Any) -> Iterator[None]:
    """Tell the supervisor of a start and of what was loaded, load what was elsewhere, and end when the supervisor has.

    Either side sends lines: ``loaded NAME``, and the worker ``started``.
    """
    loop = asyncio.get_running_loop()
    supervisor.setblocking(False)
    lines = b""

    def hear() -> None:
        nonlocal lines
        heard = supervisor.recv(4096)
        if not heard:
            loop.remove_reader(supervisor)
            server.should_exit = True
        *said, lines = (lines + heard).split(b"\n")
        for line in said:
            load(line.decode().removeprefix("loaded "))

    loop.add_reader(supervisor, hear)
    service.on_load = lambda name: supervisor.send(f"loaded {name}\n".encode())
    supervisor.send(b"started\n")
    try:
        yield
    finally:
        loop.remove_reader(supervisor)


class _Supervisor:
    """Starts the workers, starts those again that die, and passes on signals, and what a worker says it has loaded.

    A worker that ends before it has ever started would do so again: then all end.
    """

    def __init__(
        self,
        path: Path,
        listening: socket.socket,
        url: str,
        workers: int,
        gpus: list[str],
        host: str,
        grpc_port: int | None,
    ) -> None:
        self._path, self._listening, self._url = path, listening, url
        self._gpus, self._host, self._grpc_port = gpus, host, grpc_port
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started_s = [-math.inf] * workers
        self._started: set[int] = set()  # workers that did, at least once
        self._lines: dict[int, bytes] = {}  # of each worker, as far as it has come
        self._status = 0
        self._workers = selectors.DefaultSelector()  # their sockets, by number
        self._ending = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        logger.info("serving", extra={"url": self._url, "pid": os.getpid(), "workers": len(self._started_s)})
        while not self._ending:
            for worker, process in list(self._processes.items()):
                if process.poll() is not None:
                    logger.error("a worker died", extra={"worker": worker, "status": process.returncode})
                    del self._processes[worker]
                    if worker not in self._started:
                        self._status = 1
                        self._pass_on(signal.SIGTERM, None)
            for worker, started_s in enumerate(self._started_s):
                if (
                    not self._ending
                    and worker not in self._processes
                    and time.monotonic() - started_s > _RESTART_AFTER_S
                ):
                    self._start(worker)
            for key, _ in self._workers.select(timeout=0.1):
                self._hear(key)
        for process in self._processes.values():
            process.wait()
        return self._status

    def _start(self, worker: int) -> None:
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[worker % len(self._gpus)]
        ours, theirs = socket.socketpair()
        descriptors = [self._listening.fileno(), theirs.fileno()]
        command = [sys.executable, "-m", "nbvision.serve.worker", str(self._path), str(worker), *map(str, descriptors)]
        if worker == 0 and self._grpc_port is not None:
            command += [self._host, str(self._grpc_port)]
        self._started_s[worker] = time.monotonic()
        with theirs:
            self._processes[worker] = subprocess.Popen(command, env=environment, pass_fds=descriptors)
        self._workers.register(ours, selectors.EVENT_READ, worker)
        self._lines[worker] = b""

    def _hear(self, key: selectors.SelectorKey) -> None:
        """Note that a worker has started, and pass on to all others what it has loaded."""
        speaker = cast("socket.socket", key.fileobj)
        heard = speaker.recv(4096)
        if not heard:
            self._workers.unregister(speaker)
            speaker.close()
            return
        *said, self._lines[key.data] = (self._lines[key.data] + heard).split(b"\n")
        for line in said:
            if line == b"started":
                self._started.add(key.data)
                continue
            for other in self._workers.get_map().values():
                if other.fileobj is not speaker:
                    with contextlib.suppress(OSError):
                        cast("socket.socket", other.fileobj).sendall(line + b"\n")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._ending = self._ending or number != signal.SIGHUP
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
