"""Engines on both devices, against NumPy: what they compute, what they refuse, and what they keep on disk."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbvision.engines import BatchRange, Engine
from nbvision.engines._trt import load_tensorrt
from nbvision.engines.engine import _installed_tensorrt
from nbvision.engines.plan_cache import read_plan, sole_builder, write_plan
from nbvision.errors import DeviceError, EngineError, InputError, MemoryLimitError, MissingExtraError
from nbvision.image import to_device
from nbvision.runtime import memory
from nbvision.runtime.device import array_module, cuda_unavailable_because, synchronize

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64

WEIGHTS = np.random.default_rng(7).standard_normal((8, 3, 3, 3)).astype(np.float32) / 5

Value = tuple[str, int, Sequence[int | str | None]]


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    metadata: dict[str, str] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    return model


def convolution(batch: int | str = "N") -> onnx.ModelProto:
    """x (N, 3, 16, 16) -> y (N, 8, 16, 16): a 3x3 convolution and a ReLU."""
    return make_model(
        [
            helper.make_node("Conv", ["x", "weights"], ["sums"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["sums"], ["y"], name="relu"),
        ],
        [("x", FLOAT, [batch, 3, 16, 16])],
        [("y", FLOAT, [batch, 8, 16, 16])],
        {"weights": WEIGHTS},
        {"classes": "shirt,shoe", "größe": "16"},
    )


def convolution_in_numpy(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("nchwyx,kcyx->nkhw", windows, WEIGHTS), 0)


def sum_and_product() -> onnx.ModelProto:
    """left, right (N, 4) -> sum, product (N, 4)."""
    return make_model(
        [
            helper.make_node("Add", ["left", "right"], ["sum"], name="add"),
            helper.make_node("Mul", ["left", "right"], ["product"], name="mul"),
        ],
        [("left", FLOAT, ["N", 4]), ("right", FLOAT, ["N", 4])],
        [("sum", FLOAT, ["N", 4]), ("product", FLOAT, ["N", 4])],
    )


def one_node(operator: str, x: Value, y: Value, *, repeat: int = 1, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(operator, [x[0]] * repeat, [y[0]], name=f"the_{operator.lower()}", **attributes)
    return make_model([node], [x], [y])


Make = Callable[..., Engine]


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plan cache for the session, so that a model is built once."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def make(device: str, plans: Path, tmp_path: Path) -> Make:
    """An engine on ``device`` from a model."""

    def make_engine(model: onnx.ModelProto, name: str = "tiny", **options: Any) -> Engine:
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path)
        return Engine(path, **{"device": device, "cache_dir": plans, **options})

    return make_engine


def images(rng: np.random.Generator, batch: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal((batch, 3, 16, 16)).astype(np.float32)


# What it computes


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_dynamic_batches(make: Make, device: str, rng: np.random.Generator, precision: str, tolerance: float) -> None:
    engine = make(convolution(), precision=precision)
    for batch in (1, 3, 16, 64):
        x = images(rng, batch)
        y = engine(to_device(x, device))  # type: ignore[arg-type]
        assert isinstance(y, array_module(device).ndarray)  # type: ignore[arg-type]
        assert y.dtype == np.float32
        np.testing.assert_allclose(to_device(y, "cpu"), convolution_in_numpy(x), rtol=tolerance, atol=tolerance)


def test_what_it_says_of_itself(make: Make, device: str, tmp_path: Path) -> None:
    engine = make(convolution(), name="detector", batch=(1, 2, 8))
    assert engine.name == "detector"
    assert engine.device == device
    assert engine.runtime == "onnxruntime" if device == "cpu" else engine.runtime.startswith("tensorrt")
    assert engine.batch == BatchRange(1, 2, 8)
    assert engine.precision == "fp32"
    assert engine.metadata == {"classes": "shirt,shoe", "größe": "16"}
    assert engine.digest == hashlib.sha256((tmp_path / "detector.onnx").read_bytes()).hexdigest()
    assert [(spec.name, spec.dtype, spec.shape) for spec in engine.inputs] == [
        ("x", np.dtype(np.float32), (-1, 3, 16, 16))
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in engine.outputs] == [
        ("y", np.dtype(np.float32), (-1, 8, 16, 16))
    ]
    assert "detector" in repr(engine)
    assert "(-1, 3, 16, 16)" in repr(engine)


def test_several_inputs_and_outputs(make: Make, device: Any, rng: np.random.Generator) -> None:
    engine = make(sum_and_product())
    left, right = rng.standard_normal((2, 5, 4)).astype(np.float32)
    outputs = engine({"right": to_device(right, device), "left": to_device(left, device)})
    assert set(outputs) == {"sum", "product"}
    np.testing.assert_allclose(to_device(outputs["sum"], "cpu"), left + right, rtol=1e-6)
    np.testing.assert_allclose(to_device(outputs["product"], "cpu"), left * right, rtol=1e-6)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_ranges_of_batches(make: Make, device: str, rng: np.random.Generator, cuda_graphs: bool) -> None:
    engine = make(convolution(), batch=[(1, 1, 1), (2, 4, 8), (8, 16, 64)], cuda_graphs=cuda_graphs)
    assert engine.batch == BatchRange(1, 16, 64)
    for batch in (1, 8, 64, 2, 1, 9):
        x = images(rng, batch)
        y = engine(to_device(x, device))  # type: ignore[arg-type]
        np.testing.assert_allclose(to_device(y, "cpu"), convolution_in_numpy(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="made for 1 to 64"):
        engine(to_device(images(rng, 65), device))  # type: ignore[arg-type]


def test_fixed_batch(make: Make, device: Any, rng: np.random.Generator) -> None:
    engine = make(convolution(batch=2), batch=(1, 16, 64))
    assert engine.batch is None
    x = images(rng, 2)
    np.testing.assert_allclose(to_device(engine(to_device(x, device)), "cpu"), convolution_in_numpy(x), atol=1e-4)
    for batch in (0, 1, 3):
        with pytest.raises(InputError, match="has shape"):
            engine(to_device(images(rng, batch), device))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_float16_in_the_file(make: Make, device: Any, rng: np.random.Generator, precision: str) -> None:
    engine = make(one_node("Add", ("x", HALF, ["N", 6]), ("y", HALF, ["N", 6]), repeat=2), precision=precision)
    assert engine.inputs[0].dtype == engine.outputs[0].dtype == np.float16
    x = rng.standard_normal((4, 6)).astype(np.float16)
    np.testing.assert_array_equal(to_device(engine(to_device(x, device)), "cpu"), x + x)


def test_output_longer_than_the_batch(make: Make, device: Any, rng: np.random.Generator) -> None:
    x, y = ("x", FLOAT, ["N", 4]), ("y", FLOAT, [None, 4])
    engine = make(one_node("Concat", x, y, repeat=2, axis=0))
    data = rng.standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_array_equal(to_device(engine(to_device(data, device)), "cpu"), np.concatenate([data, data]))
    out = array_module(device).empty((6, 4), np.float32)
    assert engine.run({"x": to_device(data, device)}, out={"y": out})["y"] is out
    with pytest.raises((InputError, EngineError)):
        engine.run({"x": to_device(data, device)}, out={"y": out[:3]})


def test_arrays_that_have_to_be_copied(make: Make, device: Any, rng: np.random.Generator) -> None:
    engine = make(convolution())
    channels_last = rng.standard_normal((2, 16, 16, 3)).astype(np.float32)
    x = np.moveaxis(channels_last, -1, 1)
    y = engine(array_module(device).moveaxis(to_device(channels_last, device), -1, 1))
    np.testing.assert_allclose(to_device(y, "cpu"), convolution_in_numpy(x), atol=1e-4)

    rows = rng.standard_normal((9, 4)).astype(np.float32)
    on_device = to_device(rows, device)
    outputs = make(sum_and_product())({"left": on_device[1:4], "right": on_device[5:8]})
    np.testing.assert_allclose(to_device(outputs["sum"], "cpu"), rows[1:4] + rows[5:8], rtol=1e-6)


def test_weights_in_a_file_beside(device: Any, plans: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "big.onnx"
    onnx.save(convolution(), path, save_as_external_data=True, location="big.weights", size_threshold=0)
    engine = Engine(path, device=device, cache_dir=plans)
    x = images(rng, 2)
    np.testing.assert_allclose(to_device(engine(to_device(x, device)), "cpu"), convolution_in_numpy(x), atol=1e-4)

    weights = tmp_path / "big.weights"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + np.float32(0.25).tobytes())
    assert Engine(path, device=device, cache_dir=plans).digest != engine.digest
    weights.unlink()
    with pytest.raises(EngineError, match=r"big\.weights"):
        Engine(path, device=device, cache_dir=plans)


def test_calls_from_several_threads(make: Make, device: Any, rng: np.random.Generator) -> None:
    engine = make(convolution())
    batches = [images(rng, 1 + index % 5) for index in range(4)]
    results: list[Any] = [None] * len(batches)

    def work(index: int) -> None:
        for _ in range(10):
            y = engine(to_device(batches[index], device))
        results[index] = to_device(y, "cpu")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, y in zip(batches, results, strict=True):
        np.testing.assert_allclose(y, convolution_in_numpy(x), atol=1e-4)


# out= and empty batches


def test_out_is_filled(make: Make, device: Any, rng: np.random.Generator) -> None:
    engine = make(sum_and_product())
    data = rng.standard_normal((2, 3, 4)).astype(np.float32)
    inputs = {"left": to_device(data[0], device), "right": to_device(data[1], device)}
    total = array_module(device).zeros((3, 4), np.float32)
    outputs = engine.run(inputs, out={"sum": total})
    assert outputs["sum"] is total
    np.testing.assert_allclose(to_device(total, "cpu"), data[0] + data[1], rtol=1e-6)
    np.testing.assert_allclose(to_device(outputs["product"], "cpu"), data[0] * data[1], rtol=1e-6)


def test_out_that_does_not_fit(make: Make, device: Any) -> None:
    engine, xp = make(sum_and_product()), array_module(device)
    inputs = {name: xp.zeros((3, 4), np.float32) for name in ("left", "right")}
    for wrong in (
        xp.zeros((2, 4), np.float32),
        xp.zeros((3, 5), np.float32),
        xp.zeros((3, 4), np.float64),
        xp.zeros((3, 8), np.float32)[:, ::2],
        [0.0] * 12,
    ):
        with pytest.raises(InputError, match=r"out\['sum'\]"):
            engine.run(inputs, out={"sum": wrong})
    with pytest.raises(InputError, match="difference"):
        engine.run(inputs, out={"difference": xp.zeros((3, 4), np.float32)})


def test_empty_batch(make: Make, device: Any) -> None:
    engine, xp = make(convolution()), array_module(device)
    y = engine(xp.empty((0, 3, 16, 16), np.float32))
    assert isinstance(y, xp.ndarray)
    assert y.shape == (0, 8, 16, 16)
    assert y.dtype == np.float32
    out = xp.empty((0, 8, 16, 16), np.float32)
    assert engine.run({"x": xp.empty((0, 3, 16, 16), np.float32)}, out={"y": out})["y"] is out
    with pytest.raises(InputError, match=r"out\['y'\]"):
        engine.run({"x": xp.empty((0, 3, 16, 16), np.float32)}, out={"y": xp.empty((1, 8, 16, 16), np.float32)})


def test_empty_batch_of_which_nothing_can_be_said(make: Make, device: Any) -> None:
    engine = make(one_node("ReduceMean", ("x", FLOAT, ["N", 4]), ("y", FLOAT, [1, 1])))
    ones = array_module(device).ones((3, 4), np.float32)
    np.testing.assert_allclose(to_device(engine(ones), "cpu"), [[1.0]])
    with pytest.raises(InputError, match="empty batch"):
        engine(ones[:0])


# What it refuses when called


def test_wrong_inputs(make: Make, device: Any) -> None:
    engine, xp = make(convolution(), batch=(2, 4, 8)), array_module(device)
    good = xp.zeros((2, 3, 16, 16), np.float32)
    for wrong, message in (
        (good.astype(np.float16), "is float16; tiny takes float32"),
        (good[0], "has shape"),
        (xp.zeros((2, 1, 16, 16), np.float32), "has shape"),
        (xp.zeros((9, 3, 16, 16), np.float32), "split the batch"),
        (good[:1], "pad the batch"),
        ([[1.0]], "is a list"),
    ):
        with pytest.raises(InputError, match=message):
            engine(wrong)
    with pytest.raises(InputError, match="unknown names"):
        engine.run({"image": good})
    with pytest.raises(InputError, match="lacks"):
        engine.run({})


def test_inputs_of_several(make: Make, device: Any) -> None:
    engine, xp = make(sum_and_product()), array_module(device)
    with pytest.raises(InputError, match="expected a dict"):
        engine(xp.zeros((1, 4), np.float32))
    with pytest.raises(InputError, match="disagree"):
        engine({"left": xp.zeros((1, 4), np.float32), "right": xp.zeros((2, 4), np.float32)})


def test_array_on_the_other_device(make: Make, device: str) -> None:
    class Elsewhere:
        shape = (1, 3, 16, 16)
        __cuda_array_interface__ = "an address on a GPU"

    stranger: Any = Elsewhere() if device == "cpu" else np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(InputError, match="Move it with"):
        make(convolution())(stranger)


# What it refuses when made


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"", "is empty"), (b"no model at all", "not an ONNX"), (b"\x08\x08", "not an ONNX")],
)
def test_files_that_are_no_model(device: Any, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=message):
        Engine(path, device=device)


def test_every_truncation_is_noticed(device: Any, tmp_path: Path) -> None:
    content = convolution().SerializeToString()
    path = tmp_path / "model.onnx"
    for size in range(1, len(content), 37):
        path.write_bytes(content[:size])
        with pytest.raises(EngineError):
            Engine(path, device=device, cache_dir=tmp_path)


def test_more_than_the_batch_is_dynamic(make: Make) -> None:
    sizes = ["N", 3, "H", "W"]
    with pytest.raises(EngineError, match="only the batch may be dynamic"):
        make(one_node("Relu", ("x", FLOAT, sizes), ("y", FLOAT, sizes)))


def test_unknown_operator_is_named(make: Make) -> None:
    with pytest.raises(EngineError, match="NoSuchOperator"):
        make(one_node("NoSuchOperator", ("x", FLOAT, ["N", 4]), ("y", FLOAT, ["N", 4])))


def test_wrong_options(make: Make) -> None:
    model = convolution()
    for options in (
        {"precision": "int3"},
        {"batch": (0, 1, 2)},
        {"batch": (1, 9, 8)},
        {"batch": (1, 2)},
        {"batch": []},
        {"batch": [(1, 2, 4), (6, 8, 8)]},
        {"batch": [(2, 4, 8), (1, 1, 1)]},
        {"runtime": "abacus"},
        {"device": "cpu", "runtime": "tensorrt"},
        {"device": "cuda", "runtime": "onnxruntime"},
    ):
        with pytest.raises(InputError, match=r"expected|runs on"):
            make(model, **options)


def test_runtime_brings_its_device(tmp_path: Path) -> None:
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    assert Engine(tmp_path / "tiny.onnx", runtime="onnxruntime").device == "cpu"
    if cuda_unavailable_because() is not None:
        with pytest.raises(DeviceError):
            Engine(tmp_path / "tiny.onnx", runtime="tensorrt")


def test_runtimes_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"nbvision\[onnx\]"):
        Engine(tmp_path / "tiny.onnx", device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"nbvision\[tensorrt\]"):
        _installed_tensorrt()
    with pytest.raises(MissingExtraError, match=r"nbvision\[tensorrt-rtx\]"):
        load_tensorrt.__wrapped__("tensorrt_rtx")


# Plans on disk


def test_plan_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "new" / "a.plan"
    assert read_plan(path) is None
    write_plan(path, b"plan" * 100)
    assert read_plan(path) == b"plan" * 100
    assert not caplog.records
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], content + b"x", content[:-9] + b"?" + content[-8:]):
        path.write_bytes(damaged)
        caplog.clear()
        assert read_plan(path) is None
        assert "is damaged" in caplog.text
    caplog.clear()
    write_plan(path / "beneath a file", b"plan")
    assert "cannot keep the plan" in caplog.text


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    """Each process says when it is in and when it is out; no two are in at once."""
    code = """
