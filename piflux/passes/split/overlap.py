"""Send each attention's keys and values as soon as they exist, and order other work behind that."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import takewhile

import torch
from torch import fx

from piflux.graph.nodes import only_computes
from piflux.graph.plan import Context
from piflux.graph.targets import CACHED, SEND
from piflux.graph.values import tensors

_SENT = ("slot", "world_size")
_ARGUMENTS = [argument.name for argument in CACHED._schema.arguments]


def overlap(gm: fx.GraphModule, ctx: Context) -> int:
    """Split each attention into a send and the rest. Returns the number of attentions.

    What leads to an attention's keys and values comes first, then the send, then what else is there
    before the attention or does not wait for it: query projections, other streams, an MLP that runs
    beside. While it computes, the keys and values travel.

    Before:

        m = linear(x, w)
        q = linear(x, w_q)
        k = linear(x, w_k)
        a = piflux.cached_sdpa(q, k, k, None, None, False, [8], 0, 2)
        return (a, m)

    After:

        k = linear(x, w_k)
        sent = piflux.send_kv(k, k, 0, 2)
        m = linear(x, w)
        q = linear(x, w_q)
        a = piflux.cached_sdpa(q, k, k, None, None, False, [8], 0, 2, sent)
        return (a, m)

    Nothing is moved past a node that does more than compute: that writes in place, draws random
    numbers or switches a mode such as autocast.
    """
    graph = gm.graph
    sends = {node: _send(graph, node) for node in graph.nodes if node.target is CACHED}
    below = _below(graph, sends)
    order: list[fx.Node] = []
    run: list[fx.Node] = []
    for node in graph.nodes:
        if only_computes(node):
            run.append(node)
        else:
            order += [*_ordered(run, sends, below), node]
            run = []
    *moved, output = order
    for node in moved:
        output.prepend(node)
    return len(sends)


def _send(graph: fx.Graph, attention: fx.Node) -> fx.Node:
    """Insert the send of an attention's keys and values right before it."""
    _, key, value, *_ = attention.args
    assert isinstance(key, fx.Node)
    with graph.inserting_before(attention):
        sent = graph.create_node(
            "call_function",
            SEND,
            (key, value, *(attention.args[_ARGUMENTS.index(name)] for name in _SENT)),
            name="sent",
        )
    sent.meta["example_value"] = tensors(key)[0].new_empty(1, dtype=torch.uint8)
    attention.args = (*attention.args, sent)
    return sent


def _below(graph: fx.Graph, attentions: Iterable[fx.Node]) -> set[fx.Node]:
    """What depends on an attention."""
    below: set[fx.Node] = set()
    for node in graph.nodes:
        if any(x in below or x in attentions for x in node.all_input_nodes):
            below.add(node)
    return below


def _ordered(
    nodes: Sequence[fx.Node], sends: Mapping[fx.Node, fx.Node], below: set[fx.Node]
) -> list[fx.Node]:
    """Consecutive nodes, with what the sends need first; otherwise in the order that they have."""
    rest = dict.fromkeys(nodes)
    order: list[fx.Node] = []

    def place(chosen: Iterable[fx.Node]) -> None:
        for node in list(chosen):
            del rest[node]
            order.append(node)

    for attention in filter(sends.__contains__, nodes):
        needed = _needed(sends[attention], rest)
        place(node for node in rest if node in needed)
        ahead = list(rest)
        place(ahead[: ahead.index(attention)])
        place(_beside(list(rest), sends, below))
        place([attention])
    place(rest)
    return order


def _needed(node: fx.Node, rest: Container[fx.Node]) -> set[fx.Node]:
    """The node and those of `rest` that it depends on."""
    needed = {node}
    todo = [node]
    while todo:
        new = {x for x in todo.pop().all_input_nodes if x in rest} - needed
        needed |= new
        todo += new
    return needed


def _beside(
    rest: Sequence[fx.Node], sends: Container[fx.Node], below: Container[fx.Node]
) -> list[fx.Node]:
    """What stands behind the first of `rest`, an attention, and before the next without waiting
    for it.

    Nodes that depend on no attention stay: most serve a later block, as modulations do.
    """
    beside: list[fx.Node] = []
    waiting = set(rest)
    for node in takewhile(lambda node: node not in sends, rest[1:]):
        if node in below and waiting.isdisjoint(node.all_input_nodes):
            beside.append(node)
            waiting.remove(node)
    return beside
