"""The Open Inference Protocol, version 2: tensors in JSON, and in the binary extension behind it.

Knows nothing of HTTP, models or threads: bytes and numbers in, bytes and numbers out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.errors import InputError

__all__ = [
    "DATATYPES",
    "InferRequest",
    "bytes_to_tensor",
    "datatype_of",
    "read_request",
    "tensor_to_bytes",
    "write_response",
]

# The protocol's names and NumPy's dtypes; BYTES are Python's bytes, in arrays of objects.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_MOST_DIMENSIONS = 8

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class InferRequest:
    """What a client asks for.

    Attributes
    ----------
    id : str
        Given back with the answer.
    inputs : dict of str to array
    outputs : dict of str to bool, or None
        Names of the outputs that are wanted, and whether each shall be binary; None for all of them.
    binary_outputs : bool
        Whether outputs shall be binary where ``outputs`` does not say.
    parameters : dict
        Such as ``priority`` and ``timeout``, in microseconds.
    """

    inputs: dict[str, npt.NDArray[Any]]
    id: str = ""
    outputs: dict[str, bool] | None = None
    binary_outputs: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)

    def integer(self, name: str) -> int | None:
        """A parameter that is an integer, if it is there.

        Raises
        ------
        InputError
            If it is something else.
        """
        value = self.parameters.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise InputError(f"parameter {name!r} is {value!r}; expected an integer")
        return value


def read_request(body: bytes, header_length: int | None = None) -> InferRequest:
    """Parse the body of an inference request.

    Parameters
    ----------
    body : bytes
    header_length : int, optional
        Of the JSON at its beginning, behind which binary tensors follow; default: all of it is JSON.

    Raises
    ------
    InputError
        For whatever does not follow the protocol; nothing of the body is trusted.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise InputError(f"the JSON is said to have {header_length} bytes; the body has {len(body)}")
    try:
        header = json.loads(body if header_length is None else body[:header_length])
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON: {error}") from None
    rest = memoryview(b"" if header_length is None else body)[header_length or 0 :]
    header = _object(header, "the body")
    inputs: dict[str, npt.NDArray[Any]] = {}
    for described in _objects(header.get("inputs"), "inputs"):
        name = _text(described.get("name"), "the name of an input")
        if name in inputs:
            raise InputError(f"input {name!r} is given twice")
        inputs[name], rest = _read_tensor(name, described, rest)
    if len(rest):
        raise InputError(f"{len(rest)} bytes are left behind the last binary tensor; expected none")
    parameters = _object(header.get("parameters", {}), "parameters")
    binary = parameters.get("binary_data_output", False) is True
    outputs: dict[str, bool] | None = None
    if header.get("outputs"):
        outputs = {}
        for described in _objects(header["outputs"], "outputs"):
            how = _object(described.get("parameters", {}), "parameters of an output")
            outputs[_text(described.get("name"), "the name of an output")] = bool(how.get("binary_data", binary))
    return InferRequest(inputs, _text(header.get("id", ""), "id"), outputs, binary, parameters)


