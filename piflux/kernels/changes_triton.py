"""`compress` and `exchange_changes` in Triton, which torch's CPU builds come without."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from piflux.kernels.exchange_triton import TOKENS, wide
from piflux.kernels.rows import LARGEST, SCALE_BYTES, row_bytes


@triton.jit
def _rounded(change, LARGEST: tl.constexpr):
    """The numbers and scales of rows."""
    scale = (tl.max(tl.abs(change), axis=1) / LARGEST).to(tl.float32)
    share = change / tl.where(scale == 0, 1.0, scale)[:, None].to(change.dtype) + 0.5
    share = tl.minimum(tl.maximum(tl.floor(share), -LARGEST), LARGEST)
    return share.to(tl.int8), scale


@triton.jit
def _compress(
    new,
    old,
    numbers,
    scales,
    tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    dim_stride,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED)[None, :]
    inside = token < tokens
    mask = inside[:, None] & (dim < DIM)

    place = row * tokens + token
    there = (row // heads) * batch_stride + (row % heads) * head_stride
    there += token[:, None].to(tl.int64) * token_stride + dim * dim_stride
    a = tl.load(new + there, mask=mask, other=0.0).to(WIDE)
    b = tl.load(old + place[:, None] * DIM + dim, mask=mask, other=0.0).to(WIDE)
    share, scale = _rounded(a - b, LARGEST)
    tl.store(numbers + place[:, None] * ROW + SCALE_BYTES + dim, share, mask=mask)
    tl.store(scales + place * (ROW // SCALE_BYTES), scale, mask=inside)


def compress_by_kernel(new: Tensor, old: Tensor) -> Tensor:
    """See `piflux.kernels.changes.compress`."""
    assert old.is_contiguous()
    heads, tokens, dim = new.shape[-3:]
    rows = new.new_empty((*new.shape[:-1], row_bytes(dim)), dtype=torch.uint8)
    new = new.reshape(-1, heads, tokens, dim)
    with torch.cuda.device(new.device):
        _compress[triton.cdiv(tokens, TOKENS), len(new) * heads](
            new,
            old,
            rows.view(torch.int8),
            rows.view(torch.float32),
            tokens,
            heads,
            *new.stride(),
            DIM=dim,
            PADDED=triton.next_power_of_2(dim),
            ROW=row_bytes(dim),
            TOKENS=TOKENS,
            WIDE=wide(new),
            SCALE_BYTES=SCALE_BYTES,
            LARGEST=LARGEST,
        )
    return rows


@triton.jit
def _exchange_changes(
    version,
    numbers,
    scales,
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
    PADDED: tl.constexpr,
    ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED)[None, :]
    inside = token < tokens
    source = tl.load(sources + token, mask=inside, other=-1)
    share = tl.load(ahead + token, mask=inside, other=0.0)[:, None].to(WIDE)
    is_own = source >= 0
    is_stale = inside & (source < 0)
    own = is_own[:, None] & (dim < DIM)
    stale = is_stale[:, None] & (dim < DIM)

    place = row * tokens + token
    here = place[:, None] * DIM + dim
    number_at = numbers + place[:, None] * ROW + SCALE_BYTES + dim
    scale_at = scales + place * (ROW // SCALE_BYTES)
    there = (row // heads) * batch_stride + (row % heads) * head_stride
    there += source[:, None].to(tl.int64) * token_stride + dim * dim_stride
    new = tl.load(fresh + there, mask=own, other=0.0)
    old = tl.load(version + here, mask=own | stale if KEEP else stale, other=0.0).to(WIDE)
    number = tl.load(number_at, mask=stale, other=0).to(WIDE)
    scale = tl.load(scale_at, mask=is_stale, other=0.0)[:, None].to(WIDE)
    on = old + share * (number * scale)
    tl.store(read + here, tl.where(own, new, on.to(new.dtype)), mask=own | stale)
    if KEEP:
        number, scale = _rounded(tl.where(own, new.to(WIDE) - old, 0.0), LARGEST)
        tl.store(number_at, number, mask=own)
        tl.store(scale_at, scale, mask=is_own)
        tl.store(version + here, new, mask=own)


def exchange_changes_by_kernel(
    version: Tensor, rows: Tensor, fresh: Tensor, sources: Tensor, ahead: Tensor, keep: bool
) -> Tensor:
    """See `piflux.kernels.changes.exchange_changes`."""
    assert version.is_contiguous() and rows.is_contiguous()
    fresh = fresh.reshape(-1, *fresh.shape[-3:])
    heads, tokens, dim = version.shape[-3:]
    read = torch.empty_like(version)
    with torch.cuda.device(version.device):
        _exchange_changes[triton.cdiv(tokens, TOKENS), len(fresh) * heads](
            version,
            rows.view(torch.int8),
            rows.view(torch.float32),
            fresh,
            read,
            sources,
            ahead,
            tokens,
            heads,
            *fresh.stride(),
            DIM=dim,
            PADDED=triton.next_power_of_2(dim),
            ROW=row_bytes(dim),
            TOKENS=TOKENS,
            KEEP=keep,
            WIDE=wide(version),
            SCALE_BYTES=SCALE_BYTES,
            LARGEST=LARGEST,
        )
    return read
