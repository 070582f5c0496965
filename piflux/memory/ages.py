"""How old remembered keys and values are, and how far they are moved on when attention reads them.

From one denoise step to the next a token's keys and values move on a smooth path. So the last two
versions of each token are remembered, and attention reads the last one moved on along the line
through both. Which versions stand where is the same for all slots of one sequence, so they share
their ages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The share of the predicted change that is believed. All of it overshoots: both versions were
# computed against remembered keys and values themselves. Of 0.6, 0.75 and 0.9 this drifts least on
# 8 ranks of the demo's model; on 2 and 4 it is 0.9 (docs/drift.md).
BELIEF = 0.75

# Limit of extrapolation: if a token's last two versions are close in time, their slope is noise. A
# scheduler that visits a noise level twice must not be taken for one that leaps. Regular schedules
# stay far below, but for tokens of two parts, where windows overlap: `rotate` computes them in two
# steps, one after the other, and then, on eight ranks, not for six.
FARTHEST = 3.0


class Ages:
    """When each token that a rank remembers was last computed, and when before that.

    Args:
        lengths: of the segments whose tokens these are.
        now: the time of the sync step that computed them all, a scalar.

    Attributes:
        ahead: (tokens,) in float32: attention reads a token's last version, moved on by so many
            times its change since the one before.
        line: likewise: that is second + line * (first - second).
        newer: (tokens,) of bool: whether a token's first version is its newer one.
        was: likewise, before all tokens were last renewed. These tensors are written over, never
            replaced: recorded steps read them.
    """

    def __init__(self, lengths: Sequence[int], now: Tensor) -> None:
        self.last = self.before = now.expand(sum(lengths))
        self.ahead = torch.zeros_like(self.last)
        self.line = torch.ones_like(self.last)
        self.newer = torch.ones_like(self.last, dtype=torch.bool)
        self.was = self.newer.clone()

    def advance(self, now: Tensor, *, first: bool, sync: bool, own: Tensor | None) -> None:
        """A step at the time `now` begins.

        Args:
            now: a scalar, on any device.
            first: whether nothing is remembered from before it.
            sync: whether it computes all tokens; else `ahead` and `line` point at its time.
            own: (tokens,) of bool, of a step that isn't sync: which tokens the rank computes and
                keeps. None: all are renewed, as they arrive from the ranks that computed them.
        """
        now = now.to(self.line.device)
        if first:
            self.begin(now)
        if sync:
            self.renew(now)
            return
        self.look(now)
        if own is None:
            self.renew(now)
        else:
            self.renew_part(own, now)

    def begin(self, now: Tensor) -> None:
        """Every token has one version, its first, and nothing is known of before."""
        self.last = self.before = now.expand(len(self.last))
        self.ahead.fill_(0.0)
        self.line.fill_(1.0)
        self.newer.fill_(True)

    def look(self, now: Tensor) -> None:
        """Point `ahead` and `line` at the time `now`, for tokens that get no new version."""
        gap = self.before - self.last
        ahead = (BELIEF * (self.last - now) / gap).clamp(-FARTHEST, FARTHEST)
        self.ahead.copy_(torch.where(gap == 0, 0.0, ahead))
        torch.where(self.newer, 1 + self.ahead, -self.ahead, out=self.line)

    def renew(self, now: Tensor) -> None:
        """Every token has a new version, its first."""
        self.before, self.last = self.last, now.expand(len(self.last))
        self.was.copy_(self.newer)
        self.newer.fill_(True)

    def renew_part(self, own: Tensor, now: Tensor) -> None:
        """Tokens where `own` is set have a new version, where the older of two was."""
        self.before = torch.where(own, self.last, self.before)
        self.last = torch.where(own, now, self.last)
        self.newer.logical_xor_(own)
