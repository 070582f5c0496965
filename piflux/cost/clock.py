"""Moments in a device's work, and what lies between them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def mark(on_gpu: bool) -> Any:
    """A moment: an event in the GPU's stream, read when all is done, else the host's clock."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks: Sequence[Any]) -> list[float]:
    """Milliseconds between consecutive marks; waits for the GPU where they are events."""
    if marks and not isinstance(marks[0], float):
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return [(b - a) * 1000 for a, b in itertools.pairwise(marks)]


def synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], Any], on_gpu: bool, runs: int = 20) -> float:
    """Of so many runs after 3."""
    times = []
    for i in range(runs + 3):
        start = mark(on_gpu)
        run()
        times += between([start, mark(on_gpu)]) if i >= 3 else []
    return statistics.median(times) / 1000


class StepClock:
    """Times denoise steps as a pipeline's `callback_on_step_end`, and makes the host wait for none.

    Args:
        on_gpu: where the steps run.
        on_step: called with the pipeline at the end of each, on the host.
    """

    def __init__(self, on_gpu: bool, on_step: Callable[[Any], None] | None = None) -> None:
        self.on_gpu = on_gpu
        self.on_step = on_step
        self.ends: list[Any] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        self.ends.append(mark(self.on_gpu))
        if self.on_step is not None:
            self.on_step(pipe)
        return tensors

    def step_ms(self) -> list[float]:
        """Milliseconds between the ends of consecutive steps: the first step has no entry, since
        text encoding runs before it. Waits for the GPU."""
        return between(self.ends)
