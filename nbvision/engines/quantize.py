"""A model's float32 into int8, with real data, and what that costs in accuracy.

ONNX Runtime's quantizer writes Q/DQ nodes into the file, which it and every TensorRT since 8 follow.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from nbvision.engines.engine import Engine
from nbvision.engines.spec import TensorSpec
from nbvision.errors import EngineError, InputError, MissingExtraError
from nbvision.image import to_device

__all__ = ["Calibration", "OutputError", "QuantizationReport", "quantize"]

Calibration = Literal["minmax", "percentile"]
Batch = dict[str, npt.NDArray[Any]]

# What gains by int8. Elementwise layers around them TensorRT fuses; with Q/DQ of their own it refuses constants.
_QUANTIZED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PERCENTILE = 99.99
_KEPT_FOR_ERRORS = 8  # batches of the calibration, if there are no others to measure errors with
_TIMED_CALLS = 5


@dataclass(frozen=True)
class OutputError:
    """How far one output of the quantized model is from that of the original, over all batches looked at.

    Attributes
    ----------
    name : str
    relative_rms : float
        Root of the mean squared difference, of the root of the mean square of the original.
    largest : float
        Largest absolute difference.
    cosine : float
        Of both, taken as one long vector each.
    """

    name: str
    relative_rms: float
    largest: float
    cosine: float


@dataclass(frozen=True)
class QuantizationReport:
    """What became of a model. Printed, it is a table.

    Attributes
    ----------
    model, quantized : str
        The files.
    calibration_items : int
        Items of the first input that the ranges were taken from.
    outputs : tuple of OutputError
    size_bytes : (int, int)
        Of the files, before and after.
    ms_per_batch : (float, float)
        Medians on this machine, before and after, ONNX Runtime on the CPU, of a batch as ``validation`` had them.
    metric : (float, float) or None
        The caller's own measure, before and after.
    """

    model: str
    quantized: str
    calibration_items: int
    outputs: tuple[OutputError, ...]
    size_bytes: tuple[int, int]
    ms_per_batch: tuple[float, float]
    metric: tuple[float, float] | None

    def __str__(self) -> str:
        (before, after), (slow, fast) = self.size_bytes, self.ms_per_batch
        lines = [
            f"{self.model} -> {self.quantized}, ranges of {self.calibration_items} items",
            f"  size      {before:,} -> {after:,} bytes, {after / before:.2f} times",
            f"  CPU time  {slow:.2f} -> {fast:.2f} ms a batch, {fast / slow:.2f} times",
        ]
        if self.metric is not None:
            lines.append(f"  metric    {self.metric[0]:.4f} -> {self.metric[1]:.4f}")
        lines += [
            f"  {output.name}: relative RMS error {output.relative_rms:.4f}, largest {output.largest:.4g}, "
            f"cosine {output.cosine:.5f}"
            for output in self.outputs
        ]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


def quantize(
    model: str | os.PathLike[str],
    quantized: str | os.PathLike[str],
    *,
    calibration: Iterable[Any],
    validation: Iterable[Any] | None = None,
    method: Calibration = "minmax",
    exclude: Sequence[str] = (),
    metric: Callable[[Engine], float] | None = None,
) -> QuantizationReport:
    """Write an int8 version of an ONNX model, and measure it.

    Convolutions and matrix products are quantized. Their weights get a scale for each output channel, activations one
    for each tensor, all of them symmetric about zero, as TensorRT wants them. Inputs and outputs keep their dtypes.

    Parameters
    ----------
    model : path
        An ONNX file of float32, of opset 13 or later.
    quantized : path
        The file to write; nothing is left there if something fails.
    calibration : iterable of arrays, or of dicts of str to array
        Batches of the model's inputs, preprocessed as they will be: ranges of activations are taken from them.
        Hundreds of items of the kind that the model will meet; noise gives ranges that real data does not have.
    validation : iterable like ``calibration``, optional
        Batches to measure errors with; default: the first eight of ``calibration``, which flatters.
    method : {"minmax", "percentile"}
        Ranges reach to the largest value seen, or to that which 0.01 % of the values exceed; for this all activations
        of all batches are in memory at once.
    exclude : sequence of str
        Names of nodes that stay in float32: the first and last layers, should the report be bad.
    metric : callable, optional
        Given an :class:`~nbvision.Engine` on the CPU, returns the task's own measure, such as recall; called with the
        original and with the quantized model.

    Returns
    -------
    QuantizationReport

    Raises
    ------
    InputError
        Without a batch of calibration; for arrays that the model does not take, that are not finite, or all of one
        value; for an unknown ``method``, or a node of ``exclude`` that the model does not have.
    EngineError
        If the file is no readable ONNX model, has no layer to quantize, or cannot be quantized.
    MissingExtraError
        Without ``onnx`` and ``onnxruntime``: the extra ``quantize``.

    Examples
    --------
    >>> batches = (plan(nbv.decode(files))[0] for files in batches_of_files)           # doctest: +SKIP
    >>> print(nbv.quantize("embedder.onnx", "embedder-int8.onnx", calibration=batches))  # doctest: +SKIP
    """
    if method not in get_args(Calibration):
        raise InputError(f"method is {method!r}; expected one of {get_args(Calibration)}")
    original = Engine(model, device="cpu")
    batches = _checked(calibration, original.inputs, "calibration")
    kept: list[Batch] = []
    counted = _Counted(batches, kept)
    path = Path(quantized)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantize-") as scratch:
        written = Path(scratch) / "quantized.onnx"
        _write_quantized(Path(model), written, counted, method, tuple(exclude), Path(scratch))
        if counted.items == 0:
            raise InputError("calibration holds no batch; expected batches of real data, preprocessed as the model's")
        if not counted.varies:
            raise InputError(
                "every value of the calibration is the same; expected batches of real data, preprocessed as the model's"
            )
        engine = Engine(written, device="cpu")
        looked_at = kept if validation is None else list(_checked(validation, original.inputs, "validation"))
        if not looked_at:
            raise InputError("validation holds no batch; expected at least one, or None")
        report = QuantizationReport(
            model=Path(model).name,
            quantized=path.name,
            calibration_items=counted.items,
            outputs=_errors(original, engine, looked_at),
            size_bytes=(Path(model).stat().st_size, written.stat().st_size),
            ms_per_batch=(_ms_per_batch(original, looked_at[0]), _ms_per_batch(engine, looked_at[0])),
            metric=None if metric is None else (float(metric(original)), float(metric(engine))),
        )
        os.replace(written, path)
    return report


# --- data ------------------------------------------------------------------------------------------------------------


def _checked(batches: Iterable[Any], inputs: tuple[TensorSpec, ...], what: str) -> Iterator[Batch]:
    """Each batch by the names of the inputs, on the host."""
    names = [spec.name for spec in inputs]
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            if len(inputs) != 1:
                raise InputError(f"{what}[{number}] is no dict, and the model has several inputs: {names}")
            batch = {names[0]: batch}
        if set(batch) != set(names):
            raise InputError(f"{what}[{number}] has the names {sorted(batch)}; expected {sorted(names)}")
        arrays = {}
        for spec in inputs:
            array = batch[spec.name]
            if not hasattr(array, "shape"):
                raise InputError(f"{what}[{number}] is a {type(array).__name__}; expected an array {spec}")
            array = to_device(array, "cpu")
            if array.dtype != spec.dtype or not spec.accepts(array.shape) or array.size == 0:
                raise InputError(f"{what}[{number}] is {array.dtype} {array.shape}; expected {spec}, not empty")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(f"{what}[{number}] holds values that are not finite")
            arrays[spec.name] = np.ascontiguousarray(array)
        yield arrays


class _Counted:
    """Batches for ONNX Runtime's calibrators, which ask for them one by one; what was seen of them."""

    def __init__(self, batches: Iterator[Batch], kept: list[Batch]) -> None:
        self._batches = batches
        self._kept = kept
        self._lowest, self._highest = np.inf, -np.inf
        self.items = 0

    @property
    def varies(self) -> bool:
        return bool(self._lowest < self._highest)

    def get_next(self) -> Batch | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        first = next(iter(batch.values()))
        self.items += len(first) if first.ndim else 1
        for array in batch.values():
            self._lowest, self._highest = min(self._lowest, array.min()), max(self._highest, array.max())
        if len(self._kept) < _KEPT_FOR_ERRORS:
            self._kept.append(batch)
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.get_next, None)


