"""What `fuse_linears`, `fuse_gelu` and `hoist` put into graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def adjoining(*weights: Tensor) -> Tensor:
    """The weights of several linear layers as those of one, (sum of their first sizes, ..).

    They are moved together once, so that later calls, other graphs of the model and whoever writes
    into a weight all see the same memory, and none is held twice. Weights that were given other
    memory since, as by a model that was moved away from its device and back, are moved anew.

    Args:
        weights: contiguous, alike in all sizes but the first; or of a subclass that wraps such
            tensors, all of them with the weights' first sizes.
    """
    first: Any = weights[0]
    shape = (sum(x.shape[0] for x in weights), *first.shape[1:])
    if is_traceable_wrapper_subclass(first):
        names, context = first.__tensor_flatten__()
        inside = {name: adjoining(*[getattr(x, name) for x in weights]) for name in names}
        return first.__tensor_unflatten__(inside, context, shape, first.stride())
    if not _adjoin(weights):
        # Tensors of inference mode and others can't be given each other's memory.
        with torch.inference_mode(first.is_inference()), torch.no_grad():
            whole = torch.cat([x.detach() for x in weights])
            for x, rows in zip(weights, whole.split([x.shape[0] for x in weights]), strict=True):
                x.data = rows
    return first.as_strided(shape, first.stride(), first.storage_offset())


def _adjoin(weights: Sequence[Tensor]) -> bool:
    """Whether the weights stand one behind the other in the first one's memory."""
    memory = weights[0].untyped_storage()
    at = weights[0].data_ptr()
    for x in weights:
        if x.data_ptr() != at:
            return False
        at += x.numel() * x.element_size()
    # What lies inside live memory can be in no other.
    return at <= memory.data_ptr() + memory.nbytes()


@torch.library.custom_op(
    "piflux::linear_gelu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor",
)
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and GELU in its tanh form: (.., inner) -> (.., outer).

    On a GPU the product's kernel applies GELU to its sums before they are rounded.
    """
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    rows = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], -1)


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op(
    "piflux::linear_of_cat",
    mutates_args=(),
    schema="(Tensor[] xs, Tensor weight, Tensor? bias) -> Tensor",
)
def linear_of_cat(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear(cat(xs, -1), weight, bias)` without the cat: (.., inner_i) each -> (.., outer)."""
    columns = weight.split([x.shape[-1] for x in xs], dim=1)
    first = F.linear(xs[0], columns[0], bias)
    out = first.reshape(-1, first.shape[-1])
    for x, part in zip(xs[1:], columns[1:], strict=True):
        out.addmm_(x.reshape(-1, x.shape[-1]), part.t())
    return out.view(first.shape)


@linear_of_cat.register_fake
def _(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    return xs[0].new_empty((*xs[0].shape[:-1], weight.shape[0]))


class OfAllSteps(nn.Module):
    """A module of one step, which computes all steps at once where it is given all their times.

    Args:
        module: gives tensors.
        dims: how many dimensions each of its arguments has in one step; 0 of a number.
    """

    def __init__(self, module: nn.Module, dims: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self._dims = dims

    def forward(self, *args: Any) -> Sequence[Tensor]:
        """What the module gives; (steps, ...) each where an argument has a dimension more."""
        over = tuple(
            0 if isinstance(x, Tensor) and x.dim() > dim else None
            for x, dim in zip(args, self._dims, strict=True)
        )
        run = torch.vmap(self.module, over) if 0 in over else self.module
        made: Sequence[Tensor] = run(*args)
        return made
