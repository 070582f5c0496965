"""The headers of an image's predictions, compared: at once on CPUs, on a GPU when it is through.

On a GPU the host is steps ahead: nothing is waited for in between, so what differs is known at the
image's end, and what a rank wishes a step later.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import torch
from torch import Tensor

from piflux.ranks.header import apart, tell, wishes


class Predictions:
    """Those of one epoch.

    Attributes:
        progress: when a GPU last came to the end of a step, or was given the first, by
            `time.monotonic`.
    """

    def __init__(self) -> None:
        self.progress = time.monotonic()
        self._wished = False
        self._wishes: deque[tuple[torch.cuda.Event, Tensor]] = deque()  # on a GPU, step by step
        self._given: deque[torch.cuda.Event] = deque()  # after each step that a GPU was given
        self._differing: tuple[Tensor, Tensor] | None = None  # on a GPU: whether any, and which
        self._looking = threading.Lock()

    def begin(self) -> None:
        """An image begins, in which nobody has wished for its end."""
        self._wished = False
        self._wishes.clear()

    def compare(self, headers: Tensor) -> str | None:
        """A prediction's, of all ranks. Returns what differs; on a GPU `differing` does.

        Args:
            headers: (ranks, numbers); see `piflux.ranks.header`.
        """
        differ = apart(headers)
        if not headers.is_cuda:
            self._wished |= bool(wishes(headers))
            return tell(headers) if differ else None
        flag, before = differ.reshape(1, 1), self._differing
        if before is not None and before[1].shape == headers.shape:
            flag, headers = before[0] | flag, torch.where(before[0], before[1], headers)
        self._differing = flag, headers.clone()
        wished = torch.empty((), dtype=torch.bool, pin_memory=True)
        wished.copy_(wishes(headers), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._wishes.append((event, wished))
        if not self._given:
            self.progress = time.monotonic()
        self._given.append(event)
        return None

    def wishes_known(self) -> bool:
        """Whether `wished` has all that it needs."""
        return len(self._wishes) < 2 or self._wishes[-2][0].query()

    def wished(self) -> bool:
        """Whether any rank wants the image to end. On a GPU its latest prediction is left out, for
        which the host would have to wait."""
        while len(self._wishes) > 1:
            event, wished = self._wishes.popleft()
            self._wished |= event.query() and bool(wished)
        return self._wished

    def is_device_busy(self) -> bool:
        """Whether steps were given to a GPU that it hasn't come to an end of."""
        with self._looking:  # both threads do
            while self._given and self._given[0].query():
                self._given.popleft()
                self.progress = time.monotonic()
            return bool(self._given)

    def differing(self) -> str | None:
        """What differed on a GPU since this was last asked. Waits for it."""
        kept, self._differing = self._differing, None
        return tell(kept[1].cpu()) if kept is not None and bool(kept[0]) else None
