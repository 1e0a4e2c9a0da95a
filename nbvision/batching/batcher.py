"""Single items from many callers, run in batches that meet their deadlines."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbvision.batching.latency import LatencyCurve, UsualTimes
from nbvision.batching.policy import PolicyName, Reason, Release, Request, RequestQueue, make_policy
from nbvision.batching.timeline import BatcherTimeline, BatchRecord
from nbvision.errors import DeadlineError, InputError, NbvisionError, OverloadError
from nbvision.runtime.device import Device, array_module, own_stream, resolve_device, synchronize

__all__ = ["Batcher", "BatcherStats"]

_REMEMBERED = 1000  # requests whose times in the queue are kept
_RECORDED = 10_000  # batches that are kept for the timeline
_PROBE_S = 1.0  # without a batch, though requests come: then one is run whatever the curve says, which may be wrong
_LATE_DONE = 1.3  # times as long as usual that what is prepared takes, for who is let in
_NOBODY = 0  # no thread has this number
_ATTEMPTS = 4  # calls to find one bad item, for each halving that it may take


@dataclass(frozen=True)
class BatcherStats:
    """Counts since the batcher was made; as text, a table.

    Attributes
    ----------
    submitted : int
        Requests that were let in; each is one of ``answered``, ``failed``, ``late``, ``cancelled`` and ``waiting``, or
        runs now (``running``).
    rejected : int
        Turned away at the door.
    answered, failed : int
        By a result, or by the function's exception.
    late : int
        Given up before they ran, since they could not have been in time.
    missed : int
        Answered, but after the deadline.
    batches : int
    sizes : dict of int to int
        Batches by size.
    reasons : dict of str to int
        Batches by why they were not larger: ``"drained"`` (no more requests), ``"full"``, ``"deadline"``.
    queue_p50_ms, queue_p99_ms : float
        From arrival to the start of the batch, of the last 1,000 requests; nan without any.
    queue_s : float
        The same of all requests together, in seconds.
    """

    submitted: int
    rejected: int
    answered: int
    failed: int
    late: int
    missed: int
    cancelled: int
    waiting: int
    running: int
    batches: int
    sizes: dict[int, int]
    reasons: dict[Reason, int]
    queue_p50_ms: float
    queue_p99_ms: float
    queue_s: float

    def __str__(self) -> str:
        names = ("submitted", "rejected", "answered", "failed", "late", "missed", "cancelled", "waiting", "running")
        lines = [f"{name:10} {getattr(self, name):10,}" for name in names]
        mean = sum(size * count for size, count in self.sizes.items()) / max(self.batches, 1)
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        lines.append(f"{'batches':10} {self.batches:10,}  {mean:.1f} items each; {reasons or 'none'}")
        lines.append(f"in queue   p50 {self.queue_p50_ms:.2f} ms, p99 {self.queue_p99_ms:.2f} ms")
        return "\n".join(lines)


class Batcher:
    """Collects single requests into batches and runs a function on them.

    There is no fixed delay. If nothing runs, what waits goes at once. While a batch runs, further requests may join the
    next one until it is full or its tightest deadline calls. Then the batch goes of which most answers in time a second
    are expected, by how long batches of each size took lately; a request that cannot be in time any more is given up,
    and one that comes when so many are to go before it that it could not be is turned away at the door.

    If no batch could be in time for a second, one request is run all the same, to see whether that is still so.

    Parameters
    ----------
    function : callable
        Takes a list of items and returns as many results, in their order; a result that is an exception is raised for
        its item alone. If it raises, the batch is halved again and again until only the items that cause it fail.
    prepare : callable, optional
        What becomes of an item once it is let in, before it waits, in the thread that hands it in: for what can begin
        before there is a batch, such as :meth:`nbvision.Decoder.open`. The function gets what it returns, ``bucket``
        and ``size_of`` what was handed in, and the caller what it raises. If that has an ``add_done_callback``, as an
        image of :meth:`nbvision.Decoder.open` and a future have, the request waits for a batch once that is done, so
        that no batch waits for it.
    max_batch : int
        Items of a batch.
    deadline_ms : float, optional
        Of a request that does not say its own; default: none.
    bucket : callable, optional
        Gives what an item has to share with others in its batch, such as its shape after preprocessing.
    size_of : callable, optional
        Gives an item's bytes, for ``max_queue_bytes``.
    max_queue_items, max_queue_bytes : int
        Of requests that wait; more are turned away.
    latency : LatencyCurve, optional
        What is known before the first call, such as ``LatencyCurve.of_profile(profile)``; every call refines it.
    in_flight : int
        Batches that run at the same time, each in a thread: with two, the host prepares one while the GPU works on the
        other.
    aging_s : float
        A request that has waited so long goes before all others, whatever its priority.
    policy : {"deadline", "eager", "delay", "delay and reject", "eager and reject"}
        What is described above; or, to compare it with what others do: what waits goes as soon as a thread is free;
        the same once there is a full batch or the oldest has waited 10 ms; both with those given up that waited 20 ms.
    device : {"cpu", "cuda"}, optional
        Where the function works; default as everywhere. On ``"cuda"`` each thread has a stream of its own, which is
        CuPy's current one in the function and is waited for, on the host, before anybody gets a result.

    Raises
    ------
    InputError
        For a function that cannot be called, or numbers that are not positive.
    DeviceError
        If CUDA was asked for and cannot be used.

    Examples
    --------
    >>> with nbv.Batcher(recognize_all, max_batch=32, deadline_ms=40) as batcher:   # doctest: +SKIP
    ...     answer = batcher(image_bytes)
    """

    def __init__(
        self,
        function: Callable[[list[Any]], Sequence[Any]],
        *,
        prepare: Callable[[Any], Any] | None = None,
        max_batch: int = 64,
        deadline_ms: float | None = None,
        bucket: Callable[[Any], Hashable] | None = None,
        size_of: Callable[[Any], int] | None = None,
        max_queue_items: int = 1024,
        max_queue_bytes: int | None = None,
        latency: LatencyCurve | None = None,
        in_flight: int = 2,
        aging_s: float = 1.0,
        policy: PolicyName = "deadline",
        device: Device | None = None,
    ) -> None:
        if not callable(function):
            raise InputError(f"function is a {type(function).__name__}; expected a callable that takes a list")
        if prepare is not None and not callable(prepare):
            raise InputError(f"prepare is a {type(prepare).__name__}; expected a callable that takes an item")
        counts = {"max_batch": max_batch, "max_queue_items": max_queue_items, "in_flight": in_flight}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; expected a positive integer")
        for name, limit in {"deadline_ms": deadline_ms, "max_queue_bytes": max_queue_bytes, "aging_s": aging_s}.items():
            if limit is not None and not limit > 0:
                raise InputError(f"{name} is {limit!r}; expected a positive number")
        self._function, self._prepare = function, prepare
        self.device: Device = resolve_device(device)
        self._device_id = array_module("cuda").cuda.Device().id if self.device == "cuda" else None
        self.max_batch = max_batch
        self.deadline_ms = deadline_ms
        self.latency = latency or LatencyCurve()
        self._policy = make_policy(policy, self.latency, self.latency.typical, max_batch=max_batch)
        self._bucket, self._size_of = bucket, size_of
        self._max_items, self._max_bytes = max_queue_items, max_queue_bytes or math.inf
        self._queue = RequestQueue(aging_s=aging_s)
        self._queued_bytes = 0
        # Let in, and not in the queue yet: the threads that prepare them, nobody once it only has to be done.
        self._entering: dict[Request, int] = {}
        self._looks_s = math.inf  # when a thread that waits looks at those
        self._done_in = UsualTimes()  # how long that takes, by how many there are
        self._changed = threading.Condition()
        self._closing, self._is_draining = False, True
        self._counts: collections.Counter[str] = collections.Counter()
        self._sizes: collections.Counter[int] = collections.Counter()
        self._reasons: collections.Counter[Reason] = collections.Counter()
        self._queue_times_s: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._queue_s = 0.0
        self._records: collections.deque[BatchRecord] = collections.deque(maxlen=_RECORDED)
        self._given_up: collections.deque[tuple[float, int]] = collections.deque(maxlen=_RECORDED)
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"nbvision-batcher-{number}", daemon=True)
            for number in range(in_flight)
        ]
        self._ran_s = time.monotonic()  # when a batch ended last
        self._busy = 0  # threads that run one
        self._warm_ups: dict[int, tuple[list[Any], Future[list[Any]]]] = {}  # by thread
        self._warming = threading.Lock()
        self._owner = os.getpid()
        for thread in self._threads:
            thread.start()

    def submit(self, item: Any, *, deadline_ms: float | None = None, priority: int = 0) -> Future[Any]:
        """Hand an item in.

        Parameters
        ----------
        item : object
        deadline_ms : float, optional
            From now on; default: the batcher's. Not positive is one that has passed.
        priority : int
            Smaller ones go first.

        Returns
        -------
        concurrent.futures.Future
            Of the item's result. Its exception is the function's, or :class:`DeadlineError` if it was given up. It may
            be cancelled as long as it waits. In a coroutine: ``await batcher.answer(item)``.

        Raises
        ------
        OverloadError
            If too many requests wait, or too many for this one's deadline; ``retry_after_s`` says when to come again.
        DeadlineError
            If the deadline has passed already.
        InputError
            If the batcher is closed.
        Exception
            What ``prepare`` raises.
        """
        now_s = time.monotonic()
        allowed_ms = self.deadline_ms if deadline_ms is None else deadline_ms
        if allowed_ms is not None and not allowed_ms > 0:
            raise DeadlineError(f"the deadline of {allowed_ms} ms has passed; expected time to answer in")
        request = Request(
            item,
            now_s,
            math.inf if allowed_ms is None else now_s + allowed_ms / 1e3,
            priority,
            self._bucket(item) if self._bucket else None,
            self._size_of(item) if self._size_of else 0,
            Future(),
        )
        if self._prepare is None:
            with self._changed:
                self._refuse(request)
                self._add(request)
        else:
            self._prepare_and_add(request, self._prepare)
        future: Future[Any] = request.future
        return future

    def __call__(self, item: Any, *, deadline_ms: float | None = None, priority: int = 0) -> Any:
        """Hand an item in and wait for its result; raises what :meth:`submit` and its future raise."""
        return self.submit(item, deadline_ms=deadline_ms, priority=priority).result()

    async def answer(self, item: Any, *, deadline_ms: float | None = None, priority: int = 0) -> Any:
        """Hand an item in and await its result; a task that is cancelled takes its request back if it still waits."""
        return await asyncio.wrap_future(self.submit(item, deadline_ms=deadline_ms, priority=priority))

    def warm_up(self, items: Sequence[Any]) -> None:
        """Run the function on some items in each of the batcher's threads, one thread after another.

        So what it compiles, loads or allocates at first is there before requests come. It counts nowhere, and how long
        it takes is not taken for what a batch takes.

        Parameters
        ----------
        items : sequence
            One batch.

        Raises
        ------
        InputError
            If the batcher is closed.
        Exception
            What the function raises, or gives as a result.
        """
        with self._warming:
            for thread in range(len(self._threads)):
                done: Future[list[Any]] = Future()
                with self._changed:
                    self._refuse_if_closed()
                    self._warm_ups[thread] = list(items), done
                    self._changed.notify_all()
                for outcome in done.result():
                    if isinstance(outcome, BaseException):
                        raise outcome

    def stats(self) -> BatcherStats:
        """What has happened so far."""
        with self._changed:
            counts = self._counts
            ended = sum(counts[name] for name in ("answered", "failed", "late", "cancelled"))
            times_ms = np.array(self._queue_times_s) * 1e3
            p50, p99 = np.quantile(times_ms, [0.5, 0.99]).tolist() if len(times_ms) else (math.nan, math.nan)
            names = ("submitted", "rejected", "answered", "failed", "late", "missed", "cancelled")
            return BatcherStats(
                **{name: counts[name] for name in names} | {"submitted": counts["submitted"] + len(self._entering)},
                waiting=len(self._queue) + len(self._entering),
                running=counts["submitted"] - ended - len(self._queue),
                batches=sum(self._sizes.values()),
                sizes=dict(self._sizes),
                reasons=dict(self._reasons),
                queue_p50_ms=p50,
                queue_p99_ms=p99,
                queue_s=self._queue_s,
            )

    def timeline(self, *, seconds: float = 60.0) -> BatcherTimeline:
        """What ran in the last while; of more than 10,000 batches the last 10,000.

        Parameters
        ----------
        seconds : float
            How much of the time until now.

        Raises
        ------
        InputError
            If that is not positive.
        """
        if not 0 < seconds < math.inf:
            raise InputError(f"seconds is {seconds!r}; expected a positive number")
        with self._changed:
            now_s = time.monotonic()
            return BatcherTimeline(
                batches=[batch for batch in self._records if batch.began_s + batch.seconds > now_s - seconds],
                given_up=[(moment_s, count) for moment_s, count in self._given_up if moment_s > now_s - seconds],
                until_s=now_s,
                seconds=seconds,
                max_batch=self.max_batch,
                threads=len(self._threads),
            )

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, end the threads, and let go of the function.

        Waits for what runs, and for requests that are being prepared.

        Parameters
        ----------
        drain : bool
            Whether requests that wait are still run, or cancelled.

        Raises
        ------
        InputError
            From within ``prepare``, which this would wait for.
        """
        with self._changed:
            if threading.get_ident() in self._entering.values():
                raise InputError("close() is called from within prepare, for which it waits; call it afterwards")
            self._closing, self._is_draining = True, drain and self._is_draining
            if not drain:
                self._cancel_all()
            self._changed.notify_all()
        if os.getpid() == self._owner:
            for thread in self._threads:
                thread.join()
            # Who holds this batcher does not hold its models and their memory.
            self._function, self._prepare = _closed, None

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prepare_and_add(self, request: Request, prepare: Callable[[Any], Any]) -> None:
        is_waited_for = False
        try:
            with self._changed:
                self._refuse(request)
                self._entering[request] = threading.get_ident()
                self._queued_bytes += request.size_bytes
                count = len(self._entering)
            request.item = prepare(request.item)
            call_when_done = getattr(request.item, "add_done_callback", None)
            if call_when_done is None:
                self._enter(request)
                return
            began_s = time.monotonic()
            call_when_done(lambda *_: self._enter(request, count, began_s))
            with self._changed:
                if request in self._entering:
                    self._entering[request] = _NOBODY
                    if request.deadline_s < self._looks_s:  # else a thread will look in time
                        self._changed.notify()
            is_waited_for = True
        finally:
            if not is_waited_for:  # whatever came between, an interrupt perhaps: else close() would wait for this one
                with self._changed:
                    self._leave(request)

    def _enter(self, request: Request, count: int = 0, began_s: float = 0.0) -> None:
        """Let a request wait for a batch that is prepared."""
        with self._changed:
            if request not in self._entering:
                return
            if count and self._entering[request] != threading.get_ident():  # not at once
                self._done_in.update(count, time.monotonic() - began_s)
            self._leave(request)
            try:
                self._add(request)
            except Exception as error:  # by its bucket, or its priority, which are the caller's
                if not count:
                    raise
                self._counts.update(submitted=1, failed=1)
                request.future.set_exception(error)

    def _leave(self, request: Request) -> None:
        """Who was let in is not prepared any more."""
        if self._entering.pop(request, None) is not None:
            self._queued_bytes -= request.size_bytes
            if self._closing:
                self._changed.notify_all()

    def _add(self, request: Request) -> None:
        self._queue.add(request)
        self._counts["submitted"] += 1
        self._queued_bytes += request.size_bytes
        if not self._is_draining:
            self._cancel_all()
        self._changed.notify(len(self._threads) if self._closing else 1)

    def _refuse(self, request: Request) -> None:
        """Turn a request away for which there is no room, or no time."""
        self._refuse_if_closed()
        count = len(self._queue) + len(self._entering)
        if count >= self._max_items or self._queued_bytes + request.size_bytes > self._max_bytes:
            self._counts["rejected"] += 1
            raise OverloadError(
                f"{count} requests of {self._queued_bytes} bytes wait; the limit is {self._max_items} and "
                f"{self._max_bytes} bytes. Come again later, or raise max_queue_items or max_queue_bytes",
                retry_after_s=self.latency(self.max_batch) * max(count / self.max_batch, 1.0),
            )
        # With nobody else to be prepared it is let in, or what was slow once would never be found to be quicker.
        done_in_s = _LATE_DONE * self._done_in(len(self._entering) + 1) if self._entering else 0.0
        if count < self.max_batch and not done_in_s:
            return
        before = self._queue.before(request)
        before += [other for other in self._entering if other.bucket == request.bucket and other.goes_before(request)]
        expected_s = self._policy.answered_in_s(
            before, request.arrived_s, servers=len(self._threads), prepared_in_s=done_in_s
        )
        if request.arrived_s + expected_s > request.deadline_s:
            self._counts["rejected"] += 1
            left_ms = (request.deadline_s - request.arrived_s) * 1e3
            raise OverloadError(
                f"so many requests go before this one that its answer is not to be had before {expected_s * 1e3:.0f} "
                f"ms; its deadline is in {left_ms:.0f} ms. Come again later, or with more time",
                retry_after_s=request.arrived_s + expected_s - request.deadline_s,
            )

    def _refuse_if_closed(self) -> None:
        if self._closing or os.getpid() != self._owner:
            raise InputError("this Batcher is closed, or of another process; make one here")

    def _work(self, thread: int) -> None:
        """The life of a thread: wait for requests, choose some, run them."""
        while True:
            with self._changed:
                self._wait_for_work(thread)
                warm_up = self._warm_ups.pop(thread, None)
                if warm_up is None:
                    if not len(self._queue):
                        return
                    batch, late, reason = self._choose()
                    self._busy += bool(batch)
                if len(self._queue):
                    self._changed.notify()
            if warm_up is not None:
                items, done = warm_up
                done.set_result(self._outcomes(items, [1]))
                continue
            for request in late:
                request.future.set_exception(
                    DeadlineError("the request was given up: it has waited too long to be answered in time")
                )
            if batch:
                self._run(batch, reason, thread)

    def _wait_for_work(self, thread: int) -> None:
        """Until requests shall run, or none will come any more, or this thread shall warm up."""
        while thread not in self._warm_ups and not (self._closing and len(self._queue) + len(self._entering) == 0):
            now_s = time.monotonic()
            left_s = self._give_up_prepared_too_long(now_s)
            if len(self._queue):
                waiting = self._queue.first(now_s)
                start_s = self._policy.start_s(waiting, is_busy=self._busy > 0) - now_s
                if start_s <= 0 or self._closing:
                    return
                left_s = min(left_s, start_s)
            elif self._closing and not self._entering:
                continue
            self._looks_s = now_s + left_s
            self._changed.wait(None if left_s == math.inf else left_s)

    def _give_up_prepared_too_long(self, now_s: float) -> float:
        """Let nobody wait beyond his deadline for what is prepared, and say in how many seconds to look again."""
        waiting = [request for request, thread in self._entering.items() if thread == _NOBODY]
        for request in [request for request in waiting if request.deadline_s <= now_s or not self._is_draining]:
            self._leave(request)
            self._counts["submitted"] += 1
            if not self._is_draining:
                request.future.cancel()
            is_late = request.future.set_running_or_notify_cancel()
            self._counts["late" if is_late else "cancelled"] += 1
            if is_late:
                message = "the request was given up: it took too long to be prepared"
                request.future.set_exception(DeadlineError(message))
        return min((request.deadline_s - now_s for request in waiting if request in self._entering), default=math.inf)

    def _choose(self) -> tuple[list[Request], list[Request], Reason]:
        """The next batch and those that are given up, taken out of the queue; and why the batch is no larger."""
        now_s = time.monotonic()
        release = self._policy.next_batch(self._queue.first(now_s), now_s)
        if not release.batch and release.late and now_s - self._ran_s > _PROBE_S:
            # Such as after a first call that compiled: who never runs never learns that it has become faster.
            self.latency.forget(1)
            release = Release(release.late[-1:], release.late[:-1], "deadline")
        self._take_out(release.batch + release.late)
        batch = [request for request in release.batch if request.future.set_running_or_notify_cancel()]
        late = [request for request in release.late if request.future.set_running_or_notify_cancel()]
        self._counts["cancelled"] += len(release.batch) + len(release.late) - len(batch) - len(late)
        self._counts["late"] += len(late)
        if late:
            self._given_up.append((now_s, len(late)))
        if batch:
            self._sizes[len(batch)] += 1
            self._reasons[release.reason] += 1
            times_s = [now_s - request.arrived_s for request in batch]
            self._queue_times_s.extend(times_s)
            self._queue_s += sum(times_s)
        return batch, late, release.reason

    def _cancel_all(self) -> None:
        for request in self._queue.all():
            self._take_out([request])
            self._counts["cancelled"] += 1
            request.future.cancel()
            request.future.set_running_or_notify_cancel()

    def _take_out(self, requests: list[Request]) -> None:
        self._queue.remove(requests)
        self._queued_bytes -= sum(request.size_bytes for request in requests)

    def _run(self, batch: list[Request], reason: Reason, thread: int) -> None:
        started_s = time.monotonic()
        attempts = [_ATTEMPTS * (len(batch).bit_length() + 1)]
        most = attempts[0]
        outcomes = self._outcomes([request.item for request in batch], attempts)
        ended_s = time.monotonic()
        with self._changed:
            self._ran_s = ended_s
            self._busy -= 1
            failed = sum(isinstance(outcome, BaseException) for outcome in outcomes)
            missed = sum(
                ended_s > request.deadline_s and not isinstance(outcome, BaseException)
                for request, outcome in zip(batch, outcomes, strict=True)
            )
            self._counts.update(answered=len(batch) - failed, failed=failed, missed=missed)
            waited_s = started_s - min(request.arrived_s for request in batch)
            self._records.append(
                BatchRecord(started_s, ended_s - started_s, thread, len(batch), reason, waited_s, missed, failed)
            )
        for request, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                request.future.set_exception(outcome)
            else:
                request.future.set_result(outcome)
        # Last, for nobody shall wait for it.
        if attempts[0] == most - 1 and not all(isinstance(outcome, BaseException) for outcome in outcomes):
            self.latency.update(len(batch), max(ended_s - started_s, 1e-9))

    def _outcomes(self, items: list[Any], attempts: list[int]) -> list[Any]:
        """A result or an exception for each item; the function is called no more than ``attempts[0]`` times."""
        attempts[0] -= 1
        try:
            with contextlib.nullcontext() if self._device_id is None else own_stream(self._device_id):
                results = list(self._function(items))
                synchronize(self.device)
            if len(results) != len(items):
                raise NbvisionError(f"the function returned {len(results)} results for {len(items)} items")
            return results
        except BaseException as error:  # whatever it is, somebody waits for it
            if len(items) == 1 or attempts[0] <= 0:
                return [error] * len(items)
        middle = len(items) // 2
        return self._outcomes(items[:middle], attempts) + self._outcomes(items[middle:], attempts)


def _closed(items: list[Any]) -> list[Any]:
    raise InputError("this Batcher is closed; make one here")
