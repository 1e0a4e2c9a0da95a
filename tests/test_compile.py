"""Every kernel, every architecture, without a GPU: it compiles, spills nothing and uses no float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import nvjitlink
from nbvision_kernels.catalog import all_kernels

import nbvision as nbv
from nbvision.errors import CompileError
from nbvision.runtime import compile as compiling
from nbvision.runtime.compile import (
    CompiledKernel,
    begin_to_compile,
    compile_kernel,
    compile_without_spills,
    linked_ptx,
    load_kernel,
)
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


class Cupy:
    """As much of CuPy as loads a kernel: what it loads is what is in the file."""

    class RawModule:
        def __init__(self, path):
            self.code = Path(path).read_bytes()

        def get_function(self, entry):
            return entry, self.code

    class cuda:
        class driver:
            CUDADriverError = RuntimeError


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The kernels that were compiled, in order; with ``finish`` unset a compilation goes on."""
    made = []
    finish = threading.Event()

    def compile_slowly(kernel, cc):
        made.append(kernel.name)
        assert finish.wait(10)
        if kernel is KERNELS[1]:
            raise CompileError("on purpose")
        return CompiledKernel(kernel.name, kernel.entry, b"machine code", 1, 0)

    monkeypatch.setattr(compiling, "kernel_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(compiling, "compute_capability", lambda device_id: (9, 0))
    monkeypatch.setattr(compiling, "compile_without_spills", compile_slowly)
    monkeypatch.setattr(compiling, "require_cupy", lambda needed_for: Cupy)
    monkeypatch.setattr(compiling, "_begun", {})
    return made, finish


def test_who_begins_and_who_loads_share_one_compilation(compiled):
    made, finish = compiled
    kernel = KERNELS[0]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(begin_to_compile, [kernel] * 4))
        loads = [pool.submit(load_kernel.__wrapped__, kernel) for _ in range(4)]
        time.sleep(0.05)  # all of them wait by now, or will find it on disk
        finish.set()
        assert {load.result() for load in loads} == {(kernel.entry, b"machine code")}
    assert made == [kernel.name]
    begin_to_compile(kernel)
    assert not compiling._begun  # on disk: there is nothing to begin


def test_what_does_not_compile_in_the_thread_is_raised_where_it_is_loaded(compiled):
    made, finish = compiled
    kernel = KERNELS[1]
    begin_to_compile(kernel)
    finish.set()
    with pytest.raises(CompileError, match="on purpose"):
        load_kernel.__wrapped__(kernel)
    assert made == [kernel.name] * 2


@pytest.mark.needs_cuda
@pytest.mark.parametrize("parity", ["cv2", "pil"])
def test_a_first_call_compiles_each_kernel_once(tmp_path, monkeypatch, parity):
    """The frame in a thread of its own, which begins before the kernels of the tables are asked for."""
    made, in_threads = [], []

    def compile_and_tell(kernel, cc):
        made.append(kernel.name)
        if threading.current_thread().name.startswith("nbvision compiles"):
            in_threads.append(kernel.name)
        return compile_without_spills(kernel, cc)

    monkeypatch.setattr(compiling, "kernel_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(compiling, "compile_without_spills", compile_and_tell)
    load_kernel.cache_clear()
    image = np.arange(9 * 7 * 3, dtype=np.uint8).reshape(9, 7, 3)
    plan = nbv.Preprocess((5, 4), fit="stretch", parity=parity)
    tensor = plan(nbv.ImageBatch.from_arrays([image], device="cuda"))[0]
    assert len(made) == len(set(made)) == len(list(tmp_path.iterdir())) == (2 if parity == "cv2" else 3)
    assert [name.partition("-")[0] for name in in_threads] == ["preprocess" if parity == "cv2" else "resample"]
    np.testing.assert_array_equal(tensor.get(), plan(nbv.ImageBatch.from_arrays([image], device="cpu"))[0])


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
