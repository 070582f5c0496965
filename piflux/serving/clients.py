"""Clients that wait, and may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from piflux.serving.guard import GONE, NOTE

T = TypeVar("T")

STREAM_BEAT_S = 15.0
"""A stream says something that often, lest a proxy takes it for dead."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives. Once the client has gone, it is cancelled.

    Raises:
        ClientGone: instead of a result.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))


async def with_beats(events: AsyncIterator[T]) -> AsyncGenerator[T | None, None]:
    """Events, and None where none has come for STREAM_BEAT_S."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((waiting,), timeout=STREAM_BEAT_S)
            if not done:
                yield None
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield event
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait((waiting,))


class EventStream(Response):
    """Server-sent events, until the last one or until the client has gone.

    Args:
        lines: the events.
        job: what they tell of; closed in the end, however that comes.
    """

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None], job: AsyncGenerator[Any, None]) -> None:
        super().__init__()
        self.lines, self.job = lines, job
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"  # nginx would keep events to itself

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self.lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await unless_gone(receive, write())
        except (ClientGone, OSError):  # by the server's interface, either is how it says so
            scope[NOTE]["status"] = GONE
        finally:
            await self.lines.aclose()
            await self.job.aclose()
