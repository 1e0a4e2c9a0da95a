"""Spans for OpenTelemetry, where its API is installed and somebody has set up where they go.

Those of requests over HTTP are FastAPI's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None  # type: ignore[assignment]

__all__ = ["is_set_up", "span"]


def is_set_up() -> bool:
    """Whether somebody has said where spans go."""
    return trace is not None and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextlib.contextmanager
def span(name: str, *, headers: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[None]:
    """What happens inside, as a part of the span around it, or of the client's that ``headers`` tell of."""
    if not is_set_up():
        yield
        return
    around = None if headers is None else propagate.extract(dict(headers))
    kind = trace.SpanKind.INTERNAL if headers is None else trace.SpanKind.SERVER
    with trace.get_tracer("nbvision").start_as_current_span(name, around, kind, attributes):
        yield
