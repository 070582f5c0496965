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
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as distributed

from piflux.ranks.links import Link

log = logging.getLogger(__name__)

_ALIVE: WeakSet[Copies] = WeakSet()

CHANNELS = 2
"""Of barriers: before a gather and after it."""

FOREVER_MS = 24 * 3600 * 1000
"""No barrier ends by itself: it would trap, after which the GPU is of no use to the process. The
link's end ends it, see `Peers`."""


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

    def get_signal_pad(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, /) -> Tensor:
        """The flags by which barriers of one rank know of the others."""

    def barrier(self, channel: int, timeout_ms: int) -> None:
        """What the current stream was given before is done on all ranks before what comes next."""


class Peers:
    """What the gathers of one group of ranks have in common: who takes part, and where they run.

    Args:
        link: between them.
        device: of this one.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        meeting = link.meeting
        self.rank, self.size = meeting.rank, meeting.size
        self._group: Any = f"piflux-{meeting.name}"  # torch has a type of its own for names
        self._store = dist.PrefixStore(f"copies-{device.type}", meeting.store)
        self.device = device
        self.module = torch.get_device_module(device)
        # Before the kernels of the step: they have just begun to wait for what is sent.
        self.stream = self.module.Stream(priority=-1)
        # Of what is needed later than keys and values, which are not to wait for it.
        self.background = self.module.Stream()
        self._main, self._releasing = self.module.current_stream(), self.module.Stream()
        self._ones = torch.ones(CHANNELS * self.size, dtype=torch.int32, device=device)
        self._zeros = torch.zeros_like(self._ones)
        self._link = link
        self._shared: list[Shared] = []
        if device.type == "cuda":
            link.at_end(self._release)

    def share(self, count: int) -> tuple[Tensor, Shared]:
        """So many bytes of each rank, with this rank's own. All ranks call it together."""
        from torch.distributed._symmetric_memory import _SymmetricMemory

        if self.device.type not in self._link.named:
            # It looks for the ranks' store by a group's name, whenever memory is shared; of the
            # group it needs no more. A name is registered once, whatever models share the link, and
            # whoever registers a group has to hold it.
            group = dist.ProcessGroup(self._store, self.rank, self.size)
            group._set_group_name(self._group)
            distributed._register_process_group(self._group, group)
            _SymmetricMemory.set_group_info(self._group, self.rank, self.size, self._store)
            self._link.named[self.device.type] = group
        # Not `empty`, which takes memory from a pool: where a rank finds room in it depends on what
        # it has freed, and ranks that share different places wait for ever or overwrite.
        memory = _SymmetricMemory.empty_strided_p2p((count,), (1,), torch.uint8, self.device)
        shared = cast(Shared, _SymmetricMemory.rendezvous(memory, self._group))
        self._shared.append(shared)
        return memory, shared

    def _release(self) -> None:
        """From now on barriers wait for nobody, so that the device comes to an end of what it was
        given; what it computes is not looked at."""
        threading.Thread(target=self._let_go, daemon=True, name="piflux-release").start()

    def _let_go(self) -> None:
        # A barrier sets a flag of each other rank's once it is 0, and waits until its own are 1.
        # What is dead does neither, but its memory stays as long as somebody maps it. By copies,
        # since kernels that are first used now may wait for the device to be loaded.
        flags = [CHANNELS * self.size]
        with self.module.device(self.device), self.module.stream(self._releasing):
            streams = self.stream, self.background, self._main
            while not (self._link.left.is_set() and all(x.query() for x in streams)):
                for shared in list(self._shared):
                    for rank in range(self.size):
                        there = shared.get_signal_pad(rank, flags, torch.int32)
                        there.copy_(self._ones if rank == self.rank else self._zeros)
                self._releasing.synchronize()


class Copies:
    """One all-gather, over and over; see `Gathering` and `Filled`.

    Args:
        count: bytes of a rank's piece.
        peers: who takes part.
        urgent: whether it runs ahead of what is sent in the background.
    """

    recordable = True

    def __init__(self, count: int, peers: Peers, *, urgent: bool = True) -> None:
        shape = peers.size, count
        memory, self._shared = peers.share(peers.size * count)
        self.whole = memory.view(shape)
        self.pieces: Sequence[Tensor] = self.whole.unbind(0)
        self.piece = self.pieces[peers.rank]
        # Each begins with its next neighbour, that not all write to the same one.
        others = [(peers.rank + i) % peers.size for i in range(1, peers.size)]
        self.memory = memory
        self._theirs = [
            self._shared.get_buffer(other, (memory.numel(),), torch.uint8) for other in others
        ]
        self._peers = peers
        self._stream = peers.stream if urgent else peers.background
        _ALIVE.add(self)
        self._arrived = peers.module.Event()

    def start(self) -> Copies:
        """Send what the piece holds now. Returns itself."""
        self._send(self.piece, self.piece.numel(), own=False)
        return self

    def fill(self, piece: Tensor, length: int, *, own: bool) -> None:
        """See `Filled.fill`."""
        self._send(piece, length, own=own)

    def _send(self, piece: Tensor, length: int, *, own: bool) -> None:
        peers = self._peers
        begin = peers.rank * length
        place = slice(begin, begin + piece.numel())
        self._stream.wait_stream(peers.module.current_stream())
        with peers.module.stream(self._stream):
            self._shared.barrier(0, FOREVER_MS)  # all have read what came last
            for there in self._theirs:
                there[place].copy_(piece, non_blocking=True)
            if own:  # not by a copy engine: within a GPU's memory it is a kernel
                self.memory[place].copy_(piece, non_blocking=True)
            self._shared.barrier(1, FOREVER_MS)  # all has been written
            self._arrived.record(self._stream)

    def wait(self) -> Sequence[Tensor]:
        """What comes next finds `pieces`, which it returns."""
        self._arrived.wait(self._peers.module.current_stream())
        return self.pieces


def reach(
    link: Link, device: torch.device, exchange: Callable[[Any, str], Sequence[Any]]
) -> Peers | None:
    """Where gathers by copy engines run; None where there can't be any. All ranks call it together.

    They need every rank's GPU to reach every other's memory. NCCL's own switch, NCCL_P2P_DISABLE=1,
    holds here too.

    Args:
        link: between the ranks.
        device: of this one.
        exchange: everyone's, by rank; see `ProcessRanks.exchange`.
    """
    if device.type != "cuda":
        return None
    here = {_uuid(index): index for index in range(torch.cuda.device_count())}
    mine = socket.gethostname(), _uuid(device.index)
    told = exchange(mine, "GPUs")
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
    if len(set(told)) < link.size or not all(exchange(reaches, "whether GPUs reach each other")):
        return None
    peers = Peers(link, device)
    try:
        Copies(1, peers)
    except RuntimeError as error:
        log.warning("no gathers by copy engines, GPUs can't share memory: %s", error)
        reaches = False
    return peers if all(exchange(reaches, "whether GPUs share memory")) else None


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
