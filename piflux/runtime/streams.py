"""Which generation a call belongs to, and whether it goes on with it.

A call of a diffusion transformer has inputs of three roles: *latents* change from step to step,
*clocks* (timestep, guidance: one number, or one for each of a batch) say where on the way the step
is, and *conditions* (prompt embeddings, ids) stay. A *stream* is the run of calls with the same
conditions: a conditional and an unconditional pass are two streams of one generation. So are two
passes of a step whose conditions happen to be the same, as where the negative prompt is the prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from piflux.memory.memory import Memory
from piflux.policies.schedule import Schedule, Unrolled
from piflux.policies.step import Step
from piflux.runtime.continued import Continued
from piflux.runtime.fragments import Fragment
from piflux.runtime.times import Times

# Guidance methods make at most three passes a step; a stream that sat out more calls than this is
# of an image that has ended, and its caches are freed.
STALE_CALLS = 6

# Neighbouring steps of one image correlate (flow matching from sigma 1 to 0.5: 0.7), another
# image's noise does not. Below this a call is not taken for the next step.
LATENT_CORRELATION = 0.5

# Passes of one step with the same conditions: only a negative prompt may be the prompt. Whoever
# calls again and again with the same inputs gets no more caches than that.
MOST_ALIKE = 2


@dataclass(frozen=True)
class Roles:
    """Positions of a graph's inputs by role; parameters have none."""

    latents: tuple[int, ...]
    clocks: tuple[int, ...]
    conditions: tuple[int, ...]
    names: dict[int, str]

    def pick(self, role: Sequence[int], args: Sequence[Any]) -> list[Tensor]:
        return [args[i] for i in role if isinstance(args[i], Tensor)]

    def inputs(self, args: Sequence[Any]) -> dict[str, Tensor]:
        """Every input that has a role, by name."""
        order = sorted((*self.latents, *self.clocks, *self.conditions))
        return {self.names[i]: args[i] for i in order if isinstance(args[i], Tensor)}


class Seen:
    """A tensor as it was at an earlier call, to tell whether a later one is the same."""

    def __init__(self, x: Tensor) -> None:
        # Inference tensors count no versions, so only a copy can show a change made in place.
        self.version = None if x.is_inference() else x._version
        self.tensor = x.clone() if self.version is None else x

    def again(self, x: Tensor) -> bool:
        """Free if `x` is the very tensor, unmodified; else compares contents, which waits for the
        device."""
        # Written over, the tensor no longer tells what it was: `x` may be a view of it.
        if self.version is not None and self.tensor._version != self.version:
            return False
        if x is self.tensor:
            return True
        if x.shape != self.tensor.shape or x.dtype != self.tensor.dtype:
            return False
        return x.device == self.tensor.device and bool((x == self.tensor).all())


