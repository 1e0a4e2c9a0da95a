"""What the cores, the SMs and the JPEG engine do while batches stream from files to a model's input, over time.

    python asv_bench/timeline.py --out timeline.json          # on a machine with a GPU
    python asv_bench/timeline.py --draw timeline.json --out docs/timeline.png    # anywhere; needs matplotlib

Of each size twice for a few seconds: decoding alone, and with ``Preprocess`` to 224 x 224 behind it.  NVML is asked for
the GPU's part, the system for this process' time on the cores.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.decode import BATCHES, MEAN, SIZES, STD, files

EVERY_S = 0.05


class Nvml:
    """What NVML says of the first GPU, in percent."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._library.nvmlInit_v2()
        self._library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device))

    def sm(self) -> float:
        class Utilization(ctypes.Structure):
            _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))

        found = Utilization()
        self._library.nvmlDeviceGetUtilizationRates(self._device, ctypes.byref(found))
        return float(found.gpu)

    def jpeg_engine(self) -> float:
        value, period_us = ctypes.c_uint(), ctypes.c_uint()
        self._library.nvmlDeviceGetJpgUtilization(self._device, ctypes.byref(value), ctypes.byref(period_us))
        return float(value.value)


def measured(name: str, step: Callable[[], int], *, seconds: float) -> dict[str, Any]:
    """Samples of one way to work; ``step`` does a batch and returns how many images it had."""
    import cupy

    for _ in range(8):
        step()
    cupy.cuda.Device().synchronize()
    nvml, samples, done, stop = Nvml(), [], [0], threading.Event()

    def sample() -> None:
        before = (time.perf_counter(), time.process_time(), done[0])
        while not stop.wait(EVERY_S):
            now = (time.perf_counter(), time.process_time(), done[0])
            passed_s = now[0] - before[0]
            cores, rate = (now[1] - before[1]) / passed_s, (now[2] - before[2]) / passed_s
            samples.append([now[0] - started, cores, nvml.sm(), nvml.jpeg_engine(), rate])
            before = now

    started = time.perf_counter()
    sampler = threading.Thread(target=sample)
    sampler.start()
    while time.perf_counter() < started + seconds:
        done[0] += step()
    cupy.cuda.Device().synchronize()
    elapsed_s = time.perf_counter() - started
    stop.set()
    sampler.join()
    return {"name": name, "images_per_s": done[0] / elapsed_s, "samples": samples}


def ways(paths: list[str], size: str) -> dict[str, Callable[[], int]]:
    """Batches without end, from files."""
    import nbvision as nbv

    batches = [paths[start : start + BATCHES[size]] for start in range(0, len(paths), BATCHES[size])]
    plan = nbv.Preprocess((224, 224), fit="stretch", dtype="float16", scale=1 / 255, mean=MEAN, std=STD)

    def decode(*, shrink: bool) -> Callable[[], int]:
        stream = nbv.Decoder(device="cuda").stream(itertools.cycle(batches))

        def step() -> int:
            images = next(stream)[1]
            if shrink:
                plan(images)
            return len(images)

        return step

    return {f"{size}, decode": decode(shrink=False), f"{size}, decode, then Preprocess": decode(shrink=True)}


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    runs = record["runs"]
    figure, columns = plt.subplots(
        3, len(runs), figsize=(3.6 * len(runs) + 1, 6), sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    for (top, middle, bottom), run in zip(columns.T, runs, strict=True):
        seconds, cores, sm, engine, rate = zip(*run["samples"], strict=True)
        top.plot(seconds, rate)
        top.set(title=f"{run['name']}\n{run['images_per_s']:,.0f} images/s", ylim=0)
        middle.fill_between(seconds, cores, alpha=0.6)
        middle.set(ylim=(0, record["cores"]))
        bottom.plot(seconds, engine, label="JPEG engine")
        bottom.plot(seconds, sm, label="SMs")
        bottom.set(ylim=(0, 105), xlabel="seconds")
    for axes, label in zip(
        columns[:, 0], ("images/s", f"cores of {record['cores']}", "% of the time busy"), strict=True
    ):
        axes.set_ylabel(label)
    columns[2, 0].legend()
    figure.suptitle(f"JPEGs from files, {record['gpu']}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", type=Path, help="what another run wrote")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.draw.read_text()), arguments.out)
        return
    import cupy

    runs = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / f"{index}.jpg") for index in range(4 * BATCHES[size])]
            for path, data in zip(paths, files(size, len(paths)), strict=True):
                Path(path).write_bytes(data)
            runs += [measured(*way, seconds=arguments.seconds) for way in ways(paths, size).items()]
    record = {
        "gpu": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "cores": len(os.sched_getaffinity(0)),
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(record))
    for run in runs:
        print(f"{run['name']:40} {run['images_per_s']:10,.0f} images/s")


if __name__ == "__main__":
    main()
