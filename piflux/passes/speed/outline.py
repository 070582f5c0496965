"""Give every repeated stretch of the graph one module, which is then compiled once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from piflux.graph.extract import as_module, is_source
from piflux.graph.nodes import computes, is_attention, is_value
from piflux.graph.plan import Context, example_size, expr, known, tensors
from piflux.graph.targets import CACHED, SEND, SLOTS_FROM
from piflux.graph.values import all_sizes, described

# The most that is looked for; a block of a known model attends at most twice.
ATTENTIONS_A_BLOCK = 4

_SLOTS = {
    op: [argument.name for argument in op._schema.arguments].index("slot") for op in (CACHED, SEND)
}


def outline(gm: fx.GraphModule, ctx: Context) -> int:
    """Replace repeated blocks by calls of one module. Returns the number of blocks.

    Blocks are found by structure alone: the same ops on the same shapes over and over, around
    attentions. What differs from one to the next is an argument, as parameters are, or set before
    the call, as the first cache slot is. They are cut where the fewest bytes are alive, and what
    lies between them becomes modules, too.

    Before, of two blocks:

        h = linear(x, w)
        a = piflux.cached_sdpa(h, h, h, None, None, False, [8], 0, 2, 'piflux')
        h_1 = linear(a, w_1)
        a_1 = piflux.cached_sdpa(h_1, h_1, h_1, None, None, False, [8], 1, 2, 'piflux')
        return (a_1,)

    After:

        slots_from('piflux', 0)
        piece_0 = piece_0(x, w)
        a = piece_0[0]
        slots_from('piflux', 1)
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
    nodes = [n for n in nodes if _number(n) is None]
    symbols = {expr(known(n)): n for n in sources if isinstance(known(n), torch.SymInt)}
    stretches = []
    for part in _parts(nodes):
        inputs = _inputs(part, symbols)
        if inputs is None:
            return 0
        stretches.append(_Stretch(part, inputs))
    pieces: dict[Any, _Piece] = {}
    for stretch in stretches:
        piece = pieces.setdefault(stretch.form, _Piece(f"piece_{len(pieces)}", stretch))
        piece.outputs |= stretch.outputs
        piece.calls += 1
    blocks = sum(piece.calls for piece in pieces.values() if piece.calls > 1)
    if not blocks:
        return 0
    graph = fx.Graph()
    made = {source: graph.node_copy(source) for source in sources}
    for stretch in stretches:
        _call(graph, made, ctx.runtime, pieces[stretch.form], stretch)
    output = gm.graph.output_node()
    graph.node_copy(output, lambda n: _or_number(n, made.__getitem__))
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
        self.outputs = {i for n, i in inside.items() if not _readers(n) <= inside.keys()}
        self.slot = next((_slot(n) for n in nodes if n.target in _SLOTS), None)
        names = {n: f"node {i}" for n, i in inside.items()}
        names |= {n: f"input {i}" for i, n in enumerate(inputs)}
        self.form = (
            tuple(described(known(n)) for n in inputs),
            tuple(described(known(n)) for n in nodes),
            tuple(_written(n, self.slot, names.__getitem__) for n in nodes),
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


def _number(node: fx.Node) -> int | float | None:
    """A node's value where it is one number for all inputs."""
    value = known(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        value = value.node.expr
        if not value.is_number:
            return None
        return int(value) if value.is_Integer else float(value)
    return value if isinstance(value, (int, float)) else None


def _readers(node: fx.Node) -> set[fx.Node]:
    """The users that remain: numbers are written where they are used."""
    return {user for user in node.users if _number(user) is None}


def _or_number(node: fx.Node, otherwise: Callable[[fx.Node], Any]) -> Any:
    number = _number(node)
    return otherwise(node) if number is None else number


def _parts(nodes: Sequence[fx.Node]) -> list[Sequence[fx.Node]]:
    """The nodes in stretches: each repeated block, and what lies between."""
    cuts = [0]
    like = [(_written(n, _slot(n), lambda _: "node"), described(known(n))) for n in nodes]
    order = {node: i for i, node in enumerate(nodes)}
    last = [max((order.get(user, len(nodes)) for user in _readers(n)), default=-1) for n in nodes]
    attentions = [i for i, n in enumerate(nodes) if is_attention(n) or n.target is CACHED]
    for number, here in enumerate(attentions):
        for there in attentions[number + 1 : number + 1 + ATTENTIONS_A_BLOCK]:
            period = there - here
            # Each node from start to stop is like the one a period later.
            start = stop = here
            while start > cuts[-1] and like[start - 1] == like[start - 1 + period]:
                start -= 1
            while stop + period < len(nodes) and like[stop] == like[stop + period]:
                stop += 1
            if here >= cuts[-1] and stop - start >= period:
                phases = range(start, min(start + period, stop - period + 1))
                first = min(phases, key=lambda i: _alive(nodes, last, start, i + period))
                cuts += range(first, stop + period + 1, period)
    cuts.append(len(nodes))
    return [nodes[a:b] for a, b in pairwise(cuts) if a < b]


def _alive(nodes: Sequence[fx.Node], last: Sequence[int], start: int, cut: int) -> tuple[int, int]:
    """Bytes and number of the values made from `start` on that are read behind `cut`."""
    alive = [x for i in range(start, cut) if last[i] >= cut for x in tensors(nodes[i])]
    return sum(map(_bytes, alive)), len(alive)


def _bytes(x: Tensor) -> int:
    return x.element_size() * prod(example_size(size, x) for size in x.shape)


def _inputs(
    nodes: Sequence[fx.Node], symbols: Mapping[sympy.Symbol, fx.Node]
) -> list[fx.Node] | None:
    """What a stretch reads; None if it can't be handed to a module."""
    read = [n for node in nodes for n in node.all_input_nodes if _number(n) is None]
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


def _slot(node: fx.Node) -> Any:
    return node.args[_SLOTS[node.target]] if node.target in _SLOTS else None


def _written(node: fx.Node, slot: Any, name: Callable[[fx.Node], str]) -> tuple[str, Any, str]:
    """The op and its arguments, with other nodes by name and cache slots counted from `slot`."""
    args = list(node.args)
    if node.target in _SLOTS:
        args[_SLOTS[node.target]] -= slot
    arguments = fx.map_arg((args, node.kwargs), lambda n: _or_number(n, name))
    return node.op, node.target, repr(arguments)


def _call(
    graph: fx.Graph,
    made: dict[fx.Node, fx.Node],
    runtime: str,
    piece: _Piece,
    stretch: _Stretch,
) -> None:
    """Append a call of `piece` for `stretch`, and note in `made` what it makes."""
    if stretch.slot is not None:
        graph.call_function(SLOTS_FROM, (runtime, stretch.slot)).meta["example_value"] = None
    call = graph.call_module(piece.name, tuple(made[n] for n in stretch.inputs))
    results = [stretch.nodes[i] for i in sorted(piece.outputs)]
    call.meta["example_value"] = tuple(known(n) for n in results)
    for i, node in enumerate(results):
        if _readers(node):
            made[node] = graph.create_node(
                "call_function", operator.getitem, (call, i), name=node.name
            )
            made[node].meta = dict(node.meta)


def _module(piece: _Piece) -> fx.GraphModule:
    """A module that takes the stretch's inputs, with cache slots counted from its first."""
    stretch = piece.stretch
    outputs = [stretch.nodes[i] for i in sorted(piece.outputs)]
    module = as_module(stretch.inputs, stretch.nodes, outputs, _number)
    for node in module.graph.nodes:
        if node.target in _SLOTS:
            node.update_arg(_SLOTS[node.target], _slot(node) - stretch.slot)
    module.recompile()
    return module
