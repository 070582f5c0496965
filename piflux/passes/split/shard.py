"""Insert the boundaries that `layout` decided, and make every size between them local."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from piflux.graph.axes import Axis, Value
from piflux.graph.nodes import plain_name
from piflux.graph.plan import Context
from piflux.graph.sizes import same
from piflux.graph.targets import SHARD, UNSHARD
from piflux.passes.split.lengths import Length, Lengths
from piflux.passes.split.rules import Resizer, flow


def shard(gm: fx.GraphModule, ctx: Context) -> int:
    """Cut and join values on the plan's boundary edges. Returns the number of boundaries.

    Before, with 48 image tokens:

        h = linear(x, w)                                         # (1, 48, 96)
        r = h.reshape(1, 48, 4, 24)
        return (r,)

    After, on 2 ranks:

        x_part = piflux.shard(x, 1, [48], 2)           # (1, 24, 64)
        h = linear(x_part, w)
        r = h.reshape((1, 24, 4, 24))
        r_whole = piflux.unshard(r, 1, [48], 2)        # (1, 48, 4, 24)
        return (r_whole,)
    """
    plan = ctx.plan
    lengths = Lengths(gm.graph, ctx.world_size)
    for node in [n for n in gm.graph.nodes if n in plan.local]:
        _resize(node, ctx, lengths)
    cuts = {
        (value, dims): _boundary(gm.graph, ctx, lengths, SHARD, value, dims, value.node)
        for value, dims in dict.fromkeys((value, dims) for (_, value), dims in plan.cuts.items())
    }
    joins = {
        (value, dims): _boundary(
            gm.graph, ctx, lengths, UNSHARD, value, dims, cuts.get((value, dims), value.node)
        )
        for value, dims in dict.fromkeys((value, dims) for (_, value), dims in plan.joins.items())
    }
    for edges, made in (plan.cuts, cuts), (plan.joins, joins):
        for (consumer, value), dims in edges.items():
            consumer.replace_input_with(value.node, made[value, dims])
    return len(cuts) + len(joins)


def _boundary(
    graph: fx.Graph,
    ctx: Context,
    lengths: Lengths,
    op: torch._ops.OpOverload,
    value: Value,
    dims: tuple[int, ...],
    made: fx.Node,
) -> fx.Node:
    """Cut or join `value`, which `made` holds, along each of `dims`, as early as possible."""
    places = ctx.plan.cut_after if op is SHARD else ctx.plan.join_after
    after = places.get(value, made)
    for dim in dims:
        axis = Axis(value.node, dim, value.item)
        full = [lengths.full(length) for length in ctx.plan.lengths(axis)]
        at_head = after.op == "placeholder"  # inputs stay together, and lengths follow them
        with graph.inserting_before(lengths.anchor) if at_head else graph.inserting_after(after):
            made = graph.create_node(
                "call_function",
                op,
                (made, dim, full, ctx.world_size),
                name=f"{plain_name(value.node)}_{'part' if op is SHARD else 'whole'}",
            )
        made.meta = dict(value.node.meta)
        after = made
    return made


def _resize(node: fx.Node, ctx: Context, lengths: Lengths) -> None:
    resize = flow(node).resize
    if resize is None:
        return

    def size(axis: Axis) -> Length | None:
        carries = axis in ctx.plan.layouts
        return lengths.local(ctx.plan.lengths(axis)) if carries else None

    def position(axis: Axis, full: sympy.Expr) -> Length:
        return lengths.local(_before(axis.node, ctx.plan.lengths(axis), full))

    node.args, node.kwargs = resize(Resizer(size, position))


def _before(
    node: fx.Node, lengths: Sequence[sympy.Expr], position: sympy.Expr
) -> Sequence[sympy.Expr]:
    """The segments that lie before a position on the edge of one."""
    at = sympy.Integer(0)
    for i, length in enumerate(lengths):
        if same(node, at, position):
            return lengths[:i]
        at = at + length
    return lengths