# --- the file --------------------------------------------------------------------------------------------------------


def _write_quantized(
    model: Path, written: Path, batches: _Counted, method: Calibration, exclude: tuple[str, ...], scratch: Path
) -> None:
    try:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", extra="quantize", needed_for="quantize()") from error
    source = onnx.load(model, load_external_data=False)
    opset = max((entry.version for entry in source.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < 13:
        raise EngineError(
            f"{model.name}: opset {opset} has no scale for each channel; export the model with opset 13 or later"
        )
    if not any(node.op_type in _QUANTIZED and node.name not in exclude for node in source.graph.node):
        raise EngineError(f"{model.name} has none of the layers {', '.join(_QUANTIZED)} to quantize")
    unknown = sorted(set(exclude) - {node.name for node in source.graph.node})
    if unknown:
        raise InputError(f"exclude names {unknown}, which {model.name} does not have")
    first = next(iter(batches), None)
    if first is None:
        return  # the caller says so
    prepared = scratch / "prepared.onnx"
    methods = quantization.CalibrationMethod
    with _quiet():
        try:
            # Optimised with the nodes that are named kept apart: fused ones have other names.
            quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True, skip_optimization=bool(exclude))
            quantization.quantize_static(
                str(prepared),
                str(written),
                _Reader(quantization, itertools.chain([first], batches)).made,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTIZED),
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method={"minmax": methods.MinMax, "percentile": methods.Percentile}[method],
                nodes_to_exclude=list(exclude),
                # Symmetric, biases in float32: what TensorRT takes.
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                    "CalibPercentile": _PERCENTILE,
                },
            )
        except InputError:
            raise  # of the caller's batches, on their way through the quantizer
        except Exception as error:  # of a dozen kinds
            raise EngineError(f"{model.name} cannot be quantized: {error}") from error
        result = onnx.load(written)
        onnx.helper.set_model_props(result, {entry.key: entry.value for entry in source.metadata_props})
        onnx.save(result, written)


