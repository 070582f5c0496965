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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from piflux.errors import RankLost, StepsUnforeseen
from piflux.policies.masks import mask_of
from piflux.policies.policy import Policy
from piflux.policies.schedule import Schedule, Unrolled
from piflux.policies.step import Foreseen, Step, StepContext
from piflux.ranks.agreement import fingerprint
from piflux.ranks.header import header_of
from piflux.ranks.protocol import Ranks
from piflux.runtime.fragments import Fragment, Graphs, outputs
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
        edits: how many of latents by callbacks there were: what was computed before one says
            nothing of what comes.
        votes: whether a rank alone may see an edit, so that ranks decide together what to skip.
        notes: what was remarkable when images were drawn, for `piflux.explain`.
    """

    def __init__(self, schedule: Schedule, ranks: Ranks | None) -> None:
        self.settle(schedule)
        self.ranks = ranks
        self.explicit = False
        self.streams = Streams()
        self.foreseen: Foreseen | None = None
        self.edits = 0
        self.votes = False
        self.notes: list[str] = []
        self._roles: dict[Any, tuple[object, Roles]] = {}
        self._fragments: tuple[Call, Graphs] | None = None
        self._others: dict[str, Any] = {}  # what later calls ran that a first one did not
        self._went_on = False  # whether a stream had a second step since the image began
        self._calling = threading.RLock() if ranks is None else ranks.calling
        self._epoch = -1  # of the ranks, in which the streams began

    def settle(self, schedule: Schedule) -> None:
        """Take a schedule whose policy, or way to sync, was chosen."""
        self.schedule = schedule
        self.policy: Policy = schedule.make_policy()

    @property
    def follows(self) -> bool:
        """Whether it matters which step of an image a call is, on one rank too."""
        return self.ranks is not None or self.foreseen is not None or self.schedule.skips

    def reset(self) -> None:
        """Forget every stream; the next call is a generation's first step."""
        self.streams.end()

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """A call, during which no other thread's may begin: steps are of one image at a time.

        Args:
            what: is called.

        Raises:
            RuntimeError: another thread calls it, or something else on the same ranks.
        """
        if not self._calling.acquire(blocking=False):
            raise RuntimeError(
                f"another thread is calling this {what}, or another model of the same ranks: one "
                "picture is drawn at a time. Hold a lock while you draw one, or give each thread "
                "a process of its own"
            )
        try:
            yield
        finally:
            self._calling.release()

    @contextlib.contextmanager
    def generation(self, foreseen: Foreseen | None = None) -> Iterator[None]:
        """One image: streams start at step 0 and end with the block.

        Args:
            foreseen: what is known of the times of all steps, asked for at the first.

        Raises:
            StepsUnforeseen: at the end, if a step's time was another one.
        """
        outer = self.explicit, self.foreseen
        self.votes = False
        self.streams.begin()
        self.explicit, self.foreseen = True, foreseen
        self._went_on, begun = False, self.streams.calls
        self._others = {}
        try:
            with self._image():
                yield
            self._tell_of_no_steps(self.streams.calls - begun)
            if self.ranks is not None:
                self._compare_last(self.ranks)
                self.ranks.settle()
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

    def _image(self) -> contextlib.AbstractContextManager[None]:
        """Where ranks are processes: what leaves the image is told to the others."""
        ranks = self.ranks
        return ranks.image() if ranks is not None else contextlib.nullcontext()

    def _tell_of_no_steps(self, calls: int) -> None:
        """Each call of an image was taken for the first of something: nothing was remembered."""
        remembers = self.ranks is not None and self.policy.remembers
        if not remembers or self._went_on or calls <= MOST_PASSES:
            return
        self._note(
            f"an image of {calls} calls had no steady step: no call had the conditions of an "
            "earlier one, so that each was computed in full. Pass what stays the same from step to "
            "step (prompt embeddings, ids) unchanged"
        )

    @contextlib.contextmanager
    def call(
        self,
        graph: object,
        roles: Roles,
        args: Sequence[Any],
        facts: Mapping[str, str] | None = None,
    ) -> Iterator[Call]:
        """Find this call's stream and step, on all ranks alike.

        Args:
            graph: what is called.
            roles: of its inputs.
            args: its inputs.
            facts: more that ranks must have in common.

        Raises:
            RanksDisagree: at a stream's first step, if the ranks' inputs or settings differ.
        """
        ranks = self.ranks
        try:
            if self._fragments is not None:
                leader, graphs = self._fragments
                self._check_epoch()
                fragment = graph, graphs.calls(graph)
                stream = self.streams.following(leader.stream, fragment, roles, args)
                step = stream.follow(leader.stream, self.schedule)
                yield Call(self, stream, step, leader.header)
                return
            while True:
                self.renew()
                remembers = ranks is not None or self.schedule.skips
                stream = self.streams.find(
                    graph, roles, args, explicit=self.explicit, remembers=remembers
                )
                if remembers:
                    self._advance(stream, roles, args, facts or {})
                if ranks is None or ranks.epoch == self._epoch:
                    break
            self._went_on |= stream.index > 0
            header = self._header(stream, roles, args)
            yield Call(self, stream, self._step(stream), header)
        except BaseException as error:
            self.streams.abandon()
            self._others = {}
            # A step in which a rank is lost is computed once more.
            if ranks is not None and not _is_resumable(error):
                ranks.stop(error)
            raise

    @contextlib.contextmanager
    def fragments(self, inputs: Mapping[str, Tensor]) -> Iterator[Call | None]:
        """Inside, the calls of graphs are of one step: fragments of one call of a model.

        What a fragment gets was made by others, and looks new at every step. So the stream and its
        step are found by what the model is called with. Which of its inputs are latents nobody
        says: whatever is not a clock may be a condition, until it was another at each step.

        Args:
            inputs: all tensors that the model is called with, by names.

        Raises:
            RanksDisagree: other graphs ran on other ranks; of a call after a stream's first one
                `generation` raises it.
        """
        if not self.follows or not inputs:
            yield None
            return
        names, args = tuple(inputs), list(inputs.values())
        key = names, _clocks(args)
        graph, roles = self._roles.setdefault(key, (object(), _roles(*key)))
        facts = {"operations of the model": "in fragments"}
        with self.call(graph, roles, args, facts) as call:
            call.stream.computed += call.step.computed
            apart = self.ranks is not None and not self.ranks.in_one_process
            graphs = Graphs(measures=apart and call.stream.index == 0)
            self._fragments = call, graphs
            try:
                yield call
            finally:
                self._fragments = None
            if apart and call.step.computed:
                self._compare(call.stream, graphs)

    def runs(self, fragment: Fragment, args: Sequence[object]) -> None:
        """A fragment is called with `args`."""
        if self._fragments is None:
            return
        call, graphs = self._fragments
        graphs.add(fragment, args)
        if self.ranks is not None:
            step, number = call.stream.index, len(graphs.order)
            self.ranks.doing = f"step {step}, graph {number} ({fragment.place})"

    def _compare(self, stream: Stream, graphs: Graphs) -> None:
        """A call of a model in fragments has run; see `piflux.runtime.fragments`."""
        assert self.ranks is not None
        image, number = self.ranks.at()
        call = f"call {number} of image {image}"
        self.ranks.doing = f"step {stream.index}"
        if stream.index > 0:
            self._others |= graphs.others(stream.graphs, call)
            return
        stream.graphs = graphs.order
        self.ranks.agree(self._others | graphs.facts(call) | outputs(stream.given, call))
        self._others = {}

    def _compare_last(self, ranks: Ranks) -> None:
        """Likewise of an image that ends, if its calls were in fragments."""
        leaders = [stream for stream in self.streams if stream.graphs]
        if leaders:
            facts = dict(self._others)
            for number, stream in enumerate(leaders, 1):
                facts |= outputs(stream.given, f"the last step, pass {number}")
            # Who is lost now takes nothing along that the image would need.
            ranks.surviving(lambda: ranks.agree(facts), "graphs")

    def _header(self, stream: Stream, roles: Roles, args: Sequence[Any]) -> Tensor | None:
        if self.ranks is None or self.ranks.in_one_process:
            return None
        clocks = roles.pick(roles.clocks, args)
        # Of a model in fragments nobody says which inputs are latents.
        latents = roles.pick(roles.latents or roles.conditions, args)
        # An input that is another one at each step tells no streams apart: nobody else would notice
        # that it differs from the other ranks'.
        latents += self.streams.changing(stream, roles.pick(roles.conditions, args))
        latents = [x for x in latents if x.is_floating_point()]
        if not latents:
            return None
        places = *self.ranks.at(), stream.index
        return header_of(places, clocks, latents, wish=self.ranks.wish)

    @property
    def in_fragments(self) -> bool:
        """Whether the call under way is one of several of a call of the model."""
        return self._fragments is not None

    def _check_epoch(self) -> None:
        """Raises RankLost if the call's other fragments were of other ranks: it begins anew."""
        if self.ranks is not None and self._epoch != self.ranks.epoch:
            raise RankLost("a rank was lost in the midst of a call")

    def renew(self) -> None:
        """What streams share with other ranks ends with the epoch of these."""
        if self.ranks is not None and self._epoch != self.ranks.epoch:
            self.streams.renew()
            self._epoch = self.ranks.epoch

    def _advance(
        self, stream: Stream, roles: Roles, args: Sequence[Any], facts: Mapping[str, str]
    ) -> None:
        """The stream's next step begins."""
        clocks = roles.pick(roles.clocks, args)
        if not self.explicit or stream.index < 0:
            latents = roles.pick(roles.latents, args)
            goes_on = not self.explicit and stream.observe(clocks, latents)
            # One rank in doubt is enough: a rank alone in a sync step would wait for ever. Who is
            # sure votes too, so that a rank outside of the others' generation is found out.
            if self.ranks is not None:
                self.ranks.doing = f"step {stream.index + 1}"
                if not self.explicit:
                    self.ranks.settle()  # the host has waited for the device already
            if self._any(not goes_on):
                self.streams.restart(stream)
        stream.index += 1
        if self.ranks is not None:
            self.ranks.doing = f"step {stream.index}"
        if self.schedule.predicts or self.schedule.skips:
            stream.tick(clocks)
        if stream.index > 0:
            return
        stream.steps = self._unrolled(clocks)
        if self.ranks is not None:
            settings = {
                "schedule": self.schedule,
                "explicit generation": self.explicit,
                "computed steps": stream.steps.mask,
                **facts,
            }
            self.ranks.agree(fingerprint(settings, roles.inputs(args)))

    def _any(self, flag: bool) -> bool:
        return flag if self.ranks is None else self.ranks.any(flag)

    def _unrolled(self, clocks: Sequence[Tensor]) -> Unrolled:
        """The steps of a stream that begins at these times. May wait for the device."""
        schedule, compute = self.schedule, self.schedule.compute
        if not schedule.skips:
            return Unrolled(schedule)
        found = place_of(clocks, self.foreseen)
        if found is None:
            if isinstance(compute, str) and compute != "auto":
                return Unrolled(schedule, compute)
            self._note(
                f"all steps are computed: how many an image has, of which compute={compute!r} are "
                "some, was not known. Give piflux.generation the timesteps, or compute= a mask"
            )
            return Unrolled(schedule)
        begins, steps = found
        mask = mask_of(compute, steps)
        if mask is None:
            self._note(
                f"all steps of an image of {steps} are computed: compute={compute!r} is for one of "
                f"{len(str(compute))}"
            )
        return Unrolled(schedule, mask or "", begins)

    def _step(self, stream: Stream) -> Step:
        """The step that a call is: computed or left out, on all ranks alike."""
        if stream.steps is None:
            return self.schedule.step(0)  # one rank computes every step
        if stream.edits != self.edits:
            stream.edits = self.edits
            stream.continued.forget()
        skip = stream.steps.may_skip
        if skip:
            in_doubt = not stream.continued.is_ready
            skip = not (self._any(in_doubt) if self.votes else in_doubt)
        return stream.steps.next(skip=skip)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)


