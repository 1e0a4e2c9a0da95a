"""What this machine has: versions, devices, extras."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

from nbvision.runtime.cache import cache_dir
from nbvision.runtime.device import cuda_unavailable_because, require_cupy

__all__ = ["describe"]

# Extra -> (import names, distributions to report, what is missing without it)
_EXTRAS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "cuda13": (
        ("cupy", "numba_cuda", "nvidia.nvimgcodec"),
        ("cupy-cuda13x", "cupy-cuda12x", "numba-cuda", "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
        "everything runs on the CPU",
    ),
    "tensorrt": (("tensorrt",), ("tensorrt",), "no Engine on CUDA"),
    "tensorrt-rtx": (("tensorrt_rtx",), ("tensorrt-rtx-cu13",), "no Engine on GeForce RTX through TensorRT-RTX"),
    "onnx": (("onnxruntime",), ("onnxruntime",), "no Engine on the CPU"),
    "quantize": (("onnxruntime", "onnx"), ("onnxruntime", "onnx"), "no quantize()"),
    "search": (("faiss",), ("faiss-cpu",), "no search index"),
    "codecs": (
        ("imagecodecs",),
        ("imagecodecs",),
        "WebP is decoded by Pillow, one at a time, and PNG unpacked by zlib, in twice the time",
    ),
    "polygons": (("cv2",), ("opencv-python-headless",), "no mask_to_polygons"),
    "parquet": (("pyarrow",), ("pyarrow",), "no read_parquet"),
    "bfloat16": (("ml_dtypes",), ("ml-dtypes",), "no Preprocess(dtype='bfloat16')"),
    "serve": (
        ("fastapi", "uvicorn", "httptools", "orjson", "python_multipart", "prometheus_client", "yaml"),
        ("fastapi", "uvicorn"),
        "no `nbvision serve`",
    ),
    "grpc": (("grpc", "tritonclient"), ("grpcio", "tritonclient"), "no gRPC beside HTTP in `nbvision serve`"),
    "tracing": (("opentelemetry",), ("opentelemetry-api",), "no OpenTelemetry spans from `nbvision serve`"),
    "cli": (
        ("rich",),
        ("rich",),
        "no progress bars and tables: of `nbvision`'s commands only `info` and `serve` start",
    ),
    "plot": (("matplotlib",), ("matplotlib",), "no picture from `nbvision profile-engine`"),
}


def describe() -> str:
    """Versions, devices and extras as text, one fact a line."""
    lines = [
        f"nbvision {_version('nbvision')}, Python {platform.python_version()}, {platform.platform()}",
        f"core      numpy {_version('numpy')}, numba {_version('numba')}, pillow {_version('pillow')}, "
        f"simplejpeg {_version('simplejpeg')}",
        f"cpu       {os.cpu_count()} cores",
        f"cuda      {_describe_cuda()}",
        f"cache     {cache_dir()}",
        "extras",
    ]
    for extra, (modules, distributions, cost) in _EXTRAS.items():
        missing = [module for module in modules if not _is_there(module)]
        if missing:
            lines.append(f"  {extra:<13} missing {', '.join(missing)}: {cost}; pip install 'nbvision[{extra}]'")
        else:
            versions = [f"{name} {_version(name)}" for name in distributions if _version(name) != "absent"]
            lines.append(f"  {extra:<13} {', '.join(versions) or 'there'}")  # not every build is a distribution
    return "\n".join(lines)


def _describe_cuda() -> str:
    reason = cuda_unavailable_because()
    if reason is not None:
        return f"none: {reason}"
    runtime = require_cupy("a CUDA device").cuda.runtime
    devices = []
    for device_id in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(device_id)
        memory_gib = properties["totalGlobalMem"] / 2**30
        capability = f"{properties['major']}.{properties['minor']}"
        devices.append(f"{device_id}: {properties['name'].decode()}, sm {capability}, {memory_gib:.0f} GiB")
    return f"driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}; " + "; ".join(devices)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
