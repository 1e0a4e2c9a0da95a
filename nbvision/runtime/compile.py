"""Compile, cache, load: three separate steps.

Compiling needs no GPU and no driver: Numba makes LTO-IR of Python functions, NVRTC of the CUDA C around them, nvJitLink
links both to machine code.  Loading and launching go through CuPy, whose launch costs a tenth of Numba's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nbvision.errors import CompileError, MissingExtraError
from nbvision.runtime.cache import kernel_cache_dir, write_atomically
from nbvision.runtime.device import CUDA_EXTRA, compute_capability, require_cupy

if TYPE_CHECKING:
    from nbvision_kernels.catalog import Kernel

__all__ = [
    "CompiledKernel",
    "begin_to_compile",
    "by_value",
    "compile_kernel",
    "compile_without_spills",
    "cpu_loop",
    "linked_ptx",
    "load_kernel",
]

ComputeCapability = tuple[int, int]

# Numba's intermediate code is made once, for the oldest architecture; the linker makes each one's machine code of it.
# The kernels use nothing newer, and instructions and registers on sm_90 are the same as from its own intermediate code.
OLDEST: ComputeCapability = (7, 5)


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code of one kernel for one compute capability, with what the compiler said of it."""

    name: str
    entry: str
    cubin: bytes
    registers: int
    spill_bytes: int


def compile_kernel(kernel: Kernel, cc: ComputeCapability) -> CompiledKernel:
    """Compile a kernel of the catalogue. Needs the CUDA extra, but neither a driver nor a GPU.

    Raises
    ------
    CompileError
        With the compiler's log.
    MissingExtraError
        If the CUDA compilers are not installed.
    """
    cubin, log = _linked(kernel, cc, "cubin")
    registers, spill_bytes = _resources(log)
    return CompiledKernel(kernel.name, kernel.entry, cubin, registers, spill_bytes)


def linked_ptx(kernel: Kernel, cc: ComputeCapability) -> str:
    """The PTX of a whole kernel after linking, for people to read and tests to search; raises like `compile_kernel`."""
    return _linked(kernel, cc, "ptx")[0].decode()


def _linked(kernel: Kernel, cc: ComputeCapability, form: Literal["cubin", "ptx"]) -> tuple[bytes, str]:
    _import_compilers()
    from numba.core.errors import NumbaError

    try:
        functions = [_function_ltoir(name, *how) for name, how in kernel.device_functions().items()]
        return _link([_frame_ltoir(kernel, cc), *functions], cc, form)
    except (RuntimeError, ValueError, TypeError, NumbaError) as error:
        raise CompileError(f"kernel {kernel.name!r} does not compile for sm_{cc[0]}{cc[1]}:\n{error}") from error


_importing = threading.Lock()


def _import_compilers() -> None:
    """Whatever a compilation imports, by one thread at a time: imported by two at once, cuda.core lacks names."""
    with _importing:
        try:
            import cuda.bindings.nvjitlink
            import cuda.core  # noqa: F401
            import numba.cuda  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(str(error.name), extra=CUDA_EXTRA, needed_for="compiling a CUDA kernel") from error
        _spare_scipy()


def _spare_scipy() -> None:
    """Numba imports SciPy's linear algebra for its functions on arrays, to see whether there is a BLAS, which no kernel
    can call; that takes a fifth of a first compilation, so they are told that there is none."""
    if "numba.cuda.np.arraymath" in sys.modules:
        return
    try:
        from numba.cuda.np import linalg

        ask = linalg.ensure_blas
    except (ImportError, AttributeError):
        return  # Numba is built otherwise

    def no_blas() -> None:
        raise ImportError("not asked for")

    linalg.ensure_blas = no_blas
    try:
        import numba.cuda.np.arraymath  # noqa: F401
    except ImportError:
        pass
    finally:
        linalg.ensure_blas = ask


