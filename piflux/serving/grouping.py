"""Which ranks draw together: as the load asks, decided anew whenever some are free. Pure Python."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEARNS = 0.3
"""How much of an estimate the latest image is."""

FULLEST = 0.95
"""A load that is taken for no more, since none that is bearable can be told from 1 for sure."""

LATE = 0.1
"""An image that takes longer than was estimated is taken to need this share of its time more."""


@dataclass(frozen=True, order=True)
class Team:
    """Neighbouring ranks that draw one call together.

    Attributes:
        first: of them.
        size: how many.
    """

    first: int
    size: int

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)


def teams_of(ranks: int, sizes: Iterable[int] | None = None) -> list[Team]:
    """All groups that are formed of so many ranks: of one, two, four .. and of all of them.

    Each rank is in one team of a size at most, and a smaller team lies within a larger one.

    Args:
        ranks: how many there are.
        sizes: those that are formed; None for all.

    Raises:
        ValueError: `sizes` names another one, or none.
    """
    known = sorted({2**i for i in range(ranks.bit_length()) if 2**i <= ranks} | {ranks})
    chosen = known if sizes is None else sorted(set(sizes))
    if not chosen or not set(chosen) <= set(known):
        raise ValueError(
            f"groups of {', '.join(map(str, chosen)) or 'no'} ranks: of {ranks} ranks choose among "
            f"{', '.join(map(str, known))}"
        )
    return [Team(i, size) for size in chosen for i in range(0, ranks - size + 1, size)]


class Pace:
    """How long an image takes on how many ranks, learned from those that were drawn.

    It is `pixels * (fixed + computed steps * step)`, by size of the group.
    """

    def __init__(self) -> None:
        self._fixed: dict[int, float] = {}
        self._step: dict[int, float] = {}

    def learn(
        self, size: int, pixels: int, computed: int, seconds: float, step_s: float | None
    ) -> None:
        """One image was drawn.

        Args:
            size: of the group.
            pixels: of the image; of all of a batch.
            computed: denoise steps.
            seconds: it took.
            step_s: of a computed step; None where there were too few.
        """
        step = seconds / computed if step_s is None else step_s
        fixed = max(0.0, seconds - computed * step)
        for known, found in ((self._fixed, fixed / pixels), (self._step, step / pixels)):
            before = known.get(size, found)
            known[size] = before + LEARNS * (found - before)

    def seconds(self, size: int, pixels: int, computed: int) -> float | None:
        """Of an image; None if no group of the size has drawn one."""
        if size not in self._step:
            return None
        return pixels * (self._fixed[size] + computed * self._step[size])


class Rate:
    """How many images are asked for a second, of late."""

    def __init__(self) -> None:
        self._count = self._at = 0.0

    def came(self, images: int, now: float, memory_s: float) -> None:
        """So many were asked for; what came `memory_s` seconds ago counts a third of that."""
        self._count = self._faded(now, memory_s) + images
        self._at = now

    def a_second(self, now: float, memory_s: float) -> float:
        return self._faded(now, memory_s) / memory_s

    def _faded(self, now: float, memory_s: float) -> float:
        return self._count * math.exp((self._at - now) / memory_s)


def choose(
    teams: Sequence[Team],
    free_at: Mapping[int, float],
    seconds: Mapping[int, float],
    waiting: int,
    now: float,
    rate: float = 0.0,
) -> Team | None:
    """The team that draws the next image, or None if it is better to wait for another rank.

    For each size all that wait are drawn, in thought, by groups of that size alone, each as soon as
    its ranks are free; and what comes later waits for what the ranks then have to do. The size is
    taken by which all of them wait least. So one image alone is drawn by all ranks, and a long
    queue, or one that is about to be long, by as many groups as there are ranks, since a rank of a
    smaller group does more. And a group does not wait for a rank that is long busy.

    What comes later is told by a flow: of work that would take all ranks b seconds, as many as
    `rate * b / (1 - load)` images find some, in the mean half of it.

    Args:
        teams: that may be formed of ranks that live.
        free_at: when each rank is free, or is likely to be.
        seconds: that an image takes, by size.
        waiting: how many images wait.
        now: in the clock of `free_at`.
        rate: images that are asked for a second.
    """
    formed = [team for team in teams if team.size in seconds]
    if not formed:
        return None
    ranks = {rank for team in formed for rank in team.ranks}
    busy = sum(max(0.0, free_at[rank] - now) for rank in ranks)
    least = min(team.size * seconds[team.size] for team in formed)
    load = min(FULLEST, rate * least / len(ranks))
    found: tuple[float, Team, float] | None = None
    for size in sorted({team.size for team in formed}, reverse=True):
        ready = [
            (max([now, *(free_at[rank] for rank in team.ranks)]), team)
            for team in formed
            if team.size == size
        ]
        first_ready, first = min(ready)
        queue = [at for at, _ in ready]
        heapq.heapify(queue)
        total = 0.0
        for _ in range(waiting):
            end = heapq.heappop(queue) + seconds[size]
            heapq.heappush(queue, end)
            total += end - now
        backlog = (busy + waiting * size * seconds[size]) / len(ranks)
        total += rate * backlog**2 / (2 * (1 - load))
        if found is None or total < found[0]:
            found = total, first, first_ready
    assert found is not None, "there is a size"
    return None if found[2] > now else found[1]


def expected_end(began: float, seconds: float, now: float) -> float:
    """When an image is likely to be drawn that should have taken so long."""
    return max(began + seconds, now + LATE * seconds)
