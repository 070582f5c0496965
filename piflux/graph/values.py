"""What example values have in common."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.functions import Max

from piflux.graph.plan import expr


def all_sizes(value: Any) -> list[int | torch.SymInt]:
    """The sizes and strides of a tensor, or of a tuple's, and numbers that are symbols."""
    values = value if isinstance(value, (tuple, list)) else [value]
    shaped = [x for x in values if isinstance(x, Tensor)]
    return [
        *(size for x in shaped for size in (*x.shape, *x.stride())),
        *(x for x in values if isinstance(x, torch.SymInt)),
    ]


def described(value: Any) -> Any:
    """What must be the same of two values for one module to serve both. It is hashable."""
    if isinstance(value, (tuple, list)):
        return tuple(map(described, value))
    if not isinstance(value, Tensor):
        return str(value)
    outside = value.dtype, str(value.device), *map(_stated, (*value.shape, *value.stride()))
    if not wraps(value):
        return outside
    wrapper: Any = value
    names, context = wrapper.__tensor_flatten__()
    inside = [getattr(wrapper, name) for name in names]
    if any(isinstance(size, torch.SymInt) for x in (value, *inside) for size in all_sizes(x)):
        return id(value)  # the context may hold sizes, too
    return type(value), outside, _Context(context), *map(described, inside)


def wraps(value: object) -> bool:
    """Whether it is a tensor of a subclass that wraps others, as quantized weights are."""
    return is_traceable_wrapper_subclass(value)


def memory_of(x: Tensor) -> StorageWeakRef:
    """Where a tensor's numbers are; inside of a `vmap`, those of what is mapped over."""
    while is_batchedtensor(x):
        x = get_unwrapped(x)
    return StorageWeakRef(x.untyped_storage())


class _Context:
    """What a tensor subclass is rebuilt from, beside the tensors that it wraps.

    It can be compared, as Dynamo does before it calls a graph with another instance, but need not
    be hashable.
    """

    def __init__(self, context: Any) -> None:
        self.context = context

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and bool(self.context == other.context)

    def __hash__(self) -> int:
        return hash(_Context)


def _stated(size: int | torch.SymInt) -> int | sympy.Expr:
    """A size or stride. Some strides say that a size is at least 1, as all sizes are."""
    if isinstance(size, int):
        return size
    at_least_one = {m: Max(*(x for x in m.args if x != 1)) for m in expr(size).atoms(Max)}
    return expr(size).xreplace(at_least_one)
