"""The HTTP front: OpenAI's images API, health, metrics and the page, before an engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import piflux
from piflux.serving import answers, asked
from piflux.serving.asked import Drawing
from piflux.serving.files import Files
from piflux.serving.guard import GONE, NOTE, Guard, Told, refusal
from piflux.serving.jobs import (
    Drawn,
    Engine,
    Event,
    Job,
    Model,
    Preview,
    Quality,
    Queued,
    Refused,
    Stepped,
)
from piflux.serving.keys import Keys
from piflux.serving.limits import Limits
from piflux.serving.metrics import Metrics
from piflux.serving.pictures import encode, painted_anew, read_upload, small

T = TypeVar("T")

PAGE = Path(__file__).parent / "page"

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy: it loads what is this server's, and nothing else."""

STUCK_S = 300.0
"""A group that has not stepped for so long is not alive. Longer than any graph compiles."""

BEAT_S = 15.0
"""A stream says something that often, lest a proxy takes it for dead."""

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


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


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
    front = _Front(engine, limits or Limits(), quality)

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
    app.add_middleware(Guard, keys=keys, hosts=hosts, limits=front.limits)
    app.add_middleware(Told, metrics=front.metrics)  # around the guard
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _failed)
    front.add_to(app)
    return app


class _Front:
    """The routes, with what they share."""

    def __init__(self, engine: Engine, limits: Limits, quality: Quality) -> None:
        self.engine, self.limits, self.quality = engine, limits, quality
        self.files = Files()
        self.metrics = Metrics(engine.state, lambda: self.files.bytes)
        self.bodies = asked.bodies(limits)
        self._decoding = asyncio.Semaphore(2)  # pictures of strangers, large ones among them

    def add_to(self, app: FastAPI) -> None:
        pictures = "A picture, or its events: OpenAI's, with those of `piflux` beside them."
        drawn: dict[int | str, dict[str, Any]] = FAILURES | {
            200: {
                "description": pictures,
                "content": {
                    "application/json": {"schema": ANSWER_SCHEMA},
                    "text/event-stream": {},
                },
            }
        }
        for path, call, kind, media in (
            ("generations", self.generate, self.bodies.json, "application/json"),
            ("edits", self.edit, self.bodies.form, "multipart/form-data"),
        ):
            schema = asked.schema(kind, files=media != "application/json")
            app.add_api_route(
                f"/v1/images/{path}",
                call,
                methods=["POST"],
                response_model=None,
                responses=drawn,
                openapi_extra={
                    "requestBody": {"required": True, "content": {media: {"schema": schema}}}
                },
            )
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

    # ------------------------------------------------------------------------------------- images

    async def generate(self, request: Request) -> Response:
        """Draw pictures from a prompt."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(
                400,
                "invalid_content_type",
                "the body has to be JSON: Content-Type application/json",
            )
        body = asked.read(self.bodies.json, await request.body())
        return await self._answer(request, body, self._ready_model(), "image_generation", [], None)

    async def edit(self, request: Request) -> Response:
        """Draw pictures from a prompt and pictures."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise Refused(
                400, "invalid_content_type", "the body has to be a form: multipart/form-data"
            )
        async with request.form(max_files=self.limits.uploads + 1, max_fields=100) as form:
            fields: dict[str, Any] = {}
            uploads: dict[str, list[UploadFile]] = {"image": [], "mask": []}
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if name in uploads:
                    if not isinstance(value, UploadFile):
                        raise Refused(
                            400, "invalid_image", f"{name}: it has to be a file", field=name
                        )
                    uploads[name].append(value)
                elif isinstance(value, UploadFile):
                    raise Refused(400, "unknown_parameter", f"{key}: takes no file", field=key)
                elif name == "lora":
                    fields.setdefault(name, []).append(value)
                elif name in fields:
                    raise Refused(400, "invalid_value", f"{key}: it is there twice", field=key)
                else:
                    fields[name] = value
            body = asked.read(self.bodies.form, fields)
            model = self._ready_model()
            if not model.edits:
                raise Refused(
                    400, "invalid_value", f"{model.pipeline} takes no pictures", field="image"
                )
            images, masks = await self._read(uploads)
        mask = masks[0] if masks else None
        return await self._answer(request, body, model, "image_edit", images, mask)

    async def _read(
        self, uploads: dict[str, list[UploadFile]]
    ) -> tuple[list[Image.Image], list[Image.Image]]:
        """The pictures and the mask, if there is one."""
        images, masks = uploads["image"], uploads["mask"]
        if not images:
            raise Refused(400, "missing_required_parameter", "image: it is missing", field="image")
        if len(images) > self.limits.uploads or len(masks) > 1:
            raise Refused(
                400,
                "invalid_value",
                f"image: {self.limits.uploads} pictures and one mask at most",
                field="image",
            )
        left, found = self.limits.upload_pixels, []
        for name, upload in [("image", x) for x in images] + [("mask", x) for x in masks]:
            data = await upload.read()
            async with self._decoding:
                image = await asyncio.to_thread(read_upload, data, name, left)
            left -= image.width * image.height
            found.append(image)
        count = len(images)
        if masks and found[count].size != found[0].size:
            raise Refused(
                400,
                "invalid_value",
                f"mask: it has {found[count].size} pixels, the picture {found[0].size}",
                field="mask",
            )
        return found[:count], [painted_anew(mask) for mask in found[count:]]

    async def _answer(
        self,
        request: Request,
        body: Drawing,
        model: Model,
        prefix: str,
        images: Sequence[Image.Image],
        mask: Image.Image | None,
    ) -> Response:
        """Have the job drawn, and answer at once or by events.

        Args:
            request: whose client is waited for.
            body: its fields.
            model: what is served.
            prefix: of the events' names.
            images: to edit.
            mask: where.
        """
        note = request.scope[NOTE]
        job = asked.job(
            body,
            model,
            self.limits,
            own=self.quality,
            id=note["id"],
            user=note["user"],
            images=images,
            mask=mask,
        )
        note |= {"seeds": list(job.seeds), "asked": job.quality}
        events = cast(AsyncGenerator[Event, None], self._watched(job, model, note))
        try:
            # What is refused at once has its own status, with events, too.
            first = await unless_gone(request.receive, anext(events))
            if body.stream:
                return _Events(self._events(body, job, model, prefix, first, events), events)
            async with contextlib.aclosing(events):
                drawn = await unless_gone(request.receive, _last(first, events))
                return await self._whole(request, body, job, model, drawn)
        except ClientGone:
            note["status"] = GONE
            await events.aclose()
            return Response(status_code=503)  # to nobody

    async def _whole(
        self, request: Request, body: Drawing, job: Job, model: Model, drawn: Drawn
    ) -> JSONResponse:
        """The answer that is no stream."""
        form, pictures = answers.form(body), []
        for data in await self._encoded(body, job, model, drawn):
            if body.response_format == "url":
                name = self.files.keep(data, form, answers.MEDIA[form])
                pictures.append({"url": str(request.url_for("file", name=name))})
            else:
                pictures.append({"b64_json": answers.b64(data)})
        return JSONResponse(
            answers.answer(
                pictures,
                created=int(time.time()),
                size=_size(drawn.images[0]),
                body=body,
                drawn=answers.settings(drawn.report, job, model),
            )
        )

    async def _events(
        self,
        body: Drawing,
        job: Job,
        model: Model,
        prefix: str,
        first: Event,
        later: AsyncIterator[Event],
    ) -> AsyncIterator[bytes]:
        """Server-sent events: OpenAI's, with `.queued` and `.progress` beside them."""
        shared = {"background": "opaque", "quality": job.quality}
        event: Event | None = first
        beats = _with_beats(later)
        try:
            while True:
                now = int(time.time())
                if event is None:
                    yield b": still here\n\n"
                elif isinstance(event, Queued):
                    yield answers.event(f"{prefix}.queued", before=event.before)
                elif isinstance(event, Stepped):
                    yield answers.event(f"{prefix}.progress", step=event.step, steps=event.steps)
                elif isinstance(event, Preview):
                    for index, data in enumerate(await asyncio.to_thread(small, event.images)):
                        yield answers.event(
                            f"{prefix}.partial_image",
                            b64_json=answers.b64(data),
                            partial_image_index=event.number,
                            index=index,
                            size=_size(event.images[index]),
                            output_format="webp",
                            created_at=now,
                            **shared,
                        )
                else:
                    settings = answers.settings(event.report, job, model)
                    for index, data in enumerate(await self._encoded(body, job, model, event)):
                        yield answers.event(
                            f"{prefix}.completed",
                            b64_json=answers.b64(data),
                            index=index,
                            size=_size(event.images[index]),
                            output_format=answers.form(body),
                            created_at=now,
                            piflux=settings,
                            **shared,
                        )
                    return
                event = await anext(beats)
        except Refused as refused:
            yield answers.event("error", **answers.error(refused))
        finally:
            await beats.aclose()

    async def _watched(self, job: Job, model: Model, note: dict[str, Any]) -> AsyncIterator[Event]:
        """The job's events; what came of it is counted and noted."""
        events = self.engine.submit(job)
        ended = False
        try:
            async for event in events:
                if isinstance(event, Drawn):
                    self.metrics.drawn(event.report, len(event.images))
                    note |= asdict(event.report)
                    ended = True
                yield event
            if not ended:
                raise Refused(500, "not_drawn", "the engine ended without a picture")
        except Refused as refused:
            ended = True
            self.metrics.failures.labels(refused.code).inc()
            note["code"] = refused.code
            raise
        except Exception:
            ended = True
            self.metrics.failures.labels("internal_error").inc()
            raise
        finally:
            if not ended:
                self.metrics.cancelled.inc()
                note["cancelled"] = True
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()

    async def _encoded(self, body: Drawing, job: Job, model: Model, drawn: Drawn) -> list[bytes]:
        """The pictures' files, made beside the loop."""
        form = answers.form(body)
        compression = 100 if body.output_compression is None else body.output_compression

        def each() -> list[bytes]:
            found = []
            for image, seed in zip(drawn.images, job.seeds, strict=True):
                told = answers.told(job, seed, model, drawn.report)
                found.append(encode(image, form, compression, told))
            return found

        return await asyncio.to_thread(each)

    def _model(self) -> Model:
        """What is served, once that is known."""
        model, state = self.engine.model, self.engine.state()
        if state.phase == "failed":
            raise Refused(503, "failed", f"nothing is drawn any more: {state.reason}")
        if model is None:
            raise Refused(503, "starting", "the model is being loaded: ask again", retry_after_s=5)
        return model

    def _ready_model(self) -> Model:
        """What is served, if requests are taken."""
        model, phase = self._model(), self.engine.state().phase
        if phase == "starting":
            raise Refused(503, "starting", "the model is warmed up: ask again", retry_after_s=5)
        if phase == "ending":
            raise Refused(503, "ending", "the server takes no more requests", retry_after_s=5)
        return model

    # -------------------------------------------------------------------------------- all the rest

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        card = answers.model_card(self._model(), self.limits, self.quality)
        return {"object": "list", "data": [card]}

    async def model(self, id: str) -> dict[str, Any]:
        """One model."""
        model = self._model()
        if id != model.name:
            raise Refused(404, "model_not_found", f"there is no model {id[:200]!r}", field="model")
        return answers.model_card(model, self.limits, self.quality)

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
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def file(self, name: str) -> Response:
        """A picture that was answered by its url, for an hour."""
        found = self.files.find(name)
        if found is None:
            raise Refused(404, "not_found", "there is no such file, or there was, an hour ago")
        return Response(found.data, media_type=found.media)


