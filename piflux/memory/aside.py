"""Weights that stay on the host until they are needed, as if they were on a device already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain(x: Any) -> list[Tensor]:
    """The tensors that a weight is made of: itself, or what a quantized one wraps."""
    if not is_traceable_wrapper_subclass(x):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [part for name in names for part in plain(getattr(x, name))]


class Aside:
    """What of a model's weights is still on the host.

    On the device there is a tensor of the same form without memory, which can be captured, but not
    read. Where the host's is a file that is mapped, all ranks of the host share one copy.
    """

    def __init__(self) -> None:
        # By the memory, that tensors share which are made of one another: a module that is told to
        # move where it is makes new ones.
        self._sources: dict[int, tuple[Tensor, Tensor]] = {}

    def __contains__(self, x: Tensor) -> bool:
        """Whether a plain tensor has its numbers on the host."""
        return _memory(x) in self._sources

    @property
    def nbytes(self) -> int:
        """Of all that is on the host."""
        return sum(source.nbytes for _, source in self._sources.values())

    def put(self, model: nn.Module, device: torch.device) -> None:
        """Leave a model's parameters on the host; what else it has goes to `device`."""
        moved: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, x in module._parameters.items():
                if x is not None:
                    if id(x) not in moved:
                        moved[id(x)] = self._moved(x, device)
                    module._parameters[name] = moved[id(x)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    def _moved(self, x: nn.Parameter, device: torch.device) -> nn.Parameter:
        source: Any = x.data
        there = _without_memory(source, device)
        for made, here in zip(plain(there), plain(source), strict=True):
            self._sources[_memory(made)] = made, here
        if is_traceable_wrapper_subclass(source):
            return nn.Parameter(there, requires_grad=False)
        x.data = there
        return x

    def take(self, x: Tensor) -> Tensor:
        """The numbers of a plain tensor, where they are; from now on it has its own."""
        _, source = self._sources.pop(_memory(x), (x, x))
        return source

    def bring(self) -> None:
        """Give all that is left its memory on the device."""
        for x, source in list(self._sources.values()):
            extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            x.untyped_storage().resize_(extent * x.element_size() if x.numel() else 0)
            x.copy_(source)
        self._sources = {}


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _without_memory(x: Any, device: torch.device) -> Any:
    """A tensor of the same form on the device, which has no memory; nor has what it wraps."""
    if is_traceable_wrapper_subclass(x):
        names, context = x.__tensor_flatten__()
        inside = {name: _without_memory(getattr(x, name), device) for name in names}
        return type(x).__tensor_unflatten__(inside, context, x.size(), x.stride())
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    made.untyped_storage().resize_(0)
    return made
