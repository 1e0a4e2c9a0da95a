"""Which device the work runs on.

The choice is made once per call from, in this order: the ``device=`` argument, the environment variable
``NBVISION_DEVICE`` (``cuda`` or ``cpu``), and whether a CUDA device answers.  Nothing here imports CuPy until CUDA
is really wanted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

from nbvision.errors import DeviceError, InputError, MissingExtraError

__all__ = [
    "Device",
    "array_module",
    "available_cores",
    "compute_capability",
    "cuda_unavailable_because",
    "device_of",
    "on_stream",
    "own_stream",
    "resolve_device",
    "stream_pointer",
    "synchronize",
]

Device = Literal["cpu", "cuda"]

CUDA_EXTRA = "cuda13"  # the extra that error messages recommend


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def cuda_unavailable_because() -> str | None:
    """Why CUDA cannot be used in this process, or None if it can.

    The answer is kept: a GPU does not appear while a process runs.
    """
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed: pip install 'nbvision[{CUDA_EXTRA}]'"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:  # 35 without a driver, 100 without a device
        return f"the CUDA runtime says: {error}"
    return None if count else "the CUDA runtime counts no device"


def resolve_device(device: str | None = None) -> Device:
    """The device to use: the argument, else ``NBVISION_DEVICE``, else CUDA where it works, else the CPU.

    Raises
    ------
    InputError
        For a name other than ``"cpu"`` or ``"cuda"``.
    DeviceError
        If CUDA was asked for by name and cannot be used.
    """
    wanted = device or os.environ.get("NBVISION_DEVICE") or None
    if wanted not in (None, "cpu", "cuda"):
        origin = "device" if device else "NBVISION_DEVICE"
        raise InputError(f"{origin} is {wanted!r}; expected 'cpu' or 'cuda'")
    if wanted == "cpu":
        return "cpu"
    reason = cuda_unavailable_because()
    if wanted == "cuda" and reason is not None:
        raise DeviceError(f"device 'cuda' was asked for, but {reason}; use device='cpu' or NBVISION_DEVICE=cpu")
    return "cpu" if reason is not None else "cuda"


def require_cupy(needed_for: str) -> ModuleType:
    """CuPy, or an error that names the extra."""
    try:
        import cupy
    except ImportError as error:
        raise MissingExtraError("cupy", extra=CUDA_EXTRA, needed_for=needed_for) from error
    module: ModuleType = cupy
    return module


def array_module(device: Device) -> ModuleType:
    """``numpy`` for the CPU, ``cupy`` for CUDA."""
    if device == "cuda":
        return require_cupy("a CUDA array")
    import numpy

    return numpy


def device_of(array: Any) -> Device:
    """Where an array's bytes live: ``"cuda"`` for a CUDA array (CuPy, torch on a GPU, ...), else ``"cpu"``."""
    library = type(array).__module__
    if library in ("cupy", "numpy"):  # asked often, and to ask by protocol takes microseconds
        return "cuda" if library == "cupy" else "cpu"
    if hasattr(array, "__cuda_array_interface__"):
        return "cuda"
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == 2:  # kDLCUDA
        return "cuda"
    return "cpu"


def on_stream(stream: Any, device: Device) -> contextlib.AbstractContextManager[Any]:
    """What runs inside is queued on ``stream``, if there is one and the device has streams."""
    given: contextlib.AbstractContextManager[Any] = stream
    return given if stream is not None and device == "cuda" else contextlib.nullcontext()


@functools.cache
def compute_capability(device_id: int = 0) -> tuple[int, int]:
    """Compute capability of a CUDA device, such as ``(9, 0)``."""
    cupy = require_cupy("a CUDA device")
    digits = cupy.cuda.Device(device_id).compute_capability
    return int(digits[:-1]), int(digits[-1])


def stream_pointer(stream: Any = None) -> int:
    """Address of a CUDA stream: of ``stream`` (CuPy's, or anything with ``ptr`` or ``cuda_stream``), else of CuPy's
    current stream."""
    if stream is None:
        return int(require_cupy("a CUDA stream").cuda.get_current_stream().ptr)
    for name in ("ptr", "cuda_stream"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise InputError(f"stream is a {type(stream).__name__}; expected a CuPy or torch stream, or None")


_own_streams = threading.local()


@contextlib.contextmanager
def own_stream(device_id: int) -> Iterator[None]:
    """Within this context CuPy's current stream is one that belongs to this thread and to this device alone."""
    cuda = require_cupy("a CUDA stream").cuda
    by_device: dict[int, Any] = _own_streams.__dict__.setdefault("by_device", {})
    with cuda.Device(device_id):
        if device_id not in by_device:
            by_device[device_id] = cuda.Stream(non_blocking=True)
        with by_device[device_id]:
            yield


def synchronize(device: Device) -> None:
    """Wait on the host until CuPy's current stream is idle; returns at once on the CPU."""
    if device == "cuda":
        require_cupy("a CUDA stream").cuda.get_current_stream().synchronize()
