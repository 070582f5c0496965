"""Replace each attention that shares its tokens over the ranks by `piflux::cached_sdpa`."""

from __future__ import annotations

import torch
from torch import fx

from piflux.graph.axes import Axis
from piflux.graph.nodes import HEADS, SDPA, attention_arguments, is_attention
from piflux.graph.plan import Context, Plan
from piflux.graph.targets import CACHED
from piflux.graph.values import known, ndim
from piflux.passes.split.lengths import Lengths


def rewrite_attention(gm: fx.GraphModule, ctx: Context) -> int:
    """Rewrite `ctx.plan.attentions`. Returns how many there were.

    Before, with 12 text and 48 image tokens:

        out = scaled_dot_product_attention(q, k, v, dropout_p=0.0)

    After, on 2 ranks:

        out = piflux.cached_sdpa(q, k, v, None, None, False, [12, 48], 0, 2)

    Attentions to a rank's own tokens stay. Where they have a mask and grouped heads (`ungroup`),
    these are repeated before, as `cached_sdpa` does: few kernels know both.
    """
    lengths = Lengths(gm.graph, ctx.world_size)
    for node, slot, keys, _ in ctx.plan.attentions:
        call = attention_arguments(node)
        full = [lengths.full(length) for length in ctx.plan.lengths(keys)]
        node.op, node.target = "call_function", CACHED
        node.args = (
            *(call.query, call.key, call.value, call.attn_mask, call.scale, call.enable_gqa),
            *(full, slot, ctx.world_size),
        )
        node.kwargs = {}
    for node in [x for x in gm.graph.nodes if is_attention(x)]:
        call = attention_arguments(node)
        if known(call.attn_mask) is None or not known(call.enable_gqa):
            continue
        times = known(call.query).shape[HEADS] // known(call.key).shape[HEADS]
        given = dict(zip(SDPA._fields, node.args, strict=False)) | node.kwargs
        with gm.graph.inserting_before(node):
            given |= {x: _repeated(ctx.plan, given[x], times) for x in ("key", "value")}
        node.args = (given.pop("query"), given.pop("key"), given.pop("value"))
        node.kwargs = given | {"enable_gqa": False}
    return len(ctx.plan.attentions)


def _repeated(plan: Plan, x: fx.Node, times: int) -> fx.Node:
    """Keys or values with each head so many times, cut like `x`."""
    node = x.graph.call_method("repeat_interleave", (x, times), {"dim": HEADS})
    with torch.no_grad():
        value = known(x).repeat_interleave(times, dim=HEADS)
    node.meta = dict(x.meta) | {"example_value": value}
    if x in plan.local:
        plan.local.add(node)
    for dim in range(ndim(x)):
        if dim != ndim(x) + HEADS and (axis := Axis(x, dim)) in plan.layouts:
            plan.layouts[Axis(node, dim)] = plan.layouts[axis]
    return node
