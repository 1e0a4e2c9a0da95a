"""The service as its clients see it: tritonclient over HTTP and gRPC, curl, browsers, Prometheus, and nonsense."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import Server

from nbvision.codecs import decode
from nbvision.demo.catalogue import make_catalogue
from nbvision.demo.run import models_directory
from nbvision.indexing import image_files, index_files
from nbvision.ops.rle import rle_to_mask
from nbvision.recognizer import Recognizer
from nbvision.search import Index

LIMIT_BYTES = 1_000_000
TOKEN = "open sesame"

httpclient = pytest.importorskip("tritonclient.http")
grpcclient = pytest.importorskip("tritonclient.grpc")


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return Recognizer.load(models_directory(), device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    make_catalogue(directory, products=4, photographs=2, queries=3, seed=11)
    return directory


@pytest.fixture(scope="module")
def queries(pictures: Path) -> list[bytes]:
    """Three pictures in which something is found, each of another size."""
    return [path.read_bytes() for path in image_files(pictures / "queries")[:3]]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def affine(path: Path) -> Path:
    """A model of two inputs and two outputs: x * 2 + y, and the sum of x."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Add", ["twice", "y"], ["z"]),
        helper.make_node("ReduceSum", ["x", "axes"], ["total"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "affine",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"],
        [
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, ["n"]),
        ],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, pictures: Path, recognizer: Recognizer) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("service")
    index = Index(recognizer.dimension, model=recognizer.digest)
    for _ in index_files(index, recognizer, image_files(pictures / "catalogue"), root=pictures / "catalogue"):
        pass
    index.save(directory / "index")
    config = f"""
    body_bytes: {LIMIT_BYTES}
    upload_s: 1.0
    header_s: 1.0
    pipelines:
      garments:
        kind: recognizer
        device: cpu
        index: {directory / "index"}
        nearest: 2
        crops: true
        stage_times: true
        limit_pixels: 4000000
        decode_processes: 1
      affine:
        kind: engine
        device: cpu
        model: {affine(directory / "affine.onnx")}
      echo:
        kind: python
        device: cpu
        function: serve_functions:echo
    """
    port = free_port()
    with Server(config, directory, "--grpc-port", str(port)) as server:
        server.grpc_url = f"127.0.0.1:{port}"  # type: ignore[attr-defined]
        yield server
        assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def triton(server: Server) -> Iterator[Any]:
    with httpclient.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture
def triton_grpc(server: Server) -> Iterator[Any]:
    with grpcclient.InferenceServerClient(server.grpc_url) as client:  # type: ignore[attr-defined]
        yield client


# --- images in, JSON out ----------------------------------------------------------------------------------------------


def test_a_picture_gets_what_the_recognizer_finds(
    client: httpx.Client, recognizer: Recognizer, queries: list[bytes], pictures: Path
) -> None:
    found = 0
    for data in queries:
        expected = recognizer.recognize([data])
        answer = client.post("/v1/garments", content=data, headers={"Content-Type": "image/jpeg"}).json()
        height, width = decode([data], device="cpu").sizes[0].tolist()
        assert (answer["height"], answer["width"]) == (height, width)
        assert len(answer["objects"]) == len(expected)
        for index, one in enumerate(answer["objects"]):
            np.testing.assert_allclose(one["box"], expected.boxes[index], atol=0.05)
            assert one["label"] == recognizer.classes[expected.labels[index]]
            assert one["score"] == pytest.approx(expected.scores[index], abs=1e-3)
            np.testing.assert_allclose(one["vector"], expected.vectors[index], atol=0.01)
            mask = rle_to_mask([one["mask"]])[0]
            assert np.mean(mask != expected.masks[index]) < 0.01
            x1, y1, x2, y2 = one["crop_box"]
            with Image.open(io.BytesIO(base64.b64decode(one["crop"]))) as crop:
                assert crop.format == "JPEG"
                assert crop.size == (min(x2, width) - max(x1, 0), min(y2, height) - max(y1, 0))
            assert len(one["nearest"]) == 2
            assert all((pictures / "catalogue" / good["id"]).exists() for good in one["nearest"])
            scores = [good["score"] for good in one["nearest"]]
            assert scores == sorted(scores, reverse=True)
        assert answer["batch"]["images"] == 1
        assert {"decode", "detect", "crop", "mask", "embed", "search", "crops"} <= set(answer["batch"]["times_ms"])
        found += len(answer["objects"])
    assert found >= 3


