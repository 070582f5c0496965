"""Normalise the heads of queries and keys and turn them in one kernel."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from piflux.graph.nodes import computes, op_name
from piflux.graph.plan import Context
from piflux.graph.sizes import sizes
from piflux.graph.targets import NORM_ROTARY
from piflux.graph.values import known

DEVICE = "cuda"
"""Where a kernel reads both numbers of a pair at once."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In which that kernel, which computes in float32, is as exact as PyTorch's."""


_CASTS = ("to", "float", "type_as")
_VIEWS = ("reshape", "view", "flatten", "unflatten")
"""What keeps the order of all numbers, so that shapes say all."""


class _Norm(NamedTuple):
    x: fx.Node
    weight: fx.Node
    eps: float


def fuse_rotary(gm: fx.GraphModule, ctx: Context) -> int:
    """Fuse rotary embedding with the RMSNorm of heads before it. Returns how many.

    Embedding asks for each number and its neighbour. A compiler of pointwise kernels reads a
    number once for the norm, once for itself and once for its neighbour, and normalises it twice;
    a kernel that holds whole heads reads it once. The pieces of a sequence, as text and image, are
    written where they belong, without a `cat`.

    Before:

        n = rms_norm(x, (4,), w, 1e-06)
        r = n.reshape((1, 3, 2, -1, 2))
        u = r.unbind(-1)
        a = u[0]
        b = u[1]
        m = neg(b)
        s = stack([m, a], dim=-1)
        t = s.flatten(3)
        f = n.float()
        p = mul(f, cos)
        g = t.float()
        q = mul(g, sin)
        o = add(p, q)
        out = o.to(torch.float32)

    After:

        out = piflux.norm_rotary([x], [w], 1e-06, cos, sin, 1)

    Only on GPUs, and for pairs of neighbours that are turned by a table which all heads share. A
    graph that does more than compute stays as it is, as for `enclose`.
    """
    if not computes(gm.graph):
        return 0
    return sum(_fuse(gm.graph, node) for node in list(gm.graph.nodes))


def _fuse(graph: fx.Graph, out: fx.Node) -> bool:
    found = _turned_by(out)
    if found is None:
        return False
    x, cos, sin = found
    dim = _token_dim(x, cos, sin)
    pieces, cat_dim = _pieces(x)
    norms = [norm for piece in pieces if (norm := _norm(piece)) is not None]
    if dim is None or cat_dim not in (None, dim) or len(norms) < len(pieces):
        return False
    if len({norm.eps for norm in norms}) > 1:
        return False
    xs, weights = [norm.x for norm in norms], [norm.weight for norm in norms]
    before = out.all_input_nodes
    out.op, out.target, out.kwargs = "call_function", NORM_ROTARY, {}
    out.args = (xs, weights, norms[0].eps, cos, sin, dim)
    for node in before:
        _erase(graph, node)
    return True


def _turned_by(out: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The queries or keys that `out` is, turned, and the two tables."""
    total = out.args[0] if op_name(out) in _CASTS else None
    for a, b in _either_way(total, "add"):
        for plain, cos in _either_way(a, "mul"):
            for turned, sin in _either_way(b, "mul"):
                x = _source_of_pairs(_uncast(turned))
                if x is not None and x is _uncast(plain) and _is_alike(out, x):
                    return x, cos, sin
    return None


def _either_way(node: Any, name: str) -> list[tuple[fx.Node, fx.Node]]:
    """The two operands of a sum or a product, in both orders."""
    if not isinstance(node, fx.Node) or op_name(node) != name or node.kwargs:
        return []
    a, b = node.args
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _source_of_pairs(node: fx.Node) -> fx.Node | None:
    """What `node` is of, if each pair of neighbours (a, b) has become (-b, a)."""
    stack: Any = node.args[0] if op_name(node) in _VIEWS else None
    if not _works_on_the_last(stack, "stack") or len(stack.args[0]) != 2:
        return None
    minus, a = stack.args[0]
    b: Any = minus.args[0] if op_name(minus) == "neg" else None
    unbind: Any = _item_of(a, 0)
    if not _works_on_the_last(unbind, "unbind") or _item_of(b, 1) is not unbind:
        return None
    pairs: Any = unbind.args[0]
    if op_name(pairs) not in _VIEWS:
        return None
    x: fx.Node = pairs.args[0]
    *outer, head_dim = sizes(x)
    fits = sizes(pairs) == [*outer, head_dim / 2, 2] and sizes(node) == sizes(x)
    return x if fits else None


def _item_of(node: Any, index: int) -> Any:
    """Of which node `node` is the item `index`."""
    item = isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == index
    return node.args[0] if item else None


def _works_on_the_last(node: Any, name: str) -> bool:
    """Whether a node is this op, and unbinds the last dimension or stacks along a new last one."""
    if not isinstance(node, fx.Node) or op_name(node) != name:
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    whole = node if name == "stack" else node.args[0]
    return dim in (-1, known(whole).dim() - 1)


def _uncast(node: fx.Node) -> fx.Node:
    """What was given a wider type, if any was."""
    while op_name(node) in _CASTS:
        narrow: Any = node.args[0]
        x, y = known(narrow), known(node)
        if x.device != y.device or torch.promote_types(x.dtype, y.dtype) != y.dtype:
            break
        node = narrow
    return node


def _is_alike(out: fx.Node, x: fx.Node) -> bool:
    """Whether the outcome is of the kind and where what was turned is, and there is a kernel."""
    a, b = known(out), known(x)
    fits = (a.dtype, a.device) == (b.dtype, b.device)
    return fits and b.dtype in DTYPES and b.device.type == DEVICE


def _token_dim(x: fx.Node, cos: fx.Node, sin: fx.Node) -> int | None:
    """Which dimension of `x` (batch, .., .., head dim) the tables tell apart."""
    shape, table = sizes(x), sizes(cos)
    if len(shape) != 4 or sizes(sin) != table or table[0] not in (1, shape[0]):
        return None
    if any(known(t).dtype not in DTYPES or known(t).device != known(x).device for t in (cos, sin)):
        return None
    for dim, heads in ((1, 2), (2, 1)):
        if table[1:] == [*(1 if i == heads else shape[i] for i in (1, 2)), shape[3]]:
            return dim
    return None


def _pieces(x: fx.Node) -> tuple[list[fx.Node], int | None]:
    """What `x` consists of, and along which dimension."""
    if op_name(x) not in ("cat", "concat"):
        return [x], None
    args: tuple[Any, ...] = (*x.args, x.kwargs.get("dim", 0))
    return list(args[0]), args[1] % known(x).dim()


def _norm(node: fx.Node) -> _Norm | None:
    """The arguments of an RMSNorm of the last dimension, with a weight."""
    if op_name(node) != "rms_norm":
        return None
    names = ("input", "normalized_shape", "weight", "eps")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    norm = _Norm(given["input"], given.get("weight"), given.get("eps"))  # type: ignore[arg-type]
    fits = len(given["normalized_shape"]) == 1 and isinstance(norm.eps, float)
    return norm if fits and isinstance(norm.weight, fx.Node) else None


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nobody reads any more, and so on up the graph."""
    if node.users or not node.op.startswith("call_"):
        return
    before = node.all_input_nodes
    graph.erase_node(node)
    for other in before:
        _erase(graph, other)
