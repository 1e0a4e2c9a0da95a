"""Every exception nbvision raises on purpose.

::

    NbvisionError
    ├── InputError (ValueError)            an argument: its shape, dtype, layout, range
    ├── MissingExtraError (ImportError)    an optional dependency that is not installed; names the extra
    ├── DeviceError (RuntimeError)         no such device, or the device refused
    │   ├── MemoryLimitError (MemoryError) the byte limit of the memory manager, or the device's own memory
    │   └── FrozenMemoryError              an allocation where none may be
    ├── CompileError (RuntimeError)        a kernel that does not compile
    ├── DecodeError (ValueError)           one image that cannot be decoded; ``kind`` says why
    ├── EngineError (RuntimeError)         a model that cannot be loaded, built or run
    ├── OverloadError (RuntimeError)       a request turned away at the door of a full queue
    ├── DeadlineError (TimeoutError)       a request given up, since it cannot be answered in time
    └── SearchError (RuntimeError)         an index that cannot be read, or that another model made

Messages say what was got, what was expected and what to do about it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

__all__ = [
    "CompileError",
    "DeadlineError",
    "DecodeError",
    "DecodeErrorKind",
    "DeviceError",
    "EngineError",
    "FrozenMemoryError",
    "InputError",
    "MemoryLimitError",
    "MissingExtraError",
    "NbvisionError",
    "OverloadError",
    "SearchError",
]

DecodeErrorKind = Literal[
    "empty", "not_an_image", "truncated", "corrupt", "unsupported", "too_large", "unreadable", "failed"
]


class NbvisionError(Exception):
    """Base of every nbvision error. Can be copied and pickled, so it may cross threads and processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), self.args, dict(self.__dict__))


class InputError(NbvisionError, ValueError):
    """An argument has the wrong shape, dtype, layout or range."""


class MissingExtraError(NbvisionError, ImportError):
    """An optional dependency is not installed.

    Parameters
    ----------
    package : str
        The import name that is missing.
    extra : str
        The extra of nbvision that installs it.
    needed_for : str
        What the caller wanted to do.
    """

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed: pip install 'nbvision[{extra}]'"
        )
        self.package = package
        self.extra = extra


class DeviceError(NbvisionError, RuntimeError):
    """A device that does not exist here, or that refused the work."""


class MemoryLimitError(DeviceError, MemoryError):
    """The memory manager's byte limit, or the device's memory, is exhausted."""


class FrozenMemoryError(DeviceError):
    """Memory would have to be allocated within ``memory.frozen()``."""


class CompileError(NbvisionError, RuntimeError):
    """A kernel did not compile."""


class DecodeError(NbvisionError, ValueError):
    """One image that cannot be decoded. The rest of its batch is not touched.

    Parameters
    ----------
    message : str
        What was found, what was expected, what to do.
    kind : str
        ``"empty"`` (no bytes), ``"not_an_image"`` (no known signature), ``"truncated"`` (ends too early),
        ``"corrupt"`` (damaged inside), ``"unsupported"`` (a format or variant nobody here decodes),
        ``"too_large"`` (over the pixel limit), ``"unreadable"`` (the file cannot be opened),
        ``"failed"`` (two processes ended while they decoded it, be it by the file or by the machine).
    source : str, optional
        The file's path, where there is one.
    valid_rows : int, optional
        Of an image that was decoded all the same (``decode(..., recover=True)``): how many rows from the top are as
        they were, where that is known.
    """

    def __init__(
        self, message: str, *, kind: DecodeErrorKind, source: str | None = None, valid_rows: int | None = None
    ) -> None:
        if kind not in get_args(DecodeErrorKind):
            raise ValueError(f"kind must be one of {get_args(DecodeErrorKind)}, got {kind!r}")
        super().__init__(message if source is None else f"{source}: {message}")
        self.kind: DecodeErrorKind = kind
        self.source = source
        self.valid_rows = valid_rows


class EngineError(NbvisionError, RuntimeError):
    """A model cannot be loaded, built or run."""


class OverloadError(NbvisionError, RuntimeError):
    """A queue is full, and takes no more requests now.

    Parameters
    ----------
    message : str
    retry_after_s : float
        When there may be room.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(NbvisionError, TimeoutError):
    """A request that waited cannot be answered in time any more, or only at the cost of many others."""


class SearchError(NbvisionError, RuntimeError):
    """An index cannot be read, or does not fit the vectors it is asked about."""


def _revive(kind: type[NbvisionError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> NbvisionError:
    """An error as it was; its own initialiser would want the arguments that made the message."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error
