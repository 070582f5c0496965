"""Write GELU with a sigmoid, where a kernel computes it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from piflux.graph.nodes import op_name
from piflux.graph.plan import Context
from piflux.graph.values import known, tensors, wraps

DEVICE = "cuda"
"""On which it is faster."""

DTYPES = (torch.bfloat16, torch.float16)
"""In which it is as exact as PyTorch's."""

# 2u of GELU's tanh form, x / 2 * (1 + tanh(u)), is _A * x + _B * x**3 (Hendrycks and Gimpel,
# arXiv:1606.08415).
_A = 2 * math.sqrt(2 / math.pi)
_B = 0.044715 * _A


def sigmoid_gelu(gm: fx.GraphModule, ctx: Context) -> int:
    """Write GELU in its tanh form as the same function of a sigmoid. Returns how many.

    That is x * sigmoid(2u) for x / 2 * (1 + tanh(u)), computed in 32 bits, as PyTorch does. On a
    GPU it is quicker, which shows where a kernel does more than read and write: GELU and rounding
    to 8 bits took 90 us with a tanh and 66 with a sigmoid, of 2304 tokens of 12288 numbers
    (2026-11-28, H200, torch 2.11).

    Before:

        m = linear(x, w)
        g = gelu(m, approximate='tanh')
        return (g,)

    After:

        m = linear(x, w)
        to = m.to(torch.float32)
        mul = mul(to, to)
        mul_1 = mul(mul, 0.07135481627260025)
        add = add(mul_1, 1.5957691216057308)
        mul_2 = mul(add, to)
        sigmoid = sigmoid(mul_2)
        mul_3 = mul(sigmoid, to)
        g = mul_3.to(torch.bfloat16)
        return (g,)

    Only on GPUs in 16 bits, where `fuse_gelu` left it. These are ops of PyTorch's own, with which
    inductor's caches work.
    """
    found = [node for node in gm.graph.nodes if _is_gelu(node)]
    for node in found:
        _write(gm.graph, node)
    return len(found)


def _is_gelu(node: fx.Node) -> bool:
    if op_name(node) != "gelu" or node.kwargs.get("approximate") != "tanh":
        return False
    (value,) = tensors(node)
    return value.device.type == DEVICE and value.dtype in DTYPES and not wraps(value)


def _write(graph: fx.Graph, gelu: fx.Node) -> None:
    """Turn the node into the last of those that compute it."""

    def call(function: Callable[..., Any], *args: fx.Node | float) -> fx.Node:
        node = graph.call_function(function, args)
        node.meta["example_value"] = function(*map(known, args))
        return node

    (x,), dtype = gelu.all_input_nodes, cast(Tensor, known(gelu)).dtype
    with (
        graph.inserting_before(gelu),
        cast(FakeTensor, known(gelu)).fake_mode,
        torch.no_grad(),
    ):
        y = graph.call_method("to", (x, torch.float32))
        y.meta["example_value"] = known(x).to(torch.float32)
        inner = call(operator.add, call(operator.mul, call(operator.mul, y, y), _B), _A)
        gate = call(torch.sigmoid, call(operator.mul, inner, y))
        outcome = call(operator.mul, gate, y)
    gelu.op, gelu.target, gelu.args, gelu.kwargs = "call_method", "to", (outcome, dtype), {}
