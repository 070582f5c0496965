"""Steps as CUDA graphs: their kernels are recorded once, from then on launched at once.

Where each rank has a small part to compute, the host can't issue kernels as fast as the GPU runs
them. A steady step, or one of `gather`, computes the same shapes each time, and finds its part and
its caches at fixed addresses, so one recording serves every later step and, since memory outlives
its stream, every later image. A sync step of `rotate` is recorded by itself, for each place in an
image at which it puts the parts together in another order.

A steady step of `rotate` holds no collective but the last and is one graph, and so is a step whose
keys and values travel by copy engines, also where the next step reads them. Others are several, and
between them their collectives are started and waited for as ever. So the ranks need not agree on
what they record: what they send to each other is the same, recorded or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from piflux.memory.slots import Recorder
from piflux.policies.step import StepContext, current
from piflux.recording.recorder import SharedSite, record

log = logging.getLogger(__name__)

DEVICE = "cuda"
"""Where work can be recorded."""

TURNS = False
"""Whether ranks of one process record. They take turns in the midst of what they recorded, and with
CUDA graphs that went wrong on two H200 (2026-11-29, torch 2.11): wrong pictures with one pool of
memory for all of them, failed recordings with a pool for each. What they show is no speed."""

EARLY = 3
"""Streams whose steps are recorded in their first image: as many as guidance has passes a step."""

Head = Callable[..., Sequence[Any]]
KeyOf = Callable[[StepContext], Hashable | None]


class RecordingKey(NamedTuple):
    """What one recording serves: Python decides by nothing else in a step.

    Attributes:
        rank: whose part is computed.
        kind: of step, as the policy has it.
        standing: of the rank's slots; see `Memory.standing`.
        made: slots of the rank, so that no recording outlives those that it knows.
    """

    rank: int
    kind: Hashable
    standing: tuple[tuple[object, ...], ...]
    made: int


class _Replay:
    """One recorded step of one rank.

    Args:
        context: of the step.
        head: what to record.
        args: its arguments.
        moving: which of them are other tensors at each call. They are copied to fixed places; the
            others must be at the same addresses again.
        site: see `record`.
    """

    def __init__(
        self,
        context: StepContext,
        head: Head,
        args: Sequence[Any],
        moving: Sequence[int],
        site: Any,
    ) -> None:
        self._moving = moving
        self._copies = [_span(args[i]).clone() for i in moving]
        held = list(args)
        for i, copy in zip(moving, self._copies, strict=True):
            held[i] = copy.as_strided(args[i].shape, args[i].stride(), 0)

        def run(recorder: Recorder) -> Sequence[Any]:
            with context.recording(recorder):
                made = head(*held)
                context.close()
                return made

        self._launch, self._outputs = record(run, site)
        self._held = held  # the recording reads their memory
        self._left = context.memory.standing(context.rank)

    def __call__(self, context: StepContext, args: Sequence[Any]) -> Sequence[Any]:
        """What `head` returns for `args`; the tensors are written over by the next call."""
        for i, copy in zip(self._moving, self._copies, strict=True):
            copy.copy_(_span(args[i]))
        self._launch()
        context.memory.stand(context.rank, self._left)
        return self._outputs


class _Recordings:
    """What one memory keeps of a head.

    Args:
        early: whether to record each kind of step the first time that it comes.

    Attributes:
        seen: by key, where its arguments were at the last step that was not recorded.
        replays: by key.
    """

    def __init__(self, early: bool) -> None:
        self.early = early
        self.seen: dict[RecordingKey, Any] = {}
        self.replays: dict[RecordingKey, _Replay] = {}

    def forget_older(self, rank: int, made: int) -> None:
        """What was recorded before the rank's last slot was made has another one's address."""
        for kept in (self.seen, self.replays):
            for key in [key for key in kept if key.rank == rank and key.made != made]:
                del kept[key]


class Recorded:
    """A program's head, the work before its last collective, which is recorded.

    Args:
        head: the compiled head.
        moving: positions of its arguments that are other tensors at each call.
        kind: the kind of the step under way, None if it can't be recorded.
        site: where recordings are made.
    """

    def __init__(self, head: Head, moving: Sequence[int], kind: KeyOf, site: SharedSite) -> None:
        self._head = head
        self._moving = moving
        self._kind = kind
        self._fixed: _Fixed | None = None
        self._site = site
        self._memories = 0
        self._failed: dict[Hashable, bool] = {}  # kinds of steps, and whether they are sync

    def __call__(self, *args: Any) -> Sequence[Any]:
        context = current()
        kind = self._kind(context)
        if kind is None or kind in self._failed:
            return self._head(*args)
        if self._fixed is None:
            self._fixed = _Fixed(args, self._moving)
        memory, fixed = context.memory, self._fixed.key(args)
        recordings = memory.kept(self, self._recordings)
        key = self._key(context, kind)
        recordings.forget_older(key.rank, key.made)
        if recordings.seen.get(key) == fixed:
            if key not in recordings.replays:
                self._record(context, key, recordings, args)
            replay = recordings.replays.get(key)
            return self._head(*args) if replay is None else replay(context, args)
        # The first time runs as it is: it makes what kernels need at their first run, the slots,
        # and what they send in. It is recorded when it comes again, so that nothing is recorded at
        # each call; but in the image that compiled, which took far longer, at once.
        at_once = recordings.early and key not in recordings.seen
        recordings.replays.pop(key, None)
        made = self._head(*args)
        context.close()  # before another step of the same context is recorded
        after = memory.standing(context.rank)
        if memory.made[key.rank] != key.made:  # new slots, which stand as another image finds them
            key = self._key(context, kind)
            recordings.forget_older(key.rank, key.made)
        recordings.seen[key] = self._fixed.key(args)  # the step may have moved weights together
        if at_once:
            memory.stand(context.rank, key.standing)
            self._record(context, key, recordings, args)
            memory.stand(context.rank, after)
        return made

    def _key(self, context: StepContext, kind: Hashable) -> RecordingKey:
        memory, rank = context.memory, context.rank
        return RecordingKey(rank, kind, memory.standing(rank), memory.made[rank])

    def _recordings(self) -> _Recordings:
        self._memories += 1
        return _Recordings(early=self._memories <= EARLY)

    def _record(
        self,
        context: StepContext,
        key: RecordingKey,
        recordings: _Recordings,
        args: Sequence[Any],
    ) -> None:
        """Record the step, without running it, if it can be."""
        if not _can_be_recorded(args, self._moving):
            return
        try:
            recordings.replays[key] = _Replay(
                context, self._head, args, self._moving, self._site.get()
            )
        except RuntimeError as error:
            context.memory.stand(key.rank, key.standing)
            sync = context.step.sync
            if sync not in self._failed.values():
                log.warning(
                    "%s steps are launched kernel by kernel, a recording failed: %s",
                    "sync" if sync else "steady",
                    error,
                )
            self._failed[key.kind] = sync


class _Fixed:
    """The arguments that don't move, by what has to be the same of them.

    Args:
        args: of any call. Which of them are tensors, and of what kind, is the same at each.
        moving: the positions of the others.
    """

    def __init__(self, args: Sequence[Any], moving: Sequence[int]) -> None:
        fixed = [i for i in range(len(args)) if i not in set(moving)]
        # Most are parameters, so many that each microsecond counts. What quantized ones wrap has
        # the same names at each call, as Dynamo sees to; to ask for them takes 10 us a parameter.
        self._bare = [i for i in fixed if not is_traceable_wrapper_subclass(args[i])]
        self._wrapped = [(i, attrgetter(name)) for i in fixed for name in _inside(args[i])]
        parts = self._parts(args)
        self._plain = [i for i, x in enumerate(parts) if _is_on_device(x)]
        self._other = [i for i, x in enumerate(parts) if not _is_on_device(x)]

    def key(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Numbers by value, tensors by where they are."""
        parts = self._parts(args)
        plain = map(Tensor.data_ptr, [parts[i] for i in self._plain])
        return (*plain, *[_value(parts[i]) for i in self._other])

    def _parts(self, args: Sequence[Any]) -> list[Any]:
        bare = [args[i] for i in self._bare]
        return bare + [read(args[i]) for i, read in self._wrapped]


def _inside(x: Any) -> list[str]:
    """The names of the tensors that a quantized weight wraps, dotted where one wraps others."""
    if not is_traceable_wrapper_subclass(x):
        return []
    names, _ = x.__tensor_flatten__()
    return [
        path
        for name in names
        for path in [f"{name}.{rest}" for rest in _inside(getattr(x, name))] or [name]
    ]


def _is_on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == DEVICE


def _value(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
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
