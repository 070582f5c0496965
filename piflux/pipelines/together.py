"""What ranks of one host make once for all of them: each a share, in memory that all have mapped.

That memory has no name in a file system. It ends with the last rank that has mapped it, however
that ends, and no limit of a container's /dev/shm is its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class _Plain:
    """Where a plain tensor's numbers are, and its form.

    Attributes:
        path: of the memory, as long as its maker holds it.
        count: bytes.
        shape: of the tensor; likewise `stride` and `dtype`.
    """

    path: str
    count: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Wrapped:
    """A tensor of a class that wraps others.

    Attributes:
        kind: the class.
        inside: what it wraps, by name.
        context: what else it is made of.
        shape: of the tensor; likewise `stride`.
    """

    kind: Any
    inside: Mapping[str, _Plain | _Wrapped]
    context: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def weights_together(
    layers: Sequence[nn.Linear],
    make: Callable[[nn.Linear], object],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Give each layer the weight that one rank of each host makes, in memory that all ranks share.

    All ranks of the group call it together, with layers that are alike. Layer by
    layer, so that beside the weights a rank holds one at a time.

    Args:
        layers: whose `weight` is made.
        make: gives a layer its weight, which may be of any class that wraps tensors.
        group: None for the default one.
    """
    hosts = _exchange(_host(), group)
    rank = dist.get_rank(group)
    own = [i for i, host in enumerate(hosts) if host == hosts[rank]]
    turn, smallest = own.index(rank), min(map(hosts.count, hosts))
    for first in range(0, len(layers), smallest):
        batch = layers[first : first + smallest]
        held: list[int] = []
        mine = None
        if turn < len(batch):
            make(batch[turn])
            mine = _described(batch[turn].weight.detach(), held)
        every = _exchange(mine, group)
        for layer, maker in zip(batch, own, strict=False):
            weight = _mapped(every[maker])
            layer.weight = nn.Parameter(weight, requires_grad=False)
        _exchange(None, group)  # all have mapped what this rank holds
        for descriptor in held:
            os.close(descriptor)


def can_share() -> bool:
    """Whether this system has such memory, and other ranks are there."""
    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return there and hasattr(os, "memfd_create")


def _host() -> str:
    """The same for processes that can open each other's memory."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _exchange(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group)
    return every


def _described(x: Any, held: list[int]) -> _Plain | _Wrapped:
    """A tensor by where its numbers were put; `held` gets what must stay open until all have it."""
    if is_traceable_wrapper_subclass(x):
        names, context = x.__tensor_flatten__()
        inside = {name: _described(getattr(x, name), held) for name in names}
        return _Wrapped(type(x), inside, context, tuple(x.shape), tuple(x.stride()))
    dense = x.is_cpu and x.untyped_storage().nbytes() == x.nbytes
    x = x if dense else x.cpu().contiguous()
    descriptor = os.memfd_create("piflux")
    held.append(descriptor)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    made = _Plain(path, x.nbytes, tuple(x.shape), tuple(x.stride()), x.dtype)
    if x.nbytes:
        os.ftruncate(descriptor, x.nbytes)
        _view(made).copy_(x)
    return made


def _mapped(made: _Plain | _Wrapped) -> Any:
    if isinstance(made, _Plain):
        return _view(made)
    inside = {name: _mapped(x) for name, x in made.inside.items()}
    size = torch.Size(made.shape)
    return made.kind.__tensor_unflatten__(inside, made.context, size, made.stride)


def _view(made: _Plain) -> Tensor:
    if not made.count:
        return torch.empty_strided(made.shape, made.stride, dtype=made.dtype)
    whole = torch.from_file(made.path, shared=True, size=made.count, dtype=torch.uint8)
    return whole.view(made.dtype).as_strided(made.shape, made.stride)
