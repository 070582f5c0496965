"""What the passes tell each other: segments, layouts and the plan that `layout` decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import sympy
from torch import fx

from piflux.graph.axes import Axis, Value
from piflux.graph.sizes import simplified


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens born at one boundary, `length` long as a whole."""

    length: sympy.Expr


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
        joins: likewise, the dimensions along which a part must become a whole; the part of a
            producer that is whole is its cut copy, which was written into.
        cut_after: a value that is cut once it was written into -> the last node that does so.
        join_after: likewise, a value that is joined.
    """

    layouts: dict[Axis, Layout] = field(default_factory=dict)
    local: set[fx.Node] = field(default_factory=set)
    attentions: list[Attention] = field(default_factory=list)
    cuts: dict[tuple[fx.Node, Value], tuple[int, ...]] = field(default_factory=dict)
    joins: dict[tuple[fx.Node, Value], tuple[int, ...]] = field(default_factory=dict)
    cut_after: dict[Value, fx.Node] = field(default_factory=dict)
    join_after: dict[Value, fx.Node] = field(default_factory=dict)

    def lengths(self, axis: Axis) -> tuple[sympy.Expr, ...]:
        """Full length of each segment."""
        return tuple(simplified(segment.length, axis.node) for segment in self.layouts[axis])


class Gathered(NamedTuple):
    """Weights that a program gathers together; see `piflux.memory.shares`.

    Attributes:
        runs: their positions among the graph's inputs; those of one run adjoin in memory.
        buffer: which of two buffers they are gathered into.
        bytes: of all of them.
        hoisted: whether they are read for all steps of an image at once.
    """

    runs: tuple[tuple[int, ...], ...]
    buffer: int
    bytes: int
    hoisted: bool


@dataclass
class Context:
    """One compilation: what passes read and what they leave for the next.

    Attributes:
        world_size: the number of parts.
        rotates: whether most steps send no keys and values.
        plan: set by `layout`.
        gathered: set by `fetch`: weights by the numbers under which they are fetched.
    """

    world_size: int
    rotates: bool = False
    plan: Plan = field(default_factory=Plan)
    gathered: list[Gathered] = field(default_factory=list)
