"""Example values of nodes: fake tensors, numbers, or tuples of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def known(value: Any) -> Any:
    """An argument's value at compile time: a node's example, or the argument itself."""
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def tensors(node: fx.Node) -> list[Tensor]:
    """The fake tensors that a node gives: none, one, or a tuple's."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)) and all(isinstance(x, Tensor) for x in value):
        return list(value)
    return []


def near(node: fx.Node) -> Tensor:
    """A fake tensor of the node's value, or of an operand where it has none."""
    return next(x for n in (node, *node.all_input_nodes) for x in tensors(n))


def ndim(node: fx.Node, item: int = 0) -> int:
    """How many dimensions a node's tensor has."""
    return tensors(node)[item].dim()


def wraps(value: object) -> bool:
    """Whether it is a tensor of a subclass that wraps others, as quantized weights are."""
    return is_traceable_wrapper_subclass(value)


def parts_of(x: Tensor) -> list[Tensor]:
    """The plain tensors that a fake one is made of: itself, or what it wraps."""
    if not wraps(x):
        return [x]
    names, _ = x.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in parts_of(getattr(x, name))]


def memory_of(x: Tensor) -> StorageWeakRef:
    """Where a tensor's numbers are; inside of a `vmap`, those of what is mapped over."""
    while is_batchedtensor(x):
        x = get_unwrapped(x)
    return StorageWeakRef(x.untyped_storage())
