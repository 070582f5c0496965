"""Normalise the heads of queries and keys and turn them in one kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from piflux.graph.nodes import computes, op_name
from piflux.graph.patterns import CASTS, Pattern
from piflux.graph.plan import Context
from piflux.graph.sizes import sizes
from piflux.graph.targets import NORM_ROTARY
from piflux.graph.values import known

DEVICE = "cuda"
"""Where a kernel reads both numbers of a pair at once."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In which that kernel, which computes in float32, is as exact as PyTorch's."""


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


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbours: (a, b) becomes (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


_TURN = Pattern(_turn, (1, 3, 2, 8), (3, 1, 8), (3, 1, 8))


def _turned_by(out: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The queries or keys that `out` is, turned, and the two tables."""
    if op_name(out) not in CASTS:
        return None
    total: Any = out.args[0]
    for found in _TURN.find(total):
        if _is_alike(out, found["x"]):
            return found["x"], found["cos"], found["sin"]
    return None


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
