"""From a graph that calls pieces to one that calls what the inner compiler made of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor

from piflux.graph.values import known

Inner = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def compile_pieces(gm: fx.GraphModule, inner: Inner) -> Callable[..., Any]:
    """Compile each piece of a graph once. Returns the graph as a callable.

    Raises:
        Exception: whatever `inner` raises.
    """
    for name, piece in list(gm.named_children()):
        replace(gm, name, compile_piece(piece, inner))
    return gm.forward


def compile_piece(piece: nn.Module, inner: Inner) -> Callable[..., Any]:
    """Compile a module of a graph, or its own pieces if it has any. Returns it as a callable.

    Raises:
        Exception: whatever `inner` raises.
    """
    assert isinstance(piece, fx.GraphModule)
    if any(piece.children()):
        return compile_pieces(piece, inner)
    values = list(map(known, piece.graph.find_nodes(op="placeholder")))
    mode = next(x.fake_mode for x in values if isinstance(x, FakeTensor))
    # Captured values belong to another fake mode than the one that Dynamo hands to backends.
    with tracing(TracingContext(mode)):
        return inner(piece, list(map(_settled, values)))


def replace(gm: fx.GraphModule, name: str, function: Callable[..., Any]) -> None:
    """Let a graph call `function` in place of its module `name`."""
    delattr(gm, name)
    setattr(gm, name, function)


def _settled(value: Any) -> Any:
    """The value with its sizes as they are known by now.

    A symbol that turned out in mid-capture to be a number, or the same as another, still stands in
    older values.
    """
    if isinstance(value, torch.SymInt):
        return _settle(value)
    if not isinstance(value, FakeTensor) or all(map(_is_settled, (*value.shape, *value.stride()))):
        return value
    shape, stride = map(_settle, value.shape), map(_settle, value.stride())
    with value.fake_mode:
        return torch.empty_strided(
            tuple(shape), tuple(stride), dtype=value.dtype, device=value.device
        )


def _is_settled(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.expr == size.node._expr


def _settle(size: int | torch.SymInt) -> int | torch.SymInt:
    if isinstance(size, int):
        return size
    return size.node.shape_env.create_symintnode(size.node.expr, hint=size.node.hint)
