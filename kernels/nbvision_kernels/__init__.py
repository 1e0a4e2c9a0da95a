"""Device code of nbvision: pixel mathematics in Python, CPU loops, Numba kernels and CUDA C frames.

Imports nothing of nbvision.  Each file says which functions are *pixel functions* (scalars and a flat byte buffer, one
source for every target) and which are loops around them.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["read_source", "source_files"]

_ROOT = Path(__file__).parent


def source_files() -> list[Path]:
    """Every source file of this package, sorted: what the hash of compiled code covers."""
    return sorted(path for path in _ROOT.iterdir() if path.suffix in {".py", ".cu", ".cuh"})


def read_source(name: str) -> str:
    """The text of a CUDA C frame, such as ``"preprocess.cu"``, with that of the files it includes in its place."""
    text = (_ROOT / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda found: read_source(found[1]), text, flags=re.MULTILINE)
