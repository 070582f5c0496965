"""`exchange` for slots that hold changes, in the rows of `piflux.kernels.rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from piflux.kernels.exchange import PartTables
from piflux.kernels.rows import LARGEST, changes, row_bytes


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
        from piflux.kernels.changes_triton import compress_by_kernel

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
    version: Tensor, rows: Tensor, fresh: Tensor, places: PartTables, ahead: Tensor, keep: bool
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
        from piflux.kernels.changes_triton import exchange_changes_by_kernel

        return exchange_changes_by_kernel(version, rows, fresh, places.sources, ahead, keep)
    return exchange_changes_in_torch(version, rows, fresh, places, ahead, keep)


def exchange_changes_in_torch(
    version: Tensor, rows: Tensor, fresh: Tensor, places: PartTables, ahead: Tensor, keep: bool
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
