"""What the ranks of a group have in common before anything is sent: who they are, and a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store


def _backends() -> dict[str, str]:
    return {"cpu": "gloo"} | ({"cuda": "nccl"} if torch.cuda.is_available() else {})


@dataclass(frozen=True, eq=False)
class Meeting:
    """Where ranks meet: a process group of torch's, or what stands for one.

    Where processes come and go, they are in several meetings, one after the other, without being in
    a process group. What is in a meeting ends with that of each of its ranks, as with a group.

    Attributes:
        store: that all of them reach.
        name: no other meeting's of this store.
        rank: of this process.
        size: how many ranks there are.
        backends: by the type of a device, which of torch's backends serves it.
    """

    store: dist.Store
    name: str
    rank: int
    size: int
    backends: Mapping[str, str] = field(default_factory=_backends)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Meeting:
        """A process group's."""
        pairs = dist.get_backend_config(group).split(",")
        backends = dict(pair.split(":") for pair in pairs if ":" in pair)
        store = _get_process_group_store(group)
        return cls(store, group.group_name, group.rank(), group.size(), backends)

    def among(self, members: Sequence[int], name: str) -> Meeting:
        """The meeting of some of these ranks, this one among them, under a name of its own."""
        return Meeting(
            dist.PrefixStore(name, self.store),
            f"{self.name}-{name}",
            members.index(self.rank),
            len(members),
            self.backends,
        )
