"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from nbvision.engines.onnx_file import OnnxFile
from nbvision.engines.spec import TensorSpec, check_model_inputs, check_out
from nbvision.errors import EngineError, MissingExtraError

__all__ = ["OnnxRuntimeExecutor"]

_DTYPES = {
    f"tensor({name})": np.dtype(dtype)
    for name, dtype in {
        "float": np.float32,
        "float16": np.float16,
        "double": np.float64,
        "int8": np.int8,
        "int16": np.int16,
        "int32": np.int32,
        "int64": np.int64,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "bool": np.bool_,
    }.items()
}

_ONLY_FATAL = 4  # what goes wrong is raised; ONNX Runtime need not print it as well


class OnnxRuntimeExecutor:
    """Runs NumPy arrays, on as many threads as ONNX Runtime finds cores.

    Raises
    ------
    EngineError
        If ONNX Runtime refuses the model.
    MissingExtraError
        If it is not installed.
    """

    def __init__(self, model: OnnxFile) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", extra="onnx", needed_for="an Engine on the CPU") from error
        try:
            self._session = _session_of(onnxruntime, model)
        except Exception as error:  # its exception classes share no base below Exception
            raise EngineError(f"{model.path.name}: ONNX Runtime refuses it: {error}") from error
        self._file_name = model.path.name
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = tuple(self._spec(argument) for argument in inputs)
        self.outputs = tuple(self._spec(argument) for argument in outputs)
        check_model_inputs(self._file_name, self.inputs)
        self._batch_input = next((spec.name for spec in self.inputs if spec.batched), None)
        symbols = {value.shape[0] for value in inputs if value.shape and isinstance(value.shape[0], str)}
        # A name for the first dimension that inputs and outputs share says that it is the batch there too.
        self._follow_batch = {value.name for value in outputs if value.shape and value.shape[0] in symbols}

    def run(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        """Run; see :class:`nbvision.engines.engine.Executor`."""
        for spec in self.outputs:
            if spec.name in out:
                check_out(spec, out[spec.name], shape=self._shape_now(spec, inputs), device="cpu")
        try:
            return self._run_bound(inputs, out) if out else self._run_plain(inputs)
        except Exception as error:
            raise EngineError(f"{self._file_name}: ONNX Runtime failed: {error}") from error

    def _run_plain(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def _run_bound(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for spec in self.outputs:
            if spec.name in out:
                array = out[spec.name]
                binding.bind_output(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            else:
                binding.bind_output(spec.name)
        self._session.run_with_iobinding(binding)
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {spec.name: out[spec.name] if spec.name in out else value.numpy() for spec, value in values}

    def _shape_now(self, spec: TensorSpec, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """The output's shape in this call, as far as the model's own names tell it."""
        if spec.name in self._follow_batch and self._batch_input is not None:
            return (inputs[self._batch_input].shape[0], *spec.shape[1:])
        return spec.shape

    def _spec(self, argument: Any) -> TensorSpec:
        if argument.type not in _DTYPES:
            what = f"{argument.name!r} is a {argument.type}"
            raise EngineError(f"{self._file_name}: {what}; expected one of {', '.join(_DTYPES)}")
        shape = tuple(size if isinstance(size, int) else -1 for size in argument.shape)
        return TensorSpec(argument.name, _DTYPES[argument.type], shape)


def _session_of(onnxruntime: ModuleType, model: OnnxFile) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_FATAL
    # Threads that wait for work by spinning keep it from the other engines of a cascade, and from decoding: with it
    # the demo's three models take three times as long for an image on two cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # An x86 without VNNI sums two products of int8 in 16 bits, which saturate; asked for, it takes 32.
    options.add_session_config_entry("session.x64quantprecision", "1")
    providers = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(model.path), options, providers=providers)
    except Exception:  # 1.32 fails so where nodes share a weight; what else is wrong is wrong without it, too
        options.add_session_config_entry("session.x64quantprecision", "0")
        return onnxruntime.InferenceSession(str(model.path), options, providers=providers)
