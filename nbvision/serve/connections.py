"""uvicorn's connections, which close if a request does not come: uvicorn itself waits for a header without end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Connection"]


class Connection(H11Protocol):
    """A connection in which each request's header comes within a time, ``header_s`` of its subclass."""

    header_s: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start to wait for a header, go on waiting, or end it, as the connection is now."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and self._late is not None:
            self._late.cancel()
            self._late = None
        elif not is_answering and self._late is None:
            self._late = self.loop.call_later(self.header_s, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
