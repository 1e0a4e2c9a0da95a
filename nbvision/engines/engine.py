"""The engine a user holds: it checks what comes in, and leaves the running to an executor."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args

from nbvision.engines.onnx_file import OnnxFile, read_onnx
from nbvision.engines.spec import Batch, BatchRange, Precision, TensorSpec, check_out, checked_batches
from nbvision.errors import InputError, MissingExtraError
from nbvision.image import to_device
from nbvision.runtime.device import (
    Device,
    array_module,
    device_of,
    require_cupy,
    resolve_device,
    stream_pointer,
)

__all__ = ["Engine", "Executor", "RuntimeName"]

RuntimeName = Literal["tensorrt", "tensorrt_rtx", "onnxruntime"]

DEFAULT_WORKSPACE_BYTES = 1 << 30


class Executor(Protocol):
    """What a runtime has to offer. The engine hands it checked, contiguous arrays of its own device."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        """Queue one call on CuPy's current stream, or make it on the CPU; fill ``out`` for what it names."""
        ...


class Engine:
    """A model ready to run: TensorRT on CUDA, ONNX Runtime on the CPU.

    Arrays are CuPy arrays on CUDA and NumPy arrays on the CPU; anything else that lives on the engine's
    device and speaks DLPack or the CUDA array interface (torch tensors, ...) is taken as it is, without a
    copy.  An engine may be called from any thread.

    Parameters
    ----------
    path : path
        An ONNX file. Inputs may be dynamic in their first dimension only, which is the batch.
    precision : {"fp32", "fp16"}
        What TensorRT 8 and 10 may compute in. ``"fp32"`` is IEEE float32, TensorFloat-32 off; ``"fp16"`` lets
        them choose float16 layer by layer. TensorRT 11 and TensorRT-RTX compute in the types of the file, so
        there ``"fp16"`` wants a file that holds float16. The CPU always computes in the types of the file.
        It changes no dtype of inputs and outputs: those are the file's (TensorRT 8 narrows int64 to int32), see
        :attr:`inputs`.
    batch : (min, opt, max), or a sequence of them
        Batch sizes to prepare for; the engine is fastest at ``opt``. Of several ranges, which have to rise without a
        gap, TensorRT chooses its kernels for each apart: ``[(1, 1, 1), (2, 16, 64)]`` is as fast with one image as it
        can be, and takes longer to build. Of no effect if the file fixes its batch.
    device : {"cpu", "cuda"}, optional
        Default: where ``runtime`` runs, else ``NBVISION_DEVICE``, else CUDA where it works, else the CPU.
    runtime : {"tensorrt", "tensorrt_rtx", "onnxruntime"}, optional
        Default: the TensorRT that is installed on CUDA, ONNX Runtime on the CPU.
    cache_dir : path, optional
        Where TensorRT's plans are kept; default :func:`nbvision.runtime.cache.cache_dir` ``/ "plans"``. A
        first build takes seconds to minutes, a load from there milliseconds.
    workspace_bytes : int
        Most scratch memory a TensorRT layer may take.
    cuda_graphs : bool
        Whether TensorRT's calls are kept as CUDA graphs: the host queues one graph instead of every layer, which pays
        for small batches, and for other threads that use the GPU. From the third call on the same arrays on that is a
        graph of these; where arrays keep changing, from about the tenth call on they are copied through memory of the
        engine's own, padded to the largest batch so far of their range of ``batch``. Calls that cannot be a graph run
        as without. TensorRT 8 keeps one graph for each range, later ones four.

    Attributes
    ----------
    inputs, outputs : tuple of TensorSpec
    device : {"cpu", "cuda"}
    runtime : {"tensorrt", "tensorrt_rtx", "onnxruntime"}
    precision : {"fp32", "fp16"}
    batch : BatchRange or None
        The batch sizes it takes, from the least to the most of all ranges; None if the file fixes them.
    name : str
        The file's name without its suffix.
    digest : str
        SHA-256 of the model file, and of its external weight files: the identity of the model.
    metadata : dict of str to str
        The model's ``metadata_props``.

    Raises
    ------
    EngineError
        If the file is no readable ONNX model, or the runtime cannot build or load it.
    MissingExtraError
        If the runtime is not installed.
    InputError
        For an unknown precision or runtime, a batch out of order, or a runtime that does not run on
        ``device``.
    DeviceError
        If CUDA was asked for and cannot be used.

    Examples
    --------
    >>> det = nbv.Engine("detector.onnx", precision="fp16", batch=(1, 16, 64))   # doctest: +SKIP
    >>> boxes = det(x)                                                           # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        precision: Precision = "fp32",
        batch: Batch = (1, 16, 64),
        device: Device | None = None,
        runtime: RuntimeName | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        cuda_graphs: bool = False,
    ) -> None:
        if precision not in get_args(Precision):
            raise InputError(f"precision is {precision!r}; expected one of {get_args(Precision)}")
        batches = checked_batches(batch)
        self.device, self.runtime = _choose_runtime(device, runtime)
        model = read_onnx(path)
        self.name = model.path.stem
        self.digest = model.digest
        self.metadata = model.metadata
        self.precision: Precision = precision
        self._executor = _make_executor(
            self.runtime,
            model,
            batches=batches,
            precision=precision,
            workspace_bytes=workspace_bytes,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            cuda_graphs=cuda_graphs,
        )
        self.inputs = self._executor.inputs
        self.outputs = self._executor.outputs
        self._array_type = array_module(self.device).ndarray
        self._passed: set[tuple[Any, ...]] = set()
        self._input_names, self._output_names = set(_names(self.inputs)), set(_names(self.outputs))
        whole = BatchRange(batches[0].min, batches[-1].opt, batches[-1].max)
        self.batch = whole if any(spec.batched for spec in self.inputs) else None

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"Engine({self.name!r}, {self.runtime}, {self.precision}: {inputs} -> {outputs})"

    def __call__(self, inputs: Any, *, stream: Any = None) -> Any:
        """Run the model.

        Parameters
        ----------
        inputs : array, or dict of str to array
            One array for a model with one input; else an array for each input's name.
        stream : stream, optional
            As in :meth:`run`.

        Returns
        -------
        array, or dict of str to array
            One array for a model with one output; else an array for each output's name.

        Raises
        ------
        InputError, EngineError
            As in :meth:`run`.
        """
        if not isinstance(inputs, Mapping):
            if len(self.inputs) != 1:
                raise InputError(f"{self.name} has several inputs; expected a dict with {_names(self.inputs)}")
            inputs = {self.inputs[0].name: inputs}
        outputs = self.run(inputs, stream=stream)
        return outputs if len(self.outputs) != 1 else outputs[self.outputs[0].name]

    def run(
        self, inputs: Mapping[str, Any], out: Mapping[str, Any] | None = None, stream: Any = None
    ) -> dict[str, Any]:
        """Run the model on named arrays.

        Parameters
        ----------
        inputs : dict of str to array
            An array on the engine's device for each input, of its dtype and shape; copied only if it is not
            contiguous (on CUDA also if it does not start at a multiple of 256 bytes, as some slices do).
        out : dict of str to array, optional
            Contiguous arrays of the right shape and dtype for some or all outputs; the others are made. On CUDA, an
            output whose shape depends on the data (``NonZero``, ``NonMaxSuppression``) is always made, and costs a wait
            on the host.
        stream : CuPy or torch stream, optional
            The CUDA stream whose order the call follows; default CuPy's current one. Nothing waits on the
            host. Of no meaning on the CPU.

        Returns
        -------
        dict of str to array
            An array on the engine's device for each output; those of ``out`` are the very arrays. An empty
            batch gives empty outputs.

        Raises
        ------
        InputError
            For a missing or unknown name, an array on another device, a wrong dtype or shape, inputs that
            disagree on the batch, or a batch that the engine was not prepared for.
        EngineError
            If the runtime fails.
        """
        out = out or {}
        if inputs.keys() != self._input_names:
            self._refuse_names("input", inputs, self.inputs)
        if not out.keys() <= self._output_names:
            self._refuse_names("out", out, self.outputs)
        if stream is None or self.device == "cpu":
            return self._run(inputs, out)
        with self._on_stream(stream):
            return self._run(inputs, out)

    def _run(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
        if not self._has_passed(inputs):
            inputs = {spec.name: self._checked_input(spec, inputs[spec.name]) for spec in self.inputs}
            if self._batch_of(inputs) == 0:
                return self._empty_outputs(out)
            self._passed.add(_signature(inputs))
        return self._executor.run(inputs, out)

    def _has_passed(self, inputs: Mapping[str, Any]) -> bool:
        """Whether arrays of these dtypes and shapes were taken before, and these need no copy."""
        for array in inputs.values():
            if type(array) is not self._array_type or not array.flags.c_contiguous:
                return False
        return _signature(inputs) in self._passed

    def _on_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Make ``stream`` CuPy's current one."""
        cuda = require_cupy("a CUDA stream").cuda
        if isinstance(stream, (cuda.Stream, cuda.ExternalStream)):
            return stream  # type: ignore[no-any-return]
        return cuda.ExternalStream(stream_pointer(stream))  # type: ignore[no-any-return]

    def _refuse_names(self, what: str, given: Mapping[str, Any], specs: tuple[TensorSpec, ...]) -> NoReturn:
        expected = {spec.name for spec in specs}
        unknown, missing = sorted(set(given) - expected), sorted(expected - set(given))
        lacks = f", lacks {missing}" if what == "input" else ""
        raise InputError(f"{self.name}: {what} has unknown names {unknown}{lacks}; expected {_names(specs)}")

    def _checked_input(self, spec: TensorSpec, array: Any) -> Any:
        if not hasattr(array, "shape"):
            raise InputError(f"input {spec.name!r} is a {type(array).__name__}; expected an array {spec}")
        if device_of(array) != self.device:
            advice = "cupy.asarray(x)" if self.device == "cuda" else "cupy.asnumpy(x)"
            raise InputError(
                f"input {spec.name!r} is on {device_of(array)}, and {self.name} runs on {self.device}. "
                f"Move it with {advice}, or make the engine with device={device_of(array)!r}"
            )
        array = to_device(array, self.device)
        if array.dtype != spec.dtype:
            raise InputError(
                f"input {spec.name!r} is {array.dtype}; {self.name} takes {spec.dtype}, as its file says "
                "(precision= changes no input)"
            )
        if not spec.accepts(tuple(array.shape)):
            raise InputError(f"input {spec.name!r} has shape {array.shape}; {self.name} takes {spec.shape}")
        return array if array.flags.c_contiguous else array_module(self.device).ascontiguousarray(array)

    def _batch_of(self, arrays: Mapping[str, Any]) -> int | None:
        """The batch size of this call, checked against the engine's range; None if the model fixes it."""
        if self.batch is None:
            return None
        sizes = {spec.name: arrays[spec.name].shape[0] for spec in self.inputs if spec.batched}
        size = int(next(iter(sizes.values())))
        if len(set(sizes.values())) > 1:
            raise InputError(f"{self.name}: inputs disagree on the batch size: {sizes}")
        if size and not self.batch.min <= size <= self.batch.max:
            advice = "split the batch" if size > self.batch.max else "pad the batch"
            raise InputError(
                f"{self.name}: batch of {size}; it was made for {self.batch.min} to {self.batch.max}. "
                f"Either {advice}, or make the engine with another batch=(min, opt, max)"
            )
        return size

    def _empty_outputs(self, out: Mapping[str, Any]) -> dict[str, Any]:
        for spec in self.outputs:
            if not spec.batched or not spec.fixed_beyond_batch:
                raise InputError(f"{self.name}: an empty batch, and output {spec} says no shape for it")
        outputs = {}
        for spec in self.outputs:
            shape = (0, *spec.shape[1:])
            if spec.name in out:
                check_out(spec, out[spec.name], shape=shape, device=self.device)
                outputs[spec.name] = out[spec.name]
            else:
                outputs[spec.name] = array_module(self.device).empty(shape, spec.dtype)
        return outputs


