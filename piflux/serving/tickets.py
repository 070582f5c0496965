"""A job from its coming to its end: what its client is told, and what becomes of its pictures."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from PIL import Image

from piflux.pipelines.arguments import Asked
from piflux.serving import jobs
from piflux.serving.jobs import Job, Refused
from piflux.serving.messages import Picture
from piflux.serving.qualities import Promise


@dataclass(eq=False)
class Ticket:
    """A job that was taken.

    Attributes:
        job: what was asked.
        promise: of its quality.
        steps: denoise steps.
        asked: what its calls have in common.
        came: when, likewise `begun`, its first picture; of `time.monotonic`.
        events: for its client; an error is the last one.
        tasks: its pictures; none once it is over.
        killed: how many of its calls a rank died in.
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
    events: asyncio.Queue[jobs.Event | Refused] = field(default_factory=asyncio.Queue)
    tasks: list[Task] = field(default_factory=list)
    begun: float | None = None
    killed: int = 0
    batch: int = 1
    ranks: int = 1
    recovered: int = 0
    before: int | None = None
    shown: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        self.tasks = [Task(self, seed) for seed in self.job.seeds]

    @property
    def pixels(self) -> int:
        """Of one picture."""
        images = self.asked.images
        width, height = self.asked.size or (images[0].size if images else (1024, 1024))
        return width * height

    def wait_behind(self, before: int) -> None:
        """So many jobs are before it."""
        if self.begun is None and self.before != before:
            self.before = before
            self.events.put_nowait(jobs.Queued(before))

    def refuse(self, refused: Refused) -> None:
        self.events.put_nowait(refused)

    def close(self) -> None:
        """Nobody waits for it any more, and its pictures go with it.

        A circle of ticket and tasks would keep them until Python looks for such, which is after
        hundreds of jobs.
        """
        self.over = True
        self.tasks.clear()

    def _stepped(self, steps: int) -> None:
        if not self.over:
            done = sum(task.step for task in self.tasks)
            self.events.put_nowait(jobs.Stepped(done, steps * len(self.tasks)))

    def _shown(self, number: int) -> None:
        """Tells a preview once all pictures have it; and once, if they are drawn again."""
        images = [image for task in self.tasks if (image := task.previews.get(number)) is not None]
        wanted = self.shown <= number < self.job.previews
        if not self.over and wanted and len(images) == len(self.tasks):
            self.shown = number + 1
            self.events.put_nowait(jobs.Preview(number, images))

    def _drawn(self) -> None:
        images = [task.image for task in self.tasks if task.image is not None]
        if not self.over and len(images) == len(self.tasks):
            self.events.put_nowait(jobs.Drawn(images, self._report()))

    def _report(self) -> jobs.Report:
        assert self.begun is not None, "it was drawn"
        return jobs.Report(
            self.job.quality,
            "one rank" if self.ranks == 1 else str(self.promise.settings["policy"]),
            self.promise.drift(self.steps),
            self.steps,
            self.promise.count(self.steps),
            self.ranks,
            self.begun - self.came,
            time.monotonic() - self.begun,
            self.batch,
            self.recovered,
        )


@dataclass(eq=False)
class Task:
    """One picture of a job.

    Attributes:
        ticket: the job's.
        seed: of the picture.
        step: how far it is.
        image: once it is drawn.
        previews: by their number.
    """

    ticket: Ticket
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

    @property
    def picture(self) -> Picture:
        """As ranks are told."""
        return Picture(self.ticket.job.prompt, self.seed, self.ticket.job.negative)

    def begin(self, batch: int, now: float) -> None:
        """It is drawn, in a call of so many."""
        ticket = self.ticket
        ticket.begun = ticket.begun or now
        ticket.batch = max(ticket.batch, batch)
        self.step = 0

    def take_step(self, step: int, steps: int) -> None:
        """It is so far, of so many steps."""
        self.step = step
        self.ticket._stepped(steps)

    def take_preview(self, number: int, image: Image.Image) -> None:
        self.previews[number] = image
        self.ticket._shown(number)

    def take_image(self, image: Image.Image, ranks: int, *, recovered: bool) -> None:
        """It is drawn, by so many ranks in the end; with `recovered` there were more."""
        self.image, self.ticket.ranks = image, ranks
        self.ticket.recovered += recovered
        self.ticket._drawn()