def _frame_ltoir(kernel: Kernel, cc: ComputeCapability) -> bytes:
    """The CUDA C of a kernel as LTO-IR; NVRTC is quick, so for the very architecture, whose limits it may ask about."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=f"sm_{cc[0]}{cc[1]}",
        std="c++17",
        link_time_optimization=True,
        relocatable_device_code=True,
        define_macro=[(name, str(value)) for name, value in kernel.defines.items()] or None,
    )
    return bytes(Program(kernel.source_text(), "c++", options).compile("ltoir").code)


@functools.lru_cache(maxsize=16)
def _function_ltoir(name: str, function: Callable[..., Any], result: str, arguments: tuple[str, ...]) -> bytes:
    """A Python device function as LTO-IR; kept, because kernels that differ in how they store share theirs."""
    from nbvision_kernels.pixel import numba_type
    from numba import cuda

    ltoir, _ = cuda.compile(
        getattr(function, "py_func", function),
        numba_type(result)(*map(numba_type, arguments)),
        cc=OLDEST,
        output="ltoir",
        device=True,
        abi="c",
        abi_info={"abi_name": name},
    )
    code: bytes = ltoir
    return code


def _link(objects: list[bytes], cc: ComputeCapability, form: Literal["cubin", "ptx"]) -> tuple[bytes, str]:
    """What nvJitLink makes of LTO-IR, and its log."""
    from cuda.bindings import nvjitlink

    # Multiply-adds are not fused: the CPU's are not, and so every pixel function gives the same bits on both devices.
    # The kernels wait for memory, not for arithmetic.
    # no-cache: a second link from the linker's own cache would have an empty log.
    options = [f"-arch=sm_{cc[0]}{cc[1]}", "-lto", "-fma=0", "-no-cache", "-verbose", "-Xptxas=-v"]
    options += ["-ptx"] if form == "ptx" else []
    linker = nvjitlink.create(len(options), options)
    try:
        for index, code in enumerate(objects):
            nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), f"part {index}")
        nvjitlink.complete(linker)
        if form == "ptx":
            result = bytearray(nvjitlink.get_linked_ptx_size(linker))
            nvjitlink.get_linked_ptx(linker, result)
        else:
            result = bytearray(nvjitlink.get_linked_cubin_size(linker))
            nvjitlink.get_linked_cubin(linker, result)
        return bytes(result), _link_log(linker, "info")
    except nvjitlink.nvJitLinkError as error:
        raise RuntimeError(f"{error}\n{_link_log(linker, 'error')}") from None
    finally:
        nvjitlink.destroy(linker)


def _link_log(linker: int, kind: str) -> str:
    from cuda.bindings import nvjitlink

    log = bytearray(getattr(nvjitlink, f"get_{kind}_log_size")(linker))
    if log:
        getattr(nvjitlink, f"get_{kind}_log")(linker, log)
    return log.rstrip(b"\0").decode(errors="replace")


def _resources(log: str) -> tuple[int, int]:
    """Registers and spilled bytes from ptxas' log."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if registers is None:
        raise RuntimeError(f"the linker's log names no registers:\n{log}")
    return int(registers[1]), sum(map(int, spills))


@functools.cache
def load_kernel(kernel: Kernel, device_id: int = 0) -> Any:
    """A CuPy function ready to launch: from memory, else from disk, else compiled now (about 0.3 s)."""
    cupy = require_cupy("a CUDA kernel")
    cc = compute_capability(device_id)
    path = _cubin_path(kernel, cc)
    if begun := _begun.get(path):
        begun.join()
        _begun.pop(path, None)
    if path.exists():
        try:
            return cupy.RawModule(path=str(path)).get_function(kernel.entry)
        except cupy.cuda.driver.CUDADriverError:
            pass  # damaged, or of a driver's past: compiled anew and overwritten
    write_atomically(path, compile_without_spills(kernel, cc).cubin)
    return cupy.RawModule(path=str(path)).get_function(kernel.entry)


def by_value(numbers: Iterable[Any]) -> tuple[Any, ...]:
    """Numbers as a launch takes them, for who launches with the same ones again.

    CuPy makes such an object of every number at every launch, which takes a microsecond.
    """
    import numpy as np

    of_array = require_cupy("a launch").cuda.function.CNumpyArray
    return tuple([of_array(np.array(number)) for number in numbers])


