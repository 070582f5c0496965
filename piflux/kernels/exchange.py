"""A step's fresh keys or values for the whole sequence's: the one pass over a slot's memory.

A change is what a token's keys or values of one step differ by from those of an earlier one. It is
held and sent in *rows* of bytes, one for each token and head: a scale in float32, then each number
in 8 bits, as a multiple of the scale from -127 to 127. A change is small beside what changes, and
its rounding error is half of a 127th of its own largest number at most.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

SCALE_BYTES = 4
LARGEST = 127


class Places(Protocol):
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
        from piflux.kernels.triton_kernels import place_by_kernel

        place_by_kernel(whole, fresh, index)
    else:
        whole.index_copy_(-2, index, fresh)


def exchange(
    first: Tensor,
    second: Tensor,
    fresh: Tensor,
    places: Places,
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
        from piflux.kernels.triton_kernels import exchange_by_kernel

        keep = both is not None
        return exchange_by_kernel(first, second, fresh, places.sources, line, newer, keep)
    return exchange_in_torch(first, second, fresh, places, line, newer, both)


def exchange_in_torch(
    first: Tensor,
    second: Tensor,
    fresh: Tensor,
    places: Places,
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


def row_bytes(head_dim: int) -> int:
    """The length of a row: a multiple of the scale's, so that rows of scales can be looked at."""
    return SCALE_BYTES + -(-head_dim // SCALE_BYTES) * SCALE_BYTES


def changes(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """What rows hold: numbers in int8, (.., tokens, head dim), and scales, (.., tokens, 1)."""
    numbers = rows[..., SCALE_BYTES : SCALE_BYTES + head_dim].view(torch.int8)
    return numbers, rows[..., :SCALE_BYTES].view(torch.float32)


def advance(version: Tensor, rows: Tensor) -> None:
    """Change `version`, (.., tokens, head dim), in place by as much as `rows` say."""
    version.addcmul_(*changes(rows, version.shape[-1]))


def compress(new: Tensor, old: Tensor) -> Tensor:
    """The change from `old` to `new`, in rows.

    Args:
        new: (batch, heads, tokens, head dim), in any layout.
        old: likewise, contiguous.

    Returns:
        (batch, heads, tokens, row bytes) in uint8, a new tensor.
    """
    if new.is_cuda:
        from piflux.kernels.triton_kernels import compress_by_kernel

        return compress_by_kernel(new, old)
    return compress_in_torch(new, old)


def compress_in_torch(new: Tensor, old: Tensor) -> Tensor:
    """`compress`, in ops that run on any device."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    change = new.to(dtype) - old.to(dtype)
    rows = new.new_empty((*new.shape[:-1], row_bytes(new.shape[-1])), dtype=torch.uint8)
    numbers, scales = changes(rows, new.shape[-1])
    scales.copy_(change.abs().amax(-1, keepdim=True) / LARGEST)
    # The least scales are rounded by much, so that their multiples might leave the range.
    shares = change / torch.where(scales == 0, 1, scales) + 0.5
    numbers.copy_(shares.floor().clamp(-LARGEST, LARGEST))
    return rows


def exchange_changes(
    version: Tensor, rows: Tensor, fresh: Tensor, places: Places, ahead: Tensor, keep: bool
) -> Tensor:
    """`exchange` for a slot that holds the last version of each token and its change until then.

    Args:
        version: (batch, heads, tokens, head dim), contiguous.
        rows: the changes, (batch, heads, tokens, row bytes) in uint8, contiguous.
        fresh: (batch, heads, part tokens, head dim): this step's, of one part, in any layout.
        places: of the part's tokens.
        ahead: (tokens,) in float32: a token that is not fresh is read as
            version + ahead * change, computed in float32 at least.
        keep: whether fresh tokens become the version, and their change is kept.

    Returns:
        Like `version`, a new tensor.
    """
    if version.is_cuda:
        from piflux.kernels.triton_kernels import exchange_changes_by_kernel

        return exchange_changes_by_kernel(version, rows, fresh, places.sources, ahead, keep)
    return exchange_changes_in_torch(version, rows, fresh, places, ahead, keep)


def exchange_changes_in_torch(
    version: Tensor, rows: Tensor, fresh: Tensor, places: Places, ahead: Tensor, keep: bool
) -> Tensor:
    """`exchange_changes`, in ops that run on any device."""
    index = places.index
    dtype = torch.promote_types(version.dtype, ahead.dtype)
    numbers, scales = changes(rows, version.shape[-1])
    change = numbers.to(dtype) * scales.to(dtype)
    read = (version.to(dtype) + ahead[:, None].to(dtype) * change).to(version.dtype)
    if keep:
        rows.index_copy_(-2, index, compress_in_torch(fresh, version.index_select(-2, index)))
        version.index_copy_(-2, index, fresh)
    return read.index_copy_(-2, index, fresh)
