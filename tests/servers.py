"""Servers for tests: an application on a free port, beside the test, and clients that wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import uvicorn

from piflux.serving import Limits
from piflux.serving.server import connections

PATIENCE_S = 120.0
"""How long tests wait for what must come: on a busy machine it may take that long."""


def ask(method: str, url: str, **options: Any) -> httpx2.Response:
    """As `httpx2.request`, which would give up after five seconds."""
    return httpx2.request(method, url, **{"timeout": PATIENCE_S, **options})


def get(url: str, **options: Any) -> httpx2.Response:
    return ask("GET", url, **options)


def post(url: str, **options: Any) -> httpx2.Response:
    return ask("POST", url, **options)


def until(holds: Callable[[], Any]) -> None:
    """Wait for what must come to be so."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.01)


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
