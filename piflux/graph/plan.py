"""What the passes tell each other: axes, segments, layouts and the plan that `layout` decides."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, cast

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class Axis(NamedTuple):
    """Dimension `dim` of a node's value; `item` says which tensor where a node returns several."""

    node: fx.Node
    dim: int
    item: int = 0


class Value(NamedTuple):
    """One tensor of a node."""

    node: fx.Node
    item: int = 0


@dataclass(eq=False)
class Segment:
    """A run of tokens born at one boundary.

    Two segments that meet in one op turn out to be the same tokens, or one turns out to be a run
    of several shorter ones (a joint rotary table and the text and image it serves). So a segment
    may come to stand for others: `layout` refines it.

    Attributes:
        length: its tokens.
        stands_for: the shorter ones that it turned out to be.
    """

    length: sympy.Expr
    stands_for: tuple[Segment, ...] = ()

    def resolve(self) -> Iterator[Segment]:
        if not self.stands_for:
            yield self
        for segment in self.stands_for:
            yield from segment.resolve()


Layout = tuple[Segment, ...]


class Attention(NamedTuple):
    """One attention to be rewritten, and the token axes of its keys and values."""

    node: fx.Node
    slot: int
    keys: Axis
    values: Axis


@dataclass
class Plan:
    """What `layout` decided; the editing passes only carry it out.

    Attributes:
        layouts: the segments of every token dimension.
        local: the nodes that run on one part.
        attentions: those that need the other parts' keys and values.
        cuts: (consumer, producer) -> the dimensions of the producer's whole value to cut for this
            consumer, in order.
        joins: likewise, the dimensions along which a part must become a whole.
        writers: a value that is cut or joined -> the last node that writes into it before.
    """

    layouts: dict[Axis, Layout] = field(default_factory=dict)
    local: set[fx.Node] = field(default_factory=set)
    attentions: list[Attention] = field(default_factory=list)
    cuts: dict[tuple[fx.Node, Value], tuple[int, ...]] = field(default_factory=dict)
    joins: dict[tuple[fx.Node, Value], tuple[int, ...]] = field(default_factory=dict)
    writers: dict[Value, fx.Node] = field(default_factory=dict)

    def layout(self, axis: Axis) -> Layout:
        """Refined as far as the whole graph asks for."""
        return tuple(s for segment in self.layouts[axis] for s in segment.resolve())

    def lengths(self, axis: Axis) -> tuple[sympy.Expr, ...]:
        """Full length of each segment."""
        return tuple(simplified(segment.length, axis.node) for segment in self.layout(axis))


@dataclass
class Context:
    """One compilation: what passes read and what they leave for the next.

    Attributes:
        world_size: the number of parts.
        rotates: whether most steps send no keys and values.
        plan: set by `layout`.
    """

    world_size: int
    rotates: bool = False
    plan: Plan = field(default_factory=Plan)


def expr(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression that can be compared without adding a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else _integer(size)


_integer = lru_cache(maxsize=1 << 16)(sympy.Integer)
"""sympy has such a cache of its own, in Python and of a thousand numbers."""


def known_equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes are the same by algebra alone."""
    return a == b or not _are_numbers(a, b) and sympy.expand(a - b) == 0


def holds(relation: sympy.Basic, node: fx.Node) -> bool:
    """Whether a relation between sizes of `node`'s graph holds.

    What can't be proved is asked of the captured sizes and becomes a guard: Dynamo compiles
    another graph for sizes that don't fulfil it.
    """
    if relation in (sympy.true, sympy.false):
        return bool(relation)
    return bool(_shape_env(near(node)).evaluate_expr(relation))


def same(node: fx.Node, a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes of `node`'s graph are equal, as `holds` has it."""
    return known_equal(a, b) or not _are_numbers(a, b) and holds(sympy.Eq(a, b), node)


def less(node: fx.Node, a: sympy.Expr, b: sympy.Expr | int) -> bool:
    """Whether one size of `node`'s graph is less than another, as `holds` has it."""
    return int(a) < int(b) if _are_numbers(a, b) else holds(sympy.Lt(a, b), node)


def _are_numbers(a: sympy.Expr, b: sympy.Expr | int) -> bool:
    """Whether Python can compare two sizes, in a hundredth of the time that sympy takes."""
    return a.is_Integer and (isinstance(b, int) or b.is_Integer)


def example_size(size: sympy.Expr | int | torch.SymInt, near: Tensor) -> int:
    """A size's value in the call that was captured; `near` is any fake tensor of the graph."""
    size = expr(size) if isinstance(size, (int, torch.SymInt)) else size
    if size.is_number:
        return int(size)
    env = _shape_env(near)
    # torch 2.11 and 2.12 have it under the second name.
    values = getattr(env, "backed_var_to_val", None) or env.var_to_val
    return int(size.xreplace(values))


def simplified(size: sympy.Expr, node: fx.Node) -> sympy.Expr:
    """The size in terms of as few symbols as the guards allow."""
    return size if size.is_number else _shape_env(near(node)).replace(size)


def _shape_env(fake: Tensor) -> ShapeEnv:
    env = cast(FakeTensor, fake).fake_mode.shape_env
    assert env is not None, "symbolic sizes have a shape environment"
    return env


def tensors(node: fx.Node) -> list[Tensor]:
    """The fake tensors that a node gives: none, one, or a tuple's."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)) and all(isinstance(x, Tensor) for x in value):
        return list(value)
    return []


def near(node: fx.Node) -> Tensor:
    """A fake tensor of the node's value, or of an operand where it has none."""
    return next(x for n in (node, *node.all_input_nodes) for x in tensors(n))


def ndim(node: fx.Node, item: int = 0) -> int:
    """How many dimensions a node's tensor has."""
    return tensors(node)[item].dim()


def sizes(node: fx.Node, item: int = 0) -> list[sympy.Expr]:
    """The shape of a node's tensor."""
    return [expr(size) for size in tensors(node)[item].shape]


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


def plain_name(node: fx.Node) -> str:
    """A node's name without what Dynamo puts around the name of an argument."""
    return re.sub(r"^l_(kwargs_|args_)?", "", node.name).strip("_")


def known(value: Any) -> Any:
    """An argument's value at compile time: a node's example, or the argument itself."""
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value
