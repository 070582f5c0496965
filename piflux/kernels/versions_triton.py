"""The kernels of `piflux.kernels.versions` in Triton, which torch's CPU builds come without.

A change holds the numbers of a head's lower and upper half in one byte, so the halves are computed
side by side, each of them read and written as a run of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from piflux.kernels.exchange_triton import TOKENS, wide
from piflux.kernels.rounded import LARGEST_4, LARGEST_8, Rounded, change_like, half


@triton.jit
def _unit(lower, upper, LARGEST: tl.constexpr):
    """What numbers are multiples of: a scale as it is held, in the type that is computed in."""
    most = tl.maximum(tl.max(tl.abs(lower), axis=1), tl.max(tl.abs(upper), axis=1))
    return (most / LARGEST).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _shares(x, scale, LARGEST: tl.constexpr):
    """Multiples of the scale that come nearest."""
    unit = scale.to(tl.float32).to(x.dtype)
    share = tl.floor(x / tl.where(unit == 0, 1.0, unit)[:, None] + 0.5)
    return tl.minimum(tl.maximum(share, -LARGEST), LARGEST)


@triton.jit
def _value(numbers, scales, place, dim, tokens_mask, mask, DIM: tl.constexpr, WIDE: tl.constexpr):
    """What a version stands for, in one half of a head."""
    number = tl.load(numbers + place[:, None] * DIM + dim, mask=mask, other=0).to(WIDE)
    return (
        number
        * tl.load(scales + place, mask=tokens_mask, other=0.0).to(tl.float32).to(WIDE)[:, None]
    )


@triton.jit
def _store_version(
    numbers,
    scales,
    place,
    low,
    lower,
    upper,
    tokens_mask,
    low_mask,
    high_mask,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    LARGEST: tl.constexpr,
):
    scale = _unit(lower, upper, LARGEST)
    here = numbers + place[:, None] * DIM + low
    tl.store(here, _shares(lower, scale, LARGEST).to(tl.int8), mask=low_mask)
    tl.store(here + HALF, _shares(upper, scale, LARGEST).to(tl.int8), mask=high_mask)
    tl.store(scales + place, scale, mask=tokens_mask)


@triton.jit
def _store_change(
    numbers,
    scales,
    place,
    low,
    lower,
    upper,
    tokens_mask,
    low_mask,
    HALF: tl.constexpr,
    LARGEST: tl.constexpr,
):
    scale = _unit(lower, upper, LARGEST)
    a = (_shares(lower, scale, LARGEST) + 8).to(tl.uint8)
    b = (_shares(upper, scale, LARGEST) + 8).to(tl.uint8)
    tl.store(numbers + place[:, None] * HALF + low, a | (b << 4), mask=low_mask)
    tl.store(scales + place, scale, mask=tokens_mask)


@triton.jit
def _renew(
    new,
    numbers,
    scales,
    change_numbers,
    change_scales,
    tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    dim_stride,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    ALONE: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    LARGEST_8: tl.constexpr,
    LARGEST_4: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64)
    low = tl.arange(0, PADDED)[None, :]
    inside = token < tokens
    low_mask = inside[:, None] & (low < HALF)
    high_mask = inside[:, None] & (low < DIM - HALF)

    place = row * tokens + token
    there = (row // heads) * batch_stride + (row % heads) * head_stride
    there += token[:, None].to(tl.int64) * token_stride + low * dim_stride
    a = tl.load(new + there, mask=low_mask, other=0.0).to(WIDE)
    b = tl.load(new + there + HALF * dim_stride, mask=high_mask, other=0.0).to(WIDE)
    if ALONE:
        lower, upper = a - a, b - b
    else:
        lower = a - _value(numbers, scales, place, low, inside, low_mask, DIM, WIDE)
        upper = b - _value(numbers + HALF, scales, place, low, inside, high_mask, DIM, WIDE)
    _store_change(
        change_numbers, change_scales, place, low, lower, upper, inside, low_mask, HALF, LARGEST_4
    )
    if KEEP:
        _store_version(
            numbers,
            scales,
            place,
            low,
            a,
            b,
            inside,
            low_mask,
            high_mask,
            DIM,
            HALF,
            LARGEST_8,
        )


def _launch_renew(
    new: Tensor, version: Rounded, change: Rounded, *, alone: bool, keep: bool
) -> None:
    heads, tokens, dim = new.shape[-3:]
    new = new.reshape(-1, heads, tokens, dim)
    with torch.cuda.device(new.device):
        _renew[triton.cdiv(tokens, TOKENS), len(new) * heads](
            new,
            *_contiguous(version),
            *_contiguous(change),
            tokens,
            heads,
            *new.stride(),
            **_sizes(dim),
            ALONE=alone,
            KEEP=keep,
            WIDE=wide(new),
            LARGEST_8=LARGEST_8,
            LARGEST_4=LARGEST_4,
        )


def renew_by_kernel(version: Rounded, change: Rounded, whole: Tensor, *, alone: bool) -> None:
    """See `piflux.kernels.versions.renew`."""
    _launch_renew(whole, version, change, alone=alone, keep=True)


def change_by_kernel(new: Tensor, version: Rounded) -> Rounded:
    """See `piflux.kernels.versions.change_to`."""
    change = change_like(new.shape, new.device)
    _launch_renew(new, version, change, alone=False, keep=False)
    return change


@triton.jit
def _advance(
    numbers,
    scales,
    change_numbers,
    change_scales,
    rows,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    LARGEST_8: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    low = tl.arange(0, PADDED)[None, :]
    inside = place < rows
    low_mask = inside[:, None] & (low < HALF)
    high_mask = inside[:, None] & (low < DIM - HALF)

    packed = tl.load(change_numbers + place[:, None] * HALF + low, mask=low_mask, other=0)
    scale = tl.load(change_scales + place, mask=inside, other=0.0).to(tl.float32)[:, None]
    a = _value(numbers, scales, place, low, inside, low_mask, DIM, tl.float32)
    # What stands for nothing must not count among a head's largest.
    a = tl.where(low_mask, a + ((packed & 15).to(tl.float32) - 8) * scale, 0.0)
    b = _value(numbers + HALF, scales, place, low, inside, high_mask, DIM, tl.float32)
    b = tl.where(high_mask, b + ((packed >> 4).to(tl.float32) - 8) * scale, 0.0)
    _store_version(
        numbers, scales, place, low, a, b, inside, low_mask, high_mask, DIM, HALF, LARGEST_8
    )


def advance_by_kernel(version: Rounded, change: Rounded) -> None:
    """See `piflux.kernels.versions.advance`."""
    rows, dim = version.scales.numel(), version.numbers.shape[-1]
    with torch.cuda.device(version.numbers.device):
        _advance[(triton.cdiv(rows, TOKENS),)](
            *_contiguous(version),
            *_contiguous(change),
            rows,
            **_sizes(dim),
            LARGEST_8=LARGEST_8,
        )


@triton.jit
def _exchange_rounded(
    numbers,
    scales,
    change_numbers,
    change_scales,
    fresh,
    read,
    sources,
    ahead,
    tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    dim_stride,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    LARGEST_8: tl.constexpr,
    LARGEST_4: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64)
    low = tl.arange(0, PADDED)[None, :]
    inside = token < tokens
    in_low, in_high = low < HALF, low < DIM - HALF
    source = tl.load(sources + token, mask=inside, other=-1)
    share = tl.load(ahead + token, mask=inside, other=0.0)[:, None].to(WIDE)
    is_own = source >= 0
    is_stale = inside & (source < 0)
    needed = inside if KEEP else is_stale

    place = row * tokens + token
    there = (row // heads) * batch_stride + (row % heads) * head_stride
    there += source[:, None].to(tl.int64) * token_stride + low * dim_stride
    own_low, own_high = is_own[:, None] & in_low, is_own[:, None] & in_high
    new_a = tl.load(fresh + there, mask=own_low, other=0.0)
    new_b = tl.load(fresh + there + HALF * dim_stride, mask=own_high, other=0.0)

    old_a = _value(numbers, scales, place, low, needed, needed[:, None] & in_low, DIM, WIDE)
    old_b = _value(numbers + HALF, scales, place, low, needed, needed[:, None] & in_high, DIM, WIDE)
    stale_low = is_stale[:, None] & in_low
    packed = tl.load(change_numbers + place[:, None] * HALF + low, mask=stale_low, other=0)
    scale = tl.load(change_scales + place, mask=is_stale, other=0.0)
    scale = scale.to(tl.float32).to(WIDE)[:, None]
    on_a = old_a + share * (((packed & 15).to(WIDE) - 8) * scale)
    on_b = old_b + share * (((packed >> 4).to(WIDE) - 8) * scale)

    here = read + place[:, None] * DIM + low
    kind = new_a.dtype
    tl.store(here, tl.where(own_low, new_a, on_a.to(kind)), mask=inside[:, None] & in_low)
    tl.store(here + HALF, tl.where(own_high, new_b, on_b.to(kind)), mask=inside[:, None] & in_high)
    if KEEP:
        a, b = new_a.to(WIDE), new_b.to(WIDE)
        lower, upper = tl.where(own_low, a - old_a, 0.0), tl.where(own_high, b - old_b, 0.0)
        _store_change(
            change_numbers,
            change_scales,
            place,
            low,
            lower,
            upper,
            is_own,
            own_low,
            HALF,
            LARGEST_4,
        )
        _store_version(
            numbers, scales, place, low, a, b, is_own, own_low, own_high, DIM, HALF, LARGEST_8
        )


def exchange_rounded_by_kernel(
    version: Rounded, change: Rounded, fresh: Tensor, sources: Tensor, ahead: Tensor, keep: bool
) -> Tensor:
    """See `piflux.kernels.versions.exchange_rounded`."""
    fresh = fresh.reshape(-1, *fresh.shape[-3:])
    heads, tokens, dim = version.numbers.shape[-3:]
    read = torch.empty_like(version.numbers, dtype=fresh.dtype)
    with torch.cuda.device(fresh.device):
        _exchange_rounded[triton.cdiv(tokens, TOKENS), len(fresh) * heads](
            *_contiguous(version),
            *_contiguous(change),
            fresh,
            read,
            sources,
            ahead,
            tokens,
            heads,
            *fresh.stride(),
            **_sizes(dim),
            KEEP=keep,
            WIDE=wide(fresh),
            LARGEST_8=LARGEST_8,
            LARGEST_4=LARGEST_4,
        )
    return read


def _contiguous(held: Rounded) -> Rounded:
    assert all(x.is_contiguous() for x in held)
    return held


def _sizes(head_dim: int) -> dict[str, Any]:
    width = half(head_dim)
    return {
        "DIM": head_dim,
        "HALF": width,
        "PADDED": triton.next_power_of_2(width),
        "TOKENS": TOKENS,
    }
