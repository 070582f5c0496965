"""All-gathers of equally shaped tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

# Under its name of torch 2.13, or else of before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Gathering:
    """An all-gather under way: `wait` gives one tensor per rank."""

    def __init__(self, piece: Tensor, group: dist.ProcessGroup) -> None:
        # Bytes, because gloo knows neither bfloat16 nor the 8-bit floats. `piece` is kept: its
        # memory must stay untouched until the collective has read it.
        self.piece = piece.contiguous()
        self.buffer = self.piece.new_empty((group.size(), *self.piece.shape))
        self.work = _all_gather(
            self.buffer.view(-1).view(torch.uint8),
            self.piece.view(-1).view(torch.uint8),
            group=group,
            async_op=True,
        )

    def wait(self) -> Sequence[Tensor]:
        """Shape of each: the piece's. Raises RuntimeError where a peer died or timed out."""
        cast(dist.Work, self.work).wait()
        return self.buffer.unbind(0)


def all_gather(piece: Tensor, group: dist.ProcessGroup) -> Sequence[Tensor]:
    """Every rank's `piece`, by rank. All must have one shape and dtype."""
    return Gathering(piece, group).wait()


def any_rank(flag: bool, device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether `flag` is set on any rank. Synchronises host and device."""
    votes = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return bool(votes.item())
