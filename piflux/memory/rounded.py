"""Cache slots of few bits: the last version in 8 bits a number, and the change until then in 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from piflux.kernels.rounded import (
    Rounded,
    change_bytes,
    change_like,
    version_bytes,
    version_like,
)
from piflux.kernels.versions import advance, change_to, exchange_rounded, renew
from piflux.memory.ages import Ages
from piflux.memory.places import Places
from piflux.memory.slots import Recorder, Slot, at_once
from piflux.parts import join


@dataclass(eq=False)
class RoundedSlot(Slot):
    """A slot of each token's last version in 8 bits and its change until then in 4.

    What attention reads is as the model computes it: fresh tokens as they are, the others made of
    both where they are read. As with `ChangeSlot` the change is what travels. The version that it
    is added to is rounded by all ranks alike, so that no error grows here either.

    Attributes:
        first: the numbers of the last versions; `second` is empty.
        versions: keys and values, of all tokens.
        changes: likewise.
        dtype: that of keys and values as the model computes them.
        packet: `displaced`: what each step's changes travel in.
    """

    versions: list[Rounded] = field(default_factory=list)
    changes: list[Rounded] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    @classmethod
    def like(cls, fresh: Sequence[Tensor], tokens: int, ages: Ages | None) -> RoundedSlot:
        """See `Slot.like`."""
        shapes = [(*x.shape[:-2], tokens, x.shape[-1]) for x in fresh]
        device, dtype = fresh[0].device, fresh[0].dtype
        versions = [version_like(shape, device) for shape in shapes]
        changes = [change_like(shape, device) for shape in shapes]
        first = [version.numbers for version in versions]
        return cls(ages, first, versions=versions, changes=changes, dtype=dtype)

    @staticmethod
    def held_bytes(width: int, itemsize: int) -> int:
        """See `Slot.held_bytes`."""
        return version_bytes(width) + change_bytes(width)

    @staticmethod
    def sent_bytes(width: int, itemsize: int) -> int:
        """See `Slot.sent_bytes`."""
        return change_bytes(width)

    def fits(self, fresh: Sequence[Tensor], tokens: int) -> bool:
        """See `Slot.fits`."""
        return all(
            (x.shape[:-2], tokens, x.shape[-1], x.dtype, x.device)
            == (y.shape[:-2], y.shape[-2], y.shape[-1], self.dtype, y.device)
            for x, y in zip(fresh, self.first, strict=True)
        )

    def begin_step(self, *, first: bool, sync: bool, alike: bool) -> None:
        """See `Slot.begin_step`. Changes land where they are; the version is moved on by them."""

    def replace(
        self,
        write: Callable[[list[Tensor]], None],
        lengths: Sequence[int],
        parts: Sequence[int],
        *,
        first: bool,
        alike: bool,
        recorder: Recorder = at_once,
    ) -> list[Tensor]:
        """See `Slot.replace`. What it returns is not rounded."""
        self.land(lengths, parts, recorder)
        whole = [torch.empty_like(x, dtype=self.dtype) for x in self.first]
        write(whole)
        for version, change, x in zip(self.versions, self.changes, whole, strict=True):
            renew(version, change, x, alone=first)
        return whole

    def _predict(
        self, ages: Ages, places: Places, fresh: Sequence[Tensor], keep: bool
    ) -> list[Tensor]:
        held = zip(self.versions, self.changes, fresh, strict=True)
        return [
            exchange_rounded(version, change, x, places, ages.ahead, keep)
            for version, change, x in held
        ]

    def _sent(self, index: Tensor, fresh: Sequence[Tensor]) -> Sequence[Tensor]:
        changes = [
            change_to(x, version.at(index)) for version, x in zip(self.versions, fresh, strict=True)
        ]
        return [x for change in changes for x in change]

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
        if not arrived:
            return
        held = [x for change in self.changes for x in change]
        for whole, pieces in zip(held, arrived, strict=True):
            join(pieces, parts, -2, lengths, whole)
        for version, change in zip(self.versions, self.changes, strict=True):
            advance(version, change)