@dataclass(eq=False)
class Stream:
    """The calls of one generation that share conditions, and what they remember.

    Attributes:
        graph: the compiled graph that they run.
        conditions: what they share.
        used: the number of the latest call.
        kind: what another stream has to share to use the same memory: graph and shapes.
        memory: keys and values.
        index: the latest step, -1 before the first.
        now: the step's time, a scalar; see `Times`.
        clocks: the latest values, where the generation is inferred.
        latents: likewise.
        latest: the clocks and the latents of the latest call.
        direction: the way in which the clocks move, 0 as long as they have not.
        tables: products of the time, of all steps where these are known.
        steps: which part each rank computes at which step.
        continued: the predictions that others are continued from.
        edits: how many of latents by callbacks there had been at the latest call.
        leader: the stream of a model's calls, whose fragment's calls these are; else None.
        structure: of what such a model gives.
        computed: how many of the model's calls of a stream of fragments were not left out.
        graphs: that such a model's first call ran.
        given: by its latest call, as leaves of the structure.
    """

    graph: object
    conditions: list[Seen]
    used: int
    kind: Any = None
    memory: Memory = field(default_factory=Memory)
    index: int = -1
    now: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    clocks: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    latest: tuple[list[Seen], list[Seen]] = ([], [])
    direction: int = 0
    tables: dict[Any, Any] = field(default_factory=dict)
    steps: Unrolled | None = None
    continued: Continued = field(default_factory=Continued)
    edits: int = 0
    leader: Stream | None = None
    computed: int = 0
    structure: Any = None
    graphs: Sequence[Fragment] = ()
    given: Sequence[Any] = ()
    _times: Times = field(default_factory=lambda: Times([]))

    def note(self, clocks: Sequence[Tensor], latents: Sequence[Tensor]) -> None:
        """A call belongs to this stream."""
        self.latest = [Seen(x) for x in clocks], [Seen(x) for x in latents]

    def is_at(self, clocks: Sequence[Tensor], latents: Sequence[Tensor]) -> bool:
        """Whether the latest call was at these, as another pass of the same step is.

        A solver that comes back to a time (Heun) has other latents then. A model without clocks
        tells by latents alone. May wait for the device.
        """
        return _again(self.latest[0], clocks) and _again(self.latest[1], latents)

    def is_simultaneous(self, clocks: Sequence[Tensor], latents: Sequence[Tensor]) -> bool:
        """Whether the latest call was at the same time, with latents that need not be the same."""
        then, now = (self.latest[0], clocks) if clocks else (self.latest[1], latents)
        return _again(then, now)

    def may_be_at(self, latents: Sequence[Tensor]) -> bool:
        """Whether `is_at` is worth being asked: not if the host would have to wait at each step.

        Ids of an image's tokens are latents, too, and the same tensor in each step.
        """
        return self.index < 1 or all(
            x is seen.tensor for seen, x in zip(self.latest[1], latents, strict=True)
        )

    def restart(self) -> None:
        """The next step is the first."""
        self.index, self.direction, self.steps = -1, 0, None
        self.tables.clear()
        self.continued.forget()

    def follow(self, leader: Stream, schedule: Schedule) -> Step:
        """The step of a fragment's call, in a call of the model that belongs to `leader`.

        A fragment that was left out of a step remembers nothing of it, and begins anew.
        """
        if leader.computed != self.computed + 1 or self.steps is None:
            self.restart()
            self.steps = Unrolled(schedule)
        self.computed = leader.computed
        self.index += 1
        self.used, self.now = leader.used, leader.now
        return self.steps.next(skip=False)

    def tick(self, clocks: Sequence[Tensor]) -> None:
        """A step begins at these clocks."""
        if self.index == 0:
            self._times = Times(clocks)
        self.now = self._times.at(clocks, self.index)

    def observe(self, clocks: Sequence[Tensor], latents: Sequence[Tensor]) -> bool:
        """Whether this call is certainly the next step after the last observed one.

        It is if every clock that moved went the way the generation's clocks go and at least one
        moved, and the latents resemble the last ones. Synchronises host and device.
        """
        self.direction = self.way(clocks, latents)
        self.clocks = _numbers(clocks)
        self.latents = [x.clone() for x in latents]
        return self.direction != 0

    def way(self, clocks: Sequence[Tensor], latents: Sequence[Tensor]) -> int:
        """The way of the clocks from the last observed step to this one; 0 if it isn't the next."""
        now = _numbers(clocks)
        moves = {(a > b) - (a < b) for a, b in zip(now, self.clocks, strict=False)} - {0}
        way = moves.pop() if len(moves) == 1 and len(now) == len(self.clocks) else 0
        goes_on = (
            self.direction in (0, way)
            and len(latents) == len(self.latents)
            and all(_resemble(a, b) for a, b in zip(latents, self.latents, strict=True))
        )
        return way if goes_on else 0


@dataclass
class Habits:
    """What the calls of one graph have shown of its conditions, by their positions among them.

    Attributes:
        repeats: those that came again at a later step.
        changes: those that were another at each step, and so tell no streams apart.
    """

    repeats: set[int] = field(default_factory=set)
    changes: set[int] = field(default_factory=set)


def find(
    streams: Sequence[Stream],
    habits: Habits,
    conditions: Sequence[Tensor],
    clocks: Sequence[Tensor],
    latents: Sequence[Tensor],
    *,
    explicit: bool,
) -> Stream | None:
    """The stream that a call belongs to, or None if it begins one. May wait for the device.

    Args:
        streams: of the call's graph, in the order in which they began.
        habits: of the graph, which are learned here.
        conditions: the call's; likewise `clocks` and `latents`.
        explicit: whether all calls are known to be of one image.
    """
    differing = [
        {
            i
            for i, (seen, x) in enumerate(zip(stream.conditions, conditions, strict=True))
            if i not in habits.changes and not seen.again(x)
        }
        for stream in streams
    ]
    alike = [stream for stream, apart in zip(streams, differing, strict=True) if not apart]
    if alike:
        several = len(alike) > 1
        for stream in alike:
            in_doubt = clocks and (several or stream.may_be_at(latents))
            if not in_doubt or not stream.is_at(clocks, latents):
                habits.repeats |= {*range(len(conditions))} - habits.changes
                return stream
        return None if len(alike) < MOST_ALIKE else min(alike, key=lambda stream: stream.used)
    if not streams or any(stream.is_simultaneous(clocks, latents) for stream in streams):
        return None
    # A step at another time. What differs from all streams is new; where nothing else does, and it
    # never came twice, it says no more of the stream than the latents do.
    new = set.intersection(*differing) - habits.repeats
    for stream, apart in zip(streams, differing, strict=True):
        if apart == new and (explicit or stream.way(clocks, latents)):
            habits.changes |= new
            return stream
    return None