def test_several_pictures_of_which_some_are_broken(client: httpx.Client, queries: list[bytes]) -> None:
    given = [queries[0], b"<html>404</html>", queries[1], queries[0][: len(queries[0]) // 2], b""]
    kinds = [None, "not_an_image", None, "truncated", "empty"]
    files = [("images", (f"{index}.bin", data, "application/octet-stream")) for index, data in enumerate(given)]
    multipart = client.post("/v1/garments", files=files)
    as_base64 = client.post("/v1/garments", json={"images": [base64.b64encode(data).decode() for data in given]})
    for response in (multipart, as_base64):
        assert response.status_code == 200
        results = response.json()["results"]
        assert [result.get("kind") for result in results] == kinds
        for result, data in zip(results, given, strict=True):
            if "error" not in result:
                assert result["objects"] == client.post("/v1/garments", content=data).json()["objects"]


def test_several_pictures_of_which_all_are_broken(client: httpx.Client) -> None:
    """Their errors are the answer; that the service is too busy, or too late, is a status."""
    files = [("images", ("a", b"no image")), ("images", ("b", b""))]
    response = client.post("/v1/garments", files=files)
    assert response.status_code == 200
    assert [result["kind"] for result in response.json()["results"]] == ["not_an_image", "empty"]
    assert client.post("/v1/garments?deadline_ms=0", files=[("images", ("c", b"another"))]).status_code == 504


def test_a_broken_picture_is_looked_at_once(client: httpx.Client, server: Server) -> None:
    before = server.stats("garments")["items"]
    answers = [client.post("/v1/garments", content=b"\xff\xd8\xff broken") for _ in range(5)]
    assert {answer.status_code for answer in answers} == {422}
    assert len({answer.text for answer in answers}) == 1
    assert server.stats("garments")["items"] - before == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server: Server, pictures: Path) -> None:
    first, second = image_files(pictures / "queries")[:2]
    command = ["curl", "-sS", "-F", f"images=@{first}", "-F", f"images=@{second}", f"{server.url}/v1/garments"]
    results = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["results"]
    assert [len(result["objects"]) > 0 for result in results] == [True, True]
    command = ["curl", "-sS", "--data-binary", f"@{first}", f"{server.url}/v1/garments"]  # says it is a form
    assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout) == results[0]


def test_the_same_picture_is_recognized_once(client: httpx.Client, queries: list[bytes], server: Server) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(buffer, "PNG")
    before = server.stats("garments")
    answers = [client.post("/v1/garments", content=buffer.getvalue()).json() for _ in range(3)]
    twice = client.post("/v1/garments", files=[("images", ("a", buffer.getvalue()))] * 2).json()["results"]
    after = server.stats("garments")
    assert after["items"] - before["items"] == 1
    assert after["success"] - before["success"] == 4
    assert all(answer == answers[0] for answer in [*answers, *twice])


# --- the Open Inference Protocol --------------------------------------------------------------------------------------


def tensor(client: Any, name: str, array: Any, datatype: str) -> Any:
    made = client.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def images_of(*given: bytes) -> Any:
    array = np.empty(len(given), object)
    array[:] = given
    return array


