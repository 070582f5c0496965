"""What the engine and its workers tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image

from piflux.pipelines.arguments import Asked
from piflux.policies.masks import Compute

Source = str | Callable[[Any], tuple[Any, dict[str, Any]]]
"""What is served: 'demo', a folder of a diffusers pipeline, or an importable function that takes a
device and returns a pipeline on it and what its call needs beside what a user says."""


@dataclass(frozen=True)
class Load:
    """A worker's first command. Answered by `Loaded`, or `Gone`.

    Attributes:
        source: what to load.
        inner: the backend that compiles, see `parallelize`.
    """

    source: Source
    inner: str


@dataclass(frozen=True)
class Group:
    """The ranks of a call, as one of them sees them.

    Attributes:
        name: no other group's: where one of its ranks was replaced, the group is another one.
        store: host and port.
        rank: of this worker.
        size: how many there are.
    """

    name: str
    store: tuple[str, int]
    rank: int
    size: int


@dataclass(frozen=True)
class Picture:
    """One of a call.

    Attributes:
        prompt: what to draw.
        seed: of its noise.
        negative: what not to draw; of a call all pictures have one, or none has.
    """

    prompt: str
    seed: int
    negative: str | None = None


@dataclass(frozen=True)
class Draw:
    """One call of the pipeline, of all ranks of a group. Answered by `Finished` or `Failed`.

    Attributes:
        number: of the call.
        group: who draws.
        settings: of `parallelize`, but for `compute`.
        compute: which steps are computed.
        pictures: drawn at once.
        asked: what they have in common.
        true_cfg: scale of guidance by a second pass; None for what `asked.guidance` implies.
        loras: files with their scales.
        previews: so many on the way.
    """

    number: int
    group: Group
    settings: Mapping[str, Any]
    compute: Compute
    pictures: tuple[Picture, ...]
    asked: Asked = field(default_factory=Asked)
    true_cfg: float | None = None
    loras: tuple[tuple[str, float], ...] = ()
    previews: int = 0


@dataclass(frozen=True)
class Stop:
    """Nobody wants what call `number` draws any more."""

    number: int


@dataclass(frozen=True)
class End:
    """The worker's last command."""


Command = Load | Draw | Stop | End


@dataclass(frozen=True)
class Loaded:
    """What a worker has loaded.

    Attributes:
        device: its type.
        pipeline: the class's name.
        takes: arguments of its call, 'image' and 'mask_image' also where a sister takes them.
        several: whether it makes one picture of several.
        adapts: whether it takes LoRAs.
        multiple: see `piflux.serving.jobs.Model`, likewise the defaults.
        memory: bytes in use.
    """

    device: str
    pipeline: str
    takes: frozenset[str]
    several: bool
    adapts: bool
    multiple: int
    default_size: tuple[int, int]
    default_steps: int
    memory: int


@dataclass(frozen=True)
class Step:
    """The worker has come to the end of a step. From every rank: it shows that it lives."""

    number: int
    step: int
    steps: int


@dataclass(frozen=True)
class Shown:
    """Previews of a call's pictures; from one rank."""

    number: int
    index: int
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class Finished:
    """A call has ended.

    Attributes:
        images: from one rank; None from the others, and where it was stopped.
        stopped: whether it was.
        ranks: how many there were in the end.
        seconds: it took.
        step_s: median seconds of a computed step, but for the first; None of few steps.
        memory: bytes in use.
    """

    number: int
    images: Sequence[Image.Image] | None
    stopped: bool
    ranks: int
    seconds: float
    step_s: float | None
    memory: int


@dataclass(frozen=True)
class Failed:
    """A call has ended otherwise.

    Attributes:
        kind: 'refused': what was asked can't be drawn; 'lost': other ranks are the reason; 'error':
            anything else.
        message: for who asked.
    """

    number: int
    kind: Literal["refused", "lost", "error"]
    message: str


@dataclass(frozen=True)
class Gone:
    """The worker has ended, and says no more."""

    reason: str


Told = Loaded | Step | Shown | Finished | Failed | Gone


class Worker(Protocol):
    """A rank's process, as the engine sees it."""

    def send(self, command: Command) -> None:
        """Returns at once. To one that has ended it is no use, and no error."""

    def kill(self) -> None:
        """End it at once, whatever it is at: `Gone` follows."""


class Workers(Protocol):
    """How ranks' processes are started: on this machine, or by a cluster."""

    def open(self) -> tuple[str, int]:
        """Host and port of a store that all ranks reach; it may answer later. Called once."""

    def start(self, number: int, hear: Callable[[Told], None]) -> Worker:
        """Start rank `number`'s process.

        Args:
            number: of the rank, which tells it its GPU.
            hear: gets all that it tells, `Gone` at last; from any thread.
        """

    def prepare(self) -> None:
        """Have a process at hand for a rank that will be lost. Called once all have loaded."""

    def close(self) -> None:
        """All have ended."""
