"""A pipeline in a process of its own answers as in this one, and when either process ends the other notices."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_functions
from serving import is_running, surroundings

from nbvision.codecs import encode
from nbvision.errors import DecodeError, EngineError, InputError
from nbvision.serve import pipeline_process
from nbvision.serve.pipeline_process import PipelineProcess, start_pipeline
from nbvision.serve.pipelines import PIPELINES
from nbvision.serve.status import RefusedError

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def functions_are_found() -> Iterator[None]:
    """By the other process, which finds what this one does."""
    before = sys.path[:]
    sys.path.insert(0, str(HERE))
    yield
    sys.path[:] = before


def python(name: str, *, threads: int = 2) -> PipelineProcess:
    return start_pipeline("python", {"function": f"serve_functions:{name}", "device": "cpu"}, threads=threads)


def until(condition: Any, *, seconds: float = 20.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, f"waited {seconds} s"
        time.sleep(0.01)


# --- the same answers -------------------------------------------------------------------------------------------------


def test_a_recognizer_answers_as_here(device: str) -> None:
    options = {"device": device, "stage_times": False}
    scene = np.random.default_rng(5).integers(0, 256, (211, 307, 3), np.uint8)
    items = [encode(scene, "jpeg"), encode(scene[::-1].copy(), "png"), b"no image", encode(scene[:1, :1].copy(), "png")]
    here = PIPELINES["recognizer"](**options)
    there = start_pipeline("recognizer", options, threads=1)
    try:
        for name in ("inputs", "outputs", "device", "digest", "decodes_ahead", "takes_images"):
            assert getattr(there, name) == getattr(here, name), name
        assert there.probe() == here.probe()
        assert any(result["objects"] for result in there.warm_up(items[:2]))
        assert there.warm_up(items[:2]) == here.warm_up(items[:2])
        expected, got = here.run(items), there.run(items)
        for one, other in zip(expected, got, strict=True):
            if isinstance(one, DecodeError):
                assert (str(one), one.kind) == (str(other), other.kind)
            else:
                assert one == other
        np.testing.assert_equal(there.tensors_of(got), here.tensors_of(expected))
        assert there.held_bytes > 0
    finally:
        here.close()
        there.close()


def test_an_engine_answers_as_here(device: str, tmp_path: Path) -> None:
    path = tmp_path / "negate.onnx"
    path.write_bytes(negate())
    options = {"model": str(path), "device": device}
    here, there = PIPELINES["engine"](**options), start_pipeline("engine", options, threads=2)
    try:
        rows = np.random.default_rng(6).random((5, 3), np.float32)
        items = there.items_of({"x": rows})
        got = there.tensors_of(there.run(items))
        np.testing.assert_array_equal(got["y"], here.tensors_of(here.run(items))["y"])
        np.testing.assert_array_equal(got["y"], -rows)
        with pytest.raises(InputError, match="FP32"):
            there.items_of({"x": rows.astype(np.float64)})
    finally:
        here.close()
        there.close()


def negate() -> bytes:
    import onnx
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negate", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def test_items_of_many_threads_are_not_mixed_up() -> None:
    there = python("echo", threads=4)

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            items = [chance.randbytes(chance.choice([1, 100, 70_000, 300_000])) for _ in range(chance.randint(1, 5))]
            opened = [there.open(item) for item in items]
            if chance.random() < 0.3:
                continue  # given up
            chance.shuffle(order := list(range(len(items))))
            got = there.run([opened[index] for index in order])
            assert got == serve_functions.echo([items[index] for index in order])

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(4)))
    finally:
        there.close()


def test_what_nobody_wants_any_more_is_let_go_of() -> None:
    there = python("echo")

    def own_bytes() -> int:
        _, resident, shared, *_ = map(int, Path(f"/proc/{there.process_id}/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    try:
        there.run([b"first"])
        before = own_bytes()
        held = [there.open(bytes([number]) * (8 << 20)) for number in range(16)]
        assert there.run(held) == serve_functions.echo([bytes([number]) * (8 << 20) for number in range(16)])
        assert own_bytes() - before > 100 << 20
        assert len(there.run(held[:3])) == 3  # as often as wanted
        held.clear()
        there.run([b"last"])
        assert own_bytes() - before < 30 << 20
        assert there._places.free_bytes > there._places.size_bytes - 100  # but for the last two
    finally:
        there.close()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_who_waits_for_an_item_is_told_when_no_batch_would() -> None:
    pipeline = start_pipeline("recognizer", {"device": "cpu", "decode_processes": 1, "stage_times": False}, threads=1)
    try:
        assert pipeline.decodes_ahead
        scene = np.random.default_rng(5).integers(0, 256, (211, 307, 3), np.uint8)
        told: list[Any] = []
        for data in (encode(scene, "png"), b"no image", encode(scene, "webp")) * 5:
            sent = pipeline.open(data)
            sent.add_done_callback(told.append)
            sent.add_done_callback(told.append)
        until(lambda: len(told) == 30)
        assert len({sent.number for sent in told}) == 15
        sent = told[0]
        sent.add_done_callback(told.append)  # at once: it was long ago
        assert len(told) == 31
        assert not pipeline._coming._callbacks
        sent = pipeline.open(encode(scene, "png"))
        os.kill(pipeline.process_id, signal.SIGKILL)
        sent.add_done_callback(told.append)
        until(lambda: len(told) == 32)
        with pytest.raises(EngineError):
            pipeline.run([sent])
    finally:
        pipeline.close()


def test_where_nothing_is_done_ahead_nobody_waits() -> None:
    pipeline = python("echo", threads=1)
    try:
        told: list[Any] = []
        pipeline.open(b"x").add_done_callback(told.append)
        assert len(told) == 1
    finally:
        pipeline.close()


def test_errors_of_this_library_are_what_they_were() -> None:
    there = python("echo")
    try:
        fine, error = there.run([b"fine", b""])
        assert fine == serve_functions.echo([b"fine"])[0]
        assert (type(error), error.kind, str(error)) == (DecodeError, "empty", "the file is empty")
    finally:
        there.close()


@pytest.mark.parametrize(
    ("name", "raised", "said"), [("raising", "KeyError", "weights"), ("exiting", "SystemExit", "5")]
)
def test_other_errors_keep_their_name_and_where_they_came_from(name: str, raised: str, said: str) -> None:
    there = python(name)
    try:
        with pytest.raises(Exception, match=said) as caught:
            there.run([b"x"])
        assert type(caught.value).__name__ == raised
        assert f"in {name}" in str(caught.value.__cause__)
        assert there.is_alive
    finally:
        there.close()


def test_types_that_only_the_other_process_knows() -> None:
    there = python("strange")
    try:
        with pytest.raises(Exception, match="a secret: 3") as caught:
            there.run([b"raise"])
        assert type(caught.value).__name__ == "StrangeError"
        given, torn, number = there.run([b"give", b"torn", b"a number"])
        assert (type(given).__name__, str(given)) == ("StrangeError", "a secret: 7")
        assert (type(torn), torn.kind, torn.valid_rows, str(torn)) == (DecodeError, "corrupt", 7, "torn")
        assert type(number["five"]) is int
    finally:
        there.close()


@pytest.mark.parametrize(
    ("item", "name", "said"),
    [(b"dumb", "DumbError", "does not say"), (b"pickles not", "PicklingError|AttributeError", "pickle")],
)
def test_errors_that_cannot_be_told(item: bytes, name: str, said: str) -> None:
    there = python("strange", threads=1)
    try:
        for _ in range(3):  # the thread that answers goes on
            with pytest.raises(Exception, match=said) as caught:
                there.run([item])
            assert re.fullmatch(name, type(caught.value).__name__)
        assert there.run([b"a number"]) == [{"five": 5}]
    finally:
        there.close()


def test_a_batch_that_fails_holds_nothing() -> None:
    """When its error is caught, or what is tried instead might lack the memory, too."""
    there = python("poisonable")
    try:
        for _ in range(3):
            opened = [there.open(b"POISON" + bytes(1 << 20)), there.open(bytes(1 << 20))]
            with pytest.raises(Exception, match="a secret of the pipeline"):
                there.run(opened)
            held = weakref.WeakSet(opened)
            del opened
            assert not held
        assert there.run([b"fine"]) == serve_functions.echo([b"fine"])
    finally:
        there.close()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("python", {"function": "serve_functions:nowhere", "device": "cpu"}, InputError),
        ("engine", {"model": "nowhere.onnx", "device": "cpu"}, EngineError),
    ],
)
def test_what_is_not_made_raises_here(kind: str, options: dict[str, Any], expected: type[Exception]) -> None:
    with pytest.raises(expected, match="nowhere"):
        start_pipeline(kind, options, threads=1)


# --- an end -----------------------------------------------------------------------------------------------------------


def test_a_process_that_ends_in_a_batch() -> None:
    there = python("dying")
    try:
        assert there.run([b"x"]) == serve_functions.echo([b"x"])
        waiting = there.open(b"opened before")
        with pytest.raises(EngineError, match="status -9"):
            there.run([there.open(b"x"), there.open(b"DIE")])
        assert not there.is_alive
        with pytest.raises(EngineError, match="status -9"):
            there.run([waiting])
        with pytest.raises(RefusedError, match="started again") as caught:
            there.open(b"y")
        assert (caught.value.status, caught.value.retry_after_s) == (503, 5.0)
    finally:
        there.close()


@pytest.mark.parametrize("item", [b"x", b"DIE"])
def test_processes_that_it_has_forked_end_with_it(item: bytes) -> None:
    there = python("forking")
    try:
        (forked,) = there.run([b"x"])
        assert is_running(forked)
        if item == b"DIE":
            with pytest.raises(EngineError, match="status -9"):
                there.run([item])
    finally:
        there.close()
    until(lambda: not is_running(forked))


def test_signals_to_all_processes_of_a_service_are_for_the_first() -> None:
    there = python("sleeping")
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            threading.Timer(0.1, os.kill, (there.process_id, number)).start()
            assert there.run([b"300 ms"]) == serve_functions.echo([b"300 ms"])
        assert there.is_alive
    finally:
        there.close()
        there.close()  # which does nothing more
    there.let_go()
    with pytest.raises(RefusedError, match="status 0"):
        there.open(b"x")


def test_a_process_that_is_killed_while_a_thread_waits_for_it() -> None:
    there = python("sleeping")
    try:
        opened = there.open(b"60000 ms")
        threading.Timer(0.2, os.kill, (there.process_id, signal.SIGKILL)).start()
        with pytest.raises(EngineError, match="status -9"):
            there.run([opened])
    finally:
        there.close()


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_process, "_END_S", 2.0)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    python("echo").close()
    before, threads = descriptors(), threading.active_count()
    for end in (None, signal.SIGKILL, signal.SIGSTOP):
        there = python("echo")
        there.run([b"x"])
        if end:
            os.kill(there.process_id, end)
        there.close()
        assert not is_running(there.process_id)
    with pytest.raises(InputError):
        python("nowhere")
    until(lambda: (descriptors(), threading.active_count()) == (before, threads))


def test_it_ends_with_who_started_it() -> None:
    code = """if True:
        import sys, threading, time
        sys.path.insert(0, sys.argv[1])
        from nbvision.serve.pipeline_process import start_pipeline
        there = start_pipeline("python", {"function": "serve_functions:sleeping", "device": "cpu"}, threads=1)
        threading.Thread(target=there.run, args=([b"60000 ms"],), daemon=True).start()
        time.sleep(0.2)
        print(there.process_id, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", code, str(HERE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings()) as starter:
        assert starter.stdout is not None
        other = int(starter.stdout.readline())
        assert is_running(other)
        starter.kill()
    until(lambda: not is_running(other))
