"""Cache slots: one attention's keys and values, and what they will have become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from piflux.kernels.exchange import exchange, place
from piflux.memory.ages import Ages
from piflux.memory.places import Places
from piflux.parts import join
from piflux.ranks.packet import Packet
from piflux.ranks.protocol import Ranks

Recorder = Callable[[Callable[[], object]], None]
"""Calls a function in its turn, between the kernels that were launched before it and after."""


def at_once(function: Callable[[], object]) -> None:
    """Runs the function now: nothing is being recorded."""
    function()


@dataclass(eq=False)
class Slot:
    """One attention's keys and values: the whole sequence's, and what is on its way.

    Attributes:
        ages: of its tokens, where keys and values are predicted; shared with other slots.
        first: keys and values, each (batch, heads, all tokens, head dim).
        second: another version of each token; empty where nothing is predicted.
        both: the memory of both, each (2, batch, heads, all tokens, head dim).
        packet: `displaced`: what each step's keys and values travel in, from its first on.
        under_way: whether the last step's keys and values were sent, and have yet to land.
    """

    ages: Ages | None
    first: list[Tensor]
    second: list[Tensor] = field(default_factory=list)
    both: list[Tensor] = field(default_factory=list)
    packet: Packet | None = None
    under_way: bool = False

    @classmethod
    def like(cls, fresh: Sequence[Tensor], tokens: int, ages: Ages | None) -> Slot:
        """An empty slot for keys and values like `fresh`, but of so many tokens."""
        versions = 1 if ages is None else 2
        both = [x.new_empty(versions, *x.shape[:-2], tokens, x.shape[-1]) for x in fresh]
        first = [x[0] for x in both]
        return cls(ages, first) if ages is None else cls(ages, first, [x[1] for x in both], both)

    @staticmethod
    def held_bytes(width: int, itemsize: int) -> int:
        """Memory of what is remembered of one token and head, where keys or values are predicted.

        Args:
            width: numbers of a head.
            itemsize: bytes of one as the model computes it.
        """
        return 2 * width * itemsize

    @staticmethod
    def sent_bytes(width: int, itemsize: int) -> int:
        """What `send` sends of one token and head; as for `held_bytes`."""
        return width * itemsize

    def fits(self, fresh: Sequence[Tensor], tokens: int) -> bool:
        """Whether keys and values like `fresh`, but of so many tokens, are of this slot's kind."""
        return all(
            (x.shape[:-2], tokens, x.shape[-1], x.dtype, x.device)
            == (y.shape[:-2], y.shape[-2], y.shape[-1], y.dtype, y.device)
            for x, y in zip(fresh, self.first, strict=True)
        )

    @property
    def standing(self) -> tuple[object, ...]:
        """State kept in Python, not in tensors. A recording is valid only for the value that it
        was made under."""
        return self.first[0].data_ptr(), self.under_way

    def stand(self, standing: tuple[object, ...]) -> None:
        """Take up a former `standing` of the same step."""
        self.under_way = bool(standing[1])

    def begin_step(self, *, first: bool, sync: bool, alike: bool) -> None:
        """Before a step: the two versions change places, or not, so that none is moved.

        They do so here and nowhere else, since a recorded step runs no Python.

        Args:
            first: whether nothing is remembered from before it. Then the versions stand as they
                were made, so that all images find them alike.
            sync: whether the step brings a new version of all tokens.
            alike: whether the first version is the newer one of every token.
        """
        if not self.second:
            return
        if first:
            self.first, self.second = [x[0] for x in self.both], [x[1] for x in self.both]
        elif alike and self.under_way != sync:
            # What is on its way is to land as the first version, or, before a new one, as the
            # second; where nothing is, the new one is to be written over the older of both.
            self.first, self.second = self.second, self.first

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
        """All tokens have a new version. Returns it: keys and values.

        In this order: what is on its way lands; the version before makes room; the new one is
        written; where it is all that is known, it stands for both. The step has begun before, for
        the ages too, see `Memory.advance`.

        Args:
            write: puts the new version into the tensors that it is given.
            lengths: of the segments whose tokens these are.
            parts: the part that each rank computed in the step before.
            first: whether the new version is all that is known.
            alike: whether the first version was the newer one of every token.
            recorder: takes up what can't be recorded.
        """
        self.land(lengths, parts, recorder, before_another=not first)
        if self.ages is not None and not first:
            self._make_room(None if alike else self.ages.was)
        write(self.first)
        if self.ages is not None:
            self._settle(alone=first)
        return self.first

    def _make_room(self, newer: Tensor | None = None) -> None:
        """Before the keys and values of all tokens are written as the first version.

        Args:
            newer: whether the first was each token's newer version; None: it was for all, and
                the versions stand as `begin_step` has them.
        """
        if newer is not None:
            for first, second in zip(self.first, self.second, strict=True):
                torch.where(newer[:, None], first, second, out=second)

    def _settle(self, *, alone: bool) -> None:
        """After the keys and values of all tokens were written as the first version.

        Args:
            alone: whether they are all that is known.
        """
        for first, second in zip(self.first, self.second if alone else (), strict=False):
            second.copy_(first)

    def read(self, places: Places, fresh: Sequence[Tensor], *, keep: bool) -> list[Tensor]:
        """The whole at this step's time, in which one part is fresh.

        Args:
            places: of the part's tokens.
            fresh: the part's keys and values, each (batch, heads, part tokens, head dim).
            keep: whether to remember them, over the older version of each token.

        Returns:
            Keys and values: where they are predicted, new tensors, else the slot's own.
        """
        if self.ages is not None:
            return self._predict(self.ages, places, fresh, keep)
        for whole, x in zip(self.first, fresh, strict=True):
            place(whole, x, places.index)
        return self.first

    def _predict(
        self, ages: Ages, places: Places, fresh: Sequence[Tensor], keep: bool
    ) -> list[Tensor]:
        versions = zip(self.first, self.second, self.both, fresh, strict=True)
        return [
            exchange(first, second, x, places, ages.line, ages.newer, both if keep else None)
            for first, second, both, x in versions
        ]

    def pack(self, ranks: Ranks, index: Tensor, fresh: Sequence[Tensor]) -> Packet:
        """A packet of a part's keys and values, to be sent now. The last ones have landed.

        Args:
            ranks: to whom.
            index: where the part's tokens stand; see `Places`.
            fresh: the part's keys and values, each (batch, heads, part tokens, head dim).
        """
        tensors = self._sent(index, fresh)
        if self.packet is None:
            self.packet = Packet(ranks, tensors)
        self.packet.write(tensors)
        self.under_way = True
        return self.packet

    def _sent(self, index: Tensor, fresh: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the other ranks need of a part, to `land` it in the next step."""
        return fresh

    def land(
        self,
        lengths: Sequence[int],
        parts: Sequence[int],
        recorder: Recorder = at_once,
        *,
        before_another: bool = False,
    ) -> None:
        """What was sent in the last step has arrived, or is waited for: the first version.

        Args:
            lengths: of the segments whose tokens these are.
            parts: the part that each rank computed then.
            recorder: takes up what can't be recorded.
            before_another: whether a new version of all tokens follows: then it is the second, if
                two are remembered.
        """
        version = (before_another and self.second) or self.first
        for x, pieces in zip(version, self._arrived(recorder), strict=False):
            join(pieces, parts, -2, lengths, x)

    def _arrived(self, recorder: Recorder) -> Sequence[Sequence[Tensor]]:
        """What was on its way, as `Packet.read` gives it; empty if nothing was."""
        if self.packet is None or not self.under_way:
            return []
        self.under_way = False
        if not self.packet.recordable:  # else it arrived in the step that sent it
            recorder(self.packet.wait)
        return self.packet.read()

    def end(self) -> None:
        """The image has ended: what is on its way arrives, and need not land."""
        self._arrived(at_once)
