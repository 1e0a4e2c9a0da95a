"""profile_engine(): points for every batch and precision, which are times and not hopes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from test_engine import convolution, sum_and_product

import nbvision as nbv
from nbvision.engines.engine import Engine
from nbvision.errors import InputError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(convolution(), tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


def test_a_point_for_each_batch_and_precision(model: Path, device: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    profile = nbv.profile_engine(
        model, precisions=("fp32", "fp16"), batches=[4, 1, 4], seconds=0.02, device=device, progress=seen.append
    )
    assert seen == profile.times
    assert [(point.precision, point.batch) for point in profile.times] == [
        ("fp32", 1),
        ("fp32", 4),
        ("fp16", 1),
        ("fp16", 4),
    ]
    assert all(0 < point.p50_ms <= point.p99_ms for point in profile.times)
    profile.save(tmp_path / "profile.json")
    written = json.loads((tmp_path / "profile.json").read_text())
    assert written["digest"] == Engine(model, device="cpu").digest
    assert [point["p50_ms"] for point in written["times"]] == [point.p50_ms for point in profile.times]
    assert str(profile).count("fp16") == 2


def test_it_measures_what_a_call_takes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of 3 ms and 1 ms an item; warm-up, which is slower still, does not count."""
    calls: dict[int, int] = {}
    run = Engine.run

    def slow(self: Engine, inputs: Any, *arguments: Any, **options: Any) -> Any:
        size = next(iter(inputs.values())).shape[0]
        calls[size] = calls.get(size, 0) + 1
        time.sleep(0.003 + 0.001 * size + 0.05 * (calls[size] == 1))
        return run(self, inputs, *arguments, **options)

    monkeypatch.setattr(Engine, "run", slow)
    small, large = nbv.profile_engine(model, batches=(1, 8), seconds=0.1, device="cpu").times
    assert 4 <= small.p50_ms < 11
    assert 11 <= large.p50_ms < 25
    assert small.p99_ms < 40
    assert large.items_per_s == pytest.approx(8 / large.p50_ms * 1e3)
    assert min(calls.values()) >= 8


def test_models_of_a_fixed_batch_and_of_several_inputs(tmp_path: Path) -> None:
    for graph, batches in ((convolution(batch=2), [2]), (sum_and_product(), [1, 3])):
        onnx.save(graph, tmp_path / "other.onnx")
        profile = nbv.profile_engine(tmp_path / "other.onnx", batches=(1, 3), seconds=0, device="cpu")
        assert [point.batch for point in profile.times] == batches


@pytest.mark.parametrize("batches", [[], [0], [1, -3], [2.5]])
def test_batches_that_are_none(model: Path, batches: Any) -> None:
    with pytest.raises(InputError, match="expected one or more positive integers"):
        nbv.profile_engine(model, batches=batches, device="cpu")
    with pytest.raises(InputError, match="precisions are empty"):
        nbv.profile_engine(model, precisions=(), device="cpu")
