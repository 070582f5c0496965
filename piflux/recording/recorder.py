"""Makes CUDA graphs of what runs: pieces, between which functions of Python are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakSet

import torch

from piflux.memory.slots import Recorder


class Site:
    """Where recordings are made. They share their memory: what one returns is read before another
    runs.
    """

    def __init__(self) -> None:
        # Not a mere handle, which can't be used again once its last recording is gone.
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.MemPool()
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._is_used = False

    @property
    def is_spent(self) -> bool:
        """Whether recordings were made here, and all of them are gone.

        The memory of the host's side of a pool ends with the last recording in it, and another one
        can't be made there (torch 2.11: "use_count > 0 INTERNAL ASSERT FAILED").
        """
        return self._is_used and not self._graphs

    def graph(self) -> torch.cuda.CUDAGraph:
        """A new one, to be recorded here."""
        graph = torch.cuda.CUDAGraph()
        self._graphs.add(graph)
        self._is_used = True
        return graph


class SharedSite:
    """A site for the recordings of several programs, made when the first asks for it.

    Those of other shapes then use the memory again that recordings of an earlier image have left.
    """

    def __init__(self) -> None:
        self._site: Site | None = None

    def get(self) -> Site | None:
        """The site; None where there is no GPU."""
        if torch.cuda.is_available() and (self._site is None or self._site.is_spent):
            self._site = Site()
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

    graph = site.graph()

    def begin() -> None:
        # Of this thread alone: NCCL's watchdog polls events from its own.
        graph.capture_begin(cast(Any, site.pool.id), capture_error_mode="thread_local")
        tape.append(graph.replay)

    def call(function: Callable[[], object]) -> None:
        nonlocal graph
        graph.capture_end()
        tape.append(function)
        graph = site.graph()
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
