"""What Prometheus asks for: Triton's names where the meaning is the same, else ours."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from typing import Any

from nbvision.batching import BatcherStats
from nbvision.errors import MissingExtraError
from nbvision.serve.served import Served
from nbvision.serve.service import Counts, Service

__all__ = ["as_text", "described"]

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


# Name, what it counts, and how it is read of a pipeline, its batcher's counts, and those of its requests.
_COUNTERS: tuple[tuple[str, str, Callable[[Served, BatcherStats, Counts], float]], ...] = (
    ("nv_inference_request_success", "Requests answered", lambda served, stats, counts: counts.success),
    ("nv_inference_request_failure", "Requests that failed", lambda served, stats, counts: counts.failure),
    ("nv_inference_count", "Items computed", lambda served, stats, counts: stats.answered + stats.failed),
    ("nv_inference_exec_count", "Batches computed", lambda served, stats, counts: stats.batches),
    (
        "nv_inference_request_duration_us",
        "Microseconds of the requests that were answered",
        lambda served, stats, counts: counts.duration_s * 1e6,
    ),
    (
        "nv_inference_queue_duration_us",
        "Microseconds that items waited",
        lambda served, stats, counts: stats.queue_s * 1e6,
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Microseconds of batches",
        lambda served, stats, counts: served.compute_s * 1e6,
    ),
    ("nbvision_given_up", "Items that could not be in time", lambda served, stats, counts: stats.late),
    ("nbvision_missed", "Items answered too late", lambda served, stats, counts: stats.missed),
    ("nbvision_rejected", "Items turned away", lambda served, stats, counts: stats.rejected),
    ("nbvision_cancelled", "Items taken back", lambda served, stats, counts: stats.cancelled),
)


class _Collector:
    """Reads a service's counts whenever they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UnknownMetricFamily

        service = self._service
        labels = ["model", "version", "worker"]
        rows = [
            ([name, served.version, str(service.worker)], served, served.stats(), service.counts[name])
            for name, served in service.served.items()
        ]

        for name, text, read in _COUNTERS:
            # A counter's name would be made to end in _total, which Triton's do not.
            make = UnknownMetricFamily if name.startswith("nv_") else CounterMetricFamily
            family = make(name, text, labels=labels)
            for key, served, stats, counts in rows:
                family.add_metric(key, read(served, stats, counts))
            yield family
        pending = GaugeMetricFamily("nv_inference_pending_request_count", "Items that wait", labels=labels)
        for key, _, stats, _ in rows:
            pending.add_metric(key, stats.waiting)
        yield pending
        reasons = CounterMetricFamily(
            "nbvision_batches", "Batches by why they were no larger", labels=[*labels, "reason"]
        )
        sizes = CounterMetricFamily("nbvision_batches_of_size", "Batches by size", labels=[*labels, "size"])
        for key, _, stats, _ in rows:
            for reason, count in stats.reasons.items():
                reasons.add_metric([*key, reason], count)
            for size, count in stats.sizes.items():
                sizes.add_metric([*key, str(size)], count)
        yield from (reasons, sizes)
        worker = [str(service.worker)]
        for name, value in (("hits", service.cache.hits), ("misses", service.cache.misses)):
            cache = CounterMetricFamily(f"nbvision_cache_{name}", f"Results: {name} of the cache", labels=["worker"])
            cache.add_metric(worker, value)
            yield cache
        kept = GaugeMetricFamily("nbvision_cache_used_bytes", "Results that are kept", labels=["worker"])
        kept.add_metric(worker, service.cache.used_bytes)
        held = GaugeMetricFamily(
            "nbvision_memory_held_bytes", "Buffers of the memory manager", labels=["device", "worker"]
        )
        for device, held_bytes in _held_bytes(service).items():
            held.add_metric([device, *worker], held_bytes)
        yield from (kept, held)


def as_text(service: Service) -> tuple[bytes, str]:
    """The page that Prometheus reads, and its content type.

    Raises
    ------
    MissingExtraError
        Without prometheus_client.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise MissingExtraError("prometheus_client", extra="serve", needed_for="metrics") from error
    registry = CollectorRegistry()
    registry.register(_Collector(service))
    return generate_latest(registry), _CONTENT_TYPE


def described(service: Service) -> dict[str, Any]:
    """The same for people: what the page draws."""
    models = {}
    for name, served in service.served.items():
        stats, counts = served.stats(), service.counts[name]
        recent = sorted(counts.last_ms)
        models[name] = {
            "version": served.version,
            "healthy": served.is_healthy,
            "device": served.pipeline.device,
            "takes_images": served.pipeline.takes_images,
            "success": counts.success,
            "failure": counts.failure,
            "waiting": stats.waiting,
            "running": stats.running,
            "batches": stats.batches,
            "items": stats.answered + stats.failed,
            "rejected": stats.rejected,
            "given_up": stats.late,
            "missed": stats.missed,
            "compute_s": served.compute_s,
            "queue_s": stats.queue_s,
            "p50_ms": recent[math.ceil(0.5 * len(recent)) - 1] if recent else None,
            "p99_ms": recent[math.ceil(0.99 * len(recent)) - 1] if recent else None,
        }
    return {
        "worker": service.worker,
        "models": models,
        "cache": {"hits": service.cache.hits, "misses": service.cache.misses, "used_bytes": service.cache.used_bytes},
        "memory": _held_bytes(service),
    }


def _held_bytes(service: Service) -> dict[str, int]:
    """Of the memory managers of all pipelines, by device."""
    held: collections.Counter[str] = collections.Counter()
    for served in service.served.values():
        held[served.pipeline.device] += served.pipeline.held_bytes
    return dict(sorted(held.items()))
