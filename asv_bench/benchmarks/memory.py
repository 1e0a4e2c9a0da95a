"""What memory costs: a batch's buffers taken, touched and let go, by three sources of different sizes in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .common import need_cuda, wait_for_gpu, wall_us

FRAMES = [(1080, 1920), (720, 1280), (360, 640)]
BATCHES = [1, 16]
ON_GPU = ["nbvision's rings", "CuPy's pool", "cudaMalloc and cudaFree"]
ON_CPU = ["nbvision's rings", "numpy.empty"]
TURNS = 10

Take = Callable[[str, int], Any]


def buffers(batch: int, frame: tuple[int, int]) -> list[int]:
    """Bytes of the images, the detector's input and output, crops and vectors."""
    height, width = frame
    return [
        batch * size for size in (height * width * 3, 3 * 640 * 640 * 2, 84 * 8400 * 4, 4 * 3 * 224 * 224 * 2, 8192)
    ]


def rings(place: Any) -> Take:
    from nbvision import memory

    def take(name: str, size: int) -> Any:
        with memory.source(name):
            return memory.acquire(size, device=place).view((size,))

    return take


def turns(take: Take, batch: int, seen: Callable[[], None] = lambda: None) -> None:
    """Each source has a batch, again and again; every buffer is written to once."""
    for _ in range(TURNS):
        for index, frame in enumerate(FRAMES):
            held = [take(f"film-{index}", size) for size in buffers(batch, frame)]
            for array in held:
                array[:: 1 << 12].fill(1)  # a byte of every page
            seen()


class AllocationOnGPU:
    params = (BATCHES, ON_GPU)
    param_names = ("images of a batch", "how")

    def setup(self, batch: int, how: str) -> None:
        need_cuda()
        import cupy

        self.take = rings("cuda") if how == ON_GPU[0] else lambda name, size: cupy.empty(size, np.uint8)

    @contextlib.contextmanager
    def allocator(self, how: str) -> Iterator[None]:
        import cupy

        from nbvision import memory

        pool = cupy.get_default_memory_pool()
        memory.clear(device="cuda")
        pool.free_all_blocks()
        if how == "cudaMalloc and cudaFree":
            cupy.cuda.set_allocator(None)
        try:
            yield
        finally:
            cupy.cuda.set_allocator(pool.malloc)

    def track_us(self, batch: int, how: str) -> float:
        """Of one batch."""
        with self.allocator(how):
            return wall_us(lambda: turns(self.take, batch), finish=wait_for_gpu) / (TURNS * len(FRAMES))

    track_us.unit = "us"

    def track_peak_megabytes(self, batch: int, how: str) -> float:
        import cupy

        lowest: list[int] = []
        with self.allocator(how):
            before, _ = cupy.cuda.runtime.memGetInfo()
            turns(self.take, batch, lambda: lowest.append(cupy.cuda.runtime.memGetInfo()[0]))
        return (before - min(lowest)) / 1e6

    track_peak_megabytes.unit = "MB"


class AllocationOnCPU:
    params = (BATCHES, ON_CPU)
    param_names = ("images of a batch", "how")

    def setup(self, batch: int, how: str) -> None:
        self.take = rings("cpu") if how == ON_CPU[0] else lambda name, size: np.empty(size, np.uint8)

    def track_us(self, batch: int, how: str) -> float:
        """Of one batch."""
        return wall_us(lambda: turns(self.take, batch)) / (TURNS * len(FRAMES))

    track_us.unit = "us"
