"""A rank a process, over a process group."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store

from piflux.errors import RankLost
from piflux.ranks.agreement import check_agreement
from piflux.ranks.control import Control
from piflux.ranks.copies import Copies, Peers, reach
from piflux.ranks.environment import DEFAULT_TIMEOUT_S, timeout_asked, timeout_s
from piflux.ranks.header import BYTES
from piflux.ranks.links import Link
from piflux.ranks.protocol import Filled, Gathering, Result

ALIGNMENT = 16
"""Of a header, and of each rank's piece before one, in bytes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Meeting:
    """Where the ranks of a group meet that is no process group of torch's.

    Processes may come and go between such groups, and be in several. What is in a group ends with
    the meeting of each of its ranks, as with a process group.

    Attributes:
        store: that all of them reach.
        name: no other meeting's of this store.
        rank: of this process.
        size: how many ranks there are.
    """

    store: dist.Store
    name: str
    rank: int
    size: int

    @property
    def backends(self) -> dict[str, str]:
        """By the type of a device, which of torch's backends serves it."""
        return {"cpu": "gloo"} | ({"cuda": "nccl"} if torch.cuda.is_available() else {})


class ProcessRanks:
    """A rank a process.

    Of the group come only the membership and the store: what ranks send to each other goes over
    connections of piflux's own, new ones in each epoch. The group is held weakly: who destroys it
    means to, and that ends them.
    """

    in_one_process = False

    def __init__(self, group: dist.ProcessGroup | Meeting) -> None:
        self._group: weakref.ref[dist.ProcessGroup | Meeting] = weakref.ref(group)
        self._control = _control(group)
        self._peers: dict[torch.device, Peers | None] = {}
        self._peers_of: Link | None = None

    @property
    def size(self) -> int:
        return self._control.size

    @property
    def rank(self) -> int:
        return self._control.index

    @property
    def group(self) -> dist.ProcessGroup | Meeting:
        """The group whose ranks these are, or were at first.

        Raises RuntimeError after its end.
        """
        group = self._group()
        if group is None:
            raise RuntimeError(
                "the process group of this model was destroyed: parallelize it again in a new one"
            )
        return group

    @property
    def backends(self) -> dict[str, str]:
        """By the type of a device, which of torch's backends serves it."""
        assert self.group is not None, "raises"
        return self._control.backends

    @property
    def wish(self) -> bool:
        return self._control.wish

    @wish.setter
    def wish(self, wish: bool) -> None:
        self._control.wish = wish

    def wished(self) -> bool:
        """Whether any rank wants the image to end: all ranks know it after the same step."""
        return self._control.wished()

    @property
    def doing(self) -> str:
        return self._control.doing

    @doing.setter
    def doing(self, what: str) -> None:
        self._control.doing = what

    @property
    def busy(self) -> bool:
        return self._control.busy

    @busy.setter
    def busy(self, busy: bool) -> None:
        self._control.busy = busy

    def image(self) -> AbstractContextManager[None]:
        return self._control.image_under_way()

    def stop(self, error: BaseException) -> None:
        self._control.stop(error)

    @property
    def epoch(self) -> int:
        """Ranks that are in none meet first."""
        assert self.link is not None, "raises"
        return self._control.epoch

    @property
    def control(self) -> Control:
        """Who is there."""
        return self._control

    @property
    def link(self) -> Link:
        """Of the present epoch."""
        assert self.group is not None, "raises"
        return self._control.link()

    def gather(self, piece: Tensor, header: Tensor | None = None) -> Gathering:
        return _Collective(piece, self, "pieces" if header is None else "the prediction", header)

    def persistent_gather(self, count: int, device: torch.device) -> Gathering:
        peers = self._reached(device)
        if peers is not None:
            return Copies(count, peers)
        piece = torch.empty(count, dtype=torch.uint8, device=device)
        return _Collective(piece, self, "keys and values")

    def filled(self, count: int, device: torch.device) -> Filled:
        """Memory that is filled in the background, with up to `count` bytes of every rank.

        All ranks make as many, in one order, and anew in each epoch.
        """
        peers = self._reached(device)
        if peers is not None:
            return Copies(count, peers, urgent=False)
        return _Filled(count, self, device)

    def _reached(self, device: torch.device) -> Peers | None:
        link = self.link
        if self._peers_of is not link:
            self._peers_of, self._peers = link, {}
        if device not in self._peers:
            self._peers[device] = reach(link, device, self.exchange)
        return self._peers[device]

    def exchange(self, mine: Any, what: str) -> list[Any]:
        return self._control.exchange(mine, what)

    def any(self, flag: bool) -> bool:
        return any(self.exchange(flag, "votes"))

    def least(self, values: Sequence[float]) -> list[float]:
        everyones = self.exchange(list(values), "numbers")
        return [min(several) for several in zip(*everyones, strict=True)]

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        check_agreement(self.exchange(dict(fingerprint), "fingerprints"))

    def run(self, step: Callable[[], Result]) -> Result:
        return step()

    def at(self) -> tuple[int, int]:
        return self._control.image, self._control.calls

    def settle(self) -> None:
        self._control.settle()

    def calls(self) -> str:
        self._control.calls += 1
        return f"call {self._control.calls} of image {self._control.image}"

    def surviving(self, act: Callable[[], Result], what: str) -> Result:
        control = self._control
        while True:
            try:
                return act()
            except RankLost as error:
                if not error.resumable:
                    raise
                lost = error
            while True:
                try:
                    told = control.exchange(what, "points to go on from")
                    break
                except RankLost as error:
                    lost = error
            if len(set(told)) > 1:
                failed = RankLost(
                    f"{lost}\nThe ranks that are left were at different points ("
                    f"{', '.join(sorted(set(told)))}), so that this image has to be drawn again",
                    lost.ranks,
                    resumable=False,
                )
                failed.on_all_ranks = True
                raise failed from lost


