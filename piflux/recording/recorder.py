"""Makes CUDA graphs of what runs: pieces, between which functions of Python are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from piflux.memory.slots import Recorder


class Site(NamedTuple):
    """Where recordings are made. They share their memory: what one returns is read before another
    runs.
    """

    stream: torch.cuda.Stream
    pool: torch.cuda.MemPool


class SharedSite:
    """A site for the recordings of several programs, made when the first asks for it.

    Those of other shapes then use the memory again that recordings of an earlier image have left.
    """

    def __init__(self) -> None:
        self._site: Site | None = None

    def get(self) -> Site | None:
        """The site; None where there is no GPU."""
        if self._site is None and torch.cuda.is_available():
            # Not a mere handle, which can't be used again once its last recording is gone.
            self._site = Site(torch.cuda.Stream(), torch.cuda.MemPool())
        return self._site


def record(
    run: Callable[[Recorder], Sequence[Any]], site: Site
) -> tuple[Callable[[], None], Sequence[Any]]:
    """Record what `run` launches on the GPU, without running it.

    Args:
        run: reads and writes tensors that stay where they are. What it is to call whenever the
            recording is played, it hands to its argument, which does not call it.
        site: see `Site`.

    Returns:
        What launches it again, and the tensors that `run` returned, which are then written over.

    Raises:
        RuntimeError: what was launched can't be recorded.
    """
    tape: list[Callable[[], object]] = []
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a recording can't use the memory of steps that were not recorded

    graph = torch.cuda.CUDAGraph()

    def begin() -> None:
        # Of this thread alone: NCCL's watchdog polls events from its own.
        graph.capture_begin(cast(Any, site.pool.id), capture_error_mode="thread_local")
        tape.append(graph.replay)

    def call(function: Callable[[], object]) -> None:
        nonlocal graph
        graph.capture_end()
        tape.append(function)
        graph = torch.cuda.CUDAGraph()
        begin()

    with torch.cuda.stream(site.stream):
        begin()
        try:
            outputs = run(call)
        except BaseException:
            # Ended all the same, that others may begin; but the error to tell of is the first.
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()

    def play() -> None:
        for entry in tape:
            entry()

    return play, outputs
