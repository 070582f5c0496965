"""Give what runs before the last collective a module of its own, so that it can be recorded."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx, nn

from piflux.passes.plan import Context, known
from piflux.passes.rules import only_computes

HEAD = "head"
"""The submodule's name."""

_SOURCES = ("placeholder", "get_attr")


def enclose(gm: fx.GraphModule, ctx: Context) -> int:
    """Move all that needs no other rank's prediction into a module. Returns how many nodes.

    What is left gathers the predictions and what is computed of them.

    Before, on 2 ranks:

        x_part = piflux.shard(x, 1, [8], 2, 'piflux')
        h = linear(x_part, w)
        h_whole = piflux.unshard(h, 1, [8], 2, 'piflux')
        return (h_whole,)

    After:

        head = head(x, w)
        h = head[0]
        h_whole = piflux.unshard(h, 1, [8], 2, 'piflux')
        return (h_whole,)

    A graph that gathers nothing stays as it is, and so does one that does more than compute: that
    writes in place, draws random numbers or switches a mode such as autocast.
    """
    nodes = [n for n in gm.graph.nodes if n.op not in (*_SOURCES, "output")]
    tail = {n for n in nodes if n.target is torch.ops.piflux.unshard.default}
    if not tail or not all(map(only_computes, nodes)):
        return 0
    for node in nodes:
        if any(n in tail for n in node.all_input_nodes):
            tail.add(node)
    inside = [n for n in nodes if n not in tail]
    kept = set(inside)
    inputs = list(dict.fromkeys(x for n in inside for x in n.all_input_nodes if x not in kept))
    outputs = [n for n in inside if any(user not in kept for user in n.users)]
    if not inside:
        return 0
    gm.add_submodule(HEAD, _module(inputs, inside, outputs))
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op not in _SOURCES)):
        call = gm.graph.call_module(HEAD, tuple(inputs))
        call.meta["example_value"] = tuple(known(n) for n in outputs)
        for i, node in enumerate(outputs):
            item = gm.graph.create_node(
                "call_function", operator.getitem, (call, i), name=node.name
            )
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in kept)
    for node in reversed(inside):
        gm.graph.erase_node(node)
    return len(inside)


def _module(
    inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta["example_value"] = known(node)
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[n] for n in outputs))
    return fx.GraphModule(nn.Module(), graph)
