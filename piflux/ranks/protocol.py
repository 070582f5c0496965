"""How a model sees the ranks that share it, wherever they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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


class Filled(Protocol):
    """Memory that all-gathers fill over and over, each time with other pieces.

    Attributes:
        memory: (bytes,), of uint8: what the latest one that was waited for has brought, by rank.
        recordable: see `Gathering`.
    """

    memory: Tensor
    recordable: bool

    def fill(self, piece: Tensor, length: int, *, own: bool) -> None:
        """Start to gather everyone's piece.

        What was given to the device before this still finds what came last.

        Args:
            piece: (at most `length` bytes,); it stays as it is until it was waited for.
            length: of each rank's place in the memory, the same on all ranks.
            own: whether this rank's piece has to come to its place, too.
        """

    def wait(self) -> object:
        """What comes next on the device finds all pieces, each in its rank's place."""


class Ranks(Protocol):
    """The ranks of one model, as this process sees them.

    Attributes:
        size: how many there are; fewer, when one was lost.
        rank: whose part is being computed.
        in_one_process: whether this process computes all of them, so that no link lies between.
    """

    in_one_process: bool

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def epoch(self) -> int:
        """Changes when ranks have met anew; what they shared before is of no use then."""

    doing: str
    """What they are at, for messages."""

    busy: bool
    """Whether that is compiling, which others wait for longer than for anything else."""

    calling: threading.RLock
    """Held by the thread that calls a model of theirs."""

    wish: bool
    """Whether this rank wants the image under way to end: told with the next prediction."""

    def image(self) -> AbstractContextManager[None]:
        """An image, with all its calls: what leaves it is told to all."""

    def at(self) -> tuple[int, int]:
        """The number of the image, and of the call in it."""

    def settle(self) -> None:
        """An image ends: raise what was left to be looked at until then.

        Raises:
            RanksDisagree: headers differed, on a GPU.
            RankFailed: a rank stopped meanwhile, or is lost.
        """

    def calls(self) -> str:
        """One more call of a model begins. Returns how many there have been, the same on all."""

    def surviving(self, act: Callable[[], Result], what: str) -> Result:
        """Do what all ranks do together, and once more without a rank that is lost meanwhile.

        Args:
            act: may be begun again, as long as it didn't return.
            what: it is, for ranks to know that they are at the same point.

        Raises:
            RankFailed: the ranks that are left are at different points.
        """

    def stop(self, error: BaseException) -> None:
        """What a rank raises, that none waits for it; nothing if all raise it alike."""

    def gather(self, piece: Tensor, header: Tensor | None = None) -> Gathering:
        """An all-gather of every rank's `piece`, to be started; all have one shape and dtype.

        Args:
            piece: what this rank sends.
            header: what is to be the same on all ranks; see `piflux.ranks.header`.
        """

    def persistent_gather(self, count: int, device: torch.device) -> Gathering:
        """An all-gather to be started over and over, as MPI's persistent collectives are.

        Args:
            count: bytes that every rank sends: its `piece`, memory of its own, in uint8.
            device: where they are.

        All ranks make as many, in one order.
        """

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. The host waits for the others'."""

    def least(self, values: Sequence[float]) -> list[float]:
        """Of each value the least on any rank. The host waits for the others'."""

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        """Raises RanksDisagree on every rank where fingerprints differ."""

    def run(self, step: Callable[[], Result]) -> Result:
        """Run one step for each rank that this process computes. Returns what the first returned.

        Within it `rank` says for which.
        """