def place_of(clocks: Sequence[Tensor], foreseen: Foreseen | None) -> tuple[int, int] | None:
    """At which of how many announced steps clocks stand; None if they tell no place, or several.

    May wait for the device.
    """
    found = set()
    for clock in clocks:
        for times in foreseen(clock) if foreseen is not None else ():
            here = (times[:, None] == clock.reshape(1, -1)).all(dim=1).tolist()
            if any(here):
                found.add((here.index(True), len(here)))
    return found.pop() if len(found) == 1 else None


def _clocks(args: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of a model's inputs are clocks: one number for each of a batch, rather not whole."""
    small = [i for i, x in enumerate(args) if all(size == 1 for size in x.shape[1:])]
    return tuple(i for i in small if args[i].is_floating_point()) or tuple(small)


def _roles(names: Sequence[str], clocks: Sequence[int]) -> Roles:
    conditions = tuple(i for i in range(len(names)) if i not in clocks)
    return Roles((), tuple(clocks), conditions, dict(enumerate(names)))


def _is_resumable(error: BaseException) -> bool:
    return isinstance(error, RankLost) and error.resumable


class Call:
    """One call of a compiled model, which is one step of one stream.

    Attributes:
        stream: which.
        step: likewise.
        header: for other ranks to compare with theirs; see `piflux.ranks.header`.
    """

    def __init__(self, runtime: Runtime, stream: Stream, step: Step, header: Tensor | None) -> None:
        self.stream = stream
        self.step = step
        self.header = header
        self._runtime = runtime

    def run(self, step: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The step's outputs: computed by `step`, or continued from those of earlier steps."""
        return self._continued(lambda: self._run(step))

    def run_fragments(self, step: Callable[[], Any]) -> Any:
        """Likewise, of a model whose graphs run each by themselves, in any structure."""

        def leaves() -> tuple[Any, ...]:
            self.stream.given, self.stream.structure = tree_flatten(step())
            return tuple(self.stream.given)

        return tree_unflatten(self._continued(leaves), self.stream.structure)

    def _continued(self, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        continued = self.stream.continued
        if not self.step.computed:
            return continued.at(self.stream.now)
        outputs = compute()
        if self._runtime.schedule.skips:
            continued.keep(self.stream.now, outputs)
        return outputs

    def _run(self, step: Callable[[], Result]) -> Result:
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
                made = step()
            context.close()
            return made

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
            self.header,
        )
