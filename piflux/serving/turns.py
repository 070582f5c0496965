"""Which of the pictures that wait are drawn next: by which ranks, and how many at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from piflux.serving.grouping import Pace, Rate, Team, choose
from piflux.serving.tickets import Task, Ticket
from piflux.serving.waiting import Waiting

REMEMBERED = 15
"""Images of one rank that the load is told by."""

GAIN = 0.97
"""A batch is taken where a picture of it takes less than this share of one alone."""


class Turns:
    """The queue, and what is known of how long pictures take.

    Args:
        queue: pictures that may wait.

    Attributes:
        pace: of groups.
        alone: by size of the group and of the batch, seconds that a picture takes.
    """

    def __init__(self, queue: int) -> None:
        self._waiting: Waiting[Task] = Waiting(queue)
        self._rate = Rate()
        self.pace = Pace()
        self.alone: dict[tuple[int, int], float] = {}

    def __len__(self) -> int:
        """Pictures that wait."""
        return len(self._waiting)

    @property
    def tickets(self) -> list[Ticket]:
        """Those that wait, in the order of their turns."""
        return list(dict.fromkeys(task.ticket for task in self._waiting))

    def fits(self, count: int) -> bool:
        """Whether so many more may wait."""
        return self._waiting.fits(count)

    def enter(self, ticket: Ticket, teams: Sequence[Team]) -> None:
        """Behind its user's others. Whether it fits was asked before."""
        self._rate.came(len(ticket.tasks), ticket.came, self._memory_s(ticket, teams))
        for task in ticket.tasks:
            self._waiting.put(ticket.job.user, task)

    def enter_again(self, task: Task) -> None:
        """Before all others: it was lost by no fault of its own."""
        self._waiting.put_back(task)

    def leave(self, ticket: Ticket) -> None:
        self._waiting.drop(lambda task: task.ticket is ticket)

    def tell_places(self) -> None:
        """How many jobs are before each of those that wait."""
        for before, ticket in enumerate(self.tickets):
            ticket.wait_behind(before)

    def seconds(self, size: int, ticket: Ticket) -> float | None:
        """That a picture takes a group of so many ranks; None if none has drawn one."""
        return self.pace.seconds(size, ticket.pixels, ticket.promise.count(ticket.steps))

    def retry_s(self, teams: Sequence[Team], ranks: int) -> float:
        """In about how many seconds half of those that wait will have been drawn.

        Args:
            teams: that may draw.
            ranks: of all of them.
        """
        first = self._waiting.first()
        if first is None:
            return 1.0
        rates = [
            team.size / ranks * seconds
            for team in teams
            if (seconds := self.seconds(team.size, first.ticket)) is not None
        ]
        return max(1.0, min(rates, default=1.0) * len(self) / 2)

    def next(
        self, teams: Sequence[Team], warm: Sequence[Team], free_at: Mapping[int, float]
    ) -> tuple[Team, list[Task]] | None:
        """Who draws now, and what; None if nobody waits, or it is better to wait for other ranks.

        Args:
            teams: that there may be.
            warm: those of them that can serve.
            free_at: when each rank is free, or is likely to be; of `time.monotonic`.
        """
        first = self._waiting.first()
        if first is None:
            return None
        known = {size: self.seconds(size, first.ticket) for size in {team.size for team in warm}}
        seconds = {size: found for size, found in known.items() if found is not None}
        now = time.monotonic()
        rate = self._rate.a_second(now, self._memory_s(first.ticket, teams))
        team = choose(warm, free_at, seconds, len(self), now, rate)
        return None if team is None else (team, self._take(team))

    def _take(self, team: Team) -> list[Task]:
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
        alone = self.alone.get((size, 1))
        if alone is None:
            return 1
        found = {n: seconds for (group, n), seconds in self.alone.items() if group == size}
        best = min(found, key=lambda n: found[n])
        return best if found[best] < GAIN * alone else 1

    def _memory_s(self, ticket: Ticket, teams: Sequence[Team]) -> float:
        """How long it counts for the load that images came."""
        smallest = min(team.size for team in teams)
        return REMEMBERED * (self.seconds(smallest, ticket) or 1.0)
