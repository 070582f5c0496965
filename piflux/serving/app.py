"""The HTTP front: OpenAI's images API, health, metrics and the page, before an engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import piflux
from piflux.serving import answers, asked
from piflux.serving.guard import Guard, Told, refusal
from piflux.serving.images import Images
from piflux.serving.jobs import Engine, Quality, Refused
from piflux.serving.keys import Keys
from piflux.serving.limits import Limits

PAGE = Path(__file__).parent / "page"

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy: it loads what is this server's, and nothing else."""

STUCK_S = 300.0
"""A server whose ranks have not stepped for so long is not alive: the engine itself would have
replaced them by then."""

DRAIN_S = 30.0
"""How long jobs may go on after the server is told to end."""

CODES = {404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
"""Of errors that the router and the guard raise."""

FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "Refused: `param` names the field.",
        "content": {"application/json": {"schema": answers.ERROR_SCHEMA}},
    },
    "5XX": {
        "description": "Not drawn.",
        "content": {"application/json": {"schema": answers.ERROR_SCHEMA}},
    },
}


def build_app(
    engine: Engine,
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    quality: Quality = "lossless",
    drain_s: float = DRAIN_S,
) -> FastAPI:
    """An ASGI application before an engine, which it starts and ends with itself.

    Args:
        engine: what draws.
        limits: of requests.
        keys: whose holders may ask; None for everyone who reaches the server.
        hosts: without keys, the names by which it may be called; None for any.
        quality: of requests that name none.
        drain_s: seconds that jobs under way have when it ends.
    """
    images = Images(engine, limits or Limits(), quality)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.end(drain_s)

    app = FastAPI(
        title="piflux",
        version=piflux.__version__,
        description="Pictures of a diffusion transformer, as OpenAI's images API has them.",
        lifespan=life,
        docs_url=None,  # pages that fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Guard, keys=keys, hosts=hosts, limits=images.limits)
    app.add_middleware(Told, metrics=images.metrics)  # around the guard
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _failed)
    _add_images(app, images)
    _Rest(images).add_to(app)
    return app


def _add_images(app: FastAPI, images: Images) -> None:
    drawn: dict[int | str, dict[str, Any]] = FAILURES | {
        200: {
            "description": "Pictures, or events that lead to them.",
            "content": {
                "application/json": {"schema": answers.ANSWER_SCHEMA},
                "text/event-stream": {},
            },
        }
    }
    for path, call, kind, media in (
        ("generations", images.generate, images.bodies.json, "application/json"),
        ("edits", images.edit, images.bodies.form, "multipart/form-data"),
    ):
        content = {media: {"schema": asked.schema(kind, files=path == "edits")}}
        app.add_api_route(
            f"/v1/images/{path}",
            call,
            methods=["POST"],
            response_model=None,
            responses=drawn,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )


class _Rest:
    """The other routes: models, health, metrics, files and the page."""

    def __init__(self, images: Images) -> None:
        self.images, self.engine = images, images.engine

    def add_to(self, app: FastAPI) -> None:
        add = app.add_api_route
        add("/v1/models", self.models, response_model=None, responses=FAILURES)
        add("/v1/models/{id:path}", self.model, response_model=None, responses=FAILURES)
        no: dict[int | str, dict[str, Any]] = {503: {"description": "It is not."}}
        add("/healthz", self.alive, response_model=None, responses=no)
        add("/readyz", self.ready, response_model=None, responses=no)
        add("/metrics", self.measured, response_class=Response, responses=FAILURES)
        add("/files/{name}", self.file, response_class=Response, responses=FAILURES)
        for path, name in (("/", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
            app.add_api_route(path, _page(name), include_in_schema=False)

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        card = answers.model_card(self.images.model(), self.images.limits, self.images.quality)
        return {"object": "list", "data": [card]}

    async def model(self, id: str) -> dict[str, Any]:
        """One model."""
        model = self.images.model()
        if id != model.name:
            raise Refused(404, "model_not_found", f"there is no model {id[:200]!r}", field="model")
        return answers.model_card(model, self.images.limits, self.images.quality)

    async def alive(self) -> Response:
        """Whether the server is worth to be kept: 503 if it has failed or stands still."""
        state = self.engine.state()
        alive = state.phase != "failed" and (state.phase != "ready" or state.stepped_s < STUCK_S)
        told = {"alive": alive, "reason": state.reason, "since_step_s": round(state.stepped_s, 1)}
        return JSONResponse(told, 200 if alive else 503)

    async def ready(self) -> Response:
        """Whether requests are taken: 503 while it warms up, ends, or has failed."""
        state = self.engine.state()
        ready = state.phase == "ready"
        told = {"ready": ready, "phase": state.phase, "ranks": state.ranks, "wanted": state.wanted}
        return JSONResponse(told, 200 if ready else 503)

    async def measured(self) -> Response:
        """Metrics for Prometheus."""
        return Response(
            generate_latest(self.images.metrics.registry), media_type=CONTENT_TYPE_LATEST
        )

    async def file(self, name: str) -> Response:
        """A picture that was answered by its url, for an hour."""
        found = self.images.files.find(name)
        if found is None:
            raise Refused(404, "not_found", "there is no such file, or there was, an hour ago")
        return Response(found.data, media_type=found.media)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return refusal(error)


async def _failed(request: Request, error: Exception) -> Response:
    """What the router, the parser of forms and the guard raise."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_body" if error.status_code == 400 else "refused")
    response = refusal(Refused(error.status_code, code, error.detail))
    response.headers.update(error.headers or {})
    return response


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
        return FileResponse(PAGE / name, headers=headers)

    return page
