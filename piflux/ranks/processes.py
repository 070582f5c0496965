"""A rank a process, over a process group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.ranks.agreement import check_agreement
from piflux.ranks.copies import Copies, Peers, reach
from piflux.ranks.protocol import Gathering, Result

# Under its name of torch 2.13, or else of before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessRanks:
    """A rank a process.

    The group is held weakly: who destroys it means to, and gloo's threads must end before the
    interpreter does, which they can't while something keeps their group.
    """

    in_one_process = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.size = group.size()
        self.rank = group.rank()
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
            self._peers[device] = reach(self.group, device, self.any)
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

    def run(self, step: Callable[[], Result]) -> Result:
        return step()


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
