"""Decode for a long time, damaged files among the others, and see that memory stays what it was.

    python tests/soak_decode.py [--images 200000] [--device cuda] [--out soak.json]

Exits with 1 if memory grew after the first tenth, or a damaged file was taken for a whole one.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import nbvision as nbv
from nbvision.runtime import memory
from nbvision.runtime.device import resolve_device

BATCH = 256
DAMAGED = 0.02
HOST_GROWTH_BYTES, DEVICE_GROWTH_BYTES = 64 << 20, 64 << 20  # one image in a thousand kept would be 100 MB
KINDS: list[tuple[str, dict[str, Any]]] = [("JPEG", {})] * 43 + [("JPEG", {"progressive": True})] * 2
KINDS += [("JPEG", {"subsampling": 0})] * 3 + [("PNG", {}), ("WEBP", {})]


def whole_files(rng: np.random.Generator) -> list[bytes]:
    files = []
    for format, options in KINDS * 4:
        height, width = rng.integers(200, 640, 2).tolist()
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        file = io.BytesIO()
        noise.resize((width, height), Image.Resampling.BICUBIC).save(file, format, **options)
        files.append(file.getvalue())
    return files


def batches(files: list[bytes], images: int, rng: np.random.Generator) -> Iterator[list[bytes]]:
    for start in range(0, images, BATCH):
        chosen = [files[index] for index in rng.integers(len(files), size=min(BATCH, images - start))]
        for index in np.flatnonzero(rng.random(len(chosen)) < DAMAGED):
            chosen[index] = chosen[index][: len(chosen[index]) * int(rng.integers(1, 9)) // 10]
        yield chosen


def host_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmRSS")


def device_bytes() -> int:
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    rng = np.random.default_rng(20261123)
    whole = whole_files(rng)
    known = set(whole)
    seen = refused = missed = 0
    measured: list[dict[str, int]] = []
    started = time.perf_counter()
    with nbv.Decoder(device=device) as decoder:
        # As many batches as can be alive at once, larger than any other: the rings need not grow any more.
        alive = [
            decoder.submit([whole[index] for index in rng.integers(len(whole), size=BATCH * 9 // 8)])
            for _ in range(decoder.workers + 6)
        ]
        for future in alive:
            future.result()
        del alive, future
        for files, batch in decoder.stream(batches(whole, arguments.images, rng)):
            for data, error in zip(files, batch.errors, strict=True):
                refused += error is not None
                missed += (error is None) != (data in known)
            seen += len(files)
            if seen * 10 // arguments.images > len(measured):
                now = {"images": seen, "host_bytes": host_bytes()}
                now["allocations"] = sum(memory.stats(device=place).allocations for place in (device, "pinned"))
                now["device_bytes"] = device_bytes() if device == "cuda" else 0
                measured.append(now)
                print(
                    f"{seen:8d} images, {seen / (time.perf_counter() - started):7.0f} a second",
                    *now.values(),
                    flush=True,
                )
    first, last = measured[0], measured[-1]
    grown = {key: last[key] - first[key] for key in ("host_bytes", "device_bytes", "allocations")}
    flat = grown["host_bytes"] <= HOST_GROWTH_BYTES and grown["device_bytes"] <= DEVICE_GROWTH_BYTES
    print(f"{refused} of {seen} refused, {missed} wrongly; grown since the first tenth: {grown}")
    if arguments.out:
        result = {"device": device, "refused": refused, "missed": missed, "grown": grown, "measured": measured}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if flat and not missed and refused else 1


if __name__ == "__main__":
    sys.exit(main())
