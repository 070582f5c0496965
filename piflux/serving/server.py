"""A process that serves an engine over HTTP, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import uvicorn

from piflux.errors import PifluxError
from piflux.serving import logs
from piflux.serving.app import DRAIN_S, build_app
from piflux.serving.connections import Connection
from piflux.serving.guard import is_loopback
from piflux.serving.jobs import Engine, Quality
from piflux.serving.keys import Keys
from piflux.serving.limits import Limits

LAST_ANSWERS_S = 5.0
"""For answers to go out, of jobs that were refused at the end of their time."""

PHASE_LOOK_S = 0.5
"""How often the engine's phase is looked at."""


class CannotServe(PifluxError):
    """The address can't be had, or the engine has failed."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port that is taken is told before anything is loaded.

    Args:
        host: a name or an address of this host.
        port: 0 for any that is free.

    Raises:
        CannotServe: the address is taken, or is none of this host's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise CannotServe(
            f"can't listen on {host}, port {port}: {error.strerror or error}"
        ) from error


def serve(
    engine: Engine,
    listening: socket.socket,
    host: str,
    *,
    keys: Keys | None = None,
    quality: Quality = "lossless",
    limits: Limits | None = None,
    drain_s: float = DRAIN_S,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then draw what has been taken, and end all ranks.

    Log lines go to standard output.

    Args:
        engine: what draws; it is started here.
        listening: of `listen`; closed in the end.
        host: as `listen` had it.
        keys: whose holders may ask.
        quality: of requests that name none.
        limits: of requests.
        drain_s: seconds that requests under way have after the signal. A second SIGINT ends all at
            once.
        tell: takes what people are told.

    Raises:
        CannotServe: the engine has failed.
        KeyboardInterrupt: a second SIGINT came.
    """
    logs.to(sys.stdout)
    local = is_loopback(host)
    app = build_app(
        engine,
        keys=keys,
        hosts=names_of(host) if local else None,
        quality=quality,
        limits=limits,
        drain_s=drain_s,
    )
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=connections(limits or Limits()),
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=math.ceil(drain_s + LAST_ANSWERS_S),
        ),
        lambda: engine.end(drain_s),
    )
    with listening:
        asyncio.run(_serve(server, engine, listening, host, tell))
    if server.force_exit:
        raise KeyboardInterrupt


def connections(limits: Limits) -> Any:
    """What uvicorn takes for `http`.

    Of its kinds it is the one that was fuzzed, whichever else is installed.
    """
    return partial(Connection, limits.head_s)


def names_of(host: str) -> set[str]:
    """By which a server that listens on this host alone may be called."""
    return {"localhost", "127.0.0.1", "::1", host.lower()}


class _Server(uvicorn.Server):
    """Uvicorn's, which ends the engine at a signal, and the signal there.

    Args:
        config: uvicorn's.
        end: begins to end the engine, while answers go out.
    """

    def __init__(self, config: uvicorn.Config, end: Callable[[], Coroutine[None, None, None]]):
        super().__init__(config)
        self._end = end
        self.ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._asked_to_end, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _asked_to_end(self, number: int) -> None:
        # Supervisors send SIGTERM to a process and to its group: twice is not in more of a hurry.
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
        elif not self.should_exit:
            logs.tell("ending")
            self.ending = asyncio.ensure_future(self._end())
        self.should_exit = True


async def _serve(
    server: _Server,
    engine: Engine,
    listening: socket.socket,
    host: str,
    tell: Callable[[str], None],
) -> None:
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"
    tell(f"Listening on {url}; it is ready once the model is warm.")
    logs.tell("listening", url=url)
    watching = asyncio.ensure_future(_watch(server, engine, url, tell))
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()
        await asyncio.wait((watching,))
        await engine.end(0)  # what uvicorn leaves out where it is hurried
        if server.ending is not None:
            await server.ending
    if not watching.cancelled():
        raise CannotServe(f"nothing can be drawn: {watching.result()}")
    logs.tell("ended")


async def _watch(server: _Server, engine: Engine, url: str, tell: Callable[[str], None]) -> str:
    """Says when the engine is ready, and ends the server when it has failed: gives the reason."""
    began, told = time.perf_counter(), False
    while True:
        state = engine.state()
        if state.phase == "failed":
            logs.tell("failed", level=40, reason=state.reason)
            server.should_exit = True
            return state.reason
        if state.phase == "ready" and not told:
            told = True
            seconds = round(time.perf_counter() - began, 2)
            logs.tell("ready", seconds=seconds, ranks=state.ranks)
            tell(f"Ready after {seconds:.1f} s on {state.ranks} rank(s). Draw at {url}")
        await asyncio.sleep(PHASE_LOOK_S)
