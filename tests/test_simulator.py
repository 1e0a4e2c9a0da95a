"""Numba's simulator runs every CUDA kernel on small sizes: an index out of range raises there.

In a process of its own, because the simulator is chosen when Numba is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


CASES = [
    "preprocess",
    "nv12",
    "planes",
    "taps",
    "image_regions",
    "box_regions",
    "nms",
    "masks",
    "mask_extras",
    "instances",
    "draw",
]
CASES += ["warp", "move", "pointwise"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_stay_in_range(case):
    environment = dict(os.environ, NUMBA_ENABLE_CUDASIM="1", NUMBA_DISABLE_JIT="1", NBVISION_DEVICE="cpu")
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels"), str(HERE)])
    command = [sys.executable, "-W", "ignore", str(HERE / "simulate.py"), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{case}: ok"
