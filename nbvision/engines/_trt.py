"""The one place that knows how TensorRT 8.5, 10, 11 and TensorRT-RTX differ.

==================  ==================  ==================  ======================  ======================
..                  8.5                 10                  11                      RTX
==================  ==================  ==================  ======================  ======================
module              ``tensorrt``        ``tensorrt``        ``tensorrt``            ``tensorrt_rtx``
explicit batch      a flag              always              always                  always
float16             ``BuilderFlag``     ``BuilderFlag``     types of the file       types of the file
tactic sources      cuBLAS, cuDNN, off  its own             its own                 its own
builds for          this GPU            this GPU            this GPU                this GPU, or named ones
==================  ==================  ==================  ======================  ======================
"""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Sequence
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

    def _make_logger(self) -> Any:
        base, complaints = self.api.ILogger, self._complaints

        class PythonLogger(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)  # pybind11 wants the base's own initialiser called by name

            def log(self, severity: Any, message: str) -> None:
                level = _LOG_LEVELS.get(severity.name, logging.NOTSET)
                if level >= logging.WARNING:
                    complaints.append((level, message.strip()))
                if level and logger.isEnabledFor(level):
                    logger.log(level, "TensorRT: %s", message)

        return PythonLogger()


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
