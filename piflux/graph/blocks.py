"""The repeated blocks of a model: found by structure alone, as data for passes and programs."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from piflux.graph.described import described
from piflux.graph.extract import is_source
from piflux.graph.nodes import is_attention
from piflux.graph.sizes import bytes_of
from piflux.graph.targets import CACHED, SEND
from piflux.graph.values import known, tensors

# The most that is looked for; a block of a known model attends at most twice.
ATTENTIONS_A_BLOCK = 4

SLOTS = {
    op: [argument.name for argument in op._schema.arguments].index("slot") for op in (CACHED, SEND)
}
"""Which argument of an op is a cache slot."""


_Form = tuple[tuple[str, Any, str], ...]


@dataclass(frozen=True)
class Block:
    """One of several stretches of a graph that run the same ops on the same shapes.

    Attributes:
        kind: a number; blocks of one kind are alike.
        attentions: the numbers of its attentions, in the graph's order.
        inputs: positions of the graph's inputs that it alone reads: its parameters.
    """

    kind: int
    attentions: tuple[int, ...]
    inputs: tuple[int, ...]


def find_blocks(graph: fx.Graph) -> tuple[Block, ...]:
    """The repeated blocks of a graph, in order; none where nothing repeats.

    The last block of a kind may lack what leads to a next one.
    """
    nodes = [n for n in graph.nodes if n.op != "output" and not is_source(n) and number(n) is None]
    attentions = [n for n in nodes if is_attention(n) or n.target is CACHED]
    inputs = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    found = stretches(nodes)
    forms = [_form(stretch) for stretch in found]
    kinds = {form: kind for kind, form in enumerate(dict.fromkeys(forms)) if forms.count(form) > 1}
    blocks: list[tuple[int, Sequence[fx.Node]]] = []
    for i, (stretch, form) in enumerate(zip(found, forms, strict=True)):
        if form in kinds:
            blocks.append((kinds[form], stretch))
        elif i and forms[i - 1] in kinds:
            begun = _begun(found[i - 1], forms[i - 1], form, inputs)
            if begun:
                blocks.append((kinds[forms[i - 1]], stretch[:begun]))
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kind for kind, _ in blocks))}
    made = []
    for kind, stretch in blocks:
        inside = set(stretch)
        read = {n for node in stretch for n in node.all_input_nodes if n in inputs}
        of_block = tuple(i for i, n in enumerate(attentions) if n in inside)
        own = tuple(sorted(inputs[n] for n in read if n.users.keys() <= inside))
        if of_block:
            made.append(Block(numbers[kind], of_block, own))
    return tuple(made)


def _begun(block: Sequence[fx.Node], form: _Form, other: _Form, inputs: Container[fx.Node]) -> int:
    """How many nodes another stretch begins with as a block does; 0 if some that attend or read
    parameters are missing."""
    alike = 0
    while alike < min(len(form), len(other)) and form[alike] == other[alike]:
        alike += 1
    missing = block[alike:]
    needed = any(
        n.target is CACHED or is_attention(n) or any(x in inputs for x in n.all_input_nodes)
        for n in missing
    )
    return 0 if needed else alike


def _form(stretch: Sequence[fx.Node]) -> _Form:
    """What blocks of one kind have in common."""
    names = {n: f"node {i}" for i, n in enumerate(stretch)}
    return tuple(written(n, slot_of(n), lambda x: names.get(x, "outside")) for n in stretch)


def number(node: fx.Node) -> int | float | None:
    """A node's value where it is one number for all inputs."""
    value = known(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        value = value.node.expr
        if not value.is_number:
            return None
        return int(value) if value.is_Integer else float(value)
    return value if isinstance(value, (int, float)) else None


def readers(node: fx.Node) -> set[fx.Node]:
    """The users that remain: numbers are written where they are used."""
    return {user for user in node.users if number(user) is None}


def or_number(node: fx.Node, otherwise: Callable[[fx.Node], Any]) -> Any:
    value = number(node)
    return otherwise(node) if value is None else value


def stretches(nodes: Sequence[fx.Node]) -> list[Sequence[fx.Node]]:
    """The nodes in stretches: each repeated block, and what lies between."""
    cuts = [0]
    like = [(written(n, slot_of(n), lambda _: "node"), described(known(n))) for n in nodes]
    order = {node: i for i, node in enumerate(nodes)}
    last = [max((order.get(user, len(nodes)) for user in readers(n)), default=-1) for n in nodes]
    attentions = [i for i, n in enumerate(nodes) if is_attention(n) or n.target is CACHED]
    for i, here in enumerate(attentions):
        for there in attentions[i + 1 : i + 1 + ATTENTIONS_A_BLOCK]:
            period = there - here
            # Each node from start to stop is like the one a period later.
            start = stop = here
            while start > cuts[-1] and like[start - 1] == like[start - 1 + period]:
                start -= 1
            while stop + period < len(nodes) and like[stop] == like[stop + period]:
                stop += 1
            if here >= cuts[-1] and stop - start >= period:
                phases = range(start, min(start + period, stop - period + 1))
                first = min(phases, key=lambda at: _alive(nodes, last, start, at + period))
                cuts += range(first, stop + period + 1, period)
    cuts.append(len(nodes))
    return [nodes[a:b] for a, b in pairwise(cuts) if a < b]


def _alive(nodes: Sequence[fx.Node], last: Sequence[int], start: int, cut: int) -> tuple[int, int]:
    """Bytes and number of the values made from `start` on that are read behind `cut`."""
    alive = [x for i in range(start, cut) if last[i] >= cut for x in tensors(nodes[i])]
    return sum(map(bytes_of, alive)), len(alive)


def slot_of(node: fx.Node) -> Any:
    return node.args[SLOTS[node.target]] if node.target in SLOTS else None


def written(node: fx.Node, slot: Any, name: Callable[[fx.Node], str]) -> tuple[str, Any, str]:
    """The op and its arguments, with other nodes by name and cache slots counted from `slot`."""
    args = list(node.args)
    if node.target in SLOTS:
        args[SLOTS[node.target]] -= slot
    arguments = fx.map_arg((args, node.kwargs), lambda n: or_number(n, name))
    return node.op, node.target, repr(arguments)
