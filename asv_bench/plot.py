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
}


def curves(record: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Points of each way to do it."""
    values = [[ast.literal_eval(value) for value in axis] for axis in record["params"]]
    points = defaultdict(list)
    for (across, how), result in zip(itertools.product(*values), record["result"], strict=True):
        if result is not None:
            points[how].append((across, result))
    return points


def draw(record: dict[str, Any], path: Path, title: str, label: str) -> None:
    """One picture, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for how, points in curves(record).items():
        across, times = zip(*sorted(points), strict=True)
        axes.loglog(across, times, marker="o", label=how)
    axes.set(title=title, xlabel=label, ylabel="microseconds on the GPU, median")
    axes.set_xticks(sorted({across for points in curves(record).values() for across, _ in points}))
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
