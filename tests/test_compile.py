"""Every kernel, every architecture, without a GPU: it compiles, spills nothing and uses no float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda.bindings import nvjitlink
from nbvision_kernels.catalog import all_kernels

from nbvision.runtime import compile as compiling
from nbvision.runtime.compile import compile_kernel, linked_ptx
from nbvision.runtime.device import compute_capability

ARCHITECTURES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
RESOURCES = Path(__file__).parent.parent / "kernels" / "resources.json"
KERNELS = list(all_kernels())


def test_names_are_unique():
    names = [kernel.name for kernel in KERNELS]
    assert len(names) == len(set(names))


def test_a_kernel_asked_for_again_is_the_same():
    """Else load_kernel(), which keeps what it has loaded, would load it from disk at every call."""
    again = list(all_kernels())
    assert again == KERNELS
    assert [hash(kernel) for kernel in again] == [hash(kernel) for kernel in KERNELS]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernel_compiles_everywhere(kernel):
    """No spills, no float64, and no more registers than kernels/resources.json records; tests/record_resources.py
    rewrites that. Another linker than the recorded one allocates differently, and may spill a few bytes."""
    resources = json.loads(RESOURCES.read_text())
    same_linker = resources["nvjitlink"] == list(nvjitlink.version())
    accepted = resources["registers"][kernel.name]
    for cc in ARCHITECTURES:
        compiled = compile_kernel(kernel, cc)
        architecture = f"sm_{cc[0]}{cc[1]}"
        assert compiled.spill_bytes <= (0 if same_linker else 64), architecture
        assert compiled.registers <= accepted[architecture] or not same_linker, architecture
    if not kernel.float64:
        assert ".f64" not in linked_ptx(kernel, (9, 0))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("content", [b"", b"no machine code"])
def test_a_damaged_file_is_compiled_anew(tmp_path, monkeypatch, content):
    monkeypatch.setattr(compiling, "kernel_cache_dir", lambda: tmp_path)
    kernel = KERNELS[0]
    major, minor = compute_capability()
    path = tmp_path / f"{kernel.name}-sm{major}{minor}.cubin"
    path.write_bytes(content)
    load = compiling.load_kernel.__wrapped__  # past the functions that this process has loaded
    assert load(kernel) is not None
    assert len(path.read_bytes()) > 1000


TWO_LOOPS = """
import sys
import numpy as np
from numba import njit
from nbvision.runtime.compile import cpu_loop

def make(value):
    @njit
    def paths(steps):  # calls itself twice, so that it is not inlined
        if steps < 2:
            return value
        return paths(steps - 1) + paths(steps - 2)

    def loop(out):
        for i in range(out.size):
            out[i] = paths(i)

    return loop

for value in map(int, sys.argv[1:]):
    out = np.zeros(5, np.int64)
    cpu_loop(f"paths-{value}", make(value), parallel=False)(out)
    print(*out)
"""


def test_loops_of_two_processes_keep_their_own_functions(tmp_path):
    """Numba gives the functions of both one name, and LLVM keeps one of a name."""

    def run(*values: str) -> list[str]:
        command = [sys.executable, "-c", TWO_LOOPS, *values]
        environment = os.environ | {"NBVISION_CACHE_DIR": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")[
            :-1
        ]

    one, ten = "1 1 2 3 5", "10 10 20 30 50"
    assert run("1") == [one]
    assert run("10") == [ten]
    assert run("1", "10") == [one, ten]
