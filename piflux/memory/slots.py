"""Cache slots: one attention's keys and values, and what they will have become.

From one denoise step to the next a token's keys and values move on a smooth path. On the demo's
model their steps are of nearly even length if time is the log-SNR; over sigma they are ten times as
long close to pure noise as half way. So a slot of order 1 remembers the last two versions of each
token, and attention reads the last one moved on along the line through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from piflux.kernels.exchange import advance, compress, exchange, exchange_changes, place, row_bytes
from piflux.policies.parts import join
from piflux.ranks.ranks import Packet, Ranks
from piflux.recording.recorded import Eagerly, at_once

if TYPE_CHECKING:
    from piflux.memory.memory import Places

# The share of the predicted change that is believed. All of it overshoots: both versions were
# computed against remembered keys and values themselves. Of 0.6, 0.75 and 0.9 this drifts least on
# 8 ranks of the demo's model; on 2 and 4 it is 0.9 (README, Drift).
BELIEF = 0.75

# Versions that are next to each other in time say little of what comes: a scheduler that visits a
# noise level twice must not be taken for one that leaps. Regular schedules stay far below, but for
# tokens of two parts, where windows overlap: `rotate` computes them in two steps, one after the
# other, and then, on eight ranks, not for six.
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

    Attributes:
        ahead: (tokens,) in float32: attention reads a token's last version, moved on by so many
            times its change since the one before.
        line: likewise: that is second + line * (first - second).
        newer: (tokens,) of bool: whether a token's first version is its newer one.
        was: likewise, before all tokens were last renewed. These tensors are written over, never
            replaced.
    """

    def __init__(self, lengths: Sequence[int], now: Tensor) -> None:
        self.last = self.before = now.expand(sum(lengths))
        self.ahead = torch.zeros_like(self.last)
        self.line = torch.ones_like(self.last)
        self.newer = torch.ones_like(self.last, dtype=torch.bool)
        self.was = self.newer.clone()

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

    def renew(self, now: Tensor) -> Tensor:
        """Every token has a new version, its first. Returns `was`."""
        self.before, self.last = self.last, now.expand(len(self.last))
        self.was.copy_(self.newer)
        self.newer.fill_(True)
        return self.was

    def renew_part(self, own: Tensor, now: Tensor) -> None:
        """Tokens where `own` is set have a new version, where the older of two was."""
        self.before = torch.where(own, self.last, self.before)
        self.last = torch.where(own, now, self.last)
        self.newer.logical_xor_(own)


