"""nbvision: compressed images in, a model's answer out, on one GPU, in one Python process.

Importing this package loads neither CUDA nor Numba nor a model runtime; each name loads its room when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbvision import errors
from nbvision.errors import (
    CompileError,
    DeadlineError,
    DecodeError,
    DeviceError,
    EngineError,
    FrozenMemoryError,
    InputError,
    MemoryLimitError,
    MissingExtraError,
    NbvisionError,
    OverloadError,
    SearchError,
)

if TYPE_CHECKING:
    from nbvision.batching import Batcher, LatencyCurve
    from nbvision.codecs import Decoder, decode, decode_frames, encode, read_parquet, read_tar
    from nbvision.engines import Engine, EngineProfile, QuantizationReport, profile_engine, quantize
    from nbvision.image import ImageBatch, as_batch
    from nbvision.ops.arithmetic import add_weighted, blend, convert, lut, normalize, threshold
    from nbvision.ops.boxes import Detections, box_iou, nms, nms_boxes
    from nbvision.ops.color import cvt_color
    from nbvision.ops.crop import center_crop, crop
    from nbvision.ops.draw import draw
    from nbvision.ops.geometry import Geometry
    from nbvision.ops.instances import Masks, instance_masks
    from nbvision.ops.masks import argmax_map, cut_out, cut_out_rgba, mask_boxes, mask_centroids, paste_masks
    from nbvision.ops.pad import pad
    from nbvision.ops.pixel import PixelFunction, pixel
    from nbvision.ops.preprocess import Preprocess
    from nbvision.ops.resize import letterbox, resize
    from nbvision.ops.rle import mask_to_polygons, mask_to_rle, rle_to_mask
    from nbvision.ops.warp import flip, rotate, rotation_matrix, warp_affine, warp_perspective
    from nbvision.pipeline import Pipeline, PipelineReport
    from nbvision.recognizer import Recognizer
    from nbvision.runtime import memory
    from nbvision.search import Index

__version__ = "0.1.0"

__all__ = [
    "Batcher",
    "CompileError",
    "DeadlineError",
    "DecodeError",
    "Decoder",
    "Detections",
    "DeviceError",
    "Engine",
    "EngineError",
    "EngineProfile",
    "FrozenMemoryError",
    "Geometry",
    "ImageBatch",
    "Index",
    "InputError",
    "LatencyCurve",
    "Masks",
    "MemoryLimitError",
    "MissingExtraError",
    "NbvisionError",
    "OverloadError",
    "Pipeline",
    "PipelineReport",
    "PixelFunction",
    "Preprocess",
    "QuantizationReport",
    "Recognizer",
    "SearchError",
    "add_weighted",
    "argmax_map",
    "as_batch",
    "blend",
    "box_iou",
    "center_crop",
    "convert",
    "crop",
    "cut_out",
    "cut_out_rgba",
    "cvt_color",
    "decode",
    "decode_frames",
    "draw",
    "encode",
    "errors",
    "flip",
    "instance_masks",
    "letterbox",
    "lut",
    "mask_boxes",
    "mask_centroids",
    "mask_to_polygons",
    "mask_to_rle",
    "memory",
    "nms",
    "nms_boxes",
    "normalize",
    "pad",
    "paste_masks",
    "pixel",
    "profile_engine",
    "quantize",
    "read_parquet",
    "read_tar",
    "resize",
    "rle_to_mask",
    "rotate",
    "rotation_matrix",
    "threshold",
    "warp_affine",
    "warp_perspective",
]

_ROOM_OF = {
    "Batcher": "nbvision.batching",
    "Decoder": "nbvision.codecs",
    "Detections": "nbvision.ops.boxes",
    "Engine": "nbvision.engines",
    "EngineProfile": "nbvision.engines",
    "Geometry": "nbvision.ops.geometry",
    "ImageBatch": "nbvision.image",
    "Index": "nbvision.search",
    "LatencyCurve": "nbvision.batching",
    "Masks": "nbvision.ops.instances",
    "Pipeline": "nbvision.pipeline",
    "PipelineReport": "nbvision.pipeline",
    "PixelFunction": "nbvision.ops.pixel",
    "Preprocess": "nbvision.ops.preprocess",
    "QuantizationReport": "nbvision.engines",
    "Recognizer": "nbvision.recognizer",
    "add_weighted": "nbvision.ops.arithmetic",
    "argmax_map": "nbvision.ops.masks",
    "as_batch": "nbvision.image",
    "blend": "nbvision.ops.arithmetic",
    "box_iou": "nbvision.ops.boxes",
    "center_crop": "nbvision.ops.crop",
    "convert": "nbvision.ops.arithmetic",
    "crop": "nbvision.ops.crop",
    "cut_out": "nbvision.ops.masks",
    "cut_out_rgba": "nbvision.ops.masks",
    "cvt_color": "nbvision.ops.color",
    "decode": "nbvision.codecs",
    "decode_frames": "nbvision.codecs",
    "draw": "nbvision.ops.draw",
    "encode": "nbvision.codecs",
    "flip": "nbvision.ops.warp",
    "instance_masks": "nbvision.ops.instances",
    "letterbox": "nbvision.ops.resize",
    "lut": "nbvision.ops.arithmetic",
    "mask_boxes": "nbvision.ops.masks",
    "mask_centroids": "nbvision.ops.masks",
    "mask_to_polygons": "nbvision.ops.rle",
    "mask_to_rle": "nbvision.ops.rle",
    "memory": "nbvision.runtime",
    "nms": "nbvision.ops.boxes",
    "nms_boxes": "nbvision.ops.boxes",
    "normalize": "nbvision.ops.arithmetic",
    "pad": "nbvision.ops.pad",
    "paste_masks": "nbvision.ops.masks",
    "pixel": "nbvision.ops.pixel",
    "profile_engine": "nbvision.engines",
    "quantize": "nbvision.engines",
    "read_parquet": "nbvision.codecs",
    "read_tar": "nbvision.codecs",
    "resize": "nbvision.ops.resize",
    "rle_to_mask": "nbvision.ops.rle",
    "rotate": "nbvision.ops.warp",
    "rotation_matrix": "nbvision.ops.warp",
    "threshold": "nbvision.ops.arithmetic",
    "warp_affine": "nbvision.ops.warp",
    "warp_perspective": "nbvision.ops.warp",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'nbvision' has no attribute {name!r}")
    room = importlib.import_module(_ROOM_OF[name])
    value = importlib.import_module(f"{room.__name__}.memory") if name == "memory" else getattr(room, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
