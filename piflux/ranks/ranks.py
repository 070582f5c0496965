"""How the ranks that share a model reach each other: over a process group, or in one process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.policies.parts import wide
from piflux.ranks.agreement import check_agreement
from piflux.ranks.copies import Copies, Peers, reach

# Under its name of torch 2.13, or else of before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
        here: the ranks that this process computes.
    """

    size: int
    rank: int
    here: Sequence[int]

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
        self._peers: dict[torch.device, Peers | None] = {}

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
        return _Collective(piece, self)

    def persistent_gather(self, count: int, device: torch.device) -> Gathering:
        if device not in self._peers:
            self._peers[device] = reach(self, device)
        peers = self._peers[device]
        if peers is not None:
            return Copies(count, peers)
        return _Collective(torch.empty(count, dtype=torch.uint8, device=device), self)

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
    """From the same memory into the same each time, so that what is recorded can read it.

    It holds the ranks, not their group; see `ProcessRanks`.
    """

    # It may be recorded, but then by all ranks or none.
    recordable = False

    def __init__(self, piece: Tensor, ranks: ProcessRanks) -> None:
        # Kept, because its memory must stay untouched until the collective has read it.
        self.piece = piece.contiguous()
        whole = piece.new_empty((ranks.size, *piece.shape))
        self.whole: Tensor | None = whole
        self.pieces: Sequence[Tensor] = whole.unbind(0)
        # Because gloo knows neither bfloat16 nor the 8-bit floats.
        self._to = whole.view(-1).view(torch.uint8)
        self._of = self.piece.view(-1).view(torch.uint8)
        self._ranks = ranks
        self._work: dist.Work | None = None

    def start(self) -> Gathering:
        self._work = all_gather(self._to, self._of, group=self._ranks.group, async_op=True)
        return self

    def wait(self) -> Sequence[Tensor]:
        """Raises RuntimeError where a peer died or timed out."""
        assert self._work is not None, "nothing was sent"
        self._work.wait()
        self._work = None
        return self.pieces


# Where a tensor's share of a packet's row begins, in bytes: kernels read so many at once.
ALIGNMENT = 16


class Packet:
    """Memory for several tensors that go to all ranks in one all-gather, once or over and over.

    An attention's keys and values are gathered so: each collective has a latency and a launch of
    its own, and a step of FLUX.1 has 57 attentions. What belongs to one token lies together, so
    that the tokens of all ranks, one rank's after the other's, are tensors of one stride.

    Args:
        ranks: who sends and receives.
        like: the tensors, each (.., part tokens, width), in any layout; those of the other ranks
            are like them.

    Attributes:
        under_way: whether it was sent and not yet waited for.
    """

    def __init__(self, ranks: Ranks, like: Sequence[Tensor]) -> None:
        self._shapes = [x.shape for x in like]
        self._dtypes = [x.dtype for x in like]
        self._device = like[0].device
        tokens = like[0].shape[-2]
        sizes = [x.nbytes // tokens for x in like]
        padded = [size + -size % ALIGNMENT for size in sizes]
        starts = [sum(padded[:i]) for i in range(len(sizes))]
        self._row = sum(padded)
        self._columns = [slice(a, a + size) for a, size in zip(starts, sizes, strict=True)]
        self._gathering = ranks.persistent_gather(tokens * self._row, self._device)
        self.recordable = self._gathering.recordable
        self.under_way = False

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it can hold these."""
        return (
            [x.shape for x in tensors] == self._shapes
            and [x.dtype for x in tensors] == self._dtypes
            and tensors[0].device == self._device
        )

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Copy in what is to be sent; `tensors` may then be written over."""
        for place, x in zip(self._opened(self._gathering.piece), tensors, strict=True):
            to, of = wide(place, x)
            to.copy_(of)

    def start(self) -> None:
        """Send what was written."""
        self._gathering.start()
        self.under_way = True

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        self._gathering.wait()
        self.under_way = False

    def read(self) -> Sequence[Sequence[Tensor]]:
        """What has arrived: for each of the tensors, one per rank, by rank."""
        return list(zip(*map(self._opened, self._gathering.pieces), strict=True))

    def read_whole(self) -> Sequence[Tensor] | None:
        """What has arrived: each of the tensors with the tokens of all ranks, rank by rank.

        None where they don't lie together.
        """
        whole = self._gathering.whole
        return None if whole is None else self._opened(whole)

    def _opened(self, packed: Tensor) -> list[Tensor]:
        """The tensors that a packet, or several that lie together, holds."""
        rows = packed.view(-1, self._row)
        return [
            rows[:, column].view(dtype).view(-1, *shape[:-2], shape[-1]).movedim(0, -2)
            for column, shape, dtype in zip(self._columns, self._shapes, self._dtypes, strict=True)
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
        return _Letters(self, piece)

    def persistent_gather(self, count: int, device: torch.device) -> Gathering:
        return _Letters(self, torch.empty(count, dtype=torch.uint8, device=device))

    def post(self, piece: Tensor) -> list[Tensor | None]:
        """Send a copy of `piece`. Returns one per rank, None where one has yet to send its own."""
        if self._sent == len(self._mail):
            self._mail.append([None] * self.size)
        pieces = self._mail[self._sent]
        self._sent += 1
        pieces[self.rank] = piece.clone()
        return pieces

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
    whole = None
    recordable = False

    def __init__(self, ranks: VirtualRanks, piece: Tensor) -> None:
        self.piece = piece
        self._ranks = ranks
        self._mail: list[Tensor | None] = []

    def start(self) -> Gathering:
        self._mail = self._ranks.post(self.piece)
        return self

    @property
    def pieces(self) -> Sequence[Tensor]:
        """A rank that has not run yet has its place held by this one's piece."""
        return [self.piece if piece is None else piece for piece in self._mail]

    def wait(self) -> Sequence[Tensor]:
        return self.pieces


def virtual_ranks(size: int) -> VirtualRanks:
    """`size` ranks in this process, for `parallelize(..., group=piflux.virtual_ranks(4))`.

    Every rank's cache is held here, and steps take as long as all ranks' together: it shows the
    images that real ranks would make, not their speed. Each call serves one `parallelize`.

    Raises:
        ValueError: fewer than one rank.
    """
    return VirtualRanks(size)