def _signature(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple([(name, array.dtype, array.shape) for name, array in arrays.items()])


def _names(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


def _choose_runtime(device: Device | None, runtime: RuntimeName | None) -> tuple[Device, RuntimeName]:
    if runtime is None:
        chosen = resolve_device(device)
        return chosen, "onnxruntime" if chosen == "cpu" else _installed_tensorrt()
    if runtime not in get_args(RuntimeName):
        raise InputError(f"runtime is {runtime!r}; expected one of {get_args(RuntimeName)}")
    home: Device = "cpu" if runtime == "onnxruntime" else "cuda"
    if device not in (None, home):
        raise InputError(f"runtime {runtime!r} runs on {home!r} here, and device is {device!r}")
    return resolve_device(home), runtime


def _installed_tensorrt() -> RuntimeName:
    flavours: tuple[RuntimeName, ...] = ("tensorrt", "tensorrt_rtx")
    for name in flavours:
        if importlib.util.find_spec(name) is not None:
            return name
    raise MissingExtraError("tensorrt", extra="tensorrt", needed_for="an Engine on device 'cuda'")


def _make_executor(
    runtime: RuntimeName,
    model: OnnxFile,
    *,
    batches: tuple[BatchRange, ...],
    precision: Precision,
    workspace_bytes: int,
    cache_dir: Path | None,
    cuda_graphs: bool,
) -> Executor:
    if runtime == "onnxruntime":
        from nbvision.engines.onnxruntime import OnnxRuntimeExecutor

        return OnnxRuntimeExecutor(model)
    from nbvision.engines._trt import load_tensorrt
    from nbvision.engines.build import BuildOptions
    from nbvision.engines.tensorrt import TensorRTExecutor

    options = BuildOptions(batches, precision, workspace_bytes)
    return TensorRTExecutor(load_tensorrt(runtime), model, options, cache_dir=cache_dir, cuda_graphs=cuda_graphs)
