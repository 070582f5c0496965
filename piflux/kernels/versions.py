"""`exchange` for slots that hold versions and changes in few bits, see `piflux.kernels.rounded`.

A version is rounded anew wherever a token gets one, and its change is from the rounded version
before: what rounding took away is in the next change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from piflux.kernels.exchange import PartTables
from piflux.kernels.rounded import (
    LARGEST_4,
    LARGEST_8,
    SCALE,
    Rounded,
    half,
    value,
    value_of_change,
)


def renew(version: Rounded, change: Rounded, whole: Tensor, *, alone: bool) -> None:
    """All tokens have a new version, and a change from the one before, in place.

    Args:
        version: the one before, contiguous; likewise `change`.
        whole: (batch, heads, tokens, head dim): the new one, contiguous.
        alone: whether nothing is known of before: then there is no change.
    """
    if whole.is_cuda:
        from piflux.kernels.versions_triton import renew_by_kernel

        return renew_by_kernel(version, change, whole, alone=alone)
    renew_in_torch(version, change, whole, alone=alone)


def renew_in_torch(version: Rounded, change: Rounded, whole: Tensor, *, alone: bool) -> None:
    """`renew`, in ops that run on any device."""
    _copy(change, _change(whole, whole if alone else value(version, whole.dtype)))
    _copy(version, _version(whole))


def change_to(new: Tensor, version: Rounded) -> Rounded:
    """The change from `version` to `new`: both of some tokens.

    Args:
        new: (batch, heads, tokens, head dim), in any layout.
        version: contiguous.
    """
    if new.is_cuda:
        from piflux.kernels.versions_triton import change_by_kernel

        return change_by_kernel(new, version)
    return change_in_torch(new, version)


def change_in_torch(new: Tensor, version: Rounded) -> Rounded:
    """`change_to`, in ops that run on any device."""
    return _change(new, value(version, new.dtype))


def advance(version: Rounded, change: Rounded) -> None:
    """Change `version` in place by as much as `change` says, and round it anew; contiguous both."""
    if version.numbers.is_cuda:
        from piflux.kernels.versions_triton import advance_by_kernel

        return advance_by_kernel(version, change)
    advance_in_torch(version, change)


def advance_in_torch(version: Rounded, change: Rounded) -> None:
    """`advance`, in ops that run on any device."""
    old = value(version, torch.float32)
    _copy(version, _version(old + value_of_change(change, old)))


def exchange_rounded(
    version: Rounded, change: Rounded, fresh: Tensor, places: PartTables, ahead: Tensor, keep: bool
) -> Tensor:
    """`exchange` for a slot that holds the last version of each token and its change until then.

    Args:
        version: contiguous; likewise `change`.
        fresh: (batch, heads, part tokens, head dim): this step's, of one part, in any layout.
        places: of the part's tokens.
        ahead: (tokens,) in float32: a token that is not fresh is read as
            version + ahead * change, computed in float32 at least.
        keep: whether fresh tokens become the version, and their change is kept.

    Returns:
        (batch, heads, tokens, head dim), as `fresh` is computed in, a new tensor. Fresh tokens are
        not rounded.
    """
    if fresh.is_cuda:
        from piflux.kernels.versions_triton import exchange_rounded_by_kernel

        return exchange_rounded_by_kernel(version, change, fresh, places.sources, ahead, keep)
    return exchange_rounded_in_torch(version, change, fresh, places, ahead, keep)


def exchange_rounded_in_torch(
    version: Rounded, change: Rounded, fresh: Tensor, places: PartTables, ahead: Tensor, keep: bool
) -> Tensor:
    """`exchange_rounded`, in ops that run on any device."""
    index = places.index
    dtype = torch.promote_types(fresh.dtype, ahead.dtype)
    last = value(version, dtype)
    read = torch.addcmul(last, ahead[:, None].to(dtype), value_of_change(change, last))
    read = read.to(fresh.dtype)
    if keep:
        moved = change_in_torch(fresh, version.at(index))
        for held, part in ((change, moved), (version, _version(fresh))):
            for whole, x in zip(held, part, strict=True):
                whole.index_copy_(-2, index, x)
    return read.index_copy_(-2, index, fresh)


def _version(x: Tensor) -> Rounded:
    shares, scales = _shares(x, LARGEST_8)
    return Rounded(shares.to(torch.int8), scales)


def _change(new: Tensor, old: Tensor) -> Rounded:
    shares, scales = _shares(new.to(torch.promote_types(new.dtype, torch.float32)) - old, LARGEST_4)
    width = half(shares.shape[-1])
    numbers = F.pad(shares, (0, 2 * width - shares.shape[-1])).add(8).to(torch.uint8)
    lower, upper = numbers.split(width, -1)
    return Rounded(lower | (upper << 4), scales)


def _shares(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Multiples of scales that come nearest to `x`, and the scales."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = (x.abs().amax(-1, keepdim=True) / largest).to(SCALE)
    unit = scales.to(x.dtype)
    # A scale may have been rounded down.
    shares = (x / torch.where(unit == 0, 1, unit) + 0.5).floor().clamp(-largest, largest)
    return shares, scales


def _copy(held: Rounded, new: Sequence[Tensor]) -> None:
    for to, x in zip(held, new, strict=True):
        to.copy_(x)
