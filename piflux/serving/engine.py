"""The engine: jobs are drawn by ranks that group as the load asks, whichever of them are lost.

All of it runs in one event loop; what workers tell is brought there. The engine's own process holds
no model.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from piflux.pipelines.arguments import Asked
from piflux.serving import messages
from piflux.serving.calls import Call, Warm
from piflux.serving.grouping import Team, teams_of
from piflux.serving.jobs import Drawn, Event, Job, Model, Queued, Refused, State
from piflux.serving.messages import Draw, Failed, Finished, Group, Load, Picture, Stop
from piflux.serving.processes import LocalWorkers
from piflux.serving.qualities import Promise, promises_of
from piflux.serving.seats import Seat, Seats
from piflux.serving.served import Served
from piflux.serving.tickets import Task, Ticket
from piflux.serving.turns import Turns
from piflux.serving.warmth import Warmth, to_warm

log = logging.getLogger(__name__)

TICK_S = 0.5
"""How often the engine looks for workers that are stuck."""

ENDING_S = 60.0
"""How long a rank may take to end a call whose pictures another one has brought."""

CALL_COMPILES_S = 1800.0
"""How long a call may take without a step, where its group has drawn none of its shape."""

TRIES = 2
"""A job whose ranks died so often is not drawn once more."""

WARM_STEPS = 4
"""Denoise steps of the images that are drawn to compile, and to see how long a step takes."""


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
        source: messages.Source,
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
        workers: messages.Workers | None = None,
    ) -> None:
        for what, number in (("ranks", ranks), ("queue", queue), ("batch", batch)):
            if number < 1:
                raise ValueError(f"{what} must be at least 1, got {number}")
        self._teams = teams_of(ranks, groups)
        self._served = Served(source, name, sizes, promises_of(schedules or {}), loras)
        self._deadline_s, self._stuck_s, self._most_batch = deadline_s, stuck_s, batch
        self._keeps_code = inner == "inductor"
        load = Load(source, inner)
        self._seats = Seats(
            ranks,
            workers or LocalWorkers(ranks, load, cache),
            load,
            hear=self._hear,
            lose=self._lose,
            fail=self._fail,
        )
        self._warmth = Warmth(self._seats)
        self._turns = Turns(queue)
        self._tickets: set[Ticket] = set()
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._phase: Literal["starting", "ready", "ending", "failed"] = "starting"
        self._reason = ""
        self._watching: asyncio.Task[None] | None = None

    # --- what the front calls --------------------------------------------------------------------

    @property
    def model(self) -> Model | None:
        return self._served.model

    async def start(self) -> None:
        await self._seats.open()
        self._watching = asyncio.ensure_future(self._watch())

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
        stepping = [call for call in self._calls.values() if not self._warmth.compiles(call)]
        groups = [call.team.size for call in drawing]
        if not groups:
            groups = sorted(team.size for team in self._warm_teams())[-1:]
        return State(
            self._phase,
            self._reason,
            sum(seat.loaded for seat in self._seats),
            len(self._seats),
            tuple(sorted(groups, reverse=True)),
            len(self._turns.tickets),
            len({task.ticket for call in drawing for task in call.tasks}),
            max((now - call.heard for call in stepping), default=0.0),
            self._seats.replaced,
            {seat.number: seat.memory for seat in self._seats if seat.loaded},
        )

    async def end(self, within_s: float) -> None:
        if self._phase != "failed":
            self._phase = "ending"
        self._seats.stop_replacing()
        until = time.monotonic() + within_s
        while self._tickets and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for ticket in list(self._tickets):
            self._refuse(ticket, Refused(503, "ending", "the server ends"))
        if self._watching is not None:
            self._watching.cancel()
        await self._seats.close()

    # --- jobs ------------------------------------------------------------------------------------

    def _enter(self, job: Job) -> Ticket:
        if self._phase in ("ending", "failed"):
            raise Refused(503, self._phase, self._reason or "the server ends")
        if self._phase == "starting":
            raise Refused(503, "starting", "the model is being loaded", retry_after_s=5.0)
        asked = self._served.asked(job)
        if not self._turns.fits(len(job.seeds)):
            raise Refused(
                429,
                "queue_full",
                f"{len(self._turns)} pictures wait: ask again later",
                retry_after_s=self._retry_s(),
            )
        assert asked.steps is not None, "known by now"
        promise = self._served.promises[job.quality]
        ticket = Ticket(job, promise, asked.steps, asked, time.monotonic())
        self._tickets.add(ticket)
        self._turns.enter(ticket, self._teams)
        self._dispatch()
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        """Nobody waits for it any more."""
        ticket.close()
        self._tickets.discard(ticket)
        self._turns.leave(ticket)
        for call in self._calls.values():
            if call.is_unwanted and not call.stopped:
                call.stopped = True
                for rank in call.pending:
                    self._seats[rank].send(Stop(call.number))
        self._dispatch()

    def _refuse(self, ticket: Ticket, refused: Refused) -> None:
        ticket.refuse(refused)
        self._leave(ticket)

    def _too_late(self, ticket: Ticket, seconds: float) -> None:
        text = f"not drawn within {seconds:.3g} s"
        self._refuse(ticket, Refused(504, "deadline", text, retry_after_s=self._retry_s()))

    def _retry_s(self) -> float:
        return self._turns.retry_s(self._teams, len(self._seats))

    # --- who draws what --------------------------------------------------------------------------

    def _warm_teams(self) -> list[Team]:
        return [team for team in self._teams if self._warmth.is_warm(team)]

    def _dispatch(self) -> None:
        """Begin whatever can be begun."""
        if self._phase == "failed":
            return
        while (
            begun := self._turns.next(self._teams, self._warm_teams(), self._free_at())
        ) is not None:
            self._draw(*begun)
        # A larger group only while nobody waits, unless nobody could be served without it.
        idle = not len(self._turns) or not self._warm_teams()
        for team in self._teams:
            is_free = all(self._seats[rank].is_free for rank in team.ranks)
            is_needed = idle or team.size == self._teams[0].size
            if is_free and is_needed and not self._warmth.is_warm(team):
                self._warm(team)
        self._turns.tell_places()

    def _free_at(self) -> dict[int, float]:
        """When each rank is free, or is likely to be."""
        now = time.monotonic()
        return {
            seat.number: now if seat.call is None else seat.call.expected_end(now)
            for seat in self._seats
        }

    def _draw(self, team: Team, tasks: list[Task]) -> None:
        """What jobs ask for."""
        ticket, now = tasks[0].ticket, time.monotonic()
        for task in tasks:
            task.begin(len(tasks), now)
        self._call(
            team,
            tasks,
            None,
            tuple(task.picture for task in tasks),
            ticket.asked,
            ticket.promise,
            (self._turns.seconds(team.size, ticket) or 1.0) * len(tasks),
            true_cfg=ticket.job.true_cfg,
            loras=self._served.files(ticket.job.loras),
            previews=max(task.ticket.job.previews for task in tasks),
        )

    def _warm(self, team: Team) -> None:
        """The next image that a team has to draw before it serves."""
        first, loaded = self._teams[0], self._served.loaded
        # What one rank compiles the others find in inductor's cache.
        waits = self._keeps_code and team.size == first.size and team != first
        if self._phase == "ending" or waits and not self._warmth.was_warm(first):
            return
        assert loaded is not None, "its ranks have told"
        warm = self._warmth.next(
            team,
            to_warm(
                self._served.promises.values(), self._served.sizes, self._most_batch, loaded.device
            ),
        )
        asked = Asked(WARM_STEPS, warm.size)
        pictures = tuple(Picture("", seed) for seed in range(warm.batch))
        self._call(team, [], warm, pictures, asked, warm.promise, CALL_COMPILES_S)

    def _call(
        self,
        team: Team,
        tasks: list[Task],
        warms: Warm | None,
        pictures: tuple[Picture, ...],
        asked: Asked,
        promise: Promise,
        seconds: float,
        *,
        true_cfg: float | None = None,
        loras: tuple[tuple[str, float], ...] = (),
        previews: int = 0,
    ) -> None:
        assert asked.steps is not None, "known by the caller"
        number, name = next(self._numbers), self._warmth.name_of(team)
        images = tuple(image.size for image in asked.images)
        settings = str(sorted(promise.settings.items()))
        shape = (name, settings, asked.size, images, asked.mask is None, len(pictures))
        call = self._calls[number] = Call(number, team, tasks, warms, seconds, shape)
        for i, rank in enumerate(team.ranks):
            self._seats[rank].call = call
            self._seats[rank].send(
                Draw(
                    number,
                    Group(name, self._seats.store, i, team.size),
                    promise.settings,
                    promise.compute(asked.steps),
                    pictures,
                    asked,
                    true_cfg,
                    loras,
                    previews,
                )
            )

    # --- what ranks tell -------------------------------------------------------------------------

    def _hear(self, seat: Seat, told: messages.Told) -> None:
        if isinstance(told, messages.Loaded):
            seat.loaded, seat.memory = True, told.memory
            self._served.learn(told)
            if self._phase == "ready":
                self._seats.prepare()
            return self._dispatch()
        call = seat.call
        if call is None or isinstance(told, messages.Gone) or call.number != told.number:
            return
        call.heard = time.monotonic()
        if isinstance(told, messages.Step):
            if seat.number == min(call.pending):
                for task in call.tasks:
                    task.take_step(told.step, told.steps)
        elif isinstance(told, messages.Shown):
            for task, image in zip(call.tasks, told.images, strict=True):
                task.take_preview(told.index, image)
        else:
            self._answered(seat, call, told)
            self._dispatch()

    def _answered(self, seat: Seat, call: Call, told: Finished | Failed) -> None:
        seat.call, seat.failures = None, 0
        call.pending.discard(seat.number)
        if isinstance(told, Failed):
            call.fail(told)
        else:
            seat.memory = told.memory
            if told.images is not None:
                self._drawn(call, told)
            elif told.stopped:
                call.is_drawn = True
            if call.warms is not None and not call.pending and not call.lost and not call.failure:
                self._warmed_up(call, call.warms, told)
        self._close(call)

    def _drawn(self, call: Call, told: Finished) -> None:
        """The pictures are there; other ranks may still have to answer."""
        assert told.images is not None
        call.is_drawn = True
        self._warmth.compiled(call)
        if call.tasks and told.ranks == call.team.size and not call.lost:
            ticket = call.tasks[0].ticket
            self._turns.pace.learn(
                call.team.size,
                ticket.pixels * len(call.tasks),
                ticket.promise.count(ticket.steps),
                told.seconds,
                told.step_s,
            )
        for task, image in zip(call.tasks, told.images, strict=False):
            task.take_image(image, told.ranks, recovered=told.ranks < call.team.size)

    def _warmed_up(self, call: Call, warm: Warm, told: Finished) -> None:
        self._warmth.take(call)
        if not warm.left:
            size, (width, height) = call.team.size, warm.size
            if warm.batch == 1:
                pace = self._turns.pace
                pace.learn(size, width * height, WARM_STEPS, told.seconds, told.step_s)
            self._turns.alone[size, warm.batch] = told.seconds / warm.batch
        if self._phase == "starting" and all(map(self._warmth.is_warm, self._teams)):
            self._phase, self._seats.ready = "ready", True
            log.info("ready: %d ranks", len(self._seats))
            self._seats.prepare()

    def _lose(self, seat: Seat, call: Call | None) -> None:
        """A rank is gone, and what it had of a call."""
        self._warmth.begin_anew(team for team in self._teams if seat.number in team.ranks)
        if call is not None:
            call.lost = True
            call.pending.discard(seat.number)
            self._close(call)
        self._dispatch()

    def _close(self, call: Call) -> None:
        """Once all ranks have answered, or are gone: what has no pictures is drawn again."""
        if call.pending or call.number not in self._calls:
            return
        del self._calls[call.number]
        if call.has_parted:
            self._warmth.part(call.team)
        if call.is_drawn:
            return
        if call.warms is not None:
            self._not_warm(call)
            return
        for ticket in dict.fromkeys(task.ticket for task in call.tasks):
            if not ticket.over:
                self._again(ticket, call)

    def _again(self, ticket: Ticket, call: Call) -> None:
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
                self._turns.enter_again(task)

    def _not_warm(self, call: Call) -> None:
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
        self._seats.stop_replacing()
        for ticket in list(self._tickets):
            self._refuse(ticket, Refused(503, "failed", reason))

    # --- ranks that are stuck --------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._end_stuck(time.monotonic())

    def _end_stuck(self, now: float) -> None:
        """Ends ranks that are stuck: they don't step, or don't answer."""
        for call in self._calls.values():
            allowed = ENDING_S if call.is_drawn else self._stuck_s
            if self._warmth.compiles(call):
                allowed = max(allowed, CALL_COMPILES_S)
            if now - call.heard > allowed:
                ranks = sorted(call.pending)
                log.error("ranks %s have not stepped for %.0f s: ended", ranks, allowed)
                for rank in ranks:
                    self._seats[rank].kill()
                call.heard = now
