"""Requests of single items in, batches that meet their deadlines out; and the same policy simulated."""

from nbvision.batching.batcher import Batcher, BatcherStats
from nbvision.batching.latency import LatencyCurve
from nbvision.batching.simulator import Simulation, goodput, simulate
from nbvision.batching.timeline import BatcherTimeline, BatchRecord

__all__ = [
    "BatchRecord",
    "Batcher",
    "BatcherStats",
    "BatcherTimeline",
    "LatencyCurve",
    "Simulation",
    "goodput",
    "simulate",
]
