"""FAISS, imported when an index is first made or loaded."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from nbvision.errors import MissingExtraError

__all__ = ["require_faiss"]


@functools.cache
def require_faiss() -> Any:
    """The ``faiss`` module, or an error that names the extra."""
    with warnings.catch_warnings():
        # SWIG's own types lack __module__, of which Python 3.12 and later complain while they are made.
        warnings.filterwarnings("ignore", r"builtin type \w+ has no __module__", DeprecationWarning)
        # FAISS before 1.12 asks NumPy for the CPU's features by a name that NumPy 2 has changed.
        warnings.filterwarnings("ignore", r"numpy\.core\._multiarray_umath is deprecated", DeprecationWarning)
        try:
            import faiss
        except ModuleNotFoundError as error:
            raise MissingExtraError("faiss", extra="search", needed_for="a search index") from error
    return faiss
