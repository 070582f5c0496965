"""Small graphs to run passes on, and how they are written down in snapshots."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from piflux.compile.program import PASSES
from piflux.errors import describe_op
from piflux.graph.nodes import op_name
from piflux.graph.plan import Axis, Context, known, plain_name, tensors
from piflux.passes.runner import Pass, run_passes

MANY = 1_000_000


def capture(
    function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any
) -> fx.GraphModule:
    """The one graph that Dynamo makes of a call: sizes are literals, or symbols if `dynamic`."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)
    # No other capture of the same code has a say: to forget all would take theirs from `captures`.
    alone = torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=MANY, accumulated_recompile_limit=MANY
    )
    with alone, torch.no_grad():
        compiled(*args, **kwargs)
    (gm,) = graphs
    return gm


def transformed(
    gm: fx.GraphModule, world_size: int = 2, passes: Sequence[Pass] = PASSES
) -> Context:
    """Run `passes` on `gm` as the compiler would for `world_size` ranks."""
    ctx = Context(world_size)
    run_passes(gm, ctx, passes)
    return ctx


def text(gm: fx.GraphModule) -> str:
    """The graph, a node a line: name, shape, operation and arguments; inputs without parameters."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if not (_is_parameter(node) or _is_number(node)):
                lines.append(f"{_name(node)}: {_shape(node)}")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
        else:
            lines.append(f"{_name(node)}: {_shape(node)} = {_call(node)}")
    return "\n".join(lines) + "\n"


def layouts(ctx: Context, gm: fx.GraphModule) -> str:
    """Every node that carries tokens, with the lengths of the segments along each dimension."""
    lines = []
    for node in gm.graph.nodes:
        for item, x in enumerate(tensors(node)):
            found = [
                f"{dim}: {list(ctx.plan.lengths(Axis(node, dim, item)))}"
                for dim in range(x.dim())
                if Axis(node, dim, item) in ctx.plan.layouts
            ]
            if found:
                where = "part" if node in ctx.plan.local else "whole"
                lines.append(f"{_name(node)} {where} {{{', '.join(found)}}}")
    return "\n".join(lines) + "\n"


def _call(node: fx.Node) -> str:
    arguments = [_argument(x) for x in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    name = op_name(node) or describe_op(node).removesuffix(".default")
    if node.op == "call_method":
        return f"{arguments[0]}.{name}({', '.join(arguments[1:])})"
    if node.op == "call_module":
        name = str(node.target)
    return f"{name}({', '.join(arguments)})"


def _argument(x: Any) -> str:
    if isinstance(x, fx.Node):
        return _name(x)
    if isinstance(x, (tuple, list)):
        inside = ", ".join(map(_argument, x))
        if isinstance(x, list):
            return f"[{inside}]"
        return f"({inside},)" if len(x) == 1 else f"({inside})"
    if isinstance(x, slice):
        return ":".join("" if y is None else _argument(y) for y in (x.start, x.stop))
    return str(x) if isinstance(x, (torch.dtype, torch.device)) else repr(x)


def _name(node: fx.Node) -> str:
    """Without what Dynamo puts around an input's own name; of a parameter's path the end."""
    if not (_is_parameter(node) or _is_number(node)):
        return plain_name(node)
    path = re.split(r"_*(?:modules|parameters|buffers|dict)_+", node.name.strip("_"))
    return ".".join(path[-2:])


def _shape(node: fx.Node) -> str:
    value = node.meta["example_value"]
    if isinstance(value, Tensor):
        return f"({', '.join(map(str, value.shape))})"
    if isinstance(value, (tuple, list)):
        return " ".join(f"({', '.join(map(str, x.shape))})" for x in value)
    return str(value)


def _is_number(node: fx.Node) -> bool:
    """A Python number of the model's, which Dynamo passes in a tensor if sizes are symbols."""
    value = known(node) if node.op == "placeholder" else None
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float64


def _is_parameter(node: fx.Node) -> bool:
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return static or isinstance(known(node), torch.nn.Parameter)
