"""The recognition pipeline: decode -> detect -> crop -> mask -> normalise -> embed.

Plain calls of the rooms below, in the order the data flows; copy :meth:`Recognizer.recognize` and change it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nbvision.codecs.decode import Source, as_items
from nbvision.codecs.decoder import Decoder
from nbvision.codecs.open import OpenImage
from nbvision.engines import Engine
from nbvision.errors import DecodeError, EngineError, InputError
from nbvision.image import ImageBatch, to_device
from nbvision.ops.boxes import nms
from nbvision.ops.geometry import Geometry
from nbvision.ops.masks import cut_out, mask_boxes
from nbvision.ops.preprocess import Preprocess
from nbvision.runtime import memory
from nbvision.runtime.device import Device, device_of, resolve_device, synchronize

__all__ = ["BATCHES", "Recognition", "Recognizer", "StageTimes", "in_batches", "load_engine"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_MARGIN = 0.1  # the mask head and the embedder were trained on boxes enlarged by this share
BACKGROUND = 0.5  # what the embedder sees where the mask is not
BATCHES = {"detector": (1, 32, 64), "masker": (1, 64, 256), "embedder": (1, 64, 256)}


@dataclass
class StageTimes:
    """Seconds spent in each stage, and the items that went through it.

    Times are of the host; each stage waits for its device, so that no stage is charged for another's work.  That
    costs overlap: measure throughput without it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, device: Device, *, items: int) -> Iterator[None]:
        """Charge what happens inside to ``name``."""
        started = time.perf_counter()
        yield
        synchronize(device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.items[name] = self.items.get(name, 0) + items

    def per_second(self) -> dict[str, float]:
        """Items a second, stage by stage."""
        return {name: self.items[name] / seconds for name, seconds in self.seconds.items() if seconds > 0}


@dataclass(frozen=True)
class Recognition:
    """What was found in a batch of N images: M objects, in order of image, then score. All on the host.

    Attributes
    ----------
    errors : tuple of (DecodeError or None), one per image
    images : (M,) int64
        The image of each object.
    boxes : (M, 4) float32
        x1, y1, x2, y2 of the detector, in source pixels.
    mask_boxes : (M, 4) float32
        The extent of the mask, in source pixels; zeros for an empty mask.
    masks : (M, h, w) bool
        On the canvas of the crop; ``crop_geometry`` says where that is in the source.
    crop_geometry : Geometry
    scores : (M,) float32
    labels : (M,) int32
        Index into the recognizer's ``classes``.
    vectors : (M, D) float32
        Embeddings of length 1.
    """

    errors: tuple[DecodeError | None, ...]
    images: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    mask_boxes: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_]
    crop_geometry: Geometry
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    vectors: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)

    def of_image(self, image: int) -> npt.NDArray[np.int64]:
        """Indices of the objects found in one image, best first."""
        return np.flatnonzero(self.images == image)