@dataclass
class Slot:
    """One attention's keys and values: the whole sequence's, and what is on its way.

    Attributes:
        first: keys and values, each (batch, heads, all tokens, head dim).
        second: another version of each token; empty where nothing is predicted.
        both: the memory of both, each (2, batch, heads, all tokens, head dim).
        packet: `displaced`: what each step's keys and values travel in, from its first on.
    """

    first: list[Tensor]
    second: list[Tensor] = field(default_factory=list)
    both: list[Tensor] = field(default_factory=list)
    packet: Packet | None = None

    @classmethod
    def like(cls, fresh: Sequence[Tensor], tokens: int, *, two: bool) -> Slot:
        """An empty slot for keys and values like `fresh`, but of so many tokens.

        Args:
            two: whether it has a second version.
        """
        both = [x.new_empty(1 + two, *x.shape[:-2], tokens, x.shape[-1]) for x in fresh]
        first = [x[0] for x in both]
        return cls(first, [x[1] for x in both], both) if two else cls(first)

    def fits(self, fresh: Sequence[Tensor], tokens: int) -> bool:
        """Whether keys and values like `fresh`, but of so many tokens, are of this slot's kind."""
        return all(
            (x.shape[:-2], tokens, x.shape[-1], x.dtype, x.device)
            == (y.shape[:-2], y.shape[-2], y.shape[-1], y.dtype, y.device)
            for x, y in zip(fresh, self.first, strict=True)
        )

    @property
    def coming(self) -> bool:
        """Whether the last step's keys and values are on their way."""
        return self.packet is not None and self.packet.under_way

    def begin_step(self) -> None:
        """Before a step: what is on its way is to land as the first version."""
        if self.coming:
            self.make_room()

    def make_room(self, newer: Tensor | None = None) -> None:
        """Before the keys and values of all tokens are written as the first version.

        Args:
            newer: whether the first was each token's newer version; None: it was for all.
        """
        if self.second and newer is None:
            self.first, self.second = self.second, self.first
        elif newer is not None:
            for first, second in zip(self.first, self.second, strict=True):
                torch.where(newer[:, None], first, second, out=second)

    def settle(self, *, alone: bool) -> None:
        """After a sync step's keys and values were written as the first version.

        Args:
            alone: whether they are all that is known.
        """
        for first, second in zip(self.first, self.second if alone else (), strict=False):
            second.copy_(first)

    def write(self, index: Tensor, fresh: Sequence[Tensor]) -> list[Tensor]:
        """One part's keys and values of this step, over what was remembered. Returns the whole.

        Args:
            index: see `Places`.
            fresh: the part's keys and values, each (batch, heads, part tokens, head dim).
        """
        for whole, x in zip(self.first, fresh, strict=True):
            place(whole, x, index)
        return self.first

    def predict(
        self, ages: Ages, places: Places, fresh: Sequence[Tensor], *, keep: bool
    ) -> list[Tensor]:
        """The whole at this step's time, in which one part is fresh; new tensors.

        Args:
            ages: which look at this step's time, and know of the part's new version if it is kept.
            places: of the part's tokens.
            fresh: the part's keys and values, each (batch, heads, part tokens, head dim).
            keep: whether to remember them, over the older version of each token.
        """
        versions = zip(self.first, self.second, self.both, fresh, strict=True)
        return [
            exchange(first, second, x, places, ages.line, ages.newer, both if keep else None)
            for first, second, both, x in versions
        ]

    def packets(self, index: Tensor, fresh: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the other ranks need of this one's keys and values, to `land` it in the next step.

        Args: as for `write`.
        """
        return fresh

    def send(self, ranks: Ranks, tensors: Sequence[Tensor], eagerly: Eagerly) -> None:
        """Start to send `packets`, once the last ones have landed."""
        if self.packet is None:
            self.packet = Packet(ranks, tensors)
        self.packet.write(tensors)
        eagerly(self.packet.start)

    def land(
        self, lengths: Sequence[int], parts: Sequence[int], eagerly: Eagerly = at_once
    ) -> None:
        """What was sent in the last step has arrived, or is waited for: the first version.

        Args:
            lengths: of the segments whose tokens these are.
            parts: the part that each rank computed then.
            eagerly: see `Runtime`.
        """
        for x, pieces in zip(self.first, self._arrived(eagerly), strict=False):
            join(pieces, parts, -2, lengths, x)

    def _arrived(self, eagerly: Eagerly) -> Sequence[Sequence[Tensor]]:
        """What was on its way, as `Packet.read` gives it; empty if nothing was."""
        if self.packet is None or not self.packet.under_way:
            return []
        eagerly(self.packet.wait)
        return self.packet.read()


@dataclass
class ChangeSlot(Slot):
    """A slot of each token's last version and, in place of another, of the change until then.

    What travels is the change as well: from what all ranks remember of a part to what one of them
    has computed. All add the same rounded change to the same version, so what rounding took away is
    in the next change, and no error grows (error feedback: Seide et al. 2014).

    Attributes:
        first: the last versions.
        second: their changes, in rows; see `piflux.kernels.exchange`.
        packet: `displaced`: what each step's changes travel in.
    """

    _before: list[Tensor] = field(default_factory=list)

    @classmethod
    def like(cls, fresh: Sequence[Tensor], tokens: int, *, two: bool = True) -> ChangeSlot:
        """See `Slot.like`."""
        first = Slot.like(fresh, tokens, two=False).first
        shapes = [(*x.shape[:-1], row_bytes(x.shape[-1])) for x in first]
        rows = [
            x.new_empty(shape, dtype=torch.uint8) for x, shape in zip(first, shapes, strict=True)
        ]
        return cls(first, rows)

    def begin_step(self) -> None:
        """See `Slot.begin_step`. Changes land where they are; the version is moved on by them."""

    def make_room(self, newer: Tensor | None = None) -> None:
        """See `Slot.make_room`."""
        self._before = [x.clone() for x in self.first]

    def settle(self, *, alone: bool) -> None:
        """See `Slot.settle`."""
        if alone:
            for rows in self.second:
                rows.zero_()
            return
        for rows, now, before in zip(self.second, self.first, self._before, strict=True):
            rows.copy_(compress(now, before))
        self._before = []

    def predict(
        self, ages: Ages, places: Places, fresh: Sequence[Tensor], *, keep: bool
    ) -> list[Tensor]:
        """See `Slot.predict`."""
        held = zip(self.first, self.second, fresh, strict=True)
        return [
            exchange_changes(version, rows, x, places, ages.ahead, keep)
            for version, rows, x in held
        ]

    def packets(self, index: Tensor, fresh: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `Slot.packets`."""
        return [
            compress(x, version.index_select(-2, index))
            for version, x in zip(self.first, fresh, strict=True)
        ]

    def land(
        self, lengths: Sequence[int], parts: Sequence[int], eagerly: Eagerly = at_once
    ) -> None:
        """See `Slot.land`."""
        arrived = self._arrived(eagerly)
        for version, rows, pieces in zip(self.first, self.second, arrived, strict=False):
            join(pieces, parts, -2, lengths, rows)
            advance(version, rows)
