"""The Open Inference Protocol: against tritonclient's own bytes, there and back, and whatever else comes in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nbvision.errors import InputError
from nbvision.serve import protocol
from nbvision.serve.protocol import DATATYPES, InferRequest, read_request, write_response

NUMERIC = [name for name in DATATYPES if name != "BYTES"]
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
texts = st.binary(max_size=20)


@st.composite
def tensors(draw: Any, *, json_only: bool = False) -> Any:
    datatype = draw(st.sampled_from([name for name in DATATYPES if not (json_only and name == "FP16")]))
    shape = draw(shapes)
    if datatype == "BYTES":
        kind = st.text(max_size=10).map(lambda text: text.encode("utf-8", "surrogatepass")) if json_only else texts
        array = np.empty(shape, object)
        for index in np.ndindex(*shape):
            array[index] = draw(kind)
        return array
    options = {"allow_nan": False, "allow_infinity": False} if json_only and datatype.startswith("FP") else {}
    elements = hnp.from_dtype(DATATYPES[datatype], **options)
    return draw(hnp.arrays(DATATYPES[datatype], shape, elements=elements))


def same(got: Any, wanted: Any) -> bool:
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False
    return list(got.flat) == list(wanted.flat) if wanted.dtype == object else got.tobytes() == wanted.tobytes()


@given(st.dictionaries(st.text(max_size=5), tensors(), min_size=1, max_size=4))
def test_binary_there_and_back(given: dict[str, Any]) -> None:
    """An answer has the form of a request, so that one can be read as the other."""
    body, length = write_response(given, model="m", version="1", request=InferRequest({}, binary_outputs=True))
    assert length is not None
    header = json.loads(body[:length])
    header["inputs"] = header.pop("outputs")
    text = json.dumps(header).encode()
    read = read_request(text + body[length:], len(text))
    assert list(read.inputs) == list(given)
    assert all(same(read.inputs[name], array) for name, array in given.items())


@given(st.dictionaries(st.text(max_size=5), tensors(json_only=True), min_size=1, max_size=4), st.text(max_size=5))
def test_json_there_and_back(given: dict[str, Any], id: str) -> None:
    body, length = write_response(given, model="m", version="1", request=InferRequest({}, id=id))
    assert length is None
    header = json.loads(body)
    assert header.get("id", "") == id
    header["inputs"] = header.pop("outputs")
    read = read_request(json.dumps(header).encode())
    for name, array in given.items():
        if array.dtype == object:
            wanted = [item.decode("utf-8", "surrogateescape").encode("utf-8", "surrogatepass") for item in array.flat]
            assert list(read.inputs[name].flat) == wanted
        else:
            np.testing.assert_array_equal(read.inputs[name], array)


@pytest.mark.parametrize("binary", [False, True])
def test_what_tritonclient_sends_is_read(binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http")
    rng = np.random.default_rng(0)
    given = {
        "pictures": np.array([b"\xff\xd8 a", b"", b"\x00\x01"] if binary else [b"a", b"", b"b"], object).reshape(3, 1),
        "numbers": rng.standard_normal((2, 3)).astype(np.float32),
        "flags": np.array([True, False]),
        "small": rng.integers(-5, 5, (4,), np.int8),
    }
    if binary:
        given["halves"] = rng.standard_normal((2, 2)).astype(np.float16)
    inputs = []
    for name, array in given.items():
        wanted = http.InferInput(name, array.shape, protocol.datatype_of(array))
        wanted.set_data_from_numpy(array, binary_data=binary)
        inputs.append(wanted)
    outputs = [http.InferRequestedOutput("y", binary_data=binary), http.InferRequestedOutput("z", binary_data=False)]
    body, length = http.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, request_id="seven", priority=3, timeout=40_000
    )
    read = read_request(bytes(body), length)
    assert all(same(read.inputs[name], array) for name, array in given.items())
    assert (read.id, read.outputs) == ("seven", {"y": binary, "z": False})
    assert (read.integer("priority"), read.integer("timeout"), read.integer("nothing")) == (3, 40_000, None)


@pytest.mark.parametrize("binary", [False, True])
def test_tritonclient_reads_what_is_written(binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http")
    rng = np.random.default_rng(1)
    given = {
        "vectors": rng.standard_normal((3, 5)).astype(np.float32),
        "labels": np.array([b"shirt", b"h\xc3\xa4t"], object),
        "halves": rng.standard_normal(4).astype(np.float16),
        "none": np.zeros((0, 4), np.int64),
    }
    request = InferRequest({}, outputs=dict.fromkeys(given, binary), id="x")
    body, length = write_response(given, model="m", version="2", request=request)
    result = http.InferenceServerClient.parse_response_body(body, header_length=length)
    assert result.get_response()["model_version"] == "2"
    for name, array in given.items():
        got = result.as_numpy(name)
        if array.dtype == object and not binary:
            got = np.array([item.encode() if isinstance(item, str) else item for item in got], object)
        np.testing.assert_array_equal(got, array)


INPUT = {"name": "x", "shape": [2], "datatype": "INT32", "data": [1, 2]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": [3]}, "2 values for shape"),
        ({"shape": [-1]}, "lengths of 0 or more"),
        ({"shape": [2.0]}, "lengths of 0 or more"),
        ({"shape": [True, 2]}, "lengths of 0 or more"),
        ({"shape": [2**20, 2**20]}, "lengths of 0 or more"),
        ({"shape": [1] * 9}, "up to 8"),
        ({"datatype": "INT33"}, "has datatype 'INT33'"),
        ({"datatype": None}, "has datatype None"),
        ({"datatype": "FP16"}, "no form in JSON"),
        ({"datatype": "BYTES"}, "no string"),
        ({"datatype": "BOOL"}, "another kind"),
        ({"datatype": "UINT8", "data": [1, -1]}, "out of range"),
        ({"data": [1, 2**40]}, "out of range"),
        ({"data": [1, "2"]}, "another kind"),
        ({"data": [1, True]}, "another kind"),
        ({"data": "12"}, "expected a list"),
        ({"data": [[[[[[[[[[1, 2]]]]]]]]]]}, "nested more than"),
        ({"data": [[1], 2]}, "side by side"),
        ({"name": 7}, "expected a string"),
        ({"parameters": []}, "expected an object"),
        ({"parameters": {"binary_data_size": 8}}, "0 bytes are left"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size is -1"),
    ],
)
def test_inputs_that_are_none(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_request(json.dumps({"inputs": [INPUT | change]}).encode())


@pytest.mark.parametrize(
    ("body", "length", "said"),
    [
        (b"", None, "no JSON"),
        (b"[]", None, "expected an object"),
        (b"{}", None, "inputs is None"),
        (b'{"inputs": []}', None, "expected a list of objects"),
        (b'{"inputs": [7]}', None, "expected an object"),
        (b'{"inputs": [' + json.dumps(INPUT).encode() + b"," + json.dumps(INPUT).encode() + b"]}", None, "twice"),
        (b"[" * 100_000, None, "no JSON"),
        (b"{}", 3, "the body has 2"),
        (b"{}", -1, "the body has 2"),
        (json.dumps({"inputs": [INPUT]}).encode() + b"xyz", len(json.dumps({"inputs": [INPUT]})), "3 bytes are left"),
    ],
)
def test_bodies_that_are_none(body: bytes, length: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_request(body, length)


def test_lengths_of_bytes_that_lie() -> None:
    for data in (b"\x05\0\0\0abc", b"\xff\xff\xff\xff", b"\x01\0\0", b"\x01\0\0\0a\x01\0\0\0b", b""):
        with pytest.raises(InputError, match="BYTES"):
            protocol.bytes_to_tensor(data, "BYTES", [1])


@settings(max_examples=300)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 250)))
def test_any_bytes_are_read_or_refused(body: bytes, length: int | None) -> None:
    with pytest.raises(InputError):
        read_request(body, length)  # nothing so short has an input with a name, a shape and values by chance


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=10,
)


@settings(max_examples=300)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(INPUT | {"parameters": 0}, json_values)), json_values)
def test_any_json_is_read_or_refused(described: dict[str, Any], parameters: Any) -> None:
    try:
        read = read_request(json.dumps({"inputs": [INPUT | described], "parameters": parameters}).encode())
    except InputError:
        return
    (array,) = read.inputs.values()
    assert array.dtype in DATATYPES.values()


def test_outputs_that_are_none() -> None:
    with pytest.raises(InputError, match=r"\['z'\] are asked for; expected some of \['y'\]"):
        write_response({"y": np.zeros(2)}, model="m", version="1", request=InferRequest({}, outputs={"z": True}))
    with pytest.raises(InputError, match="no type for complex128"):
        write_response({"y": np.zeros(2, complex)}, model="m", version="1", request=InferRequest({}))
