"""Weights that stay on the host until they are needed, as if they were on a device already."""

from __future__ import annotations

from collections.abc import Iterator
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
        self._sources: dict[int, tuple[Tensor, Tensor]] = {}

    def __contains__(self, x: Tensor) -> bool:
        """Whether a plain tensor has its numbers on the host."""
        return id(x) in self._sources

    def __iter__(self) -> Iterator[Tensor]:
        return iter([x for x, _ in self._sources.values()])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)

    def put(self, model: nn.Module, device: torch.device) -> None:
        """Leave a model's parameters on the host; what else it has goes to `device`."""
        moved: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, x in module._parameters.items():
                if x is not None:
                    if id(x) not in moved:
                        moved[id(x)] = self._moved(x, device)
                    module._parameters[name] = moved[id(x)]
        nn.Module.to(model, device)  # a model's own may warn, or refuse

    def _moved(self, x: nn.Parameter, device: torch.device) -> nn.Parameter:
        source: Any = x.data
        if is_traceable_wrapper_subclass(source):
            return nn.Parameter(self._wrapped(source, device), requires_grad=False)
        x.data = _without_memory(source, device)
        self._sources[id(x)] = x, source
        return x

    def _wrapped(self, x: Any, device: torch.device) -> Any:
        if not is_traceable_wrapper_subclass(x):
            made = _without_memory(x, device)
            self._sources[id(made)] = made, x
            return made
        names, context = x.__tensor_flatten__()
        inside = {name: self._wrapped(getattr(x, name), device) for name in names}
        return type(x).__tensor_unflatten__(inside, context, x.size(), x.stride())

    def take(self, x: Tensor) -> Tensor:
        """The numbers of a plain tensor, where they are; from now on it has its own."""
        _, source = self._sources.pop(id(x), (x, x))
        return source

    def bring(self) -> None:
        """Give all that is left its memory on the device."""
        for x in self:
            extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            x.untyped_storage().resize_(extent * x.element_size() if x.numel() else 0)
            with torch.no_grad():
                x.copy_(self.take(x))


def _without_memory(x: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    made.untyped_storage().resize_(0)
    return made
