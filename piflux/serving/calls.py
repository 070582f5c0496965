"""A call of the pipeline under way: who draws it, what of, and what has come of it so far."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from piflux.serving.grouping import Team, expected_end
from piflux.serving.messages import Failed
from piflux.serving.qualities import Promise
from piflux.serving.tickets import Task


@dataclass(frozen=True)
class Warm:
    """What is compiled before it is asked for: so many pictures of a size, by some settings.

    Attributes:
        promise: whose settings.
        size: width and height in pixels.
        batch: how many pictures.
        left: how many more images of it are drawn after this one.
    """

    promise: Promise
    size: tuple[int, int]
    batch: int
    left: int


@dataclass(eq=False)
class Call:
    """One call.

    Attributes:
        number: of the call.
        team: who draws it.
        tasks: of jobs; none to warm up.
        warms: what it warms up; None for jobs.
        seconds: that it should take.
        shape: what it compiles, if no call of the group has.
        began: when it was sent to its ranks, by `time.monotonic`.
        heard: when a rank last told anything of it, likewise.
        pending: ranks that have not answered.
        lost: whether a rank died in it.
        is_drawn: whether its pictures are there, or it was stopped.
        stopped: whether its ranks were told to.
        failure: what the first one told that failed by itself.
    """

    number: int
    team: Team
    tasks: list[Task]
    warms: Warm | None
    seconds: float
    shape: tuple[object, ...]
    began: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    pending: set[int] = field(default_factory=set)
    lost: bool = False
    is_drawn: bool = False
    stopped: bool = False
    failure: Failed | None = None
    _refused_by_all: bool = True

    def __post_init__(self) -> None:
        self.pending = set(self.team.ranks)

    @property
    def is_unwanted(self) -> bool:
        """Whether nobody waits for any of its pictures."""
        return bool(self.tasks) and all(task.ticket.over for task in self.tasks)

    @property
    def has_parted(self) -> bool:
        """Whether its ranks may have come apart, so that they have to meet anew.

        What is refused is so by all of them, before they begin.
        """
        return self.lost or self.failure is not None and not self._refused_by_all

    def fail(self, told: Failed) -> None:
        """One of its ranks has failed. That others are lost to it says less than what they tell."""
        self._refused_by_all &= told.kind == "refused"
        if self.failure is None or self.failure.kind == "lost":
            self.failure = told

    def expected_end(self, now: float) -> float:
        over = self.is_drawn or self.stopped  # but for what a rank is at
        return expected_end(-math.inf if over else self.began, self.seconds, now)
