"""A replica: an engine whose ranks are actors in the replica's placement group."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray import serve

from piflux.errors import PifluxError
from piflux.serving.app import STUCK_S
from piflux.serving.cluster.settings import Settings
from piflux.serving.cluster.workers import RayWorkers
from piflux.serving.engine import RankEngine
from piflux.serving.jobs import Event, Job, Model, Refused, State
from piflux.serving.messages import Load

READY_LOOK_S = 0.2
"""How often the engine is looked at until it is ready."""

SEEN_S = 2.0
"""How old the state may be that a job's events bring along."""


class CannotLead(PifluxError):
    """The engine has failed, or stands still: Serve ends the replica and starts another one."""


@dataclass(frozen=True)
class Seen:
    """What a replica is at.

    Attributes:
        replica: its name, no other one's.
        state: its engine's.
        model: what it draws with.
    """

    replica: str
    state: State
    model: Model


Word = Event | Refused | Seen


class Leader:
    """One replica. It exists once its engine is ready: until then Serve sends it nothing.

    Args:
        settings: of the server.
        gpus: of a rank.

    Raises:
        CannotLead: nothing can be drawn.
    """

    async def __init__(self, settings: Settings, gpus: int) -> None:  # type: ignore[misc]
        place = ray.util.get_current_placement_group()
        assert place is not None, "the deployment has bundles"
        inner = settings.inner or ("inductor" if gpus else "eager")
        self._engine = RankEngine(
            settings.model,
            settings.ranks,
            name=settings.name,
            sizes=settings.sizes,
            groups=settings.groups,
            # What a replica takes Serve decides, by jobs: it may not refuse any.
            queue=10**6,
            batch=settings.batch,
            loras=settings.loras,
            schedules=settings.schedules,
            deadline_s=settings.deadline_s,
            stuck_s=settings.stuck_s,
            inner=inner,
            workers=RayWorkers(
                Load(settings.model, inner),
                place,
                settings.ranks_a_host,
                settings.hosts,
                gpus=gpus,
                cpus=settings.cpus,
                cache=settings.cache,
            ),
        )
        self._drain_s = settings.drain_s
        self._replica = str(serve.get_replica_context().replica_id.unique_id)
        await self._engine.start()
        while (state := self._engine.state()).phase == "starting":
            await asyncio.sleep(READY_LOOK_S)
        if state.phase != "ready":
            await self._engine.end(0)
            raise CannotLead(f"nothing can be drawn: {state.reason}")

    async def draw(self, job: Job) -> AsyncIterator[Word]:
        """A job's events, with what the replica is at among them; `Drawn` or `Refused` is last."""
        events = cast(Any, self._engine.submit(job))
        seen, told = self.seen(), time.monotonic()
        yield seen
        try:
            async with aclosing(events):
                async for event in events:
                    if time.monotonic() > told + SEEN_S:
                        told = time.monotonic()
                        yield self.seen()
                    yield event
        except Refused as refused:
            yield refused

    def seen(self) -> Seen:
        assert self._engine.model is not None, "it is ready"
        return Seen(self._replica, self._engine.state(), self._engine.model)

    def check_health(self) -> None:
        """Called by Serve every other second.

        Raises:
            CannotLead: the engine has failed, or no rank has stepped for long.
        """
        state = self._engine.state()
        if state.phase == "failed":
            raise CannotLead(f"nothing can be drawn any more: {state.reason}")
        if state.stepped_s > STUCK_S:
            raise CannotLead(f"no rank has come to the end of a step for {state.stepped_s:.0f} s")

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.end(self._drain_s)
