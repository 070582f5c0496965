"""Give every node the example value that it has on one part."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from piflux.errors import CannotShard
from piflux.passes.plan import Context, tensors


def propagate(gm: fx.GraphModule, ctx: Context) -> int:
    """Run the graph on fakes from the first boundary on. Returns the number of values that changed.

    Before: `h` of a rewritten graph still says (1, 48, 96). After, on 2 ranks: (1, 24, 96). It is
    also the proof that the rewritten graph fits together.

    Raises:
        CannotShard: an op does not accept its operands' part sizes.
    """
    # The mode of the captured values; the tracing context has a new one for the inner compiler.
    mode = next(
        x.fake_mode for n in gm.graph.nodes for x in tensors(n) if isinstance(x, FakeTensor)
    )
    changed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        new = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "piflux"
        if node.op not in ("call_function", "call_method"):
            continue
        if not new and node not in ctx.plan.local and changed.isdisjoint(node.all_input_nodes):
            continue
        args = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        try:
            with mode, torch.no_grad():
                node.meta["example_value"] = _run(node, *args)
        except Exception as error:
            raise CannotShard(node, f"a part does not fit this op: {error}") from error
        changed.add(node)
    return len(changed)


def _run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