def write_response(tensors: Tensors, *, model: str, version: str, request: InferRequest) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON if binary tensors follow.

    Raises
    ------
    InputError
        If the request names an output that is none.
    """
    wanted = request.outputs or dict.fromkeys(tensors, request.binary_outputs)
    unknown = sorted(set(wanted) - set(tensors))
    if unknown:
        raise InputError(f"outputs {unknown} are asked for; expected some of {sorted(tensors)}")
    described: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, is_binary in wanted.items():
        array = tensors[name]
        datatype = datatype_of(array)
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if is_binary or datatype == "FP16":  # which JSON does not have
            binary.append(tensor_to_bytes(array))
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        elif datatype == "BYTES":
            output["data"] = [item.decode("utf-8", "surrogateescape") for item in array.reshape(-1)]
        else:
            output["data"] = array.reshape(-1).tolist()
        described.append(output)
    header: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id:
        header["id"] = request.id
    text = json.dumps(header).encode()
    return (b"".join([text, *binary]), len(text)) if binary else (text, None)


def datatype_of(array: npt.NDArray[Any]) -> str:
    """The protocol's name for an array's dtype.

    Raises
    ------
    InputError
        If it has none.
    """
    for name, dtype in DATATYPES.items():
        if array.dtype == dtype:
            return name
    raise InputError(f"the protocol has no type for {array.dtype}; expected one of {list(DATATYPES)}")


def tensor_to_bytes(array: npt.NDArray[Any]) -> bytes:
    """A tensor as the binary extension has it: little-endian, row by row; BYTES with their lengths before them."""
    if array.dtype != object:
        return np.ascontiguousarray(array, DATATYPES[datatype_of(array)]).tobytes()
    return b"".join(part for item in array.reshape(-1) for part in (len(item).to_bytes(4, "little"), item))


def bytes_to_tensor(data: bytes | memoryview, datatype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    """The tensor of such bytes; numbers share their memory.

    Raises
    ------
    InputError
        If there are more or fewer of them than the shape wants.
    """
    dtype, count = DATATYPES[datatype], math.prod(shape)
    if datatype != "BYTES":
        if len(data) != count * dtype.itemsize:
            raise InputError(
                f"{len(data)} bytes of {datatype} {list(shape)}; expected {count * dtype.itemsize} for {count} values"
            )
        return np.frombuffer(data, dtype).reshape(shape)
    items: list[bytes] = []
    position = 0
    while position < len(data) and len(items) < count:
        start = position + 4
        position = start + int.from_bytes(data[position:start], "little")
        if position > len(data):
            raise InputError(f"item {len(items)} of BYTES ends {position - len(data)} bytes behind the tensor")
        items.append(bytes(data[start:position]))
    if len(items) != count or position != len(data):
        raise InputError(f"BYTES {list(shape)} hold {len(items)} items in {position} of {len(data)} bytes")
    return _objects_array(items, shape)


def _objects_array(items: Sequence[bytes], shape: Sequence[int]) -> npt.NDArray[Any]:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def _read_tensor(name: str, described: Mapping[str, Any], rest: memoryview) -> tuple[npt.NDArray[Any], memoryview]:
    """An input, and the binary tensors behind its own."""
    datatype = described.get("datatype")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise InputError(f"input {name!r} has datatype {datatype!r}; expected one of {list(DATATYPES)}")
    shape = _shape(described.get("shape"), name)
    parameters = _object(described.get("parameters", {}), f"parameters of input {name!r}")
    size = parameters.get("binary_data_size")
    try:
        if size is None:
            return _from_json(described.get("data"), datatype, shape), rest
        if type(size) is not int or not 0 <= size <= len(rest):
            raise InputError(f"binary_data_size is {size!r}; {len(rest)} bytes are left")
        return bytes_to_tensor(rest[:size], datatype, shape), rest[size:]
    except InputError as error:
        raise InputError(f"input {name!r}: {error}") from None


def _shape(value: Any, name: str) -> list[int]:
    shape: list[int] = value if isinstance(value, list) else [-1]
    fits = len(shape) <= _MOST_DIMENSIONS and all(type(length) is int and 0 <= length < 2**31 for length in shape)
    if not fits or math.prod(shape) >= 2**31:
        raise InputError(f"input {name!r} has shape {value!r}; expected up to {_MOST_DIMENSIONS} lengths of 0 or more")
    return shape


def _from_json(data: Any, datatype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    if not isinstance(data, list):
        raise InputError(f"data is a {type(data).__name__}; expected a list, or binary_data_size")
    if datatype == "FP16":
        raise InputError("FP16 has no form in JSON; send it binary")
    values = _flattened(data)
    count = math.prod(shape)
    if len(values) != count:
        raise InputError(f"{len(values)} values for shape {list(shape)}; expected {count}")
    if datatype == "BYTES":
        if not set(map(type, values)) <= {str}:
            raise InputError("a value of BYTES is no string")
        return _objects_array([value.encode("utf-8", "surrogatepass") for value in values], shape)
    dtype = DATATYPES[datatype]
    kinds: tuple[type, ...] = {"b": (bool,), "f": (int, float)}.get(dtype.kind, (int,))
    if not set(map(type, values)) <= set(kinds):
        raise InputError(f"a value of {datatype} is of another kind")
    try:
        return np.array(values, dtype).reshape(shape)
    except OverflowError as error:
        raise InputError(f"a value of {datatype} is out of range: {error}") from None


def _flattened(data: list[Any]) -> list[Any]:
    """The values of a list, or of lists of lists, in their order; a level at a time, for there may be millions."""
    for _ in range(_MOST_DIMENSIONS):
        kinds = set(map(type, data))
        if list not in kinds:
            return data
        if len(kinds) > 1:
            raise InputError("data has lists and values side by side; expected all values at one depth")
        data = list(itertools.chain.from_iterable(data))
    raise InputError(f"data is nested more than {_MOST_DIMENSIONS} deep")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is a {type(value).__name__}; expected an object")
    return value


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{what} is {str(value)[:80]}; expected a list of objects")
    return [_object(item, f"an item of {what}") for item in value]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is {value!r}; expected a string")
    return value
