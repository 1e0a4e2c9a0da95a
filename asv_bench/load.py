"""Single requests at any time against a deadline: how many are answered in time, by the policy that batches them.

    python asv_bench/load.py --out load.json [--device cuda] [--deadline-ms 40] [--seconds 3] [--picture load.png]

Compressed photographs of the demo's shop come one by one (Poisson), or in bursts of 8 and 16, whether or not earlier
ones are answered.  The demo's recognizer answers them through ``nbv.Batcher``, and through the same batcher with two
other policies: as many as wait as soon as a thread is free ("eager"), and that once the batch is full or the oldest has
waited 10 ms ("fixed delay").  Rates are shares of the capacity: what is answered while there is always more to do.  The
bound is what an ideal server of that capacity would answer in time, which works on one request after another, needs no
time for a single one, and turns away who cannot be in time.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import catalogue_files

import nbvision as nbv
from nbvision.batching import LatencyCurve
from nbvision.batching.policy import PolicyName
from nbvision.batching.simulator import arrivals
from nbvision.demo.run import models_directory
from nbvision.recognizer import Recognizer
from nbvision.runtime.device import resolve_device
from nbvision.serve import process

BURSTS = (1, 8, 16)
SHARES = (0.8, 1.5)
WARM_UP_CALLS = 8  # of each size
POLICIES: dict[str, PolicyName] = {"nbv.Batcher": "deadline", "eager": "eager", "fixed delay": "delay"}


def capacity(make: Callable[[PolicyName], nbv.Batcher], files: list[bytes], seconds: float) -> float:
    """Answers a second while twice what the threads can hold is always under way."""
    answered = 0
    with make("eager") as batcher:
        room = threading.Semaphore(4 * batcher.max_batch)

        def done(future: Future[Any]) -> None:
            nonlocal answered
            answered += 1
            room.release()

        started_s, number = time.perf_counter(), 0
        while (now_s := time.perf_counter()) - started_s < seconds:
            room.acquire()
            batcher.submit(files[number % len(files)]).add_done_callback(done)
            number += 1
        return answered / (now_s - started_s)


def offer(
    batcher: nbv.Batcher, files: list[bytes], arrived_s: np.ndarray[Any, Any], deadline_s: float
) -> dict[str, Any]:
    """Hand requests in when it is their time; what became of them."""
    waited_s: list[float] = []
    rejected = 0

    def note(sent_s: float) -> Callable[[Future[Any]], None]:
        def done(future: Future[Any]) -> None:
            if future.exception() is None:
                waited_s.append(time.perf_counter() - sent_s)

        return done

    has_deadline = batcher.deadline_ms is not None
    started_s, futures = time.perf_counter(), []
    for number, at_s in enumerate(arrived_s):
        early_s = started_s + at_s - time.perf_counter()
        if early_s > 0:
            time.sleep(early_s)
        # Who hands a request in late says how much of its time is left, as a service does that has to read it first.
        left_s = started_s + at_s + deadline_s - time.perf_counter()
        try:
            future = batcher.submit(files[number % len(files)], deadline_ms=left_s * 1e3 if has_deadline else None)
        except (nbv.errors.OverloadError, nbv.errors.DeadlineError):
            rejected += 1
            continue
        # From when it was due: a client that is held up itself must not make the service look better.
        future.add_done_callback(note(started_s + at_s))
        futures.append(future)
    for future in futures:
        future.exception()
    times_ms = np.array(waited_s) * 1e3
    in_time = int((times_ms <= deadline_s * 1e3).sum())
    sizes = batcher.stats().sizes
    return {
        "requests": len(arrived_s),
        "in_time": in_time,
        "late": len(waited_s) - in_time,
        "given_up": len(arrived_s) - len(waited_s),
        "rejected": rejected,
        "share_in_time": in_time / len(arrived_s),
        "in_time_per_s": in_time / float(arrived_s[-1]),
        "p50_ms": float(np.quantile(times_ms, 0.5)) if waited_s else None,
        "p99_ms": float(np.quantile(times_ms, 0.99)) if waited_s else None,
        "items_per_batch": sum(size * count for size, count in sizes.items()) / max(sum(sizes.values()), 1),
    }


def bound(arrived_s: np.ndarray[Any, Any], per_s: float, deadline_s: float) -> float:
    """The share that the ideal server answers in time; no policy can do better in the same capacity."""
    free_s, in_time = 0.0, 0
    for at_s in arrived_s.tolist():
        ended_s = max(free_s, at_s) + 1 / per_s
        if ended_s <= at_s + deadline_s:
            free_s, in_time = ended_s, in_time + 1
    return in_time / len(arrived_s)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of what was answered in time, by load and policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHARES), figsize=(9, 3.2), layout="constrained")
    for axis, share in zip(axes, SHARES, strict=True):
        for index, policy in enumerate(dict.fromkeys(run["policy"] for run in report["runs"])):
            runs = [run for run in report["runs"] if run["policy"] == policy and run["share_of_capacity"] == share]
            places = np.arange(len(runs)) + 0.27 * (index - 1)
            bars = axis.bar(places, [100 * run["share_in_time"] for run in runs], 0.25, label=policy)
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_xticks(range(len(BURSTS)), ["one by one", *(f"bursts of {burst}" for burst in BURSTS[1:])])
        axis.set_ylim(0, 112)
        for place, burst in enumerate(BURSTS):
            (most,) = {
                run["bound"] for run in report["runs"] if (run["burst"], run["share_of_capacity"]) == (burst, share)
            }
            axis.plot([place - 0.42, place + 0.42], [100 * most] * 2, color="gray", lw=1, ls=":", label="bound")
        axis.set_title(f"{share:g} of the capacity", fontsize=10)
    axes[0].set_ylabel(f"% in time ({report['deadline_ms']:g} ms)")
    handles, labels = axes[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    axes[1].legend(list(shown.values()), list(shown), fontsize=8, loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--deadline-ms", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--in-flight", type=int, help="batches at a time (2; 1 with processes)")
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="only this one; may be repeated")
    parser.add_argument("--processes", type=int, default=0, help="that decode (%(default)s)")
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    in_flight = arguments.in_flight or (1 if arguments.processes else 2)  # as `nbvision serve` has it
    files = catalogue_files(arguments.images)
    recognizer = Recognizer.load(models_directory(), device=device, decode_processes=arguments.processes)

    def recognize(items: list[Any]) -> list[Any]:
        found = recognizer.recognize(items)
        return [error or found.vectors[found.of_image(index)] for index, error in enumerate(found.errors)]

    curve = LatencyCurve()

    sizes = [size for size in [1, 2, 4, 8, 16, 32, 64] if size <= arguments.max_batch]

    def make(policy: PolicyName) -> nbv.Batcher:
        batcher = nbv.Batcher(
            recognize,
            prepare=recognizer.open,
            max_batch=arguments.max_batch,
            deadline_ms=arguments.deadline_ms if policy == "deadline" else None,
            latency=curve if policy == "deadline" else None,
            in_flight=in_flight,
            policy=policy,
            device=device,
        )
        for size in (1, arguments.max_batch):  # its threads are new to the engines
            batcher.warm_up(files[:size])
        return batcher

    opened = [recognizer.open(data) for data in files[: arguments.max_batch + 2 * WARM_UP_CALLS]]
    for size in sizes:  # all formats, so that what is compiled or loaded at first is there
        for start in range(0, len(opened), size):
            recognize(opened[start : start + size])
    process.settle()  # this and the next as `nbvision serve` does
    process.take_short_turns()
    for size in sizes:
        for start in range(WARM_UP_CALLS):
            started_s = time.perf_counter()
            recognize(opened[start : start + size])
            curve.update(size, time.perf_counter() - started_s)
    capacity(make, files, 1.0)
    most = capacity(make, files, arguments.seconds)
    print(
        f"{device}: capacity {most:.0f} images a second; 1 takes {curve(1) * 1e3:.1f} ms, {arguments.max_batch} take "
        f"{curve(arguments.max_batch) * 1e3:.1f} ms alone; deadline {arguments.deadline_ms:g} ms",
        flush=True,
    )
    policies = {name: POLICIES[name] for name in arguments.policy or POLICIES}
    report: dict[str, Any] = {
        "device": device,
        "deadline_ms": arguments.deadline_ms,
        "max_batch": arguments.max_batch,
        "in_flight": in_flight,
        "processes": arguments.processes,
        "capacity_per_s": most,
        "alone_ms": {size: curve(size) * 1e3 for size in (1, arguments.max_batch)},
        "runs": [],
    }
    for share in SHARES:
        for burst in BURSTS:
            count = max(int(share * most * arguments.seconds), 2 * burst)
            arrived_s = arrivals(share * most, count, burst=burst, seed=burst)
            ideal = bound(arrived_s, most, arguments.deadline_ms / 1e3)
            for name, policy in policies.items():
                with make(policy) as batcher:
                    found = offer(batcher, files, arrived_s, arguments.deadline_ms / 1e3)
                report["runs"].append(
                    {"policy": name, "burst": burst, "share_of_capacity": share, "bound": ideal, **found}
                )
                p99 = "   -" if found["p99_ms"] is None else f"{found['p99_ms']:6.1f}"
                print(
                    f"  {share:g} of it, bursts of {burst:2}  {name:12} {found['share_in_time']:6.1%} in time "
                    f"(of {ideal:.1%}), "
                    f"{found['in_time_per_s'] / most:5.2f} of capacity, p99 {p99} ms, "
                    f"{found['items_per_batch']:4.1f} a batch, {found['given_up']} given up",
                    flush=True,
                )
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.picture:
        draw(report, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
