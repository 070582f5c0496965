"""Small graphs to run passes on, captured or read, and how they are written down in snapshots."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from models import flux_inputs, tiny_flux
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from piflux.compile.program import PASSES
from piflux.errors import describe_op
from piflux.graph.axes import Axis
from piflux.graph.nodes import op_name, plain_name, run_node
from piflux.graph.plan import Context
from piflux.graph.values import known, tensors
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


def captured_flux(*, double: int = 1, single: int = 1, dynamic: bool = False) -> fx.GraphModule:
    """FLUX's graph, captured once in this process; a copy to be changed."""
    gm = _flux(double, single, dynamic)
    return fx.GraphModule(gm, deepcopy(gm.graph))


@cache
def _flux(double: int, single: int, dynamic: bool) -> fx.GraphModule:
    return capture(tiny_flux(double=double, single=single), **flux_inputs(), dynamic=dynamic)


def parsed(source: str, **dtypes: torch.dtype) -> fx.GraphModule:
    """The graph of which `text` makes `source`, in milliseconds; all sizes are numbers.

    Inputs come first, parameters among them, whose names have a dot: `0.weight: (8, 8)`. They are
    float32 if `dtypes` says nothing else. An op that Python's `operator` has is taken from there.

    Raises:
        AssertionError: an op gives another shape than is written.
    """
    mode, graph, nodes = FakeTensorMode(), fx.Graph(), {}
    for line in source.strip().splitlines():
        if line.startswith("return "):
            graph.output(_read(line.removeprefix("return "), nodes))
            continue
        name, written = line.split(": ", 1)
        shape, _, call = written.partition(" = ")
        assert name not in nodes, f"{name} is written twice"
        if call:
            node = _called(graph, name, call, nodes)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            with mode, torch.no_grad():
                node.meta["example_value"] = run_node(node, args, kwargs)
        else:
            owner, dot, own = name.partition(".")
            node = graph.placeholder(f"l_modules_{owner}_parameters_{own}_" if dot else name)
            x = torch.empty(ast.literal_eval(_tuple(shape)), dtype=dtypes.get(name))
            if dot:
                x = torch.nn.Parameter(x, requires_grad=False)
            node.meta["example_value"] = mode.from_tensor(x)
        assert _shape(node) == shape, f"{name} is {_shape(node)}, not {shape}"
        nodes[name] = node
    return fx.GraphModule(torch.nn.Module(), graph)


def _called(graph: fx.Graph, name: str, call: str, nodes: dict[str, fx.Node]) -> fx.Node:
    if index := re.fullmatch(r"getitem\((\w+), \(?(.*:.*?)\)?\)", call):  # slices, as in x[:, 2:]
        x, where = index.groups()
        return graph.create_node(
            "call_function", operator.getitem, (nodes[x], _read(f"_[{where}]", nodes)), name=name
        )
    function, arguments = re.fullmatch(r"([\w.]+)\((.*)\)", call).groups()
    args, kwargs = _read(f"_({arguments})", nodes)
    owner, _, op = function.rpartition(".")
    if owner in nodes:
        return graph.create_node("call_method", op, (nodes[owner], *args), kwargs, name)
    if owner == "piflux":
        target = getattr(torch.ops.piflux, op).default
    else:
        target = next(getattr(x, op) for x in (operator, torch, F) if hasattr(x, op))
    return graph.create_node("call_function", target, args, kwargs, name)


def _tuple(shape: str) -> str:
    return shape.replace(")", ",)") if shape != "()" else shape


def _read(expression: str, nodes: dict[str, fx.Node]) -> Any:
    """The value of an expression of names, constants, tuples and lists; `_[..]` gives its index.

    `_(..)` gives its arguments and keyword arguments.
    """
    plain = dict(nodes)
    for number, name in enumerate(sorted(nodes, key=len, reverse=True)):
        if "." in name:  # that of a parameter, which Python would take apart
            plain[f"_{number}"] = nodes[name]
            expression = expression.replace(name, f"_{number}")

    def value(x: ast.expr | None) -> Any:
        match x:
            case None:
                return None
            case ast.Name():
                return torch.device(x.id) if x.id in ("cpu", "cuda") else plain[x.id]
            case ast.Attribute():  # torch.float32
                return getattr(torch, x.attr)
            case ast.Tuple():
                return tuple(map(value, x.elts))
            case ast.List():
                return list(map(value, x.elts))
            case ast.Slice():
                return slice(*map(value, (x.lower, x.upper, x.step)))
            case ast.Subscript():
                return value(x.slice)
            case ast.Call():
                return tuple(map(value, x.args)), {k.arg: value(k.value) for k in x.keywords}
            case _:
                return ast.literal_eval(x)

    return value(ast.parse(expression, mode="eval").body)


def transformed(
    gm: fx.GraphModule, world_size: int = 2, passes: Sequence[Pass] = PASSES
) -> Context:
    """Run `passes` on `gm` as the compiler would for `world_size` ranks."""
    ctx = Context(world_size)
    run_passes(gm, ctx, passes)
    return ctx


def text(gm: fx.GraphModule, *, parameters: bool = False) -> str:
    """The graph, a node a line: name, shape, operation and arguments; `parameters` if asked for."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if not (_is_parameter(node) and not parameters or _is_number(node)):
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
