"""Versions of keys and values in 8 bits a number, and their changes in 4.

Both are *rounded*: a whole number for each of a token's and head's numbers, as a multiple of a
scale that they share. A scale is held in 16 bits, in a range that holds whatever keys and values
do; numbers are multiples of it as it is held, so that its own rounding costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_8, LARGEST_4 = 127, 7
"""Numbers go from minus to plus these."""

SCALE = torch.bfloat16


class Rounded(NamedTuple):
    """Keys or values, or their changes, of few bits.

    Attributes:
        numbers: of versions (.., tokens, head dim) in int8. Of changes two in a byte, (.., tokens,
            half) in uint8, where half is half of the head dim, rounded up: the number at i in the
            lower four bits, the one at half + i in the upper ones, each with 8 added.
        scales: (.., tokens, 1) in bfloat16.
    """

    numbers: Tensor
    scales: Tensor

    def at(self, index: Tensor) -> Rounded:
        """Those of some tokens: (part tokens,) in int64."""
        return Rounded(*(x.index_select(-2, index) for x in self))


def half(head_dim: int) -> int:
    """Bytes of a change's numbers."""
    return -(-head_dim // 2)


def version_like(shape: Sequence[int], device: torch.device) -> Rounded:
    """Memory for a version of (.., tokens, head dim)."""
    scales = torch.empty((*shape[:-1], 1), dtype=SCALE, device=device)
    return Rounded(torch.empty(shape, dtype=torch.int8, device=device), scales)


def change_like(shape: Sequence[int], device: torch.device) -> Rounded:
    """Memory for a change of (.., tokens, head dim)."""
    *others, width = shape
    numbers = torch.empty((*others, half(width)), dtype=torch.uint8, device=device)
    return Rounded(numbers, torch.empty((*others, 1), dtype=SCALE, device=device))


def version_bytes(head_dim: int) -> int:
    """Of one token and head."""
    return head_dim + SCALE.itemsize


def change_bytes(head_dim: int) -> int:
    """Of one token and head."""
    return half(head_dim) + SCALE.itemsize


def value(version: Rounded, dtype: torch.dtype) -> Tensor:
    """What a version stands for, in float32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    return version.numbers.to(dtype) * version.scales.to(dtype)


def value_of_change(change: Rounded, like: Tensor) -> Tensor:
    """What a change stands for, in shape and dtype of `like`."""
    lower, upper = change.numbers & 15, change.numbers >> 4
    numbers = torch.cat([lower, upper], -1)[..., : like.shape[-1]]
    return (numbers.to(like.dtype) - 8) * change.scales.to(like.dtype)
