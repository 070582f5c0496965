"""Compute GELU inside the product before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from piflux.graph.nodes import computes, op_name
from piflux.graph.plan import Context
from piflux.graph.targets import LINEAR_GELU, LINEAR_OF_CAT
from piflux.graph.values import known, tensors

DEVICE = "cuda"
"""Whose library of products has one with GELU."""

DTYPES = (torch.bfloat16, torch.float16)
"""In which that GELU is as exact as PyTorch's. In float32 it is nine times further from the exact
outcome (2026-11-24, H200, CUDA 13)."""


def fuse_gelu(gm: fx.GraphModule, ctx: Context) -> int:
    """Fuse linear layers with the GELU behind them. Returns how many.

    A layer's outcome is written once, then, and not written, read and written. Where it went into
    a `cat` for the next layer alone, that layer multiplies each of the tensors by itself.

    Before:

        m = linear(x, w_1, b_1)
        g = gelu(m, approximate='tanh')
        c = cat([a, g], -1)
        out = linear(c, w_2, b_2)

    After:

        g = piflux.linear_gelu(x, w_1, b_1)
        out = piflux.linear_of_cat([a, g], w_2, b_2)

    Only on GPUs, in 16 bits, for GELU in its tanh form, and for plain weights with a bias. A graph
    that does more than compute stays as it is, as for `enclose`.
    """
    if not computes(gm.graph):
        return 0
    fused = [node for node in gm.graph.nodes if _fuse(gm.graph, node)]
    for node in fused:
        for cat in list(node.users):
            _split(gm.graph, cat)
    return len(fused)


def _fuse(graph: fx.Graph, gelu: fx.Node) -> bool:
    if op_name(gelu) != "gelu" or gelu.kwargs.get("approximate") != "tanh":
        return False
    layer = gelu.all_input_nodes[0]
    if not _is_layer(layer) or None in (*layer.args, None)[:3] or len(layer.users) > 1:
        return False
    gelu.op, gelu.target, gelu.args, gelu.kwargs = "call_function", LINEAR_GELU, layer.args, {}
    graph.erase_node(layer)
    return True


def _split(graph: fx.Graph, cat: fx.Node) -> None:
    """Let a layer read what a `cat` reads, if it alone reads that."""
    if op_name(cat) not in ("cat", "concat") or len(cat.users) > 1:
        return
    xs, dim = (*cat.args, cat.kwargs.get("dim", 0))[:2]
    (layer,) = cat.users
    last = dim in (-1, tensors(cat)[0].dim() - 1)
    if last and _is_layer(layer) and layer.args[0] is cat:
        layer.op, layer.target = "call_function", LINEAR_OF_CAT
        layer.args = (xs, *layer.args[1:], None)[:3]
        graph.erase_node(cat)


def _is_layer(node: fx.Node) -> bool:
    """Whether a node is a linear layer of plain tensors that have such products."""
    plain = all(x is None or _is_plain(known(x)) for x in node.args)
    return op_name(node) == "linear" and not node.kwargs and plain


def _is_plain(x: Any) -> bool:
    fits = isinstance(x, torch.Tensor) and x.device.type == DEVICE and x.dtype in DTYPES
    return fits and not is_traceable_wrapper_subclass(x)
