"""What an ONNX file says about itself, read without the ``onnx`` package and without loading its weights.

Only the few protobuf fields needed here are looked at; everything else is skipped by its length.  Field
numbers are those of ``onnx.proto3``, which never change.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbvision.errors import EngineError

__all__ = ["OnnxFile", "read_onnx"]

_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_NAME, _NODE_OPERATOR = 3, 4
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OnnxFile:
    """A readable ONNX file.

    Attributes
    ----------
    path : Path
    digest : str
        SHA-256, in hexadecimal, of the file and of the external files that hold its weights, if there are
        any.
    metadata : dict of str to str
        The model's ``metadata_props``.
    """

    path: Path
    digest: str
    metadata: dict[str, str]

    def node(self, index: int) -> str:
        """Name and operator of the graph's node number ``index``, for messages."""
        graph = _one(memoryview(self.path.read_bytes()), _MODEL_GRAPH)
        nodes = _all(graph, _GRAPH_NODE)
        for position, node in enumerate(nodes):
            if position == index:
                name, operator = _text(node, _NODE_NAME), _text(node, _NODE_OPERATOR)
                return f"node {index} {name!r} (operator {operator})"
        return "the graph"


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read and check an ONNX file.

    Raises
    ------
    EngineError
        If there is no such file, or it is empty, cut off or not ONNX, or a file with its weights is missing.
    """
    try:
        path = Path(path)
    except TypeError:
        raise EngineError(f"the model is a {type(path).__name__}; expected the path of an ONNX file") from None
    content = _read(path, "model")
    if not content:
        raise EngineError(f"{path} is empty; expected an ONNX model")
    try:
        model = memoryview(content)
        graph = _one(model, _MODEL_GRAPH)
        metadata = {_text(entry, _ENTRY_KEY): _text(entry, _ENTRY_VALUE) for entry in _all(model, _MODEL_METADATA)}
        weight_files = sorted(_external_files(graph))
    except ValueError as error:
        raise EngineError(f"{path} is not an ONNX model, or is cut off ({error})") from error
    digest = hashlib.sha256(content)
    for name in weight_files:
        digest.update(_read(path.parent / name, f"weight file of {path.name}"))
    return OnnxFile(path, digest.hexdigest(), metadata)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read the {what} {path}: {error.strerror or error}") from error


def _external_files(graph: memoryview) -> set[str]:
    return {
        _text(entry, _ENTRY_VALUE)
        for tensor in _all(graph, _GRAPH_INITIALIZER)
        for entry in _all(tensor, _TENSOR_EXTERNAL_DATA)
        if _text(entry, _ENTRY_KEY) == "location"
    }


def _one(message: memoryview, number: int) -> memoryview:
    for value in _all(message, number):
        return value
    raise ValueError("it holds no graph")


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    """The values of a field made of bytes (a string or a nested message)."""
    for found, value in _fields(message):
        if found == number:
            yield value


def _text(message: memoryview, number: int) -> str:
    return "".join(str(value, "utf-8", "replace") for value in _all(message, number))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field of a protobuf message; others are stepped over."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind, size = key & 7, 0
        if kind == _VARINT:
            _, position = _varint(message, position)
        elif kind == _BYTES:
            size, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"byte {position} belongs to no protobuf message")
        if position + size > len(message):
            raise ValueError(f"{position + size - len(message)} bytes are missing at its end")
        if kind == _BYTES:
            yield key >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of variable length, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it ends within a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"byte {position} belongs to no protobuf message")
