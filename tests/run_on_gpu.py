"""Run the suite on a GPU, many files at a time, and write its record.

    python tests/run_on_gpu.py --out docs/gpu-record.json [--python OTHER ...] [--sanitizer memcheck racecheck]

Each test file has a process of its own, the slow ones several.  A file that the first interpreter lacks a package for
(torch, pyarrow) runs in the first of the others that has it.  The plans of the demo's models, which several files want
and which take minutes, are built at the same time.  ``NBVISION_REQUIRE_CUDA=1`` is set: nothing is skipped for want of
a GPU.  With ``--sanitizer``, files of kernels run once more under compute-sanitizer.  Exits with 1 if a test failed,
did not end in time or was skipped, or a sanitizer found something.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import _NEEDS

from nbvision.demo.run import models_directory
from nbvision.recognizer import BATCHES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Builders and simulators of code that need no GPU, what looks at sources, and a browser's page; CI runs them.
LEFT_OUT = {f"test_{name}.py" for name in ("benchmarks", "house_rules", "serve_page", "simulator", "tensorrt")}
# Files that take longest, in how many parts, the longest first.
PARTS = {
    "test_recognizer.py": 3,
    "test_exact.py": 6,
    "test_sources.py": 4,
    "test_warp_plan.py": 3,
    "test_docs.py": 2,
    "test_open.py": 3,
    "test_serve_faults.py": 3,
}
PARTS |= {"test_window.py": 2, "test_warp.py": 2, "test_nv12.py": 2, "test_boxes.py": 1, "test_preprocess.py": 4}
KERNELS = (
    "preprocess nv12 sources pixel resample window warp warp_plan masks boxes instances draw arithmetic color crop"
)
SANITIZED_PARTS = {"test_draw.py": 4, "test_resample.py": 4, "test_window.py": 3, "test_boxes.py": 2}
SANITIZED = [f"test_{name}.py" for name in f"{KERNELS} resize".split()]


@dataclass(frozen=True)
class Job:
    """One process of pytest."""

    file: str
    python: str
    part: str = ""
    sanitizer: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.sanitizer, self.file, self.part]))


def interpreter_of(file: str, pythons: list[str]) -> str:
    """The first that has what the file needs."""
    needed = _NEEDS.get(file, ())
    code = f"import importlib.util, sys; sys.exit(any(importlib.util.find_spec(name) is None for name in {needed!r}))"
    for python in pythons:
        if subprocess.run([python, "-c", code], check=False).returncode == 0:
            return python
    raise SystemExit(f"{file} needs {', '.join(needed)}; none of {pythons} has all; name another with --python")


def jobs_of(pythons: list[str], sanitizers: list[str], only: str, sanitized: str) -> list[Job]:
    files = [path.name for path in sorted(HERE.glob("test_*.py")) if path.name not in LEFT_OUT]
    files = [file for file in files if re.search(only, file)]
    files.sort(key=lambda file: list(PARTS).index(file) if file in PARTS else len(PARTS))
    jobs = []
    for file in files:
        python, parts = interpreter_of(file, pythons), PARTS.get(file, 1)
        jobs += [Job(file, python, f"{part}/{parts}" if parts > 1 else "") for part in range(1, parts + 1)]
    for tool in sanitizers:
        for file in [file for file in SANITIZED if file in files and re.search(sanitized, file)]:
            parts = SANITIZED_PARTS.get(file, 1)
            jobs += [
                Job(file, pythons[0], f"{part}/{parts}" if parts > 1 else "", tool) for part in range(1, parts + 1)
            ]
    return jobs


def start_building_plans(python: str) -> list[subprocess.Popen[bytes]]:
    """A process for each of the demo's models; tests that want the same wait for it."""
    code = (
        "import sys; from nbvision.recognizer import load_engine; load_engine(sys.argv[1], sys.argv[2], device='cuda')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[1:], str(ROOT), str(ROOT / "kernels")])}
    command = [python, "-c", code, str(models_directory())]
    return [subprocess.Popen([*command, name], env=environment, cwd=ROOT) for name in BATCHES]


def run(job: Job, folder: Path, limit_s: float) -> dict[str, Any]:
    """What the process recorded, its time, and the end of what it printed if not all is well."""
    record = folder / f"{job.name.replace(' ', '-').replace('/', '-')}.json"
    environment = {**os.environ, "NBVISION_REQUIRE_CUDA": "1", "NBVISION_TEST_PART": job.part}
    environment |= {"NBVISION_GPU_RECORD": str(record), "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "4"}
    command = [job.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(HERE / job.file)]
    if job.sanitizer:
        tool = ["compute-sanitizer", "--tool", job.sanitizer, "--target-processes", "all", "--print-limit", "5"]
        # A tool that runs one launch at a time cannot run a test of what goes on meanwhile.
        command = [*tool, *command, "-k", "not cpu and not waits_on_the_host"]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        # SIGKILL: whoever is in the middle of a build does not listen to less.
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        printed.seek(0)
        text = printed.read()
    (found,) = json.loads(record.read_text()) if record.exists() else ({},)
    result = {"file": job.file, **({"part": job.part} if job.part else {}), **found, "exit": code}
    if job.sanitizer:
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        result |= {"sanitizer": job.sanitizer, "summary": sorted(set(summary))}
    is_well = code == 0 and found.get("passed", 0) > 0 and not found.get("skipped")
    if job.sanitizer and not all(line.startswith("0 ") for line in result["summary"] or ["none"]):
        is_well = False
    seconds = time.perf_counter() - started
    print(
        f"{'ok' if is_well else 'NOT OK':7} {job.name:40} {found.get('passed', 0):5} passed {seconds:6.0f} s",
        flush=True,
    )
    if not is_well:
        print(text[-3000:], flush=True)
    return result | {"is_well": is_well}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--python", action="append", default=[], help="another interpreter, for files that need it")
    parser.add_argument("--sanitizer", nargs="*", default=[], choices=("memcheck", "racecheck", "synccheck"))
    parser.add_argument("--only", default="", help="regular expression on the names of the files")
    parser.add_argument("--sanitized", default="", help="the same, of those that run under the sanitizers")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit-s", type=float, default=900, help="of one process")
    arguments = parser.parse_args()
    jobs = jobs_of([sys.executable, *arguments.python], arguments.sanitizer, arguments.only, arguments.sanitized)
    results: list[dict[str, Any]] = []
    builders = start_building_plans(sys.executable) if any(not job.sanitizer for job in jobs) else []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        futures = [pool.submit(run, job, Path(folder), arguments.limit_s) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            results.append(future.result())
            ordered = sorted(results, key=lambda each: (each.get("sanitizer", ""), each["file"], each.get("part", "")))
            arguments.out.write_text(
                json.dumps(ordered, indent=1) + "\n"
            )  # after each, so that a cut-off run leaves some
    for builder in builders:
        builder.wait()
    suite = [each for each in results if "sanitizer" not in each]
    counts = {key: sum(each.get(key, 0) for each in suite) for key in ("passed", "failed", "error", "skipped")}
    bad = [each["file"] for each in results if not each["is_well"]]
    print(f"{counts}; not well: {bad or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
