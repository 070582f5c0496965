"""Sizes as expressions: what is equal or less, proved by algebra or made a guard."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from piflux.graph.values import near, tensors


def expr(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression that can be compared without adding a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else _integer(size)


_integer = lru_cache(maxsize=1 << 16)(sympy.Integer)
"""sympy has such a cache of its own, in Python and of a thousand numbers."""


def sizes(node: fx.Node, item: int = 0) -> list[sympy.Expr]:
    """The shape of a node's tensor."""
    return [expr(size) for size in tensors(node)[item].shape]


def all_sizes(value: Any) -> list[int | torch.SymInt]:
    """The sizes and strides of a tensor, or of a tuple's, and numbers that are symbols."""
    values = value if isinstance(value, (tuple, list)) else [value]
    shaped = [x for x in values if isinstance(x, Tensor)]
    return [
        *(size for x in shaped for size in (*x.shape, *x.stride())),
        *(x for x in values if isinstance(x, torch.SymInt)),
    ]


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


def bytes_of(x: Tensor) -> int:
    """Of a plain tensor, at the sizes that it was captured with."""
    return x.element_size() * prod(example_size(size, x) for size in x.shape)


def example_size(size: sympy.Expr | int | torch.SymInt, near: Tensor) -> int:
    """A size's value in the call that was captured; `near` is any fake tensor of the graph."""
    size = expr(size) if isinstance(size, (int, torch.SymInt)) else size
    if size.is_number:
        return int(size)
    env = _shape_env(near)
    # torch 2.11 and 2.12 have it under the second name.
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return int(size.xreplace(values))


def simplified(size: sympy.Expr, node: fx.Node) -> sympy.Expr:
    """The size in terms of as few symbols as the guards allow."""
    return size if size.is_number else _shape_env(near(node)).replace(size)


def _shape_env(fake: Tensor) -> ShapeEnv:
    env = cast(FakeTensor, fake).fake_mode.shape_env
    assert env is not None, "symbolic sizes have a shape environment"
    return env
