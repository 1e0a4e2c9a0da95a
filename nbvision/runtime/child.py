"""Another Python process, which finds what this one finds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["start_python"]


def start_python(
    module: str,
    arguments: Sequence[object],
    *,
    descriptors: Sequence[int],
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[Any]:
    """Start a process that calls a module's ``main``.

    It has this process' ``sys.path``, and finds nothing in the directory where it happens to be. An interrupt from the
    keyboard does not reach it: that is for whom it serves.

    Parameters
    ----------
    module : str
    arguments : sequence
        Of ``main``, as texts.
    descriptors : sequence of int
        Files that it inherits.
    environment : mapping, optional
        Default: this process' own.

    Raises
    ------
    OSError
        If it cannot be started.
    """
    path = [str(entry) for entry in sys.path if entry]
    code = f"import sys; sys.path[:] = {path!r}; from {module} import main; main(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        pass_fds=tuple(descriptors),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
