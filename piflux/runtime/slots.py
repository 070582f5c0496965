"""Cache slots: one attention's keys and values, and what they will have become.

From one denoise step to the next a token's keys and values move on a smooth path. On the demo's
model their steps are of nearly even length if time is the log-SNR; over sigma they are ten times as
long close to pure noise as half way. So a slot of order 1 remembers the last two versions of each
token, and attention reads the last one moved on along the line through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from piflux.parts import join, windows, write
from piflux.runtime.ranks import Gathering

# The share of the predicted change that is believed. All of it overshoots: both versions were
# computed against remembered keys and values themselves. Of 0.6, 0.75 and 0.9 this drifts least on
# 8 ranks of the demo's model; on 2 and 4 it is 0.9 (README, Drift).
BELIEF = 0.75

# Versions that are next to each other in time say little of what comes: a scheduler that visits a
# noise level twice must not be taken for one that leaps. Regular schedules stay far below.
FARTHEST = 3.0

# The log-SNR is infinite at sigma 0 and 1. It ends where this much of the other is mixed in.
SOFTENING = 0.01


def clock_scale(clock: Tensor) -> Tensor:
    """The unit of a clock, by its value at a generation's first step: sigma, or 1000 times that."""
    return torch.where(clock.float().max() > 1, 1000.0, 1.0)


def log_snr(clocks: Sequence[Tensor], scales: Sequence[Tensor], step: int) -> Tensor:
    """The time by which versions age: log(sigma / (1 - sigma)), which falls from step to step.

    A clock is taken for sigma, the share of noise in the latent. Clocks that stand still, such as
    guidance, add a constant, which differences lose. Does not wait for the device.

    Args:
        clocks: inputs of at most one dimension that tell the time.
        scales: the unit of each.
        step: the step's index, which is the time of a model without clocks.

    Returns:
        A scalar in float32.
    """
    if not clocks:
        return torch.tensor(-float(step))
    sigmas = torch.stack(
        [
            (clock.float().mean() / scale).clamp(0, 1)
            for clock, scale in zip(clocks, scales, strict=True)
        ]
    )
    return ((sigmas + SOFTENING) / (1 - sigmas + SOFTENING)).log().sum()


class Ages:
    """When each token that a rank remembers was last computed, and when before that.

    Args:
        lengths: of the segments whose tokens these are.
        now: the time of the sync step that computed them all, a scalar.
    """

    def __init__(self, lengths: Sequence[int], now: Tensor) -> None:
        self.lengths = lengths
        self.last = self.before = now.expand(sum(lengths))

    def weights(self, now: Tensor) -> Tensor:
        """(tokens, 1): how far to go on from the last version, in lengths of the way to it."""
        gap = self.before - self.last
        ahead = (BELIEF * (self.last - now) / gap).clamp(-FARTHEST, FARTHEST)
        return torch.where(gap == 0, 0.0, ahead)[:, None]

    def renew(self, now: Tensor) -> None:
        """Every token has a new version."""
        self.before, self.last = self.last, now.expand(len(self.last))

    def renew_part(self, world_size: int, part: int, now: Tensor) -> None:
        """The tokens of one part have a new version."""
        self.before, older = self.before.clone(), self.last
        self.last = older.clone()
        for w in windows(self.lengths, world_size, part):
            here = slice(w.full, w.full + w.length)
            self.before[here], self.last[here] = older[here], now


@dataclass
class Slot:
    """One attention's keys and values: the whole sequence's, and what is on its way.

    Attributes:
        last: keys and values, each (batch, heads, all tokens, head dim).
        before: each token's version before its last one; empty where nothing is predicted.
        coming: `displaced`: the all-gathers of the last step's keys and values.
        parts: the part that each rank computed when it sent `coming`.
    """

    last: list[Tensor]
    before: list[Tensor] = field(default_factory=list)
    coming: list[Gathering] = field(default_factory=list)
    parts: tuple[int, ...] = ()

    def predicted(self, weights: Tensor) -> list[Tensor]:
        """Keys and values at the time that `weights` (tokens, 1) are for, as copies."""
        pairs = zip(self.last, self.before, strict=True)
        return [torch.lerp(last, before, -weights) for last, before in pairs]

    def renew(self, whole: list[Tensor]) -> None:
        """A sync step's keys and values."""
        if self.before:
            self.before = self.last
        self.last = whole

    def write(
        self, lengths: Sequence[int], world_size: int, part: int, fresh: Sequence[Tensor]
    ) -> None:
        """One part's keys and values of this step."""
        for last, before in zip(self.last, self.before, strict=False):
            for w in windows(lengths, world_size, part):
                before.narrow(-2, w.full, w.length).copy_(last.narrow(-2, w.full, w.length))
        for last, x in zip(self.last, fresh, strict=True):
            write(last, -2, lengths, world_size, part, x)

    def land(self, lengths: Sequence[int]) -> None:
        """What was sent in the last step has arrived, or is waited for."""
        if self.coming and self.before:
            self.before, self.last = self.last, self.before
        for x, gathering in zip(self.last, self.coming, strict=False):
            join(gathering.wait(), self.parts, -2, lengths, x)
        self.coming = []
