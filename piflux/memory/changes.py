"""Cache slots in 8 bits: the last version, and the change until then in place of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from piflux.kernels.changes import advance, compress, exchange_changes
from piflux.kernels.rows import row_bytes
from piflux.memory.ages import Ages
from piflux.memory.places import Places
from piflux.memory.slots import Recorder, Slot, at_once
from piflux.parts import join


@dataclass(eq=False)
class ChangeSlot(Slot):
    """A slot of each token's last version and, in place of another, of the change until then.

    What travels is the change as well: from what all ranks remember of a part to what one of them
    has computed. All add the same rounded change to the same version, so what rounding took away is
    in the next change, and no error grows (error feedback: Seide et al. 2014).

    Attributes:
        first: the last versions.
        second: their changes, in rows; see `piflux.kernels.rows`.
        packet: `displaced`: what each step's changes travel in.
    """

    _before: list[Tensor] = field(default_factory=list)

    @classmethod
    def like(cls, fresh: Sequence[Tensor], tokens: int, ages: Ages | None) -> ChangeSlot:
        """See `Slot.like`."""
        first = Slot.like(fresh, tokens, None).first
        shapes = [(*x.shape[:-1], row_bytes(x.shape[-1])) for x in first]
        rows = [
            x.new_empty(shape, dtype=torch.uint8) for x, shape in zip(first, shapes, strict=True)
        ]
        return cls(ages, first, rows)

    @staticmethod
    def held_bytes(width: int, itemsize: int) -> int:
        """See `Slot.held_bytes`."""
        return width * itemsize + row_bytes(width)

    @staticmethod
    def sent_bytes(width: int, itemsize: int) -> int:
        """See `Slot.sent_bytes`."""
        return row_bytes(width)

    def begin_step(self, *, first: bool, sync: bool, alike: bool) -> None:
        """See `Slot.begin_step`. Changes land where they are; the version is moved on by them."""

    def _make_room(self, newer: Tensor | None = None) -> None:
        self._before = [x.clone() for x in self.first]

    def _settle(self, *, alone: bool) -> None:
        if alone:
            for rows in self.second:
                rows.zero_()
            return
        for rows, now, before in zip(self.second, self.first, self._before, strict=True):
            rows.copy_(compress(now, before))
        self._before = []

    def _predict(
        self, ages: Ages, places: Places, fresh: Sequence[Tensor], keep: bool
    ) -> list[Tensor]:
        held = zip(self.first, self.second, fresh, strict=True)
        return [
            exchange_changes(version, rows, x, places, ages.ahead, keep)
            for version, rows, x in held
        ]

    def _sent(self, index: Tensor, fresh: Sequence[Tensor]) -> Sequence[Tensor]:
        return [
            compress(x, version.index_select(-2, index))
            for version, x in zip(self.first, fresh, strict=True)
        ]

    def land(
        self,
        lengths: Sequence[int],
        parts: Sequence[int],
        recorder: Recorder = at_once,
        *,
        before_another: bool = False,
    ) -> None:
        """See `Slot.land`."""
        arrived = self._arrived(recorder)
        for version, rows, pieces in zip(self.first, self.second, arrived, strict=False):
            join(pieces, parts, -2, lengths, rows)
            advance(version, rows)
