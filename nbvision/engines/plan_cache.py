"""Plans on disk, one file for each model, set of options, TensorRT and GPU; and one for what its builder timed."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from nbvision.engines._trt import TensorRT
from nbvision.engines.onnx_file import OnnxFile
from nbvision.runtime.cache import cache_dir, write_atomically
from nbvision.runtime.device import compute_capability, require_cupy

if TYPE_CHECKING:
    from nbvision.engines.build import BuildOptions

__all__ = ["plan_path", "read_plan", "timings_path", "write_plan"]

# A file is this line, the SHA-256 of the plan, and the plan.  TensorRT trusts what it deserializes, so a
# damaged plan has to be found out before.
_MAGIC = b"nbvision plan 1\n"
_HEADER_BYTES = len(_MAGIC) + hashlib.sha256().digest_size

logger = logging.getLogger("nbvision")


def plan_path(directory: Path | None, trt: TensorRT, model: OnnxFile, options: BuildOptions) -> Path:
    """Where the plan of this model for CuPy's current device is, or would be."""
    parts = (model.digest, options, trt.name, trt.api.__version__, _gpu_identity())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    return (directory or cache_dir() / "plans") / f"{key}.plan"


def timings_path(directory: Path | None, trt: TensorRT) -> Path:
    """Where this TensorRT's timings on CuPy's current device are; `read_plan` and `write_plan` serve them too."""
    key = hashlib.sha256(repr((trt.name, trt.api.__version__, _gpu_identity())).encode()).hexdigest()
    return (directory or cache_dir() / "plans") / f"{key}.timings"


def read_plan(path: Path) -> bytes | None:
    """The plan in a file; None, and a logged warning, if the file is damaged; None if there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("cannot read %s (%s); it is built anew", path, error)
        return None
    header, plan = content[:_HEADER_BYTES], content[_HEADER_BYTES:]
    if header != _header(plan):
        logger.warning("%s is damaged; it is built anew", path)
        return None
    return plan


def write_plan(path: Path, plan: bytes) -> None:
    """Keep a plan; a directory that cannot be written to costs a warning, not the engine."""
    try:
        write_atomically(path, _header(plan) + plan)
    except OSError as error:
        logger.warning("cannot keep %s (%s); the next start builds it again", path, error)


def _header(plan: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(plan).digest()


def _gpu_identity() -> tuple[str, tuple[int, int]]:
    runtime = require_cupy("a TensorRT engine").cuda.runtime
    device_id = runtime.getDevice()
    return runtime.getDeviceProperties(device_id)["name"].decode(), compute_capability(device_id)
