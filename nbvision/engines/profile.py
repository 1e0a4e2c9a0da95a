"""How long an engine takes, by batch size and precision: the curve that says which batches are worth their wait."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbvision.engines.engine import Engine, RuntimeName
from nbvision.engines.spec import Precision, TensorSpec
from nbvision.errors import InputError, MissingExtraError
from nbvision.runtime.device import Device, array_module

__all__ = ["BatchTime", "EngineProfile", "profile_engine"]

_WARM_UP, _FEWEST, _MOST = 3, 5, 1000  # calls


@dataclass(frozen=True)
class BatchTime:
    """Milliseconds of one call with ``batch`` items, until its results are there: median and 99th percentile."""

    precision: Precision
    batch: int
    p50_ms: float
    p99_ms: float

    @property
    def items_per_s(self) -> float:
        """At the median."""
        return self.batch / self.p50_ms * 1e3


@dataclass(frozen=True)
class EngineProfile:
    """What :func:`profile_engine` measured; as text, a table.

    Attributes
    ----------
    name, digest : str
        Of the model.
    device : {"cpu", "cuda"}
    runtime : str
    times : list of BatchTime
        By precision, then by batch.
    """

    name: str
    digest: str
    device: Device
    runtime: str
    times: list[BatchTime]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figures as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: latency, and items a second, against the batch size.

        Raises
        ------
        MissingExtraError
            Without matplotlib.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("matplotlib", extra="plot", needed_for="drawing a profile") from error
        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasAgg(figure)
        latency, rate = figure.subplots(1, 2)
        for precision in dict.fromkeys(found.precision for found in self.times):
            points = [found for found in self.times if found.precision == precision]
            batches = [found.batch for found in points]
            (line,) = latency.plot(
                batches, [found.p50_ms for found in points], marker="o", label=f"{precision}, median"
            )
            latency.plot(batches, [found.p99_ms for found in points], "--", color=line.get_color(), label="99 %")
            rate.plot(batches, [found.items_per_s for found in points], marker="o", label=precision)
        latency.set(ylabel="ms a call", ylim=0)
        rate.set(ylabel="items a second", ylim=0)
        for axes in (latency, rate):
            axes.set(xlabel="batch", xscale="log", xticks=batches, xticklabels=batches)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(f"{self.name}, {self.runtime}")
        figure.savefig(path, dpi=110)

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.runtime}", f"{'':10} {'batch':>6} {'p50 ms':>9} {'p99 ms':>9} {'items/s':>9}"]
        lines += [
            f"{found.precision:10} {found.batch:6} {found.p50_ms:9.3f} {found.p99_ms:9.3f} {found.items_per_s:9,.0f}"
            for found in self.times
        ]
        return "\n".join(lines)


def profile_engine(
    path: str | os.PathLike[str],
    *,
    precisions: Sequence[Precision] = ("fp32",),
    batches: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    seconds: float = 0.5,
    device: Device | None = None,
    runtime: RuntimeName | None = None,
    progress: Callable[[BatchTime], Any] = lambda found: None,
) -> EngineProfile:
    """Time a model at several batch sizes, on random inputs.

    Parameters
    ----------
    path : str or os.PathLike
        An ONNX file.
    precisions : sequence of {"fp32", "fp16"}
    batches : iterable of int
        The engine is built for the smallest to the largest, best at the median. A model of a fixed batch is timed at
        that one alone.
    seconds : float
        To spend on each point, at the least five calls.
    device, runtime
        As :class:`nbvision.Engine` takes them.
    progress : callable, optional
        Given each point when it is known.

    Raises
    ------
    InputError
        For batches that are none.
    EngineError, MissingExtraError, DeviceError
        As :class:`nbvision.Engine` raises them.
    """
    sizes = sorted(set(batches))
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"batches are {sizes}; expected one or more positive integers")
    if not precisions:
        raise InputError("precisions are empty; expected one or more of 'fp32' and 'fp16'")
    times = []
    for precision in precisions:
        span = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        engine = Engine(path, precision=precision, batch=span, device=device, runtime=runtime)
        for size in sizes if engine.batch else [engine.inputs[0].shape[0]]:
            samples = _samples_ms(engine, size, seconds)
            found = BatchTime(precision, size, statistics.median(samples), float(np.percentile(samples, 99)))
            times.append(found)
            progress(found)
    return EngineProfile(engine.name, engine.digest, engine.device, engine.runtime, times)


def _samples_ms(engine: Engine, size: int, seconds: float) -> list[float]:
    rng = np.random.default_rng(0)
    module = array_module(engine.device)
    inputs = {spec.name: module.asarray(_random(rng, spec, size)) for spec in engine.inputs}
    samples: list[float] = []
    deadline = float("inf")
    while len(samples) < _WARM_UP + _FEWEST or (time.perf_counter() < deadline and len(samples) < _MOST):
        if len(samples) == _WARM_UP:
            deadline = time.perf_counter() + seconds
        started = time.perf_counter()
        engine.run(inputs)
        if engine.device == "cuda":
            module.cuda.get_current_stream().synchronize()
        samples.append((time.perf_counter() - started) * 1e3)
    return samples[_WARM_UP:]


def _random(rng: np.random.Generator, spec: TensorSpec, size: int) -> Any:
    shape = (size, *spec.shape[1:]) if spec.batched else spec.shape
    if spec.dtype.kind == "f":
        return rng.uniform(0, 1, shape).astype(spec.dtype)
    return rng.integers(0, 2 if spec.dtype.kind == "b" else 100, shape).astype(spec.dtype)
