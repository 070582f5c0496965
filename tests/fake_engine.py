"""An engine without ranks: draws gradients by seed, at once or slowly, and fails as it is told."""

from __future__ import annotations

import asyncio
import colorsys
import time
from collections.abc import AsyncIterator

from PIL import Image

from piflux.serving import jobs
from piflux.serving.jobs import Job, Refused

MODEL = jobs.Model(
    name="demo",
    created=1_800_000_000,
    pipeline="FluxPipeline",
    edits=True,
    masks=True,
    negative=True,
    multiple=16,
    default_size=(64, 64),
    default_steps=4,
    promises={
        "lossless": "gather: exact",
        "high": "gather, 18 of 28 steps computed: LPIPS 0.03",
        "medium": "rotate: LPIPS 0.08",
        "low": "rotate, 10 of 28 steps computed: LPIPS 0.2",
    },
    loras=("ink", "clay"),
    example="dragon, 3d style, black background",
    note="This model draws gradients, and nothing else.",
    several=True,
)

LPIPS = {"lossless": 0.0, "high": 0.03, "medium": 0.08, "low": 0.2}


def picture(seed: int, size: tuple[int, int], quality: str = "lossless") -> Image.Image:
    """A gradient whose hue is the seed's, coarser where less is promised."""
    red, green, blue = (
        round(255 * x) for x in colorsys.hsv_to_rgb(seed * 0.381966 % 1, 0.55, 0.95)
    )
    coarse = {"lossless": 256, "high": 24, "medium": 12, "low": 6}[quality]
    shade = (
        Image.linear_gradient("L").resize((coarse, coarse)).resize(size, Image.Resampling.NEAREST)
    )
    light, dark = Image.new("RGB", size, (red, green, blue)), Image.new("RGB", size, (24, 28, 40))
    return Image.composite(light, dark, shade)


class FakeEngine:
    """Draws one job after the other.

    Attributes:
        step_s: seconds of a step.
        held_at: the step that is not begun until this is another, or None.
        room: jobs that may wait.
        phase, reason: of its state.
        fails: raised instead of a picture, after the first step.
        seen: the jobs that were drawn, cancelled or not.
        cancelled: ids of those whose iterator was closed before its end.
    """

    def __init__(
        self, step_s: float = 0.0, room: int = 8, model: jobs.Model | None = MODEL
    ) -> None:
        self.step_s, self.room = step_s, room
        self.held_at: int | None = None
        self.model = model
        self.phase, self.reason = "ready", ""
        self.fails: Exception | None = None
        self.seen: list[Job] = []
        self.cancelled: list[str] = []
        self.ended = False
        self._turn = asyncio.Lock()
        self._waiting = self._drawing = 0
        self._stepped = time.monotonic()

    async def start(self) -> None:
        pass

    async def end(self, within_s: float) -> None:
        self.phase = "ending"
        until = time.monotonic() + within_s
        while self._waiting + self._drawing and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.ended = True  # which jobs notice at their next step

    def state(self) -> jobs.State:
        return jobs.State(
            phase=self.phase,  # type: ignore[arg-type]
            reason=self.reason,
            ranks=2,
            wanted=2,
            groups=(2,),
            waiting=self._waiting,
            drawing=self._drawing,
            stepped_s=time.monotonic() - self._stepped if self._drawing else 0.0,
            memory={0: 1 << 20, 1: 2 << 20},
        )

    async def submit(self, job: Job) -> AsyncIterator[jobs.Event]:
        if self._waiting >= self.room:
            raise Refused(429, "queue_full", "the queue is full: ask later", retry_after_s=3.2)
        self._waiting += 1
        waits, done, came = True, False, time.monotonic()
        try:
            yield jobs.Queued(self._waiting - 1)
            async with self._turn:
                self._waiting -= 1
                self._drawing += 1
                waits, began = False, time.monotonic()
                self.seen.append(job)
                size, steps = job.size or MODEL.default_size, job.steps or MODEL.default_steps
                images = [picture(seed, size, job.quality) for seed in job.seeds]
                for step in range(steps):
                    await asyncio.sleep(self.step_s)
                    while self.held_at == step and not self.ended:
                        await asyncio.sleep(0.005)
                    self._stepped = time.monotonic()
                    if self.ended:
                        raise Refused(503, "ending", "the server ends")
                    yield jobs.Stepped(step + 1, steps)
                    if self.fails is not None:
                        raise self.fails
                    if step < job.previews:
                        yield jobs.Preview(step, [image.resize((8, 8)) for image in images])
                report = jobs.Report(
                    quality=job.quality,
                    policy="gather" if job.quality == "lossless" else "rotate",
                    lpips=LPIPS[job.quality],
                    steps=steps,
                    computed=steps if job.quality == "lossless" else max(1, steps - 1),
                    ranks=2,
                    waited_s=began - came,
                    drawn_s=time.monotonic() - began,
                    batch=len(images),
                )
                done = True
                yield jobs.Drawn(images, report)
        except Refused:
            done = True
            raise
        finally:
            if waits:
                self._waiting -= 1
            else:
                self._drawing -= 1
            if not done:
                self.cancelled.append(job.id)
