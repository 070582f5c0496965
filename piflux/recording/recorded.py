"""Steps as CUDA graphs: their kernels are recorded once, from then on launched at once.

Where each rank has a small part to compute, the host can't issue kernels as fast as the GPU runs
them. A steady step, or one of `gather`, computes the same shapes each time, and finds its part and
its caches at fixed addresses, so one recording serves every later step and, since memory outlives
its stream, every later image. A sync step of `rotate` is recorded by itself, for each place in an
image at which it puts the parts together in another order.

A steady step of `rotate` holds no collective but the last and is one graph, and so is a step whose
keys and values travel by copy engines. Others are several, and between them their collectives are
started and waited for as ever. So the ranks need not agree on what they record: what they send to
each other is the same, recorded or not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from piflux.policies.schedule import Step
    from piflux.runtime.runtime import Runtime

log = logging.getLogger(__name__)

DEVICE = "cuda"
"""Where work can be recorded."""

Head = Callable[..., Sequence[Any]]
Eagerly = Callable[[Callable[[], object]], None]
"""Calls a function in its turn, between the kernels that were launched before it and after."""


def at_once(function: Callable[[], object]) -> None:
    """The turn of what is not recorded."""
    function()


class Site(NamedTuple):
    """Where recordings are made. They share their memory: what one returns is read before another
    runs.
    """

    stream: torch.cuda.Stream
    pool: torch.cuda.MemPool


def record(
    run: Callable[[Eagerly], Sequence[Any]], site: Site
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

    def eagerly(function: Callable[[], object]) -> None:
        nonlocal graph
        graph.capture_end()
        tape.append(function)
        graph = torch.cuda.CUDAGraph()
        begin()

    with torch.cuda.stream(site.stream):
        begin()
        try:
            outputs = run(eagerly)
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


class Replay:
    """One recorded step of one rank.

    Args:
        runtime: of the model.
        head: what to record.
        args: its arguments.
        moving: which of them are other tensors at each call. They are copied to fixed places; the
            others must be at the same addresses again.
        site: see `record`.
    """

    def __init__(
        self, runtime: Runtime, head: Head, args: Sequence[Any], moving: Sequence[int], site: Any
    ) -> None:
        self._moving = moving
        self._copies = [_span(args[i]).clone() for i in moving]
        held = list(args)
        for i, copy in zip(moving, self._copies, strict=True):
            held[i] = copy.as_strided(args[i].shape, args[i].stride(), 0)

        def run(eagerly: Eagerly) -> Sequence[Any]:
            with runtime.recording(eagerly):
                return head(*held)

        self._launch, self._outputs = record(run, site)
        self._held = held  # the recording reads their memory

    def __call__(self, args: Sequence[Any]) -> Sequence[Any]:
        """What `head` returns for `args`; the tensors are written over by the next call."""
        for i, copy in zip(self._moving, self._copies, strict=True):
            copy.copy_(_span(args[i]))
        self._launch()
        return self._outputs


class Recorded:
    """A graph's head, the work before its last collective, which is recorded.

    Args:
        runtime: of the model.
        head: the compiled head.
        moving: positions of its arguments that are other tensors at each call.
    """

    def __init__(self, runtime: Runtime, head: Head, moving: Sequence[int]) -> None:
        self._runtime = runtime
        self._head = head
        self._moving = moving
        self._fixed: _Fixed | None = None
        self._site: Site | None = None
        self._failed: set[Any] = set()  # kinds of steps

    def __call__(self, *args: Any) -> Sequence[Any]:
        runtime = self._runtime
        stream, step = runtime.now
        kind = _kind(runtime, step)
        if kind is None or kind in self._failed:
            return self._head(*args)
        if self._fixed is None:
            self._fixed = _Fixed(args, self._moving)
        memory, key = stream.memory, self._fixed.key(args)
        which = runtime.rank, memory.standing(runtime.rank), kind
        if memory.seen.get(which) != key:
            # Only what is the same twice in a row, so that nothing is recorded at each call. The
            # first time also makes what kernels need at their first run, and what slots send in.
            memory.replays.pop(which, None)
            memory.seen[which] = key
            return self._head(*args)
        if which not in memory.replays:
            if not _can_be_recorded(args, self._moving):
                return self._head(*args)
            try:
                replay = Replay(runtime, self._head, args, self._moving, self._shared_site())
            except RuntimeError as error:
                self._failed.add(kind)
                log.warning(
                    "%s steps are launched kernel by kernel, a recording failed: %s",
                    "sync" if step.sync else "steady",
                    error,
                )
                return self._head(*args)
            memory.replays[which] = replay
        return memory.replays[which](args)

    def _shared_site(self) -> Site | None:
        if self._site is None and torch.cuda.is_available():
            # Not a mere handle, which can't be used again once its last recording is gone.
            self._site = Site(torch.cuda.Stream(), torch.cuda.MemPool())
        return self._site


def _kind(runtime: Runtime, step: Step) -> Any:
    """What Python decides by in a step: one recording serves all of a kind. None: there is none.

    In a sync step `displaced` has the two versions of its caches change places, and virtual ranks,
    or ranks that compute it whole, run another graph.
    """
    schedule, ranks = runtime.schedule, runtime.ranks
    assert ranks is not None, "one rank alone has no steps of a kind"
    if not step.sync or schedule.policy == "gather":
        return ()
    if schedule.policy == "displaced" or schedule.sync != "gather" or len(ranks.here) > 1:
        return None
    return step.index == 0, step.parts


class _Fixed:
    """The arguments that don't move, by what has to be the same of them.

    Args:
        args: of any call. Which of them are tensors, and of what kind, is the same at each.
        moving: the positions of the others.
    """

    def __init__(self, args: Sequence[Any], moving: Sequence[int]) -> None:
        fixed = [i for i in range(len(args)) if i not in set(moving)]
        # Most are parameters, so many that each microsecond counts.
        self._plain = [i for i in fixed if isinstance(args[i], Tensor) and _is_plain(args[i])]
        self._other = [i for i in fixed if i not in set(self._plain)]

    def key(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Numbers by value, tensors by where they are."""
        plain = map(Tensor.data_ptr, [args[i] for i in self._plain])
        return (*plain, *[_value(args[i]) for i in self._other])


def _is_plain(x: Tensor) -> bool:
    return x.device.type == DEVICE and not is_traceable_wrapper_subclass(x)


def _value(x: Any) -> Any:
    if is_traceable_wrapper_subclass(x):
        names, _ = x.__tensor_flatten__()
        return tuple(_value(getattr(x, name)) for name in names)
    if not isinstance(x, Tensor):
        return x
    if x.device.type == DEVICE:
        return x.data_ptr()
    return x.item() if x.dim() == 0 else None  # such a step is not recorded


def _can_be_recorded(args: Sequence[Any], moving: Sequence[int]) -> bool:
    """Whether nothing is read from the host's memory but numbers that stay."""
    return all(
        x.device.type == DEVICE or x.dim() == 0 and i not in moving
        for i, x in enumerate(args)
        if isinstance(x, Tensor)
    )


def _span(x: Tensor) -> Tensor:
    """The memory from the first element of `x` to its last, as one dimension."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((extent,), (1,))
