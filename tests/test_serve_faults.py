"""What goes wrong in services, one by one: nothing else is affected, no answer is lost or doubled, and it passes."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import COMMAND, Server, is_running, surroundings

from nbvision.errors import DecodeError, DecodeErrorKind, InputError
from nbvision.serve import service as service_module

FUNCTIONS = ("echo", "poisonable", "slow", "sleeping", "breaking", "turns")


def config(*functions: str, top: str = "cache_bytes: 0", **limits: float) -> str:
    options = "".join(f", {name}: {value}" for name, value in limits.items())
    lines = [
        f"  {name.lower()}: {{kind: python, device: cpu, function: 'serve_functions:{name}'{options}}}"
        for name in functions
    ]
    return "\n".join([top, "pipelines:", *lines])


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("switch") / "on"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, switch: Path) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("service")
    limits = {"max_batch": 4, "max_queue_items": 16, "in_flight": 1}
    with Server(config(*FUNCTIONS, **limits), directory, SERVE_TEST_SWITCH=str(switch)) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    """After each fault every counter adds up and nothing waits."""
    yield
    server.until(lambda: all(server.stats(name)["waiting"] == 0 for name in FUNCTIONS), seconds=10)
    server.until(lambda: server.status("/v2/health/ready") == 200, seconds=10)


def right(response: httpx.Response, data: bytes) -> bool:
    return response.status_code == 200 and response.json()["sha256"] == hashlib.sha256(data).hexdigest()


def at_once(
    server: Server, model: str, given: list[bytes], *, threads: int = 32, **options: Any
) -> list[httpx.Response]:
    with (
        httpx.Client(
            base_url=server.url, timeout=60, verify=False, limits=httpx.Limits(max_connections=threads)
        ) as client,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        return list(pool.map(lambda data: client.post(f"/v1/{model}", content=data, **options), given))


# --- faults of items --------------------------------------------------------------------------------------------------


def test_poison_in_every_batch_takes_nothing_from_the_others(server: Server) -> None:
    given = [b"POISON %d" % number if number % 4 == 0 else b"item %d" % number for number in range(100)]
    before = server.stats("poisonable")
    answers = at_once(server, "poisonable", given, threads=12)
    for data, answer in zip(given, answers, strict=True):
        if data.startswith(b"POISON"):
            assert answer.status_code == 500
            assert "ValueError" in answer.json()["error"]
            assert "secret" not in answer.text  # which is for the log
        else:
            assert right(answer, data)
    after = server.stats("poisonable")
    assert after["success"] - before["success"] == 75
    assert after["failure"] - before["failure"] == 25
    assert after["items"] - before["items"] == 100
    server.until(lambda: any("secret" in line.get("exception", "") for line in server.log), seconds=5)


def test_one_request_with_poison_among_its_images(server: Server) -> None:
    given = [b"a", b"POISON", b"c"]
    files = [("images", (str(index), data)) for index, data in enumerate(given)]
    results = httpx.post(f"{server.url}/v1/poisonable", files=files, timeout=30).json()["results"]
    assert ["error" in result for result in results] == [False, True, False]
    assert results[2]["sha256"] == hashlib.sha256(b"c").hexdigest()


# --- too much ---------------------------------------------------------------------------------------------------------


def test_no_thread_keeps_the_others_from_pythons_lock_for_long(server: Server) -> None:
    assert sys.getswitchinterval() > 1e-3 > server.ask("turns", b"whose").json()["turn_s"]


def test_overload_turns_away_at_the_door_and_passes(server: Server) -> None:
    """120 at the same time where 16 may wait: each gets its answer or is told to come again; nobody else is asked."""
    before = server.stats("slow")
    given = [b"item %d" % number for number in range(120)]
    answers = at_once(server, "slow", given, threads=60)
    kinds = collections.Counter(answer.status_code for answer in answers)
    assert set(kinds) == {200, 503}
    assert kinds[200] >= 20
    for data, answer in zip(given, answers, strict=True):
        if answer.status_code == 200:
            assert right(answer, data)
        else:
            assert int(answer.headers["Retry-After"]) >= 1
            assert "wait" in answer.json()["error"]
    after = server.stats("slow")
    assert after["rejected"] - before["rejected"] == kinds[503]
    assert after["items"] - before["items"] == kinds[200]
    assert right(server.ask("slow", b"afterwards"), b"afterwards")


def test_too_many_requests_under_way(tmp_path: Path) -> None:
    with Server(config("slow", top="cache_bytes: 0\nconcurrency: 3"), tmp_path) as server:
        answers = at_once(server, "slow", [b"item %d" % number for number in range(40)], threads=20)
        kinds = collections.Counter(answer.status_code for answer in answers)
        assert set(kinds) == {200, 503}
        assert all(answer.headers.get("Retry-After") for answer in answers if answer.status_code == 503)
        assert right(server.ask("slow", b"afterwards"), b"afterwards")


def header_of(answers: Any) -> list[bytes]:
    lines = []
    while (line := answers.readline()) not in (b"\r\n", b""):
        lines.append(line.lower())
    return lines


def test_the_body_of_who_is_turned_away_is_no_header(tmp_path: Path) -> None:
    """The answer comes before it is there, and the connection may be used again once it is."""
    with Server(config("echo", top="token: one"), tmp_path, wait=False) as server:
        server.until(lambda: server.status("/v2/health/ready") == 200)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            answers = connection.makefile("rb")
            for _ in range(3):
                connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 400000\r\n\r\n")
                assert b" 401 " in answers.readline()
                for _ in range(20):
                    connection.sendall(bytes(20_000))
                    time.sleep(0.002)
                lengths = [
                    int(line.split(b":")[1]) for line in header_of(answers) if line.startswith(b"content-length")
                ]
                answers.read(*lengths)
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b" 200 " in answers.readline()
                header_of(answers)
                assert answers.read(len(b'{"live":true}')) == b'{"live":true}'


def test_deadlines(server: Server) -> None:
    """What cannot be in time is turned away or given up before it costs anything; what can is answered."""
    at_once(server, "sleeping", [b"40 warm %d" % number for number in range(4)])  # it learns how long a batch takes
    before = server.stats("sleeping")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        busy = pool.submit(server.ask, "sleeping", b"500 busy")
        server.until(lambda: server.stats("sleeping")["running"] == 1, seconds=5)
        late = at_once(server, "sleeping", [b"0 late %d" % number for number in range(8)], params={"deadline_ms": 50})
        assert right(busy.result(), b"500 busy")
    statuses = [answer.status_code for answer in late]
    after = server.stats("sleeping")
    assert after["items"] - before["items"] == 1
    assert statuses.count(504) == after["given_up"] - before["given_up"]
    assert statuses.count(503) == after["rejected"] - before["rejected"] == 8 - statuses.count(504)
    assert right(server.ask("sleeping", b"0 now", params={"deadline_ms": 5000}), b"0 now")


def test_who_comes_behind_too_many_for_his_deadline(tmp_path: Path) -> None:
    with Server(config("sleeping", max_batch=4, in_flight=1), tmp_path) as server:
        at_once(server, "sleeping", [b"150 warm %d" % number for number in range(8)])  # all that it will know
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            busy = pool.submit(server.ask, "sleeping", b"700 busy")
            server.until(lambda: server.stats("sleeping")["running"] == 1, seconds=5)
            # Two batches of 4 that wait take 300 ms, and the next 150.
            late = at_once(
                server, "sleeping", [b"0 late %d" % number for number in range(16)], params={"deadline_ms": 400}
            )
            assert right(busy.result(), b"700 busy")
        kinds = collections.Counter(answer.status_code for answer in late)
        assert set(kinds) == {503, 504}
        assert all(answer.headers.get("Retry-After") for answer in late if answer.status_code == 503)
        stats = server.stats("sleeping")
        assert (stats["rejected"], stats["given_up"]) == (kinds[503], kinds[504])
        assert kinds[504] >= 4


def test_a_deadline_counts_from_when_all_of_a_request_is_there(tmp_path: Path) -> None:
    """Who is slow to send does not lose the time."""
    with Server(config("echo", top="cache_bytes: 0"), tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with (
            socket.create_connection((host, int(port)), timeout=20) as connection,
            connection.makefile("rb") as answers,
        ):
            connection.sendall(b"POST /v1/echo?deadline_ms=500 HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nthr")
            time.sleep(0.8)
            connection.sendall(b"ee")
            time.sleep(0.3)
            connection.sendall(b".")
            assert b" 200 " in answers.readline()


def test_who_comes_when_http_is_late_is_turned_away_before_anything_is_done(tmp_path: Path) -> None:
    """Of 600 at the same time, which take HTTP some hundred milliseconds, to a pipeline that has nothing to do."""
    with Server(config("echo", top="cache_bytes: 0"), tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        data = os.urandom(100_000)
        request = b"POST /v1/echo?deadline_ms=%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        with contextlib.ExitStack() as open_until_all_are_answered:
            connections = [
                open_until_all_are_answered.enter_context(socket.create_connection((host, int(port)), timeout=60))
                for _ in range(200)
            ]
            kinds: collections.Counter[int] = collections.Counter()
            said = []
            for _ in range(3):
                with concurrent.futures.ThreadPoolExecutor(40) as pool:
                    list(pool.map(lambda one: one.sendall(request % (30, len(data)) + data), connections))
                for connection in connections:
                    with connection.makefile("rb") as answers:
                        status = int(answers.readline().split()[1])
                        lengths = [int(line.split(b":")[1]) for line in header_of(answers) if b"content-len" in line]
                        body = json.loads(answers.read(*lengths))
                    kinds[status] += 1
                    if status == 503:
                        said.append(body["error"])
                    elif status == 200:
                        assert body["bytes"] == len(data)
        assert set(kinds) <= {200, 503, 504}
        assert any("to be read and written" in error for error in said)
        stats = server.stats("echo")
        assert stats["rejected"] == kinds[503]
        assert stats["items"] <= kinds[200] + kinds[504]
        assert stats["success"] == kinds[200]
        assert right(server.ask("echo", b"afterwards", params={"deadline_ms": 10_000}), b"afterwards")


# --- clients that go away ---------------------------------------------------------------------------------------------


def test_clients_that_go_away_are_not_worked_for(server: Server) -> None:
    before = server.stats("sleeping")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        busy = pool.submit(server.ask, "sleeping", b"600 busy")
        server.until(lambda: server.stats("sleeping")["running"] == 1, seconds=5)

        async def impatient() -> list[BaseException | httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=0.15) as client:
                asked = [client.post("/v1/sleeping", content=b"0 %d" % number) for number in range(10)]
                return await asyncio.gather(*asked, return_exceptions=True)

        assert all(isinstance(answer, httpx.TimeoutException) for answer in asyncio.run(impatient()))
        assert right(busy.result(), b"600 busy")
    server.until(lambda: server.stats("sleeping")["waiting"] == 0, seconds=5)
    after = server.stats("sleeping")
    assert after["items"] - before["items"] == 1
    assert after["success"] - before["success"] == 1
    assert after["failure"] - before["failure"] == 10


def test_connections_dropped_in_the_middle_of_an_upload(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    logged = len(server.log)
    for _ in range(30):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(500))
    assert right(server.ask("echo", b"afterwards"), b"afterwards")
    assert not [line for line in server.log[logged:] if line.get("level") == "error" or "exception" in line]


# --- engines and workers that fail ------------------------------------------------------------------------------------


def test_an_engine_that_fails_and_comes_back(server: Server, switch: Path) -> None:
    """The service says that it is not ready, serves the others, and comes back without anybody's request."""
    switch.touch()
    try:
        answer = server.ask("breaking", b"x")
        assert answer.status_code == 500
        assert "the engine failed" in answer.json()["error"]
        assert server.status("/v2/health/ready") == 503
        assert server.status("/v2/models/breaking/ready") == 503
        assert server.status("/v2/models/echo/ready") == server.status("/v2/health/live") == 200
        assert right(server.ask("echo", b"others"), b"others")
        time.sleep(1.5)  # it is asked again meanwhile, and still fails
        assert server.status("/v2/health/ready") == 503
    finally:
        switch.unlink()
    server.until(lambda: server.status("/v2/health/ready") == 200, seconds=10)
    assert right(server.ask("breaking", b"again"), b"again")


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """The other answers meanwhile; only what the dead one had taken is lost; it is started again; no orphan stays."""
    with Server(config("echo", "sleeping"), tmp_path, "--workers", "2") as server:

        def workers() -> dict[int, int]:
            return {line["worker"]: line["pid"] for line in server.log if line["message"] == "ready"}

        server.until(lambda: len(workers()) == 2)
        before = workers()
        os.kill(before[1], signal.SIGKILL)
        outcomes: collections.Counter[str] = collections.Counter()
        while workers()[1] == before[1] or outcomes["right"] < 100:
            data = os.urandom(8)
            try:
                outcomes["right" if right(server.ask("echo", data), data) else "wrong"] += 1
            except httpx.TransportError:
                outcomes["lost"] += 1
        assert outcomes["wrong"] == 0
        assert outcomes["lost"] <= 1
        assert server.wait_for("a worker died")["worker"] == 1
        server.until(lambda: workers()[1] != before[1])
        after = workers()
        os.kill(server.process.pid, signal.SIGKILL)  # and the supervisor: its workers do not go on without it
        server.process.wait()
        end_s = time.monotonic() + 20
        while any(is_running(pid) for pid in after.values()):
            assert time.monotonic() < end_s
            time.sleep(0.05)


