"""What a stream remembers between its steps, and the tables that steps read to know their part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from piflux.memory.ages import Ages
from piflux.memory.places import Places
from piflux.memory.slots import Slot
from piflux.ranks.packet import Packet
from piflux.ranks.protocol import Ranks

Kept = TypeVar("Kept")
Key = tuple[int, tuple[int, ...]]
"""A rank, and the lengths of segments."""


class Memory:
    """Cache slots, their ages and places, and what others keep between images.

    It outlives its stream where steps are recorded, for the next stream of the same shapes: what is
    recorded is tied to addresses.

    Attributes:
        slots: by rank and attention.
        made: by rank, how many slots were made: recordings know their addresses.
    """

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], Slot] = {}
        self.made: Counter[int] = Counter()
        self._ages: dict[Key, Ages] = {}
        self._places: dict[tuple[int, tuple[int, ...], torch.device], Places] = {}
        self._kept: dict[object, Any] = {}
        # Of sync steps, in the order in which they were made, and those that carry something.
        self._packets: dict[int, list[Packet]] = {}
        self._taken: set[Packet] = set()

    def kept(self, owner: object, make: Callable[[], Kept]) -> Kept:
        """What `owner` keeps here as long as there are slots, made at its first call."""
        if owner not in self._kept:
            self._kept[owner] = make()
        return cast(Kept, self._kept[owner])

    def standing(self, rank: int) -> tuple[tuple[object, ...], ...]:
        """State kept in Python, not in tensors, of a rank's slots; see `Slot.standing`."""
        return tuple(slot.standing for slot in self._slots_of(rank))

    def stand(self, rank: int, standing: Sequence[tuple[object, ...]]) -> None:
        """Take up a former `standing` of the same step, of as many slots."""
        for slot, then in zip(self._slots_of(rank), standing, strict=True):
            slot.stand(then)

    def _slots_of(self, rank: int) -> list[Slot]:
        return [slot for (whose, _), slot in self.slots.items() if whose == rank]

    def slot(
        self,
        rank: int,
        number: int,
        fresh: Sequence[Tensor],
        tokens: int,
        kind: type[Slot],
        ages: Ages | None,
    ) -> Slot:
        """A rank's slot of one attention, an empty one if there is none that fits.

        Args:
            rank: which.
            number: of the attention.
            fresh: keys and values, each (batch, heads, any tokens, head dim).
            tokens: of the whole sequence.
            kind: of slot.
            ages: of its tokens; None where nothing is predicted.
        """
        slot = self.slots.get((rank, number))
        if slot is None or not slot.fits(fresh, tokens):
            slot = self.slots[rank, number] = kind.like(fresh, tokens, ages)
            self.made[rank] += 1
        return slot

    def packet(self, ranks: Ranks, like: Sequence[Tensor]) -> Packet:
        """One for tensors like these, to be given back.

        In every step the same, on all ranks: what two of them share has to be what both mean, and
        what is recorded does not ask again.
        """
        packets = self._packets.setdefault(ranks.rank, [])
        for packet in packets:
            if packet not in self._taken and packet.fits(like):
                break
        else:
            packet = Packet(ranks, like)
            packets.append(packet)
        self._taken.add(packet)
        return packet

    def give_back(self, packet: Packet) -> None:
        """The packet may be reused: its contents are read before the next write."""
        self._taken.discard(packet)

    def give_all_back(self, rank: int) -> None:
        """A rank's step begins once more: what was taken for it was not sent."""
        self._taken.difference_update(self._packets.get(rank, ()))

    def places(
        self,
        rank: int,
        lengths: tuple[int, ...],
        world_size: int,
        part: int,
        device: torch.device,
    ) -> Places:
        """A rank's tables for segments of these lengths, with `part` at hand if they are new."""
        key = rank, lengths, device
        if key not in self._places:
            self._places[key] = Places(lengths, world_size, part, device)
        return self._places[key]

    def ages(self, rank: int, lengths: tuple[int, ...], make: Callable[[], Ages]) -> Ages:
        """Of a rank's slots whose tokens are of segments of these lengths; `make` if new."""
        if (rank, lengths) not in self._ages:
            self._ages[rank, lengths] = make()
        return self._ages[rank, lengths]

    def advance(
        self,
        rank: int,
        world_size: int,
        part: int,
        now: Tensor,
        *,
        first: bool,
        sync: bool,
        own: bool,
    ) -> None:
        """A rank's step begins: its slots, places and ages are those of the step.

        Args:
            rank: which.
            world_size: the number of parts.
            part: the part that the rank computes.
            now: the step's time, a scalar.
            first: whether nothing is remembered from before it.
            sync: whether it computes all tokens.
            own: whether other steps remember the rank's part alone; else all, as they arrive.
        """
        for slot in self._slots_of(rank):
            slot.begin_step(first=first, sync=sync, alike=not own)
        for (whose, _, _), places in self._places.items():
            if whose == rank:
                places.turn(part)
        for (whose, lengths), ages in self._ages.items():
            if whose != rank:
                continue
            mine = None
            if own and not sync:
                tables = self.places(rank, lengths, world_size, part, ages.line.device)
                mine = tables.sources >= 0
            ages.advance(now, first=first, sync=sync, own=mine)