class _Events(Response):
    """Server-sent events, until the last one or until the client has gone.

    Args:
        lines: the events.
        job: closed in the end, however that comes.
    """

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[bytes], job: AsyncGenerator[Event, None]) -> None:
        super().__init__()
        self.lines, self.job = cast(AsyncGenerator[bytes, None], lines), job
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


async def _last(first: Event, later: AsyncIterator[Event]) -> Drawn:
    event = first
    while not isinstance(event, Drawn):
        event = await anext(later)
    return event


async def _with_beats(events: AsyncIterator[T]) -> AsyncGenerator[T | None, None]:
    """Events, and None where none has come for BEAT_S."""
    waiting: asyncio.Future[T] | None = None
    try:
        while True:
            if waiting is None:
                waiting = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait((waiting,), timeout=BEAT_S)
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


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


ANSWER_SCHEMA = {
    "type": "object",
    "required": ["created", "data", "output_format", "quality", "size", "piflux"],
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"b64_json": {"type": "string"}, "url": {"type": "string"}},
            },
        },
        "background": {"type": "string"},
        "output_format": {"type": "string"},
        "quality": {"type": "string"},
        "size": {"type": "string"},
        "piflux": {
            "type": "object",
            "required": [
                *("id", "model", "seeds", "quality", "policy", "lpips", "steps", "computed"),
                *("ranks", "waited_s", "drawn_s", "batch", "recovered"),
            ],
        },
    },
}
"""Of what is answered without events."""
