"""How much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is refused before it is queued, and told in the OpenAPI schema.

    Attributes:
        prompt: characters of a prompt, likewise of a negative one.
        pictures: of one request.
        steps: denoise steps.
        side: pixels of a picture's longer side.
        pixels: of a picture.
        previews: of one request.
        loras: of one request.
        json_bytes: of a request's JSON.
        uploads: pictures of one request, its mask left out.
        upload_bytes: of a request with pictures, all of it.
        upload_pixels: of a request's pictures and its mask together, found in their headers.
        head_s: seconds in which a request's head has to arrive, from the connection's beginning or
            its first byte.
        body_s: seconds in which a request's body has to arrive.
        deadline_s: the latest deadline, in seconds, that a request may ask for.
    """

    prompt: int = 4000
    pictures: int = 4
    steps: int = 100
    side: int = 4096
    pixels: int = 2048 * 2048
    previews: int = 3
    loras: int = 4
    json_bytes: int = 1 << 20
    uploads: int = 4
    upload_bytes: int = 32 << 20
    upload_pixels: int = 4096 * 4096
    head_s: float = 20.0
    body_s: float = 60.0
    deadline_s: float = 3600.0
