"""Nonsense to every endpoint: schemathesis over the OpenAPI page, and inference requests with bytes changed.

``NBVISION_FUZZ`` says how many requests of each kind; the log of a long run is in docs/serving.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Server
from test_serve import affine
from test_serve_faults import resident_bytes

REQUESTS = int(os.environ.get("NBVISION_FUZZ", "100"))
GROWTH_BYTES = 64 << 20
unhurried = settings(
    max_examples=REQUESTS, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("service")
    config = f"""
    upload_s: 2.0
    pipelines:
      garments: {{kind: recognizer, device: cpu}}
      echo: {{kind: python, device: cpu, function: 'serve_functions:echo'}}
      affine: {{kind: engine, device: cpu, model: {affine(directory / "affine.onnx")}}}
    """
    with Server(config, directory) as server:
        for _ in range(5):  # a load holds two versions for a while, which is no growth
            for name in ("garments", "echo", "affine"):
                httpx.post(f"{server.url}/v2/repository/models/{name}/load", timeout=60).raise_for_status()
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(autouse=True)
def as_before(server: Server, client: httpx.Client) -> Iterator[None]:
    """No error of ours in the log, nothing that waits, and no growth after the first tenth of the requests."""
    logged = len(server.log)
    yield
    assert client.get("/v2/health/ready").status_code == 200
    assert client.post("/v1/echo", content=b"four").json()["bytes"] == 4
    assert all(server.stats(name)["waiting"] == 0 for name in ("garments", "echo", "affine"))
    assert [line for line in server.log[logged:] if "exception" in line] == []


class Growth:
    """Memory from the first tenth of the requests on, or from when it is told to start."""

    def __init__(self, server: Server) -> None:
        self._server, self._count, self._start_bytes = server, 0, 0

    def step(self) -> None:
        self._count += 1
        if self._count == max(REQUESTS // 10, 20):
            self.start()

    def start(self) -> None:
        self._start_bytes = resident_bytes(self._server.process.pid)

    def check(self) -> None:
        assert resident_bytes(self._server.process.pid) - self._start_bytes < GROWTH_BYTES


# --- every endpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_every_endpoint(server: Server) -> None:
    """schemathesis' own requests, good ones and bad ones: no status over 500, none that hangs."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 20
    growth = Growth(server)
    settled = settings(unhurried, max_examples=max(REQUESTS // (2 * len(operations)), 5))
    names = st.sampled_from(["garments", "echo", "affine", "nobody"])  # which are seldom hit upon by chance

    def asking(operation: Any) -> Any:
        @settled
        @given(operation.as_strategy(), names)
        def ask(case: Any, name: str) -> None:
            if "model" in case.path_parameters:
                case.path_parameters["model"] = name
            response = case.call(timeout=20)
            assert response.status_code < 500 or response.status_code in (503, 504), response.text

        return ask

    for operation in operations:
        asking(operation)()
    growth.start()  # all that a request may need is there now
    for operation in operations:
        asking(operation)()
    growth.check()


# --- inference requests -----------------------------------------------------------------------------------------------


def good_request() -> tuple[bytes, int]:
    """One with binary tensors, as tritonclient sends it."""
    import tritonclient.http as httpclient

    inputs = []
    for name in "xy":
        tensor = httpclient.InferInput(name, [2, 3], "FP32")
        tensor.set_data_from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
        inputs.append(tensor)
    body, length = httpclient.InferenceServerClient.generate_request_body(inputs, request_id="1")
    return bytes(body), int(length)


TOKENS = [b"-1", b"null", b"9" * 20, b"[", b"}", b'"', b"1e9"]


@st.composite
def changed(draw: Any, body: bytes) -> bytes:
    """The same with a few places changed, doubled or cut out."""
    data = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        new = draw(st.one_of(st.binary(max_size=8), st.sampled_from(TOKENS)))
        data[start:end] = new
    return bytes(data)


GOOD, LENGTH = good_request()
JSON_REQUEST = json.dumps(
    {
        "inputs": [{"name": name, "datatype": "FP32", "shape": [2, 3], "data": [0.5, 1, 2, 3, 4, 5]} for name in "xy"],
        "outputs": [{"name": "z", "parameters": {"binary_data": False}}],
        "parameters": {"timeout": 1_000_000, "priority": 1},
    }
).encode()


def test_the_requests_are_good_before_they_are_changed(client: httpx.Client) -> None:
    binary = client.post(
        "/v2/models/affine/infer", content=GOOD, headers={"Inference-Header-Content-Length": str(LENGTH)}
    )
    as_json = client.post("/v2/models/affine/infer", content=JSON_REQUEST)
    assert binary.status_code == as_json.status_code == 200


def test_changed_binary_requests(server: Server, client: httpx.Client) -> None:
    growth = Growth(server)

    @unhurried
    @given(changed(GOOD), st.one_of(st.just(LENGTH), st.integers(0, 400), st.sampled_from(["", "x", "-3", "9" * 30])))
    def ask(body: bytes, length: Any) -> None:
        headers = {"Inference-Header-Content-Length": str(length)}
        response = client.post("/v2/models/affine/infer", content=body, headers=headers)
        growth.step()
        assert response.status_code in (200, 400, 504), response.text
        if response.status_code != 200:
            assert response.json()["error"]

    ask()
    growth.check()


def test_changed_json_requests(server: Server, client: httpx.Client) -> None:
    growth = Growth(server)

    @unhurried
    @given(changed(JSON_REQUEST))
    def ask(body: bytes) -> None:
        response = client.post("/v2/models/affine/infer", content=body)
        growth.step()
        assert response.status_code in (200, 400, 504), response.text

    ask()
    growth.check()


def test_changed_images(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    """Files with bytes changed, by themselves and in forms whose own bytes are changed."""
    import io

    from PIL import Image

    def file(kind: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3)).save(buffer, kind)
        return buffer.getvalue()

    files = [file(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")]
    form = httpx.Request("POST", "http://x", files=[("images", (str(index), data)) for index, data in enumerate(files)])
    form.read()
    growth = Growth(server)

    @unhurried
    @given(st.sampled_from(files).flatmap(changed), changed(form.content))
    def ask(body: bytes, whole: bytes) -> None:
        alone = client.post("/v1/garments", content=body)
        several = client.post("/v1/echo", content=whole, headers={"Content-Type": form.headers["Content-Type"]})
        growth.step()
        assert alone.status_code in (200, 413, 422), alone.text
        assert several.status_code in (200, 400, 422), several.text

    ask()
    growth.check()
