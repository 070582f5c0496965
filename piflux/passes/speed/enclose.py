"""Give what runs before the last collective a module of its own, so that it can be recorded."""

from __future__ import annotations

from torch import fx

from piflux.graph.extract import extract, is_source
from piflux.graph.nodes import computes
from piflux.graph.plan import Context
from piflux.graph.targets import UNSHARD

HEAD = "head"
"""The module's name."""


def enclose(gm: fx.GraphModule, ctx: Context) -> int:
    """Move all that needs no other rank's prediction into a module. Returns how many nodes.

    What is left gathers the predictions and what is computed of them.

    Before, on 2 ranks:

        x_part = piflux.shard(x, 1, [8], 2)
        h = linear(x_part, w)
        h_whole = piflux.unshard(h, 1, [8], 2)
        return (h_whole,)

    After:

        head = head(x, w)
        h = head[0]
        h_whole = piflux.unshard(h, 1, [8], 2)
        return (h_whole,)

    Of a graph that gathers nothing that is all. One that does more than compute stays as it is:
    that writes in place, draws random numbers or switches a mode such as autocast.
    """
    if not computes(gm.graph):
        return 0
    nodes = [n for n in gm.graph.nodes if n.op != "output" and not is_source(n)]
    tail = {n for n in nodes if n.target is UNSHARD}
    for node in nodes:
        if any(n in tail for n in node.all_input_nodes):
            tail.add(node)
    inside = [n for n in nodes if n not in tail]
    if inside:
        extract(gm, HEAD, inside)
    return len(inside)
