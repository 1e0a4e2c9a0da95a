"""uvicorn's connections, which end if a request does not come: uvicorn itself waits for a header without end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Connection"]

_HEADER_BYTES = 32 << 10


class Connection(HttpToolsProtocol):
    """A connection whose requests have headers that come within a time, ``header_s`` of its subclass, and are small."""

    header_s: float
    _late: asyncio.TimerHandle | None = None
    _waiting_bytes = 0  # of what may be a header

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._waiting_bytes += len(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start to wait for a header, go on waiting, or end it, as the connection is now."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._waiting_bytes = 0
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._waiting_bytes > _HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The header has over {_HEADER_BYTES} bytes.")
        elif self._late is None:
            self._late = self.loop.call_later(self.header_s, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