def _numbers(clocks: Sequence[Tensor]) -> list[float]:
    return [float(value) for clock in clocks for value in clock.reshape(-1).tolist()]


def _again(then: Sequence[Seen], now: Sequence[Tensor]) -> bool:
    return len(then) == len(now) and all(seen.again(x) for seen, x in zip(then, now, strict=True))


def _resemble(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    x, y = a.reshape(-1).float(), b.reshape(-1).float()
    return bool(F.cosine_similarity(x, y, dim=0) >= LATENT_CORRELATION) or bool((x == y).all())


class Streams:
    """The streams of the image under way, and the memory of streams that have ended.

    Attributes:
        recycles: whether memory is kept for the next image of the same shapes, since steps are
            recorded; see `piflux.recording`.
        calls: how many there were.
    """

    def __init__(self) -> None:
        self.recycles = False
        self._streams: list[Stream] = []
        self._spare: dict[Any, list[Memory]] = {}
        self.calls = 0
        self._habits: dict[object, Habits] = {}

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def find(
        self,
        graph: object,
        roles: Roles,
        args: Sequence[Any],
        *,
        explicit: bool,
        remembers: bool,
    ) -> Stream:
        """The stream of a call, a new one if it belongs to none.

        Args:
            graph: what is called.
            roles: of its inputs.
            args: its inputs.
            explicit: whether all calls are known to be of one image.
            remembers: whether streams remember anything that passes would have to share.
        """
        self.calls += 1
        self._end([s for s in self._streams if self.calls - s.used > STALE_CALLS])
        conditions = roles.pick(roles.conditions, args)
        clocks = roles.pick(roles.clocks, args) if remembers else []
        latents = roles.pick(roles.latents, args) if remembers else []
        stream = find(
            [stream for stream in self._streams if stream.graph is graph],
            self._habits.setdefault(graph, Habits()),
            conditions,
            clocks,
            latents,
            explicit=explicit,
        )
        if stream is None:
            stream = self._begun(graph, roles, args, [Seen(x) for x in conditions])
        stream.used = self.calls
        stream.note(clocks, latents)
        return stream

    def changing(self, stream: Stream, conditions: Sequence[Tensor]) -> list[Tensor]:
        """Those of a call's conditions that have been another at each step."""
        habits = self._habits.get(stream.graph)
        return [] if habits is None else [conditions[i] for i in sorted(habits.changes)]

    def following(
        self, leader: Stream, fragment: Hashable, roles: Roles, args: Sequence[Any]
    ) -> Stream:
        """The stream of a fragment's call, in a call of the model that belongs to `leader`.

        Args:
            leader: of the model's calls.
            fragment: tells it from the others of such a call.
            roles: of its inputs.
            args: its inputs.
        """
        own = [s for s in self._streams if s.leader is leader and s.graph == fragment]
        stream = own[0] if own else self._begun(fragment, roles, args, [])
        stream.leader = leader
        return stream

    def _begun(
        self, graph: object, roles: Roles, args: Sequence[Any], conditions: list[Seen]
    ) -> Stream:
        shapes = [(x.shape, x.dtype, x.device) for x in roles.inputs(args).values()]
        kind = graph, tuple(shapes)
        if not self._streams and kind not in self._spare:
            self.drop_spare()  # an image of other shapes than the last one had
        spare = self._spare.get(kind)
        memory = spare.pop() if spare else Memory()
        stream = Stream(graph, conditions, self.calls, kind, memory)
        self._streams.append(stream)
        return stream

    def begin(self) -> None:
        """An image begins: whatever was under way has ended, and its habits need not be these."""
        self.end()
        self._habits.clear()

    def restart(self, stream: Stream) -> None:
        """The stream's next step is an image's first."""
        for each in (s for s in self._streams if s is stream or s.leader is stream):
            each.restart()
            if not self.recycles:
                each.memory = Memory()

    def end(self) -> None:
        """The image has ended. Waits for what is under way: it must not outlive its buffers."""
        for stream in self._streams:
            for slot in stream.memory.slots.values():
                slot.end()
        self._end(self._streams)

    def abandon(self) -> None:
        """Forget all streams after a call that failed.

        Part of the slots are of its step, part of the last: none can be trusted. The collectives
        under way may never end, so nothing waits for them; c10d holds their memory.
        """
        self._streams = []

    def renew(self) -> None:
        """Forget what the ranks shared, too: they have met anew."""
        self.abandon()
        self.drop_spare()

    def drop_spare(self) -> None:
        """Free the memory of streams that have ended."""
        self._spare = {}

    def _end(self, ended: Sequence[Stream]) -> None:
        """Keep what these streams leave for the next ones, in place of what was left before."""
        if self.recycles and ended:
            self._spare = {}
            for stream in ended:
                self._spare.setdefault(stream.kind, []).append(stream.memory)
        self._streams = [s for s in self._streams if s not in ended]
