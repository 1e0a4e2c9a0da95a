"""From an ONNX file to TensorRT's serialized engine, the *plan*."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nbvision.engines._trt import TensorRT
from nbvision.engines.onnx_file import OnnxFile
from nbvision.engines.spec import BatchRange, Precision, TensorSpec, check_model_inputs
from nbvision.errors import EngineError

__all__ = ["BuildOptions", "build_plan"]

logger = logging.getLogger("nbvision")


@dataclass(frozen=True)
class BuildOptions:
    """What a plan depends on besides its model and its machine."""

    batches: tuple[BatchRange, ...]
    precision: Precision
    workspace_bytes: int


def build_plan(
    trt: TensorRT, model: OnnxFile, options: BuildOptions, *, targets: Sequence[tuple[int, int]] = ()
) -> bytes:
    """Build a plan with an optimisation profile for each range of batch sizes.

    Parameters
    ----------
    trt : TensorRT
    model : OnnxFile
    options : BuildOptions
    targets : sequence of (major, minor)
        Compute capabilities to build for, which needs no GPU; TensorRT-RTX only. Default: the GPU at hand.

    Raises
    ------
    EngineError
        If TensorRT cannot parse or build the model, the message naming node and operator where there is one;
        if more than the batch is dynamic; or if float16 is asked of a TensorRT that takes its types from the
        file, and the file holds none.
    """
    started = time.perf_counter()
    builder = trt.create("Builder")
    network = trt.create_network(builder)
    _parse(trt, model, network)
    inputs = [_input_spec(trt, model, network.get_input(index)) for index in range(network.num_inputs)]
    check_model_inputs(model.path.name, inputs)
    config = trt.create_config(
        builder,
        workspace_bytes=options.workspace_bytes,
        tf32=options.precision != "fp32",
        fp16=_wants_fp16(trt, model, network, options.precision),
        int8=_is_quantized(trt, network),
    )
    if any(spec.batched for spec in inputs):
        for batch in options.batches:
            _add_profile(builder, config, inputs, batch)
    if targets:
        trt.set_targets(config, targets)
    plan = builder.build_serialized_network(network, config)
    trt.raise_interruption()
    if plan is None:
        raise EngineError(f"{model.path.name}: {trt} cannot build it: {trt.take_reason()}")
    logger.info("%s: %s built its plan in %.1f s", model.path.name, trt, time.perf_counter() - started)
    return bytes(plan)


def _parse(trt: TensorRT, model: OnnxFile, network: Any) -> None:
    parser = trt.api.OnnxParser(network, trt.logger)
    # From the file, not from its bytes, so that external weight files are found beside it.
    if parser.parse_from_file(str(model.path)):
        return
    logged = trt.take_reason()
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    reasons = [f"{model.node(error.node())}: {error.desc()}" for error in errors]
    raise EngineError(f"{model.path.name}: {trt} cannot parse it: {'; '.join(reasons) or logged}")


def _input_spec(trt: TensorRT, model: OnnxFile, tensor: Any) -> TensorSpec:
    if tensor.is_shape_tensor:
        raise EngineError(
            f"{model.path.name}: input {tensor.name!r} decides about shapes inside the model, which nbvision "
            "does not support; export the model with that value as a constant"
        )
    return TensorSpec(tensor.name, trt.dtype(tensor.dtype), tuple(tensor.shape))


def _wants_fp16(trt: TensorRT, model: OnnxFile, network: Any, precision: Precision) -> bool:
    """Whether the builder needs its float16 flag: when asked, and for a file that holds float16 by itself."""
    holds_half = any(tensor.dtype == trt.api.DataType.HALF for tensor in _tensors(network))
    if precision == "fp16" and not holds_half and not trt.chooses_precision:
        raise EngineError(
            f"{model.path.name}: precision='fp16', but {trt} computes in the types of the file, which "
            "holds no float16. Convert it first (modelopt.onnx.autocast.convert_to_mixed_precision), or use "
            "precision='fp32'"
        )
    return precision == "fp16" or holds_half


def _is_quantized(trt: TensorRT, network: Any) -> bool:
    """Whether the file says which layers compute in int8."""
    return any(network.get_layer(index).type == trt.api.LayerType.QUANTIZE for index in range(network.num_layers))


def _tensors(network: Any) -> Iterator[Any]:
    yield from (network.get_input(index) for index in range(network.num_inputs))
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = (layer.get_output(position) for position in range(layer.num_outputs))
        yield from (tensor for tensor in outputs if tensor is not None)


def _add_profile(builder: Any, config: Any, inputs: Sequence[TensorSpec], batch: BatchRange) -> None:
    profile = builder.create_optimization_profile()
    for spec in inputs:
        if spec.batched:
            profile.set_shape(spec.name, *((size, *spec.shape[1:]) for size in batch))
    config.add_optimization_profile(profile)
