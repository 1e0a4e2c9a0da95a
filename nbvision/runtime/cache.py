"""Where compiled code is kept on disk, and under what name.

A compiled kernel depends on more than its own file: pixel functions are inlined into it.  So its directory is named
by a hash of *all* kernel sources and of the versions of the compilers; editing any of them starts a new directory.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

import nbvision_kernels

__all__ = ["cache_dir", "kernel_cache_dir", "kernel_digest", "write_atomically"]

_COMPILERS = (
    "numba",
    "llvmlite",
    "numba-cuda",
    "nvidia-nvjitlink",
    "nvidia-nvvm",
    "nvidia-cuda-nvrtc",
    "cuda-core",
)


def cache_dir() -> Path:
    """The directory of everything nbvision keeps between runs.

    ``NBVISION_CACHE_DIR``, else ``$XDG_CACHE_HOME/nbvision``, else ``~/.cache/nbvision``.  It may be deleted at any
    time.
    """
    named = os.environ.get("NBVISION_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbvision"


@functools.cache
def kernel_digest() -> str:
    """Sixteen hexadecimal digits over all kernel sources and the compilers' versions."""
    digest = hashlib.sha256(sys.version.encode())
    for path in nbvision_kernels.source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for name in _COMPILERS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        digest.update(f"{name}={version};".encode())
    return digest.hexdigest()[:16]


def kernel_cache_dir() -> Path:
    """Where compiled kernels of just these sources and compilers are kept."""
    return cache_dir() / "kernels" / kernel_digest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or another process writing the same, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
