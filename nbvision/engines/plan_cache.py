"""Plans on disk: one file for each model, set of options, TensorRT and GPU."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from nbvision.engines._trt import TensorRT
from nbvision.engines.build import BuildOptions
from nbvision.engines.onnx_file import OnnxFile
from nbvision.runtime.cache import cache_dir, write_atomically
from nbvision.runtime.device import compute_capability, require_cupy

__all__ = ["plan_path", "read_plan", "sole_builder", "write_plan"]

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


@contextlib.contextmanager
def sole_builder(path: Path) -> Iterator[None]:
    """Wait until no other process is at work on this plan; where nothing can be locked, several may build it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "wb")  # noqa: SIM115  (closed below)
    except OSError:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process builds %s; waiting for it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            logger.info("%s cannot be locked (%s)", path, error)
        yield


def read_plan(path: Path) -> bytes | None:
    """The plan in a file; None, and a logged warning, if the file is damaged; None if there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("cannot read the plan %s (%s); it is built anew", path, error)
        return None
    header, plan = content[:_HEADER_BYTES], content[_HEADER_BYTES:]
    if header != _header(plan):
        logger.warning("the plan %s is damaged; it is built anew", path)
        return None
    return plan


def write_plan(path: Path, plan: bytes) -> None:
    """Keep a plan; a directory that cannot be written to costs a warning, not the engine."""
    try:
        write_atomically(path, _header(plan) + plan)
    except OSError as error:
        logger.warning("cannot keep the plan %s (%s); the next start builds it again", path, error)


def _header(plan: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(plan).digest()


def _gpu_identity() -> tuple[str, tuple[int, int]]:
    runtime = require_cupy("a TensorRT engine").cuda.runtime
    device_id = runtime.getDevice()
    return runtime.getDeviceProperties(device_id)["name"].decode(), compute_capability(device_id)
