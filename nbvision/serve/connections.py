"""uvicorn's connections, which end if a request does not come: uvicorn itself waits for a header without end."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nbvision.serve.lateness import Lateness

__all__ = ["READ_S", "Connection"]

READ_S = "nbvision.read_s"  # in a request's scope: since when it waits for us, by time.perf_counter()

_HEADER_BYTES = 32 << 10
_UNREAD_BYTES = 1 << 20  # of a body


class Connection(HttpToolsProtocol):
    """A connection whose requests have headers that come within a time, ``header_s`` of its subclass, and are small."""

    header_s: float
    upload_s: float  # for the rest of a body whose request was answered before it had come
    lateness: Lateness
    _late: asyncio.TimerHandle | None = None
    _is_in_header = False
    _header_bytes = 0  # of one that has not come whole
    _began_s = 0.0  # the present request
    _reads = 0  # that it took

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self.lateness.measure(self.loop)
        was_in_header = self._is_in_header
        self._reads += 1
        super().data_received(data)
        # The rest of a body that nobody reads, since its request was turned away, is no header.
        self._header_bytes = self._header_bytes + len(data) if was_in_header and self._is_in_header else 0
        if self._header_bytes > _HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The header has over {_HEADER_BYTES} bytes.")
        self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_header = True
        self._began_s, self._reads = time.perf_counter(), 0

    def on_headers_complete(self) -> None:
        self._is_in_header = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        # Who is slow to send has the time, but for two turns of the loop before each read.
        began_s = max(self._began_s, time.perf_counter() - 2 * self._reads * self.lateness.turn_s)
        cast("dict[str, Any]", self.scope)[READ_S] = began_s
        super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        cycle.scope[READ_S] = time.perf_counter()  # it may have waited for the answer to the request before it
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """As uvicorn's, which stops reading at each 64 kB until somebody has taken them, which of an image is twice."""
        if self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > _UNREAD_BYTES:
            self.flow.pause_reading()
        self.cycle.message_event.set()

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
            is_in_body = self.cycle is not None and self.cycle.more_body
            self._late = self.loop.call_later(self.upload_s if is_in_body else self.header_s, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
