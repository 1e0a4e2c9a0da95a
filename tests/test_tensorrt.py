"""TensorRT-RTX's real parser and builder, which need no GPU: the models build for every target."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from test_engine import FLOAT, HALF, convolution, one_node, sum_and_product

import nbvision
from nbvision.demo.run import models_directory
from nbvision.engines._trt import TensorRT, load_tensorrt
from nbvision.engines.build import BuildOptions, build_plan
from nbvision.engines.onnx_file import read_onnx
from nbvision.engines.spec import BatchRange
from nbvision.errors import EngineError, InputError

TARGETS = [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0)]
DEMO_MODELS = sorted(models_directory().glob("*.onnx"))


@pytest.fixture
def trt() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


def options(precision: Any = "fp32", batches: tuple[BatchRange, ...] = (BatchRange(1, 4, 16),)) -> BuildOptions:
    return BuildOptions(batches, precision, 1 << 28)


def build(trt: TensorRT, path: Path, model: onnx.ModelProto, **choices: Any) -> bytes:
    onnx.save(model, path / "tiny.onnx")
    return build_plan(trt, read_onnx(path / "tiny.onnx"), options(**choices), targets=TARGETS)


def test_module_and_version(trt: TensorRT) -> None:
    assert trt.api is tensorrt_rtx
    assert trt.version[:2] >= (1, 7)
    assert str(trt).startswith("TensorRT-RTX 1.")
    assert not trt.chooses_precision


@pytest.mark.parametrize(
    "model",
    [
        convolution(),
        convolution(batch=2),
        sum_and_product(),
        one_node("Add", ("x", HALF, ["N", 6]), ("y", HALF, ["N", 6]), repeat=2),
    ],
    ids=["convolution", "fixed batch", "two inputs", "float16"],
)
@pytest.mark.parametrize("target", TARGETS, ids="sm{0[0]}{0[1]}".format)
def test_tiny_models_build(trt: TensorRT, tmp_path: Path, model: onnx.ModelProto, target: tuple[int, int]) -> None:
    onnx.save(model, tmp_path / "tiny.onnx")
    plan = build_plan(trt, read_onnx(tmp_path / "tiny.onnx"), options(), targets=[target])
    assert len(plan) > 10_000


def test_demo_models_build(trt: TensorRT) -> None:
    for path in DEMO_MODELS:
        assert len(build_plan(trt, read_onnx(path), options(), targets=TARGETS)) > 10_000, path.name


def test_the_quantized_detector_builds(trt: TensorRT, tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(0, 1, (4, 3, 320, 320)).astype(np.float32)
    nbvision.quantize(models_directory() / "detector.onnx", tmp_path / "int8.onnx", calibration=[images])
    assert len(build_plan(trt, read_onnx(tmp_path / "int8.onnx"), options(), targets=TARGETS)) > 10_000


def test_profile_reaches_the_plan(trt: TensorRT, tmp_path: Path) -> None:
    small, large = (BatchRange(1, 1, 2),), (BatchRange(1, 64, 256),)
    assert build(trt, tmp_path, convolution(), batches=small) != build(trt, tmp_path, convolution(), batches=large)


def test_a_profile_for_each_range(trt: TensorRT, tmp_path: Path) -> None:
    one, two = (BatchRange(1, 4, 16),), (BatchRange(1, 1, 1), BatchRange(2, 4, 16))
    sizes = [len(build(trt, tmp_path, convolution(), batches=batches)) for batches in (one, two)]
    assert sizes[1] > sizes[0]


def test_the_allocator_calls_back(trt: TensorRT) -> None:
    asked: list[int] = []

    def allocate(size: int) -> int:
        asked.append(size)
        return 4096

    def free(address: int) -> bool:
        asked.append(-address)
        return True

    allocator = trt.create_allocator(allocate, free)
    assert isinstance(allocator, tensorrt_rtx.IGpuAllocator)
    assert allocator.allocate_async(100, 256, 0, 0) == 4096
    assert allocator.deallocate_async(4096, 0) is True
    assert asked == [100, -4096]


def test_the_output_allocator_calls_back(trt: TensorRT) -> None:
    noted: list[Any] = []

    def allocate(size: int) -> int:
        noted.append(size)
        return 4096

    allocator = trt.create_output_allocator(allocate, noted.append)
    assert isinstance(allocator, tensorrt_rtx.IOutputAllocator)
    assert allocator.reallocate_output("y", 0, 100, 256) == 4096
    assert allocator.reallocate_output_async("y", 0, 200, 256, 0) == 4096
    allocator.notify_shape("y", tensorrt_rtx.Dims([2, 5]))
    assert noted == [100, 200, (2, 5)]


def test_an_interrupted_build_ends_with_the_interruption(trt: TensorRT, tmp_path: Path) -> None:
    """TensorRT swallows what its callbacks raise: Ctrl-C in the middle of a long build would be lost."""

    class Interrupting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("TensorRT:"):
                raise KeyboardInterrupt

    handler, log = Interrupting(), logging.getLogger("nbvision")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(trt, tmp_path, convolution())
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert build(trt, tmp_path, convolution())


def test_float16_comes_from_the_file(trt: TensorRT, tmp_path: Path) -> None:
    half = one_node("Relu", ("x", HALF, ["N", 6]), ("y", HALF, ["N", 6]))
    assert build(trt, tmp_path, half, precision="fp16")
    with pytest.raises(EngineError, match="holds no float16"):
        build(trt, tmp_path, convolution(), precision="fp16")


def test_errors_name_node_and_operator(trt: TensorRT, tmp_path: Path) -> None:
    values = ("x", FLOAT, ["N", 4]), ("y", FLOAT, ["N", 4])
    with pytest.raises(EngineError, match=r"node 0 'the_nosuch' \(operator NoSuch\)"):
        build(trt, tmp_path, one_node("NoSuch", *values))


def test_only_the_batch_may_be_dynamic(trt: TensorRT, tmp_path: Path) -> None:
    sizes = ["N", 3, "H", "W"]
    with pytest.raises(EngineError, match="only the batch may be dynamic"):
        build(trt, tmp_path, one_node("Relu", ("x", FLOAT, sizes), ("y", FLOAT, sizes)))


def test_unknown_target(trt: TensorRT, tmp_path: Path) -> None:
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    with pytest.raises(InputError, match=r"SM 9\.0; expected one of .*SM89"):
        build_plan(trt, read_onnx(tmp_path / "tiny.onnx"), options(), targets=[(9, 0)])


def test_messages_go_to_python_logging(trt: TensorRT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nbvision")
    trt.logger.log(tensorrt_rtx.ILogger.WARNING, "mind the gap")
    assert ("nbvision", logging.WARNING, "TensorRT: mind the gap") in caplog.record_tuples
    trt.take_reason()
    trt.logger.log(tensorrt_rtx.ILogger.ERROR, "it broke")
    assert trt.take_reason() == "it broke"
    trt.logger.log(tensorrt_rtx.ILogger.WARNING, "mind the gap")
    assert trt.take_reason() == "mind the gap"
    assert "no reason" in trt.take_reason()
    caplog.clear()
    build(trt, tmp_path, convolution())
    assert "tiny.onnx: TensorRT-RTX" in caplog.text
