"""Replicas of an engine, as one engine."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException

from piflux.serving import jobs
from piflux.serving.cluster.leader import Seen, Word
from piflux.serving.engine import TRIES
from piflux.serving.jobs import Job, Refused

log = logging.getLogger(__name__)

LOST = (RayActorError, TaskCancelledError)
"""What comes of a call whose replica has died, or was ended."""

JOB_BEAT_S = 1.0
"""How long a job may be without an event, before where it stands is looked at."""

POLL_S = 2.0
"""How often a replica is asked what it is at."""

OLD_S = 60.0
"""A replica that nothing was heard of for so long isn't counted. Of those that are full, as many
jobs as they take are heard of."""

RESEND_PAUSE_S = 0.5
"""Before a job is sent again that nobody has begun."""


@dataclass(eq=False)
class _Way:
    """A job's way through the replicas.

    Attributes:
        begun: whether the replica that has it has drawn a step.
        lost: replicas that were lost while they drew it.
        before: jobs that were told to be before it.
        replica: that has it.
        shown: previews that were told.
    """

    begun: bool = False
    lost: int = 0
    before: int | None = None
    replica: str | None = None
    shown: int = 0


class Replicas:
    """See `piflux.serving.jobs.Engine`.

    Serve chooses the replica. Where one dies, its jobs go to others: seeds make their pictures the
    same. A job that was being drawn when its replica died, twice, is refused.

    Args:
        handle: of the replicas' deployment.
        deadline_s: within which a job has to be drawn that names no other time.
    """

    def __init__(self, handle: Any, deadline_s: float) -> None:
        self._handle, self._deadline_s = handle, deadline_s
        self._seen: dict[str, tuple[float, Seen]] = {}
        self._model: jobs.Model | None = None
        self._ways: dict[_Way, None] = {}  # in the order of their coming
        self._until = math.inf  # when jobs are given up
        self._polling: asyncio.Task[None] | None = None

    @property
    def model(self) -> jobs.Model | None:
        return self._model

    async def start(self) -> None:
        self._polling = asyncio.ensure_future(self._poll())

    async def submit(self, job: Job) -> AsyncIterator[jobs.Event]:
        if self._until < math.inf:
            raise Refused(503, "ending", "the server ends")
        came, way = time.monotonic(), _Way()
        seconds = self._deadline_s if job.deadline_s is None else job.deadline_s
        self._ways[way] = None
        try:
            while True:
                try:
                    async with aclosing(self._once(job, way, came, came + seconds)) as events:
                        async for event in events:
                            yield event
                            if isinstance(event, jobs.Drawn):
                                return
                except LOST as error:
                    log.warning("job %s: its replica was lost: %s", job.id, error)
                    self._lose(way)
                if not way.begun:
                    await asyncio.sleep(RESEND_PAUSE_S)
                way.begun, way.replica = False, None
        finally:
            del self._ways[way]

    async def _once(
        self, job: Job, way: _Way, came: float, until: float
    ) -> AsyncGenerator[jobs.Event, None]:
        """Events of a job that one replica gets; the last one, if all goes well, is `Drawn`."""
        left = until - time.monotonic()
        stream = self._handle.options(stream=True).draw.remote(replace(job, deadline_s=left))
        try:
            async with aclosing(self._words(stream, until, until - came)) as words:
                async for word in words:
                    if isinstance(word, Refused):
                        if word.status == 503:
                            return  # that replica draws nothing any more; another one will
                        raise word
                    event = self._event(word, way, came)
                    if event is not None:
                        yield event
        except BackPressureError as error:
            raise Refused(
                429, "queue_full", "too many jobs wait: ask again later", retry_after_s=JOB_BEAT_S
            ) from error
        finally:
            stream.cancel()

    def _event(self, word: jobs.Event | Seen | None, way: _Way, came: float) -> jobs.Event | None:
        """What of a replica's word the front has to know."""
        if word is None:
            before = self._before(way)
            if way.replica is not None or way.before == before:
                return None
            way.before = before
            return jobs.Queued(before)
        if isinstance(word, Seen):
            way.replica = word.replica
            self._note(word)
            return None
        if isinstance(word, jobs.Preview):
            if word.number < way.shown:  # by the replica before
                return None
            way.shown = word.number + 1
        if isinstance(word, jobs.Drawn):
            return jobs.Drawn(word.images, _whole(word.report, way, time.monotonic() - came))
        way.begun = way.begun or isinstance(word, jobs.Stepped)
        return word

    async def _words(
        self, stream: Any, until: float, seconds: float
    ) -> AsyncGenerator[Word | None, None]:
        """What a replica tells; None where it has told nothing for JOB_BEAT_S.

        Raises:
            Refused: the job's time is over, or the server's.
        """
        following: asyncio.Task[Word | None] | None = None
        try:
            while True:
                now = time.monotonic()
                if now >= until:
                    text = f"not drawn within {seconds:.3g} s"
                    raise Refused(504, "deadline", text, retry_after_s=JOB_BEAT_S)
                if now >= self._until:
                    raise Refused(503, "ending", "the server ends")
                if following is None:
                    following = asyncio.ensure_future(_next(stream))
                left = min(JOB_BEAT_S, until - now, self._until - now)
                done, _ = await asyncio.wait({following}, timeout=left)
                if not done:
                    yield None
                    continue
                word, following = following.result(), None
                if word is None:
                    return
                yield word
        finally:
            if following is not None:
                following.cancel()

    def _before(self, way: _Way) -> int:
        """Jobs that wait for a replica, and came before this one."""
        ways = list(self._ways)
        return sum(each.replica is None for each in ways[: ways.index(way)])

    def _lose(self, way: _Way) -> None:
        if way.replica is not None:
            self._seen.pop(way.replica, None)
        if not way.begun:
            return
        way.lost += 1
        if way.lost >= TRIES:
            text = f"the replicas that drew it were lost {way.lost} times"
            raise Refused(500, "poisonous", text)

    async def _poll(self) -> None:
        """Ask replicas what they are at, one after the other, as Serve chooses them."""
        while True:
            try:
                self._note(await self._handle.seen.remote())
            except (*LOST, RayServeException) as error:
                log.debug("no replica says what it is at: %s", error)
            await asyncio.sleep(POLL_S)

    def _note(self, seen: Seen) -> None:
        self._model = self._model or seen.model
        self._seen[seen.replica] = time.monotonic(), seen

    def state(self) -> jobs.State:
        now = time.monotonic()
        self._seen = {x: (at, seen) for x, (at, seen) in self._seen.items() if now - at < OLD_S}
        states = [seen.state for _, (_, seen) in sorted(self._seen.items())]
        memory = [each.memory[rank] for each in states for rank in sorted(each.memory)]
        waiting = sum(not way.begun for way in self._ways)
        return jobs.State(
            # Where all replicas are lost, jobs wait for the next ones.
            "ending" if self._until < math.inf else "ready" if self._model else "starting",
            "",
            sum(each.ranks for each in states),
            sum(each.wanted for each in states),
            tuple(sorted((size for each in states for size in each.groups), reverse=True)),
            waiting,
            len(self._ways) - waiting,
            max((each.stepped_s for each in states), default=0.0),
            sum(each.replaced for each in states),
            dict(enumerate(memory)),
        )

    async def end(self, within_s: float) -> None:
        """See `Engine`. Replicas are Serve's to end."""
        self._until = min(self._until, time.monotonic() + within_s)
        while self._ways:
            await asyncio.sleep(0.02)
        if self._polling is not None:
            self._polling.cancel()


async def _next(stream: Any) -> Word | None:
    """The next word; None after the last one."""
    try:
        word: Word = await anext(stream)
    except StopAsyncIteration:
        return None
    return word


def _whole(report: jobs.Report, way: _Way, seconds: float) -> jobs.Report:
    """The report of a job that took so many seconds, with what it had lost before."""
    return replace(
        report,
        waited_s=max(0.0, seconds - report.drawn_s),
        recovered=report.recovered + way.lost,
    )
