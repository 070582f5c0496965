"""The application for Ray Serve: a front before replicas."""

import sys
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from piflux.serving import logs
from piflux.serving.app import build_app
from piflux.serving.cluster.leader import Leader
from piflux.serving.cluster.replicas import Replicas
from piflux.serving.cluster.settings import Settings
from piflux.serving.keys import VARIABLE, Keys, WrongKeys, read_keys

REQUESTS = 4096
"""That the front may have at a time: waiting ones, files and the page among them."""

HEALTH_S = 2.0
"""How often Serve asks a replica whether it is well."""

HEALTH_ANSWER_S = 30.0
"""How long it may take to say so. While a graph is compiled there are other threads."""

REPLICA_STARTS = 2
"""Of a replica that comes to nothing, whose engine has tried several times: then Serve gives up."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""The front has a line of its own for each request."""

UPSCALE_S, DOWNSCALE_S = 10.0, 600.0
"""How long it has to be that there is too much, or too little to do. To load takes long."""


def app(settings: Settings) -> serve.Application:
    """What `serve run` and `serve.run` take.

    Raises:
        WrongKeys: from the front, when it starts: there are no keys, and everyone may not ask.
    """
    gpus = settings.gpus
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    leader = serve.deployment(Leader).options(
        placement_group_bundles=settings.bundles(gpus),
        placement_group_strategy=settings.strategy,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.jobs_a_replica + 1,  # and one that asks what it is at
        max_queued_requests=settings.queue,
        max_constructor_retry_count=REPLICA_STARTS,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=HEALTH_ANSWER_S,
        graceful_shutdown_timeout_s=settings.drain_s,
        logging_config=QUIET,
        **_counts(settings),
    )
    front = serve.deployment(Front).options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=REQUESTS,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=HEALTH_ANSWER_S,
        graceful_shutdown_timeout_s=settings.drain_s,
        logging_config=QUIET,
    )
    return front.bind(settings, leader.bind(settings, gpus))


def _counts(settings: Settings) -> dict[str, Any]:
    """How many replicas there are, of which the queue decides if it may."""
    if settings.most_replicas is None:
        return {"num_replicas": settings.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.replicas,
            "max_replicas": settings.most_replicas,
            "target_ongoing_requests": settings.ranks,
            "upscale_delay_s": UPSCALE_S,
            "downscale_delay_s": DOWNSCALE_S,
        }
    }


class Front:
    """HTTP before all replicas. It has the jobs; a replica that is lost takes none with it.

    Args:
        settings: of the server.
        replicas: a handle of the leaders' deployment.
    """

    async def __init__(self, settings: Settings, replicas: Any) -> None:  # type: ignore[misc]
        logs.to(sys.stdout)
        self._engine = Replicas(replicas, settings.deadline_s)
        self._app = build_app(
            self._engine, keys=_keys(settings), hosts=settings.names, quality=settings.quality
        )
        self._drain_s = settings.drain_s
        await self._engine.start()

    async def __call__(self, request: Request) -> Response:
        return _Through(self._app)

    async def drain(self) -> None:
        """Take no more jobs, and return once there are none."""
        await self._engine.end(self._drain_s)

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.end(self._drain_s)


class _Through(Response):
    """The answer of an application, which reads the request itself."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _keys(settings: Settings) -> Keys | None:
    keys = read_keys(settings.api_keys)
    if keys is None and not settings.insecure:
        raise WrongKeys(
            f"there are no API keys: give api_keys=FILE, or {VARIABLE} on the front's machine; or "
            "insecure=true, if nobody else reaches Serve's port or something before it checks who "
            "asks"
        )
    return keys
