"""What a step is, to all that runs in it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from piflux.memory.memory import Memory
from piflux.memory.places import Places
from piflux.memory.shares import Fetching
from piflux.memory.slots import Recorder, at_once
from piflux.ranks.packet import Packet
from piflux.ranks.protocol import Ranks

Foreseen = Callable[[Tensor], Sequence[Tensor]]
"""Gives the times of all steps of an image as a clock like this may show them: each (steps,), in
every form that is known. Empty if the times are not known."""


@dataclass(frozen=True)
class Step:
    """One denoise step of a generation.

    Attributes:
        index: 0 at the generation's first step.
        sync: whether attention sees every part's keys and values of this very step.
        parts: `parts[rank]` is the part that `rank` computes.
        computed: whether it is computed at all; else its prediction is continued from earlier
            ones, and nothing else is done.
    """

    index: int
    sync: bool
    parts: tuple[int, ...]
    computed: bool = True


class KeysAndValues(Protocol):
    """Where attention gets the other parts' keys and values: what ops know of a policy."""

    def send(self, context: StepContext, slot: int, fresh: Sequence[Tensor]) -> None:
        """See `Policy.send`."""

    def attend(
        self,
        context: StepContext,
        slot: int,
        fresh: Sequence[Tensor],
        lengths: tuple[int, ...],
        *,
        ordered: bool,
    ) -> Sequence[Tensor]:
        """See `Policy.attend`."""


@dataclass(eq=False)
class StepContext:
    """One rank's step: all that ops, hoisted products, recordings and slots know of a call.

    Attributes:
        step: which.
        rank: whose part is computed.
        group: who shares the work; None for one rank alone.
        policy: where attention gets the other parts' keys and values.
        memory: the stream's.
        now: the step's time, a scalar; see `piflux.runtime.times`.
        tables: what the steps of this image share; see `piflux.runtime.hoisted`.
        foreseen: what is known of the times of all steps; None if nothing.
        header: what rides on the prediction's gather; None where all ranks are in one process.
        recorder: calls what can't be recorded: at once, or, where the step is being recorded,
            whenever the recording has come as far.
        weights: where the program gets those that are shared over the ranks; None if none are.
        first_slot: what attentions count their slots from; see `piflux.runtime.ops.slots_from`.
        sent: by slot: what attention has yet to take up.
        posted: what the next step takes up, and arrives in this one.
    """

    step: Step
    rank: int
    group: Ranks | None
    policy: KeysAndValues
    memory: Memory
    now: Tensor
    tables: dict[Any, Any]
    foreseen: Foreseen | None
    header: Tensor | None = None
    recorder: Recorder = at_once
    weights: Fetching | None = None
    first_slot: int = 0
    sent: dict[int, Packet] = field(default_factory=dict)
    posted: list[Packet] = field(default_factory=list)

    @property
    def ranks(self) -> Ranks:
        """Who shares the work."""
        assert self.group is not None, "one rank alone runs a graph without piflux's ops"
        return self.group

    @property
    def part(self) -> int:
        """The part that the rank computes."""
        return self.step.parts[self.rank]

    def places(self, lengths: Sequence[int], device: torch.device) -> Places:
        """Where the tokens of the part stand among segments of these lengths."""
        size = len(self.step.parts)
        return self.memory.places(self.rank, tuple(lengths), size, self.part, device)

    def post(self, packet: Packet) -> None:
        """Send what the next step takes up.

        A recording has to wait for all that it sends. So what can be recorded is waited for in
        `close`, at the end of this step; anything else in the next one.
        """
        if packet.recordable:
            packet.start()
            self.posted.append(packet)
        else:
            self.recorder(packet.start)

    def close(self) -> None:
        """The step ends: what comes next on the device finds what was posted."""
        while self.posted:
            self.posted.pop().wait()

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """What runs inside is recorded; `recorder` takes up what can't be."""
        self.recorder = recorder
        try:
            yield
        except BaseException:
            # Nothing was sent, and the step is about to begin once more.
            self.sent.clear()
            self.posted.clear()
            self.memory.give_all_back(self.rank)
            raise
        finally:
            self.recorder = at_once

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Inside, this is `current()`."""
        _calls.contexts.append(self)
        try:
            yield
        finally:
            _calls.contexts.pop()


class _Calls(threading.local):
    """Of each thread: virtual ranks have one each. A stack, for calls inside of calls."""

    def __init__(self) -> None:
        self.contexts: list[StepContext | None] = []


_calls = _Calls()


def current() -> StepContext:
    """The step of the call under way.

    Raises:
        RuntimeError: there is none.
    """
    context = _calls.contexts[-1] if _calls.contexts else None
    if context is None:
        raise RuntimeError(
            "no step is under way: what piflux compiled runs inside of its model's call only"
        )
    return context


def is_under_way() -> bool:
    """Whether the call under way is a step."""
    return bool(_calls.contexts) and _calls.contexts[-1] is not None


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside, the call under way is no step: of a model that runs within another's step."""
    _calls.contexts.append(None)
    try:
        yield
    finally:
        _calls.contexts.pop()
