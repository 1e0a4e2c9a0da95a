"""Files what ``run_gpu.py`` wrote as asv results, for ``asv compare`` and ``asv publish``.

    python asv_bench/store_gpu.py results.json --commit HASH [--machine h200]

Needs asv, and the repository with the commit that was measured. Runs of one commit under one version of Python join
in one file: a later one replaces the benchmarks that it measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from asv import environment
from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.machine import Machine
from asv.repo import get_repo
from asv.results import Results, get_filename
from asv.runner import BenchmarkResult
from run_gpu import HERE, digest


def store(written: dict[str, Any], *, commit: str, machine: str, results_dir: Path) -> Path:
    """Write or complete the results file of a commit and a machine; returns its path.

    Raises
    ------
    SystemExit
        If the benchmarks are not those that were run.
    """
    if written["sources"] != digest():
        raise SystemExit("asv_bench/benchmarks is not what was measured; check out the commit that was")
    conf = Config.load(str(HERE / "asv.conf.json"))
    conf.repo, conf.benchmark_dir = str(HERE.parent), str(HERE / "benchmarks")
    conf.results_dir = str(results_dir)
    repo = get_repo(conf)
    commit = repo.get_hash_from_name(commit)
    conf.branches = [commit]
    here = list(environment.get_environments(conf, ["existing:same"]))
    benchmarks = Benchmarks.discover(conf, repo, here, [commit])

    fields = {"machine": machine, **written["machine"]}
    about = Machine.__new__(Machine)
    about.__dict__.update(fields)
    about.save(str(results_dir))
    benchmarks.save()

    env_name = f"{machine}-py{written['python']}"
    path = results_dir / get_filename(machine, commit, env_name)
    if path.exists():
        results = Results.load(str(path), machine_name=machine)
    else:
        params = {**fields, "python": written["python"]}
        results = Results(params, {}, commit, repo.get_date(commit), written["python"], env_name, {})
    for record in written["benchmarks"]:
        if not any(record["result"]):
            continue  # n/a throughout
        values = [float("nan") if value is None else value for value in record["result"]]
        nothing = [None] * len(values)
        results.add_result(
            benchmarks[record["name"]],
            BenchmarkResult(values, nothing, nothing, 0, "", None),
            started_at=datetime.datetime.fromtimestamp(record["started_at"], datetime.timezone.utc),
            duration=record["duration"],
        )
    results.save(str(results_dir))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what run_gpu.py wrote")
    parser.add_argument("--commit", required=True, help="the commit that was measured")
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--results-dir", type=Path, default=HERE / "results")
    options = parser.parse_args()
    written = json.loads(options.results.read_text())
    path = store(written, commit=options.commit, machine=options.machine, results_dir=options.results_dir)
    print(f"{len(written['benchmarks'])} benchmarks in {path}")


if __name__ == "__main__":
    main()
