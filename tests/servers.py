"""Servers for tests: an application on a free port, beside the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import uvicorn

from piflux.serving import Limits
from piflux.serving.server import connections


@contextlib.contextmanager
def served(
    app: Any, loop: asyncio.AbstractEventLoop | None = None, limits: Limits | None = None
) -> Iterator[str]:
    """The address of `app`, while it is served.

    Args:
        app: of ASGI.
        loop: that runs in another thread; None for one of the server's own.
        limits: of connections.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        http = connections(limits or Limits())
        config = uvicorn.Config(app, log_level="warning", lifespan="on", http=http)
        server = uvicorn.Server(config)
        serving = server.serve(sockets=[listening])
        with ThreadPoolExecutor(1) as pool:
            ended: Future[None] = (
                pool.submit(asyncio.run, serving)
                if loop is None
                else asyncio.run_coroutine_threadsafe(serving, loop)
            )
            try:
                while not server.started:
                    assert not ended.done(), "the server did not start"
                    time.sleep(0.01)
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                server.should_exit = True
                ended.result()
