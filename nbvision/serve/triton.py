"""What Triton tells of a model, over HTTP as over gRPC: its configuration and its statistics."""

from __future__ import annotations

from typing import Any

from nbvision.serve.pipelines import TensorInfo
from nbvision.serve.served import Served
from nbvision.serve.service import Service

__all__ = ["config_of", "stats_of"]


def stats_of(service: Service, served: Served) -> dict[str, Any]:
    """Counts and times of a model."""
    stats, counts = served.stats(), service.counts[served.name]

    def took(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    items = stats.answered + stats.failed
    return {
        "name": served.name,
        "version": served.version,
        "last_inference": served.last_answer_ms,
        "inference_count": items,
        "execution_count": stats.batches,
        "inference_stats": {
            "success": took(counts.success, counts.duration_s),
            "fail": took(counts.failure, 0),
            "queue": took(items, stats.queue_s),
            "compute_input": took(items, 0),
            "compute_infer": took(items, served.compute_s),
            "compute_output": took(items, 0),
            "cache_hit": took(service.cache.hits, 0),
            "cache_miss": took(service.cache.misses, 0),
        },
        "batch_stats": [
            {"batch_size": size, "compute_infer": took(count, 0)} for size, count in sorted(stats.sizes.items())
        ],
    }


def config_of(served: Served) -> dict[str, Any]:
    """What a model takes and gives."""

    def described(infos: tuple[TensorInfo, ...]) -> list[dict[str, Any]]:
        return [
            {
                "name": info.name,
                "data_type": "TYPE_STRING" if info.datatype == "BYTES" else f"TYPE_{info.datatype}",
                "dims": list(info.shape[1:]) or [1],
            }
            for info in infos
        ]

    return {
        "name": served.name,
        "platform": "nbvision",
        "backend": "nbvision",
        "max_batch_size": served.batcher.max_batch,
        "input": described(served.pipeline.inputs),
        "output": described(served.pipeline.outputs),
    }
