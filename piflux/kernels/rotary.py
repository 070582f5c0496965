"""What `fuse_rotary` puts into graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op(
    "piflux::norm_rotary",
    mutates_args=(),
    schema=(
        "(Tensor[] xs, Tensor[] weights, float eps, Tensor cos, Tensor sin, int dim) -> Tensor"
    ),
)
def norm_rotary(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
    dim: int,
) -> Tensor:
    """Queries or keys, normalised over each head (RMSNorm) and turned by rotary embedding.

    Neighbours in a head are pairs: (a, b) becomes (a cos - b sin, b cos + a sin). On a GPU one
    Triton kernel reads and writes each number once, computing in float32.

    Args:
        xs: pieces of a sequence, each (batch, tokens, heads, head dim) or with tokens and heads
            exchanged, in any layout.
        weights: (head dim,), of each piece's norm.
        eps: added to the mean square.
        cos: of each number's angle, of size 1 in the heads and of size 1 or alike elsewhere.
        sin: likewise.
        dim: that of the tokens.

    Returns:
        The whole sequence, in the shape and the order of the pieces, contiguous.
    """
    if xs[0].is_cuda:
        from piflux.kernels.rotary_triton import norm_rotary_by_kernel

        whole = _whole(xs, dim)
        at = 0
        for x, weight in zip(xs, weights, strict=True):
            c, s, out = (t.narrow(dim, at, x.shape[dim]) for t in (cos, sin, whole))
            norm_rotary_by_kernel(x, weight, eps, c, s, dim, out)
            at += x.shape[dim]
        return whole
    normal = [F.rms_norm(x, x.shape[-1:], w, eps) for x, w in zip(xs, weights, strict=True)]
    whole = torch.cat(normal, dim).to(torch.promote_types(xs[0].dtype, torch.float32))
    even, odd = whole.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (whole * cos + turned * sin).to(xs[0].dtype).contiguous()


@norm_rotary.register_fake
def _(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
    dim: int,
) -> Tensor:
    return _whole(xs, dim)


def _whole(xs: Sequence[Tensor], dim: int) -> Tensor:
    shape = list(xs[0].shape)
    shape[dim] = sum(x.shape[dim] for x in xs)
    return xs[0].new_empty(shape)
