"""Changes of keys and values in 8 bits.

A change is what a token's keys or values of one step differ by from those of an earlier one. It is
held and sent in *rows* of bytes, one for each token and head: a scale in float32, then each number
in 8 bits, as a multiple of the scale from -127 to 127. A change is small beside what changes, and
its rounding error is half of a 127th of its own largest number at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
LARGEST = 127


def row_bytes(head_dim: int) -> int:
    """The length of a row: a multiple of the scale's, so that rows of scales can be looked at."""
    return SCALE_BYTES + -(-head_dim // SCALE_BYTES) * SCALE_BYTES


def changes(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """What rows hold: numbers in int8, (.., tokens, head dim), and scales, (.., tokens, 1)."""
    numbers = rows[..., SCALE_BYTES : SCALE_BYTES + head_dim].view(torch.int8)
    return numbers, rows[..., :SCALE_BYTES].view(torch.float32)
