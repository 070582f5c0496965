"""The state behind a compiled model: the step counter, the streams and their cache slots.

The cache is not an argument of the graph. `cached_sdpa` is declared free of side effects and finds
its slot through the runtime's name, as functional collectives find their process group. So AOT
autograd needs no auto_functionalized copies of some gigabytes of keys and values, and one graph
serves sync and steady steps. It is safe because a slot is touched by one node of one graph, or
by one call of a piece that repeated blocks share, and its output is always used. Where `send_kv`
sends ahead, attention reads its token, so that no compiler can put one after the other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from piflux.errors import StepsUnforeseen
from piflux.memory.memory import Memory, Places
from piflux.memory.slots import ChangeSlot, Slot
from piflux.policies.parts import join
from piflux.policies.schedule import Schedule, Step
from piflux.ranks.agreement import fingerprint
from piflux.ranks.ranks import Packet, Ranks
from piflux.recording.recorded import Eagerly, at_once
from piflux.runtime.streams import Habits, Roles, Seen, Stream, find

log = logging.getLogger(__name__)

Foreseen = Callable[[], "Tensor | None"]

_RUNTIMES: WeakValueDictionary[str, Runtime] = WeakValueDictionary()
_NUMBERS = count()

# Of guidance methods, a step.
MOST_PASSES = 3

# Guidance methods make at most three passes a step; a stream that sat out more calls than this is
# of an image that has ended, and its caches are freed.
STALE_CALLS = 6


class Runtime:
    """One compiled model's step counter and caches on one rank.

    Args:
        schedule: which part each rank computes at which step.
        ranks: who shares the work; None for one rank alone.
        name: how graph nodes name this runtime; chosen if None.

    Attributes:
        first_slot: what attentions count their slots from; see `piflux.runtime.ops.slots_from`.
        foreseen: gives the times of all steps of the image under way, (steps,); None if unknown.
        recycles: whether memory is kept for the next image of the same shapes, since steps are
            recorded; see `piflux.recording.recorded`.
        notes: what was remarkable of images so far.
        eagerly: calls what can't be recorded: at once, or, where a step is being recorded, whenever
            the recording has come as far.
    """

    def __init__(self, schedule: Schedule, ranks: Ranks | None, name: str | None = None) -> None:
        self.schedule = schedule
        self.ranks = ranks
        self.name = f"piflux_{next(_NUMBERS)}" if name is None else name
        self.explicit = False
        self.streams: list[Stream] = []
        self.calls = 0
        self.first_slot = 0
        self.foreseen: Foreseen = _unknown
        self.recycles = False
        self.eagerly: Eagerly = at_once
        self._spare: dict[Any, list[Memory]] = {}
        self.notes: list[str] = []
        self._habits: dict[object, Habits] = {}
        self._went_on = False  # whether a stream had a second step since the image began
        self._now: tuple[Stream, Step] | None = None
        self._sent: dict[int, Packet] = {}  # by slot: what attention has yet to take up
        _RUNTIMES[self.name] = self

    @staticmethod
    def named(name: str) -> Runtime:
        """Raises RuntimeError if the model that owned it is gone."""
        try:
            return _RUNTIMES[name]
        except KeyError:
            raise RuntimeError(
                f"the piflux runtime {name!r} is gone: keep the compiled model alive"
            ) from None

    @property
    def now(self) -> tuple[Stream, Step]:
        """The stream and step of the call under way."""
        if self._now is None:
            raise RuntimeError(f"no call of {self.name!r} is under way")
        return self._now

    @property
    def foresees(self) -> bool:
        """Whether the times of an image's steps may be known before they come."""
        return self.foreseen is not _unknown

    @property
    def under_way(self) -> bool:
        """Whether a call is."""
        return self._now is not None

    @property
    def rank(self) -> int:
        """Whose part is being computed."""
        return self._ranks.rank

    def reset(self) -> None:
        """Forget every stream; the next call is a generation's first step."""
        for stream in self.streams:
            for slot in stream.memory.slots.values():
                # A collective that is still under way must not outlive its buffers.
                if slot.packet is not None and slot.packet.under_way:
                    slot.packet.wait()
        self._retire(self.streams)
        self.streams.clear()

    @contextlib.contextmanager
    def generation(self, foreseen: Foreseen | None = None) -> Iterator[None]:
        """One image: streams start at step 0 and end with the block.

        Args:
            foreseen: gives the times of all steps, asked for at the first.

        Raises:
            StepsUnforeseen: at the end, if a step's time was another one.
        """
        outer = self.explicit, self.foreseen
        self.explicit, self.foreseen = True, foreseen or _unknown
        self.streams.clear()
        self._habits.clear()
        self._went_on, begun = False, self.calls
        try:
            yield
            self._tell_of_no_steps(self.calls - begun)
            tables = [x for stream in self.streams for x in stream.tables.values() if x is not None]
            self.reset()
            # Waits for the device, as whoever looks at the image does next.
            if tables and not torch.stack([table.complete for table in tables]).all():
                raise StepsUnforeseen(
                    "a denoise step came at a time that is not one of the timesteps that were "
                    "announced for the image: give piflux.generation those that the model is "
                    "called with, or none"
                )
        finally:
            self.streams.clear()
            self.explicit, self.foreseen = outer

    def _tell_of_no_steps(self, calls: int) -> None:
        """Each call of an image was taken for the first of something: nothing was remembered."""
        remembers = self.ranks is not None and self.schedule.policy != "gather"
        if not remembers or self._went_on or calls <= MOST_PASSES:
            return
        self.notes.append(
            f"an image of {calls} calls had no steady step: no call had the conditions of an "
            "earlier one, so that each was computed in full. Pass what stays the same from step to "
            "step (prompt embeddings, ids) unchanged"
        )
        log.warning("%s", self.notes[-1])

    @contextlib.contextmanager
    def call(self, graph: object, roles: Roles, args: Sequence[Any]) -> Iterator[Step]:
        """Find this call's stream and step, on all ranks alike; `args` are the graph's inputs.

        Raises:
            RanksDisagree: at a stream's first step, if the ranks' inputs or settings differ.
        """
        try:
            stream = self._stream(graph, roles, args)
            self._advance(stream, roles, args)
            self._now = stream, self.schedule.step(stream.index)
            self.first_slot = 0
            self._went_on |= stream.index > 0
            yield self._now[1]
        except BaseException:
            # Part of the slots are of this step, part of the last: none can be trusted. The
            # collectives under way may never end, so they are not waited for.
            self.streams.clear()
            raise
        finally:
            self._now = None
            # Empty, unless an exception came between. What is under way then may never end, either;
            # c10d holds the memory of collectives that nobody waits for.
            self._sent.clear()

    def _stream(self, graph: object, roles: Roles, args: Sequence[Any]) -> Stream:
        conditions = roles.pick(roles.conditions, args)
        self.calls += 1
        stale = [s for s in self.streams if self.calls - s.used > STALE_CALLS]
        if stale:
            self._retire(stale)
            self.streams = [s for s in self.streams if s not in stale]
        clocks, latents = roles.pick(roles.clocks, args), roles.pick(roles.latents, args)
        if self.ranks is None:
            clocks = latents = []  # nothing is remembered that passes would have to share
        found = find(
            [stream for stream in self.streams if stream.graph is graph],
            self._habits.setdefault(graph, Habits()),
            conditions,
            clocks,
            latents,
            explicit=self.explicit,
        )
        if found is not None:
            found.used = self.calls
            found.note(clocks, latents)
            return found
        shapes = [(x.shape, x.dtype, x.device) for x in roles.inputs(args).values()]
        kind = graph, tuple(shapes)
        spare = self._spare.get(kind)
        memory = spare.pop() if spare else Memory()
        stream = Stream(graph, [Seen(x) for x in conditions], self.calls, kind, memory)
        stream.note(clocks, latents)
        self.streams.append(stream)
        return stream

    def _retire(self, streams: Sequence[Stream]) -> None:
        """Keep what these streams' images leave for the next ones, in place of what was left."""
        if self.recycles:
            self._spare = {}
            for stream in streams:
                self._spare.setdefault(stream.kind, []).append(stream.memory)

    def _advance(self, stream: Stream, roles: Roles, args: Sequence[Any]) -> None:
        ranks = self.ranks
        if ranks is None:
            return
        if not self.explicit or stream.index < 0:
            latents = roles.pick(roles.latents, args)
            goes_on = not self.explicit and stream.observe(roles.pick(roles.clocks, args), latents)
            # One rank in doubt is enough: a rank alone in a sync step would wait for ever. Who is
            # sure votes too, so that a rank outside of the others' generation is found out.
            device = next(iter(roles.inputs(args).values())).device
            if ranks.any(not goes_on, device):
                stream.restart()
                if not self.recycles:
                    stream.memory = Memory()
        stream.index += 1
        if self.schedule.predicts:
            stream.tick(roles.pick(roles.clocks, args))
            stream.memory.begin_step()
        if stream.index == 0:
            settings = {"schedule": self.schedule, "explicit generation": self.explicit}
            ranks.agree(fingerprint(settings, roles.inputs(args)))

    @contextlib.contextmanager
    def recording(self, eagerly: Eagerly) -> Iterator[None]:
        """What runs inside is recorded; `eagerly` takes up what can't be."""
        self.eagerly = eagerly
        try:
            yield
        except BaseException:
            # Nothing was sent, and the step is about to begin once more.
            self._sent.clear()
            self.now[0].memory.give_all_back()
            raise
        finally:
            self.eagerly = at_once

    def part(self) -> int:
        """The part that the rank being computed has at this step."""
        return self.now[1].parts[self._ranks.rank]

    def turn(self) -> None:
        """The rank being computed begins its part of this step."""
        stream, step = self.now
        stream.memory.turn(
            self.rank,
            self.schedule.world_size,
            step,
            stream.now if self.schedule.predicts else None,
            own=self.schedule.policy == "rotate",
        )

    def places(self, lengths: Sequence[int], device: torch.device) -> Places:
        """Where the tokens of the part at hand stand among segments of these lengths."""
        world_size = self.schedule.world_size
        return self.now[0].memory.places(tuple(lengths), world_size, self.part(), device)

    def gather(self, piece: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """The whole dimension `dim` from every rank's part."""
        pieces = self._ranks.gather(piece).start().wait()
        return join(pieces, self.now[1].parts, dim, lengths)

    def send(self, slot: int, fresh: Sequence[Tensor], world_size: int) -> None:
        """Start what `exchange` takes up: a sync step's keys and values, which others await.

        Args: as for `exchange`.
        """
        stream, step = self.now
        if world_size > 1 and step.sync:
            packet = stream.memory.packet(self._ranks, fresh)
            packet.write(fresh)
            self._turn(packet)(packet.start)
            self._sent[self.first_slot + slot] = packet

    def _turn(self, packet: Packet) -> Eagerly:
        """How a packet is sent, or waited for, where both happen in one step."""
        return at_once if packet.recordable else self.eagerly

    def exchange(
        self,
        slot: int,
        fresh: Sequence[Tensor],
        lengths: Sequence[int],
        world_size: int,
        *,
        ordered: bool = True,
    ) -> Sequence[Tensor]:
        """This rank's fresh keys and values for the whole sequence's, as the policy has them.

        In a sync step `send` has sent them; what `displaced` sends in the others, it sends here.

        Args:
            slot: which attention, counted from `first_slot`.
            fresh: keys and values of this rank's part, each (batch, heads, part tokens, head dim).
            lengths: the full length of each segment.
            world_size: into how many parts the graph was cut; 1 if `fresh` is of all tokens.
            ordered: whether it matters in which order tokens come.

        Returns:
            Keys and values, each (batch, heads, all tokens, head dim), until the next `send`.
        """
        ranks, (stream, step) = self._ranks, self.now
        lengths = tuple(lengths)
        slot += self.first_slot
        if not step.sync:
            return self._remember(slot, fresh, lengths)
        sent = self._sent.pop(slot, None)
        if sent is not None:
            self._turn(sent)(sent.wait)
        if self.schedule.policy != "gather":
            for rank in ranks.here:
                kept = self._fill(rank, slot, fresh, sent, lengths)
            whole = kept if world_size > 1 else fresh
        elif sent is not None:
            together = None if ordered or _overlap(lengths, world_size) else sent.read_whole()
            whole = together or [join(pieces, step.parts, -2, lengths) for pieces in sent.read()]
        else:
            whole = fresh
        if sent is not None:
            stream.memory.give_back(sent)
        return whole

    def _fill(
        self,
        rank: int,
        slot: int,
        fresh: Sequence[Tensor],
        sent: Packet | None,
        lengths: tuple[int, ...],
    ) -> Sequence[Tensor]:
        """A sync step's keys and values into a rank's slot; returns them."""
        (stream, step), schedule = self.now, self.schedule
        memory, tokens, first = stream.memory, sum(lengths), self.now[1].index == 0
        kept = memory.slots.get((rank, slot))
        if kept is None or not kept.fits(fresh, tokens):
            kind = ChangeSlot if schedule.compresses else Slot
            kept = memory.slots[rank, slot] = kind.like(fresh, tokens, two=schedule.predicts)
            memory.replays.clear()  # of the slots' former addresses
        kept.land(lengths, step.parts)
        if schedule.predicts:
            newer = memory.synced(rank, lengths, stream.now, fresh[0].device, first=first)
            if not first:
                kept.make_room(newer if schedule.policy == "rotate" else None)
        if sent is None:
            for whole, x in zip(kept.first, fresh, strict=True):
                whole.copy_(x)
        else:
            for whole, pieces in zip(kept.first, sent.read(), strict=True):
                join(pieces, step.parts, -2, lengths, whole)
        kept.settle(alone=first)
        return kept.first

    def _remember(
        self,
        slot: int,
        fresh: Sequence[Tensor],
        lengths: tuple[int, ...],
    ) -> Sequence[Tensor]:
        """Keys and values of a steady step: one part fresh, the others as they are remembered."""
        (stream, step), ranks = self.now, self._ranks
        places = self.places(lengths, fresh[0].device)
        kept = stream.memory.slots[ranks.rank, slot]
        displaced = self.schedule.policy == "displaced"
        if displaced:
            # Each rank keeps its part, so parts are now as they were when the last was sent.
            kept.land(lengths, step.parts, self.eagerly)
            kept.send(ranks, kept.packets(places.index, fresh), self.eagerly)
        if not self.schedule.predicts:
            return kept.write(places.index, fresh)
        # displaced: all ranks' are kept, as they arrive.
        ages = stream.memory.ages(ranks.rank, lengths)
        return kept.predict(ages, places, fresh, keep=not displaced)

    @property
    def _ranks(self) -> Ranks:
        assert self.ranks is not None, "one rank alone runs a graph without piflux's ops"
        return self.ranks


def _overlap(lengths: Sequence[int], world_size: int) -> bool:
    """Whether two parts have a token in common."""
    return any(length % world_size for length in lengths)


def _unknown() -> None:
    """Steps of which nothing is known before they come."""
