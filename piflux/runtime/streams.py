"""Which generation a call belongs to, and whether it goes on with it.

A call of a diffusion transformer has inputs of three roles: *latents* change from step to step,
*clocks* (timestep, guidance: at most one dimension) say where on the way the step is, and
*conditions* (prompt embeddings, ids) stay. A *stream* is the run of calls with the same conditions:
a conditional and an unconditional pass are two streams of one generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from piflux.memory.memory import Memory
from piflux.runtime.times import Times

# Guidance methods make at most three passes a step; a stream that sat out more calls than this is
# of an image that has ended, and its caches are freed.
STALE_CALLS = 6

# Neighbouring steps of one image correlate (flow matching from sigma 1 to 0.5: 0.7), another
# image's noise does not. Below this a call is not taken for the next step.
LATENT_CORRELATION = 0.5


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
        direction: the way in which the clocks move, 0 as long as they have not.
        tables: products of the time, of all steps where these are known.
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
    direction: int = 0
    tables: dict[Any, Any] = field(default_factory=dict)
    _times: Times = field(default_factory=lambda: Times([]))

    def restart(self) -> None:
        """The next step is the first."""
        self.index, self.direction = -1, 0
        self.tables.clear()

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
        now = [float(value) for clock in clocks for value in clock.reshape(-1).tolist()]
        moves = {(a > b) - (a < b) for a, b in zip(now, self.clocks, strict=False)} - {0}
        way = moves.pop() if len(moves) == 1 and len(now) == len(self.clocks) else 0
        goes_on = (
            way != 0
            and self.direction in (0, way)
            and len(latents) == len(self.latents)
            and all(_resemble(a, b) for a, b in zip(latents, self.latents, strict=True))
        )
        self.direction = way if goes_on else 0
        self.clocks = now
        self.latents = [x.clone() for x in latents]
        return goes_on


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
    """

    def __init__(self) -> None:
        self.recycles = False
        self._streams: list[Stream] = []
        self._spare: dict[Any, list[Memory]] = {}
        self._calls = 0

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def find(self, graph: object, roles: Roles, args: Sequence[Any]) -> Stream:
        """The stream of a call, a new one if none has its conditions.

        Args:
            graph: what is called.
            roles: of its inputs.
            args: its inputs.
        """
        self._calls += 1
        self._end([s for s in self._streams if self._calls - s.used > STALE_CALLS])
        conditions = roles.pick(roles.conditions, args)
        for stream in self._streams:
            if stream.graph is graph and all(
                seen.again(x) for seen, x in zip(stream.conditions, conditions, strict=True)
            ):
                stream.used = self._calls
                return stream
        shapes = [(x.shape, x.dtype, x.device) for x in roles.inputs(args).values()]
        kind = graph, tuple(shapes)
        spare = self._spare.get(kind)
        memory = spare.pop() if spare else Memory()
        stream = Stream(graph, [Seen(x) for x in conditions], self._calls, kind, memory)
        self._streams.append(stream)
        return stream

    def restart(self, stream: Stream) -> None:
        """The stream's next step is an image's first."""
        stream.restart()
        if not self.recycles:
            stream.memory = Memory()

    def end(self) -> None:
        """The image has ended. Waits for what is under way: it must not outlive its buffers."""
        for stream in self._streams:
            for slot in stream.memory.slots.values():
                if slot.packet is not None and slot.packet.under_way:
                    slot.packet.wait()
        self._end(self._streams)

    def abandon(self) -> None:
        """Forget all streams after a call that failed.

        Part of the slots are of its step, part of the last: none can be trusted. The collectives
        under way may never end, so nothing waits for them; c10d holds their memory.
        """
        self._streams = []

    def _end(self, ended: Sequence[Stream]) -> None:
        """Keep what these streams leave for the next ones, in place of what was left before."""
        if self.recycles and ended:
            self._spare = {}
            for stream in ended:
                self._spare.setdefault(stream.kind, []).append(stream.memory)
        self._streams = [s for s in self._streams if s not in ended]
