"""Lengths of segments as graph values: literals where they are known, nodes where they are not."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from piflux.graph.values import known
from piflux.parts import part_length

Length = int | fx.Node


class Lengths:
    """Makes each length once, right after the graph's inputs, where every node can use it.

    Attributes:
        anchor: the node before which lengths stand.
    """

    def __init__(self, graph: fx.Graph, world_size: int) -> None:
        self._graph = graph
        self._world_size = world_size
        self._made: dict[Any, fx.Node] = {}
        self.anchor = next(node for node in graph.nodes if node.op != "placeholder")
        tracer = fx.proxy.GraphAppendingTracer(graph)
        self._symbols = {
            value.node.expr: fx.Proxy(node, tracer)
            for node in graph.nodes
            if node.op == "placeholder" and isinstance(value := known(node), torch.SymInt)
        }

    def full(self, length: sympy.Expr) -> Length:
        """A run's full length."""
        if length.is_number:
            return int(length)

        def from_inputs() -> fx.Node:
            return sympy_interp(PythonReferenceAnalysis, self._symbols, length).node

        return self._once(length, from_inputs)

    def local(self, lengths: Sequence[sympy.Expr]) -> Length:
        """How many tokens a part of segments of these full lengths has."""
        total: Length = 0
        for length in lengths:
            total = self._apply(operator.add, total, self._part(self.full(length)), "tokens_part")
        return total

    def _part(self, full: Length) -> Length:
        if isinstance(full, int):
            return part_length(full, self._world_size)
        raised = self._apply(operator.add, full, self._world_size - 1, f"{full.name}_raised")
        return self._apply(operator.floordiv, raised, self._world_size, f"{full.name}_part")

    def _apply(self, function: Callable[..., Any], a: Length, b: Length, name: str) -> Length:
        if isinstance(a, int) and isinstance(b, int):
            return int(function(a, b))
        if function is operator.add and 0 in (a, b):
            return a if b == 0 else b
        return self._once(
            (function, a, b),
            lambda: self._graph.create_node("call_function", function, (a, b), name=name),
        )

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._made:
            with self._graph.inserting_before(self.anchor):
                self._made[key] = _with_example(make())
        return self._made[key]


def _with_example(node: fx.Node) -> fx.Node:
    """Give a node of integer arithmetic, and those it was made from, their example values."""
    if "example_value" not in node.meta:
        args = [known(_with_example(x) if isinstance(x, fx.Node) else x) for x in node.args]
        assert callable(node.target)
        node.meta["example_value"] = node.target(*args)
    return node
