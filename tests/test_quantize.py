"""quantize(): files that ONNX Runtime and TensorRT take, near the original, and a report that is true."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from reference import on, to_host
from test_engine import FLOAT, convolution, make_model, sum_and_product

import nbvision as nbv
from nbvision.demo.catalogue import make_catalogue
from nbvision.demo.run import models_directory
from nbvision.engines._trt import load_tensorrt
from nbvision.errors import EngineError, InputError


def batches(count: int = 6, size: int = 4, seed: int = 0) -> Iterator[Any]:
    """Smooth, as images are; of all values from -1 to 1."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        coarse = rng.uniform(-1, 1, (size, 3, 4, 4)).astype(np.float32)
        yield coarse.repeat(4, axis=2).repeat(4, axis=3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(convolution(), path)
    return path


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# --- what it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_it_computes_nearly_the_same(model: Path, tmp_path: Path, method: Any, capsys: Any) -> None:
    written = tmp_path / "new folder" / "int8.onnx"
    report = nbv.quantize(model, written, calibration=batches(), method=method)
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators(written))
    original, quantized = nbv.Engine(model, device="cpu"), nbv.Engine(written, device="cpu")
    assert quantized.inputs == original.inputs
    assert [spec.name for spec in quantized.outputs] == [spec.name for spec in original.outputs]
    assert quantized.metadata == original.metadata
    (x,) = batches(1, seed=9)
    difference = np.abs(quantized(x) - original(x))
    assert 0 < difference.max() < 0.05 * original(x).max()
    assert report.calibration_items == 24
    assert capsys.readouterr() == ("", "")


def test_the_percentile_cuts_outliers_off(model: Path, tmp_path: Path) -> None:
    data = list(batches(8, size=8))
    data[3][0, 0, 0, 0] = 50.0  # one of 49,152
    errors = [
        nbv.quantize(model, tmp_path / "int8.onnx", calibration=data, validation=batches(2, seed=5), method=method)
        for method in ("minmax", "percentile")
    ]
    assert errors[1].outputs[0].relative_rms < 0.2 * errors[0].outputs[0].relative_rms


def test_zero_is_exact_and_weights_have_a_scale_for_each_channel(model: Path, tmp_path: Path) -> None:
    nbv.quantize(model, tmp_path / "int8.onnx", calibration=batches())
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    assert all(not value.any() for name, value in constants.items() if name.endswith("zero_point"))
    assert any(value.shape == (8,) for name, value in constants.items() if name.endswith("scale"))