def test_triton_health_and_metadata(triton: Any, triton_grpc: Any) -> None:
    for client in (triton, triton_grpc):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("garments")
    over_http, over_grpc = triton.get_model_metadata("garments"), triton_grpc.get_model_metadata("garments")
    assert over_http["name"] == over_grpc.name == "garments"
    assert over_http["versions"] == list(over_grpc.versions)
    assert [each["name"] for each in over_http["outputs"]] == [each.name for each in over_grpc.outputs]
    assert over_http["inputs"] == [{"name": "IMAGE", "datatype": "BYTES", "shape": [-1]}]
    assert triton.get_server_metadata()["name"] == triton_grpc.get_server_metadata().name == "nbvision"
    assert triton.get_model_config("affine")["max_batch_size"] == 16
    assert {each["name"] for each in triton.get_model_repository_index()} == {"garments", "affine", "echo"}
    assert triton.is_model_ready("garments", over_http["versions"][0])


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_triton_images(over: str, triton: Any, triton_grpc: Any, recognizer: Recognizer, queries: list[bytes]) -> None:
    module, client = (httpclient, triton) if over == "http" else (grpcclient, triton_grpc)
    given = images_of(queries[0], b"no image", queries[1])
    result = client.infer("garments", [tensor(module, "IMAGE", given, "BYTES")], request_id="seven")
    expected = recognizer.recognize([queries[0], queries[1]])
    assert result.as_numpy("IMAGES").tolist() == [2 * image for image in expected.images.tolist()]
    np.testing.assert_allclose(result.as_numpy("BOXES"), expected.boxes, atol=0.05)
    np.testing.assert_allclose(result.as_numpy("VECTORS"), expected.vectors, atol=0.01)
    labels = [label.decode() for label in result.as_numpy("LABELS")]
    assert labels == [recognizer.classes[label] for label in expected.labels]
    masks = rle_to_mask([json.loads(mask) for mask in result.as_numpy("MASKS")])
    assert np.mean(masks != expected.masks) < 0.01
    errors = result.as_numpy("ERROR")
    assert [bool(error) for error in errors] == [False, True, False]
    assert b"image" in errors[1]
    response = result.get_response()
    assert (response["id"] if over == "http" else response.id) == "seven"


