"""Make one product of the linear layers that read the same tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, maybe_get_fake_mode
from torch.multiprocessing.reductions import StorageWeakRef

from piflux.graph.described import described
from piflux.graph.extract import extract
from piflux.graph.nodes import computes, is_attention, op_name
from piflux.graph.plan import Context
from piflux.graph.targets import CACHED, SEND
from piflux.graph.values import known, wraps
from piflux.kernels.products import adjoining

WEIGHTS = "weights"
"""The module's name."""


class _Layer(NamedTuple):
    """A linear layer: what it reads, its weight and, if it has one, its bias."""

    node: fx.Node
    x: fx.Node
    parameters: Sequence[fx.Node]


def fuse_linears(gm: fx.GraphModule, ctx: Context) -> int:
    """Fuse linear layers of one input and one shape. Returns how many.

    In a diffusion transformer these are the projections to queries, keys and values. Where a rank
    has few tokens, each alone leaves part of a GPU without work.

    Before:

        q = linear(x, w_q)
        k = linear(x, w_k)
        a = scaled_dot_product_attention(q, k, k)
        return (a,)

    After:

        weights = weights(w_q, w_k)
        linear = linear(x, weights[0])
        q = narrow(linear, -1, 0, 4)
        k = narrow(linear, -1, 4, 4)
        a = scaled_dot_product_attention(q, k, k)
        return (a,)

    Layers are fused between two attentions, never over one. Unless the policy is `rotate`, whose
    steps send nothing for the most part, what `overlap` put behind a send stays there. Their
    parameters are moved together in memory (`adjoining`), so nothing is held twice; quantized ones
    are, too, if they are held row by row. Parameters are left alone that are part of a memory that
    holds others, too, and so is a graph that does more than compute, as for `enclose`.
    """
    if not computes(gm.graph):
        return 0
    groups = list(_groups(gm.graph, ctx))
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    weights = [node for group in groups for node in _fuse(gm.graph, group, number)]
    if weights:
        extract(gm, WEIGHTS, weights)
    return sum(map(len, groups))


def _groups(graph: fx.Graph, ctx: Context) -> Iterator[list[_Layer]]:
    """Layers to be fused, in the graph's order."""
    groups: dict[Any, list[_Layer]] = {}
    period = 0
    for node in graph.nodes:
        ahead = node.target is SEND and not ctx.rotates
        if ahead or node.target is CACHED or is_attention(node):
            period += 1
        elif op_name(node) == "linear" and (layer := _layer(node)) is not None:
            alike = tuple(described(known(p)) for p in layer.parameters)
            groups.setdefault((layer.x, alike, period), []).append(layer)
    moved: dict[fx.Node, frozenset[fx.Node]] = {}
    for group in groups.values():
        each = [frozenset(column) for column in zip(*(x.parameters for x in group), strict=True)]
        free = all(moved.setdefault(p, column) == column for column in each for p in column)
        if len(group) > 1 and free and all(_can_move(c, len(group)) for c in each):
            yield group


def _layer(node: fx.Node) -> _Layer | None:
    """None if the layer can't be fused."""
    names = ("input", "weight", "bias")
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    x = arguments.pop("input")
    parameters = [p for p in arguments.values() if p is not None]
    return _Layer(node, x, parameters) if all(map(_is_parameter, parameters)) else None


def _is_parameter(node: fx.Node) -> bool:
    """Whether it stays from call to call, unlike what a caller hands over."""
    value = known(node)
    return node.op in ("placeholder", "get_attr") and isinstance(value, nn.Parameter)


def _can_move(parameters: Collection[fx.Node], count: int) -> bool:
    """Whether they are so many, and can be moved together in memory."""
    values = list(map(known, parameters))
    if len(values) < count:
        return False
    if not wraps(values[0]):
        return _is_free(values)
    return _are_rows(values) and all(map(_is_free, _inside(values).values()))


def _inside(values: Sequence[Any]) -> dict[str, list[Tensor]]:
    """What tensors of one subclass wrap."""
    names, _ = values[0].__tensor_flatten__()
    return {name: [getattr(x, name) for x in values] for name in names}


def _are_rows(values: Sequence[Any]) -> bool:
    """Whether a row of each tensor that they wrap is a weight's row, as their own `cat` says."""
    inside = [x for column in _inside(values).values() for x in column]
    if any(wraps(x) or x.shape[:1] != values[0].shape[:1] for x in inside):
        return False
    with _fake_mode(values), torch.no_grad():
        try:
            whole = torch.cat(list(values))
        except (NotImplementedError, TypeError):  # how a class says that it has no such op
            return False
    return bool(described(whole) == described(_joined(values)))


def _joined(values: Sequence[Any]) -> Any:
    """Fake parameters as `adjoining` makes one of them."""
    with _fake_mode(values), torch.no_grad():
        if not wraps(values[0]):
            return torch.cat(list(values))
        _, context = values[0].__tensor_flatten__()
        inside = {name: torch.cat(column) for name, column in _inside(values).items()}
        rows = next(iter(inside.values())).shape[0]
        size = torch.Size((rows, *values[0].shape[1:]))
        return type(values[0]).__tensor_unflatten__(inside, context, size, values[0].stride())


def _fake_mode(values: Sequence[Any]) -> FakeTensorMode:
    mode = maybe_get_fake_mode(values[0])
    assert mode is not None, "a parameter's example value is fake"
    return mode


def _is_free(values: Sequence[Tensor]) -> bool:
    """Whether nobody else looks at the tensors' memory, or they were moved before."""
    if not all(x.is_contiguous() for x in values):
        return False
    memories = {StorageWeakRef(x.untyped_storage()): x.untyped_storage() for x in values}
    if sum(memory.nbytes() for memory in memories.values()) == sum(x.nbytes for x in values):
        return True
    places = sorted(x.storage_offset() for x in values)
    steps = {b - a for a, b in pairwise(places)}
    return len(memories) == 1 and steps == {values[0].numel()}


def _fuse(graph: fx.Graph, group: Sequence[_Layer], number: Mapping[fx.Node, int]) -> list[fx.Node]:
    """Turn layers into parts of a new one. Returns its parameters."""
    first = group[0]
    # In the order of the model's parameters, so that all graphs of it want them in the same one.
    layers = sorted(group, key=lambda layer: number[layer.parameters[0]])
    each = list(zip(*(layer.parameters for layer in layers), strict=True))
    with graph.inserting_before(first.node):
        own = [graph.call_function(adjoining, parameters) for parameters in each]
        whole = graph.call_function(F.linear, (first.x, *own))
    with cast(FakeTensor, known(first.node)).fake_mode, torch.no_grad():
        for node, parameters in zip(own, each, strict=True):
            node.meta["example_value"] = _joined(list(map(known, parameters)))
        whole.meta["example_value"] = F.linear(*map(known, whole.args))
        width = known(first.node).shape[-1]
        for i, layer in enumerate(layers):
            node = layer.node
            node.target, node.args, node.kwargs = torch.narrow, (whole, -1, i * width, width), {}
            node.meta["example_value"] = torch.narrow(known(whole), -1, i * width, width)
    return own