_CONTROLS: WeakKeyDictionary[dist.ProcessGroup | Meeting, Control] = WeakKeyDictionary()


def _control(group: dist.ProcessGroup | Meeting) -> Control:
    """Of a group there is one in a process, whatever models share it."""
    if group not in _CONTROLS:
        control = _control_of(group)
        _CONTROLS[group] = control
        weakref.finalize(group, control.close).atexit = False
    return _CONTROLS[group]


def _control_of(group: dist.ProcessGroup | Meeting) -> Control:
    if isinstance(group, Meeting):
        store = dist.PrefixStore(group.name, group.store)
        within_s = timeout_asked() or DEFAULT_TIMEOUT_S
        return Control(store, group.name, group.rank, group.size, group.backends, within_s)
    pairs = dist.get_backend_config(group).split(",")
    backends = dict(pair.split(":") for pair in pairs if ":" in pair)
    return Control(
        _get_process_group_store(group),
        group.group_name,
        group.rank(),
        group.size(),
        backends,
        timeout_s(group),
    )


class _Collective:
    """From the same memory into the same each time, so that what is recorded can read it."""

    # It may be recorded, but then by all ranks or none.
    recordable = False

    def __init__(
        self, piece: Tensor, ranks: ProcessRanks, what: str, header: Tensor | None = None
    ) -> None:
        # Kept, because its memory must stay untouched until the collective has read it.
        self.piece = piece.contiguous()
        self._of = self.piece.view(-1).view(torch.uint8)
        count = self._of.numel()
        if header is not None:
            padding = self._of.new_empty(-count % ALIGNMENT)
            self._of = torch.cat([self._of, padding, header.to(piece.device).view(torch.uint8)])
        self._to = self._of.new_empty(ranks.size, self._of.numel())
        pieces = self._to[:, :count]
        self.whole: Tensor | None = (
            pieces.view(piece.dtype).unflatten(1, piece.shape) if piece.dim() else None
        )
        self.pieces: Sequence[Tensor] = [x.view(piece.dtype).view(piece.shape) for x in pieces]
        self._headers = None if header is None else self._to[:, -BYTES:].view(torch.float64)
        self._ranks = ranks
        self._what = what
        self._works: Sequence[dist.Work] = ()

    def start(self) -> Gathering:
        self._works = self._ranks.control.start(self._to, self._of, self._what)
        return self

    def wait(self) -> Sequence[Tensor]:
        """Raises RankFailed, RankLost or RanksDisagree where a rank doesn't send the like."""
        control = self._ranks.control
        control.finish(self._works, self._to.device, self._what)
        self._works = ()
        if self._headers is not None:
            control.compare(self._headers)
        return self.pieces


class _Filled:
    """See `Filled`."""

    recordable = False

    def __init__(self, count: int, ranks: ProcessRanks, device: torch.device) -> None:
        self.memory = torch.empty(ranks.size * count, dtype=torch.uint8, device=device)
        self._ranks = ranks
        self._works: Sequence[dist.Work] = ()

    def fill(self, piece: Tensor) -> None:
        control, size = self._ranks.control, self._ranks.size
        whole = self.memory[: size * piece.numel()].view(size, -1)
        self._works = control.start(whole, piece, "weights")

    def wait(self) -> None:
        """Raises RankFailed, RankLost or RanksDisagree where a rank doesn't send the like."""
        self._ranks.control.finish(self._works, self.memory.device, "weights")
        self._works = ()
