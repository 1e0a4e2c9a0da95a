"""What a service says of errors: the status over HTTP, and what of an error a client is told."""

from __future__ import annotations

from typing import Any

from nbvision.errors import DeadlineError, DecodeError, InputError, NbvisionError, OverloadError

__all__ = ["PipelineError", "RefusedError", "UnknownModelError", "described", "status_of"]

CLIENT_GONE = 499  # nginx' number: there is nobody to read it


class UnknownModelError(InputError):
    """A pipeline, or a version of one, that is not served."""


class PipelineError(NbvisionError, RuntimeError):
    """A pipeline that failed with an error of its own, which is for the log and not for clients."""


class RefusedError(InputError):
    """A request that is not taken, with the status that says why."""

    def __init__(self, message: str, status: int, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


def status_of(error: BaseException) -> int:
    """The HTTP status of an error: 5xx only where the service itself is to blame, or too busy."""
    if isinstance(error, RefusedError):
        return error.status
    for kind, status in (
        (UnknownModelError, 404),
        (DecodeError, 413 if getattr(error, "kind", "") == "too_large" else 422),
        (OverloadError, 503),
        (DeadlineError, 504),
        (InputError, 400),
    ):
        if isinstance(error, kind):
            return status
    return 500


def described(error: BaseException) -> dict[str, Any]:
    """An error as clients see it."""
    if not isinstance(error, NbvisionError):
        return {"error": f"{type(error).__name__}: the service's log says more"}
    return {"error": str(error)} | ({"kind": error.kind} if isinstance(error, DecodeError) else {})
