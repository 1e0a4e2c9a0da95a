"""Runs the benchmarks on a machine that has neither a git checkout nor asv, prints a table, writes JSON.

    python asv_bench/run_gpu.py --out results.json [--only preprocess]

Afterwards, where asv and the repository are: ``python asv_bench/store_gpu.py results.json --commit HASH``.
The exit status is 1 if a benchmark failed; what could be measured is written all the same.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODULES = ("preprocess", "nv12", "boxes", "masks", "draw", "warp", "eager", "decode", "encode")
MODULES += ("engine", "memory", "pipeline", "serve")
TRACK = "track_"


def digest() -> str:
    """SHA-256 of the benchmarks' sources: results are stored only under the sources that measured them."""
    together = hashlib.sha256()
    for path in sorted((HERE / "benchmarks").glob("*.py")):
        together.update(path.name.encode() + b"\0" + path.read_bytes())
    return together.hexdigest()


def benchmark_classes() -> Iterator[tuple[str, type]]:
    """Name as asv gives it, and class."""
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    for name in MODULES:
        module = importlib.import_module(f"benchmarks.{name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and tracks_of(kind):
                yield f"{name}.{kind.__name__}", kind


def tracks_of(kind: type) -> list[str]:
    return [name for name in vars(kind) if name.startswith(TRACK)]


def run_class(name: str, kind: Any, only: re.Pattern[str]) -> list[dict[str, Any]]:
    """A record for each track of a class: its values in the order of the parameters' product, None for n/a."""
    combinations = list(itertools.product(*kind.params))
    records = [
        {
            "name": f"{name}.{track}",
            "params": [[repr(value) for value in values] for values in kind.params],
            "param_names": list(kind.param_names),
            "unit": getattr(kind, track).unit,
            "started_at": time.time(),
            "result": [None] * len(combinations),
            "reasons": [None] * len(combinations),
            "failed": False,
        }
        for track in tracks_of(kind)
        if any(only.search(f"{name}.{track} {combination}") for combination in combinations)
    ]
    for index, combination in enumerate(combinations if records else ()):
        if not any(only.search(f"{record['name']} {combination}") for record in records):
            continue
        benchmark = kind()
        try:
            benchmark.setup(*combination)
        except NotImplementedError as reason:
            for record in records:
                record["reasons"][index] = str(reason)
            continue
        except Exception as error:  # a peer that breaks leaves the others their figures
            for record in records:
                _fail(record, index, error)
            continue
        for record in records:
            try:
                value = float(getattr(benchmark, record["name"].rpartition(".")[2])(*combination))
                record["result"][index] = None if math.isnan(value) else value
            except Exception as error:
                _fail(record, index, error)
        del benchmark
        gc.collect()
    for record in records:
        record["duration"] = time.time() - record["started_at"]
    return records


def _fail(record: dict[str, Any], index: int, error: Exception) -> None:
    traceback.print_exception(type(error), error, error.__traceback__)
    record["reasons"][index] = f"failed: {type(error).__name__}: {error}"
    record["failed"] = True


def print_table(record: dict[str, Any]) -> None:
    """The values, what they mean, and how each peer compares with nbvision's first."""
    has_peers = record["param_names"][-1] == "how"
    ways = len(record["params"][-1])
    print(f"\n{record['name']}, {record['unit']}")
    if not any(record["result"]) and len(set(record["reasons"])) == 1:
        print(f"  n/a: {record['reasons'][0]}")
        return
    for index, names in enumerate(itertools.product(*record["params"])):
        value, reason = record["result"][index], record["reasons"][index]
        label = "  ".join(f"{ast.literal_eval(name)!s:24}" for name in names)
        if value is None:
            print(f"  {label} {'n/a':>10}  {(reason or '').splitlines()[0][:100] if reason else ''}")
            continue
        first = record["result"][index - index % ways] if has_peers else None
        notes = [f"{value / first:6.2f} x nbvision's" if first else ""]
        if record["unit"] == "us/image":
            notes.append(f"{1e6 / value:9.0f} images/s")
        elif record["unit"] == "x the copy bound":
            notes.append(f"{100 / value:4.0f} % of the bound")
        elif record["unit"].startswith("of "):
            notes.append(f"{1 / value:6.2f} times as fast")
        print(f"  {label} {value:10.2f}  {'  '.join(filter(None, notes))}")
    sys.stdout.flush()


def machine() -> dict[str, str]:
    """What asv wants to know of a machine, and the GPU."""
    from nbvision.runtime.device import cuda_unavailable_because

    gpu = "none"
    if cuda_unavailable_because() is None:
        import cupy

        gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    system = platform.uname()
    return {
        "os": system.system,
        "arch": system.machine,
        "cpu": gpu,  # asv has no field for a GPU, and shows this one
        "num_cpu": str(len(os.sched_getaffinity(0))),
        "ram": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "numpy",
        "numba",
        "cupy-cuda13x",
        "nvidia-nvimgcodec-cu13",
        "nvidia-dali-cuda130",
        "tensorrt",
        "onnxruntime",
        "torch",
        "torchvision",
        "cvcuda-cu13",
        "cvcuda-cu12",
        "opencv-python-headless",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--only", default="", help="regular expression on module.Class.track_name (parameters)")
    options = parser.parse_args()
    only = re.compile(options.only)
    records: list[dict[str, Any]] = []
    about = {
        "sources": digest(),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "machine": machine(),
        "versions": versions(),
    }
    for name, kind in benchmark_classes():
        for record in run_class(name, kind, only):
            print_table(record)
            records.append(record)
        written = {**about, "benchmarks": records}
        options.out.write_text(json.dumps(written, indent=1) + "\n")  # after each, so that a cut-off run leaves some
    failed = [record["name"] for record in records if record["failed"]]
    print(f"\n{len(records)} benchmarks in {options.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
