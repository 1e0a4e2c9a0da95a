"""What can be served: a function on a list of items, and how items and results are tensors."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nbvision_kernels.codes import HEIGHT, WIDTH, X, Y

from nbvision.codecs import Decoder, encode
from nbvision.codecs.open import OpenImage
from nbvision.engines import Engine
from nbvision.errors import InputError
from nbvision.image import to_device
from nbvision.ops.crop import crop
from nbvision.ops.rle import mask_to_rle
from nbvision.recognizer import Recognition, Recognizer, StageTimes
from nbvision.runtime.device import Device, resolve_device
from nbvision.search import Index
from nbvision.serve.protocol import DATATYPES, datatype_of
from nbvision.serve.status import PipelineError

__all__ = [
    "PIPELINES",
    "EnginePipeline",
    "Pipeline",
    "PythonPipeline",
    "RecognizerPipeline",
    "texts",
]

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TensorInfo:
    """One input or output, in the protocol's words; -1 is a length of any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Pipeline(ABC):
    """A function on a list of items, and how items and results are tensors.

    Attributes
    ----------
    inputs, outputs : tuple of TensorInfo
    device : {"cpu", "cuda"}
    digest : str
        Of what answers depend on beside the options: models, an index, code.
    takes_images : bool
        Whether an item is the bytes of one compressed image.
    decodes_ahead : bool
        Whether :meth:`open` begins with what would take longest in a batch.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    device: Device
    digest: str
    takes_images = True
    decodes_ahead = False

    def open(self, item: Any) -> Any:
        """The item as it shall wait for its batch; what can be done to it by itself may begin.

        Returns at once. What comes back is for :meth:`run` alone.
        """
        return item

    @abstractmethod
    def run(self, items: list[Any]) -> list[Any]:
        """A result for each item, opened or not, or the exception that is its own."""

    @abstractmethod
    def probe(self) -> Any:
        """An item to see with whether it works."""

    def warm_up(self, items: list[Any]) -> list[Any]:
        """What :meth:`run` gives, once all has been run that items may need."""
        return self.run(items)

    def close(self) -> None:
        """Let go of models and their memory, whoever still holds the pipeline: an error's traceback, perhaps."""
        for name in [name for name in vars(self) if name.startswith("_")]:
            delattr(self, name)

    def items_of(self, tensors: Tensors) -> list[Any]:
        """The items of a request's inputs.

        Raises
        ------
        InputError
            For names, types or shapes that do not fit.
        """
        array = self._only_input(tensors)
        if array.dtype != object or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
            raise InputError(
                f"input {self.inputs[0].name!r} is {datatype_of(array)} {list(array.shape)}; expected BYTES [N] or "
                "[N, 1], a compressed image each"
            )
        return list(array.reshape(-1))

    @abstractmethod
    def tensors_of(self, results: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        """The outputs of a request whose items gave these results; exceptions among them count as nothing found."""

    def _only_input(self, tensors: Tensors) -> npt.NDArray[Any]:
        expected = [info.name for info in self.inputs]
        if sorted(tensors) != sorted(expected):
            raise InputError(f"inputs are {sorted(tensors)}; expected {expected}")
        return tensors[expected[0]]


# --- recognizer -------------------------------------------------------------------------------------------------------


class RecognizerPipeline(Pipeline):
    """Compressed images to the objects in them: boxes, masks, embeddings, and the nearest goods of an index.

    Parameters
    ----------
    models : path, optional
        Directory of ``detector.onnx``, ``masker.onnx``, ``embedder.onnx``; default: the demo's.
    index : path, optional
        What ``nbvision index`` wrote with the same models.
    nearest : int
        Goods of the index for each object.
    crops : bool
        Whether results have each object as a JPEG.
    device : {"cpu", "cuda"}, optional
    precision : {"fp32", "fp16"}
    cuda_graphs : bool
    stage_times : bool
        Whether results say how long the stages of their batch took. Each stage then waits for the device.
    limit_pixels : int
        Images of more are refused before memory is allocated for them.
    decode_processes : int
        Processes that decode what no GPU decodes, from when a request has come; see :class:`nbvision.Decoder`.
    """

    def __init__(
        self,
        *,
        models: str | None = None,
        index: str | None = None,
        nearest: int = 5,
        crops: bool = False,
        device: Device | None = None,
        precision: Literal["fp32", "fp16"] = "fp32",
        cuda_graphs: bool = False,
        stage_times: bool = False,
        limit_pixels: int = 50_000_000,
        decode_processes: int = 0,
    ) -> None:
        if models is None:
            from nbvision.demo.run import models_directory

            models = str(models_directory())
        self.device = resolve_device(device)
        self._decoder = Decoder(device=self.device, limit_pixels=limit_pixels, processes=decode_processes)
        self.decodes_ahead = decode_processes > 0
        self._recognizer = Recognizer.load(models, device=self.device, precision=precision, cuda_graphs=cuda_graphs)
        self._decoder.warm_up()  # the processes have started meanwhile
        self.digest = self._recognizer.digest
        self._index = None
        if index is not None:
            self._index = Index.load(index, model=self.digest)
            self.digest = _with_files(self.digest, index)
        self._nearest, self._crops = nearest, crops
        self._stage_times = stage_times
        dimension = self._recognizer.dimension
        self.inputs = (TensorInfo("IMAGE", "BYTES", (-1,)),)
        self.outputs = (
            TensorInfo("IMAGES", "INT64", (-1,)),
            TensorInfo("BOXES", "FP32", (-1, 4)),
            TensorInfo("SCORES", "FP32", (-1,)),
            TensorInfo("LABELS", "BYTES", (-1,)),
            TensorInfo("MASKS", "BYTES", (-1,)),
            TensorInfo("VECTORS", "FP32", (-1, dimension)),
        )

    def open(self, item: bytes) -> OpenImage:
        return self._decoder.open(item)

    def run(self, items: list[Any]) -> list[Any]:
        times = StageTimes() if self._stage_times else None
        stage = (lambda name, count: times.stage(name, self.device, items=count)) if times else _not_timed
        with stage("decode", len(items)):
            images = self._decoder(items)
        found = self._recognizer.recognize(images, times=times)
        rle = mask_to_rle(found.masks)
        goods = None
        if self._index is not None and len(found):
            with stage("search", len(found)):
                goods = self._index.search(found.vectors, k=self._nearest)
        results: list[Any] = []
        for image, error in enumerate(found.errors):
            if error is not None:
                results.append(error)
                continue
            objects = []
            for index in found.of_image(image).tolist():
                box = [float(value) for value in found.boxes[index]]
                described = {
                    "box": box,
                    "score": float(found.scores[index]),
                    "label": self._recognizer.classes[found.labels[index]],
                    # On the canvas of the crop, which covers crop_box of the picture.
                    "mask": {"size": rle[index]["size"], "counts": rle[index]["counts"].decode()},
                    "crop_box": self._crop_box(found, index),
                    "vector": [float(value) for value in found.vectors[index]],
                }
                if goods is not None:
                    pairs = zip(goods.ids[index], goods.scores[index].tolist(), strict=True)
                    described["nearest"] = [{"id": good, "score": score} for good, score in pairs]
                objects.append(described)
            height, width = images.sizes[image].tolist()
            results.append({"height": height, "width": width, "objects": objects})
        if self._crops:
            with stage("crops", len(found)):
                self._add_crops(images, results)
        if times:
            times_ms = {name: round(seconds * 1e3, 3) for name, seconds in times.seconds.items()}
            for result in results:
                if isinstance(result, dict):
                    result["batch"] = {"images": len(items), "times_ms": times_ms}
        return results

    def warm_up(self, items: list[bytes]) -> list[Any]:
        """With objects, whatever is in the pictures, or what is done to objects would first be done for a client."""
        threshold, self._recognizer.score_threshold = self._recognizer.score_threshold, 0.0
        try:
            return self.run(items)
        finally:
            self._recognizer.score_threshold = threshold

    def _crop_box(self, found: Recognition, index: int) -> list[int]:
        row = found.crop_geometry.regions[index]
        return [int(row[X]), int(row[Y]), int(row[X] + row[WIDTH]), int(row[Y] + row[HEIGHT])]

    def _add_crops(self, images: Any, results: Sequence[Any]) -> None:
        objects = _objects_of(results)
        if objects:
            boxes = np.array([one["crop_box"] for _, one in objects], np.float32)
            pieces = crop(images, boxes, box_images=np.array([image for image, _ in objects]))
            for (_, one), data in zip(objects, encode(pieces, "jpeg", quality=85), strict=True):
                one["crop"] = base64.b64encode(data or b"").decode()

    def probe(self) -> bytes:
        data: bytes = encode(np.full((32, 32, 3), 127, np.uint8), "jpeg")
        return data

    def tensors_of(self, results: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        objects = _objects_of(results)
        dimension = self.outputs[-1].shape[1]

        def column(name: str, dtype: Any, *beyond: int) -> npt.NDArray[Any]:
            return np.array([one[name] for _, one in objects], dtype).reshape(-1, *beyond)

        return {
            "IMAGES": np.array([image for image, _ in objects], np.int64),
            "BOXES": column("box", np.float32, 4),
            "SCORES": column("score", np.float32),
            "LABELS": texts([one["label"] for _, one in objects]),
            "MASKS": texts([json.dumps(one["mask"] | {"box": one["crop_box"]}) for _, one in objects]),
            "VECTORS": column("vector", np.float32, dimension),
        }


def _with_files(digest: str, directory: str) -> str:
    """A digest that changes with the files of a directory, as far as their names, sizes and times tell."""
    found = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in Path(directory).iterdir())
    return hashlib.sha256(f"{digest}{found}".encode()).hexdigest()


def _not_timed(name: str, count: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _objects_of(results: Sequence[Any]) -> list[tuple[int, dict[str, Any]]]:
    """All objects, each with the number of its image."""
    return [
        (image, one) for image, result in enumerate(results) if isinstance(result, dict) for one in result["objects"]
    ]


def texts(values: Sequence[str]) -> npt.NDArray[Any]:
    """A tensor of BYTES."""
    array = np.empty(len(values), object)
    array[:] = [value.encode() for value in values]
    return array


# --- a model's tensors ------------------------------------------------------------------------------------------------


class EnginePipeline(Pipeline):
    """A model as it is: an item is a row of each input, a result a row of each output.

    Parameters
    ----------
    model : path
        An ONNX file whose inputs and outputs all have a batch, and known sizes beyond it.
    device : {"cpu", "cuda"}, optional
    precision : {"fp32", "fp16"}
    cuda_graphs : bool
    max_batch : int
        Rows of a call, at most.
    """

    takes_images = False

    def __init__(
        self,
        *,
        model: str,
        device: Device | None = None,
        precision: Literal["fp32", "fp16"] = "fp32",
        cuda_graphs: bool = False,
        max_batch: int = 16,
    ) -> None:
        batch = (1, max(1, max_batch // 2), max_batch)
        self._engine = Engine(model, device=device, precision=precision, cuda_graphs=cuda_graphs, batch=batch)
        self.device, self.digest = self._engine.device, self._engine.digest
        for spec in (*self._engine.inputs, *self._engine.outputs):
            if not spec.batched or not spec.fixed_beyond_batch:
                raise InputError(f"{model} has {spec}; expected a batch of any size, and known sizes beyond it")
        self.inputs, self.outputs = (
            tuple(TensorInfo(spec.name, datatype_of(np.empty(0, spec.dtype)), spec.shape) for spec in specs)
            for specs in (self._engine.inputs, self._engine.outputs)
        )

    def items_of(self, tensors: Tensors) -> list[Any]:
        if sorted(tensors) != sorted(info.name for info in self.inputs):
            raise InputError(f"inputs are {sorted(tensors)}; expected {sorted(info.name for info in self.inputs)}")
        counts = set()
        for info in self.inputs:
            array = tensors[info.name]
            if (
                datatype_of(array) != info.datatype
                or array.shape[1:] != info.shape[1:]
                or array.ndim != len(info.shape)
            ):
                raise InputError(
                    f"input {info.name!r} is {datatype_of(array)} {list(array.shape)}; expected {info.datatype} "
                    f"{list(info.shape)}"
                )
            counts.add(len(array))
        if len(counts) > 1:
            raise InputError(f"inputs have batches of {sorted(counts)}; expected one size")
        return [{info.name: tensors[info.name][row] for info in self.inputs} for row in range(counts.pop())]

    def run(self, items: list[Any]) -> list[Any]:
        given = {info.name: np.stack([item[info.name] for item in items]) for info in self.inputs}
        made = self._engine.run({name: to_device(array, self.device) for name, array in given.items()})
        outputs = {name: to_device(array, "cpu") for name, array in made.items()}
        return [{name: array[row] for name, array in outputs.items()} for row in range(len(items))]

    def probe(self) -> Any:
        return {info.name: np.zeros(info.shape[1:], DATATYPES[info.datatype]) for info in self.inputs}

    def tensors_of(self, results: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        blank = {info.name: np.zeros(info.shape[1:], DATATYPES[info.datatype]) for info in self.outputs}
        rows = [result if isinstance(result, dict) else blank for result in results]
        return {
            info.name: np.stack([row[info.name] for row in rows])
            if rows
            else np.zeros((0, *info.shape[1:]), DATATYPES[info.datatype])
            for info in self.outputs
        }


# --- anybody's function -----------------------------------------------------------------------------------------------


class PythonPipeline(Pipeline):
    """A function of a list of compressed images that gives a JSON value, or an exception, for each.

    Parameters
    ----------
    function : str
        ``"module:name"``; the module may lie beside the service's file. If it is a class it is made with each load,
        without arguments, and called. Its attribute ``version``, a text, says which loads answer the same; without one
        none does. With each load it is called with a gray picture first, once in each thread.
    device : {"cpu", "cuda"}, optional
        Where it works: on ``"cuda"`` it is called with a stream of its own as CuPy's current one.
    """

    def __init__(self, *, function: str, device: Device | None = None) -> None:
        module, _, name = function.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except ImportError as error:
            if error.name is None or error.name != module.partition(".")[0]:
                raise  # it is there, and lacks something itself
            raise InputError(f"function {function!r} is not found ({error}); expected 'module:name'") from error
        except (AttributeError, ValueError) as error:
            raise InputError(f"function {function!r} is not found ({error}); expected 'module:name'") from error
        if not callable(found):
            raise InputError(f"function {function!r} is a {type(found).__name__}; expected one, or a class of them")
        self._name = function
        self._function: Callable[[list[bytes]], Sequence[Any]] = found() if isinstance(found, type) else found
        self.device = resolve_device(device)
        self.digest = hashlib.sha256(str(getattr(self._function, "version", uuid.uuid4())).encode()).hexdigest()
        self.inputs = (TensorInfo("IMAGE", "BYTES", (-1,)),)
        self.outputs = (TensorInfo("RESULT", "BYTES", (-1,)),)

    def run(self, items: list[bytes]) -> list[Any]:
        results = self._function(items)
        if not isinstance(results, (list, tuple)):
            raise PipelineError(f"{self._name} gives a {type(results).__name__}; expected a list of results")
        return [self._checked(result) for result in results]

    def _checked(self, result: Any) -> Any:
        """A result of JSON's own types, or the error that it is none."""
        if not isinstance(result, Exception):
            try:
                return json.loads(json.dumps(result, allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                return PipelineError(f"{self._name} gives a result that is no JSON: {error}")
        return result

    def probe(self) -> Any:
        return encode(np.full((32, 32, 3), 127, np.uint8), "jpeg")

    def tensors_of(self, results: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        return {"RESULT": texts(["{}" if isinstance(result, Exception) else json.dumps(result) for result in results])}


PIPELINES: dict[str, type[Pipeline]] = {
    "recognizer": RecognizerPipeline,
    "engine": EnginePipeline,
    "python": PythonPipeline,
}
