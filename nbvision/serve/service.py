"""The pipelines of a service while it runs: loaded, asked, loaded anew, drained."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from nbvision.errors import DecodeError, InputError, NbvisionError, OverloadError
from nbvision.serve import process
from nbvision.serve.cache import ResultCache, key_of
from nbvision.serve.config import Config, PipelineConfig, read_config
from nbvision.serve.lateness import Lateness
from nbvision.serve.pipeline_process import start_pipeline
from nbvision.serve.pipelines import texts
from nbvision.serve.protocol import InferRequest, Tensors
from nbvision.serve.served import IN_FLIGHT, Served
from nbvision.serve.status import PipelineError, RefusedError, UnknownModelError, described
from nbvision.serve.tracing import span

__all__ = ["MOST_ITEMS", "Counts", "Service"]

MOST_ITEMS = 1024  # of one request
_LOOK_EVERY_S = 1.0
_LATE = 0.25  # of a deadline
_PROBE_S = 10.0  # within which a pipeline that has failed shall answer
_WAIT_AT_MOST_S = 60.0  # before one that does not load is loaded once more

logger = logging.getLogger("nbvision.serve")


@dataclass
class Counts:
    """Of the requests to one pipeline since the service began, whatever its version."""

    success: int = 0
    failure: int = 0
    duration_s: float = 0.0  # of the successful ones
    last_ms: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=512))


class Service:
    """Pipelines by name. Made in any thread; from then on used by one event loop.

    Parameters
    ----------
    path : path
        See :func:`nbvision.serve.config.read_config`.
    worker : int
        Which of several processes this is.

    Raises
    ------
    NbvisionError
        If the file, or a pipeline in it, is none.
    """

    def __init__(self, path: str | os.PathLike[str], *, worker: int = 0) -> None:
        self._path = path
        self.worker = worker
        self.config: Config = read_config(path)
        self.served: dict[str, Served] = {}
        try:
            for name, each in self.config.pipelines.items():
                self.served[name] = _made(each)
        except BaseException:
            for served in self.served.values():
                served.close()
            raise
        self.counts: dict[str, Counts] = {name: Counts() for name in self.served}
        self.lateness = Lateness()  # of whoever reads the requests
        self.cache = ResultCache(self.config.cache_bytes, _size_of)
        self.is_draining = False
        self.on_load: Callable[[str], object] = lambda name: None
        self._loading = asyncio.Lock()
        self._users: collections.Counter[Served] = collections.Counter()  # requests that may still ask it
        self._replaced: list[Served] = []  # by another version, and still used
        self._closing: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._nursed: dict[Served, asyncio.Task[None]] = {}  # who fails, until it does not

    @property
    def is_ready(self) -> bool:
        """Whether every pipeline answers."""
        return not self.is_draining and all(served.is_healthy for served in self.served.values())

    def get(self, name: str, version: str | None = None) -> Served:
        """A pipeline, of the version that is served now.

        Raises
        ------
        UnknownModelError
            If there is none of that name, or it has another version.
        """
        served = self.served.get(name)
        if served is None:
            raise UnknownModelError(f"model {name!r} is not served; expected one of {sorted(self.served)}")
        if version not in (None, "", served.version):
            raise UnknownModelError(f"model {name!r} has no version {version!r}; it has {served.version!r}")
        return served

    @contextlib.contextmanager
    def using(self, name: str, version: str | None = None) -> Iterator[Served]:
        """The same, and within this context it goes on answering, even if another version takes its place.

        Raises
        ------
        UnknownModelError
        """
        served = self.get(name, version)
        self._users[served] += 1
        try:
            yield served
        finally:
            self._users[served] -= 1
            self._close_what_was_replaced()

    def refuse_if_late(self, served: Served, deadline_ms: float | None, *, read_s: float) -> None:
        """Turn away who cannot be answered in time any more, before anything is done for him.

        Parameters
        ----------
        served : Served
        deadline_ms : float or None
            From when all of the request has come; None: the pipeline's.
        read_s : float
            When the request was read, by :func:`time.perf_counter`.

        Raises
        ------
        OverloadError
        """
        allowed_ms = served.batcher.deadline_ms if deadline_ms is None else deadline_ms
        if allowed_ms is None or not allowed_ms > 0:
            return
        taken_ms, answer_ms = self.lateness.of_ms(read_s), served.answer_ms
        # Who is late for another reason than HTTP is the batcher's to refuse, which knows who goes before whom.
        is_late = taken_ms > _LATE * allowed_ms and allowed_ms - taken_ms < answer_ms <= allowed_ms
        if is_late or taken_ms >= allowed_ms:
            raise self._turned_away(served, allowed_ms, taken_ms)

    def _turned_away(self, served: Served, allowed_ms: float, taken_ms: float) -> OverloadError:
        """Count one, and say why."""
        self.counts[served.name].failure += 1
        served.turned_away += 1
        answer_ms = served.answer_ms
        served.forget()
        return OverloadError(
            f"so much is to be read and written that it takes {taken_ms:.0f} of this request's {allowed_ms:.0f} ms; an "
            f"answer takes {answer_ms:.0f} more. Come again later, or with more time",
            retry_after_s=self.lateness.turn_s,
        )

    async def answer(
        self,
        served: Served,
        items: list[Any],
        *,
        deadline_ms: float | None = None,
        priority: int = 0,
        read_s: float | None = None,
    ) -> list[Any]:
        """A result for each item, or the exception that is its own.

        Results of pictures that were seen before come from the cache, all others from the batcher. The deadline counts
        from when the request was read, ``read_s`` of :func:`time.perf_counter`; default: from now.

        Raises
        ------
        NbvisionError
            If no item has a result, and not because none of them can be decoded; or for too many items.
        """
        if len(items) > MOST_ITEMS:
            raise RefusedError(f"{len(items)} items; expected {MOST_ITEMS} at most", 413)
        left_ms = served.batcher.deadline_ms if deadline_ms is None else deadline_ms
        if left_ms is not None and read_s is not None and left_ms > 0:
            taken_ms = self.lateness.of_ms(read_s)
            if taken_ms >= left_ms:
                raise self._turned_away(served, left_ms, taken_ms)
            left_ms -= taken_ms

        async def one(item: Any) -> Any:
            async def compute() -> Any:
                try:
                    return await served.answer(item, deadline_ms=left_ms, priority=priority)
                except DecodeError as error:
                    if error.kind == "failed":
                        raise  # by the machine, perhaps
                    return error.with_traceback(None)  # which the same bytes will get again: a result, and kept as one

            try:
                if not served.pipeline.takes_images or not self.cache.limit_bytes:
                    return await compute()
                return await self.cache.get(key_of(served.version, item), compute)
            except NbvisionError as error:
                return error
            except Exception as error:
                logger.exception("failed", extra={"model": served.name})
                return PipelineError(f"model {served.name!r} failed: {type(error).__name__}; the log says more")

        counts, started_s = self.counts[served.name], time.perf_counter()
        counts.failure += 1  # until it is known better
        with span("answer", model=served.name, version=served.version, items=len(items)):
            # One by itself needs no task of its own.
            results = [await one(items[0])] if len(items) == 1 else await asyncio.gather(*map(one, items))
        errors = [result for result in results if isinstance(result, Exception)]
        if errors and len(errors) == len(results):
            for error in errors:
                if not isinstance(error, DecodeError):
                    raise error
            return list(results)
        counts.failure -= 1
        counts.success += 1
        seconds = time.perf_counter() - started_s
        counts.duration_s += seconds
        counts.last_ms.append(seconds * 1e3)
        return list(results)

    async def infer(self, served: Served, asked: InferRequest, *, read_s: float | None = None) -> Tensors:
        """Tensors to tensors. ``ERROR``, if it is among them, says which of several items failed, and why.

        Raises
        ------
        NbvisionError
            If no item has a result, and for tensors that are not the pipeline's.
        """
        items = served.pipeline.items_of(asked.inputs)
        timeout_us = asked.integer("timeout")
        deadline_ms = None if timeout_us is None else timeout_us / 1e3
        priority = asked.integer("priority") or 0
        results = await self.answer(served, items, deadline_ms=deadline_ms, priority=priority, read_s=read_s)
        if results and all(isinstance(result, Exception) for result in results):
            raise results[0].with_traceback(None)  # which may be kept, and raised again
        tensors = dict(served.pipeline.tensors_of(results))
        said = [described(result)["error"] if isinstance(result, Exception) else "" for result in results]
        return tensors | {"ERROR": texts(said)} if any(said) else tensors

    async def load(self, name: str) -> Served:
        """Load a pipeline anew, here and in whoever listens to ``on_load``; else as :meth:`follow`.

        Raises
        ------
        NbvisionError
            If the file or the pipeline is none, or does not answer.
        """
        served = await self._load(name)
        self.on_load(name)
        return served

    async def follow(self, name: str) -> None:
        """Load a pipeline anew that was loaded elsewhere; if it fails here, the log says so."""
        try:
            await self._load(name)
        except NbvisionError as error:
            logger.error("not loaded", extra={"model": name, "error": str(error), "worker": self.worker})

    async def _load(self, name: str) -> Served:
        """Load a pipeline anew, as the file says now, without losing a request.

        Requests that have come stay with the version that they came to; what fails to load leaves that one serving.

        Raises
        ------
        NbvisionError
            If the file or the pipeline is none, or does not answer.
        """
        async with self._loading:
            config = await asyncio.to_thread(read_config, self._path)
            if name not in config.pipelines:
                raise UnknownModelError(f"model {name!r} is not in {self._path}; expected {sorted(config.pipelines)}")
            return await self._exchange(config.pipelines[name])

    async def _exchange(self, config: PipelineConfig) -> Served:
        """Make a pipeline, and let it take the place of the one of its name."""
        served = await asyncio.to_thread(_made, config)
        before = self.served.get(served.name)
        self.served[served.name] = served
        self.counts.setdefault(served.name, Counts())
        logger.info("loaded", extra={"model": served.name, "version": served.version, "worker": self.worker})
        if before is not None:
            if before.version != served.version:
                self.cache.forget(before.version)
            self._replaced.append(before)
            self._close_what_was_replaced()
        return served

    def _close_what_was_replaced(self) -> None:
        for served in [each for each in self._replaced if not self._users[each]]:
            self._replaced.remove(served)
            del self._users[served]
            closing = asyncio.create_task(_close(served))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def load_all(self) -> None:
        """Load every pipeline of the file anew, and end those that it has no more.

        What fails is logged and goes on as it was. So do the limits of the service itself.
        """
        try:
            config = await asyncio.to_thread(read_config, self._path)
        except NbvisionError as error:
            logger.error("not loaded", extra={"error": str(error), "worker": self.worker})
            return
        for name in config.pipelines:
            await self.follow(name)
        for name in [name for name in self.served if name not in config.pipelines]:
            served = self.served.pop(name)
            self.cache.forget(served.version)
            self._replaced.append(served)
            logger.info("no longer served", extra={"model": name, "worker": self.worker})
        self._close_what_was_replaced()
        changed = [
            each.name
            for each in fields(Config)
            if each.name != "pipelines" and getattr(config, each.name) != getattr(self.config, each.name)
        ]
        if changed:
            said = {"fields": changed, "worker": self.worker}
            logger.warning("changed in the file, but taken over only when the service starts anew", extra=said)

    async def start(self) -> None:
        """From now on look after pipelines that fail."""
        await asyncio.to_thread(process.settle)
        self._looking = asyncio.create_task(self._look_after_pipelines())
        logger.info("ready", extra={"worker": self.worker, "pid": os.getpid(), "models": sorted(self.served)})

    async def _look_after_pipelines(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            for served in self.served.values():
                served.pipeline.let_go()
                if served not in self._nursed and not _is_well(served):
                    task = self._nursed[served] = asyncio.create_task(self._nurse(served))
                    task.add_done_callback(functools.partial(self._end_nursing, served))

    async def _nurse(self, served: Served) -> None:
        """Ask a pipeline that has failed until it answers; make one anew whose process has ended.

        What it was made of is what the new one is made of, whatever the file says meanwhile.
        """
        wait_s = _LOOK_EVERY_S
        while self.served.get(served.name) is served and not _is_well(served):
            said = {"model": served.name, "worker": self.worker}
            try:
                if served.pipeline.is_alive:
                    probe = served.answer(served.pipeline.probe(), deadline_ms=_PROBE_S * 1e3)
                    with contextlib.suppress(Exception):  # which is what it is being watched for
                        await asyncio.wait_for(probe, _PROBE_S)
                else:
                    served.is_healthy = False
                    logger.error("a pipeline's process died", extra=said)
                    async with self._loading:
                        if self.served.get(served.name) is served:
                            await self._exchange(served.config)
                            return
            except NbvisionError as error:
                logger.error("not loaded", extra=said | {"error": str(error)})
                wait_s = min(2 * wait_s, _WAIT_AT_MOST_S)
            except Exception:
                logger.exception("not loaded", extra=said)
                wait_s = min(2 * wait_s, _WAIT_AT_MOST_S)
            await asyncio.sleep(wait_s)

    def _end_nursing(self, served: Served, task: asyncio.Task[None]) -> None:
        del self._nursed[served]

    async def close(self) -> None:
        """Answer what waits, and end."""
        self.is_draining = True
        for task in (self._looking, *self._nursed.values()):
            if task is not None:
                task.cancel()
        open_ones = [*self.served.values(), *self._replaced]
        self._replaced.clear()
        await asyncio.gather(*self._closing, *(asyncio.to_thread(served.close) for served in open_ones))


def _is_well(served: Served) -> bool:
    return served.is_healthy and served.pipeline.is_alive


async def _close(served: Served) -> None:
    """Close a pipeline that was replaced, and give its memory back to the system."""
    await asyncio.to_thread(served.close)
    del served  # what is still held by somebody would be kept
    await asyncio.to_thread(process.settle)
    await asyncio.to_thread(process.give_back)


def _made(config: PipelineConfig) -> Served:
    """A pipeline that has answered."""
    try:
        pipeline = start_pipeline(config.kind, config.options, threads=config.limits.in_flight or IN_FLIGHT)
    except Exception as error:  # anybody's code may be in it
        raise InputError(f"pipeline {config.name!r} does not load: {type(error).__name__}: {error}") from error
    version = f"{config.fingerprint}-{pipeline.digest[:12]}"
    served = Served(config, version, pipeline)
    try:
        served.warm_up()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever it is that anybody's code raises
        served.close()
        raise InputError(f"pipeline {config.name!r} does not answer: {type(error).__name__}: {error}") from error
    return served


def _size_of(result: Any) -> int:
    if isinstance(result, Exception):
        return len(str(result))
    return len(json.dumps(result))
