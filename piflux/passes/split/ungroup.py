"""Let attention repeat keys and values of grouped heads itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from piflux.graph.nodes import HEADS, SDPA, attention_arguments, is_attention, op_name, run_node
from piflux.graph.plan import Context
from piflux.graph.values import known, ndim


def ungroup(gm: fx.GraphModule, ctx: Context) -> int:
    """Give attention the keys and values of groups of heads once. Returns how many attentions.

    What is gathered and remembered is then as much as the model's projections give, and not as
    much as there are queries. On several ranks only: on one nothing is.

    Before, with 4 heads in 2 groups:

        r = k.repeat_interleave(2, dim=2)          # (1, 60, 4, 24)
        t = r.transpose(1, 2)
        out = scaled_dot_product_attention(q, t, u)

    After:

        t = k.transpose(1, 2)                      # (1, 2, 60, 24)
        out = scaled_dot_product_attention(q, t, u, enable_gqa=True)
    """
    if ctx.world_size == 1:
        return 0
    found = [(node, *_groups(node)) for node in gm.graph.nodes if is_attention(node)]
    grouped = [(node, key, value) for node, key, value in found if key and value]
    for node, key, value in grouped:
        call = attention_arguments(node)
        given = dict(zip(SDPA._fields, node.args, strict=False)) | node.kwargs
        with gm.graph.inserting_before(node):
            node.args = given.pop("query"), _moved(gm.graph, key), _moved(gm.graph, value)
        others = {name: x for name, x in given.items() if name not in ("key", "value")}
        node.kwargs = others | {"enable_gqa": True}
        for x in (call.key, call.value):
            _erase(gm.graph, x)
    return len(grouped)


class _Group(NamedTuple):
    """Keys or values before their heads were repeated.

    Attributes:
        x: what was repeated.
        times: how often.
        moves: the nodes that moved its dimensions since, the last first.
    """

    x: fx.Node
    times: int
    moves: Sequence[fx.Node]


def _groups(node: fx.Node) -> tuple[_Group, _Group] | tuple[None, None]:
    """An attention's keys and values, where both have as many heads in each group."""
    call = attention_arguments(node)
    key, value = _repeated(call.key), _repeated(call.value)
    heads = {known(x).shape[HEADS] for x in (call.query, call.key, call.value)}
    if known(call.enable_gqa) or key is None or value is None or len(heads) > 1:
        return None, None
    return (key, value) if key.times == value.times else (None, None)


def _repeated(node: fx.Node) -> _Group | None:
    """What keys or values were before their heads were repeated."""
    if ndim(node) != 4:
        return None
    moves: list[fx.Node] = []
    dim = 4 + HEADS
    while (before := _dim_before(node, dim)) is not None:
        moves.append(node)
        node, dim = node.all_input_nodes[0], before
    times = _times(node, dim)
    if times is not None:
        return _Group(node.all_input_nodes[0], times, moves)
    # As copies along a dimension of their own, which is then joined with that of the heads.
    if op_name(node) not in ("flatten", "reshape") or not _joins(node, dim):
        return None
    copies = node.all_input_nodes[0]
    if op_name(copies) not in ("repeat", "expand"):
        return None
    spread = copies.all_input_nodes[0]
    if op_name(spread) != "unsqueeze" or not _inserts(spread, dim + 1):
        return None
    shape, once = list(known(copies).shape), list(known(spread).shape)
    times, once[dim + 1] = shape[dim + 1], shape[dim + 1]
    if not isinstance(times, int) or times < 2 or shape != once:
        return None
    return _Group(spread.all_input_nodes[0], times, moves)


def _dim_before(node: fx.Node, dim: int) -> int | None:
    """Where a dimension was before a node that only moves dimensions; None for other nodes."""
    name, rank = op_name(node), ndim(node)
    arguments: list[Any] = [*node.args[1:], *node.kwargs.values()]
    if name == "contiguous":
        return dim
    if name in ("transpose", "swapaxes"):
        a, b = (int(d) % rank for d in arguments)
        return {a: b, b: a}.get(dim, dim)
    if name == "permute":
        order = arguments[0] if isinstance(arguments[0], Sequence) else arguments
        return int(order[dim]) % rank
    return None


def _times(node: fx.Node, dim: int) -> int | None:
    """How often `repeat_interleave` has each index along a dimension."""
    if op_name(node) != "repeat_interleave" or len(node.all_input_nodes) != 1:
        return None
    given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | node.kwargs
    times, along = given.get("repeats"), given.get("dim")
    if not isinstance(times, int) or times < 2 or not isinstance(along, int):
        return None
    return times if along % ndim(node) == dim else None


def _joins(node: fx.Node, dim: int) -> bool:
    """Whether a node makes one dimension of this one and the next, and nothing else."""
    shape = list(known(node.all_input_nodes[0]).shape)
    if len(shape) != 5:
        return False
    joined = [*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]]
    return all(a == b for a, b in zip(joined, known(node).shape, strict=True))


def _inserts(node: fx.Node, dim: int) -> bool:
    (at,) = (*node.args[1:], *node.kwargs.values())
    return isinstance(at, int) and at % ndim(node) == dim


def _moved(graph: fx.Graph, group: _Group) -> fx.Node:
    """What was repeated, with its dimensions where attention has them."""
    x = group.x
    for move in reversed(group.moves):
        copy = graph.node_copy(move, {move.all_input_nodes[0]: x}.__getitem__)
        args, kwargs = fx.map_arg((copy.args, copy.kwargs), known)
        with torch.no_grad():
            copy.meta = dict(move.meta) | {"example_value": run_node(copy, args, kwargs)}
        x = copy
    return x


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node that nobody reads any more, and what only it had read."""
    if node.users or node.op not in ("call_function", "call_method"):
        return
    before = node.all_input_nodes
    graph.erase_node(node)
    for x in before:
        _erase(graph, x)
