"""The benchmarks measure what they say: baseline and library agree, every benchmark runs, and asv takes them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
ASV = Path(sys.executable).with_name("asv")

pytest.importorskip("cv2")


@pytest.fixture(autouse=True, scope="module")
def _paths():
    """The folders of the baseline and of the suite, which are no packages of the library."""
    added = [str(ROOT / "examples"), str(ROOT / "asv_bench")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    from nbvision.demo.catalogue import make_catalogue

    shop = make_catalogue(tmp_path_factory.mktemp("shop"), products=6, photographs=1, queries=2, seed=4)
    return [photograph.path.read_bytes() for photograph in [*shop.photographs, *shop.queries]]


@pytest.fixture(scope="module")
def recognizers():
    pytest.importorskip("onnxruntime")
    from benchmarks.pipeline import recognizers

    return recognizers("cpu, fp32")


def test_baseline_and_recognizer_agree(photographs, recognizers):
    from straightforward import agreement

    ours, theirs = (recognizer.recognize(photographs) for recognizer in recognizers)
    assert len(ours) >= len(photographs)
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=0.01)
    np.testing.assert_allclose(ours.mask_boxes, theirs.mask_boxes, atol=4)
    assert np.mean(ours.masks == theirs.masks) > 0.99
    assert np.sum(ours.vectors * theirs.vectors, axis=1).min() > 0.99
    assert agreement(ours, theirs) == 1


def test_baseline_survives_a_broken_image(photographs, recognizers):
    _, baseline = recognizers
    found = baseline.recognize([b"", photographs[0], b"<html>404</html>"])
    assert [error is None for error in found.errors] == [False, True, False]
    assert set(found.images) == {1}


def test_baseline_without_any_image(recognizers):
    found = recognizers[1].recognize([b"nothing"])
    assert len(found) == 0
    assert found.vectors.shape == (0, recognizers[0].dimension)


def test_agreement_notices_a_difference(photographs, recognizers):
    from straightforward import agreement

    one, two = (recognizers[1].recognize([photograph]) for photograph in photographs[:2])
    assert agreement(one, one) == 1
    assert agreement(one, two) < 1


def test_scenery_has_the_detail_of_a_photograph():
    from benchmarks.common import jpeg, scenery

    assert 40_000 < len(jpeg(scenery(375, 500, 0))) < 70_000


@pytest.mark.parametrize("peer", ["opencv", "torch_way"])
def test_mask_peers_give_what_nbvision_gives(peer):
    from benchmarks import masks

    to_peer = pytest.importorskip("torch").from_numpy if peer == "torch_way" else np.asarray
    size = (109, 191)
    logits, boxes = masks.masks_and_boxes(5, 28, *size)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = [to_peer(array) for array in (image, logits, boxes)]
    for what in masks.WHAT:
        ours = masks.calls(what, None, image, logits, boxes, size)()
        others = masks.calls(what, getattr(masks, peer), *theirs, size)()
        for one, other in zip(ours, others, strict=True):
            assert np.mean(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)) < 1e-3) > 0.99


@pytest.fixture
def reduced(monkeypatch, tmp_path):
    """The suite at a size for tests, on the CPU alone."""
    from benchmarks import common, decode, draw, eager, encode, masks, memory, nv12, pipeline, preprocess, serve, warp

    for module in (decode, draw, eager, encode, masks, memory, nv12, pipeline, preprocess, serve, warp):
        monkeypatch.setattr(module, "wall_us", lambda call, **_: common.wall_us(call, seconds=0))
        monkeypatch.setattr(module, "need_cuda", _no_cuda, raising=False)
    monkeypatch.setattr(decode, "SIZES", {"500x375": (37, 51), "1920x1080": (109, 191)})
    monkeypatch.setattr(decode, "BATCH", 3)
    monkeypatch.setattr(decode, "files", decode.files.__wrapped__)  # not those of another test
    monkeypatch.setattr(preprocess.LetterboxOnCPU, "side", 64)
    monkeypatch.setattr(nv12.NV12OnCPU, "side", 64)
    monkeypatch.setattr(draw.DrawOnCPU, "size", (109, 191))
    monkeypatch.setattr(masks.MasksOnCPU, "size", (109, 191))
    monkeypatch.setattr(warp.WarpOnCPU, "size", (109, 191))
    monkeypatch.setattr(eager.EagerOnCPU, "size", (109, 191))
    monkeypatch.setattr(encode.EncodeOnCPU, "size", (27, 41))
    monkeypatch.setattr(preprocess.WindowsOnCPU, "size", (109, 191))
    monkeypatch.setattr(serve.RoundTrip, "requests", 5)
    monkeypatch.setattr(serve.Protocol, "floats", 99)
    monkeypatch.setattr(pipeline.Recognize, "images", {"cpu": 2})
    monkeypatch.setattr(pipeline.RecognizeRatio, "images", {"cpu": 2})
    monkeypatch.setattr(pipeline.RecognizeRatio, "rounds", 1)
    files = common.catalogue_files
    monkeypatch.setattr(pipeline, "catalogue_files", lambda count: _drawn_at(files, count, tmp_path, monkeypatch))


def _no_cuda() -> None:
    raise NotImplementedError("left out of this test")


def _drawn_at(files, count, directory, monkeypatch):
    with monkeypatch.context() as context:
        context.setenv("NBVISION_CACHE_DIR", str(directory))
        drawn = files(count)
        assert files(count) == drawn  # the second time from the disk
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["preprocess", "nv12", "masks", "draw", "warp", "eager", "decode", "encode", "memory", "pipeline", "serve"],
)
def test_every_benchmark_runs(module, reduced, capsys):
    import run_gpu

    if module == "pipeline":
        pytest.importorskip("onnxruntime")
    only = re.compile(f"^{module}")
    records = [record for name, kind in run_gpu.benchmark_classes() for record in run_gpu.run_class(name, kind, only)]
    assert records
    for record in records:
        run_gpu.print_table(record)
        assert not record["failed"], [reason for reason in record["reasons"] if reason]
        assert len(record["result"]) == math.prod(map(len, record["params"]))
        values = [value for value in record["result"] if value is not None]
        assert all(value > 0 for value in values)
        assert bool(values) is ("OnGPU" not in record["name"]), record["reasons"]
    assert "x nbvision's" in capsys.readouterr().out


def test_a_failing_benchmark_leaves_the_others_their_figures(capsys):
    import run_gpu

    class Half:
        params = ([1, 0],)
        param_names = ("divisor",)

        def setup(self, divisor):
            pass

        def track_quotient(self, divisor):
            return 1 / divisor

        track_quotient.unit = "us"

    (record,) = run_gpu.run_class("test.Half", Half, re.compile("quotient"))
    assert record["failed"]
    assert record["result"] == [1.0, None]
    assert "ZeroDivisionError" in record["reasons"][1]
    assert run_gpu.run_class("test.Half", Half, re.compile("other")) == []


needs_asv = pytest.mark.skipif(not ASV.exists(), reason="asv is not installed beside this Python")


@needs_asv
def test_asv_accepts_the_suite():
    done = _run(ASV, "check", "-E", "existing:same", cwd=ROOT / "asv_bench")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_asv
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="results are filed under a commit")
def test_results_of_a_gpu_can_be_compared_by_asv(tmp_path):
    import run_gpu

    kind = dict(run_gpu.benchmark_classes())["preprocess.LetterboxOnCPU"]
    count = math.prod(map(len, kind.params))
    record = {
        "name": "preprocess.LetterboxOnCPU.track_us",
        "params": [[repr(value) for value in values] for values in kind.params],
        "result": [None, *range(1, count)],
        "started_at": 1.0,
        "duration": 1.0,
    }
    machine = {"os": "Linux", "arch": "x86_64", "cpu": "a GPU", "num_cpu": "2", "ram": "1"}
    written = {"sources": run_gpu.digest(), "python": "3.12", "machine": machine, "benchmarks": [record]}
    (tmp_path / "run.json").write_text(json.dumps(written))
    command = [sys.executable, ROOT / "asv_bench" / "store_gpu.py", tmp_path / "run.json", "--commit", "HEAD"]
    for _ in range(2):  # the second joins the first
        done = _run(*command, "--results-dir", tmp_path / "results", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    settings = (ROOT / "asv_bench" / "asv.conf.json").read_text()
    for name, path in {"..": ROOT, "results": tmp_path / "results"}.items():
        settings = settings.replace(json.dumps(name), json.dumps(str(path)))
    (tmp_path / "asv.conf.json").write_text(settings)
    done = _run(ASV, "compare", "--machine", "h200", "HEAD", "HEAD", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("LetterboxOnCPU.track_us") == count

    written["sources"] = "other"
    (tmp_path / "run.json").write_text(json.dumps(written))
    done = _run(*command, "--results-dir", tmp_path / "results", cwd=tmp_path)
    assert done.returncode != 0
    assert "not what was measured" in done.stderr


def _run(*command, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
