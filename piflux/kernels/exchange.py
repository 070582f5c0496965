"""A step's fresh keys or values for the whole sequence's: the one pass over a slot's memory."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class PartTables(Protocol):
    """Where the tokens of a part stand.

    Attributes:
        index: (part tokens,) in int64: the place of each in the whole.
        sources: (all tokens,) in int32: where in the part a token stands; -1 if it is of another.
    """

    index: Tensor
    sources: Tensor


def place(whole: Tensor, fresh: Tensor, index: Tensor) -> None:
    """Write a part's tokens where they stand in the whole, in place.

    Args:
        whole: (batch, heads, tokens, head dim), contiguous.
        fresh: (batch, heads, part tokens, head dim), in any layout.
        index: (part tokens,) in int64: the place of each.
    """
    if whole.is_cuda:
        from piflux.kernels.exchange_triton import place_by_kernel

        place_by_kernel(whole, fresh, index)
    else:
        whole.index_copy_(-2, index, fresh)


def exchange(
    first: Tensor,
    second: Tensor,
    fresh: Tensor,
    places: PartTables,
    line: Tensor,
    newer: Tensor,
    both: Tensor | None,
) -> Tensor:
    """What attention reads of one slot's keys or values, and the slot's new versions.

    On a GPU one Triton kernel reads and writes each number once: at FLUX.1-dev's size this memory
    traffic is all that prediction costs. Elsewhere `exchange_in_torch` does the same.

    Args:
        first: (batch, heads, tokens, head dim), contiguous: one version of each token.
        second: like `first`: another version.
        fresh: (batch, heads, part tokens, head dim): this step's, of one part, in any layout.
        places: of the part's tokens.
        line: (tokens,) in float32: a token that is not fresh is read as
            second + line * (first - second), computed in float32 at least.
        newer: (tokens,) of bool: of a token that is fresh, whether it is kept as the first version
            or as the second.
        both: (2, batch, heads, tokens, head dim): the memory of `first` and `second`, where fresh
            tokens are kept. None: they are not.

    Returns:
        Like `first`, a new tensor.
    """
    if first.is_cuda:
        from piflux.kernels.exchange_triton import exchange_by_kernel

        keep = both is not None
        return exchange_by_kernel(first, second, fresh, places.sources, line, newer, keep)
    return exchange_in_torch(first, second, fresh, places, line, newer, both)


def exchange_in_torch(
    first: Tensor,
    second: Tensor,
    fresh: Tensor,
    places: PartTables,
    line: Tensor,
    newer: Tensor,
    both: Tensor | None,
) -> Tensor:
    """`exchange`, in ops that run on any device."""
    index = places.index
    dtype = torch.promote_types(first.dtype, line.dtype)
    weight = line[:, None].to(dtype)
    read = torch.lerp(second.to(dtype), first.to(dtype), weight).to(first.dtype)
    if both is not None:
        # Which tokens go where is data, as is `index`: shapes that depend on it can't be recorded.
        which = newer.logical_not().index_select(0, index).long()
        both.movedim(-2, 1)[which, index] = fresh.movedim(-2, 0)
    return read.index_copy_(-2, index, fresh)
