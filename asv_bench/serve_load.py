"""Whole services beside each other: what ``nbvision serve`` costs a request, and what it answers in time.

    python asv_bench/serve_load.py --out serve-load.json [--device cuda] [--deadline-ms 40] [--picture serve-load.png]

First one client that asks for one thing after another: a pipeline that does nothing, where the answer takes what the
service itself takes, and the demo's recognizer, beside the same recognizer called without a service, in turns.

Then clients that ask at any time (Poisson), each for another photograph, at higher and higher rates, whether or not
earlier ones are answered: ``nbvision serve`` as it is, perhaps with several workers, one image at a time, and
``examples/straightforward_service.py`` (FastAPI, OpenCV, one image at a time). The rate of a service is the highest at
which 99 % of all answers came within the deadline. ``--bursts 8 16`` asks each service once more, so many at a time, at
0.8, 1 and 1.5 times its rate.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import functools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import ROOT, catalogue_files
from benchmarks.serve import CONFIG, PICTURE_BYTES, Client, nbvision_service, one_after_another, running

from nbvision.batching.simulator import arrivals
from nbvision.runtime.device import resolve_device
from nbvision.serve.config import read_config
from nbvision.serve.pipelines import PIPELINES, Pipeline

IN_TIME = 0.99
STEP = 1.25  # from one rate to the next
BEYOND = 0.7  # in time: no higher rates are of interest
BURST_SHARES = (0.8, 1.0, 1.5)  # of that rate
WARM_UP_S = 1.0
WARM_UP_CALLS = 8

GARMENTS = """
cache_bytes: 0
concurrency: 4096
pipelines:
  garments: {{kind: recognizer, device: {device}, max_batch: {max_batch}, {more}}}