class _Reader:
    """An iterator as the class that ONNX Runtime insists on, which is there only once it is imported."""

    def __init__(self, quantization: Any, batches: Iterator[Batch]) -> None:
        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Batch | None:
                return next(batches, None)

        self.made = Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the root logger's advice on how to call the quantizer, and without its prints."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logger.setLevel(level)


# --- what it costs ---------------------------------------------------------------------------------------------------


def _errors(original: Engine, quantized: Engine, batches: Sequence[Batch]) -> tuple[OutputError, ...]:
    """Over all batches, an output at a time; integers, which may be indices, are compared as numbers, too."""
    sums: dict[str, npt.NDArray[np.float64]] = {spec.name: np.zeros(4) for spec in original.outputs}
    largest = dict.fromkeys(sums, 0.0)
    for batch in batches:
        expected, got = original.run(batch), quantized.run(batch)
        for name in sums:
            one, other = (np.asarray(outputs[name], np.float64).ravel() for outputs in (expected, got))
            sums[name] += one @ one, other @ other, one @ other, (one - other) @ (one - other)
            largest[name] = max(largest[name], float(np.abs(one - other).max(initial=0)))
    tiny = np.finfo(np.float64).tiny
    return tuple(
        OutputError(
            name,
            relative_rms=float(np.sqrt(squares[3] / max(squares[0], tiny))),
            largest=largest[name],
            cosine=float(squares[2] / max(np.sqrt(squares[0] * squares[1]), tiny)),
        )
        for name, squares in sums.items()
    )


def _ms_per_batch(engine: Engine, batch: Batch) -> float:
    times = []
    for _ in range(_TIMED_CALLS + 1):
        started = time.perf_counter()
        engine.run(batch)
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times[1:]))  # the first warms up
