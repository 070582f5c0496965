"""A process that has Ray serve, until it is told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException

from piflux.serving.cluster.application import app
from piflux.serving.cluster.settings import Settings
from piflux.serving.server import LAST_ANSWERS_S, CannotServe

NAME = "piflux"
"""Of the application."""

STATUS_LOOK_S = 0.5
"""How often the application's status is looked at."""


def serve(
    settings: Settings, host: str, port: int, *, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until SIGTERM or SIGINT, then draw what has been taken, and end all replicas.

    The cluster is that of RAY_ADDRESS, or one that was started on this machine; where there is
    none, this machine is one for as long.

    Args:
        settings: of the server.
        host: where Serve listens, on each machine.
        port: there.
        tell: takes what people are told.

    Raises:
        CannotServe: no replica can draw.
        KeyboardInterrupt: a second SIGINT came.
    """
    began, ended = time.perf_counter(), threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if ended.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        ended.set()

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, logging_level="warning")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        ray_serve.start(
            http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"}
        )
        ray_serve.run_many(
            [ray_serve.RunTarget(app(settings), NAME)],
            wait_for_applications_running=False,
        )
        tell(f"Listening on {url}; it is ready once the model is warm.")
        ready = False
        while not ended.wait(STATUS_LOOK_S):
            status = ray_serve.status().applications[NAME]
            if status.status == "DEPLOY_FAILED":
                raise CannotServe(_why(status))
            if status.status == "RUNNING" and not ready:
                ready, seconds = True, time.perf_counter() - began
                tell(
                    f"Ready after {seconds:.1f} s: {settings.replicas} replica(s) of "
                    f"{settings.ranks} rank(s). Draw at {url}"
                )
        # First the front, which has the jobs: replicas go on for as long.
        with contextlib.suppress(RayServeException, TimeoutError):
            front = ray_serve.get_app_handle(NAME)
            front.drain.remote().result(timeout_s=settings.drain_s + LAST_ANSWERS_S)
    finally:
        with contextlib.suppress(RayServeException, TimeoutError):
            ray_serve.delete(NAME)
        ray.shutdown()


def _why(status: Any) -> str:
    """The last line of what Serve says of an application, if it is what a replica raised."""
    said = [*(each.message for each in status.deployments.values()), status.message]
    lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
    kind, _, text = lines[-1].partition(": ") if lines else ("", "", "")
    return text if text and " " not in kind else "see the replicas' messages"
