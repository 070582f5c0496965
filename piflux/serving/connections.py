"""Connections of clients, as uvicorn has them, and closed where no request comes."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """A connection, which has so much time for each request's head.

    uvicorn limits the time between a request and the next one's first byte. Without more a client
    that connects and says nothing, or half a head, or sends bytes of a body that was answered
    already, would hold a socket for ever. Bodies that are wanted have a limit of their own, see
    `piflux.serving.guard`.

    Args:
        head_s: seconds.
        given: of uvicorn's.
    """

    def __init__(self, head_s: float, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._head_s = head_s
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_timing()

    def _time(self) -> None:
        """Time runs from the first byte, or the beginning, and no byte in between adds to it."""
        if self._is_asked():
            self._end_timing()
        elif self._late is None:
            self._late = self.loop.call_later(self._head_s, self._close)

    def _is_asked(self) -> bool:
        """Whether there is a request that wants an answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _close(self) -> None:
        self._late = None
        if not self._is_asked():
            self.transport.close()

    def _end_timing(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
