"""A process for each GPU of one host: how much more they do together than one alone.

    python asv_bench/gpus.py --out gpus.json [--seconds 4]

Each process has a GPU and its share of the cores to itself, alone, too, and takes JPEGs of 1280 x 720 through decode,
``Preprocess`` to 224 x 224 and a ResNet-18 of torch in float16 to answers on the host.  Afterwards one process uses all
GPUs in turns, to see that each has a memory manager of its own and the same values.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any


def work(gpu: int, cores: list[int], seconds: float, start: Any, rates: Any) -> None:
    """Images a second, from when all processes are ready."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    os.sched_setaffinity(0, cores)
    import torch
    from benchmarks.pipeline import BATCH, photographs

    import nbvision as nbv

    module = torch_module(torch)
    plan = nbv.Preprocess((224, 224), fit="stretch", scale=1 / 255, dtype="float16")
    stages = {"preprocess": lambda images: plan(images)[0], "model": module, "answer": lambda y: y.get()}
    files = photographs()
    with nbv.Decoder(device="cuda") as decoder:
        pipeline = nbv.Pipeline(stages)

        def run(batches: int) -> None:
            for _ in pipeline.stream(images for _, images in decoder.stream([files] * batches)):
                pass

        run(8)
        start.wait()
        done, started_s = 0, time.perf_counter()
        while time.perf_counter() < started_s + seconds:
            run(16)
            done += 16 * BATCH
        rates.put((gpu, done / (time.perf_counter() - started_s)))


def torch_module(torch: Any) -> Any:
    """A ResNet-18 on the stage's stream, from and to CuPy's arrays."""
    import cupy
    from torchvision.models import resnet18

    module = resnet18(num_classes=10).cuda().half().eval()

    def model(x: Any) -> Any:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)):
            return cupy.from_dlpack(module(torch.from_dlpack(x)))

    return model


def rates_of(gpus: list[int], shares: list[list[int]], seconds: float) -> dict[int, float]:
    spawn = multiprocessing.get_context("spawn")
    start, rates = spawn.Barrier(len(gpus)), spawn.Queue()
    processes = [spawn.Process(target=work, args=(gpu, shares[gpu], seconds, start, rates)) for gpu in gpus]
    for process in processes:
        process.start()
    found = dict(rates.get(timeout=120 + 10 * seconds) for _ in processes)
    for process in processes:
        process.join()
    return found


def in_one_process(count: int) -> dict[str, Any]:
    """Every GPU in turns: what its own manager holds, and whether the values are the same."""
    import cupy
    import numpy as np
    from benchmarks.pipeline import photographs

    import nbvision as nbv

    results, held = [], []
    for gpu in range(count):
        with cupy.cuda.Device(gpu), nbv.memory.source(f"film of GPU {gpu}"):
            plan = nbv.Preprocess((224, 224), fit="stretch", scale=1 / 255, dtype="float16")
            images = nbv.decode(photographs(), device="cuda", deterministic=True)
            x, _ = plan(images)
            assert x.device.id == gpu
            results.append(x.get())
            stats = nbv.memory.stats(device="cuda")
            held.append({name: ring.held_bytes for name, ring in stats.sources.items()})
    return {"equal": all(np.array_equal(results[0], other) for other in results), "held_bytes": held}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    import cupy

    lost: list[Any] = []
    sys.unraisablehook = lost.append  # such as of memory that is let go while another GPU is the current one
    count = cupy.cuda.runtime.getDeviceCount()
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // count
    shares = [cores[gpu * each : (gpu + 1) * each] for gpu in range(count)]
    alone = [rates_of([gpu], shares, arguments.seconds)[gpu] for gpu in range(count)]
    together = rates_of(list(range(count)), shares, arguments.seconds)
    names = [cupy.cuda.runtime.getDeviceProperties(gpu)["name"].decode() for gpu in range(count)]
    report = {"gpus": names, "cores_each": each, "alone": alone, "together": [together[gpu] for gpu in range(count)]}
    report["times_one"] = sum(report["together"]) / (sum(alone) / count)
    report["one_process"] = in_one_process(count) | {"errors": [str(error.exc_value) for error in lost]}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
