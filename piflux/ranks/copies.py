"""All-gathers by the copy engines: each rank writes its piece into the other GPUs' memory.

NCCL moves data by kernels, whose multiprocessors are then missing to the matrix products that run
meanwhile. Copy engines take none (docs/experiments.md has both, timed), and what they do can be
recorded with the step. It needs GPUs of one host that reach each other's memory, which torch
maps into each process (https://docs.pytorch.org/docs/stable/symmetric_memory.html).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

_ALIVE: WeakSet[Copies] = WeakSet()


def shared_bytes() -> int:
    """GPU memory of this process that other ranks see: no allocator's statistics know of it."""
    return sum(gathering.whole.nbytes for gathering in _ALIVE)


def peak_bytes() -> int:
    """Most GPU memory at once since `torch.cuda.reset_peak_memory_stats`, with what is shared."""
    return torch.cuda.max_memory_allocated() + shared_bytes()


class Shared(Protocol):
    """Memory of which each rank has as much, and all see all; torch's `_SymmetricMemory`."""

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, /) -> Tensor:
        """The memory of one rank."""

    def barrier(self, channel: int, timeout_ms: int) -> None:
        """What the current stream was given before is done on all ranks before what comes next."""


class Peers:
    """What the gathers of one group of ranks have in common: who takes part, and where they run.

    Args:
        group: the ranks.
        device: of this one.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group.group_name  # a name, since who destroys the group means to
        self.device = device
        self.module = torch.get_device_module(device)
        # Before the kernels of the step: they have just begun to wait for what is sent.
        self.stream = self.module.Stream(priority=-1)
        # A kernel that waits for ever could not even be aborted, as NCCL's are.
        self.timeout_ms = int(timeout(group, device).total_seconds() * 1000)

    def share(self, count: int) -> tuple[Tensor, Shared]:
        """So many bytes of each rank, with this rank's own. All ranks call it together."""
        from torch.distributed import _symmetric_memory as symmetric
        from torch.distributed._symmetric_memory import _SymmetricMemory

        # Not `empty`, which takes memory from a pool: where a rank finds room in it depends on what
        # it has freed, and ranks that share different places wait for ever or overwrite.
        memory = _SymmetricMemory.empty_strided_p2p((count,), (1,), torch.uint8, self.device)
        return memory, cast(Shared, symmetric.rendezvous(memory, self._group))


class Copies:
    """One all-gather, over and over; see `Gathering`.

    Args:
        count: bytes of a rank's piece.
        peers: who takes part.
    """

    recordable = True

    def __init__(self, count: int, peers: Peers) -> None:
        shape = peers.size, count
        memory, self._shared = peers.share(peers.size * count)
        self.whole = memory.view(shape)
        self.pieces: Sequence[Tensor] = self.whole.unbind(0)
        self.piece = self.pieces[peers.rank]
        # Each begins with its next neighbour, that not all write to the same one.
        others = [(peers.rank + i) % peers.size for i in range(1, peers.size)]
        self._theirs = [
            self._shared.get_buffer(other, shape, torch.uint8)[peers.rank] for other in others
        ]
        self._peers = peers
        _ALIVE.add(self)
        self._arrived = peers.module.Event()

    def start(self) -> Copies:
        """Send what the piece holds now. Returns itself."""
        peers = self._peers
        peers.stream.wait_stream(peers.module.current_stream())
        with peers.module.stream(peers.stream):
            self._shared.barrier(0, peers.timeout_ms)  # all have read what came last
            for there in self._theirs:
                there.copy_(self.piece, non_blocking=True)
            self._shared.barrier(1, peers.timeout_ms)  # all has been written
            self._arrived.record(peers.stream)
        return self

    def wait(self) -> Sequence[Tensor]:
        """What comes next finds `pieces`, which it returns."""
        self._arrived.wait(self._peers.module.current_stream())
        return self.pieces


def reach(
    group: dist.ProcessGroup,
    device: torch.device,
    vote: Callable[[bool, torch.device], bool],
) -> Peers | None:
    """Where gathers by copy engines run; None where there can't be any. All ranks call it together.

    They need every rank's GPU to reach every other's memory. NCCL's own switch, NCCL_P2P_DISABLE=1,
    holds here too.

    Args:
        group: the ranks.
        device: of this one.
        vote: whether a flag is set on any rank; see `Ranks.any`.
    """
    if device.type != "cuda":
        return None
    here = {_uuid(index): index for index in range(torch.cuda.device_count())}
    mine = socket.gethostname(), _uuid(device.index)
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, mine, group=group)
    reaches = (
        os.environ.get("NCCL_P2P_DISABLE") != "1"
        and torch.cuda.current_device() == device.index  # whose streams are used
        and all(
            host == mine[0]
            and uuid in here
            and torch.cuda.can_device_access_peer(device.index, here[uuid])
            for host, uuid in told
            if (host, uuid) != mine
        )
    )
    # In two rounds, so that who finds out alone that it can't leaves nobody waiting in the second.
    if len(set(told)) < group.size() or vote(not reaches, device):
        return None
    peers = Peers(group, device)
    try:
        Copies(1, peers)
    except RuntimeError as error:
        log.warning("no gathers by copy engines, GPUs can't share memory: %s", error)
        reaches = False
    return None if vote(not reaches, device) else peers


def timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """After which the group's collectives on such a device fail."""
    return group._get_backend(device).options._timeout


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
