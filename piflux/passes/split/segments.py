"""Which runs of tokens are the same: a union-find whose members can also be cut in two."""

from __future__ import annotations

import sympy
from torch import fx

from piflux.errors import CannotShard
from piflux.graph.plan import Layout, Segment
from piflux.graph.sizes import example_size, known_equal, less, same
from piflux.graph.values import near

FEWEST_TOKENS = 2
"""A shift by fewer is refused: it would refine a layout into runs as short."""


class Segments:
    """What is known of segments so far.

    Two segments that meet in one op turn out to be the same tokens, or one turns out to be a run
    of several shorter ones (a joint rotary table, and the text and image that it serves). So a
    segment may come to stand for others: for one, if they are the same, or for two, if it was cut.
    A layout is therefore refined before it is read, and all layouts again when all is known.
    """

    def __init__(self) -> None:
        self._stands_for: dict[Segment, Layout] = {}

    def born(self, node: fx.Node, length: sympy.Expr) -> Layout:
        """The layout of `length` tokens of which nothing else is known; of none it is empty."""
        return () if is_none(node, length) else (Segment(length),)

    def refined(self, layout: Layout) -> Layout:
        """What the segments stand for by now."""
        return tuple(s for segment in layout for s in self._members(segment))

    def take(self, node: fx.Node, layout: Layout, start: sympy.Expr, length: sympy.Expr) -> Layout:
        """The segments of layout[start : start + length]; those that reach over an edge are cut.

        Raises:
            CannotShard: the run reaches beyond the layout.
        """
        layout = self.refined(layout)
        if is_none(node, length):
            return ()
        if start == 0 and known_equal(length, sum((s.length for s in layout), sympy.Integer(0))):
            return layout  # most links lead all tokens
        layout, first = self._cut(node, layout, start)
        layout, end = self._cut(node, layout, sympy.expand(start + length))
        return layout[first:end]

    def unite(self, node: fx.Node, a: Layout, b: Layout) -> Layout:
        """Two layouts of the same tokens become one.

        Raises:
            CannotShard: they are of different lengths, or shifted against each other by a few
                tokens.
        """
        while True:
            a, b = self.refined(a), self.refined(b)
            pair = next(((x, y) for x, y in zip(a, b, strict=False) if x is not y), None)
            if pair is None:
                break
            x, y = pair
            if same(node, x.length, y.length):
                self._stands_for[y] = (x,)
            elif less(node, x.length, y.length):
                self._split(node, y, x.length, shifts=y in a)
            else:
                self._split(node, x, y.length, shifts=x in b)
        if len(a) != len(b):
            raise CannotShard(node, "two operands have different numbers of tokens")
        return a

    def _members(self, segment: Segment) -> Layout:
        if segment not in self._stands_for:
            return (segment,)
        # What it stands for directly is renewed, so that the next look is short.
        self._stands_for[segment] = self.refined(self._stands_for[segment])
        return self._stands_for[segment]

    def _cut(self, node: fx.Node, layout: Layout, edge: sympy.Expr) -> tuple[Layout, int]:
        """The layout with an edge between two segments at `edge`, and how many lie before it."""
        at = sympy.Integer(0)
        for number, segment in enumerate(layout):
            if same(node, edge, at):
                return layout, number
            end = sympy.expand(at + segment.length)
            if not same(node, edge, end) and less(node, edge, end):
                first = sympy.expand(edge - at)
                # The segment may stand in the layout more than once.
                before = len(self.refined(layout[:number]))
                self._split(node, segment, first)
                repeats = sum(s is segment for s in layout[:number])
                return self.refined(layout), before + repeats + 1
            at = end
        if same(node, edge, at):
            return layout, len(layout)
        raise CannotShard(node, "takes more tokens than there are")

    def _split(
        self, node: fx.Node, segment: Segment, first: sympy.Expr, shifts: bool = False
    ) -> None:
        """Cut a segment, at the request of `node`, into its first tokens and the others.

        Args:
            shifts: whether the tokens before and after an op that moves them meet here. They would
                be cut again and again, into runs as long as the shift.
        """
        rest = sympy.expand(segment.length - first)
        for piece in (first, rest) if shifts else ():
            if less(node, piece, FEWEST_TOKENS):
                raise CannotShard(
                    node,
                    f"takes a run of {example_size(piece, near(node))} tokens out of "
                    f"{example_size(segment.length, near(node))} and has it meet the others: this "
                    "mixes tokens",
                )
        self._stands_for[segment] = (Segment(first), Segment(rest))


def is_none(node: fx.Node, length: sympy.Expr) -> bool:
    """Whether a run has no tokens, as padding to a length that is there already."""
    return not length.is_positive and same(node, length, sympy.Integer(0))
