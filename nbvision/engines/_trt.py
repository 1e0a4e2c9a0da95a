"""The one place that knows how TensorRT 8.5, 10, 11 and TensorRT-RTX differ.

==================  ==================  ==================  ======================  ======================
..                  8.5                 10                  11                      RTX
==================  ==================  ==================  ======================  ======================
module              ``tensorrt``        ``tensorrt``        ``tensorrt``            ``tensorrt_rtx``
explicit batch      a flag              always              always                  always
float16             ``BuilderFlag``     ``BuilderFlag``     types of the file       types of the file
tactic sources      cuBLAS, cuDNN, off  its own             its own                 its own
activations         ``device_memory``   with their size     with their size         with their size
allocator           without streams     with streams        with streams            with streams
contexts a profile  one                 any number          any number              any number
builds for          this GPU            this GPU            this GPU                this GPU, or named ones
==================  ==================  ==================  ======================  ======================
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from nbvision.errors import EngineError, InputError, MissingExtraError

__all__ = ["TensorRT", "load_tensorrt"]

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}

_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}  # trt.nptype() reads np.bool in 8.5, which NumPy 1.24 took away

_LOG_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,  # TensorRT's INFO tells of each step of a build
}

logger = logging.getLogger("nbvision")


class TensorRT:
    """One installed TensorRT.

    Attributes
    ----------
    name : str
        Its module: ``"tensorrt"`` or ``"tensorrt_rtx"``.
    api : module
    version : tuple of int
        Such as ``(8, 5, 3, 1)``.
    logger : trt.ILogger
        Passes TensorRT's messages on to Python's logger ``"nbvision"``.
    """

    def __init__(self, name: str, api: Any) -> None:
        self.name = name
        self.api = api
        self.version = tuple(int(part) for part in re.findall(r"\d+", api.__version__))
        self._complaints: collections.deque[tuple[int, str]] = collections.deque(maxlen=8)
        self._interruption: BaseException | None = None
        self.logger = self._make_logger()

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.name == 'tensorrt_rtx' else 'TensorRT'} {self.api.__version__}"

    @property
    def chooses_precision(self) -> bool:
        """Whether the builder may compute in float16 what the file has in float32."""
        return hasattr(self.api.BuilderFlag, "FP16")

    def create(self, kind: Literal["Builder", "Runtime"]) -> Any:
        """A ``trt.Builder`` or ``trt.Runtime``.

        Raises
        ------
        EngineError
            If TensorRT cannot work here: no driver, or one too old for it.
        """
        try:
            return getattr(self.api, kind)(self.logger)
        except TypeError as error:  # how pybind11 reports a null pointer
            raise EngineError(f"{self} makes no {kind}: {self.take_reason()}") from error

    def create_network(self, builder: Any) -> Any:
        """An empty network with explicit batch."""
        flags = 0
        if self.version < (10,) and self.name == "tensorrt":
            flags = 1 << int(self.api.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
        return builder.create_network(flags)

    def create_config(self, builder: Any, *, workspace_bytes: int, tf32: bool, fp16: bool, int8: bool) -> Any:
        """A build configuration."""
        config = builder.create_builder_config()
        config.set_memory_pool_limit(self.api.MemoryPoolType.WORKSPACE, workspace_bytes)
        if self.version < (9,) and self.name == "tensorrt":
            # TensorRT 8 would time cuBLAS and cuDNN kernels too: libraries it does not bring along, of a CUDA
            # that need not be here.  Its own kernels cover every layer of a convolution network.
            config.set_tactic_sources(0)
        if fp16 and self.chooses_precision:
            config.set_flag(self.api.BuilderFlag.FP16)
        if int8 and self.chooses_precision:
            config.set_flag(self.api.BuilderFlag.INT8)
        if not tf32:
            config.clear_flag(self.api.BuilderFlag.TF32)
        return config

    def create_context(self, engine: Any, profile: int, stream: Any) -> Any:
        """An execution context of an optimisation profile, without memory for activations; None if there is none."""
        if hasattr(engine, "create_execution_context_without_device_memory"):
            context = engine.create_execution_context_without_device_memory()
        else:
            context = engine.create_execution_context(self.api.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is not None and profile:
            if not context.set_optimization_profile_async(profile, stream.ptr):
                return None
            stream.synchronize()
        return context

    @property
    def shares_profiles(self) -> bool:
        """Whether several contexts may have one optimisation profile."""
        return self.name == "tensorrt_rtx" or self.version >= (10,)

    def activation_bytes(self, engine: Any) -> int:
        """Scratch memory that any context of an engine needs."""
        sizes = (getattr(engine, name, None) for name in ("device_memory_size_v2", "device_memory_size"))
        return next(int(size) for size in sizes if size is not None)

    def set_activations(self, context: Any, address: int, size_bytes: int) -> None:
        """Give a context its scratch memory."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size_bytes)
        else:
            context.device_memory = address

    def create_allocator(self, allocate: Callable[[int], int], free: Callable[[int], bool]) -> Any:
        """An allocator for a ``trt.Runtime``, which asks it for weights and for what a context keeps.

        ``allocate`` takes a size and gives an address, or 0: an exception would vanish inside TensorRT. The streams are
        not passed on, so memory has to be free for any stream when it is given, and is when it is taken back.
        """
        base = getattr(self.api, "IGpuAsyncAllocator", self.api.IGpuAllocator)

        class Allocator(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)  # as of the logger

            def allocate(self, size: int, alignment: int, flags: int) -> int:
                return allocate(size)

            def deallocate(self, memory: Any) -> bool:
                return free(_address(memory))

            def allocate_async(self, size: int, alignment: int, *flags_and_stream: int) -> int:
                return allocate(size)

            def deallocate_async(self, memory: Any, stream: int) -> bool:
                return free(_address(memory))

            def reallocate(self, address: Any, alignment: int, new_size: int) -> int:
                return 0

        return Allocator()

    def set_targets(self, config: Any, compute_capabilities: Sequence[tuple[int, int]]) -> None:
        """Build for these compute capabilities instead of for the GPU at hand; TensorRT-RTX only."""
        if self.name != "tensorrt_rtx":
            raise InputError(f"{self} builds for the GPU it runs on; only TensorRT-RTX builds for named ones")
        config.num_compute_capabilities = len(compute_capabilities)
        for index, (major, minor) in enumerate(compute_capabilities):
            target = getattr(self.api.ComputeCapability, f"SM{major}{minor}", None)
            if target is None:
                known = [name for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
                raise InputError(f"{self} does not build for SM {major}.{minor}; expected one of {known}")
            config.set_compute_capability(target, index)

    def dtype(self, data_type: Any) -> np.dtype[Any]:
        """NumPy's dtype for a ``trt.DataType``."""
        if data_type.name not in _DTYPES:
            raise EngineError(f"{self}: arrays have no type {data_type.name}; expected one of {list(_DTYPES)}")
        return np.dtype(_DTYPES[data_type.name])

    def take_reason(self) -> str:
        """TensorRT's errors since the last call, else its warnings, in one line."""
        complaints = list(self._complaints)
        self._complaints.clear()
        errors = [message for level, message in complaints if level >= logging.ERROR]
        reasons = errors or [message for _, message in complaints]
        return "; ".join(reasons) or "it gave no reason here (another logger of this process may have it)"

    def raise_interruption(self) -> None:
        """Raise what happened inside the logger since the last call, such as Ctrl-C; TensorRT would swallow it."""
        interruption, self._interruption = self._interruption, None
        if interruption is not None:
            raise interruption

    def create_output_allocator(self, allocate: Callable[[int], int], notify: Callable[[tuple[int, ...]], None]) -> Any:
        """An allocator for one output whose shape depends on the data.

        ``allocate`` as of :meth:`create_allocator`; ``notify`` is told the shape before the call that queues the work
        returns.
        """
        base = self.api.IOutputAllocator

        class OutputAllocator(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)  # as of the logger

            def reallocate_output(self, name: str, memory: Any, size: int, alignment: int) -> int:
                return allocate(size)

            def reallocate_output_async(self, name: str, memory: Any, size: int, alignment: int, stream: int) -> int:
                return allocate(size)

            def notify_shape(self, name: str, shape: Any) -> None:
                notify(tuple(shape))

        return OutputAllocator()

    def _make_logger(self) -> Any:
        base, complaints, trt = self.api.ILogger, self._complaints, self

        class PythonLogger(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)  # pybind11 wants the base's own initialiser called by name

            def log(self, severity: Any, message: str) -> None:
                try:
                    level = _LOG_LEVELS.get(severity.name, logging.NOTSET)
                    if level >= logging.WARNING:
                        complaints.append((level, message.strip()))
                    if level and logger.isEnabledFor(level):
                        logger.log(level, "TensorRT: %s", message)
                except BaseException as error:
                    trt._interruption = error

        return PythonLogger()


def _address(memory: Any) -> int:
    """An address as TensorRT hands it to Python: a number, or a capsule around it."""
    if isinstance(memory, int):
        return memory
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return pointer_of(memory, None) or 0


@functools.cache
def load_tensorrt(name: str) -> TensorRT:
    """Import ``"tensorrt"`` or ``"tensorrt_rtx"``; once a process, since TensorRT keeps its first logger.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    EngineError
        If it is installed and does not load.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(name, extra=_EXTRAS[name], needed_for=f"an Engine with runtime={name!r}")
    try:
        return TensorRT(name, importlib.import_module(name))
    except (ImportError, OSError) as error:
        raise EngineError(f"{name} is installed and does not load: {error}") from error
