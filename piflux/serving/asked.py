"""What requests may say: OpenAI's images API and fields of our own; and the job that is meant."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from piflux.serving.jobs import Job, Model, Quality, Refused
from piflux.serving.limits import Limits

LARGEST_SEED = 2**64 - 1
"""Of torch's generators."""

BINARY = {"type": "string", "format": "binary"}
"""A file's schema in a form."""

PARAMETERS = {
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "images": "image",
    "loras": "lora",
    "seeds": "seed",
    "previews": "partial_images",
}
"""What requests call a job's fields, where it is something else."""


class Drawing(BaseModel):
    """The fields of both kinds of request. `bodies` adds the operator's limits."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, description="The model's id; there is one.")
    n: int | None = Field(None, ge=1, description="Pictures; 1 if left out.")
    size: str | None = Field(
        None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="Width x height, or auto."
    )
    quality: Literal["auto", "lossless", "high", "medium", "low", "standard", "hd"] | None = Field(
        None, description="A promise: auto and standard are the server's own, hd lossless."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json if left out. A url's file is kept for an hour."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="Else png.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Of jpeg and webp; 100 is the best picture."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(
        None, description="Is taken and does nothing: no prompt and no picture is looked at."
    )
    user: str | None = Field(None, max_length=200, description="For fairness between users.")
    stream: bool | None = Field(None, description="Server-sent events instead of one answer.")
    partial_images: int | None = Field(None, ge=0, description="Previews, if it is streamed.")
    negative_prompt: str | None = Field(None, description="What not to draw.")
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="Of the first picture; the next has the next."
    )
    num_inference_steps: int | None = Field(None, ge=1, description="Else the pipeline's own.")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="Else the pipeline's own."
    )
    true_cfg_scale: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, description="With a negative prompt."
    )
    lora: str | list[str] | None = Field(None, description="Names of the server's, as name:scale.")
    deadline_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds by which it has to be drawn."
    )


@dataclass(frozen=True)
class Bodies:
    """The two kinds of request under an operator's limits.

    Attributes:
        json: of generations, strict about types.
        form: of edits, whose fields are text.
    """

    json: type[Drawing]
    form: type[Drawing]


def bodies(limits: Limits) -> Bodies:
    """What may be asked under these limits."""

    class Generation(Drawing):
        model_config = ConfigDict(extra="forbid", strict=True)

        prompt: Annotated[str, Field(min_length=1, max_length=limits.prompt)]
        negative_prompt: Annotated[str | None, Field(max_length=limits.prompt)] = None
        n: Annotated[int | None, Field(ge=1, le=limits.pictures)] = None
        partial_images: Annotated[int | None, Field(ge=0, le=limits.previews)] = None
        num_inference_steps: Annotated[int | None, Field(ge=1, le=limits.steps)] = None
        deadline_s: Annotated[
            float | None, Field(gt=0, le=limits.deadline_s, allow_inf_nan=False)
        ] = None

    class Edit(Generation):
        model_config = ConfigDict(extra="forbid", strict=False)

    for kind in (Generation, Edit):  # a field that is written anew has lost what it is for
        for name, field in kind.model_fields.items():
            field.description = Drawing.model_fields[name].description
        kind.model_rebuild(force=True)
    return Bodies(Generation, Edit)


def schema(kind: type[Drawing], *, files: bool) -> dict[str, Any]:
    """A body's JSON schema, for OpenAPI.

    Args:
        kind: of `bodies`.
        files: whether it has pictures, as a form.
    """
    found = kind.model_json_schema()
    for value in found["properties"].values():
        value.pop("title", None)
    if files:
        found["properties"] |= {
            "image": {"type": "array", "items": BINARY, "description": "PNG, JPEG or WebP."},
            "mask": BINARY | {"description": "Transparent, or white, where it is painted anew."},
        }
        found["required"] = ["prompt", "image"]
    return found


def read(kind: type[Drawing], data: bytes | dict[str, Any]) -> Drawing:
    """A request's fields.

    Args:
        kind: of `bodies`.
        data: JSON, or the fields of a form.

    Raises:
        Refused: with the field that is wrong.
    """
    try:
        if isinstance(data, bytes):
            return kind.model_validate_json(data)
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(x) for x in first["loc"][:1]) or None
        raise Refused(400, *_said(where, first["type"], first["msg"]), field=where) from None


def _said(where: str | None, kind: str, message: str) -> tuple[str, str]:
    """A code and a sentence for what pydantic found."""
    if kind == "extra_forbidden":
        meant = PARAMETERS.get(str(where))
        instead = "see /openapi.json" if meant is None else f"it is called {meant}"
        return "unknown_parameter", f"{where}: there is no such field, {instead}"
    if kind == "missing":
        return "missing_required_parameter", f"{where}: it is missing"
    if kind == "json_invalid":
        return "invalid_json", message
    if where is None:
        return "invalid_json", "the body has to be a JSON object"
    return "invalid_value", f"{where}: {message[0].lower()}{message[1:]}"


def job(
    body: Drawing,
    model: Model,
    limits: Limits,
    *,
    own: Quality,
    id: str,
    user: str,
    images: Sequence[Image.Image] = (),
    mask: Image.Image | None = None,
) -> Job:
    """What is to be drawn, and no more than may be asked of this model.

    Args:
        body: the request's fields.
        model: what is served.
        limits: the operator's.
        own: the server's quality, for who names none.
        id: of the request.
        user: who asks; the request's own `user` is a part of it.
        images: as they were sent.
        mask: white where the picture is painted anew.

    Raises:
        Refused: with the field that is wrong.
    """
    if body.model is not None and body.model != model.name:
        raise Refused(
            404,
            "model_not_found",
            f"model: there is no {body.model!r} here, only {model.name!r}",
            field="model",
        )
    if mask is not None and not model.masks:
        raise _wrong("mask", f"{model.pipeline} takes no masks")
    if body.negative_prompt and not model.negative:
        raise _wrong("negative_prompt", f"{model.pipeline} takes none")
    if not body.prompt.strip():
        raise _wrong("prompt", "it is empty, say what to draw")
    if body.partial_images and not body.stream:
        raise _wrong("partial_images", "previews come by events: take stream true, too")
    if body.stream and body.response_format == "url":
        raise _wrong("response_format", "events hold pictures themselves: leave it out")
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise _wrong("output_compression", "a PNG is exact: take output_format webp or jpeg")
    pictures = body.n or 1
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    if seed + pictures - 1 > LARGEST_SEED:
        raise _wrong("seed", f"the last of {pictures} seeds is beyond 64 bits")
    return Job(
        id=id,
        prompt=body.prompt,
        seeds=tuple(range(seed, seed + pictures)),
        quality=_quality(body, own),
        size=_size(body.size, model, limits),
        steps=body.num_inference_steps,
        guidance=body.guidance_scale,
        true_cfg=body.true_cfg_scale,
        negative=body.negative_prompt or None,
        images=tuple(image.convert("RGB") for image in images),
        mask=mask,
        loras=_loras(body.lora, model, limits),
        user=f"{user}/{body.user}" if body.user else user,
        deadline_s=body.deadline_s,
        previews=body.partial_images or 0,
    )


def _wrong(field: str, why: str) -> Refused:
    return Refused(400, "invalid_value", f"{field}: {why}", field=field)


def _quality(body: Drawing, own: Quality) -> Quality:
    """The promise that is asked for, in our words."""
    named = body.quality
    if named is None or named == "auto" or named == "standard":
        return own
    return "lossless" if named == "hd" else named


def _size(text: str | None, model: Model, limits: Limits) -> tuple[int, int] | None:
    if text in (None, "auto"):
        return None
    width, height = (int(side) for side in str(text).split("x"))
    for side in (width, height):
        if side < model.multiple or side % model.multiple:
            raise _wrong("size", f"sides are multiples of {model.multiple} pixels, not {side}")
        if side > limits.side:
            raise _wrong("size", f"a side has {limits.side} pixels at most, not {side}")
    if width * height > limits.pixels:
        raise _wrong("size", f"{text} is more than {limits.pixels:,} pixels")
    return width, height


def _loras(
    asked: str | list[str] | None, model: Model, limits: Limits
) -> tuple[tuple[str, float], ...]:
    """'style:0.8' -> ('style', 0.8); without a scale, 1."""
    texts = [asked] if isinstance(asked, str) else asked or []
    if len(texts) > limits.loras:
        raise _wrong("lora", f"{limits.loras} at most, not {len(texts)}")
    found = []
    for text in texts:
        name, _, scale = text.rpartition(":")
        if name not in model.loras or not re.fullmatch(r"-?[0-9]*\.?[0-9]+", scale):
            name, scale = text, "1"
        if name not in model.loras:
            known = ", ".join(model.loras) or "none"
            raise _wrong("lora", f"there is no {name[:100]!r} here; there is: {known}")
        if not math.isfinite(float(scale)) or abs(float(scale)) > 10:
            raise _wrong("lora", f"the scale of {name!r} is not within -10 and 10")
        found.append((name, float(scale)))
    if len({name for name, _ in found}) < len(found):
        raise _wrong("lora", "the same name twice")
    return tuple(found)
