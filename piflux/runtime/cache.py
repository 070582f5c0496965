"""The state behind a compiled model: the step counter, the streams and their cache slots.

The cache is not an argument of the graph. `cached_sdpa` is declared free of side effects and finds
its slot through the runtime's name, as functional collectives find their process group. So AOT
autograd needs no auto_functionalized copies of some gigabytes of keys and values, and one graph
serves sync and steady steps. It is safe because a slot is touched by one node of one graph, or
by one call of a piece that repeated blocks share, and its output is always used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from piflux.parts import join
from piflux.runtime.agreement import fingerprint
from piflux.runtime.ranks import Ranks
from piflux.runtime.slots import ChangeSlot, Slot
from piflux.runtime.streams import Roles, Seen, Stream
from piflux.schedule import Schedule, Step

_RUNTIMES: WeakValueDictionary[str, Runtime] = WeakValueDictionary()
_NUMBERS = count()

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
    """

    def __init__(self, schedule: Schedule, ranks: Ranks | None, name: str | None = None) -> None:
        self.schedule = schedule
        self.ranks = ranks
        self.name = f"piflux_{next(_NUMBERS)}" if name is None else name
        self.explicit = False
        self.streams: list[Stream] = []
        self.calls = 0
        self.first_slot = 0
        self._now: tuple[Stream, Step] | None = None
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

    def reset(self) -> None:
        """Forget every stream; the next call is a generation's first step."""
        for stream in self.streams:
            for slot in stream.slots.values():
                # A collective that is still under way must not outlive its buffers.
                for gathering in slot.coming:
                    gathering.wait()
        self.streams.clear()

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """One image: streams start at step 0 and end with the block."""
        outer, self.explicit = self.explicit, True
        self.streams.clear()
        try:
            yield
            self.reset()
        finally:
            self.streams.clear()
            self.explicit = outer

    @contextlib.contextmanager
    def call(self, graph: object, roles: Roles, args: Sequence[Any]) -> Iterator[Step]:
        """Find this call's stream and step, on all ranks alike; `args` are the graph's inputs.

        Raises:
            RanksDisagree: at a stream's first step, if the ranks' inputs or settings differ.
        """
        try:
            stream = self._stream(graph, roles.pick(roles.conditions, args))
            self._advance(stream, roles, args)
            self._now = stream, self.schedule.step(stream.index)
            self.first_slot = 0
            yield self._now[1]
        except BaseException:
            # Part of the slots are of this step, part of the last: none can be trusted. The
            # collectives under way may never end, so they are not waited for.
            self.streams.clear()
            raise
        finally:
            self._now = None

    def _stream(self, graph: object, conditions: list[Tensor]) -> Stream:
        self.calls += 1
        self.streams = [s for s in self.streams if self.calls - s.used <= STALE_CALLS]
        for stream in self.streams:
            if stream.graph is graph and all(
                seen.again(x) for seen, x in zip(stream.conditions, conditions, strict=True)
            ):
                stream.used = self.calls
                return stream
        stream = Stream(graph, [Seen(x) for x in conditions], self.calls)
        self.streams.append(stream)
        return stream

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
        stream.index += 1
        if self.schedule.predicts:
            stream.tick(roles.pick(roles.clocks, args))
        if stream.index == 0:
            settings = {"schedule": self.schedule, "explicit generation": self.explicit}
            ranks.agree(fingerprint(settings, roles.inputs(args)))

    def part(self) -> int:
        """The part that the rank being computed has at this step."""
        return self.now[1].parts[self._ranks.rank]

    def gather(self, piece: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """The whole dimension `dim` from every rank's part."""
        pieces = self._ranks.gather(piece).wait()
        return join(pieces, self.now[1].parts, dim, lengths)

    def exchange(
        self, slot: int, fresh: Sequence[Tensor], lengths: Sequence[int], world_size: int
    ) -> list[Tensor]:
        """This rank's fresh keys and values for the whole sequence's, as the policy has them.

        Args:
            slot: which attention, counted from `first_slot`.
            fresh: keys and values of this rank's part, each (batch, heads, part tokens, head dim).
            lengths: the full length of each segment.
            world_size: into how many parts the graph was cut; 1 if `fresh` is of all tokens.

        Returns:
            Keys and values, each (batch, heads, all tokens, head dim).
        """
        stream, step = self.now
        ranks, policy, predicts = self._ranks, self.schedule.policy, self.schedule.predicts
        lengths = tuple(lengths)
        slot += self.first_slot
        if step.sync and world_size > 1:
            coming = [ranks.gather(x) for x in fresh]
            whole = [join(g.wait(), step.parts, -2, lengths) for g in coming]
        elif step.sync:
            whole = list(fresh)
        if step.sync:
            for rank in ranks.here if policy != "gather" else ():
                # Copies where the values are the graph's, or of several ranks.
                keep = whole if world_size > 1 else [_copy(x) for x in whole]
                newer = stream.synced(rank, lengths, keep[0].device) if predicts else None
                if (rank, slot) in stream.slots:
                    stream.slots[rank, slot].land(lengths)
                    stream.slots[rank, slot].renew(keep, newer if policy == "rotate" else None)
                elif self.schedule.compresses:
                    stream.slots[rank, slot] = ChangeSlot.of(keep)
                else:
                    second = [_copy(x) for x in keep] if predicts else []
                    stream.slots[rank, slot] = Slot(keep, second)
            return whole
        part = self.part()
        kept = stream.slots[ranks.rank, slot]
        kept.land(lengths)
        if predicts:
            own = policy == "rotate"  # displaced: all ranks' are kept, as they arrive
            ages, sources = stream.ages(ranks.rank, lengths, world_size, part, own)
            read = kept.predict(ages, sources, fresh, keep=own)
        else:
            assert isinstance(kept, Slot)
            read = kept.write(lengths, world_size, part, fresh)
        if policy == "displaced":
            sent = kept.packets(lengths, world_size, part, fresh)
            kept.coming = [ranks.gather(x) for x in sent]
            kept.parts = step.parts
        return read

    @property
    def _ranks(self) -> Ranks:
        assert self.ranks is not None, "one rank alone runs a graph without piflux's ops"
        return self.ranks


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
