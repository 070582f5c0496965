"""Moving part of a graph into a module of its own: what `hoist` and `enclose` have in common."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import SymInt, fx, nn

from piflux.graph.modules import module_of
from piflux.graph.values import known

SOURCES = ("placeholder", "get_attr", "call_module")
"""Nodes that stay in the graph when others move: what it is given, and what was moved before."""


def is_source(node: fx.Node) -> bool:
    """Whether a node is a source or an item of one."""
    item = node.target is operator.getitem and node.all_input_nodes[0].op == "call_module"
    return node.op in SOURCES or item


def extract(gm: fx.GraphModule, name: str, nodes: Sequence[fx.Node]) -> fx.Node:
    """Move nodes that read sources alone, and each other, into the module `name`.

    Args:
        gm: the graph's module.
        name: the attribute that holds the new module.
        nodes: in the graph's order.

    Returns:
        The call, a tuple of what others read of the nodes. It stands after the last source.
    """
    inside = set(nodes)
    # A module's sizes are derived from single symbols, which shapes alone need not show.
    sizes = [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(known(n), SymInt)]
    read = [x for n in nodes for x in n.all_input_nodes if x not in inside]
    inputs = list(dict.fromkeys([*sizes, *read]))
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    gm.add_submodule(name, as_module(inputs, nodes, outputs))
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if not is_source(n))):
        call = gm.graph.call_module(name, tuple(inputs))
        call.meta["example_value"] = tuple(known(n) for n in outputs)
        for i, node in enumerate(outputs):
            item = gm.graph.create_node(
                "call_function", operator.getitem, (call, i), name=node.name
            )
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    return call


def as_module(
    inputs: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    number: Callable[[fx.Node], int | float | None] = lambda node: None,
) -> fx.GraphModule:
    """Returns a module that takes the inputs, computes the nodes and gives a tuple of the outputs.

    Args:
        inputs: what the nodes read and are not.
        nodes: in the graph's order.
        outputs: some of the nodes.
        number: what stands in place of a node where others read it, if anything does.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}

    def read(node: fx.Node) -> Any:
        value = number(node)
        return made[node] if value is None else value

    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta["example_value"] = known(node)
    for node in nodes:
        made[node] = graph.node_copy(node, read)
    graph.output(tuple(made[n] for n in outputs))
    return module_of(nn.Module(), graph)
