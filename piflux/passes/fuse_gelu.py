"""Compute GELU inside the product before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from piflux.passes.plan import Context, known, tensors
from piflux.passes.rules import only_computes, op_name
from piflux.runtime import products  # noqa: F401 (the ops)

DEVICE = "cuda"
"""Whose library of products has one with GELU."""

DTYPES = (torch.bfloat16, torch.float16)
"""In which that GELU is as exact as PyTorch's. In float32 it is nine times further from the exact
outcome (2026-11-24, H200, CUDA 13)."""

_GELU = torch.ops.piflux.linear_gelu.default
_CAT = torch.ops.piflux.linear_of_cat.default


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
    if not all(only_computes(n) for n in gm.graph.nodes if n.op.startswith("call_")):
        return 0
    fused = [node for node in gm.graph.nodes if _fuse(gm.graph, node)]
    for node in fused:
        for cat in list(node.users):
            _split(gm.graph, cat)
    return len(fused)


def _fuse(graph: fx.Graph, gelu: fx.Node) -> bool:
    if op_name(gelu) != "gelu" or gelu.kwargs.get("approximate") != "tanh":
        return False
    layer = gelu.args[0]
    if op_name(layer) != "linear" or len(layer.users) > 1 or layer.kwargs or len(layer.args) < 3:
        return False
    if not all(_is_plain(x) for x in layer.args):
        return False
    gelu.op, gelu.target, gelu.args, gelu.kwargs = "call_function", _GELU, layer.args, {}
    graph.erase_node(layer)
    return True


def _split(graph: fx.Graph, cat: fx.Node) -> None:
    """Let a layer read what a `cat` reads, if it alone reads that."""
    if op_name(cat) not in ("cat", "concat") or len(cat.users) > 1:
        return
    xs, dim = (*cat.args, cat.kwargs.get("dim", 0))[:2]
    (layer,) = cat.users
    if op_name(layer) != "linear" or layer.args[0] is not cat or layer.kwargs:
        return
    if dim not in (-1, tensors(cat)[0].dim() - 1) or not all(map(_is_plain, layer.args)):
        return
    layer.op, layer.target = "call_function", _CAT
    layer.args = (list(xs), *layer.args[1:], None)[:3]
    graph.erase_node(cat)


def _is_plain(x: Any) -> bool:
    value = known(x)
    return (
        isinstance(value, torch.Tensor)
        and not is_traceable_wrapper_subclass(value)
        and value.device.type == DEVICE
        and value.dtype in DTYPES
    )
