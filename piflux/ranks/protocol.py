"""How a model sees the ranks that share it, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Gathering(Protocol):
    """An all-gather, which may be started over once it was waited for.

    Attributes:
        piece: what this rank sends.
        pieces: what the latest one that was waited for has brought: one tensor per rank, by rank,
            each shaped like this rank's own.
        whole: the same as one tensor, (ranks, ..), if they lie together.
        recordable: whether `start` and `wait` may both be recorded, in one recording of
            `piflux.recording.recorded`, without the other ranks having to do so.
    """

    piece: Tensor
    recordable: bool

    @property
    def pieces(self) -> Sequence[Tensor]: ...

    @property
    def whole(self) -> Tensor | None: ...

    def start(self) -> Gathering:
        """Send what this rank's piece holds now. Returns itself."""

    def wait(self) -> Sequence[Tensor]:
        """Returns `pieces`."""


class Ranks(Protocol):
    """The ranks of one model, as this process sees them.

    Attributes:
        size: how many there are.
        rank: whose part is being computed.
        in_one_process: whether this process computes all of them, so that no link lies between.
    """

    size: int
    rank: int
    in_one_process: bool

    def gather(self, piece: Tensor) -> Gathering:
        """An all-gather of every rank's `piece`, to be started; all have one shape and dtype."""

    def persistent_gather(self, count: int, device: torch.device) -> Gathering:
        """An all-gather to be started over and over, as MPI's persistent collectives are.

        Args:
            count: bytes that every rank sends: its `piece`, memory of its own, in uint8.
            device: where they are.

        All ranks make as many, in one order.
        """

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set on any rank. Synchronises host and device."""

    def least(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Of each value the least on any rank. Synchronises host and device."""

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        """Raises RanksDisagree on every rank where fingerprints differ."""

    def run(self, step: Callable[[], Result]) -> Result:
        """Run one step for each rank that this process computes. Returns what the first returned.

        Within it `rank` says for which.
        """