def test_several_inputs(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    rng = np.random.default_rng(3)
    weights = {"w": rng.standard_normal((4, 6)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["left", "w"], ["a"], name="matmul"),
        helper.make_node("Gemm", ["right", "w"], ["b"], name="gemm"),
        helper.make_node("Add", ["a", "b"], ["sum"], name="add"),
        helper.make_node("Sub", ["a", "b"], ["difference"], name="sub"),
    ]
    values = [(name, FLOAT, ["N", 4]) for name in ("left", "right")]
    outputs = [(name, FLOAT, ["N", 6]) for name in ("sum", "difference")]
    onnx.save(make_model(nodes, values, outputs, weights), path)
    data = [{name: rng.uniform(-2, 2, (5, 4)).astype(np.float32) for name in ("left", "right")} for _ in range(4)]
    report = nbv.quantize(path, tmp_path / "int8.onnx", calibration=data)
    assert [output.name for output in report.outputs] == ["sum", "difference"]
    assert max(output.relative_rms for output in report.outputs) < 0.03
    with pytest.raises(InputError, match="several inputs"):
        nbv.quantize(path, tmp_path / "int8.onnx", calibration=[data[0]["left"]])


def test_excluded_nodes_stay_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: (rng.standard_normal((3, 3, 3, 3)) / 5).astype(np.float32) for name in ("w0", "w1")}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["between"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["between", "w1"], ["y"], name="last", pads=[1, 1, 1, 1]),
    ]
    path = tmp_path / "two.onnx"
    onnx.save(make_model(nodes, [("x", FLOAT, ["N", 3, 16, 16])], [("y", FLOAT, ["N", 3, 16, 16])], weights), path)
    nbv.quantize(path, tmp_path / "all.onnx", calibration=batches())
    nbv.quantize(path, tmp_path / "some.onnx", calibration=batches(), exclude=["last"])
    names = {tensor.name for tensor in onnx.load(tmp_path / "some.onnx").graph.initializer}
    assert "w1" in names
    assert "w0" not in names
    assert operators(tmp_path / "some.onnx").count("QuantizeLinear") < operators(tmp_path / "all.onnx").count(
        "QuantizeLinear"
    )
    with pytest.raises(InputError, match=r"\['middle'\]"):
        nbv.quantize(path, tmp_path / "none.onnx", calibration=batches(), exclude=["middle"])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the demo's detector is given: batches of its catalogue's images."""
    catalogue = make_catalogue(tmp_path_factory.mktemp("shop"), products=8, photographs=4, queries=12, seed=6)
    files = [image.path for image in (*catalogue.photographs, *catalogue.queries)]
    size = nbv.Engine(models_directory() / "detector.onnx", device="cpu").inputs[0].shape[2:]
    plan = nbv.Preprocess(size, scale=1 / 255)
    return [plan(nbv.decode(files[start : start + 4], device="cpu"))[0] for start in range(0, len(files), 4)]


def test_the_demos_detector(photographs: list[Any], tmp_path: Path) -> None:
    detector = models_directory() / "detector.onnx"
    calls = []

    def highest_score(engine: nbv.Engine) -> float:
        calls.append(engine.digest)
        outputs = engine.run({engine.inputs[0].name: photographs[-1]})
        return float(max(array.max() for array in outputs.values()))

    report = nbv.quantize(
        detector,
        tmp_path / "int8.onnx",
        calibration=photographs[:-1],
        validation=photographs[-1:],
        metric=highest_score,
    )
    assert report.size_bytes[1] < 0.5 * report.size_bytes[0]
    assert all(output.cosine > 0.98 for output in report.outputs), str(report)
    assert len(set(calls)) == 2
    before, after = report.metric
    assert after == pytest.approx(before, rel=0.1)


def test_each_device_runs_it(device: Any, photographs: list[Any], tmp_path: Path) -> None:
    detector, images = models_directory() / "detector.onnx", photographs[-1]
    nbv.quantize(detector, tmp_path / "int8.onnx", calibration=photographs[:-1])
    exact = nbv.Engine(detector, device="cpu")(images).ravel()
    if device == "cuda" and importlib.util.find_spec("tensorrt") and load_tensorrt("tensorrt").version < (9,):
        with pytest.raises(EngineError, match="cannot build it"):  # an assertion of TensorRT 8.5's own fails
            nbv.Engine(tmp_path / "int8.onnx", device=device, batch=(1, 4, 4))
        return
    int8 = to_host(nbv.Engine(tmp_path / "int8.onnx", device=device, batch=(1, 4, 4))(on(device, images))).ravel()
    assert exact @ int8 / np.linalg.norm(exact) / np.linalg.norm(int8) > 0.98


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_is_true(model: Path, tmp_path: Path) -> None:
    written = tmp_path / "int8.onnx"
    looked_at = list(batches(3, seed=5))
    report = nbv.quantize(model, written, calibration=batches(), validation=looked_at)
    x = np.concatenate(looked_at)
    expected, got = (nbv.Engine(path, device="cpu", batch=(1, 1, 64))(x).astype(float) for path in (model, written))
    (output,) = report.outputs
    assert output.name == "y"
    assert output.largest == pytest.approx(np.abs(expected - got).max())
    assert output.relative_rms == pytest.approx(np.sqrt(((expected - got) ** 2).mean() / (expected**2).mean()))
    assert output.cosine == pytest.approx((expected * got).sum() / np.sqrt((expected**2).sum() * (got**2).sum()))
    assert report.size_bytes == (model.stat().st_size, written.stat().st_size)
    assert report.metric is None
    assert min(report.ms_per_batch) > 0


def test_it_is_printed_and_written(model: Path, tmp_path: Path) -> None:
    report = nbv.quantize(model, tmp_path / "int8.onnx", calibration=batches(), metric=lambda engine: 0.75)
    text = str(report)
    for part in ("tiny.onnx -> int8.onnx", "24 items", "metric    0.7500 -> 0.7500", "y: relative RMS error 0.0"):
        assert part in text
    report.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["outputs"][0]["relative_rms"] == report.outputs[0].relative_rms
    assert read["metric"] == [0.75, 0.75]


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = np.linspace(-1, 1, 768, dtype=np.float32).reshape(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "holds no batch"),
        ([np.zeros_like(GOOD)] * 3, "every value of the calibration is the same"),
        ([GOOD, np.full_like(GOOD, np.nan)], r"calibration\[1\] holds values that are not finite"),
        ([GOOD.astype(np.float64)], "float64"),
        ([GOOD[:, :, :8]], r"expected 'x' float32"),
        ([GOOD[:0]], "not empty"),
        ([{"z": GOOD}], r"has the names \['z'\]; expected \['x'\]"),
        ([[1.0]], "is a list"),
    ],
    ids=["none", "constant", "nan", "dtype", "shape", "empty", "name", "list"],
)
def test_data_that_is_none(model: Path, tmp_path: Path, data: Any, said: str) -> None:
    written = tmp_path / "out" / "int8.onnx"
    with pytest.raises(InputError, match=said):
        nbv.quantize(model, written, calibration=data)
    assert list(written.parent.iterdir()) == []


def test_validation_of_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="validation holds no batch"):
        nbv.quantize(model, tmp_path / "int8.onnx", calibration=batches(), validation=[])


def test_a_metric_that_fails_leaves_the_old_file(model: Path, tmp_path: Path) -> None:
    written = tmp_path / "int8.onnx"
    written.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        nbv.quantize(model, written, calibration=batches(), metric=lambda engine: 1 / 0)
    assert written.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "tiny.onnx"]


def test_unknown_method(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'median'; expected one of"):
        nbv.quantize(model, tmp_path / "int8.onnx", calibration=batches(), method="median")  # type: ignore[arg-type]


def test_files_that_are_no_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        nbv.quantize(broken, tmp_path / "int8.onnx", calibration=batches())


def test_a_model_with_nothing_to_quantize(tmp_path: Path) -> None:
    onnx.save(sum_and_product(), tmp_path / "two.onnx")
    data = [dict.fromkeys(("left", "right"), np.eye(4, dtype=np.float32))]
    with pytest.raises(EngineError, match="none of the layers Conv"):
        nbv.quantize(tmp_path / "two.onnx", tmp_path / "int8.onnx", calibration=data)


def test_an_old_opset_is_named(tmp_path: Path) -> None:
    old = convolution()
    old.opset_import[0].version = 11
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(EngineError, match="opset 11"):
        nbv.quantize(tmp_path / "old.onnx", tmp_path / "int8.onnx", calibration=batches())
