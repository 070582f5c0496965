"""What a stream remembers between its steps, and the tables that steps read to know their part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from piflux.memory.slots import Ages, Slot
from piflux.policies.parts import places
from piflux.policies.schedule import Step
from piflux.ranks.ranks import Packet, Ranks
from piflux.recording.recorded import Replay
from piflux.runtime.hoisted import Hoisted, Packed


class Places:
    """Where the tokens of the part at hand stand, in tensors that are written over at each turn.

    So the part is data: a recorded step (`piflux.recording.recorded`) serves every part.

    Args:
        lengths: of the segments whose tokens these are.
        world_size: the number of parts.
        part: the part at hand.
        device: where the tables are.

    Attributes:
        index: (part tokens,) in int64: the place of each in the whole.
        sources: (all tokens,) in int32: where in the part a token stands; -1 if it is of another.
    """

    def __init__(
        self, lengths: Sequence[int], world_size: int, part: int, device: torch.device
    ) -> None:
        every = torch.stack([places(lengths, world_size, p) for p in range(world_size)])
        sources = torch.full((world_size, sum(lengths)), -1, dtype=torch.int32)
        sources.scatter_(1, every, torch.arange(every.shape[1], dtype=torch.int32).expand_as(every))
        self._every = every.to(device)
        self._sources = sources.to(device)
        self.index = self._every[part].clone()
        self.sources = self._sources[part].clone()

    def turn(self, part: int) -> None:
        """Now `part` is at hand."""
        self.index.copy_(self._every[part])
        self.sources.copy_(self._sources[part])


@dataclass(eq=False)
class Memory:
    """Cache slots and their ages, by rank.

    It outlives its stream where steps are recorded, for the next stream of the same shapes: what is
    recorded is tied to addresses.

    Attributes:
        slots: by rank and attention.
        replays: by rank, what `standing` was and the step's kind, a recorded step.
        seen: likewise, what was the same at the last step that was not recorded; see `Recorded`.
        hoisted: this step's products of the time.
    """

    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    replays: dict[tuple[Any, ...], Replay] = field(default_factory=dict)
    seen: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    hoisted: dict[Hoisted, Packed] = field(default_factory=dict)
    # Of all slots whose tokens are of the same segments; by rank and the segments' lengths.
    _ages: dict[tuple[int, tuple[int, ...]], Ages] = field(default_factory=dict)
    _places: dict[tuple[tuple[int, ...], torch.device], Places] = field(default_factory=dict)
    # Those that know of this sync step, with what they were before.
    _told: dict[tuple[int, tuple[int, ...]], Tensor] = field(default_factory=dict)
    # Of sync steps, in the order in which they were made, and those that carry something.
    _packets: list[Packet] = field(default_factory=list)
    _taken: set[Packet] = field(default_factory=set)

    def standing(self, rank: int) -> Any:
        """What Python knows of a rank's slots before a step, of which recordings know nothing."""
        return tuple(
            (slot.first[0].data_ptr(), slot.coming)
            for (whose, _), slot in self.slots.items()
            if whose == rank
        )

    def packet(self, ranks: Ranks, like: Sequence[Tensor]) -> Packet:
        """One for tensors like these, to be given back.

        In every step the same, on all ranks: what two of them share has to be what both mean, and
        what is recorded does not ask again.
        """
        for packet in self._packets:
            if packet not in self._taken and packet.fits(like):
                break
        else:
            packet = Packet(ranks, like)
            self._packets.append(packet)
        self._taken.add(packet)
        return packet

    def give_back(self, packet: Packet) -> None:
        """All that it brought has been read, or will have been when it is written next."""
        self._taken.discard(packet)

    def give_all_back(self) -> None:
        """The step begins once more."""
        self._taken.clear()

    def places(
        self, lengths: tuple[int, ...], world_size: int, part: int, device: torch.device
    ) -> Places:
        """The tables for segments of these lengths, with `part` at hand if they are new."""
        key = lengths, device
        if key not in self._places:
            self._places[key] = Places(lengths, world_size, part, device)
        return self._places[key]

    def turn(
        self, rank: int, world_size: int, step: Step, now: Tensor | None, *, own: bool
    ) -> None:
        """A rank begins its part of a step; what the step needs to know is written down for it.

        Args:
            rank: which.
            world_size: the number of parts.
            step: which.
            now: the step's time, where keys and values are predicted.
            own: whether steady steps remember the rank's part alone; else all, as they arrive.
        """
        part = step.parts[rank]
        for tables in self._places.values():
            tables.turn(part)
        if now is None:
            return
        for (whose, lengths), ages in self._ages.items():
            if whose != rank:
                continue
            here = now.to(ages.line.device)
            if step.sync:
                self._told[whose, lengths] = _sync(ages, here, first=step.index == 0)
                continue
            ages.look(here)
            if own:
                tables = self.places(lengths, world_size, part, here.device)
                ages.renew_part(tables.sources >= 0, here)
            else:
                ages.renew(here)

    def begin_step(self) -> None:
        """A step begins; if it is a sync step, no age knows of it yet."""
        self._told.clear()
        for slot in self.slots.values():
            slot.begin_step()

    def synced(
        self, rank: int, lengths: tuple[int, ...], now: Tensor, device: torch.device, *, first: bool
    ) -> Tensor:
        """This step computes all tokens of the segments `lengths` that `rank` remembers.

        Args:
            rank: which.
            lengths: of the segments.
            now: the step's time.
            device: where the slots are.
            first: whether nothing is remembered from before.

        Returns:
            (tokens,) of bool: whether a token's first version was its newer one.
        """
        key = rank, lengths
        if key not in self._told:
            here = now.to(device)
            if key not in self._ages:
                self._ages[key] = Ages(lengths, here)
            self._told[key] = _sync(self._ages[key], here, first=first)
        return self._told[key]

    def ages(self, rank: int, lengths: tuple[int, ...]) -> Ages:
        """Of the slots of `rank` whose tokens are of segments of these lengths."""
        return self._ages[rank, lengths]


def _sync(ages: Ages, now: Tensor, *, first: bool) -> Tensor:
    """A step at the time `now` computes all tokens; see `Memory.synced`."""
    if first:
        ages.begin(now)
    return ages.renew(now)