# --- other versions, and the end --------------------------------------------------------------------------------------


@contextlib.contextmanager
def under_load(server: Server, model: str, *, threads: int = 8) -> Iterator[list[tuple[bytes, httpx.Response]]]:
    """Asks all the time; the list has all questions and answers when the context has ended."""
    ending, asked = threading.Event(), []

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=30, verify=False) as client:
            count = 0
            while not ending.is_set():
                data = b"%d/%d" % (number, count)
                asked.append((data, client.post(f"/v1/{model}", content=data)))
                count += 1

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(ask, number) for number in range(threads)]
        try:
            yield asked
        finally:
            ending.set()
        for task in tasks:
            task.result()


@pytest.mark.parametrize("workers", [1, 2])
def test_another_version_under_load(tmp_path: Path, workers: int) -> None:
    """No request is lost, none answered twice; a version that does not load or does not answer changes nothing."""
    held = tmp_path / "version"
    held.write_text("one")
    with Server(config("Versioned"), tmp_path, "--workers", str(workers), SERVE_TEST_SWITCH=str(held)) as server:
        server.until(lambda: sum(line["message"] == "ready" for line in server.log) == workers)
        with under_load(server, "versioned") as asked:
            for version, status in (("two", 200), ("broken", 400), ("three", 200), (None, 400), ("four", 200)):
                held.unlink(missing_ok=True)
                if version is not None:
                    held.write_text(version)
                loaded = len([line for line in server.log if line["message"] == "loaded"])
                response = httpx.post(f"{server.url}/v2/repository/models/versioned/load", timeout=30)
                assert response.status_code == status, response.text
                if status == 200:
                    server.until(
                        lambda loaded=loaded: (
                            sum(line["message"] == "loaded" for line in server.log) == loaded + workers
                        )
                    )
                since = len(asked)
                server.until(lambda since=since: len(asked) > since + 40)
        held.write_text("five")
        server.process.send_signal(signal.SIGHUP)
        server.until(lambda: server.ask("versioned", b"x").json()["version"] == "five")
        assert server.stop() == 0
    assert all(right(answer, data) for data, answer in asked)
    versions = [answer.json()["version"] for _, answer in asked]
    assert set(versions) == {"one", "two", "three", "four"}
    assert versions[-1] == "four"