def _cubin_path(kernel: Kernel, cc: ComputeCapability) -> Path:
    return kernel_cache_dir() / f"{kernel.name}-sm{cc[0]}{cc[1]}.cubin"


_begun: dict[Path, threading.Thread] = {}
_beginning = threading.Lock()


def begin_to_compile(kernel: Kernel, device_id: int = 0) -> None:
    """Begin what :func:`load_kernel` will soon be asked for, in a thread of its own, unless it is on disk.

    NVRTC and the linker work without Python's lock, so the caller compiles another kernel meanwhile. What fails here
    fails once more in `load_kernel`, which raises.
    """
    cc = compute_capability(device_id)
    path = _cubin_path(kernel, cc)
    if path in _begun or path.exists():
        return
    _import_compilers()  # not in the thread, so that who lacks them hears of it

    def compile_to_disk() -> None:
        with contextlib.suppress(Exception):
            write_atomically(path, compile_without_spills(kernel, cc).cubin)

    with _beginning:
        if path in _begun or path.exists():
            return
        thread = threading.Thread(target=compile_to_disk, name=f"nbvision compiles {kernel.name}")
        thread.start()
        _begun[path] = thread


def compile_without_spills(kernel: Kernel, cc: ComputeCapability) -> CompiledKernel:
    """The kernel as it is, or with more registers a thread if a user's pixel function needs them."""
    compiled = compile_kernel(kernel, cc)
    roomier = kernel.roomier()
    return compile_without_spills(roomier, cc) if compiled.spill_bytes and roomier else compiled


# Numba's default threading layer aborts the process when two threads enter parallel loops at once. A loop uses every
# core anyway, so taking turns costs nothing.
_cpu_turn = threading.Lock()


def cpu_loop(name: str, function: Callable[..., None], *, parallel: bool = True) -> Callable[..., None]:
    """Compile a Python loop for the CPU on its first call, kept on disk like a CUDA kernel.

    Parallel ones take turns; others run in as many threads as call them.
    """
    from numba import njit
    from numba.core.errors import NumbaError

    _number_functions_apart()
    dispatcher = njit(parallel=parallel, nogil=True, error_model="numpy")(function)
    setattr(dispatcher, "_cache", _LoopCache(kernel_cache_dir(), name))  # noqa: B010  (Numba has no public hook)

    @functools.wraps(function)
    def call(*arguments: Any) -> None:
        try:
            with _cpu_turn if parallel else contextlib.nullcontext():
                dispatcher(*arguments)
        except NumbaError as error:
            raise CompileError(f"loop {name!r} does not compile:\n{error}") from error

    return call


@functools.cache
def _number_functions_apart() -> None:
    """Let this process, and each that it forks, number the functions that Numba compiles from a random start.

    Numba tells functions of one Python name apart by a count within the process, and LLVM takes two of one name and
    number for the same. Of two loops on disk, compiled by two processes, one would silently call the other's functions.
    """
    from numba.core.bytecode import FunctionIdentity

    def start() -> None:
        count = itertools.count(int.from_bytes(os.urandom(6), "little"))
        setattr(FunctionIdentity, "_unique_ids", count)  # noqa: B010  (Numba has no public hook)

    start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=start)


class _LoopCache:
    """Numba's cache interface over one file per signature.

    Numba's own cache watches the loop's file alone, and so misses changes in the pixel functions inlined into it.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.cache_path = str(directory)
        self._directory = directory
        self._name = name

    def _path(self, signature: Any, codegen: Any) -> Path:
        import hashlib

        key = repr((signature, codegen.magic_tuple()))
        return self._directory / f"{self._name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.loop"

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        from numba.core.compiler import CompileResult

        target_context.refresh()
        try:
            payload = pickle.loads(self._path(signature, target_context.codegen()).read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None  # not there, or damaged: compiled anew and overwritten
        return CompileResult._rebuild(target_context, *payload)

    def save_overload(self, signature: Any, result: Any) -> None:
        from numba.core.serialize import dumps

        with contextlib.suppress(OSError):  # without it the next process compiles anew
            write_atomically(self._path(signature, result.codegen), dumps(result._reduce()))

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...
