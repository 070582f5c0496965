"""The state behind a compiled model: schedule, ranks, and the streams of the image under way.

The cache is not an argument of the graph. `cached_sdpa` is declared free of side effects and finds
its slot through the step under way, as functional collectives find their process group by name. So
AOT autograd needs no auto_functionalized copies of some gigabytes of keys and values, and one graph
serves sync and steady steps. It is safe because a slot is touched by one node of one graph, or
by one call of a piece that repeated blocks share, and its output is always used. Where `send_kv`
sends ahead, attention reads its token, so that no compiler can put one after the other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from piflux.errors import StepsUnforeseen
from piflux.policies.policy import Policy
from piflux.policies.schedule import Schedule
from piflux.policies.step import Foreseen, Step, StepContext
from piflux.ranks.agreement import fingerprint
from piflux.ranks.protocol import Ranks
from piflux.runtime.streams import Roles, Stream, Streams

Result = TypeVar("Result")

log = logging.getLogger(__name__)

# Of guidance methods, a step.
MOST_PASSES = 3


class Runtime:
    """One compiled model's schedule and streams on one rank.

    Args:
        schedule: which part each rank computes at which step.
        ranks: who shares the work; None for one rank alone.

    Attributes:
        explicit: whether the image under way was opened by `generation`.
        foreseen: what is known of the times of its steps; None if nothing.
        streams: of the image under way.
        notes: what was remarkable when images were drawn, for `piflux.explain`.
    """

    def __init__(self, schedule: Schedule, ranks: Ranks | None) -> None:
        self.settle(schedule)
        self.ranks = ranks
        self.explicit = False
        self.streams = Streams()
        self.foreseen: Foreseen | None = None
        self.notes: list[str] = []
        self._went_on = False  # whether a stream had a second step since the image began

    def settle(self, schedule: Schedule) -> None:
        """Take a schedule whose policy, or way to sync, was chosen."""
        self.schedule = schedule
        self.policy: Policy = schedule.make_policy()

    @property
    def foresees(self) -> bool:
        """Whether the times of an image's steps may be known before they come."""
        return self.foreseen is not None

    def reset(self) -> None:
        """Forget every stream; the next call is a generation's first step."""
        self.streams.end()

    @contextlib.contextmanager
    def generation(self, foreseen: Foreseen | None = None) -> Iterator[None]:
        """One image: streams start at step 0 and end with the block.

        Args:
            foreseen: what is known of the times of all steps, asked for at the first.

        Raises:
            StepsUnforeseen: at the end, if a step's time was another one.
        """
        outer = self.explicit, self.foreseen
        self.streams.begin()
        self.explicit, self.foreseen = True, foreseen
        self._went_on, begun = False, self.streams.calls
        try:
            yield
            self._tell_of_no_steps(self.streams.calls - begun)
            tables = [x for stream in self.streams for x in stream.tables.values() if x is not None]
            self.streams.end()
            # Waits for the device, as whoever looks at the image does next.
            if tables and not torch.stack([table.complete for table in tables]).all():
                raise StepsUnforeseen(
                    "a denoise step came at a time that is not one of the timesteps that were "
                    "announced for the image: give piflux.generation those that the model is "
                    "called with, or none"
                )
        finally:
            self.streams.abandon()  # of an image that was given up, else there are none
            self.explicit, self.foreseen = outer

    def _tell_of_no_steps(self, calls: int) -> None:
        """Each call of an image was taken for the first of something: nothing was remembered."""
        remembers = self.ranks is not None and self.policy.remembers
        if not remembers or self._went_on or calls <= MOST_PASSES:
            return
        self.notes.append(
            f"an image of {calls} calls had no steady step: no call had the conditions of an "
            "earlier one, so that each was computed in full. Pass what stays the same from step to "
            "step (prompt embeddings, ids) unchanged"
        )
        log.warning("%s", self.notes[-1])

    @contextlib.contextmanager
    def call(self, graph: object, roles: Roles, args: Sequence[Any]) -> Iterator[Call]:
        """Find this call's stream and step, on all ranks alike; `args` are the graph's inputs.

        Raises:
            RanksDisagree: at a stream's first step, if the ranks' inputs or settings differ.
        """
        try:
            stream = self.streams.find(
                graph, roles, args, explicit=self.explicit, remembers=self.ranks is not None
            )
            if self.ranks is not None:
                self._advance(self.ranks, stream, roles, args)
            self._went_on |= stream.index > 0
            yield Call(self, stream, self.schedule.step(stream.index))
        except BaseException:
            self.streams.abandon()
            raise

    def _advance(self, ranks: Ranks, stream: Stream, roles: Roles, args: Sequence[Any]) -> None:
        """The stream's next step begins."""
        if not self.explicit or stream.index < 0:
            latents = roles.pick(roles.latents, args)
            goes_on = not self.explicit and stream.observe(roles.pick(roles.clocks, args), latents)
            # One rank in doubt is enough: a rank alone in a sync step would wait for ever. Who is
            # sure votes too, so that a rank outside of the others' generation is found out.
            device = next(iter(roles.inputs(args).values())).device
            if ranks.any(not goes_on, device):
                self.streams.restart(stream)
        stream.index += 1
        if self.schedule.predicts:
            stream.tick(roles.pick(roles.clocks, args))
        if stream.index == 0:
            settings = {"schedule": self.schedule, "explicit generation": self.explicit}
            ranks.agree(fingerprint(settings, roles.inputs(args)))


class Call:
    """One call of a compiled model, which is one step of one stream.

    Attributes:
        stream: which.
        step: likewise.
    """

    def __init__(self, runtime: Runtime, stream: Stream, step: Step) -> None:
        self.stream = stream
        self.step = step
        self._runtime = runtime

    def run(self, step: Callable[[], Result]) -> Result:
        """Run it for each rank that this process computes; returns what the first returned."""
        ranks = self._runtime.ranks
        if ranks is None:
            with self._context(0).under_way():
                return step()

        def one() -> Result:
            context = self._context(ranks.rank)
            context.memory.advance(
                context.rank,
                ranks.size,
                context.part,
                context.now,
                first=self.step.index == 0,
                sync=self.step.sync,
                own=self._runtime.policy.rotates,
            )
            with context.under_way():
                return step()

        return ranks.run(one)

    def _context(self, rank: int) -> StepContext:
        runtime, stream = self._runtime, self.stream
        return StepContext(
            self.step,
            rank,
            runtime.ranks,
            runtime.policy,
            stream.memory,
            stream.now,
            stream.tables,
            runtime.foreseen,
        )
