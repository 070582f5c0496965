"""Forms with pictures, read into fields and pictures."""

from __future__ import annotations

import asyncio
from typing import Any

from PIL import Image
from starlette.datastructures import FormData, UploadFile

from piflux.serving.jobs import Refused
from piflux.serving.limits import Limits
from piflux.serving.pictures import painted_anew, read_upload

FIELDS = 100
"""Of a form. There are fewer, and a list of adapters takes one for each."""


class Uploads:
    """The pictures of a form, not yet decoded: to edit, and masks."""

    def __init__(self) -> None:
        self.images: list[UploadFile] = []
        self.masks: list[UploadFile] = []


def fields_of(form: FormData) -> tuple[dict[str, Any], Uploads]:
    """What a form says, and its files.

    Lists may be written as OpenAI's client does it: `image[]`.

    Raises:
        Refused: a file is a field or a field a file, or one is there twice.
    """
    fields: dict[str, Any] = {}
    uploads = Uploads()
    kinds = {"image": uploads.images, "mask": uploads.masks}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name in kinds:
            if isinstance(value, str):
                raise Refused(400, "invalid_image", f"{name}: it has to be a file", field=name)
            kinds[name].append(value)
        elif not isinstance(value, str):
            raise Refused(400, "unknown_parameter", f"{key}: takes no file", field=key)
        elif name == "lora":
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise Refused(400, "invalid_value", f"{key}: it is there twice", field=key)
        else:
            fields[name] = value
    return fields, uploads


async def pictures_of(
    uploads: Uploads, limits: Limits, turn: asyncio.Semaphore
) -> tuple[list[Image.Image], Image.Image | None]:
    """The pictures, and the mask if there is one, decoded beside the loop.

    Args:
        uploads: of `fields_of`.
        limits: of their number and pixels.
        turn: to be had for decoding one.

    Raises:
        Refused: there are none or too many, one is broken, or the mask is none of the first.
    """
    if not uploads.images:
        raise Refused(400, "missing_required_parameter", "image: it is missing", field="image")
    if len(uploads.images) > limits.uploads or len(uploads.masks) > 1:
        most = f"image: {limits.uploads} pictures and one mask at most"
        raise Refused(400, "invalid_value", most, field="image")
    left, found = limits.upload_pixels, []
    named = [("image", upload) for upload in uploads.images]
    for name, upload in named + [("mask", upload) for upload in uploads.masks]:
        data = await upload.read()
        async with turn:
            image = await asyncio.to_thread(read_upload, data, name, left)
        left -= image.width * image.height
        found.append(image)
    if not uploads.masks:
        return found, None
    mask = found.pop()
    if mask.size != found[0].size:
        sizes = f"it has {_pixels(mask)} pixels, the picture {_pixels(found[0])}"
        raise Refused(400, "invalid_value", f"mask: {sizes}", field="mask")
    return found, painted_anew(mask)


def _pixels(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
