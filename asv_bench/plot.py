"""Draws the curves of docs/speed.md from the results of ``run_gpu.py``. Needs matplotlib.

python asv_bench/plot.py results.json --out docs
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

# benchmark -> file, title, label of the horizontal axis
CURVES = {
    "preprocess.BatchesOnGPU.track_us": ("speed-batches.png", "1080p to 640 x 640 letterbox, float16", "images"),
    "preprocess.CropsOnGPU.track_us": ("speed-crops.png", "boxes on the GPU to 224 x 224, float16", "boxes"),
    "memory.AllocationOnGPU.track_us": ("memory-cost.png", "a batch's buffers taken and let go", "images of a batch"),
    "decode.BestSingleWayOnGPU.track_times_as_long": (
        "speed-decode.png",
        "JPEGs to device memory, the better of nvImageCodec's ways",
        "images in a call",
    ),
}


def panels(record: dict[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Numbers go across; the last of the other parameters makes curves, and those before it panels."""
    values = [[ast.literal_eval(value) for value in axis] for axis in record["params"]]
    (number,) = (index for index, axis in enumerate(values) if all(isinstance(value, int) for value in axis))
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for names, result in zip(itertools.product(*values), record["result"], strict=True):
        *panel, curve = (name for index, name in enumerate(names) if index != number)
        if result is not None:
            found[", ".join(panel)][curve].append((names[number], result))
    return found


def draw(record: dict[str, Any], path: Path, title: str, label: str) -> None:
    """One picture, both axes logarithmic, but for what is a ratio."""
    is_ratio = record["unit"].startswith("x ")
    found = panels(record)
    figure, row = plt.subplots(1, len(found), figsize=(5.4 * len(found) + 1, 4.0), layout="constrained", squeeze=False)
    for axes, (panel, curves) in zip(row[0], found.items(), strict=True):
        for how, points in curves.items():
            across, times = zip(*sorted(points), strict=True)
            (axes.semilogx if is_ratio else axes.loglog)(across, times, marker="o", label=how)
        if is_ratio:
            axes.axhline(1.0, color="black", linewidth=1)
            axes.set_ylim(bottom=0)
        axes.set(title=f"{title}, {panel}".rstrip(", "), xlabel=label, ylabel=f"{record['unit']}, median")
        axes.set_xticks(sorted({across for points in curves.values() for across, _ in points}))
        axes.get_xaxis().set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="directory of the pictures")
    arguments = parser.parse_args()
    for record in json.loads(arguments.results.read_text())["benchmarks"]:
        if record["name"] in CURVES:
            name, title, label = CURVES[record["name"]]
            draw(record, arguments.out / name, title, label)
            print(arguments.out / name)


if __name__ == "__main__":
    main()
