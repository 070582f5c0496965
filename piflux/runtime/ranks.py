"""How the ranks that share a model reach each other: over a process group, or in one process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.runtime.agreement import check_agreement

# Under its name of torch 2.13, or else of before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Gathering(Protocol):
    """An all-gather under way."""

    def wait(self) -> Sequence[Tensor]:
        """One tensor per rank, by rank, each shaped like this rank's own."""


class Ranks(Protocol):
    """The ranks of one model, as this process sees them.

    Attributes:
        size: how many there are.
        rank: whose part is being computed.
        here: the ranks that this process computes.
    """

    size: int
    rank: int
    here: Sequence[int]

    def gather(self, piece: Tensor) -> Gathering:
        """Start an all-gather of every rank's `piece`; all have one shape and dtype."""

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set on any rank. Synchronises host and device."""

    def least(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Of each value the least on any rank. Synchronises host and device."""

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        """Raises RanksDisagree on every rank where fingerprints differ."""

    def run(
        self, sync: bool, part: Callable[..., Any], whole: Callable[..., Any] | None, args: Any
    ) -> Any:
        """Run one step: `part` computes one rank's part, `whole` all tokens at once, if given."""


class ProcessRanks:
    """A rank a process.

    The group is held weakly: who destroys it means to, and gloo's threads must end before the
    interpreter does, which they can't while something keeps their group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.size = group.size()
        self.rank = group.rank()
        self.here: Sequence[int] = (self.rank,)

    @property
    def group(self) -> dist.ProcessGroup:
        """Raises RuntimeError after the group's end."""
        group = self._group()
        if group is None:
            raise RuntimeError(
                "the process group of this model was destroyed: parallelize it again in a new one"
            )
        return group

    def gather(self, piece: Tensor) -> Gathering:
        return _Collective(piece, self.group)

    def any(self, flag: bool, device: torch.device) -> bool:
        votes = torch.tensor([int(flag)], dtype=torch.int32, device=device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return bool(votes.item())

    def least(self, values: Sequence[float], device: torch.device) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
        return cast(list[float], found.tolist())

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        check_agreement(fingerprint, self.group)

    def run(
        self, sync: bool, part: Callable[..., Any], whole: Callable[..., Any] | None, args: Any
    ) -> Any:
        return whole(*args) if sync and whole is not None else part(*args)


class _Collective:
    def __init__(self, piece: Tensor, group: dist.ProcessGroup) -> None:
        # Bytes, because gloo knows neither bfloat16 nor the 8-bit floats. `piece` is kept: its
        # memory must stay untouched until the collective has read it.
        self.piece = piece.contiguous()
        self.buffer = self.piece.new_empty((group.size(), *self.piece.shape))
        self.work = all_gather(
            self.buffer.view(-1).view(torch.uint8),
            self.piece.view(-1).view(torch.uint8),
            group=group,
            async_op=True,
        )

    def wait(self) -> Sequence[Tensor]:
        """Raises RuntimeError where a peer died or timed out."""
        cast(dist.Work, self.work).wait()
        return self.buffer.unbind(0)


# Where a tensor of a packet begins, in bytes: kernels read so many at once.
ALIGNMENT = 16


class Packet:
    """Several tensors on their way to all ranks in one all-gather.

    An attention's keys and values are gathered so: each collective has a latency and a launch of
    its own, and a step of FLUX.1 has 57 attentions. What is sent is a copy, so that `tensors` may
    be written over at once.

    Args:
        ranks: who sends and receives.
        tensors: in any layout; those of the other ranks are like them.
    """

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor]) -> None:
        self._shapes = [x.shape for x in tensors]
        self._dtypes = [x.dtype for x in tensors]
        sizes = [x.nbytes + -x.nbytes % ALIGNMENT for x in tensors]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        packed = tensors[0].new_empty(sum(sizes), dtype=torch.uint8)
        for place, x in zip(self._opened(packed), tensors, strict=True):
            place.copy_(x)
        self._gathering = ranks.gather(packed)

    def wait(self) -> Sequence[Sequence[Tensor]]:
        """For each of the tensors, one per rank, by rank."""
        return list(zip(*map(self._opened, self._gathering.wait()), strict=True))

    def _opened(self, packed: Tensor) -> list[Tensor]:
        """The tensors that a packet holds."""
        return [
            packed[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for start, shape, dtype in zip(self._starts, self._shapes, self._dtypes, strict=True)
        ]


class VirtualRanks:
    """Several ranks in one process on one device, to see how far a policy's images drift.

    A sync step is computed once, by the graph that isn't cut; in the other steps the same graph
    that real ranks run computes part after part, each rank with a cache of its own.
    """

    def __init__(self, size: int) -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"virtual_ranks needs at least 1 rank, got {size!r}")
        self.size = size
        self.rank = 0
        self.here: Sequence[int] = range(size)
        self._mail: list[list[Tensor | None]] = []
        self._sent = 0

    def gather(self, piece: Tensor) -> Gathering:
        if self._sent == len(self._mail):
            self._mail.append([None] * self.size)
        pieces = self._mail[self._sent]
        self._sent += 1
        pieces[self.rank] = piece.clone()
        return _Letters(pieces, piece)

    def any(self, flag: bool, device: torch.device) -> bool:
        return flag

    def least(self, values: Sequence[float], device: torch.device) -> list[float]:
        return list(values)

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        pass  # with itself

    def run(
        self, sync: bool, part: Callable[..., Any], whole: Callable[..., Any] | None, args: Any
    ) -> Any:
        if sync:
            assert whole is not None
            return whole(*args)
        self._mail = []
        for rank in self.here:
            self.rank, self._sent = rank, 0
            result = part(*args)
        # Gathered values never flow back into attention, so only the last rank's must be complete.
        return result


class _Letters:
    def __init__(self, pieces: list[Tensor | None], own: Tensor) -> None:
        self.pieces = pieces
        self.own = own

    def wait(self) -> Sequence[Tensor]:
        """A rank that has not run yet has its place held by this one's piece."""
        return [self.own if piece is None else piece for piece in self.pieces]


def virtual_ranks(size: int) -> VirtualRanks:
    """`size` ranks in this process, for `parallelize(..., group=piflux.virtual_ranks(4))`.

    Every rank's cache is held here, and steps take as long as all ranks' together: it shows the
    images that real ranks would make, not their speed. Each call serves one `parallelize`.

    Raises:
        ValueError: fewer than one rank.
    """
    return VirtualRanks(size)
