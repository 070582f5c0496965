"""A step's fresh keys or values for the whole sequence's: the one pass over a slot's memory."""

from __future__ import annotations

import torch
from torch import Tensor


def exchange(
    first: Tensor,
    second: Tensor,
    fresh: Tensor,
    sources: Tensor,
    line: Tensor,
    newer: Tensor,
    keep: bool,
) -> Tensor:
    """What attention reads of one slot's keys or values, and the slot's new versions.

    On a GPU one Triton kernel reads and writes each number once: at FLUX.1-dev's size this memory
    traffic is all that prediction costs. Elsewhere `exchange_in_torch` does the same.

    Args:
        first: (batch, heads, tokens, head dim), contiguous: one version of each token.
        second: like `first`: another version.
        fresh: (batch, heads, part tokens, head dim): this step's, of one part, in any layout.
        sources: (tokens,) in int32: where in `fresh` a token stands; -1 if it does not.
        line: (tokens,) in float32: a token that is not fresh is read as
            second + line * (first - second), computed in float32 at least.
        newer: (tokens,) of bool: of a token that is fresh, whether it is kept as the first version
            or as the second.
        keep: whether fresh tokens are kept at all.

    Returns:
        Like `first`, a new tensor.
    """
    if first.is_cuda:
        from piflux.runtime.kernels import exchange_by_kernel

        return exchange_by_kernel(first, second, fresh, sources, line, newer, keep)
    return exchange_in_torch(first, second, fresh, sources, line, newer, keep)


def exchange_in_torch(
    first: Tensor,
    second: Tensor,
    fresh: Tensor,
    sources: Tensor,
    line: Tensor,
    newer: Tensor,
    keep: bool,
) -> Tensor:
    """`exchange`, in ops that run on any device."""
    dtype = torch.promote_types(first.dtype, line.dtype)
    weight = line[:, None].to(dtype)
    read = torch.lerp(second.to(dtype), first.to(dtype), weight).to(first.dtype)
    own = (sources >= 0)[:, None]
    placed = fresh.index_select(-2, sources.clamp(min=0))
    if keep:
        # No indexing by masks: shapes that depend on data can't be recorded.
        torch.where(own & newer[:, None], placed, first, out=first)
        torch.where(own & ~newer[:, None], placed, second, out=second)
    return torch.where(own, placed, read)
