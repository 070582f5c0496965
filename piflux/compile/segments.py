"""A finished graph as a list of what runs one after the other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx

from piflux.graph.extract import as_module
from piflux.graph.targets import UNSHARD
from piflux.passes.speed.enclose import HEAD
from piflux.passes.speed.fuse_linears import WEIGHTS

COLLECTIVE = "collective"
"""Gathers what the ranks predicted."""

TAIL = "tail"
"""What is computed of that."""


@dataclass(frozen=True)
class Segment:
    """A function of values that were given or made before.

    Attributes:
        name: what it is: 'hoisted' and 'weights' come first if there are any, then 'head', the work
            before the last collective, then 'collective' and 'tail'.
        run: takes what it reads, in order, and returns what it writes.
        reads: numbers of values.
        writes: likewise.
    """

    name: str
    run: Callable[..., Sequence[Any]]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class Segments:
    """A graph's segments, which are called like the graph.

    Attributes:
        segments: in order.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        constants: Mapping[int, Any],
        count: int,
        output: Sequence[Any],
    ) -> None:
        """`constants` are values that are neither given nor made; `count` is of the others."""
        self.segments = tuple(segments)
        self._constants = constants
        self._count = count
        self._output = output

    def __call__(self, *args: Any) -> Any:
        values = [*args, *[None] * (self._count - len(args))]
        for number, value in self._constants.items():
            values[number] = value
        for segment in self.segments:
            made = segment.run(*[values[i] for i in segment.reads])
            for number, value in zip(segment.writes, made, strict=True):
                values[number] = value
        return tuple(values[x.number] if isinstance(x, _Made) else x for x in self._output)


@dataclass(frozen=True)
class _Made:
    """In the output: a value by its number."""

    number: int


def segments_of(
    gm: fx.GraphModule, compiled: Mapping[str, Callable[..., Sequence[Any]]]
) -> Segments:
    """Take a graph apart at the modules that it calls and at its collectives.

    Args:
        gm: a graph whose calls of modules are read item by item, as `extract` leaves it.
        compiled: what runs in place of each module.
    """
    numbers = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    constants: dict[int, Any] = {}
    rest: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            numbers[node] = len(numbers)
            constants[numbers[node]] = _attribute(gm, str(node.target))
        elif node.op not in ("placeholder", "output"):
            rest.append(node)
    segments = []
    for name, group in groupby(rest, _name):
        nodes = list(group)
        call = nodes[0]
        if call.op == "call_module":
            inputs = [n for n in call.args if isinstance(n, fx.Node)]
            assert len(inputs) == len(call.args), "modules are given values"
            items = {n.args[1]: n for n in nodes[1:]}
            outputs = [items[i] for i in range(len(items))]
            run = compiled[name]
        else:
            inside = set(nodes)
            inputs = list(
                dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside)
            )
            outputs = [n for n in nodes if any(user not in inside for user in n.users)]
            run = as_module(inputs, nodes, outputs).forward
        for node in outputs:
            numbers[node] = len(numbers)
        reads = tuple(numbers[n] for n in inputs)
        segments.append(Segment(name, run, reads, tuple(numbers[n] for n in outputs)))
    returned = gm.graph.output_node().args[0]
    assert isinstance(returned, (tuple, list)), "Dynamo's graphs return several values"
    output = [_Made(numbers[x]) if isinstance(x, fx.Node) else x for x in returned]
    return Segments(segments, constants, len(numbers), output)


def with_weights(gm: fx.GraphModule, head: Callable[..., Sequence[Any]]) -> Callable[..., Any]:
    """A head that is given parameters, and makes `weights` of them where it runs.

    To look in each step whether they lie side by side takes the host milliseconds. A head that is
    recorded need not look where it is played.

    Args:
        gm: the head's graph, which from now on calls it so. It stays as it is if others read the
            weights, too, or there are none.
        head: what runs in place of it.
    """
    calls = {node.target: node for node in gm.graph.find_nodes(op="call_module")}
    if WEIGHTS not in calls:
        return head
    weights, call = calls[WEIGHTS], calls[HEAD]
    items = {n: n.args[1] for n in weights.users}
    if any(set(n.users) != {call} for n in items):
        return head
    join = gm.get_submodule(WEIGHTS).forward
    places = [items.get(n) for n in call.args]
    kept = [n for n in call.args if n not in items]
    call.args = (*kept, *weights.args)
    for node in (*items, weights):
        gm.graph.erase_node(node)

    def run(*args: Any) -> Any:
        given, joined = iter(args[: len(kept)]), join(*args[len(kept) :])
        return head(*[next(given) if i is None else joined[i] for i in places])

    return run


def _name(node: fx.Node) -> str:
    """Of the segment that a node belongs to."""
    if node.op == "call_module":
        return str(node.target)
    if node.target is operator.getitem and node.all_input_nodes[0].op == "call_module":
        return str(node.all_input_nodes[0].target)
    return COLLECTIVE if node.target is UNSHARD else TAIL


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name)
    return value
