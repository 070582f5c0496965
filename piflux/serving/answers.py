"""What clients get, in the shapes of OpenAI's images API."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import piflux
from piflux.serving.asked import PARAMETERS, Drawing
from piflux.serving.jobs import Job, Model, Refused, Report
from piflux.serving.limits import Limits
from piflux.serving.pictures import Format

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""OpenAI's `type` of an error by its status, where it is not that of all client's errors."""

MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

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


def error(refused: Refused) -> dict[str, Any]:
    """An error's body."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    field = refused.field
    return {
        "error": {
            "message": str(refused),
            "type": TYPES.get(refused.status, kind),
            "param": None if field is None else PARAMETERS.get(field, field),
            "code": refused.code,
        }
    }


def error_headers(refused: Refused) -> dict[str, str]:
    """An error's headers. OpenAI's clients ask again by themselves, unless told not to."""
    found = {}
    if refused.retry_after_s is not None:
        found["retry-after"] = str(max(1, math.ceil(refused.retry_after_s)))
    if refused.status in (500, 504):
        found["x-should-retry"] = "false"
    if refused.status == 401:
        found["www-authenticate"] = "Bearer"
    return found


def form(body: Drawing) -> Format:
    return body.output_format or "png"


def told(job: Job, seed: int, model: Model, report: Report) -> dict[str, Any]:
    """What a picture's file says of itself."""
    size = None if job.size is None else "x".join(map(str, job.size))
    found = {
        "prompt": job.prompt,
        "model": model.name,
        "seed": seed,
        "size": size,
        "steps": report.steps,
        "computed": report.computed,
        "guidance": job.guidance,
        "true_cfg": job.true_cfg,
        "negative": job.negative,
        "loras": ", ".join(f"{name}:{scale:g}" for name, scale in job.loras) or None,
        "quality": report.quality,
        "policy": report.policy,
        "ranks": report.ranks,
        "piflux": piflux.__version__,
    }
    return {name: value for name, value in found.items() if value is not None}


def settings(report: Report, job: Job, model: Model) -> dict[str, Any]:
    """How it was drawn: our own part of an answer."""
    return {
        "id": job.id,
        "model": model.name,
        "seeds": list(job.seeds),
        "quality": report.quality,
        "policy": report.policy,
        "lpips": report.lpips,
        "steps": report.steps,
        "computed": report.computed,
        "ranks": report.ranks,
        "waited_s": round(report.waited_s, 4),
        "drawn_s": round(report.drawn_s, 4),
        "batch": report.batch,
        "recovered": report.recovered,
    }


def answer(
    pictures: Sequence[Mapping[str, Any]],
    *,
    created: int,
    size: str,
    body: Drawing,
    drawn: Mapping[str, Any],
) -> dict[str, Any]:
    """An ImagesResponse of OpenAI's, with `piflux` beside it.

    Args:
        pictures: each with b64_json or url.
        created: seconds since 1970.
        size: width x height.
        body: the request.
        drawn: of `settings`.
    """
    return {
        "created": created,
        "data": list(pictures),
        "background": "opaque",
        "output_format": form(body),
        "quality": drawn["quality"],
        "size": size,
        "piflux": dict(drawn),
    }


def event(kind: str, **fields: Any) -> bytes:
    """A server-sent event."""
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def model_card(model: Model, limits: Limits, own: str) -> dict[str, Any]:
    """A model of OpenAI's list, with `piflux` beside it: what it takes, and how much.

    Args:
        model: what is served.
        limits: the operator's.
        own: the server's own quality.
    """
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "piflux",
        "piflux": {
            "pipeline": model.pipeline,
            "edits": model.edits,
            "images": limits.uploads if model.several else int(model.edits),
            "masks": model.masks,
            "negative_prompt": model.negative,
            "loras": list(model.loras),
            "size_multiple": model.multiple,
            "default_size": "x".join(map(str, model.default_size)),
            "default_steps": model.default_steps,
            "default_quality": own,
            "qualities": dict(model.promises),
            "example": model.example,
            "note": model.note,
            "limits": {
                "prompt": limits.prompt,
                "n": limits.pictures,
                "steps": limits.steps,
                "side": limits.side,
                "pixels": limits.pixels,
                "partial_images": limits.previews,
            },
        },
    }
