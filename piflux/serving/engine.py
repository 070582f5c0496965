"""The engine: a queue, ranks that group as the load asks, and what happens when one is lost.

All of it runs in one event loop; what workers tell is brought there. The engine's own process holds
no model.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from piflux.demo import NOTE, PROMPTS
from piflux.errors import CannotLoad
from piflux.pipelines.calls import Asked
from piflux.serving.grouping import Pace, Rate, Team, choose, expected_end, teams_of
from piflux.serving.jobs import (
    Drawn,
    Event,
    Job,
    Model,
    Preview,
    Queued,
    Refused,
    Report,
    State,
    Stepped,
)
from piflux.serving.messages import (
    Draw,
    End,
    Failed,
    Finished,
    Gone,
    Group,
    Load,
    Loaded,
    Picture,
    Shown,
    Source,
    Step,
    Stop,
    Told,
    Worker,
    Workers,
)
from piflux.serving.processes import LocalWorkers
from piflux.serving.qualities import Promise, promises_of
from piflux.serving.waiting import Waiting

log = logging.getLogger(__name__)

TICK_S = 0.5
"""How often the engine looks for workers that are stuck."""

ANSWER_S = 15.0
"""How long a rank may take to end a call whose pictures another one has brought."""

COMPILING_S = 1800.0
"""How long a call may take without a step, where its group has drawn none of its shape."""

END_S = 3.0
"""How long workers may take to end by themselves."""

TRIES = 2
"""A job whose ranks died so often is not drawn once more."""

STARTS = 3
"""Of a rank in a row, that come to nothing: then an engine that starts has failed."""

STARTS_LATER = 10
"""Likewise of all ranks of an engine that was ready."""

PAUSE_S = 1.0
"""Before a rank is started that came to nothing; twice as long each time."""

LONGEST_PAUSE_S = 60.0

WARM_STEPS = 4
"""Denoise steps of the images that are drawn to compile, and to see how long a step takes."""

WARM_IMAGES = {"cpu": 2, "cuda": 4}
"""Drawn of each kind: the first compiles, of the last the time counts. On GPUs those in between are
recorded."""

REMEMBERED = 15
"""Images of one rank that the load is told by."""

GAIN = 0.97
"""A batch is taken where a picture of it takes less than this share of one alone."""


@dataclass(eq=False)
class _Ticket:
    """A job, from its coming to its end.

    Attributes:
        job: what was asked.
        promise: of its quality.
        steps: denoise steps.
        asked: what its calls have in common.
        begun: when its first picture was begun.
        killed: how many of its calls a rank died in.
        tasks: its pictures.
        batch: pictures in the largest of its calls.
        ranks: of the last one.
        recovered: how many of its calls went on, or were drawn again, without a rank.
        before: jobs that are before it, as was told.
        shown: how many previews were told.
        over: whether nobody waits for it any more.
    """

    job: Job
    promise: Promise
    steps: int
    asked: Asked
    came: float
    events: asyncio.Queue[Event | Refused] = field(default_factory=asyncio.Queue)
    begun: float | None = None
    killed: int = 0
    tasks: list[_Task] = field(default_factory=list)
    batch: int = 1
    ranks: int = 1
    recovered: int = 0
    before: int | None = None
    shown: int = 0
    over: bool = False

    @property
    def pixels(self) -> int:
        image = self.asked.image
        width, height = self.asked.size or (image.size if image is not None else (1024, 1024))
        return width * height


@dataclass(eq=False)
class _Task:
    """One picture of a job."""

    ticket: _Ticket
    seed: int
    step: int = 0
    image: Image.Image | None = None
    previews: dict[int, Image.Image] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """Of tasks that one call can draw."""
        ticket = self.ticket
        job = ticket.job
        alone = ticket if job.images or job.mask is not None or ticket.killed else None
        negative = job.negative is not None
        return (alone, ticket.asked, ticket.promise, job.true_cfg, negative, job.loras)


@dataclass(eq=False)
class _Seat:
    """One rank's place.

    Attributes:
        number: the rank's.
        incarnation: how many processes there have been.
        worker: the present one.
        loaded: whether it can draw.
        call: what it draws.
        failures: processes in a row that ended before they had drawn.
        memory: bytes in use.
    """

    number: int
    incarnation: int = -1
    worker: Worker | None = None
    loaded: bool = False
    call: _Call | None = None
    failures: int = 0
    memory: int = 0

    @property
    def is_free(self) -> bool:
        return self.loaded and self.call is None


@dataclass(eq=False)
class _Call:
    """One call of the pipeline under way.

    Attributes:
        number: of the call.
        team: who draws it.
        tasks: of jobs; none to warm up.
        warms: what it warms up, and how many images of that are left after it.
        pending: ranks that have not answered.
        heard: when one of them has last told anything.
        seconds: that it should take.
        shape: what it compiles, if no call of the group has.
        lost: whether a rank died in it.
        is_drawn: whether its pictures are there, or it was stopped.
        stopped: whether its ranks were told to.
        failure: what the first one told that failed by itself.
        refused_by_all: whether nothing else was told of failures.
    """

    number: int
    team: Team
    tasks: list[_Task]
    warms: tuple[_Warm, int] | None
    pending: set[int]
    began: float
    heard: float
    seconds: float
    shape: tuple[object, ...]
    lost: bool = False
    is_drawn: bool = False
    stopped: bool = False
    failure: Failed | None = None
    refused_by_all: bool = True

    def expected_end(self, now: float) -> float:
        over = self.is_drawn or self.stopped  # but for what a rank is at
        return expected_end(-math.inf if over else self.began, self.seconds, now)


@dataclass(frozen=True)
class _Warm:
    """What is compiled before it is asked for: so many pictures of a size, by some settings."""

    promise: Promise
    size: tuple[int, int] | None
    batch: int


class RankEngine:
    """See `piflux.serving.jobs.Engine`.

    Args:
        source: what is served, see `piflux.serving.messages.Source`.
        ranks: processes, each with a GPU of its own if there are any.
        name: of the model, as requests have it; None for the source's.
        sizes: width and height of pictures that are compiled before the engine is ready; the
            pipeline's own if there are none.
        groups: sizes of the groups that ranks form; None for all, of which the load chooses.
        queue: pictures that may wait.
        batch: pictures of several jobs that may be drawn in one call, where that is faster.
        loras: a folder of adapters, `NAME.safetensors`, of which jobs name some.
        schedules: files of `piflux quality --tune`, by the qualities that they take the place of.
        deadline_s: within which a job has to be drawn that names no other time.
        stuck_s: after which ranks are ended that draw, and come to no end of a step.
        cache: a folder for compiled code; None for torch's own place.
        inner: what compiles, see `piflux.parallelize`.
        workers: how processes are started; None for this machine.

    Raises:
        ValueError: an argument is out of range.
        CannotLoad: there is no such folder of adapters.
    """

    def __init__(
        self,
        source: Source,
        ranks: int = 1,
        *,
        name: str | None = None,
        sizes: Sequence[tuple[int, int]] = (),
        groups: Sequence[int] | None = None,
        queue: int = 256,
        batch: int = 1,
        loras: Path | None = None,
        schedules: Mapping[str, Path] | None = None,
        deadline_s: float = 600.0,
        stuck_s: float = 120.0,
        cache: Path | None = None,
        inner: str = "inductor",
        workers: Workers | None = None,
    ) -> None:
        for what, number in (("ranks", ranks), ("queue", queue), ("batch", batch)):
            if number < 1:
                raise ValueError(f"{what} must be at least 1, got {number}")
        self._source, self._inner, self._name = source, inner, name or _named(source)
        self._sizes = tuple(sizes)
        self._teams = teams_of(ranks, groups)
        self._promises = promises_of(schedules or {})
        self._loras = _adapters_in(loras)
        self._deadline_s, self._stuck_s, self._most_batch = deadline_s, stuck_s, batch
        self._workers = workers or LocalWorkers(ranks, cache)
        self._seats = [_Seat(number) for number in range(ranks)]
        self._waiting: Waiting[_Task] = Waiting(queue)
        self._tickets: set[_Ticket] = set()
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._rounds: Counter[Team] = Counter()  # a team's groups, one after the other
        self._warmed: dict[Team, set[str]] = {}  # by team, the names of groups that are warm
        self._warming: dict[Team, list[tuple[_Warm, int]]] = {}
        self._compiled: dict[Team, set[tuple[object, ...]]] = {}  # shapes of calls
        self._pace, self._rate = Pace(), Rate()
        self._alone: dict[tuple[int, int], float] = {}  # seconds a picture, by group and batch
        self._phase: Literal["starting", "ready", "ending", "failed"] = "starting"
        self._reason = ""
        self._replaced = 0
        self._loaded: Loaded | None = None
        self._model: Model | None = None
        self._store = ("", 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- what the front calls --------------------------------------------------------------------

    @property
    def model(self) -> Model | None:
        return self._model

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._store = await asyncio.to_thread(self._workers.open)
        for seat in self._seats:
            self._start(seat)
        self._spawn(self._watch())

    async def submit(self, job: Job) -> AsyncIterator[Event]:
        ticket = self._enter(job)
        seconds = self._deadline_s if job.deadline_s is None else job.deadline_s
        late = asyncio.get_running_loop().call_later(seconds, self._too_late, ticket, seconds)
        try:
            if ticket.before is None:  # it is begun; who asked learns at once that it is taken
                yield Queued(0)
            while True:
                event = await ticket.events.get()
                if isinstance(event, Refused):
                    try:
                        raise event
                    finally:
                        del event  # it has this frame, and so the job, in its traceback
                yield event
                if isinstance(event, Drawn):
                    return
        finally:
            late.cancel()
            self._leave(ticket)

    def state(self) -> State:
        now = time.monotonic()
        drawing = [call for call in self._calls.values() if call.tasks]
        # Where something is compiled no step is missed.
        quiet = [now - call.heard for call in self._calls.values() if not self._compiles(call)]
        groups = [call.team.size for call in drawing]
        if not groups:
            widest = max((b for b in self._teams if self._is_warm(b)), default=None, key=_size)
            groups = [] if widest is None else [widest.size]
        return State(
            self._phase,
            self._reason,
            sum(seat.loaded for seat in self._seats),
            len(self._seats),
            tuple(sorted(groups, reverse=True)),
            len({task.ticket for task in self._waiting}),
            len({task.ticket for call in drawing for task in call.tasks}),
            max(quiet, default=0.0),
            self._replaced,
            {seat.number: seat.memory for seat in self._seats if seat.loaded},
        )

    async def end(self, within_s: float) -> None:
        if self._phase != "failed":
            self._phase = "ending"
        until = time.monotonic() + within_s
        while self._tickets and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for ticket in list(self._tickets):
            self._refuse(ticket, Refused(503, "ending", "the server ends"))
        self._phase = "failed" if self._phase == "failed" else "ending"
        for task in list(self._tasks):
            task.cancel()
        alive = [seat for seat in self._seats if seat.worker is not None]
        for seat in alive:
            assert seat.worker is not None
            seat.worker.send(End())
        until = time.monotonic() + END_S
        while any(seat.worker is not None for seat in alive) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for seat in alive:
            if seat.worker is not None:
                seat.worker.kill()
        while any(seat.worker is not None for seat in alive):
            await asyncio.sleep(0.01)
        self._workers.close()

    # --- jobs ------------------------------------------------------------------------------------

    def _enter(self, job: Job) -> _Ticket:
        if self._phase in ("ending", "failed"):
            raise Refused(503, self._phase, self._reason or "the server ends")
        if self._model is None or self._phase == "starting":
            raise Refused(503, "starting", "the model is being loaded", retry_after_s=5.0)
        asked, steps = self._check(job)
        if not self._waiting.fits(len(job.seeds)):
            raise Refused(
                429,
                "queue_full",
                f"{len(self._waiting)} pictures wait: ask again later",
                retry_after_s=self._retry_s(),
            )
        ticket = _Ticket(job, self._promises[job.quality], steps, asked, time.monotonic())
        ticket.tasks = [_Task(ticket, seed) for seed in job.seeds]
        self._tickets.add(ticket)
        self._rate.came(len(ticket.tasks), ticket.came, self._memory_s(ticket))
        for task in ticket.tasks:
            self._waiting.put(job.user, task)
        self._dispatch()
        return ticket

    def _check(self, job: Job) -> tuple[Asked, int]:
        """What the model is asked for, and in how many steps. Raises Refused."""
        model, loaded = self._model, self._loaded
        assert model is not None and loaded is not None, "asked by the caller"
        if not job.seeds:
            raise Refused(400, "invalid_value", "at least one picture", field="n")
        for field_, given, takes in (
            ("negative_prompt", job.negative is not None, model.negative),
            ("image", bool(job.images), model.edits),
            ("mask", job.mask is not None, model.masks),
            ("guidance_scale", job.guidance is not None, "guidance_scale" in loaded.takes),
            ("true_cfg_scale", job.true_cfg is not None, "true_cfg_scale" in loaded.takes),
        ):
            if given and not takes:
                what = f"{model.pipeline} takes no {field_}"
                raise Refused(400, "unsupported_value", what, field=field_)
        if len(job.images) > 1:
            raise Refused(400, "unsupported_value", "one picture at a time", field="image")
        if job.mask is not None and not job.images:
            raise Refused(400, "invalid_value", "a mask is of a picture", field="image")
        if job.size is not None and any(side < 1 or side % model.multiple for side in job.size):
            raise Refused(
                400, "invalid_value", f"sides must be multiples of {model.multiple}", field="size"
            )
        for name, _ in job.loras:
            if name not in self._loras:
                known = ", ".join(sorted(self._loras)) or "none"
                raise Refused(
                    400, "invalid_value", f"no lora {name!r}: there are {known}", field="lora"
                )
        if job.steps is not None and job.steps < 1:
            raise Refused(400, "invalid_value", "at least 1 step", field="num_inference_steps")
        steps = job.steps or model.default_steps
        size = job.size if job.images else job.size or model.default_size
        image = job.images[0] if job.images else None
        return Asked(steps, size, job.guidance, job.negative, image, job.mask), steps

    def _leave(self, ticket: _Ticket) -> None:
        """Nobody waits for it any more."""
        ticket.over = True
        self._tickets.discard(ticket)
        self._waiting.drop(lambda task: task.ticket is ticket)
        for call in self._calls.values():
            if call.tasks and not call.stopped and all(task.ticket.over for task in call.tasks):
                call.stopped = True
                for rank in call.pending:
                    self._send(rank, Stop(call.number))
        # Its pictures go with it. A circle would keep them until Python looks for such, which is
        # after hundreds of jobs.
        ticket.tasks.clear()
        self._dispatch()

    def _refuse(self, ticket: _Ticket, refused: Refused) -> None:
        ticket.events.put_nowait(refused)
        self._leave(ticket)

    def _too_late(self, ticket: _Ticket, seconds: float) -> None:
        text = f"not drawn within {seconds:.3g} s"
        self._refuse(ticket, Refused(504, "deadline", text, retry_after_s=self._retry_s()))

    def _retry_s(self) -> float:
        """In about how many seconds half of those that wait will have been drawn."""
        first = self._waiting.first()
        if first is None:
            return 1.0
        rates = [
            team.size / len(self._seats) * seconds
            for team in self._teams
            if (seconds := self._seconds(team.size, first.ticket)) is not None
        ]
        return max(1.0, min(rates, default=1.0) * len(self._waiting) / 2)

    # --- who draws what --------------------------------------------------------------------------

    def _name_of(self, team: Team) -> str:
        incarnations = ".".join(str(self._seats[rank].incarnation) for rank in team.ranks)
        return f"{team.first}+{team.size} {incarnations} {self._rounds[team]}"

    def _is_there(self, team: Team) -> bool:
        return all(self._seats[rank].loaded for rank in team.ranks)

    def _is_warm(self, team: Team) -> bool:
        there = self._is_there(team)
        return there and self._name_of(team) in self._warmed.get(team, ())

    def _seconds(self, size: int, ticket: _Ticket) -> float | None:
        return self._pace.seconds(size, ticket.pixels, ticket.promise.count(ticket.steps))

    def _dispatch(self) -> None:
        """Begin whatever can be begun."""
        if self._loop is None or self._phase == "failed":
            return
        while (task := self._waiting.first()) is not None:
            team = self._choose(task)
            if team is None:
                break
            self._begin(team, self._take(team))
        # A larger group only while nobody waits, unless nobody could be served without it.
        idle = not len(self._waiting) or not any(map(self._is_warm, self._teams))
        for team in self._teams:
            is_free = all(self._seats[rank].is_free for rank in team.ranks)
            if is_free and not self._is_warm(team) and (idle or team.size == self._teams[0].size):
                self._warm(team)
        self._tell_places()

    def _choose(self, task: _Task) -> Team | None:
        now = time.monotonic()
        free_at = {}
        for seat in self._seats:
            free_at[seat.number] = now if seat.call is None else seat.call.expected_end(now)
        teams = [team for team in self._teams if self._is_warm(team)]
        seconds = {}
        for size in {team.size for team in teams}:
            found = self._seconds(size, task.ticket)
            if found is not None:
                seconds[size] = found
        rate = self._rate.a_second(now, self._memory_s(task.ticket))
        return choose(teams, free_at, seconds, len(self._waiting), now, rate)

    def _memory_s(self, ticket: _Ticket) -> float:
        """How long it counts for the load that images came."""
        smallest = min(team.size for team in self._teams)
        return REMEMBERED * (self._seconds(smallest, ticket) or 1.0)

    def _take(self, team: Team) -> list[_Task]:
        """The next in turn, and as many more like it as are faster at once."""
        first = self._waiting.take()
        assert first is not None, "one was seen"
        tasks = [first]
        while len(tasks) < self._best_batch(team.size):
            more = self._waiting.take(lambda task: task.key == first.key)
            if more is None:
                break
            tasks.append(more)
        return tasks

    def _best_batch(self, size: int) -> int:
        alone = self._alone.get((size, 1))
        if alone is None:
            return 1
        found = {n: s for (group, n), s in self._alone.items() if group == size}
        best = min(found, key=lambda n: found[n])
        return best if found[best] < GAIN * alone else 1

    def _begin(self, team: Team, tasks: list[_Task]) -> None:
        ticket, now = tasks[0].ticket, time.monotonic()
        for task in tasks:
            task.ticket.begun = task.ticket.begun or now
            task.ticket.batch = max(task.ticket.batch, len(tasks))
            task.step = 0
        pictures = tuple(
            Picture(task.ticket.job.prompt, task.seed, task.ticket.job.negative) for task in tasks
        )
        self._call(
            team,
            tasks,
            None,
            pictures,
            ticket.asked,
            ticket.promise,
            (self._seconds(team.size, ticket) or 1.0) * len(tasks),
            true_cfg=ticket.job.true_cfg,
            loras=tuple((str(self._loras[name]), scale) for name, scale in ticket.job.loras),
            previews=max(task.ticket.job.previews for task in tasks),
        )

    def _call(
        self,
        team: Team,
        tasks: list[_Task],
        warms: tuple[_Warm, int] | None,
        pictures: tuple[Picture, ...],
        asked: Asked,
        promise: Promise,
        seconds: float,
        *,
        true_cfg: float | None = None,
        loras: tuple[tuple[str, float], ...] = (),
        previews: int = 0,
    ) -> None:
        number, now, name = next(self._numbers), time.monotonic(), self._name_of(team)
        image = None if asked.image is None else asked.image.size
        settings = str(sorted(promise.settings.items()))
        shape = (name, settings, asked.size, image, asked.mask is None, len(pictures))
        call = _Call(number, team, tasks, warms, set(team.ranks), now, now, seconds, shape)
        self._calls[number] = call
        assert asked.steps is not None, "known by the caller"
        for i, rank in enumerate(team.ranks):
            self._seats[rank].call = call
            self._send(
                rank,
                Draw(
                    number,
                    Group(name, self._store, i, team.size),
                    promise.settings,
                    promise.compute(asked.steps),
                    pictures,
                    asked,
                    true_cfg,
                    loras,
                    previews,
                ),
            )

    def _send(self, rank: int, command: Draw | Stop) -> None:
        worker = self._seats[rank].worker
        if worker is not None:
            worker.send(command)

    def _tell_places(self) -> None:
        """How many jobs are before each of those that wait."""
        seen: dict[_Ticket, None] = {}
        for task in self._waiting:
            seen.setdefault(task.ticket)
        for before, ticket in enumerate(seen):
            if ticket.begun is None and ticket.before != before:
                ticket.before = before
                ticket.events.put_nowait(Queued(before))

    # --- warming up ------------------------------------------------------------------------------

    def _warm(self, team: Team) -> None:
        """Draw the next image that a team has to draw before it serves."""
        if self._phase == "ending" or self._phase == "failed":
            return
        # What one rank compiles the others find in inductor's cache.
        first = self._teams[0]
        if team.size == first.size and team != first and not self._warmed.get(first):
            return
        assert self._loaded is not None, "its ranks have told"
        left, count = self._warming.get(team), WARM_IMAGES.get(self._loaded.device, 2)
        if left is None:
            left = self._warming[team] = [
                (warm, i) for warm in self._to_warm(team) for i in reversed(range(count))
            ]
        warm, _ = left[0]
        assert self._model is not None
        asked = Asked(WARM_STEPS, warm.size)
        pictures = tuple(Picture("", seed) for seed in range(warm.batch))
        self._call(team, [], left[0], pictures, asked, warm.promise, COMPILING_S)

    def _to_warm(self, team: Team) -> list[_Warm]:
        assert self._model is not None
        sizes = self._sizes or (self._model.default_size,)
        found: dict[tuple[object, ...], _Warm] = {}
        for promise in self._promises.values():
            for size in sizes:
                # Of promises that differ in what is left out one will do.
                key = (str(sorted(promise.settings.items())), size)
                found.setdefault(key, _Warm(promise, size, 1))
        first = next(iter(found.values()))
        batches = [_Warm(first.promise, first.size, n) for n in range(2, self._most_batch + 1)]
        return [*found.values(), *batches]

    def _warmed_up(self, call: _Call, told: Finished) -> None:
        assert call.warms is not None
        warm, i = call.warms
        left = self._warming.get(call.team, [])
        if left and left[0] == call.warms:
            left.pop(0)
        if i == 0 and warm.size is not None:
            size, pixels = call.team.size, warm.size[0] * warm.size[1]
            if warm.batch == 1:
                self._pace.learn(size, pixels, WARM_STEPS, told.seconds, told.step_s)
            self._alone[size, warm.batch] = told.seconds / warm.batch
        if not left:
            self._warming.pop(call.team, None)
            self._warmed[call.team] = {self._name_of(call.team)}
        if self._phase == "starting" and all(map(self._is_warm, self._teams)):
            self._phase = "ready"
            log.info("ready: %d ranks", len(self._seats))

    # --- what workers tell -----------------------------------------------------------------------

    def _start(self, seat: _Seat) -> None:
        seat.incarnation += 1
        loop, incarnation = self._loop, seat.incarnation
        assert loop is not None

        def hear(told: Told) -> None:
            # The loop may have ended before the last worker.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._hear, seat, incarnation, told)

        seat.worker = self._workers.start(seat.number, hear)
        seat.worker.send(Load(self._source, self._inner))

    def _hear(self, seat: _Seat, incarnation: int, told: Told) -> None:
        if incarnation != seat.incarnation:
            return
        if isinstance(told, Loaded):
            self._take_in(seat, told)
        elif isinstance(told, Gone):
            self._lose(seat, told)
        else:
            call = seat.call
            if call is None or call.number != told.number:
                return
            call.heard = time.monotonic()
            if isinstance(told, Step):
                if seat.number == min(call.pending):
                    self._stepped(call, told)
                return
            if isinstance(told, Shown):
                return self._show(call, told)
            self._answered(seat, call, told)
        self._dispatch()

    def _take_in(self, seat: _Seat, told: Loaded) -> None:
        seat.loaded, seat.memory = True, told.memory
        if self._model is not None:
            return
        self._loaded = told
        self._model = Model(
            self._name,
            int(time.time()),
            told.pipeline,
            "image" in told.takes,
            "mask_image" in told.takes,
            "negative_prompt" in told.takes,
            told.multiple,
            self._sizes[0] if self._sizes else told.default_size,
            told.default_steps,
            {quality: promise.tell() for quality, promise in self._promises.items()},
            tuple(sorted(self._loras)) if told.adapts else (),
            PROMPTS[1] if self._source == "demo" else "",
            NOTE if self._source == "demo" else "",
        )

    def _stepped(self, call: _Call, told: Step) -> None:
        for task in call.tasks:
            task.step = told.step
            ticket = task.ticket
            if not ticket.over:
                done = sum(x.step for x in ticket.tasks)
                ticket.events.put_nowait(Stepped(done, told.steps * len(ticket.tasks)))

    def _show(self, call: _Call, told: Shown) -> None:
        for task, image in zip(call.tasks, told.images, strict=True):
            ticket = task.ticket
            task.previews[told.index] = image
            shown = [each.previews.get(told.index) for each in ticket.tasks]
            images = [x for x in shown if x is not None]
            wanted = ticket.shown <= told.index < ticket.job.previews  # once, if drawn again
            if len(images) == len(shown) and wanted and not ticket.over:
                ticket.shown = told.index + 1
                ticket.events.put_nowait(Preview(told.index, images))

    def _answered(self, seat: _Seat, call: _Call, told: Finished | Failed) -> None:
        seat.call, seat.failures = None, 0
        call.pending.discard(seat.number)
        if isinstance(told, Finished):
            seat.memory = told.memory
            if told.images is not None:
                self._drawn(call, told)
            elif told.stopped:
                call.is_drawn = True
            if call.warms is not None and not call.pending and not call.lost and not call.failure:
                self._warmed_up(call, told)
        else:
            call.refused_by_all &= told.kind == "refused"
            if call.failure is None or call.failure.kind == "lost":
                call.failure = told
        self._close(call)

    def _drawn(self, call: _Call, told: Finished) -> None:
        """The pictures are there; other ranks may still have to answer."""
        assert told.images is not None
        call.is_drawn = True
        self._compiled.setdefault(call.team, set()).add(call.shape)
        if call.tasks and told.ranks == call.team.size and not call.lost:
            ticket = call.tasks[0].ticket
            self._pace.learn(
                call.team.size,
                ticket.pixels * len(call.tasks),
                ticket.promise.count(ticket.steps),
                told.seconds,
                told.step_s,
            )
        for task, image in zip(call.tasks, told.images, strict=False):
            ticket = task.ticket
            task.image, ticket.ranks = image, told.ranks
            ticket.recovered += told.ranks < call.team.size
            images = [x.image for x in ticket.tasks if x.image is not None]
            if len(images) == len(ticket.tasks) and not ticket.over:
                ticket.events.put_nowait(Drawn(images, self._report(ticket)))

    def _report(self, ticket: _Ticket) -> Report:
        assert ticket.begun is not None
        promise, now = ticket.promise, time.monotonic()
        return Report(
            ticket.job.quality,
            "one rank" if ticket.ranks == 1 else str(promise.settings["policy"]),
            promise.drift(ticket.steps),
            ticket.steps,
            promise.count(ticket.steps),
            ticket.ranks,
            ticket.begun - ticket.came,
            now - ticket.begun,
            ticket.batch,
            ticket.recovered,
        )

    def _close(self, call: _Call) -> None:
        """Once all ranks have answered, or are gone: what has no pictures is drawn again."""
        if call.pending or call.number not in self._calls:
            return
        del self._calls[call.number]
        # What is refused is so by all of them, before they begin. Else they may have come apart.
        if call.lost or call.failure is not None and not call.refused_by_all:
            self._rounds[call.team] += 1
            self._warming.pop(call.team, None)
            self._compiled.pop(call.team, None)
        if call.is_drawn:
            return
        if call.warms is not None:
            self._not_warm(call)
            return
        for ticket in dict.fromkeys(task.ticket for task in call.tasks):
            if not ticket.over:
                self._again(ticket, call)

    def _again(self, ticket: _Ticket, call: _Call) -> None:
        """What comes of a job whose call brought no pictures."""
        failure = call.failure
        if failure is not None and failure.kind == "refused":
            return self._refuse(ticket, Refused(400, "invalid_value", failure.message))
        if failure is not None and failure.kind == "error":
            return self._refuse(ticket, Refused(500, "failed", failure.message))
        ticket.killed += 1
        ticket.recovered += 1
        if ticket.killed >= TRIES:
            text = f"the ranks that drew it were lost {ticket.killed} times"
            return self._refuse(ticket, Refused(500, "poisonous", text))
        for task in call.tasks:
            if task.ticket is ticket:
                self._waiting.put_back(task)

    def _not_warm(self, call: _Call) -> None:
        """A team can't serve, or lost a rank while it warmed up."""
        if call.failure is None or call.failure.kind == "lost":
            return
        text = f"{call.team.size} ranks can't draw: {call.failure.message}"
        log.error("%s", text)
        if self._phase == "starting":
            self._fail(text)
        else:
            self._teams = [team for team in self._teams if team != call.team]

    def _fail(self, reason: str) -> None:
        self._phase, self._reason = "failed", reason
        for ticket in list(self._tickets):
            self._refuse(ticket, Refused(503, "failed", reason))

    # --- ranks that are lost ---------------------------------------------------------------------

    def _lose(self, seat: _Seat, told: Gone) -> None:
        was_loaded, call = seat.loaded, seat.call
        seat.failures += 1
        seat.worker, seat.loaded, seat.call = None, False, None
        for team in self._teams:
            if seat.number in team.ranks:
                self._warming.pop(team, None)
        if call is not None:
            call.lost = True
            call.pending.discard(seat.number)
            self._close(call)
        if self._phase == "ending":
            return
        log.warning("%s", told.reason)
        starting = self._phase == "starting"
        starts = STARTS if starting else STARTS_LATER
        fails = [each.failures >= starts for each in self._seats]
        if all(fails) or starting and any(fails):
            return self._fail(f"{told.reason}, {starts} times in a row: see its messages")
        again = seat.failures - was_loaded  # the first time nothing speaks against a new one
        pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2 ** (again - 1)) if again else 0.0
        self._spawn(self._replace(seat, pause_s))

    async def _replace(self, seat: _Seat, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        if self._phase in ("starting", "ready"):
            self._replaced += 1
            self._start(seat)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._end_stuck(time.monotonic())

    def _end_stuck(self, now: float) -> None:
        """Ends ranks that are stuck: they don't step, or don't answer."""
        for call in self._calls.values():
            allowed = ANSWER_S if call.is_drawn else self._stuck_s
            if self._compiles(call):
                allowed = max(allowed, COMPILING_S)
            if now - call.heard > allowed:
                ranks = sorted(call.pending)
                log.error("ranks %s have not stepped for %.0f s: ended", ranks, allowed)
                for rank in ranks:
                    worker = self._seats[rank].worker
                    if worker is not None:
                        worker.kill()
                call.heard = now

    def _compiles(self, call: _Call) -> bool:
        """Whether it is the first of its shape in its group, and not drawn yet."""
        return not call.is_drawn and call.shape not in self._compiled.get(call.team, ())

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _size(team: Team) -> int:
    return team.size


def _named(source: Source) -> str:
    if isinstance(source, str):
        return Path(source).name if Path(source).is_dir() else source
    return source.__name__


def _adapters_in(folder: Path | None) -> dict[str, Path]:
    """By name."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise CannotLoad(f"{folder}: no folder of adapters; name one, with files NAME.safetensors")
    return {path.stem: path.resolve() for path in sorted(folder.glob("*.safetensors"))}
