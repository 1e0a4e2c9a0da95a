"""The service over HTTP: the Open Inference Protocol, plain images in and JSON out, health, metrics, and a page."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import importlib.resources
import io
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from dataclasses import asdict
from typing import Any

import nbvision
from nbvision.errors import InputError, MissingExtraError, NbvisionError
from nbvision.serve import metrics, protocol, tracing, triton
from nbvision.serve.connections import READ_S
from nbvision.serve.service import MOST_ITEMS, Service
from nbvision.serve.status import CLIENT_GONE, RefusedError, UnknownModelError, described, status_of

try:
    import anyio
    import orjson
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from starlette.datastructures import Headers, UploadFile
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError(str(error.name), extra="serve", needed_for="a service") from error

__all__ = ["make_app"]

# Asked by who has no token: what watches over services, and browsers, which say no more than where a token is given.
_OPEN = {"/healthz", "/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json"}

_IMAGES = "/v1/"
# Plain numbers, once each; whatever else may be meant, FastAPI reads it.
_DEADLINE, _PRIORITY = rb"deadline_ms=\d{1,9}(\.\d{1,9})?", rb"priority=-?\d{1,9}"
_NUMBERS = re.compile(rb"(%b(&%b)?|%b)?" % (_DEADLINE, _PRIORITY, _PRIORITY))
_WATCH_AFTER_S = 0.01
_LINE = "nbvision.line"  # of the log, in a request's scope

logger = logging.getLogger("nbvision.serve")


class _Admission:
    """Before everything else: the token, the number of requests under way, and after it a line in the log."""

    def __init__(self, app: ASGIApp, service: Service, direct: ASGIApp) -> None:
        self._app, self._service, self._direct = app, service, direct
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        line: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "worker": self._service.worker}
        scope[_LINE] = line

        async def noting(message: Message) -> None:
            line.setdefault("status", message.get("status"))
            await send(message)

        refused = self._refused(scope)
        self._active += 1
        try:
            app = self._direct if _is_direct(scope) else self._app
            await (app if refused is None else _refusal(refused, line))(scope, receive, noting)
        except asyncio.CancelledError:  # by the server, whose time to drain is over
            if "status" in line:
                raise
            ending = RefusedError("the service is ending; ask another one", 503, retry_after_s=1.0)
            await _refusal(ending, line)(scope, receive, noting)
        finally:
            self._active -= 1
            logger.info("request", extra=line | {"ms": round((time.perf_counter() - started_s) * 1e3, 3)})

    def _refused(self, scope: Scope) -> RefusedError | None:
        expected = self._service.config.token
        if expected and scope["path"] not in _OPEN:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), expected.encode()):
                return RefusedError("a token is expected, as Authorization: Bearer", 401)
        if self._active >= self._service.config.concurrency:
            message = f"{self._active} requests are under way; come again later"
            return RefusedError(message, 503, retry_after_s=1.0)
        return None


def _is_direct(scope: Scope) -> bool:
    """Whether a request goes to ``POST /v1/{model}``, and nothing is wrong with it that FastAPI would have to tell.

    FastAPI's way from here to there takes a third of what a request takes; a span for it is made there.
    """
    return (
        not tracing.is_set_up()
        and scope["method"] == "POST"
        and scope["path"].startswith(_IMAGES)
        and "/" not in scope["path"].removeprefix(_IMAGES)
        and _NUMBERS.fullmatch(scope["query_string"]) is not None
    )


def _numbers_of(scope: Scope) -> dict[str, Any]:
    pairs = (pair.partition("=") for pair in scope["query_string"].decode().split("&") if pair)
    return {name: int(number) if name == "priority" else float(number) for name, _, number in pairs}


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(title="nbvision", version=nbvision.__version__, lifespan=lifespan)

    async def recognize_directly(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await recognize(request, scope["path"].removeprefix(_IMAGES), **_numbers_of(scope))
        except NbvisionError as error:
            response = _refusal(error, scope[_LINE])
        await response(scope, receive, send)

    app.add_middleware(_Admission, service=service, direct=recognize_directly)

    async def refuse(request: Request, error: Exception) -> Response:
        return _refusal(error, request.scope[_LINE])

    app.add_exception_handler(NbvisionError, refuse)
    app.add_exception_handler(Exception, refuse)  # a bug of ours: the log has it

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    app.add_exception_handler(HTTPException, not_found)

    async def not_valid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        wrong = error.errors()[0]
        message = f"{wrong['loc'][-1]} is {wrong.get('input')!r}: {wrong['msg']}"
        return _refusal(RefusedError(message, 422), request.scope[_LINE])

    app.add_exception_handler(RequestValidationError, not_valid)

    async def body_of(request: Request) -> bytes:
        """All of a request's body, if it is small enough and comes in time."""
        config = service.config
        coding = request.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise RefusedError(f"Content-Encoding is {coding!r}; expected none: images are compressed already", 415)
        parts: list[bytes] = []
        size = 0

        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > config.body_bytes:
            raise RefusedError(f"the body has {announced} bytes; the limit is {config.body_bytes}", 413)
        try:
            with anyio.fail_after(config.upload_s):
                async for part in request.stream():
                    size += len(part)
                    if size > config.body_bytes:
                        raise RefusedError(f"the body has over {config.body_bytes} bytes, which is the limit", 413)
                    if part:  # the last is none, and to join it copies the others
                        parts.append(part)
        except TimeoutError:
            raise RefusedError(f"the body has not come within {config.upload_s:g} s", 408) from None
        except ClientDisconnect:
            raise RefusedError("the client has gone", CLIENT_GONE) from None
        return b"".join(parts)

    async def while_there(request: Request, answer: Awaitable[Any]) -> Any:
        """The answer, or cancelled if the client goes away meanwhile."""
        watches: list[asyncio.Task[None]] = []

        async def cancel_when_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        def watch() -> None:
            watches.append(asyncio.create_task(cancel_when_gone()))

        # Most answers come sooner, and then the task and its turns of the loop are spared.
        starting = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, watch)
        try:
            with anyio.CancelScope() as scope:
                return await answer
        finally:
            starting.cancel()
            for task in watches:
                task.cancel()
        raise RefusedError("the client has gone", CLIENT_GONE)

    # --- the Open Inference Protocol ----------------------------------------------------------------------------------

    @app.get("/v2", tags=["Open Inference Protocol"])
    async def server() -> dict[str, Any]:
        extensions = ["binary_tensor_data", "model_repository", "statistics"]
        return {"name": "nbvision", "version": nbvision.__version__, "extensions": extensions}

    @app.get("/healthz", tags=["health"])
    @app.get("/v2/health/live", tags=["health"])
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", tags=["health"])
    async def ready() -> Response:
        return JSONResponse({"ready": service.is_ready}, 200 if service.is_ready else 503)

    @app.get("/v2/models/stats", tags=["Open Inference Protocol"])
    async def all_stats() -> dict[str, Any]:
        return {"model_stats": [triton.stats_of(service, served) for served in service.served.values()]}

    @app.get("/v2/models/{model}", tags=["Open Inference Protocol"])
    @app.get("/v2/models/{model}/versions/{version}", tags=["Open Inference Protocol"])
    async def metadata(model: str, version: str | None = None) -> dict[str, Any]:
        served = service.get(model, version)
        tensors = {
            what: [asdict(info) | {"shape": list(info.shape)} for info in getattr(served.pipeline, what)]
            for what in ("inputs", "outputs")
        }
        return {"name": model, "versions": [served.version], "platform": "nbvision", **tensors}

    @app.get("/v2/models/{model}/ready", tags=["Open Inference Protocol"])
    @app.get("/v2/models/{model}/versions/{version}/ready", tags=["Open Inference Protocol"])
    async def model_ready(model: str, version: str | None = None) -> Response:
        is_ready = service.get(model, version).is_healthy
        return JSONResponse({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models/{model}/config", tags=["Open Inference Protocol"])
    @app.get("/v2/models/{model}/versions/{version}/config", tags=["Open Inference Protocol"])
    async def model_config(model: str, version: str | None = None) -> dict[str, Any]:
        served = service.get(model, version)
        return triton.config_of(served)

    @app.get("/v2/models/{model}/stats", tags=["Open Inference Protocol"])
    @app.get("/v2/models/{model}/versions/{version}/stats", tags=["Open Inference Protocol"])
    async def model_stats(model: str, version: str | None = None) -> dict[str, Any]:
        return {"model_stats": [triton.stats_of(service, service.get(model, version))]}

    @app.post("/v2/models/{model}/infer", tags=["Open Inference Protocol"])
    @app.post("/v2/models/{model}/versions/{version}/infer", tags=["Open Inference Protocol"])
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        """Tensors in, tensors out. Of several images of which some fail, ERROR says which and why."""
        length = request.headers.get("inference-header-content-length")
        if length is not None and not length.isdecimal():
            raise InputError(f"Inference-Header-Content-Length is {length!r}; expected a number of bytes")
        with service.using(model, version) as served:
            asked = protocol.read_request(await body_of(request), None if length is None else int(length))
            tensors = await while_there(request, service.infer(served, asked, read_s=_read_s(request)))
        body, header_length = protocol.write_response(tensors, model=model, version=served.version, request=asked)
        if header_length is None:
            return Response(body, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(header_length)}
        return Response(body, media_type="application/octet-stream", headers=headers)

    @app.post("/v2/repository/index", tags=["repository"])
    async def index() -> list[dict[str, str]]:
        return [
            {"name": name, "version": served.version, "state": "READY" if served.is_healthy else "UNAVAILABLE"}
            for name, served in service.served.items()
        ]

    @app.post("/v2/repository/models/{model}/load", tags=["repository"])
    async def load(model: str) -> dict[str, str]:
        """Load a model anew. What does not load, or does not answer, leaves the one before in its place."""
        served = await service.load(model)
        return {"name": model, "version": served.version}

    # --- images in, JSON out ------------------------------------------------------------------------------------------

    @app.post(
        _IMAGES + "{model}",
        tags=["images"],
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "image/*": {"schema": {"type": "string", "format": "binary"}},
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "properties": {
                                "images": {"type": "array", "items": {"type": "string", "format": "binary"}}
                            },
                        }
                    },
                    "application/json": {
                        "schema": {
                            "type": "object",
                            "properties": {"images": {"type": "array", "items": {"type": "string", "format": "byte"}}},
                            "required": ["images"],
                        }
                    },
                },
            }
        },
    )
    async def recognize(request: Request, model: str, deadline_ms: float | None = None, priority: int = 0) -> Response:
        """One image as it is, several as multipart/form-data, or as base64 in JSON.

        The answer to one image is its result, or an error; to several ``results``, in which an image that fails has
        its ``error`` and takes nothing from the others.
        """
        with service.using(model) as served:
            if not served.pipeline.takes_images:
                raise UnknownModelError(f"model {model!r} takes tensors; expected POST /v2/models/{model}/infer")
            service.refuse_if_late(served, deadline_ms, read_s=_read_s(request))
            images, is_one = await _images_of(request, await body_of(request))
            numbers: dict[str, Any] = {"deadline_ms": deadline_ms, "priority": priority}
            answer = service.answer(served, images, **numbers, read_s=_read_s(request))
            results = await while_there(request, answer)
        if is_one and isinstance(results[0], Exception):
            raise results[0].with_traceback(None)  # which may be kept, and raised again
        listed = [described(result) if isinstance(result, Exception) else result for result in results]
        return _as_json(listed[0] if is_one else {"results": listed})

    # --- who looks after it -------------------------------------------------------------------------------------------

    @app.get("/metrics", tags=["operations"])
    async def prometheus() -> Response:
        text, kind = metrics.as_text(service)
        return Response(text, media_type=kind)

    @app.get("/v1/stats", tags=["operations"])
    async def stats() -> dict[str, Any]:
        return metrics.described(service)

    @app.get("/v1/{model}/timeline", tags=["operations"], response_class=Response)
    async def timeline(model: str, seconds: float = Query(60.0, gt=0, le=3600)) -> Response:
        """A picture (PNG) of the batches of the last while: their sizes and times, what waited, what was lost."""
        shown = service.get(model).batcher.timeline(seconds=seconds)
        buffer = io.BytesIO()
        await asyncio.to_thread(lambda: shown.draw().save(buffer, "png"))
        return Response(buffer.getvalue(), media_type="image/png")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(importlib.resources.files("nbvision.serve").joinpath("page.html").read_text())

    return app