class Recognizer:
    """Finds objects in compressed images and turns each into a vector that can be searched for.

    Parameters
    ----------
    detector : Engine
        Input (N, 3, S, S) float32, RGB in 0..1, letterboxed; output a YOLO head, see :func:`nbvision.nms`. The
        class names are read from its metadata ``nbvision.classes``, a JSON list.
    masker : Engine
        Input (M, 3, s, s) float32, RGB in 0..1; output (M, 1, s, s) logits.
    embedder : Engine
        Input as the masker's, cut out and normalised with ImageNet's mean and deviation; output (M, D) float32.
    score_threshold, iou_threshold : float
    max_detections : int
        Objects of an image, at most.
    decode_processes : int
        Processes that decode what is the host's; see :class:`nbvision.Decoder`. For a service of single images.

    Raises
    ------
    EngineError
        If the models do not fit together.
    """

    def __init__(
        self,
        detector: Engine,
        masker: Engine,
        embedder: Engine,
        *,
        score_threshold: float = 0.35,
        iou_threshold: float = 0.5,
        max_detections: int = 16,
        decode_processes: int = 0,
    ) -> None:
        self.detector, self.masker, self.embedder = detector, masker, embedder
        self.device: Device = detector.device
        self._decoder = Decoder(device=self.device, processes=decode_processes)
        self._decoder.warm_up()
        self.classes = _class_names(detector)
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        detect_size, crop_size, embed_size = (_input_size(engine) for engine in (detector, masker, embedder))
        if embed_size != crop_size:
            raise EngineError(f"the masker takes {crop_size} crops, the embedder {embed_size}")
        _check_output(masker, 1, *crop_size)
        _check_output(embedder, None)
        if not detector.device == masker.device == embedder.device:
            raise EngineError(f"the models run on {detector.device}, {masker.device}, {embedder.device}; expected one")
        self._to_detector = Preprocess(detect_size, scale=1 / 255)
        self._to_crops = Preprocess(crop_size, fit="stretch", scale=1 / 255, box_margin=CROP_MARGIN)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        device: Device | None = None,
        precision: Any = "fp32",
        cuda_graphs: bool = False,
        **options: Any,
    ) -> Recognizer:
        """From ``detector.onnx``, ``masker.onnx`` and ``embedder.onnx`` in a directory."""
        how = {"device": resolve_device(device), "precision": precision, "cuda_graphs": cuda_graphs}
        return cls(*(load_engine(directory, name, **how) for name in BATCHES), **options)

    @property
    def digest(self) -> str:
        """Identity of the three models: vectors of different digests do not compare."""
        together = "".join(engine.digest for engine in (self.detector, self.masker, self.embedder))
        return hashlib.sha256(together.encode()).hexdigest()

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.embedder.outputs[0].shape[-1]

    def open(self, source: Source) -> OpenImage:
        """Begin with an image that waits for others before it is recognized; see :meth:`nbvision.Decoder.open`."""
        return self._decoder.open(source)

    def recognize(
        self, sources: Source | Iterable[Source] | ImageBatch, *, times: StageTimes | None = None
    ) -> Recognition:
        """Recognize one batch of compressed images.

        Parameters
        ----------
        sources : bytes, path, what :meth:`open` gave, several of them, or an ImageBatch
        times : StageTimes, optional
            Filled with each stage's time; waits for the device after every stage.

        Returns
        -------
        Recognition
            An image that could not be decoded has its error and no objects; the others do not notice.
        """
        if not isinstance(sources, ImageBatch):
            items = as_items(sources)
            with self._stage(times, "decode", len(items)):
                batch = self._decoder(items)
        else:
            batch = sources.to(self.device)

        with self._stage(times, "detect", len(batch)):
            images, geometry = self._to_detector(batch)
            found = nms(
                in_batches(self.detector, images),
                geometry,
                score_threshold=self.score_threshold,
                iou_threshold=self.iou_threshold,
                max_detections=self.max_detections,
            ).flat()

        with self._stage(times, "crop", len(found)):
            crops, crop_geometry = self._to_crops(batch, boxes=found.boxes, box_images=found.images)

        with self._stage(times, "mask", len(found)):
            logits = in_batches(self.masker, crops)
            extents, _ = mask_boxes(logits, crop_geometry)

        with self._stage(times, "embed", len(found)):
            cut = cut_out(crops, logits, fill=BACKGROUND, mean=IMAGENET_MEAN, std=IMAGENET_STD, out=crops)
            vectors = in_batches(self.embedder, cut)

        return Recognition(
            errors=batch.errors,
            images=to_device(found.images, "cpu"),
            boxes=to_device(found.boxes, "cpu"),
            mask_boxes=to_device(extents, "cpu"),
            masks=to_device(logits[:, 0] > 0, "cpu"),
            crop_geometry=crop_geometry.to_host(),
            scores=to_device(found.scores, "cpu"),
            labels=to_device(found.labels, "cpu"),
            vectors=to_device(vectors, "cpu"),
        )

    def stream(
        self, sources: Iterable[Source], *, batch_size: int = 32, times: StageTimes | None = None
    ) -> Iterator[tuple[list[Source], Recognition]]:
        """Recognize any number of images, batch by batch: yields each batch's sources and what was found.

        The next two batches are decoded while one is recognized, but not with ``times``: stages that overlap have no
        times of their own.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more")
        batches = _batched(sources, batch_size)
        if times is not None:
            for batch in batches:
                yield batch, self.recognize(batch, times=times)
            return
        for batch, images in self._decoder.stream(batches):
            yield batch, self.recognize(images)

    def _stage(self, times: StageTimes | None, name: str, items: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if times is None else times.stage(name, self.device, items=items)


def load_engine(directory: str | os.PathLike[str], name: str, **options: Any) -> Engine:
    """One of the recognizer's models: ``"detector"``, ``"masker"`` or ``"embedder"``; ``options`` are an Engine's."""
    return Engine(Path(directory) / f"{name}.onnx", batch=BATCHES[name], **options)


def in_batches(engine: Engine, inputs: Any) -> Any:
    """Run a model with one input and one output on any number of items, in batches it was made for."""
    largest = engine.batch.max if engine.batch is not None else len(inputs)
    if len(inputs) <= largest:
        return engine(inputs)
    first = engine(inputs[:largest])
    outputs = _like(first, len(inputs))
    outputs[:largest] = first
    for start in range(largest, len(inputs), largest):
        part = slice(start, start + largest)
        outputs[part] = engine(inputs[part])  # not out=outputs[part]: TensorRT takes no output at an odd address
    return outputs


def _batched(sources: Iterable[Source], size: int) -> Iterator[list[Source]]:
    items = iter(sources)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _like(array: Any, count: int) -> Any:
    shape = (count, *array.shape[1:])
    size_bytes = array.nbytes // max(len(array), 1) * count
    return memory.acquire(size_bytes, device=device_of(array)).view(shape, dtype=array.dtype)


def _class_names(detector: Engine) -> tuple[str, ...]:
    try:
        names: Sequence[str] = json.loads(detector.metadata["nbvision.classes"])
        if not isinstance(names, list):
            raise ValueError(f"it is {names!r}")
    except (KeyError, ValueError) as error:
        raise EngineError(
            f"{detector.name} names no classes; expected a JSON list in its metadata 'nbvision.classes'"
        ) from error
    shape = detector.outputs[0].shape
    if len(shape) != 3 or shape[1] not in (-1, 4 + len(names)):
        raise EngineError(f"{detector.name} names {len(names)} classes, but its output is {detector.outputs[0]}")
    return tuple(names)


def _input_size(engine: Engine) -> tuple[int, int]:
    shape = engine.inputs[0].shape
    if len(engine.inputs) != 1 or len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < 1:
        raise EngineError(f"{engine.name} takes {engine.inputs}; expected one input (batch, 3, height, width)")
    return shape[2], shape[3]


def _check_output(engine: Engine, *beyond_batch: int | None) -> None:
    """Refuse a model whose one output is not (batch, then these sizes); None stands for any size."""
    shape = engine.outputs[0].shape[1:]
    fits = len(shape) == len(beyond_batch) and all(
        want is None or size in (-1, want) for size, want in zip(shape, beyond_batch, strict=True)
    )
    if len(engine.outputs) != 1 or not fits:
        wanted = ", ".join(["batch", *("any" if want is None else str(want) for want in beyond_batch)])
        gives = ", ".join(map(str, engine.outputs))
        raise EngineError(f"{engine.name} gives {gives}; expected one output ({wanted})")
