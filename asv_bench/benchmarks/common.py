"""Clocks, random data, and what a benchmark needs to run at all."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# asv hands no PYTHONPATH on. An nbvision that is installed comes first.
sys.path += [str(path) for path in (ROOT, ROOT / "kernels", ROOT / "examples") if str(path) not in sys.path]


# --- what there is -------------------------------------------------------------------------------------------------


def need_cuda() -> None:
    """n/a without a GPU."""
    from nbvision.runtime.device import cuda_unavailable_because

    reason = cuda_unavailable_because()
    if reason is not None:
        raise NotImplementedError(reason)


def need(module: str) -> ModuleType:
    """An optional peer, or n/a."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotImplementedError(f"{module} is not installed: {error}") from error


def straightforward() -> ModuleType:
    """``examples/straightforward.py``: OpenCV and NumPy on the host."""
    need("cv2")
    return importlib.import_module("straightforward")


# --- clocks --------------------------------------------------------------------------------------------------------


def wall_us(call: Callable[[], Any], *, finish: Callable[[], Any] = lambda: None, seconds: float = 1.0) -> float:
    """Median microseconds of one call on the host's clock, ``finish`` included; at least three, after a warm-up."""
    samples: list[float] = []
    call()
    finish()
    deadline = time.perf_counter() + seconds
    while len(samples) < 3 or (time.perf_counter() < deadline and len(samples) < 200):
        started = time.perf_counter()
        call()
        finish()
        samples.append((time.perf_counter() - started) * 1e6)
    return statistics.median(samples)


def in_turns(calls: Sequence[Callable[[], Any]], *, turns: int, seconds: float) -> list[float]:
    """The median of each call's :func:`wall_us`, the GPU waited for, over so many turns of all of them."""
    times = [[wall_us(call, finish=wait_for_gpu, seconds=seconds) for call in calls] for _ in range(turns)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def gpu_us(call: Callable[[], Any], *, seconds: float = 1.0) -> float:
    """Median microseconds of one call on the GPU's clock.

    Each sample is many calls between one pair of events on the default stream, so that no call is charged for the
    events, nor for the host where the host keeps ahead of the GPU.
    """
    import cupy

    for _ in range(3):
        call()
    estimate = max(_between_events(cupy, call, 1), 1.0)
    calls = int(min(max(20_000 / estimate, 1), 500))
    deadline = time.perf_counter() + seconds
    samples: list[float] = []
    while len(samples) < 3 or (time.perf_counter() < deadline and len(samples) < 50):
        samples.append(_between_events(cupy, call, calls))
    return statistics.median(samples)


def _between_events(cupy: Any, call: Callable[[], Any], calls: int) -> float:
    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return cupy.cuda.get_elapsed_time(first, last) * 1e3 / calls


def launch_us(call: Callable[[], Any], *, samples: int = 15, calls: int = 100) -> float:
    """Median microseconds the host spends in one call while the GPU works behind it."""
    import cupy

    medians = []
    for _ in range(samples + 1):  # the first warms up
        cupy.cuda.Device().synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        medians.append((time.perf_counter() - started) * 1e6 / calls)
    cupy.cuda.Device().synchronize()
    return statistics.median(medians[1:])


def wait_for_gpu() -> None:
    import cupy

    cupy.cuda.Device().synchronize()


@functools.cache
def copied_bytes_per_us() -> float:
    """Bytes read plus bytes written a microsecond, of a device-to-device copy."""
    import cupy

    size = 1 << 29
    source, target = cupy.zeros(size, np.uint8), cupy.empty(size, np.uint8)
    return 2 * size / gpu_us(lambda: target.data.copy_from_device_async(source.data, size))


# --- data ----------------------------------------------------------------------------------------------------------


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """An RGB image of independent bytes."""
    raw = np.frombuffer(np.random.default_rng(seed).bytes(height * width * 3), np.uint8)
    return raw.reshape(height, width, 3).copy()


def scenery(height: int, width: int, seed: int) -> np.ndarray:
    """An RGB image with the detail of a photograph: noise at every scale, weaker the finer it is."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    cell = 1
    while cell < min(height, width):
        rows, columns = -(-height // cell) + 1, -(-width // cell) + 1
        small = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        layer = np.asarray(small.resize((columns * cell, rows * cell), Image.Resampling.BILINEAR), np.float32)
        total += (layer[:height, :width] - 127.5) * FINENESS * cell**0.5
        cell *= 2
    return (total + 127.5).clip(0, 255).astype(np.uint8)


FINENESS = 0.1  # gives the file sizes of photographs: 50 kB at 500x375, 430 kB at 1080p


def jpeg(image: np.ndarray) -> bytes:
    """Quality 88, 4:2:0."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=88, subsampling=2)
    return stream.getvalue()


def catalogue_files(count: int) -> list[bytes]:
    """Photographs of the demo's shop, in mixed formats; drawn once, kept in nbvision's cache directory."""
    from nbvision.demo import catalogue, garments
    from nbvision.runtime.cache import cache_dir

    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (catalogue, garments))
    directory = cache_dir() / "asv" / f"catalogue-{count}-{hashlib.sha256(sources).hexdigest()[:16]}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        drawn = Path(tempfile.mkdtemp(dir=directory.parent))
        shop = catalogue.make_catalogue(drawn, products=count, photographs=1, queries=0, seed=1)
        for path in shop.broken:
            path.unlink()
        try:
            os.replace(drawn / "catalogue", directory)  # complete, or not there
        except OSError:  # another process drew the same meanwhile
            if not directory.exists():
                raise
        finally:
            shutil.rmtree(drawn)
    return [path.read_bytes() for path in sorted(directory.iterdir())]