async def _images_of(request: Request, body: bytes) -> tuple[list[bytes], bool]:
    """The images of a request, and whether it is a single one by itself."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind in ("", "application/octet-stream", "application/x-www-form-urlencoded"):
        return [body], True
    if kind == "multipart/form-data":
        images = await _parts_of(request, body)
    elif kind == "application/json":
        images = _base64_of(body)
    else:
        raise RefusedError(f"Content-Type is {kind!r}; expected an image, multipart/form-data or application/json", 415)
    if not 0 < len(images) <= MOST_ITEMS:
        raise InputError(f"{len(images)} images; expected 1 to {MOST_ITEMS}")
    return images, False


async def _parts_of(request: Request, body: bytes) -> list[bytes]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(request.headers, once(), max_files=MOST_ITEMS, max_fields=16)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        raise InputError(f"the body is no multipart/form-data: {error}") from None
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        return [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]


def _base64_of(body: bytes) -> list[bytes]:
    try:
        given = json.loads(body)
        return [base64.b64decode(text, validate=True) for text in given["images"]]
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error) as error:
        raise InputError(f'the body is not {{"images": [base64, ...]}}: {type(error).__name__} {error}') from None


def _read_s(request: Request) -> float:
    """Since when a request waits for us, as far as it has come by now."""
    read_s: float = request.scope.get(READ_S, time.perf_counter())
    return read_s


def _as_json(answer: Any) -> Response:
    """An answer, whose vectors take the standard library ten times as long; but it knows integers of any size.

    It also refuses what is no number, of which orjson makes null.
    """
    with contextlib.suppress(TypeError):
        body = orjson.dumps(answer)
        if b"null" not in body:
            return Response(body, media_type="application/json")
    return JSONResponse(answer)


def _refusal(error: BaseException, line: dict[str, Any]) -> Response:
    """What a client is told of an error; the line of the log has it too."""
    line["error"] = str(error) or type(error).__name__
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(retry_after_s)))
    status = status_of(error)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse(described(error), status, headers=headers)
