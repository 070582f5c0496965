"""Gathers over the link of the present epoch, begun and waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.ranks.header import BYTES
from piflux.ranks.protocol import Gathering
from piflux.ranks.waiting import Waiting

ALIGNMENT = 16
"""Of a header, and of each rank's piece before one, in bytes."""


class Collective:
    """See `Gathering`: from the same memory into the same each time, so that what is recorded can
    read it.

    Args:
        piece: what this rank sends.
        size: how many ranks there are.
        waiting: of this rank.
        what: is sent, in words, the same on all ranks.
        header: see `Ranks.gather`.
    """

    # It may be recorded, but then by all ranks or none.
    recordable = False

    def __init__(
        self, piece: Tensor, size: int, waiting: Waiting, what: str, header: Tensor | None = None
    ) -> None:
        # Kept, because its memory must stay untouched until the collective has read it.
        self.piece = piece.contiguous()
        self._of = self.piece.view(-1).view(torch.uint8)
        count = self._of.numel()
        if header is not None:
            padding = self._of.new_empty(-count % ALIGNMENT)
            self._of = torch.cat([self._of, padding, header.to(piece.device).view(torch.uint8)])
        self._to = self._of.new_empty(size, self._of.numel())
        pieces = self._to[:, :count]
        self.whole: Tensor | None = (
            pieces.view(piece.dtype).unflatten(1, piece.shape) if piece.dim() else None
        )
        self.pieces: Sequence[Tensor] = [x.view(piece.dtype).view(piece.shape) for x in pieces]
        self._headers = None if header is None else self._to[:, -BYTES:].view(torch.float64)
        self._waiting = waiting
        # With its size, so that ranks that send different numbers of bytes are told so at once.
        self._what = f"{what} ({self._of.numel()} bytes)"
        self._works: Sequence[dist.Work] = ()

    def start(self) -> Gathering:
        self._works = self._waiting.start(self._to, self._of, self._what)
        return self

    def wait(self) -> Sequence[Tensor]:
        """Raises RankFailed, RankLost or RanksDisagree where a rank doesn't send the like."""
        self._waiting.finish(self._works, self._to.device, self._what)
        self._works = ()
        if self._headers is not None:
            self._waiting.compare(self._headers)
        return self.pieces


class Filling:
    """See `Filled`.

    Args:
        count: most bytes of a rank.
        rank: this one, among those that there are.
        size: how many there are.
        waiting: of this rank.
        device: where the memory is.
    """

    recordable = False

    def __init__(
        self, count: int, rank: int, size: int, waiting: Waiting, device: torch.device
    ) -> None:
        self.memory = torch.empty(size * count, dtype=torch.uint8, device=device)
        self._rank, self._size = rank, size
        self._waiting = waiting
        self._works: Sequence[dist.Work] = ()

    def fill(self, piece: Tensor, length: int, *, own: bool) -> None:
        whole = self.memory[: self._size * length].view(self._size, length)
        if piece.numel() < length:  # collectives take as much of every rank
            place = whole[self._rank]
            place[: piece.numel()].copy_(piece)
            piece = place
        self._works = self._waiting.start(whole, piece, "weights")

    def wait(self) -> None:
        """Raises RankFailed, RankLost or RanksDisagree where a rank doesn't send the like."""
        self._waiting.finish(self._works, self.memory.device, "weights")
        self._works = ()
