"""One epoch's connections: made for its members, and ended with it.

On CPUs a gather is a message to each of the others, under a tag that says what it is: of which
kind, how many bytes, the how many-th of the epoch. So what ranks mean differently never meets, of
which gloo would end the process. On GPUs it is NCCL's all-gather.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.ranks.meeting import Meeting

FOREVER = timedelta(days=1)
"""No collective fails by a timeout of torch's: `Waiting` counts, and knows what others do."""

NEVER = 2**30
"""A tag that no message has."""

BLOCK = 2048
"""Bytes of the first message of an exchange; a second one follows only what is longer."""


class Link:
    """Connections of the ranks of one epoch.

    Args:
        meeting: theirs alone.
        within_s: seconds to connect.

    Attributes:
        broken: whether it was ended; what was under way raises RuntimeError.
        left: set once the main thread knows, and gives the device no more work of this epoch.
        named: the group that torch knows by this link's name, by the type of a device; see
            `piflux.ranks.copies`.
    """

    def __init__(self, meeting: Meeting, within_s: float) -> None:
        self.meeting, self.size = meeting, meeting.size
        self.broken = False
        self.left = threading.Event()
        self.named: dict[str, dist.ProcessGroup] = {}
        self._others = [(meeting.rank + i) % self.size for i in range(1, self.size)]
        self._started = itertools.count()
        self._nccl: Any = None
        self._at_end: list[Callable[[], None]] = []
        self._gloo: Any = None
        if self.size > 1:
            store, within = dist.PrefixStore("gloo", meeting.store), timedelta(seconds=within_s)
            self._gloo = dist.ProcessGroupGloo(store, meeting.rank, self.size, within)
            self._gloo._set_default_timeout(FOREVER)

    def gather(self, whole: Tensor, piece: Tensor, what: str) -> Sequence[dist.Work]:
        """Start to send `piece` to all, and to receive theirs: (ranks, ..) of uint8.

        `whole` must stay as it is until all that is returned was waited for; on a GPU `piece`, too.
        """
        if piece.is_cuda:
            if self.broken:
                raise RuntimeError("the connections between ranks have been ended")
            return [self._on_gpu(piece.device)._allgather_base(whole.view(-1), piece)]
        return self._send(whole, piece, f"{what} {next(self._started)}")

    def _send(self, whole: Tensor, piece: Tensor, what: str) -> Sequence[dist.Work]:
        # What is sent lies with what arrives, so that the piece may be written over meanwhile.
        mine = whole[self.meeting.rank].copy_(piece)
        tag = zlib.crc32(f"{what} {piece.numel()}".encode()) % NEVER
        # Receiving first, that no message has to wait in between; to the next rank first, that not
        # all send to the same one.
        works = [self._gloo.recv([whole[other]], other, tag) for other in reversed(self._others)]
        return works + [self._gloo.send([mine], other, tag) for other in self._others]

    def exchange(self, mine: bytes) -> list[bytes]:
        """Everyone's bytes, by rank, of any length."""
        number = next(self._started)
        first = len(mine).to_bytes(8, "little") + mine[: BLOCK - 8]
        piece = torch.frombuffer(bytearray(first.ljust(BLOCK, b"\0")), dtype=torch.uint8)
        whole = torch.empty(self.size, BLOCK, dtype=torch.uint8)
        self.wait(self._send(whole, piece, f"exchange {number}"), whole.device)
        blocks = [bytes(x.numpy()) for x in whole]
        lengths = [int.from_bytes(x[:8], "little") for x in blocks]
        longest = max(lengths)
        rest = longest - (BLOCK - 8)
        if rest <= 0:
            return [x[8 : 8 + n] for x, n in zip(blocks, lengths, strict=True)]
        tail = torch.frombuffer(bytearray(mine[BLOCK - 8 :].ljust(rest, b"\0")), dtype=torch.uint8)
        tails = torch.empty(self.size, rest, dtype=torch.uint8)
        self.wait(self._send(tails, tail, f"rest of exchange {number}"), tails.device)
        everyones = zip(blocks, tails, lengths, strict=True)
        return [(x[8:] + bytes(y.numpy()))[:n] for x, y, n in everyones]

    @staticmethod
    def wait(works: Sequence[dist.Work], device: torch.device) -> None:
        """What comes next on the device finds what was gathered; on CPUs it is there.

        Raises:
            RuntimeError: the link was ended, here or by another rank.
        """
        for work in works:
            # With a time to wait for, NCCL has the host wait.
            work.wait() if device.type == "cuda" else work.wait(FOREVER)

    def _on_gpu(self, device: torch.device) -> Any:
        if self.meeting.backends.get("cuda") != "nccl":
            return self._gloo
        if self._nccl is None:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = FOREVER
            store = dist.PrefixStore("nccl", self.meeting.store)
            with _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):  # which ends the process
                self._nccl = dist.ProcessGroupNCCL(store, self.meeting.rank, self.size, options)
        return self._nccl

    def at_end(self, act: Callable[[], None]) -> None:
        """Call `act` when the link is ended: what waits on the device for others stops waiting."""
        self._at_end.append(act)

    def end(self) -> None:
        """End what is under way here, and let the others know. From any thread, any number of
        times."""
        self.broken = True
        if self.size == 1:
            return
        # To time out is what closes the connections of a group of gloo's, all of them and at once.
        # One that is closed doesn't time out, and says nothing of the others.
        for other in self._others:
            with contextlib.suppress(RuntimeError):
                work = self._gloo.recv([torch.empty(1)], other, NEVER)
                work.wait(timedelta(milliseconds=1))
        ends, self._at_end = self._at_end, []
        for act in ends:
            act()
        nccl, self._nccl = self._nccl, None
        if nccl is not None:
            nccl.abort()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Inside, these are set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
