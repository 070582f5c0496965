"""The words that the front (HTTP) and the engine (ranks) of a server share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from PIL import Image

from piflux.errors import PifluxError

Quality = Literal["lossless", "high", "medium", "low"]


class Refused(PifluxError):
    """A request that is not taken, or not answered.

    Attributes:
        status: HTTP's number for it: 400 what was asked, 429 the queue is full, 500 it failed,
            503 not ready, or ending, 504 its deadline has passed.
        code: one word for programs, such as 'queue_full'.
        field: of the request, that is wrong.
        retry_after_s: when it is worth to ask again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.field, self.retry_after_s = field, retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # By itself an exception is pickled as its message alone.
        again = partial(Refused, field=self.field, retry_after_s=self.retry_after_s)
        return again, (self.status, self.code, str(self))


@dataclass(frozen=True)
class Job:
    """What is to be drawn: checked against limits by the front, against the model by the engine.

    Attributes:
        id: of the request, in logs and events.
        prompt: what to draw.
        seeds: one a picture.
        quality: the promise that is asked for.
        size: width and height in pixels; None for the pipeline's own.
        steps: denoise steps; None for the pipeline's own, likewise the guidances.
        guidance: the pipeline's own scale, of distilled guidance where a model has it.
        true_cfg: of guidance by a second pass, with the negative prompt.
        negative: what not to draw.
        images: to edit, follow or start from.
        mask: white where the picture is painted anew.
        loras: names, as the operator's folder has them, with their scales.
        user: who asks, for fairness between users.
        deadline_s: seconds from now by which it has to be drawn; None for the server's own.
        previews: so many pictures on the way, evenly spaced.
    """

    id: str
    prompt: str
    seeds: tuple[int, ...]
    quality: Quality = "lossless"
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    negative: str | None = None
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    loras: tuple[tuple[str, float], ...] = ()
    user: str = ""
    deadline_s: float | None = None
    previews: int = 0


@dataclass(frozen=True)
class Queued:
    """So many jobs are before this one."""

    before: int


@dataclass(frozen=True)
class Stepped:
    """A denoise step is over."""

    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """What the pictures look like on the way, small.

    Attributes:
        number: of the preview, from 0.
        images: one for each seed.
    """

    number: int
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class Report:
    """How a job was drawn.

    Attributes:
        quality: the promise.
        policy: the schedule's, 'one rank' for none.
        lpips: measured for the promise on the demo's model; 0 where all steps are computed exactly,
            None for an operator's schedule, which was measured elsewhere.
        steps: denoise steps.
        computed: those that were not continued.
        ranks: how many drew it in the end.
        waited_s: seconds in the queue.
        drawn_s: seconds from then to the pictures.
        batch: pictures that were drawn with it in one call, its own among them.
        recovered: how often a rank was lost meanwhile.
    """

    quality: Quality
    policy: str
    lpips: float | None
    steps: int
    computed: int
    ranks: int
    waited_s: float
    drawn_s: float
    batch: int
    recovered: int = 0


@dataclass(frozen=True)
class Drawn:
    """A job's last event. Images are in the order of its seeds."""

    images: Sequence[Image.Image]
    report: Report


Event = Queued | Stepped | Preview | Drawn


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        name: as requests have it.
        created: seconds since 1970 when it was loaded.
        pipeline: the class's name.
        edits: whether it takes pictures, likewise masks, negative prompts and loras' names.
        multiple: sizes are multiples of so many pixels.
        default_size: width and height in pixels.
        default_steps: denoise steps.
        promises: policy and measured LPIPS of each quality, in words.
        example: a prompt that it knows, for the page.
        note: what is to be said beside its pictures.
        several: whether it makes one picture of several.
    """

    name: str
    created: int
    pipeline: str
    edits: bool
    masks: bool
    negative: bool
    multiple: int
    default_size: tuple[int, int]
    default_steps: int
    promises: Mapping[Quality, str]
    loras: tuple[str, ...] = ()
    example: str = ""
    note: str = ""
    several: bool = False


@dataclass(frozen=True)
class State:
    """What the engine is at, for health and metrics.

    Attributes:
        phase: 'starting' (loads, warms up), 'ready', 'ending' (draws what it has), 'failed'.
        reason: of 'failed'.
        ranks: those that live; `wanted` when all are there.
        groups: sizes of the groups that draw now, or would.
        waiting: jobs in the queue; `drawing`: under way.
        stepped_s: seconds since a rank has last stepped or idled; large if a group is stuck.
        replaced: how many ranks were started in place of one that was lost.
        memory: bytes in use of each rank, by the device's or the process's count.
    """

    phase: Literal["starting", "ready", "ending", "failed"]
    reason: str
    ranks: int
    wanted: int
    groups: tuple[int, ...]
    waiting: int
    drawing: int
    stepped_s: float
    replaced: int = 0
    memory: Mapping[int, int] = field(default_factory=dict)


class Engine(Protocol):
    """What draws. One for each model, in the process of the front or on another machine.

    Attributes:
        model: None until a rank has loaded it.
    """

    @property
    def model(self) -> Model | None: ...

    async def start(self) -> None:
        """Begin to load and warm up; returns at once, `state` tells how far it is."""

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """A job's events, of which `Drawn` is the last. To close it early is to cancel the job.

        The first event comes at once: a job that is taken and one that is refused are told apart.

        Raises:
            Refused: at the first event or at any later one.
        """

    def state(self) -> State: ...

    async def end(self, within_s: float) -> None:
        """Take no more jobs, draw those that are there as far as time allows, end all ranks.

        Called again it does nothing, or hurries.
        """
