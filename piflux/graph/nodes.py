"""What a node is: which op, by name, and whether it does more than compute.

Targets are matched by name: Dynamo's graphs hold torch functions, tensor methods and operators,
which spell the same op in three ways.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import fx

from piflux.graph.values import known

PRODUCTS = ("linear", "matmul", "mm", "bmm")
"""What multiplies matrices, by name."""

NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def is_pointwise(name: str) -> bool:
    """Whether PyTorch declares the op of this name pointwise."""
    packet = getattr(torch.ops.aten, name, None) if name else None
    # `x == y` is `__eq__` to older torch, which is the namespace's own method.
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        packet = getattr(torch.ops.aten, name.strip("_"), None) if name.strip("_") else None
    return isinstance(packet, torch._ops.OpOverloadPacket) and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def op_name(node: fx.Node) -> str:
    """`cat` for torch.cat, Tensor.cat and aten.cat alike; empty for what isn't torch's own."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        library, name = qualified_name(target).split("::")
        return name if library == "aten" else ""
    if target is getattr:
        return str(node.args[1])  # such as x.mT
    return target.__name__ if _library(target) in ("torch", "_operator", "math") else ""


def _library(target: Any) -> str:
    module = getattr(target, "__module__", None) or "torch"  # builtin methods of torch name none
    return str(module).split(".")[0]


def is_foreign(node: fx.Node) -> bool:
    """Whether a node calls an op of a library that is neither torch nor Python's own."""
    own = op_name(node) or node.op != "call_function" or _library(node.target) == "builtins"
    return not own


def qualified_name(target: Any) -> str:
    """`library::op` for an operator, `module.function` for a function."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


# `x += y` and its kin.
_IN_PLACE = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod")}
_IN_PLACE |= {"iand", "ior", "ixor", "ilshift", "irshift", "imatmul", "setitem"}


def mutates(node: fx.Node) -> bool:
    """Whether the op writes into its first argument."""
    name = op_name(node)
    method = name.endswith("_") and name not in ("and_", "or_", "not_", "is_")
    return method and not name.endswith("__") or name in _IN_PLACE or "out" in node.kwargs


def is_value(node: fx.Node) -> bool:
    """Whether a node gives a tensor, a number, or a tuple of them."""
    value = known(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(x, (torch.Tensor, *NUMBERS)) for x in values)


def only_computes(node: fx.Node) -> bool:
    """Whether a node gives values and does nothing else."""
    return is_value(node) and not mutates(node) and not node.is_impure()


def computes(graph: fx.Graph) -> bool:
    """Whether no node of a graph does more, so that nodes may go where their operands are."""
    return all(only_computes(node) for node in graph.nodes if node.op.startswith("call_"))


def run_node(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns what the call of a function or method gives for these arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


HEADS = -3
"""The dimension of queries, keys and values that counts heads."""


class SDPA(NamedTuple):
    """The arguments of scaled_dot_product_attention, by name."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


def is_attention(node: fx.Node) -> bool:
    return op_name(node) == "scaled_dot_product_attention"


def attention_arguments(node: fx.Node) -> SDPA:
    return SDPA(*node.args, **node.kwargs)  # type: ignore[arg-type]


def plain_name(node: fx.Node) -> str:
    """A node's name without what Dynamo puts around the name of an argument."""
    return re.sub(r"^l_(kwargs_|args_)?", "", node.name).strip("_")
