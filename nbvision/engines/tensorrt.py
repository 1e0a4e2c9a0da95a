"""TensorRT on CUDA, by named tensors: 8.5, 10, 11 and TensorRT-RTX."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbvision.engines._trt import TensorRT
from nbvision.engines.build import BuildOptions, build_plan
from nbvision.engines.onnx_file import OnnxFile
from nbvision.engines.plan_cache import plan_path, read_plan, write_plan
from nbvision.engines.spec import TensorSpec, check_out
from nbvision.errors import EngineError, InputError
from nbvision.runtime import memory
from nbvision.runtime.device import require_cupy

__all__ = ["TensorRTExecutor"]

_ADDRESS_ALIGNMENT_BYTES = 256  # TensorRT's kernels load vectors and do not check

logger = logging.getLogger("nbvision")


class TensorRTExecutor:
    """One plan, one execution context, one CUDA stream.

    The context runs on a stream of its own, which waits for the caller's stream and which the caller's stream
    then waits for, on the device.  So calls from different streams cannot meet in the context's scratch
    memory, and TensorRT is spared CUDA's default stream, on which it would synchronize.

    Raises
    ------
    EngineError
        If the plan cannot be built, or the device cannot load it.
    """

    def __init__(self, trt: TensorRT, model: OnnxFile, options: BuildOptions, *, cache_dir: Path | None = None) -> None:
        cuda = require_cupy("a TensorRT engine").cuda
        self._trt = trt
        self._file_name = model.path.name
        self._lock = threading.Lock()  # a context belongs to one thread at a time
        self._runtime = trt.create("Runtime")
        self._engine = self._load_or_build(model, options, plan_path(cache_dir, trt, model, options))
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{self._file_name}: {trt} makes no execution context: {trt.take_reason()}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        specs = [self._spec(name) for name in names]
        self.inputs = tuple(spec for spec in specs if self._is_input(spec))
        self.outputs = tuple(spec for spec in specs if not self._is_input(spec))
        self._stream = cuda.Stream(non_blocking=True)
        self._inputs_ready = cuda.Event(disable_timing=True)
        self._outputs_ready = cuda.Event(disable_timing=True)

    def run(self, inputs: dict[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        """Run; see :class:`nbvision.engines.engine.Executor`."""
        caller = require_cupy("a TensorRT engine").cuda.get_current_stream()
        inputs = {name: _aligned(array) for name, array in inputs.items()}
        with self._lock:
            for name, array in inputs.items():
                self._bind_input(name, array)
            outputs = {spec.name: self._bind_output(spec, out.get(spec.name)) for spec in self.outputs}
            caller.record(self._inputs_ready)
            self._stream.wait_event(self._inputs_ready)
            queued = self._context.execute_async_v3(self._stream.ptr)
            self._stream.record(self._outputs_ready)
            caller.wait_event(self._outputs_ready)
        for array in (*inputs.values(), *outputs.values()):
            memory.record_use(array, caller)
        if not queued:
            raise EngineError(f"{self._file_name}: {self._trt} refuses to run: {self._trt.take_reason()}")
        return outputs

    def _load_or_build(self, model: OnnxFile, options: BuildOptions, path: Path) -> Any:
        plan = read_plan(path)
        if plan is not None:
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is not None:
                logger.info("%s: plan loaded from %s", self._file_name, path)
                return engine
            logger.warning("the plan %s does not load (%s); it is built anew", path, self._trt.take_reason())
        plan = build_plan(self._trt, model, options)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"{self._file_name}: {self._trt} does not run here: {self._trt.take_reason()}")
        write_plan(path, plan)
        return engine

    def _spec(self, name: str) -> TensorSpec:
        dtype = self._trt.dtype(self._engine.get_tensor_dtype(name))
        return TensorSpec(name, dtype, tuple(self._engine.get_tensor_shape(name)))

    def _is_input(self, spec: TensorSpec) -> bool:
        return bool(self._engine.get_tensor_mode(spec.name) == self._trt.api.TensorIOMode.INPUT)

    def _bind_input(self, name: str, array: Any) -> None:
        if not self._context.set_input_shape(name, tuple(array.shape)):
            what = f"{name!r} of shape {array.shape}"
            raise EngineError(f"{self._file_name}: {self._trt} refuses {what}: {self._trt.take_reason()}")
        self._context.set_tensor_address(name, array.data.ptr)

    def _bind_output(self, spec: TensorSpec, out: Any) -> Any:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if -1 in shape:
            raise EngineError(
                f"{self._file_name}: the shape {shape} of output {spec.name!r} depends on the data, which "
                "nbvision does not support; export the model without that last step"
            )
        if out is None:
            size_bytes = math.prod(shape) * spec.dtype.itemsize
            out = memory.acquire(size_bytes, device="cuda").view(shape, dtype=spec.dtype)
        else:
            check_out(spec, out, shape=shape, device="cuda")
            if out.data.ptr % _ADDRESS_ALIGNMENT_BYTES:
                raise InputError(
                    f"out[{spec.name!r}] starts at {out.data.ptr:#x}; expected a multiple of "
                    f"{_ADDRESS_ALIGNMENT_BYTES} bytes. Give a whole array, not a slice"
                )
        self._context.set_tensor_address(spec.name, out.data.ptr)
        return out


def _aligned(array: Any) -> Any:
    """``array``, copied if it starts where TensorRT cannot read it, as a slice of a batch may."""
    return array.copy() if array.data.ptr % _ADDRESS_ALIGNMENT_BYTES else array
