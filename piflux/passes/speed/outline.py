"""Give every repeated stretch of the graph one module, which is then compiled once."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from piflux.graph.blocks import SLOTS, number, or_number, readers, slot_of, stretches, written
from piflux.graph.described import described
from piflux.graph.extract import as_module, is_source
from piflux.graph.nodes import computes, is_value
from piflux.graph.plan import Context
from piflux.graph.sizes import all_sizes, expr
from piflux.graph.targets import SLOTS_FROM
from piflux.graph.values import known


def outline(gm: fx.GraphModule, ctx: Context) -> int:
    """Replace repeated blocks by calls of one module. Returns the number of blocks.

    Blocks are found by structure alone: the same ops on the same shapes over and over, around
    attentions. What differs from one to the next is an argument, as parameters are, or set before
    the call, as the first cache slot is. They are cut where the fewest bytes are alive, and what
    lies between them becomes modules, too.

    Before, of two blocks:

        h = linear(x, w)
        a = piflux.cached_sdpa(h, h, h, None, None, False, [8], 0, 2)
        h_1 = linear(a, w_1)
        a_1 = piflux.cached_sdpa(h_1, h_1, h_1, None, None, False, [8], 1, 2)
        return (a_1,)

    After:

        slots_from(0)
        piece_0 = piece_0(x, w)
        a = piece_0[0]
        slots_from(1)
        piece_0_1 = piece_0(a, w_1)
        a_1 = piece_0_1[0]
        return (a_1,)

    A graph without repetition stays as it is, and so do one whose blocks share a tuple, such as a
    tensor's size taken before them, and one that does more than compute: that writes in place,
    draws random numbers or switches a mode such as autocast.
    """
    sources = [n for n in gm.graph.nodes if is_source(n)]
    nodes = [n for n in gm.graph.nodes if n.op != "output" and not is_source(n)]
    if not all(map(is_value, sources)) or not computes(gm.graph):
        return 0
    nodes = [n for n in nodes if number(n) is None]
    symbols = {expr(known(n)): n for n in sources if isinstance(known(n), torch.SymInt)}
    found = []
    for part in stretches(nodes):
        inputs = _inputs(part, symbols)
        if inputs is None:
            return 0
        found.append(_Stretch(part, inputs))
    pieces: dict[Any, _Piece] = {}
    for stretch in found:
        piece = pieces.setdefault(stretch.form, _Piece(f"piece_{len(pieces)}", stretch))
        piece.outputs |= stretch.outputs
        piece.calls += 1
    blocks = sum(piece.calls for piece in pieces.values() if piece.calls > 1)
    if not blocks:
        return 0
    graph = fx.Graph()
    made = {source: graph.node_copy(source) for source in sources}
    for stretch in found:
        _call(graph, made, pieces[stretch.form], stretch)
    output = gm.graph.output_node()
    graph.node_copy(output, lambda n: or_number(n, made.__getitem__))
    for piece in pieces.values():
        gm.add_submodule(piece.name, _module(piece))
    # Another graph, since the plan speaks of the nodes of the one before.
    gm.graph = graph
    return blocks


class _Stretch:
    """Consecutive nodes.

    Attributes:
        nodes: in order.
        inputs: the nodes before it that it reads; symbols of sizes first.
        outputs: positions of its values that others read.
        slot: its first cache slot, None without any.
        form: what equal stretches have in common.
    """

    def __init__(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> None:
        self.nodes = nodes
        self.inputs = inputs
        inside = {node: i for i, node in enumerate(nodes)}
        self.outputs = {i for n, i in inside.items() if not readers(n) <= inside.keys()}
        self.slot = next((slot_of(n) for n in nodes if n.target in SLOTS), None)
        names = {n: f"node {i}" for n, i in inside.items()}
        names |= {n: f"input {i}" for i, n in enumerate(inputs)}
        self.form = (
            tuple(described(known(n)) for n in inputs),
            tuple(described(known(n)) for n in nodes),
            tuple(written(n, self.slot, names.__getitem__) for n in nodes),
        )


@dataclass
class _Piece:
    """A module for all stretches of one form.

    Attributes:
        name: the attribute that holds it.
        stretch: the first of them.
        outputs: positions of the values it returns: what is read of any of them.
        calls: how many they are.
    """

    name: str
    stretch: _Stretch
    outputs: set[int] = field(default_factory=set)
    calls: int = 0


def _inputs(
    nodes: Sequence[fx.Node], symbols: Mapping[sympy.Symbol, fx.Node]
) -> list[fx.Node] | None:
    """What a stretch reads; None if it can't be handed to a module."""
    read = [n for node in nodes for n in node.all_input_nodes if number(n) is None]
    outside = dict.fromkeys(n for n in read if n not in set(nodes))
    sizes = [size for n in (*outside, *nodes) for size in all_sizes(known(n))]
    free = {symbol for size in sizes for symbol in expr(size).free_symbols}
    if not free <= symbols.keys():
        return None
    # What inner compilers take no arguments of, or return.
    if any(isinstance(known(n), (torch.SymFloat, torch.SymBool, tuple, list)) for n in outside):
        return None
    # A module's sizes are derived from single symbols, which shapes alone need not show.
    return list(dict.fromkeys([*(symbols[s] for s in sorted(free, key=str)), *outside]))


def _call(
    graph: fx.Graph,
    made: dict[fx.Node, fx.Node],
    piece: _Piece,
    stretch: _Stretch,
) -> None:
    """Append a call of `piece` for `stretch`, and note in `made` what it makes."""
    if stretch.slot is not None:
        graph.call_function(SLOTS_FROM, (stretch.slot,)).meta["example_value"] = None
    call = graph.call_module(piece.name, tuple(made[n] for n in stretch.inputs))
    results = [stretch.nodes[i] for i in sorted(piece.outputs)]
    call.meta["example_value"] = tuple(known(n) for n in results)
    for i, node in enumerate(results):
        if readers(node):
            made[node] = graph.create_node(
                "call_function", operator.getitem, (call, i), name=node.name
            )
            made[node].meta = dict(node.meta)


def _module(piece: _Piece) -> fx.GraphModule:
    """A module that takes the stretch's inputs, with cache slots counted from its first."""
    stretch = piece.stretch
    outputs = [stretch.nodes[i] for i in sorted(piece.outputs)]
    module = as_module(stretch.inputs, stretch.nodes, outputs, number)
    for node in module.graph.nodes:
        if node.target in SLOTS:
            node.update_arg(SLOTS[node.target], slot_of(node) - stretch.slot)
    module.recompile()
    return module
