"""One version of a pipeline behind a deadline batcher."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbvision.batching import Batcher, BatcherStats
from nbvision.errors import DeviceError, EngineError
from nbvision.serve.pipeline_process import PipelineProcess
from nbvision.serve.tracing import span

if TYPE_CHECKING:
    from nbvision.serve.config import PipelineConfig

__all__ = ["IN_FLIGHT", "Limits", "Served"]

IN_FLIGHT = 2  # batches at a time
_NEWS = 0.05  # weight of the latest in a mean
_FORGETS = 0.005  # of it is lost with each that is turned away
_LARGE_BYTES = 4 << 20


@dataclass(frozen=True)
class Limits:
    """Of one pipeline's queue.

    Attributes
    ----------
    max_batch : int
    deadline_ms : float or None
        Of a request that says none.
    max_queue_items, max_queue_bytes : int
    in_flight : int or None
        Batches at a time. Default: 2, so that the host prepares one while the GPU works on the other; 1 of a pipeline
        that decodes ahead: its batches wait for little, so that two would only keep Python's lock from each other.
    """

    max_batch: int = 16
    deadline_ms: float | None = 10_000.0
    max_queue_items: int = 1024
    max_queue_bytes: int = 512 << 20
    in_flight: int | None = None


class Served:
    """One version of a pipeline, ready to answer.

    Attributes
    ----------
    config : PipelineConfig
        What it was made of.
    name, version : str
        The version says what answers depend on: models, and options.
    pipeline : PipelineProcess
    batcher : Batcher
    is_healthy : bool
        False from a batch in which the engine or the device failed until one in which it did not.
    """

    def __init__(self, config: PipelineConfig, version: str, pipeline: PipelineProcess) -> None:
        self.config, self.name, self.version, self.pipeline = config, config.name, version, pipeline
        limits = config.limits
        self.is_healthy = True
        self._is_warm = False
        self.compute_s = 0.0  # of all batches
        self.last_answer_ms = 0  # of the clock
        self.answer_ms = 0.0  # what an answer takes, lately
        self.turned_away = 0  # since HTTP had taken too long
        self.batcher = Batcher(
            self._run,
            prepare=pipeline.open,
            max_batch=limits.max_batch,
            deadline_ms=limits.deadline_ms,
            max_queue_items=limits.max_queue_items,
            max_queue_bytes=limits.max_queue_bytes,
            in_flight=limits.in_flight or (1 if pipeline.decodes_ahead else IN_FLIGHT),
            size_of=_size_bytes,
            device="cpu",  # of this process: the GPU is the other's
        )
        self._lock = threading.Lock()

    def _run(self, items: list[Any]) -> list[Any]:
        if not self._is_warm:
            return self.pipeline.warm_up(items)
        started_s = time.perf_counter()
        try:
            with span("batch", model=self.name, version=self.version, items=len(items)):
                results = self.pipeline.run(items)
        except (EngineError, DeviceError):
            self.is_healthy = False
            raise
        with self._lock:
            self.compute_s += time.perf_counter() - started_s
            self.last_answer_ms = int(time.time() * 1e3)
        self.is_healthy = True
        return results

    async def answer(self, item: Any, *, deadline_ms: float | None, priority: int = 0) -> Any:
        """The result of one item; raises what :meth:`Batcher.answer` raises."""
        started_s = time.perf_counter()
        if _size_bytes(item) <= _LARGE_BYTES:
            result = await self.batcher.answer(item, deadline_ms=deadline_ms, priority=priority)
        else:  # it is copied, and nobody else shall wait for that
            submit = functools.partial(self.batcher.submit, item, deadline_ms=deadline_ms, priority=priority)
            result = await asyncio.wrap_future(await asyncio.to_thread(submit))
        self.answer_ms += _NEWS * ((time.perf_counter() - started_s) * 1e3 - self.answer_ms)
        return result

    def forget(self) -> None:
        """Believe a little less in what an answer took: who is asked no more would never be found to be quicker."""
        self.answer_ms *= 1 - _FORGETS

    def warm_up(self) -> None:
        """Answer in each thread, so that no client waits for what is compiled, loaded or allocated at first.

        Raises
        ------
        Exception
            If it cannot.
        """
        most = self.batcher.max_batch if self.pipeline.device == "cuda" else 1
        sizes = {most} | {1 << power for power in range(most.bit_length())}
        for size in sorted(sizes):
            self.batcher.warm_up([self.pipeline.probe()] * size)
        self._is_warm = True

    def stats(self) -> BatcherStats:
        """The batcher's, and who was turned away before he came there."""
        stats = self.batcher.stats()
        return replace(stats, rejected=stats.rejected + self.turned_away)

    def close(self) -> None:
        """Answer what waits, then take no more, and let go of the models."""
        self.batcher.close()
        self.pipeline.close()


def _size_bytes(item: Any) -> int:
    """Of what a request hands in: a file, or a model's inputs by name."""
    return len(item) if isinstance(item, bytes) else sum(row.nbytes for row in item.values())
