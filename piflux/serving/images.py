"""Pictures for requests: the two routes of OpenAI's images API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from piflux.serving import answers, asked, jobs, logs
from piflux.serving.asked import Drawing
from piflux.serving.clients import ClientGone, EventStream, unless_gone, with_beats
from piflux.serving.files import Files
from piflux.serving.forms import FIELDS, fields_of, pictures_of
from piflux.serving.guard import GONE, NOTE, own_error
from piflux.serving.jobs import Job, Model, Refused
from piflux.serving.limits import Limits
from piflux.serving.metrics import Metrics
from piflux.serving.pictures import encode, small


class Images:
    """What becomes of requests for pictures.

    Args:
        engine: what draws.
        limits: of requests.
        quality: of requests that name none.

    Attributes:
        files: pictures that are fetched by their url.
        metrics: the server's.
        bodies: what requests may say.
    """

    def __init__(self, engine: jobs.Engine, limits: Limits, quality: jobs.Quality) -> None:
        self.engine, self.limits, self.quality = engine, limits, quality
        self.files = Files()
        self.metrics = Metrics(engine.state, lambda: self.files.bytes)
        self.bodies = asked.bodies(limits)
        self._decoding = asyncio.Semaphore(2)  # pictures of strangers, large ones among them

    async def generate(self, request: Request) -> Response:
        """Draw pictures from a prompt."""
        _check_type(request, "application/json")
        body = asked.read(self.bodies.json, await request.body())
        return await self._answer(request, body, self.ready_model(), "image_generation", [], None)

    async def edit(self, request: Request) -> Response:
        """Draw pictures from a prompt and pictures."""
        _check_type(request, "multipart/form-data")
        async with request.form(max_files=self.limits.uploads + 1, max_fields=FIELDS) as form:
            fields, uploads = fields_of(form)
            body = asked.read(self.bodies.form, fields)
            model = self.ready_model()
            if not model.edits:
                raise Refused(
                    400, "invalid_value", f"{model.pipeline} takes no pictures", field="image"
                )
            images, mask = await pictures_of(uploads, self.limits, self._decoding)
        return await self._answer(request, body, model, "image_edit", images, mask)

    def model(self) -> Model:
        """What is served, once that is known."""
        model, state = self.engine.model, self.engine.state()
        if state.phase == "failed":
            raise Refused(503, "failed", f"nothing is drawn any more: {state.reason}")
        if model is None:
            raise Refused(503, "starting", "the model is being loaded: ask again", retry_after_s=5)
        return model

    def ready_model(self) -> Model:
        """What is served, if requests are taken."""
        model, phase = self.model(), self.engine.state().phase
        if phase == "starting":
            raise Refused(503, "starting", "the model is warmed up: ask again", retry_after_s=5)
        if phase == "ending":
            raise Refused(503, "ending", "the server takes no more requests", retry_after_s=5)
        return model

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
        events = self._watched(job, model, note)
        try:
            # What is refused at once has its own status, with events, too.
            first = await unless_gone(request.receive, anext(events))
            if body.stream:
                return EventStream(self._events(body, job, model, prefix, first, events), events)
            async with contextlib.aclosing(events):
                drawn = await unless_gone(request.receive, _last(first, events))
                return await self._whole(request, body, job, model, drawn)
        except ClientGone:
            note["status"] = GONE
            await events.aclose()
            return Response(status_code=503)  # to nobody

    async def _whole(
        self, request: Request, body: Drawing, job: Job, model: Model, drawn: jobs.Drawn
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
        first: jobs.Event,
        later: AsyncIterator[jobs.Event],
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events: OpenAI's, with `.queued` and `.progress` beside them."""
        shared = {"background": "opaque", "quality": job.quality}
        event: jobs.Event | None = first
        beats = with_beats(later)
        try:
            while True:
                now = int(time.time())
                if event is None:
                    yield b": still here\n\n"
                elif isinstance(event, jobs.Queued):
                    yield answers.event(f"{prefix}.queued", before=event.before)
                elif isinstance(event, jobs.Stepped):
                    yield answers.event(f"{prefix}.progress", step=event.step, steps=event.steps)
                elif isinstance(event, jobs.Preview):
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
        except Exception as error:  # of our own making: the answer has begun, it can't be a 500
            logs.tell("failed", level=logging.ERROR, error=error, id=job.id)
            yield answers.event("error", **answers.error(own_error(job.id)))
        finally:
            await beats.aclose()

    async def _watched(
        self, job: Job, model: Model, note: dict[str, Any]
    ) -> AsyncGenerator[jobs.Event, None]:
        """The job's events; what came of it is counted and noted."""
        events = self.engine.submit(job)
        ended = False
        try:
            async for event in events:
                if isinstance(event, jobs.Drawn):
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

    async def _encoded(
        self, body: Drawing, job: Job, model: Model, drawn: jobs.Drawn
    ) -> list[bytes]:
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


async def _last(first: jobs.Event, later: AsyncIterator[jobs.Event]) -> jobs.Drawn:
    event = first
    while not isinstance(event, jobs.Drawn):
        event = await anext(later)
    return event


def _check_type(request: Request, wanted: str) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise Refused(400, "invalid_content_type", f"the body has to be of the type {wanted}")


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
