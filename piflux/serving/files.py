"""Pictures that are fetched by their address, for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

KEPT_S = 3600.0
"""As OpenAI keeps its own."""


@dataclass(frozen=True)
class File:
    """One that is kept. `until` is of the store's clock."""

    data: bytes
    media: str
    until: float


class Files:
    """The latest files, in memory. Who knows a name may fetch its file: names can't be guessed.

    Args:
        bytes_: of all files together; the oldest go first.
        clock: in seconds.
    """

    def __init__(self, bytes_: int = 256 << 20, clock: Callable[[], float] = time.monotonic):
        self.room, self.bytes, self._clock = bytes_, 0, clock
        self._files: OrderedDict[str, File] = OrderedDict()

    def keep(self, data: bytes, suffix: str, media: str) -> str:
        """The name under which the file is found for an hour, if no newer ones need the room."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        self._files[name] = File(data, media, self._clock() + KEPT_S)
        self.bytes += len(data)
        self._forget()
        return name

    def find(self, name: str) -> File | None:
        self._forget()
        return self._files.get(name)

    def _forget(self) -> None:
        now = self._clock()
        while self._files:
            oldest = next(iter(self._files.values()))
            if oldest.until > now and self.bytes <= self.room:
                break
            self._files.popitem(last=False)
            self.bytes -= len(oldest.data)
