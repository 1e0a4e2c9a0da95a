"""Shared fixtures: one test body over both devices.

Without a GPU the ``cuda`` half of each test is skipped.  With ``NBVISION_REQUIRE_CUDA=1`` it runs whatever happens,
so a job on a GPU machine cannot go green by skipping.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator

# Two test processes share the cores: threads that wait for each other by spinning would take them from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest

from nbvision.runtime.device import cuda_unavailable_because

# Files about an optional peer are collected only where the peer is installed; the header says which were left out.
_SERVICE = ("fastapi", "uvicorn", "httptools", "orjson", "python_multipart", "prometheus_client", "yaml", "httpx")
_NEEDS = {
    "test_benchmarks.py": ("asv",),
    "test_compile.py": ("numba_cuda",),
    "test_examples.py": (*_SERVICE, "onnxruntime"),
    "test_house_rules.py": ("ruff",),
    "test_parquet.py": ("pyarrow",),
    "test_rle.py": ("pycocotools",),
    "test_serve.py": (*_SERVICE, "grpc", "tritonclient", "opentelemetry"),
    "test_serve_cache.py": ("httpx",),
    "test_serve_faults.py": _SERVICE,
    "test_serve_fuzz.py": (*_SERVICE, "schemathesis", "tritonclient"),
    "test_serve_page.py": (*_SERVICE, "playwright"),
    "test_simulator.py": ("numba_cuda",),
    "test_tensorrt.py": ("tensorrt_rtx",),
    "test_torch.py": ("torch",),
}
_MISSING = {file: [name for name in names if importlib.util.find_spec(name) is None] for file, names in _NEEDS.items()}
collect_ignore = [file for file, missing in _MISSING.items() if missing]

REQUIRE_CUDA = os.environ.get("NBVISION_REQUIRE_CUDA") == "1"


def pytest_report_header() -> list[str]:
    reason = cuda_unavailable_because()
    lines = [f"cuda: {'available' if reason is None else reason}"]
    lines += [f"not collected: {file} ({', '.join(_MISSING[file])} not installed)" for file in collect_ignore]
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, _, parts = os.environ.get("NBVISION_TEST_PART", "").partition("/")
    if parts:  # every so manieth test, for run_on_gpu.py
        config.hook.pytest_deselected(
            items=[item for index, item in enumerate(items) if index % int(parts) != int(part) - 1]
        )
        items[:] = items[int(part) - 1 :: int(parts)]
    if REQUIRE_CUDA or cuda_unavailable_because() is None:
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "needs_cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Both devices in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A service logs all to stderr from when it starts, and that of one test is closed in the next."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261123)


# --- the record of a run on a GPU -------------------------------------------------------------------------------------

RECORD = os.environ.get("NBVISION_GPU_RECORD")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write ``NBVISION_GPU_RECORD``: what ran where, in numbers, for docs/gpu-record.json."""
    if RECORD is None:
        return
    import json
    import pathlib
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import cupy

    versions = {"python": platform.python_version()}
    for name in ("numpy", "numba", "numba-cuda", "cupy-cuda13x", "nvidia-nvimgcodec-cu13", "tensorrt", "onnxruntime"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    runtime = cupy.cuda.runtime
    record = {
        "commit": os.environ.get("NBVISION_COMMIT", "unknown"),
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "driver": _nvidia_driver(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "versions": versions,
        "require_cuda": REQUIRE_CUDA,
        "not_collected": collect_ignore,
        **{outcome: len(stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped", "xfailed")},
        "not_passed": [
            report.nodeid for outcome in ("failed", "error", "skipped") for report in stats.get(outcome, [])
        ],
    }
    path = pathlib.Path(RECORD)
    runs = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*runs, record], indent=1) + "\n")


def _nvidia_driver() -> str:
    import pathlib
    import re

    text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else text.splitlines()[0]
