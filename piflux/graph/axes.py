"""Places in a graph where a dimension, or a tensor, is spoken of."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from piflux.graph.values import known, tensors


class Axis(NamedTuple):
    """Dimension `dim` of a node's value; `item` says which tensor where a node returns several."""

    node: fx.Node
    dim: int
    item: int = 0


class Value(NamedTuple):
    """One tensor of a node."""

    node: fx.Node
    item: int = 0


def axes(node: fx.Node) -> Iterator[Axis]:
    for item, x in enumerate(tensors(node)):
        for dim in range(x.dim()):
            yield Axis(node, dim, item)


def operands(node: fx.Node) -> list[Value]:
    """Every tensor that a node reads, each once."""
    if node.target is operator.getitem and isinstance(known(node.args[0]), (tuple, list)):
        source, item = node.args
        assert isinstance(source, fx.Node) and isinstance(item, int)
        return [Value(source, item % len(tensors(source)))] if tensors(source) else []
    return [Value(n, i) for n in node.all_input_nodes for i in range(len(tensors(n)))]
