"""From a graph that calls pieces to one that calls what the inner compiler made of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing

from piflux.passes.plan import known

Inner = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def compile_pieces(gm: fx.GraphModule, inner: Inner) -> Callable[..., Any]:
    """Compile each piece of an outlined graph once. Returns the graph as a callable."""
    for name, piece in list(gm.named_children()):
        assert isinstance(piece, fx.GraphModule)
        fakes = [known(n) for n in piece.graph.find_nodes(op="placeholder")]
        # Captured values belong to another fake mode than the one that Dynamo hands to backends.
        with tracing(TracingContext(detect_fake_mode(fakes))):
            compiled = inner(piece, fakes)
        delattr(gm, name)
        setattr(gm, name, compiled)
    return gm.forward
