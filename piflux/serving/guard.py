"""What every request passes before it is read, and every answer before it is sent."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from piflux.serving import answers, logs
from piflux.serving.jobs import Refused
from piflux.serving.keys import Keys
from piflux.serving.limits import Limits
from piflux.serving.metrics import Metrics

OPEN = frozenset({"/", "/page.css", "/page.js", "/healthz", "/readyz", "/openapi.json"})
"""Paths that need no key, beside /files/, whose names are keys themselves."""

UPLOADS = "/v1/images/edits"
"""The one path whose bodies hold pictures."""

NOTE = "piflux.note"
"""Where in a request's scope handlers leave what its log line is to say."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""That metrics tell apart."""

GONE = 499
"""In logs and metrics: the client went away before its answer. Of nginx."""

SAFE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
"""Of every answer that does not say otherwise."""


class Told:
    """Gives each request an id, a log line, a place in the metrics and an answer.

    Args:
        app: what answers.
        metrics: the server's.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        asked = Headers(scope=scope).get("x-request-id", "")
        id = asked if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", asked) else uuid.uuid4().hex
        note: dict[str, Any] = {"id": id}
        scope[NOTE] = note
        status: int | None = None

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except ClientDisconnect:
            note["status"] = GONE
        except asyncio.CancelledError:  # the server ends, and waits for nobody
            if status is not None:
                raise
            ending = Refused(503, "ending", "the server ends", retry_after_s=5)
            await refusal(ending)(scope, receive, sending)
        except Exception as error:
            # Of our own making: told whole here, and by its id to the client.
            logs.tell("failed", level=logging.ERROR, error=error, id=id)
            if status is None:
                await refusal(own_error(id))(scope, receive, sending)
        finally:
            self._tell(scope, note, note.pop("status", status), time.perf_counter() - began)

    def _tell(
        self, scope: Scope, note: Mapping[str, Any], status: int | None, seconds: float
    ) -> None:
        # What clients make up is not to become names of metrics.
        route = getattr(scope.get("route"), "path", "other")
        known = route != "other" and scope["method"] in METHODS
        method = scope["method"] if known else "other"
        self.metrics.requests.labels(route, method, status or GONE).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        client = scope.get("client")
        logs.tell(
            "request",
            method=scope["method"],
            path=route if route.startswith("/files/") else scope["path"],  # names are keys
            status=status or GONE,
            seconds=round(seconds, 4),
            client=client[0] if client else None,
            **note,
        )


class Guard:
    """Refuses who has no key, comes from a stranger's page, or sends more than is read.

    Args:
        app: what answers.
        keys: whose holders may ask; None for everyone who reaches the server.
        hosts: names by which the server may be called, None for any. Else a stranger's page could
            reach a server on this host under a name of its own.
        limits: of bodies.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys | None, hosts: Collection[str] | None, limits: Limits
    ) -> None:
        self.app, self.keys, self.hosts, self.limits = app, keys, hosts, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            scope[NOTE]["user"] = self._who(scope, headers)
            most = self._most(scope, headers)
        except Refused as refused:
            await refusal(refused)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive, most), send)

    def _who(self, scope: Scope, headers: Headers) -> str:
        """Who asks: the holder of a key, else the address."""
        path = scope["path"]
        client = scope.get("client")
        address = client[0] if client else ""
        if self.keys is None:
            self._check_origin(headers)
            return address
        if path in OPEN or path.startswith("/files/"):
            return address
        scheme, _, key = headers.get("authorization", "").partition(" ")
        holder = self.keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            raise Refused(
                401,
                "invalid_api_key",
                "this server wants an API key, as 'Authorization: Bearer KEY'"
                if not key
                else "this API key is not one of the server's",
            )
        return holder

    def _check_origin(self, headers: Headers) -> None:
        """Without keys a browser must not be a way in for pages of other servers."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise Refused(
                403, "wrong_host", f"this server is not {host[:100]!r}: call it by its own name"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "cross_origin", "pages of other servers may not ask this one")
        if origin is None and headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "cross_origin", "pages of other servers may not ask this one")

    def _most(self, scope: Scope, headers: Headers) -> int:
        """Bytes that this request's body may have."""
        most = self.limits.json_bytes
        if scope["path"] == UPLOADS:
            most = self.limits.upload_bytes
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise _too_large(most)
        return most

    def _counted(self, receive: Receive, most: int) -> Receive:
        """`receive`, for no more bytes and seconds than a body may take."""
        loop = asyncio.get_running_loop()
        until, read, whole = loop.time() + self.limits.body_s, 0, False

        async def receiving() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - loop.time())
            except asyncio.TimeoutError:
                raise HTTPException(
                    408, f"the body did not arrive within {self.limits.body_s:g} s"
                ) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > most:
                raise HTTPException(413, str(_too_large(most)))
            return message

        return receiving


def refusal(refused: Refused) -> JSONResponse:
    """An error's answer."""
    return JSONResponse(
        answers.error(refused), refused.status, headers=answers.error_headers(refused)
    )


def own_error(id: str) -> Refused:
    """What a client is told of an exception of ours: where its log lines are found."""
    return Refused(500, "internal_error", f"an error of the server's own, in its log under {id}")


def is_loopback(host: str) -> bool:
    """Whether only this host reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _too_large(most: int) -> Refused:
    return Refused(413, "too_large", f"the body has more than {most / 2**20:g} MiB")


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
