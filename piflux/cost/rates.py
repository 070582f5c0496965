"""How fast this machine's kernels are, and its links as a model's ranks use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from piflux.cost.clock import median_seconds
from piflux.cost.cost import Rates
from piflux.ranks.protocol import Ranks

FEW = 5
"""Runs of what is measured at a model's first call."""


def measure_rates(
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    runs: int = 20,
) -> tuple[float, float]:
    """TFLOP/s of a matrix product and of an attention, of the model's shapes, on `device`."""
    on_gpu = torch.device(device).type == "cuda"
    width = heads * head_dim
    # Of its own: the caller's random numbers are an image's noise.
    made: Any = {"generator": torch.Generator(device), "device": device, "dtype": dtype}
    x = torch.randn(tokens, width, **made)
    w = torch.randn(4 * width, width, **made)
    q = torch.randn(1, heads, tokens, head_dim, **made)
    product = median_seconds(lambda: F.linear(x, w), on_gpu, runs)
    attended = median_seconds(lambda: F.scaled_dot_product_attention(q, q, q), on_gpu, runs)
    return (
        2 * tokens * 4 * width**2 / product / 1e12,
        4 * tokens**2 * width / attended / 1e12,
    )


def measure_link(ranks: Ranks, device: torch.device, count: int) -> float:
    """GB/s that this rank sends while all gather `count` bytes of each, as a step's gathers do."""
    gathering = ranks.persistent_gather(count, device)
    seconds = median_seconds(lambda: gathering.start().wait(), device.type == "cuda", FEW)
    return count * (ranks.size - 1) / seconds / 1e9


def slowest_rates(
    ranks: Ranks, query: Sequence[int], dtype: torch.dtype, device: torch.device, count: int
) -> Rates:
    """Returns what the slowest of `ranks` reaches, alike on all of them. All call it together.

    Args:
        query: the shape of an attention's queries on a part, (.., heads, part tokens, head dim).
        dtype: of the model; likewise `device`.
        count: bytes of a layer's keys and values on one rank.
    """
    *heads, tokens, head_dim = query
    before, ranks.doing = ranks.doing, "the measurement of links and kernels"
    link_gbs = measure_link(ranks, device, count)
    kernels = measure_rates(tokens, heads[-1] if heads else 1, head_dim, dtype, device, FEW)
    rates = Rates(*ranks.least([*kernels, link_gbs]))
    ranks.doing = before
    return rates
