"""Replace each attention that shares its tokens over the ranks by `piflux::cached_sdpa`."""

from __future__ import annotations

from torch import fx

from piflux.graph.nodes import attention_arguments
from piflux.graph.plan import Context
from piflux.graph.targets import CACHED
from piflux.passes.split.lengths import Lengths


def rewrite_attention(gm: fx.GraphModule, ctx: Context) -> int:
    """Rewrite `ctx.plan.attentions`. Returns how many there were.

    Before, with 12 text and 48 image tokens:

        out = scaled_dot_product_attention(q, k, v, dropout_p=0.0)

    After, on 2 ranks:

        out = piflux.cached_sdpa(q, k, v, None, None, False, [12, 48], 0, 2)
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
    return len(ctx.plan.attentions)