@pytest.mark.parametrize("over", ["http", "http-json", "grpc"])
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_triton_tensors(over: str, rows: int, triton: Any, triton_grpc: Any, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, rows, 3)).astype(np.float32)
    module, client = (grpcclient, triton_grpc) if over == "grpc" else (httpclient, triton)
    inputs = [tensor(module, "x", x, "FP32"), tensor(module, "y", y, "FP32")]
    outputs = [module.InferRequestedOutput(name) for name in ("total", "z")]
    if over == "http-json":
        for given, array in zip(inputs, (x, y), strict=True):
            given.set_data_from_numpy(array, binary_data=False)
        outputs = [module.InferRequestedOutput(name, binary_data=False) for name in ("total", "z")]
    result = client.infer("affine", inputs, outputs=outputs)
    assert result.as_numpy("z").shape == (rows, 3)
    np.testing.assert_allclose(result.as_numpy("z"), 2 * x + y, rtol=1e-6)
    np.testing.assert_allclose(result.as_numpy("total"), x.sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_triton_is_told_what_is_wrong(over: str, triton: Any, triton_grpc: Any) -> None:
    from tritonclient.utils import InferenceServerException

    module, client = (httpclient, triton) if over == "http" else (grpcclient, triton_grpc)
    good = np.zeros((2, 3), np.float32)
    x = tensor(module, "x", good, "FP32")
    y = tensor(module, "y", good, "FP32")
    for model, inputs, options, says in (
        ("nobody", [x, y], {}, "expected one of"),
        ("affine", [x], {}, r"inputs are \['x'\]"),
        ("affine", [x, tensor(module, "y", good.astype(np.float64), "FP64")], {}, "expected FP32"),
        ("affine", [x, tensor(module, "y", good[:1], "FP32")], {}, "batches of"),
        ("affine", [x, tensor(module, "y", good[:, :2].copy(), "FP32")], {}, "expected FP32"),
        ("affine", [x, y], {"model_version": "9"}, "no version '9'"),
        ("affine", [x, y], {"outputs": [module.InferRequestedOutput("w")]}, "are asked for"),
        ("affine", [x, y], {"timeout": -1}, "has passed"),
        ("garments", [tensor(module, "IMAGE", images_of(b"no image"), "BYTES")], {}, "image"),
    ):
        with pytest.raises(InferenceServerException, match=says):
            client.infer(model, inputs, **options)
    np.testing.assert_allclose(client.infer("affine", [x, y]).as_numpy("z"), good)


def test_triton_loads_anew(triton: Any, triton_grpc: Any, server: Server) -> None:
    from tritonclient.utils import InferenceServerException

    before = server.stats("echo")["version"]
    triton.load_model("echo")
    between = server.stats("echo")["version"]
    triton_grpc.load_model("echo")
    assert len({before, between, server.stats("echo")["version"]}) == 3
    for client in (triton, triton_grpc):
        with pytest.raises(InferenceServerException, match="nobody"):
            client.load_model("nobody")


def test_triton_statistics(triton: Any) -> None:
    array = np.ones((3, 3), np.float32)
    inputs = [tensor(httpclient, name, array, "FP32") for name in "xy"]
    before = triton.get_inference_statistics("affine")["model_stats"][0]
    for _ in range(4):
        triton.infer("affine", inputs)
    after = triton.get_inference_statistics("affine")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 12
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 4
    assert (
        sum(each["batch_size"] * each["compute_infer"]["count"] for each in after["batch_stats"])
        == (after["inference_count"])
    )


# --- who looks after it -----------------------------------------------------------------------------------------------


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = [
        sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(values)


def test_triton_over_grpc_says_what_it_says_over_http(triton: Any, triton_grpc: Any) -> None:
    config = triton_grpc.get_model_config("affine", as_json=True)["config"]
    over_http = triton.get_model_config("affine")
    assert config["name"] == over_http["name"] == "affine"
    assert config["max_batch_size"] == over_http["max_batch_size"]
    assert [tensor["name"] for tensor in config["input"]] == ["x", "y"]
    assert [int(length) for length in config["input"][0]["dims"]] == over_http["input"][0]["dims"]
    (stats,) = triton_grpc.get_inference_statistics("affine", as_json=True)["model_stats"]
    (also,) = triton.get_inference_statistics("affine")["model_stats"]
    assert int(stats.get("inference_count", 0)) == also["inference_count"]
    index = triton_grpc.get_model_repository_index(as_json=True)["models"]
    assert sorted(model["name"] for model in index) == sorted(
        model["name"] for model in triton.get_model_repository_index()
    )
    assert len(triton_grpc.get_inference_statistics(as_json=True)["model_stats"]) == len(index)


def test_prometheus(client: httpx.Client) -> None:
    names = ("nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count")
    before = [metric(client, name, model="echo") for name in names]
    for data in (b"one", b"two", b"three", b""):
        client.post("/v1/echo", content=data)
    after = [metric(client, name, model="echo") for name in names]
    assert [late - early for early, late in zip(before, after, strict=True)] == [3, 1, 4]
    batches = metric(client, "nv_inference_exec_count", model="echo")
    assert metric(client, "nbvision_batches_total", model="echo") == batches
    assert metric(client, "nbvision_batches_of_size_total", model="echo") == batches
    assert metric(client, "nv_inference_pending_request_count", model="echo") == 0
    assert metric(client, "nbvision_memory_held_bytes", device="cpu") > 0


def test_the_timeline_of_the_last_minute(client: httpx.Client) -> None:
    def colors() -> int:
        answer = client.get("/v1/echo/timeline?seconds=1").raise_for_status()
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert (picture.format, picture.size) == ("PNG", (900, 320))
            return len(picture.crop((64, 0, 890, 200)).getcolors())

    time.sleep(1.1)  # what other tests did is past
    before = colors()
    client.post("/v1/echo", content=b"another of its own").raise_for_status()
    assert colors() > before
    assert client.get("/v1/nobody/timeline").status_code == 404
    assert "seconds" in client.get("/v1/echo/timeline?seconds=0").json()["error"]


def test_openapi_describes_what_there_is(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    assert {"/v1/{model}", "/v2/models/{model}/infer", "/v2/health/ready", "/metrics"} <= set(described["paths"])
    assert set(described["paths"]["/v1/{model}"]["post"]["requestBody"]["content"]) == {
        "image/*",
        "multipart/form-data",
        "application/json",
    }
    assert "swagger" in client.get("/docs").text


def test_the_log_has_a_json_object_for_each_request(client: httpx.Client, server: Server) -> None:
    path = f"/v1/nobody-{time.monotonic_ns()}"
    client.post(path, content=b"x")
    server.until(lambda: any(line.get("path") == path for line in server.log), seconds=5)
    line = next(line for line in server.log if line.get("path") == path)
    assert (line["message"], line["method"], line["status"]) == ("request", "POST", 404)
    assert line["ms"] >= 0


# --- what is not taken ------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 400 million pixels in a few bytes of header."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "says"),
    [
        ("/v1/nobody", b"x", {}, 404, "not served"),
        ("/v1/affine", b"x", {}, 404, "takes tensors"),
        ("/nowhere", b"x", {}, 404, "Not Found"),
        ("/v2/models/echo/versions/1/infer", b"{}", JSON, 404, "no version"),
        ("/healthz", b"x", {}, 405, "Not Allowed"),
        ("/v1/echo", bytes(LIMIT_BYTES + 1), {}, 413, "limit"),
        ("/v1/garments", bomb(), {}, 413, "pixels"),
        ("/v1/garments", b"GIF89a", {}, 422, ""),
        ("/v1/garments", b"no image at all", {}, 422, "image"),
        ("/v1/echo", b"", {}, 422, "empty"),
        ("/v1/echo", b"x", {"Content-Type": "video/mp4"}, 415, "expected an image"),
        ("/v1/echo", b"x", {"Content-Encoding": "gzip"}, 415, "Content-Encoding"),
        ("/v1/echo?deadline_ms=0", b"x", {}, 504, "has passed"),
        ("/v1/echo?deadline_ms=-5", b"x", {}, 504, "has passed"),
        ("/v1/echo?deadline_ms=soon", b"x", {}, 422, "number"),
        ("/v1/echo?priority=high", b"x", {}, 422, "integer"),
        ("/v1/echo", b"{", JSON, 400, "base64"),
        ("/v1/echo", b"{}", JSON, 400, "images"),
        ("/v1/echo", b'{"images": []}', JSON, 400, "0 images"),
        ("/v1/echo", b'{"images": ["%%"]}', JSON, 400, "base64"),
        ("/v1/echo", b'{"images": [5]}', JSON, 400, "base64"),
        ("/v1/echo", b"[" * 100_000, JSON, 400, "base64"),
        ("/v1/echo", json.dumps({"images": ["eA=="] * 1025}).encode(), JSON, 400, "1025 images"),
        ("/v1/echo", b"x", {"Content-Type": "multipart/form-data"}, 400, "multipart"),
        ("/v1/echo", b"x", {"Content-Type": "multipart/form-data; boundary=a"}, 400, ""),
        ("/v2/models/echo/infer", b"{", JSON, 400, "no JSON"),
        ("/v2/models/echo/infer", b"[" * 100_000, JSON, 400, "no JSON"),
        ("/v2/models/echo/infer", b"{}", {"Inference-Header-Content-Length": "3"}, 400, "3 bytes"),
        ("/v2/models/echo/infer", b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "number of bytes"),
        ("/v2/models/echo/infer", b"{}x", {"Inference-Header-Content-Length": "2"}, 400, "inputs"),
        ("/v2/repository/models/nobody/load", b"", {}, 404, "nobody"),
    ],
)
def test_refused(client: httpx.Client, path: str, content: bytes, headers: Any, status: int, says: str) -> None:
    response = client.post(path, content=content, headers=headers)
    assert response.status_code == status
    assert says in response.json()["error"]
    assert client.post("/v1/echo", content=b"as before").json()["bytes"] == 9


def test_a_body_without_an_end(client: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(LIMIT_BYTES // 1000 + 2):
            yield bytes(1000)

    assert client.post("/v1/echo", content=parts()).status_code == 413


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("deadline_ms=60000", 200),
        ("priority=-3", 200),
        ("deadline_ms=60000.5&priority=1", 200),
        ("priority=1&deadline_ms=60000", 200),
        ("deadline_ms=1e5", 200),
        ("deadline_ms=0&deadline_ms=60000", 200),
        ("another=1", 200),
        ("deadline_ms=0", 504),
        ("deadline_ms=60000priority=1", 422),
        ("deadline_ms=", 422),
        ("deadline_ms=soon", 422),
        ("priority=1.5", 422),
        ("priority=1&priority=high", 422),
    ],
)
def test_what_a_query_says(server: Server, query: str, status: int) -> None:
    """Plain numbers pass FastAPI by; whatever else there is, is told as by it."""
    assert httpx.post(f"{server.url}/v1/echo?{query}", content=query.encode(), verify=False).status_code == status


def test_headers_without_an_end(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):  # it may close while we talk
            for _ in range(100):
                connection.sendall(b"X-Long: " + b"a" * 8000 + b"\r\n")
            answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 4") or not answer
    assert server.status("/healthz") == 200


def test_a_slow_client(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nonly this")
        started_s = time.monotonic()
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert 0.5 < time.monotonic() - started_s < 5
    assert server.status("/healthz") == 200


def test_a_silent_client(server: Server) -> None:
    """A connection on which no request comes is closed, also behind one on which one came."""
    host, port = server.url.removeprefix("http://").split(":")
    for first in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            if first:
                connection.sendall(first)
                answer = connection.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200")
                while b"}" not in answer:
                    answer += connection.recv(1000)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHo")
            started_s = time.monotonic()
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1000) == b""
            assert time.monotonic() - started_s < 5


# --- a token, the file ------------------------------------------------------------------------------------------------

ECHO = "  echo: {kind: python, device: cpu, function: 'serve_functions:echo'}\n"


def test_a_token(tmp_path: Path) -> None:
    port = free_port()
    config = f"token: {TOKEN}\npipelines:\n{ECHO}"
    with Server(config, tmp_path, "--grpc-port", str(port)) as server:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ""}, {"Authorization": b"\xff\xfe"}):
            for path in ("/v1/echo", "/v2/models/echo/infer", "/v2/repository/models/echo/load"):
                response = httpx.post(server.url + path, content=b"x", headers=given)  # type: ignore[arg-type]
                assert response.status_code == 401
                assert TOKEN not in response.text
            assert httpx.get(server.url + "/metrics", headers=given).status_code == 401  # type: ignore[arg-type]
        assert server.status("/healthz") == server.status("/v2/health/ready") == server.status("/") == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert server.ask("echo", b"four", headers=right).json()["bytes"] == 4
        with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
            given = [tensor(grpcclient, "IMAGE", images_of(b"four"), "BYTES")]
            with pytest.raises(Exception, match="UNAUTHENTICATED"):
                client.infer("echo", given)
            answer = client.infer("echo", given, headers={"authorization": f"Bearer {TOKEN}"})
            assert json.loads(answer.as_numpy("RESULT")[0])["bytes"] == 4
        assert not any(TOKEN in json.dumps(line) for line in server.log)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[", "is not read"),
        ("pipelines: {}", "expected a name and a kind"),
        ("5", "expected names and values"),
        ("pipelines: {a: {}}", "kind is None"),
        ("pipelines: {a: {kind: magic}}", "expected one of"),
        ("pipelines: {'a b': {kind: engine}}", "expected a name of letters"),
        ("pipelines: {a: {kind: engine}}", "lacks"),
        ("pipelines: {a: {kind: engine, model: 5}}", "model is 5"),
        ("pipelines: {a: {kind: engine, model: none.onnx}}", "none.onnx"),
        ("pipelines: {a: {kind: engine, model: none.onnx, precision: fp4}}", "precision is 'fp4'"),
        ("pipelines: {a: {kind: recognizer, nearest: -1}}", "nearest is -1"),
        ("pipelines: {a: {kind: recognizer, wings: 2}}", "wings"),
        ("pipelines: {a: {kind: python, function: nowhere}}", "expected 'module:name'"),
        (f"pipelines:\n{ECHO}concurrency: many", "concurrency is 'many'"),
        (f"pipelines:\n{ECHO}concurrency: 2.5", "concurrency is 2.5"),
        (f"pipelines:\n{ECHO}drain_s: .inf", "drain_s is inf"),
        (f"pipelines:\n{ECHO}token: ''", "token is empty"),
        (f"pipelines:\n{ECHO}colour: blue", "colour"),
    ],
)
def test_files_that_are_none(config: str, says: str, tmp_path: Path) -> None:
    """Whoever starts the service is told at once, in a line and not in a traceback."""
    from nbvision.errors import InputError
    from nbvision.serve.service import Service

    (tmp_path / "serve.yaml").write_text(config)
    with pytest.raises(InputError, match=r"(?s)" + says):
        Service(tmp_path / "serve.yaml")


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nbvision.cli import main

    (tmp_path / "serve.yaml").write_text(f"pipelines:\n{ECHO}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(tmp_path / "serve.yaml"), "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot be had" in capsys.readouterr().err
