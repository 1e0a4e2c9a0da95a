"""Three sources take turns on the whole road for a long time, in frozen memory, and get what they get without reuse.

    python tests/soak_memory.py [--batches 10000] [--device cuda] [--out soak.json]

Two films of different sizes and an article with pictures of any size go through decode, letterbox, detector, crops,
masks and embedder. After a warm-up nothing may be allocated. Exits with 1 if something was, if memory grew, or if a
batch gave other values than the same batch in memory that is never used twice.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from soak_decode import device_bytes, host_bytes

import nbvision as nbv
from nbvision.demo.garments import backgrounds, draw_scene, make_products
from nbvision.demo.run import models_directory
from nbvision.recognizer import Recognition, Recognizer
from nbvision.runtime import memory
from nbvision.runtime._rings import Manager
from nbvision.runtime.device import Device, resolve_device

DIFFERENT = 4  # batches of each source, again and again
IMAGES = 4
CHECK_EVERY = 37  # prime to the batches of a round, so that each of them is looked at
WARM_UP_ROUNDS = 3
HOST_GROWTH_BYTES = 48 << 20
FIELDS = ("images", "boxes", "mask_boxes", "masks", "scores", "labels", "vectors")


def sources(rng: np.random.Generator) -> dict[str, list[list[bytes]]]:
    """Batches of compressed images by source; those of an article are of any size, one of them a PNG."""
    goods, photos = make_products(12, seed=5), backgrounds("test")

    def image(height: int, width: int, format: str) -> bytes:
        shown = [goods[index] for index in rng.choice(len(goods), size=rng.integers(1, 4), replace=False)]
        scene = draw_scene(shown, background=photos[rng.integers(len(photos))], size=(height, width), rng=rng)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, format)
        return file.getvalue()

    def batches(sizes: list[tuple[int, int]], formats: list[str]) -> list[list[bytes]]:
        return [
            [image(*sizes[rng.integers(len(sizes))], formats[index % len(formats)]) for index in range(IMAGES)]
            for _ in range(DIFFERENT)
        ]

    odd = [(int(rng.integers(300, 900)), int(rng.integers(300, 900))) for _ in range(20)]
    return {
        "film-1": batches([(720, 1280)], ["JPEG"]),
        "film-2": batches([(360, 640)], ["JPEG"]),
        "article": batches(odd, ["JPEG", "JPEG", "PNG"]),
    }


def in_turns(batches: dict[str, list[list[bytes]]]) -> list[tuple[str, list[bytes]]]:
    """A batch of each source, then the next of each."""
    return [(name, batches[name][turn]) for turn in range(DIFFERENT) for name in batches]


def allocations(device: Device) -> dict[str, int]:
    """Growths of the rings, and bytes of CuPy's pool."""
    counted = {"cpu": memory.stats(device="cpu").allocations}
    if device == "cuda":
        import cupy

        counted = {place: memory.stats(device=place).allocations for place in ("cuda", "pinned")}
        counted["pool bytes"] = cupy.get_default_memory_pool().total_bytes()
    return counted


@contextlib.contextmanager
def nothing_used_twice() -> Iterator[None]:
    """Every buffer is new."""
    with mock.patch.object(Manager, "_take", return_value=None):
        yield


def same(found: Recognition, expected: Recognition) -> bool:
    return all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in FIELDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    recognizer = Recognizer.load(models_directory(), device=device)
    work = in_turns(sources(np.random.default_rng(20261124)))

    def run(name: str, files: list[bytes]) -> Recognition:
        with memory.source(name):
            # The batches are small, and so the same file gives the same pixels every time.
            return recognizer.recognize(nbv.decode(files, device=device, deterministic=True))

    with nothing_used_twice():
        expected = [run("unpooled", files) for _, files in work]
    memory.clear(device=device)
    for name, files in work * WARM_UP_ROUNDS:
        run(name, files)

    before, wrong, checked = allocations(device), 0, 0
    measured: list[dict[str, Any]] = []
    started = time.perf_counter()
    with memory.frozen(device=device):
        for number in range(arguments.batches):
            found = run(*work[number % len(work)])
            if number % CHECK_EVERY == 0:
                checked += 1
                wrong += not same(found, expected[number % len(work)])
            if (number + 1) * 10 // arguments.batches > len(measured):
                now = {"batches": number + 1, "host_bytes": host_bytes()}
                now["device_bytes"] = device_bytes() if device == "cuda" else 0
                measured.append(now)
                print(f"{number + 1:7d} batches, {(number + 1) / (time.perf_counter() - started):6.0f} a second", now)
    after = allocations(device)
    grown = {key: measured[-1][key] - measured[0][key] for key in ("host_bytes", "device_bytes")}
    allocated = {place: after[place] - before[place] for place in before}
    print(f"{checked} batches looked at, {wrong} with other values; allocated {allocated}; grown {grown}")
    print(memory.stats(device=device))
    if arguments.out:
        result = {"device": device, "batches": arguments.batches, "checked": checked, "wrong": wrong}
        result |= {"allocated": allocated, "grown": grown, "measured": measured}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    flat = grown["host_bytes"] <= HOST_GROWTH_BYTES and grown["device_bytes"] <= 0
    return 0 if flat and not wrong and not any(allocated.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