def test_results_of_another_version_are_not_given(tmp_path: Path) -> None:
    held = tmp_path / "version"
    held.write_text("one")
    with Server(config("Versioned", top=""), tmp_path, SERVE_TEST_SWITCH=str(held)) as server:
        assert [server.ask("versioned", b"x").json()["version"] for _ in range(2)] == ["one", "one"]
        held.write_text("two")
        httpx.post(f"{server.url}/v2/repository/models/versioned/load", timeout=30).raise_for_status()
        assert server.ask("versioned", b"x").json()["version"] == "two"
        cache = httpx.get(f"{server.url}/v1/stats").json()["cache"]
        assert (cache["hits"], cache["misses"]) == (1, 2)


def test_a_file_that_breaks_while_it_is_served(tmp_path: Path) -> None:
    with Server(config("echo"), tmp_path) as server:
        for broken in ("[", "pipelines: {echo: {kind: magic}}", "pipelines: {}"):
            server.rewrite(broken)
            response = httpx.post(f"{server.url}/v2/repository/models/echo/load", timeout=30)
            assert response.status_code == 400
            assert right(server.ask("echo", b"as before"), b"as before")
        server.rewrite(config("echo", "slow"))
        httpx.post(f"{server.url}/v2/repository/models/slow/load", timeout=30).raise_for_status()
        assert right(server.ask("slow", b"a new one"), b"a new one")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_under_way_at_the_end_is_answered(tmp_path: Path, workers: int) -> None:
    with Server(config("sleeping", max_batch=1), tmp_path, "--workers", str(workers)) as server:
        server.until(lambda: sum(line["message"] == "ready" for line in server.log) == workers)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(server.ask, "sleeping", b"300 %d" % number) for number in range(6)]
            time.sleep(0.25)
            assert server.stop() == 0
            for number, answer in enumerate(asked):
                assert right(answer.result(), b"300 %d" % number)
        with pytest.raises(httpx.ConnectError):
            server.ask("sleeping", b"0 afterwards")


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    """Of a service's process and of its pipelines', as far as they live."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


def test_abuse_leaves_no_memory_behind(server: Server) -> None:
    """Rounds of everything above; the last third of them holds no more than the second."""
    host, port = server.url.removeprefix("http://").split(":")

    def round_of_abuse(number: int) -> None:
        given = [os.urandom(20_000) for _ in range(12)] + [b"POISON %d" % number, b""]
        at_once(server, "poisonable", given, threads=8)
        at_once(server, "slow", [b"%d" % index for index in range(24)], threads=24)
        httpx.post(f"{server.url}/v1/echo", content=b"{", headers={"Content-Type": "application/json"})
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf")

    held: list[int] = []
    for number in range(15):
        round_of_abuse(number)
        held.append(resident_bytes(server.process.pid))
    assert max(held[10:]) - max(held[5:10]) < 4 << 20


def test_a_service_needs_its_file(tmp_path: Path) -> None:
    from nbvision.serve import serve

    with pytest.raises(InputError, match="is not read"):
        serve(tmp_path / "none.yaml")
    (tmp_path / "serve.yaml").write_text(config("echo"))
    with pytest.raises(InputError, match="workers is 0"):
        serve(tmp_path / "serve.yaml", workers=0)


# --- the start, and the end -------------------------------------------------------------------------------------------


def test_the_first_requests_are_in_time(tmp_path: Path) -> None:
    """Neither do they wait for what is done at first, nor are they given up because that took long."""
    with Server(config("SlowAtFirst", deadline_ms=1000), tmp_path) as server:
        given = [b"%d" % index for index in range(8)]
        answers = at_once(server, "slowatfirst", given, threads=8)
        assert all(right(answer, data) for answer, data in zip(answers, given, strict=True))
        stats = server.stats("slowatfirst")
        assert (stats["items"], stats["given_up"], stats["missed"]) == (8, 0, 0)


def run_to_its_end(tmp_path: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    command = [*COMMAND, str(path), "--port", "0", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=surroundings(), check=False)


@pytest.mark.parametrize(
    ("function", "says", "workers"),
    [
        ("raising", "KeyError: 'weights'", 1),
        ("raising", "KeyError: 'weights'", 2),
        ("exiting", "SystemExit: 5", 2),
        ("a_dict", "expected a list", 1),
        ("nothing_here", "expected 'module:name'", 1),
        ("SWITCH", "expected one, or a class", 1),
    ],
)
def test_what_cannot_start_ends(tmp_path: Path, workers: int, function: str, says: str) -> None:
    """With a line that names the pipeline, and not again and again."""
    done = run_to_its_end(tmp_path, config("echo", function), "--workers", str(workers))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (*_, said) = [line for line in done.stderr.splitlines() if says in line]
    assert f"pipeline '{function.lower()}'" in said
    assert done.stderr.count(says) <= workers


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_for_grpc_that_is_taken(tmp_path: Path, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_to_its_end(tmp_path, config("echo"), "--grpc-port", port, "--workers", str(workers))
    assert done.returncode == 1
    assert "cannot be had for gRPC" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text("def sizes(files):\n    return [len(data) for data in files]\n")
    text = "pipelines: {mine: {kind: python, device: cpu, function: 'my_module:sizes'}}"
    with Server(text, tmp_path) as server:
        assert server.ask("mine", b"12345").json() == 5
    (tmp_path / "my_module.py").write_text("import no_such_package\n")
    done = run_to_its_end(tmp_path, text)
    assert done.returncode == 1
    assert "No module named 'no_such_package'" in done.stderr
    assert "module:name" not in done.stderr


def test_results_that_cannot_be_sent(tmp_path: Path) -> None:
    with Server(config("unsendable", top=""), tmp_path) as server:
        for _ in range(2):  # it is not kept
            for data in (b"nan", b"float32", b"object"):
                answer = server.ask("unsendable", data)
                assert answer.status_code == 500
                assert "no JSON" in answer.json()["error"]
        assert server.ask("unsendable", b"good").json() == {"value": 1}
        assert server.ask("unsendable", b"large").json() == {"value": 1 << 70}
        stats = server.stats("unsendable")
        assert (stats["success"], stats["failure"]) == (2, 6)


def test_a_file_that_serves_less_and_limits_that_change(tmp_path: Path) -> None:
    with Server(config("echo", "slow", top="token: one"), tmp_path, wait=False) as server:
        token = {"Authorization": "Bearer one"}
        server.wait_for("ready")
        assert server.ask("slow", b"x", headers=token).status_code == 200
        server.rewrite(config("echo", top="token: two"))
        server.process.send_signal(signal.SIGHUP)
        assert server.wait_for("no longer served")["model"] == "slow"
        (changed,) = [line for line in server.log if "fields" in line] or [
            server.wait_for("changed in the file, but taken over only when the service starts anew")
        ]
        assert changed["fields"] == ["token"]
        assert server.ask("slow", b"x", headers=token).status_code == 404
        assert right(server.ask("echo", b"y", headers=token), b"y")
        assert server.stop() == 0


def test_what_is_not_answered_when_the_time_to_drain_is_over(tmp_path: Path) -> None:
    with Server(config("sleeping", top="drain_s: 1"), tmp_path) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.ask, "sleeping", b"4000 ms")
            server.until(lambda: server.stats("sleeping")["running"] == 1)
            assert server.stop() == 0
            answer = asked.result()
        assert answer.status_code == 503
        assert "ending" in answer.json()["error"]
        assert "Retry-After" in answer.headers


def test_large_files_are_handed_over_beside_the_loop(server: Server) -> None:
    data = os.urandom(9 << 20)
    assert server.ask("echo", data).json() == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert server.ask("poisonable", b"POISON" + data).status_code == 500
    assert server.ask("echo", data, params={"deadline_ms": 0}).status_code == 504


def test_a_pipeline_whose_process_dies_comes_back(tmp_path: Path) -> None:
    with Server(config("dying", "echo"), tmp_path) as server:
        assert server.ask("dying", b"x").status_code == 200
        for broken in ("", "pipelines: ["):
            log = len(server.log)
            if broken:  # it is made of what it was made of, and not of what somebody is writing
                server.rewrite(broken)
            died = server.ask("dying", b"DIE")
            assert died.status_code == 500
            assert "ended, with status -9" in died.json()["error"]
            assert server.ask("echo", b"x").status_code == 200
            while (answer := server.ask("dying", b"x")).status_code != 200:
                assert answer.status_code == 503
                assert answer.headers["Retry-After"] == "5"
                assert server.ask("echo", b"x").status_code == 200
                time.sleep(0.05)
            assert server.wait_for("a pipeline's process died", after=log)["model"] == "dying"
        server.until(lambda: server.status("/v2/health/ready") == 200)
        stats = server.stats("dying")
        asked = [line for line in server.log if line.get("path") == "/v1/dying"]
        assert stats["success"] == sum(line["status"] == 200 for line in asked) == 3
        assert stats["failure"] == len(asked) - 3
        assert server.stop() == 0


def test_who_looks_after_failing_pipelines_goes_on_while_others_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(config("echo", "slow"))
    monkeypatch.setattr(service_module, "_LOOK_EVERY_S", 0.01)

    async def run() -> None:
        service = service_module.Service(path)
        asked, may_answer = asyncio.Event(), asyncio.Event()

        async def answer(item: object, *, deadline_ms: float, priority: int) -> None:
            asked.set()
            await may_answer.wait()

        monkeypatch.setattr(service.served["echo"].batcher, "answer", answer)
        service.served["echo"].is_healthy = False
        await service.start()
        await asked.wait()
        gone = service.served.pop("slow")
        asked.clear()
        may_answer.set()
        await asyncio.wait_for(asked.wait(), 5)  # it asks again
        gone.close()
        await service.close()

    asyncio.run(run())


def test_who_has_taken_the_place_of_a_dead_pipeline_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(config("echo", "slow"))
    monkeypatch.setattr(service_module, "_LOOK_EVERY_S", 0.01)

    async def run() -> None:
        service = service_module.Service(path)
        await service.start()
        dead = service.served["slow"]
        async with service._loading:  # somebody loads it anew
            os.kill(dead.pipeline.process_id, signal.SIGKILL)
            while dead not in service._nursed:
                await asyncio.sleep(0.01)
            loaded = await service._exchange(dead.config)
        while service._nursed:
            await asyncio.sleep(0.01)
        assert service.served["slow"] is loaded
        assert (await loaded.answer(b"x", deadline_ms=None))["bytes"] == 1
        await service.close()

    asyncio.run(run())


def test_what_may_be_the_machines_fault_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(config("echo", top="cache_bytes: 1000000"))

    async def run() -> None:
        service = service_module.Service(path)
        kinds: Iterator[DecodeErrorKind] = iter(("failed", "corrupt"))

        async def answer(item: object, *, deadline_ms: float | None, priority: int) -> None:
            raise DecodeError("no pixels", kind=next(kinds))

        served = service.served["echo"]
        monkeypatch.setattr(served.batcher, "answer", answer)
        said = [(await service.answer(served, [b"the same file"]))[0].kind for _ in range(4)]
        assert said == ["failed", "corrupt", "corrupt", "corrupt"]
        await service.close()

    asyncio.run(run())