"""


# --- load ------------------------------------------------------------------------------------------------------------


async def at_any_time(
    port: int, files: Sequence[bytes], *, rate: float, seconds: float, deadline_ms: float, burst: int = 1, seed: int = 1
) -> tuple[list[float], dict[int, int]]:
    """Ask whether or not earlier requests are answered: the milliseconds of the answers, and how often each status."""
    client = Client(port)
    count = math.ceil(rate * seconds)
    times_ms: list[float] = []
    statuses: dict[int, int] = {}
    started_s = time.perf_counter()

    async def one(number: int, due_s: float) -> None:
        data = files[(number + seed * 37) % len(files)]
        status = await client.ask("POST", f"/v1/garments?deadline_ms={deadline_ms:g}", data)
        statuses[status] = statuses.get(status, 0) + 1
        if status == 200:  # from when it was due: a client that is late must not make the service look better
            times_ms.append((time.perf_counter() - due_s) * 1e3)

    tasks = []
    for number, at_s in enumerate(arrivals(rate, count, burst=burst, seed=seed)):
        due_s = started_s + at_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number, due_s)))
    await asyncio.gather(*tasks)
    client.close()
    return times_ms, statuses


class Clients:
    """Processes that ask together: one alone could ask for no more than it can read itself."""

    def __init__(self, count: int, images: int) -> None:
        self._count = count
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, spawn, initializer=_draw_files, initargs=(images,))

    def ask(self, port: int, *, rate: float, seconds: float, deadline_ms: float, burst: int = 1) -> Any:
        """What becomes of requests at a rate: the sum of what comes at any time does so as well."""
        asked = {"rate": rate / self._count, "seconds": seconds, "deadline_ms": deadline_ms, "burst": burst}
        runs = list(self._pool.map(functools.partial(_ask, port, asked), range(1, self._count + 1)))
        times_ms = [time_ms for times_ms, _ in runs for time_ms in times_ms]
        statuses: collections.Counter[int] = collections.Counter()
        for _, found in runs:
            statuses.update(found)
        count = sum(statuses.values())
        in_time = sum(time_ms <= deadline_ms for time_ms in times_ms)
        return {
            "rate_per_s": rate,
            "burst": burst,
            "requests": count,
            "share_in_time": in_time / count,
            "in_time_per_s": in_time / seconds,
            "p50_ms": float(np.quantile(times_ms, 0.5)) if times_ms else None,
            "p99_ms": float(np.quantile(times_ms, 0.99)) if times_ms else None,
            "statuses": statuses,
        }

    def close(self) -> None:
        self._pool.shutdown()


_files: list[bytes] = []


def _draw_files(images: int) -> None:
    _files[:] = catalogue_files(images)


def _ask(port: int, asked: dict[str, float], seed: int) -> tuple[list[float], dict[int, int]]:
    return asyncio.run(at_any_time(port, _files, seed=seed, **asked))


# --- the two questions ------------------------------------------------------------------------------------------------


def overhead(device: str, files: Sequence[bytes], *, count: int) -> dict[str, float]:
    """Median milliseconds at batch 1, with a service and without one, picture by picture in turns.

    In turns, for a call takes milliseconds less right after another than after a pause.
    """
    with nbvision_service(GARMENTS.format(device=device, max_batch=1, more="in_flight: 1")) as (port, path):
        config = read_config(path).pipelines["garments"]
        pipeline = PIPELINES[config.kind](**config.options)
        served_ms, alone_ms = asyncio.run(_in_turns(port, pipeline, files, count))
        pipeline.close()
    with nbvision_service(CONFIG) as (port, _):
        picture = [bytes(PICTURE_BYTES)]
        asyncio.run(one_after_another(port, "/v1/nothing", picture, 100))
        empty = asyncio.run(one_after_another(port, "/v1/nothing", picture, 1000))
    return {
        "recognizer_in_service_ms": statistics.median(served_ms),
        "recognizer_alone_ms": statistics.median(alone_ms),
        "difference_ms": float(statistics.median(np.subtract(served_ms, alone_ms))),
        "service_alone_ms": statistics.median(empty),
    }


async def _in_turns(
    port: int, pipeline: Pipeline, files: Sequence[bytes], count: int
) -> tuple[list[float], list[float]]:
    client = Client(port)
    served_ms, alone_ms = [], []
    for number in range(-WARM_UP_CALLS, count):
        data = files[number % len(files)]
        started_s = time.perf_counter()
        await client.ask("POST", "/v1/garments", data)
        answered_s = time.perf_counter()
        pipeline.run([data])
        if number >= 0:
            served_ms.append((answered_s - started_s) * 1e3)
            alone_ms.append((time.perf_counter() - answered_s) * 1e3)
    client.close()
    return served_ms, alone_ms


def at_rates(
    port: int, clients: Clients, rates: Sequence[float], *, seconds: float, deadline_ms: float
) -> tuple[float, list[Any]]:
    """What comes of each of some rates, and the highest of which 99 % came in time, 0 if none did."""
    clients.ask(port, rate=min(rates), seconds=WARM_UP_S, deadline_ms=1e4)
    runs = [shown(clients.ask(port, rate=rate, seconds=seconds, deadline_ms=deadline_ms)) for rate in rates]
    return max((run["rate_per_s"] for run in runs if run["share_in_time"] >= IN_TIME), default=0.0), runs


def shown(run: Any) -> Any:
    p99 = "-" if run["p99_ms"] is None else f"{run['p99_ms']:.1f}"
    bursts = f" in bursts of {run['burst']}" if run["burst"] > 1 else ""
    print(
        f"    {run['rate_per_s']:7.1f} requests/s{bursts}: {run['share_in_time']:6.1%} in time, p99 {p99} ms",
        flush=True,
    )
    return run


def highest_rate(
    port: int, clients: Clients, *, first: float, seconds: float, deadline_ms: float
) -> tuple[float, list[Any]]:
    """The highest rate of which 99 % came in time, and all that was tried: up to well beyond, or down, then between."""
    runs = []

    def met(rate: float) -> bool:
        runs.append(shown(clients.ask(port, rate=rate, seconds=seconds, deadline_ms=deadline_ms)))
        return bool(runs[-1]["share_in_time"] >= IN_TIME)

    clients.ask(port, rate=first, seconds=WARM_UP_S, deadline_ms=1e4)
    low, rate, is_too_high = 0.0, first, False
    while not runs or runs[-1]["share_in_time"] > BEYOND:
        is_too_high = not met(rate) or is_too_high
        low = low if is_too_high else rate
        rate *= STEP
    high = low * STEP
    rate = first
    while not low and rate > first / 100:
        high, rate = rate, rate / STEP**2
        low = rate if met(rate) else 0.0
    for _ in range(2 if low else 0):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if met(middle) else (low, middle)
    return low, sorted(runs, key=lambda run: float(run["rate_per_s"]))


def draw(report: dict[str, Any], path: Path) -> None:
    """What was answered in time against what was asked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name, found in report["services"].items():
        rates = [run["rate_per_s"] for run in found["runs"]]
        axis.plot(rates, [run["in_time_per_s"] for run in found["runs"]], marker=".", label=name)
    most = max(run["rate_per_s"] for found in report["services"].values() for run in found["runs"])
    axis.plot([0, most], [0, most], color="gray", lw=0.8, ls=":")
    axis.set_xlabel("requests a second")
    axis.set_ylabel(f"answered within {report['deadline_ms']:g} ms, a second")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--deadline-ms", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each rate")
    parser.add_argument("--first", type=float, default=50.0, help="the first rate, a second")
    parser.add_argument("--rates", type=float, nargs="+", help="these, instead of a search for the highest")
    parser.add_argument("--bursts", type=int, nargs="*", default=[], help="sizes of bursts to ask in, afterwards")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=0, help="that decode (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="of a second service, beside that of one (%(default)s)")
    parser.add_argument("--clients", type=int, default=1, help="processes that ask (%(default)s)")
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    files = catalogue_files(arguments.images)
    costs = overhead(device, files, count=100)
    print(
        f"{device}: an image takes {costs['recognizer_alone_ms']:.2f} ms, and in the service "
        f"{costs['difference_ms']:+.2f} ms; the service alone takes {costs['service_alone_ms']:.2f} ms",
        flush=True,
    )
    report: dict[str, Any] = {
        "device": device,
        "deadline_ms": arguments.deadline_ms,
        "max_batch": arguments.max_batch,
        "processes": arguments.processes,
        "in_time": IN_TIME,
        "overhead": costs,
        "services": {},
    }

    clients = Clients(arguments.clients, arguments.images)

    def measure(name: str, port: int) -> None:
        print(f"  {name}", flush=True)
        asked = {"seconds": arguments.seconds, "deadline_ms": arguments.deadline_ms}
        if arguments.rates:
            rate, runs = at_rates(port, clients, arguments.rates, **asked)
        else:
            rate, runs = highest_rate(port, clients, first=arguments.first, **asked)
        loads = [(share * rate, burst) for burst in arguments.bursts for share in BURST_SHARES if rate]
        bursts = [shown(clients.ask(port, rate=load, burst=burst, **asked)) for load, burst in loads]
        report["services"][name] = {"rate_per_s": rate, "runs": runs, "bursts": bursts}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    processes, workers = arguments.processes, arguments.workers
    services = [("nbvision serve", arguments.max_batch, f"decode_processes: {processes}", 1)]
    if workers > 1:
        more = f"decode_processes: {-(-processes // workers)}"
        services.append((f"nbvision serve --workers {workers}", arguments.max_batch, more, workers))
    services.append(("one at a time", 1, "in_flight: 1", 1))
    for name, max_batch, more, count in services:
        config = GARMENTS.format(device=device, max_batch=max_batch, more=more)
        with nbvision_service(config, workers=count) as (port, _):
            measure(name, port)
    with running(str(ROOT / "examples" / "straightforward_service.py"), "--device", device) as port:
        measure("straightforward", port)
    clients.close()
    for name, found in report["services"].items():
        print(f"  {found['rate_per_s']:7.1f} requests/s with {IN_TIME:.0%} in time: {name}")
    if arguments.picture:
        draw(report, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
