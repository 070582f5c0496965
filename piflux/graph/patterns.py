"""Find ops by example: a function is traced, and nodes are compared with it in a normal form."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from piflux.graph.nodes import op_name
from piflux.graph.sizes import sizes
from piflux.graph.values import known, ndim

CASTS = ("to", "float", "type_as")
_VIEWS = ("reshape", "view", "flatten", "unflatten")
"""What keeps the order of all numbers, so that shapes say all."""

_COMMUTES = ("add", "mul")

Found = Mapping[str, fx.Node]
"""What stands for the arguments of an example, by name."""


class Pattern:
    """Ops to be found, as the function that they compute.

    Args:
        example: of tensors, written in any of the ways that count as the same: operands of sums and
            products in any order, with and without casts to wider types, and views by any name.
        shapes: one for each argument.
    """

    def __init__(self, example: Callable[..., Tensor], *shapes: Sequence[int]) -> None:
        gm = fx.symbolic_trace(example)
        _Noting(gm).run(*(torch.empty(shape, device="meta") for shape in shapes))
        (self._result,) = gm.graph.output_node().all_input_nodes

    def find(self, node: fx.Node) -> Iterator[Found]:
        """Yields each way in which `node` is what the example returns."""
        return _matches(self._result, node, {})


class _Noting(fx.Interpreter):
    """Gives every node its example value."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return known(n)


class _Form(NamedTuple):
    """A node, however it is written."""

    op: str
    how: Hashable
    operands: Sequence[fx.Node]


def _matches(pattern: fx.Node, node: fx.Node, found: Found) -> Iterator[Found]:
    node = uncast(node)
    if pattern.op == "placeholder":
        if found.get(pattern.name, node) is node:
            yield {**found, pattern.name: node}
        return
    wanted, form = _form(pattern), _form(node)
    if wanted is None or form is None or wanted[:2] != form[:2]:
        return
    yield from _all_match(wanted.operands, form.operands, found)
    if form.op in _COMMUTES:
        yield from _all_match(wanted.operands, form.operands[::-1], found)


def _all_match(
    patterns: Sequence[fx.Node], nodes: Sequence[fx.Node], found: Found
) -> Iterator[Found]:
    if len(patterns) != len(nodes):
        return
    if not patterns:
        yield found
        return
    for first in _matches(patterns[0], nodes[0], found):
        yield from _all_match(patterns[1:], nodes[1:], first)


def uncast(node: fx.Node) -> fx.Node:
    """What was given a wider type, if any was."""
    while op_name(node) in CASTS:
        narrow: Any = node.args[0]
        x, y = known(narrow), known(node)
        if x.device != y.device or torch.promote_types(x.dtype, y.dtype) != y.dtype:
            break
        node = narrow
    return node


def _form(node: fx.Node) -> _Form | None:
    """The normal form of a node, None if it has none."""
    name = op_name(node)
    args: tuple[Any, ...] = node.args
    if name in _COMMUTES or name == "neg":
        tensors = all(isinstance(x, fx.Node) for x in args) and not node.kwargs
        return _Form(name, None, args) if tensors else None
    if name in _VIEWS:
        before, after = sizes(args[0]), sizes(node)
        kept = len(
            list(takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        )
        # The size of the first that differs follows from the others.
        return _Form("view", (len(before) - kept, tuple(after[kept + 1 :])), args[:1])
    if name in ("stack", "unbind"):
        dim: Any = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
        rank = ndim(node) if name == "stack" else ndim(args[0])
        inputs = args[0] if name == "stack" else args[:1]
        return _Form(name, dim if dim < 0 else dim - rank, inputs)
    if node.target is operator.getitem and isinstance(known(args[0]), (tuple, list)):
        return _Form("item", args[1], args[:1])
    return None