import sys, time
from pathlib import Path
from nbvision.engines.plan_cache import sole_builder
path, log = Path(sys.argv[1]) / "folder" / "a.plan", Path(sys.argv[1]) / "log"
for _ in range(5):
    with sole_builder(path):
        for word in ("in", "out"):
            with open(log, "a") as file:
                file.write(word + "\\n")
            time.sleep(0.01)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 15
    (tmp_path / "file").write_text("")
    with sole_builder(tmp_path / "file" / "a.plan"):  # no such folder can be: nothing is locked, and nothing breaks
        pass


@pytest.mark.needs_cuda
def test_plan_is_kept(tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbvision")
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    x = images(rng, 2)

    def check(**options: Any) -> str:
        """Make an engine, check what it computes, and return what was logged."""
        caplog.clear()
        engine = Engine(tmp_path / "tiny.onnx", device="cuda", cache_dir=tmp_path / "plans", **options)
        y = to_device(engine(to_device(x, "cuda")), "cpu")
        np.testing.assert_allclose(y, convolution_in_numpy(x), rtol=2e-2, atol=2e-2)
        return caplog.text

    assert "built its plan" in check()
    (path,) = (tmp_path / "plans").glob("*.plan")
    written = path.stat().st_mtime_ns
    logged = check()
    assert "plan loaded" in logged
    assert "built" not in logged
    assert path.stat().st_mtime_ns == written

    assert "built its plan" in check(batch=(1, 2, 4))
    assert "built its plan" in check(precision="fp16")
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 3

    path.write_bytes(path.read_bytes()[:-100])
    logged = check()
    assert "is damaged" in logged
    assert "built its plan" in logged
    assert "plan loaded" in check()

    write_plan(path, b"from another TensorRT " * 1000)
    logged = check()
    assert "does not load" in logged
    assert "built its plan" in logged


@pytest.mark.needs_cuda
def test_plan_that_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    Engine(tmp_path / "tiny.onnx", device="cuda", cache_dir=tmp_path / "tiny.onnx")
    assert "cannot keep the plan" in caplog.text


# CUDA streams


@pytest.mark.needs_cuda
def test_two_streams_share_an_engine(plans: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    cupy = array_module("cuda")
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    engine = Engine(tmp_path / "tiny.onnx", device="cuda", cache_dir=plans)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    batches = [images(rng, 64), images(rng, 33)]
    on_device = [to_device(x, "cuda") for x in batches]
    synchronize("cuda")
    results: list[tuple[int, Any]] = []
    for turn in range(20):
        which = turn % 2
        results.append((which, engine(on_device[which], stream=streams[which])))
    for stream in streams:
        stream.synchronize()
    expected = [convolution_in_numpy(x) for x in batches]
    for which, y in results:
        np.testing.assert_allclose(y.get(), expected[which], atol=1e-4)


@pytest.mark.needs_cuda
def test_follows_the_order_of_the_stream(plans: Path, tmp_path: Path) -> None:
    """Work queued before a call is seen by it, and work queued after it sees its outputs, with no wait between."""
    cupy = array_module("cuda")
    onnx.save(sum_and_product(), tmp_path / "tiny.onnx")
    engine = Engine(tmp_path / "tiny.onnx", device="cuda", cache_dir=plans)
    filler = cupy.ones((4096, 4096), np.float32)
    synchronize("cuda")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = cupy.zeros((8, 4), np.float32)
        for value in range(1, 6):
            for _ in range(50):  # keep the stream busy while the host runs ahead
                filler = cupy.sin(filler)
            x += 1
            total = engine({"left": x, "right": x})["sum"] + 0
            stream.synchronize()
            np.testing.assert_array_equal(total.get(), np.full((8, 4), 2.0 * value, np.float32))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_shapes_that_depend_on_the_data(make: Make, device: Any, rng: np.random.Generator, cuda_graphs: bool) -> None:
    """The indices of what is not zero, and the batch doubled: of none, of all, kept and compared later."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], name="nonzero"),
        helper.make_node("Add", ["x", "x"], ["twice"], name="add"),
    ]
    outputs = [("where", INT64, [2, None]), ("twice", FLOAT, ["N", 4])]
    engine = make(make_model(nodes, [("x", FLOAT, ["N", 4])], outputs), cuda_graphs=cuda_graphs)
    batches = [(rng.random((size, 4)) < share).astype(np.float32) for size in (5, 64, 1, 5) for share in (0.5, 0, 1)]
    found = [engine(to_device(x, device)) for x in batches]
    for x, outputs_of in zip(batches, found, strict=True):
        where = to_device(outputs_of["where"], "cpu")
        assert where.shape == (2, np.count_nonzero(x))
        np.testing.assert_array_equal(where, np.stack(np.nonzero(x)))
        np.testing.assert_array_equal(to_device(outputs_of["twice"], "cpu"), 2 * x)


@pytest.mark.needs_cuda
def test_an_output_of_unknown_shape_without_memory_for_it(
    plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = array_module("cuda")
    onnx.save(one_node("NonZero", ("x", FLOAT, ["N", 4]), ("y", INT64, [2, None])), tmp_path / "tiny.onnx")
    engine = Engine(tmp_path / "tiny.onnx", device="cuda", cache_dir=plans)
    x = cupy.ones((3, 4), np.float32)
    name = engine.outputs[0].name
    with pytest.raises(InputError, match="depends on the data"):
        engine.run({"x": x}, out={name: cupy.empty((2, 12), engine.outputs[0].dtype)})
    assert engine(x).shape == (2, 12)
    with monkeypatch.context() as patched:
        patched.setattr(memory, "acquire", _no_memory)
        with pytest.raises(MemoryLimitError, match="injected"):
            engine(x)
    np.testing.assert_array_equal(engine(x).get(), np.stack(np.nonzero(np.ones((3, 4)))))


def _no_memory(*arguments: Any, **options: Any) -> NoReturn:
    raise MemoryLimitError("injected")


@pytest.mark.needs_cuda
def test_graphs_give_what_calls_give(plans: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same arrays again and again, with new values in them, then others, then the first ones from elsewhere."""
    cupy = array_module("cuda")
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    engine = Engine(tmp_path / "tiny.onnx", device="cuda", cache_dir=plans, cuda_graphs=True)
    executor: Any = engine._executor
    kept = [(cupy.empty((n, 3, 16, 16), np.float32), cupy.empty((n, 8, 16, 16), np.float32)) for n in (1, 5)]

    def check(which: int) -> None:
        x, out = kept[which]
        values = images(rng, len(x))
        x.set(values)
        out.fill(np.nan)
        assert engine.run({"x": x}, {"y": out})["y"] is out
        np.testing.assert_allclose(out.get(), convolution_in_numpy(values), atol=1e-4)

    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for stream in (streams[0], streams[1], cupy.cuda.Stream.null):
        with stream:
            for which in (0, 0, 0, 0, 1, 1, 1, 0, 1, 1):
                check(which)
            assert any(lane._graph is not None for lanes in executor._lanes for lane in lanes)


@pytest.mark.needs_cuda
def test_graphs_of_calls_whose_memory_changes(plans: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """After some calls they are copied through memory of the engine's own, padded to the largest batch so far."""
    cupy = array_module("cuda")
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    options: dict[str, Any] = {"device": "cuda", "cache_dir": plans, "batch": (1, 4, 7), "cuda_graphs": True}
    engine = Engine(tmp_path / "tiny.onnx", **options)
    (lane, *_), *_ = (engine._executor)._lanes  # type: ignore[attr-defined]
    kept = []  # so that no memory comes again
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    launches = 0
    for index, size in enumerate([2, 2, 2, 2, 3, 2, 1, 2, 2, 2, 2, 2, 3, 1, 2, 3, 3, 5, 5, 6, 7, 7, 1, 7, 4, 4]):
        with streams[index // 20]:
            values = images(rng, size)
            x, out = cupy.asarray(values), cupy.full((size, 8, 16, 16), np.nan, np.float32)
            launches += lane._graph is not None
            assert engine.run({"x": x}, {"y": out})["y"] is out
            np.testing.assert_allclose(out.get(), convolution_in_numpy(values), atol=1e-4)
            kept.append((x, out))
    assert launches >= 8
    assert lane.stage.batch == 7


@pytest.mark.needs_cuda
def test_a_call_inside_of_a_capture(plans: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    cupy = array_module("cuda")
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    engine = Engine(tmp_path / "tiny.onnx", device="cuda", cache_dir=plans, cuda_graphs=True)
    values = images(rng, 2)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x, out = cupy.zeros_like(to_device(values, "cuda")), cupy.empty((2, 8, 16, 16), np.float32)
        for _ in range(4):
            engine.run({"x": x}, {"y": out})
        stream.begin_capture()
        engine.run({"x": x}, {"y": out})
        graph = stream.end_capture()
        x.set(values)
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_allclose(out.get(), convolution_in_numpy(values), atol=1e-4)


def product(size: int = 512) -> onnx.ModelProto:
    """x (N, size) -> y (N, size): a matrix product, whose weights are 1 MB."""
    weights = np.random.default_rng(3).standard_normal((size, size)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "weights"], ["y"], name="product")
    values = ("x", FLOAT, ["N", size]), ("y", FLOAT, ["N", size])
    return make_model([node], [values[0]], [values[1]], {"weights": weights})


@pytest.mark.needs_cuda
def test_tensorrts_memory_is_the_managers(plans: Path, tmp_path: Path) -> None:
    onnx.save(product(), tmp_path / "product.onnx")

    def used() -> int:
        return sum(ring.used_bytes for name, ring in memory.stats(device="cuda").sources.items() if name == "TensorRT")

    gc.collect()
    before = used()
    engine = Engine(tmp_path / "product.onnx", device="cuda", cache_dir=plans)
    assert used() - before >= 512 * 512 * 4
    x = array_module("cuda").ones((4, 512), np.float32)
    with array_module("cuda").cuda.Stream(non_blocking=True):
        out = engine(x)
        engine.run({"x": x}, {"y": out})
        allocations = memory.stats(device="cuda").allocations
        with memory.frozen(device="cuda"):
            for _ in range(20):
                engine.run({"x": x}, {"y": out})
        assert memory.stats(device="cuda").allocations == allocations
    loaded = used()
    del engine
    gc.collect()
    assert loaded - used() >= 512 * 512 * 4


@pytest.mark.needs_cuda
def test_no_memory_for_the_weights(plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(product(), tmp_path / "product.onnx")
    Engine(tmp_path / "product.onnx", device="cuda", cache_dir=plans)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise MemoryLimitError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "acquire", refuse)
        with pytest.raises(MemoryLimitError, match="none left"):
            Engine(tmp_path / "product.onnx", device="cuda", cache_dir=plans)
    Engine(tmp_path / "product.onnx", device="cuda", cache_dir=plans)
