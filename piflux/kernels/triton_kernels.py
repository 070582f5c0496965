"""Triton kernels. Imported where there is a GPU only: torch's CPU builds come without Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from piflux.kernels.exchange import LARGEST, SCALE_BYTES, row_bytes

# Of 4 to 64 tokens a program, 8 to 32 are equally fast on an H200: 22 us for 28 MB of versions.
TOKENS = 16

# Of 14 choices, on an H200: 18.8 us for 4608 tokens of 24 heads of 128, 3.4 us for 576.
ROTARY_TOKENS, ROTARY_HEADS, ROTARY_WARPS = 8, 3, 4


@triton.jit
def _place(
    whole,
    fresh,
    index,
    tokens,
    part_tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    dim_stride,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED)[None, :]
    inside = token < part_tokens
    mask = inside[:, None] & (dim < DIM)
    at = tl.load(index + token, mask=inside, other=0)[:, None]
    there = (row // heads) * batch_stride + (row % heads) * head_stride
    there += token[:, None].to(tl.int64) * token_stride + dim * dim_stride
    new = tl.load(fresh + there, mask=mask)
    tl.store(whole + row * tokens * DIM + at * DIM + dim, new, mask=mask)


def place_by_kernel(whole: Tensor, fresh: Tensor, index: Tensor) -> None:
    """See `piflux.kernels.exchange.place`."""
    assert whole.is_contiguous()
    fresh = fresh.reshape(-1, *fresh.shape[-3:])
    heads, tokens, dim = whole.shape[-3:]
    with torch.cuda.device(whole.device):
        _place[triton.cdiv(len(index), TOKENS), len(fresh) * heads](
            whole,
            fresh,
            index,
            tokens,
            len(index),
            heads,
            *fresh.stride(),
            DIM=dim,
            PADDED=triton.next_power_of_2(dim),
            TOKENS=TOKENS,
        )


@triton.jit
def _exchange(
    first,
    second,
    fresh,
    read,
    sources,
    line,
    newer,
    tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    dim_stride,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED)[None, :]
    inside = token < tokens
    source = tl.load(sources + token, mask=inside, other=-1)
    share = tl.load(line + token, mask=inside, other=0.0)[:, None].to(WIDE)
    own = (source >= 0)[:, None] & (dim < DIM)
    stale = (inside & (source < 0))[:, None] & (dim < DIM)

    here = row * tokens * DIM + token[:, None] * DIM + dim
    there = (row // heads) * batch_stride + (row % heads) * head_stride
    there += source[:, None].to(tl.int64) * token_stride + dim * dim_stride
    new = tl.load(fresh + there, mask=own)
    a = tl.load(first + here, mask=stale).to(WIDE)
    b = tl.load(second + here, mask=stale).to(WIDE)
    # As torch.lerp has it: either end is met exactly.
    on = tl.where(tl.abs(share) < 0.5, b + share * (a - b), a - (1 - share) * (a - b))
    out = tl.where(own, new, on.to(new.dtype))
    tl.store(read + here, out, mask=own | stale)
    if KEEP:
        up = tl.load(newer + token, mask=inside, other=0).to(tl.int1)[:, None]
        tl.store(first + here, new, mask=own & up)
        tl.store(second + here, new, mask=own & ~up)


def exchange_by_kernel(
    first: Tensor,
    second: Tensor,
    fresh: Tensor,
    sources: Tensor,
    line: Tensor,
    newer: Tensor,
    keep: bool,
) -> Tensor:
    """See `piflux.kernels.exchange.exchange`."""
    assert first.is_contiguous() and second.is_contiguous()
    fresh = fresh.reshape(-1, *fresh.shape[-3:])
    heads, tokens, dim = first.shape[-3:]
    read = torch.empty_like(first)
    with torch.cuda.device(first.device):
        _exchange[triton.cdiv(tokens, TOKENS), len(fresh) * heads](
            first,
            second,
            fresh,
            read,
            sources,
            line,
            newer,
            tokens,
            heads,
            *fresh.stride(),
            DIM=dim,
            PADDED=triton.next_power_of_2(dim),
            TOKENS=TOKENS,
            KEEP=keep,
            WIDE=_wide(first),
        )
    return read


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
    """See `piflux.kernels.exchange.compress`."""
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
            WIDE=_wide(new),
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
    """See `piflux.kernels.exchange.exchange_changes`."""
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
            WIDE=_wide(version),
            SCALE_BYTES=SCALE_BYTES,
            LARGEST=LARGEST,
        )
    return read


@triton.jit
def _norm_rotary(
    x,
    weight,
    cos,
    sin,
    out,
    eps,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    out_batch,
    out_token,
    out_head,
    table_batch,
    table_token,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    first = tl.program_id(1) * HEADS
    batch = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, PADDED)[None, :]
    inside = (token < tokens) & (dim < DIM)
    there = batch * table_batch + token * table_token + dim
    even_cos, odd_cos = _pairs(tl.load(cos + there, mask=inside), TOKENS, PADDED)
    even_sin, odd_sin = _pairs(tl.load(sin + there, mask=inside), TOKENS, PADDED)
    even_weight, odd_weight = _pairs(tl.load(weight + dim, mask=dim < DIM), 1, PADDED)
    for head in range(first, tl.minimum(first + HEADS, heads)):
        here = x + batch * x_batch + token * x_token + head * x_head + dim
        even, odd = _pairs(tl.load(here, mask=inside, other=0.0), TOKENS, PADDED)
        square = tl.sum(even * even + odd * odd, axis=1)[:, None]
        scale = tl.rsqrt(square / DIM + eps)
        even = even * scale * even_weight
        odd = odd * scale * odd_weight
        turned = tl.interleave(even * even_cos - odd * even_sin, odd * odd_cos + even * odd_sin)
        here = out + batch * out_batch + token * out_token + head * out_head + dim
        tl.store(here, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The even and the odd columns, in float32."""
    return tl.split(tl.reshape(rows.to(tl.float32), [ROWS, COLUMNS // 2, 2]))


def norm_rotary_by_kernel(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, dim: int, out: Tensor
) -> None:
    """See `piflux.kernels.rotary.norm_rotary`: one piece of it, written into `out`."""
    # A head's numbers lie side by side, as projections write them.
    x = x if x.stride(-1) == 1 else x.contiguous()
    x, out, cos, sin = (t if dim == 1 else t.transpose(1, 2) for t in (x, out, cos, sin))
    batch, tokens, heads, size = x.shape
    cos, sin = (t[:, :, 0].expand(batch, tokens, size) for t in (cos, sin))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    grid = (triton.cdiv(tokens, ROTARY_TOKENS), triton.cdiv(heads, ROTARY_HEADS), batch)
    with torch.cuda.device(x.device):
        _norm_rotary[grid](
            x,
            weight,
            cos,
            sin,
            out,
            eps,
            tokens,
            heads,
            *x.stride()[:3],
            *out.stride()[:3],
            *cos.stride()[:2],
            DIM=size,
            PADDED=triton.next_power_of_2(size),
            TOKENS=ROTARY_TOKENS,
            HEADS=ROTARY_HEADS,
            num_warps=ROTARY_WARPS,
        )


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
