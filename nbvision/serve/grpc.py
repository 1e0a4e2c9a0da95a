"""The Open Inference Protocol over gRPC: the same pipelines, errors and counts as over HTTP."""

from __future__ import annotations

import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

import nbvision
from nbvision.errors import InputError, MissingExtraError
from nbvision.serve import protocol, triton
from nbvision.serve.pipelines import TensorInfo
from nbvision.serve.service import Service
from nbvision.serve.status import RefusedError, described, status_of
from nbvision.serve.tracing import span

try:
    import grpc
    from google.protobuf import json_format
    from tritonclient.grpc import service_pb2, service_pb2_grpc
except ImportError as error:
    raise MissingExtraError(str(error.name), extra="grpc", needed_for="gRPC") from error

__all__ = ["serve_grpc"]

logger = logging.getLogger("nbvision.serve")

# What a JSON-like field of the protocol keeps each type of number in.
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        async with self._refusing(request, context):
            served = self._service.get(request.name, request.version)
            return service_pb2.ModelReadyResponse(ready=served.is_healthy)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        extensions = ["model_repository", "statistics"]
        return service_pb2.ServerMetadataResponse(name="nbvision", version=nbvision.__version__, extensions=extensions)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        async with self._refusing(request, context):
            served = self._service.get(request.name, request.version)
            answer = service_pb2.ModelMetadataResponse(name=served.name, versions=[served.version], platform="nbvision")
            for tensors, infos in ((answer.inputs, served.pipeline.inputs), (answer.outputs, served.pipeline.outputs)):
                for info in infos:
                    tensors.add(name=info.name, datatype=info.datatype, shape=info.shape)
            return answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        async with self._refusing(request, context):
            asked = _read(request)
            given = dict(context.invocation_metadata() or ())
            with (
                self._service.using(request.model_name, request.model_version) as served,
                span("ModelInfer", headers=given),
            ):
                tensors = await self._service.infer(served, asked)
            answer = service_pb2.ModelInferResponse(model_name=served.name, model_version=served.version, id=request.id)
            unknown = sorted(set(asked.outputs or ()) - set(tensors))
            if unknown:
                raise InputError(f"outputs {unknown} are asked for; expected some of {sorted(tensors)}")
            for name in asked.outputs or tensors:
                array = tensors[name]
                answer.outputs.add(name=name, datatype=protocol.datatype_of(array), shape=array.shape)
                answer.raw_output_contents.append(protocol.tensor_to_bytes(array))
            return answer

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        async with self._refusing(request, context):
            served = self._service.get(request.name, request.version)
            answer = service_pb2.ModelConfigResponse()
            json_format.ParseDict(triton.config_of(served), answer.config)
            return answer

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        async with self._refusing(request, context):
            names = [request.name] if request.name else list(self._service.served)
            answer = service_pb2.ModelStatisticsResponse()
            for name in names:
                served = self._service.get(name, request.version)
                json_format.ParseDict(triton.stats_of(self._service, served), answer.model_stats.add())
            return answer

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        async with self._refusing(request, context):
            answer = service_pb2.RepositoryIndexResponse()
            for name, served in self._service.served.items():
                answer.models.add(
                    name=name, version=served.version, state="READY" if served.is_healthy else "UNAVAILABLE"
                )
            return answer

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        async with self._refusing(request, context):
            await self._service.load(request.model_name)
            return service_pb2.RepositoryModelLoadResponse()

    @contextlib.asynccontextmanager
    async def _refusing(self, request: Any, context: Any) -> AsyncIterator[None]:
        """The token, errors as gRPC says them, and a line in the log."""
        started_s = time.perf_counter()
        line = {"method": "gRPC", "path": type(request).__name__.removesuffix("Request"), "status": "OK"}
        token = self._service.config.token
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        try:
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                raise RefusedError("a token is expected, as authorization: Bearer", 401)
            yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            code = _CODES.get(status_of(error), grpc.StatusCode.INTERNAL)
            line |= {"status": code.name, "error": str(error)}
            await context.abort(code, described(error)["error"])
        finally:
            ms = round((time.perf_counter() - started_s) * 1e3, 3)
            logger.info("request", extra=line | {"worker": self._service.worker, "ms": ms})


def _read(request: Any) -> protocol.InferRequest:
    """An inference request as the HTTP side knows it."""
    inputs: dict[str, Any] = {}
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw inputs for {len(request.inputs)} tensors; expected one each, or none")
    for index, tensor in enumerate(request.inputs):
        info = TensorInfo(tensor.name, tensor.datatype, tuple(tensor.shape))
        if info.datatype not in protocol.DATATYPES:
            raise InputError(f"input {info.name!r} has datatype {info.datatype!r}; it is none of the protocol's")
        if any(length < 0 for length in info.shape):
            raise InputError(f"input {info.name!r} has shape {list(info.shape)}; expected lengths of 0 or more")
        if info.name in inputs:
            raise InputError(f"input {info.name!r} is given twice")
        inputs[info.name] = (
            protocol.bytes_to_tensor(raw[index], info.datatype, info.shape) if raw else _from_contents(tensor, info)
        )
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice") or "int64_param")
        for name, value in request.parameters.items()
    }
    outputs = dict.fromkeys((output.name for output in request.outputs), True) or None
    return protocol.InferRequest(inputs, request.id, outputs, True, parameters)


def _from_contents(tensor: Any, info: TensorInfo) -> Any:
    field = _CONTENTS.get(info.datatype)
    if field is None:
        raise InputError(f"input {info.name!r} is {info.datatype}; expected it raw")
    values = list(getattr(tensor.contents, field))
    count = int(np.prod(info.shape))
    if len(values) != count:
        raise InputError(f"input {info.name!r} has {len(values)} values for shape {list(info.shape)}")
    array = np.empty(count, protocol.DATATYPES[info.datatype])
    try:
        array[:] = values
    except OverflowError as error:
        raise InputError(f"input {info.name!r}: a value is out of range of {info.datatype}") from error
    return array.reshape(info.shape)


@contextlib.asynccontextmanager
async def serve_grpc(service: Service, host: str, port: int) -> AsyncIterator[None]:
    """Answer over gRPC within this context; what is under way at its end is answered."""
    limit = service.config.body_bytes
    options = [("grpc.max_receive_message_length", limit), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=service.config.concurrency)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(service), server)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(where)
    except RuntimeError:  # newer versions of gRPC raise, older ones give 0
        bound = 0
    if not bound:
        raise InputError(f"{where} cannot be had for gRPC; choose another port")
    await server.start()
    logger.info("serving gRPC", extra={"address": where})
    try:
        yield
    finally:
        await server.stop(grace=service.config.drain_s)
