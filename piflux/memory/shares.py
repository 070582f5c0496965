"""Weights of which each rank holds a share, and that are gathered where they are needed.

The weights of a block lie side by side in a buffer, of which every rank keeps an N-th. Two buffers
take turns: while a block reads its weights in one, the next block's arrive in the other. Parameters
are views of their buffer for good, so what was recorded finds them; what they hold is right only
from the wait for their group until the next one is gathered there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from piflux.errors import CannotCapture, CompileError, WeightsLost
from piflux.memory.aside import Aside, plain
from piflux.memory.slots import Recorder, at_once
from piflux.ranks.agreement import Norm, norm_of
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.protocol import Filled

ALIGNMENT = 256
"""Where weights begin in a buffer, in bytes, unless they adjoin others."""

UNEVEN = 1.25
"""How many times the mean the longest share of a group may be, for no weight to be cut. The rank
that holds a weight then reads it where it is. One that is cut has to lie in one piece in the
buffer, and a rank's copy within its own memory is a kernel that others wait for: on two H200 it
made steps of FLUX.1 8 % longer (docs/experiments.md)."""

BUFFERS = 2

_SHARED = WeakIdKeyDictionary()
"""The weights that are shared, whatever model they are of."""


def is_shared(weight: Tensor) -> bool:
    """Whether a parameter is a view of a buffer, in which other weights come and go."""
    return weight in _SHARED


class Gathered(Protocol):
    """Weights that a program gathers together.

    Attributes:
        runs: their positions among the program's inputs; those of one run adjoin in memory.
        buffer: which of the buffers they are gathered into.
    """

    @property
    def runs(self) -> Sequence[Sequence[int]]: ...

    @property
    def buffer(self) -> int: ...


@dataclass(frozen=True)
class Layout:
    """Where the weights of a group lie in a buffer, and who holds which bytes.

    Attributes:
        places: the plain tensors that the weights are made of, with where each begins.
        length: of each rank's place in the buffer, in bytes.
        lengths: of what each rank holds, which its place begins with.
        is_cut: whether a weight may lie in the places of two ranks.
    """

    places: Sequence[tuple[Tensor, int]]
    length: int
    lengths: Sequence[int]
    is_cut: bool


@dataclass(eq=False)
class Group:
    """Weights of which every rank has a share.

    Attributes:
        weights: parameters.
        layout: where they lie in the buffer.
        buffer: which.
        share: what this rank holds, (bytes,) of uint8.
    """

    weights: Sequence[Tensor]
    layout: Layout
    buffer: int
    share: Tensor


class Shares:
    """A model's weights, as one of its ranks holds them.

    Args:
        ranks: among whom they are shared.

    Attributes:
        aside: what is on the host until it is shared.
        complete: whether the weights are shared.
    """

    def __init__(self, ranks: ProcessRanks) -> None:
        self.ranks = ranks
        self.aside = Aside()
        self._groups: list[Group] = []
        self._of: dict[int, Group] = {}
        self._buffers: list[Filled] = []
        self._count = 0  # bytes of a buffer
        self._members: tuple[int, ...] = ()
        self._epoch = -1
        self.complete = False
        self._unchecked: dict[str, Norm] = {}

    @property
    def nbytes(self) -> int:
        """What this rank holds: its shares, and the buffers."""
        return sum(group.share.nbytes for group in self._groups) + BUFFERS * self._count

    def holds(self, weight: Tensor) -> bool:
        """Whether a parameter's numbers are not in its memory, or not always."""
        return id(weight) in self._of or any(x in self.aside for x in plain(weight))

    def check_members(self) -> None:
        """Raises WeightsLost, on all ranks that are left, if one that held a share is gone."""
        if not self._members:
            return
        there = self.ranks.members
        lost = [rank for rank in self._members if rank not in there]
        if lost:
            raise WeightsLost(
                f"{' and '.join(f'rank {rank}' for rank in lost)} held a share of the model's "
                "weights, which went with it: this image and later ones can't be drawn with what "
                "is left. Load the model anew on the ranks that are to go on; with whole weights "
                "on each (shard_weights=False) ranks go on without a lost one",
                lost,
            )

    def ready(self, args: Sequence[Any], gathered: Sequence[Gathered]) -> Fetching:
        """Before a program's call: its weights are shared, and can be fetched.

        The first call shares them, and brings from the host what stays whole; all ranks make it
        together.

        Args:
            args: of the program's call, among them its parameters.
            gathered: which of them are gathered together, in order.

        Raises:
            CannotCapture: somebody gave the weights other memory.
            CompileError: graphs of one model can't share its weights alike.
            RanksDisagree: ranks came with different weights.
        """
        if not self._members:
            self._share(args, gathered)
        elif not self.complete:
            raise CannotCapture(
                "the model's weights were being shared over the ranks when something went wrong, "
                "so that some are neither here nor there: load it anew"
            )
        elif self._epoch != self.ranks.epoch:
            self._make_buffers()
            for group in self._groups:
                self._place(group)
        if self._unchecked:
            self.ranks.agree(self._unchecked)
            self._unchecked = {}
        self._check_place()
        return Fetching([self._group_of(args, x) for x in gathered], self._buffers)

    def _group_of(self, args: Sequence[Any], gathered: Gathered) -> Group | None:
        """None where nothing is shared, as of adapters that were loaded later on."""
        weights = [args[i] for run in gathered.runs for i in run]
        if any(id(x) not in self._of and self._is_in_a_buffer(x) for x in weights):
            self._refuse_moved()
        groups = {self._of[id(x)] for x in weights if id(x) in self._of}
        if len(groups) > 1 or any(group.buffer != gathered.buffer for group in groups):
            raise CompileError(
                "one graph of the model reads together what another one reads apart, so that its "
                "weights can't be shared over the ranks: pass shard_weights=False"
            )
        return groups.pop() if groups else None

    def _share(self, args: Sequence[Any], gathered: Sequence[Gathered]) -> None:
        runs = [[[args[i] for i in run] for run in x.runs] for x in gathered]
        layouts = _layouts(runs, self.ranks.size)
        self._device = layouts[0].places[0][0].device
        self._count = self.ranks.size * max(layout.length for layout in layouts)
        self._make_buffers()
        self._members = self.ranks.members
        _SHARED.update(dict.fromkeys(x for run in runs for y in run for x in y))
        rank = self.ranks.rank
        for number, (x, layout) in enumerate(zip(gathered, layouts, strict=True)):
            whole = self._buffers[x.buffer].memory
            for tensor, begin in layout.places:
                waited = tensor in self.aside
                if not waited and tensor.nbytes > tensor.untyped_storage().nbytes():
                    self._refuse_moved()  # from where it was put aside
                there = _view(whole, tensor, begin)
                there.copy_(self.aside.take(tensor))
                # Others were compared before. Of those in 8 bits the scales tell.
                if waited and there.is_floating_point() and there.element_size() > 1:
                    name = f"weight {len(self._unchecked)}, of group {number}"
                    self._unchecked[name] = Norm(norm_of(there))
            weights = [weight for run in runs[number] for weight in run]
            own = whole[rank * layout.length :][: layout.lengths[rank]]
            group = Group(weights, layout, x.buffer, own.clone())
            self._place(group)
            self._groups.append(group)
            self._of |= dict.fromkeys(map(id, weights), group)
        self.aside.bring()
        self.complete = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what whole weights took is for others to have

    def _make_buffers(self) -> None:
        self._epoch = self.ranks.epoch
        self._buffers = []  # first, for their memory to be free
        count = self._count // self.ranks.size
        self._buffers = [self.ranks.filled(count, self._device) for _ in range(BUFFERS)]

    def _place(self, group: Group) -> None:
        """Make the group's weights views of where they are read."""
        for tensor, begin in group.layout.places:
            memory, at = self._where(group, begin)
            tensor.data = _view(memory, tensor, at)

    def _where(self, group: Group, begin: int) -> tuple[Tensor, int]:
        """The memory that a weight is read in, and where it begins there."""
        own = begin - self.ranks.rank * group.layout.length
        if not group.layout.is_cut and 0 <= own < group.layout.length:
            return group.share, own
        return self._buffers[group.buffer].memory, begin

    def _check_place(self) -> None:
        group = self._groups[0]
        tensor, begin = group.layout.places[0]
        memory, at = self._where(group, begin)
        if tensor.data_ptr() != memory.data_ptr() + at:
            self._refuse_moved()

    def _is_in_a_buffer(self, weight: Tensor) -> bool:
        """Or in a share."""
        memories = [x.memory for x in self._buffers] + [x.share for x in self._groups]
        ours = {x.untyped_storage().data_ptr() for x in memories}
        return any(x.untyped_storage().data_ptr() in ours for x in plain(weight))

    @staticmethod
    def _refuse_moved() -> NoReturn:
        raise CannotCapture(
            "the model's weights are shared over the ranks, and were moved or replaced since: load "
            "it anew, and move it before piflux.parallelize, not after (enable_model_cpu_offload "
            "moves it with each image)"
        )


class Fetching:
    """One program's weights by its own numbers; see `piflux.runtime.ops.fetch`."""

    def __init__(self, groups: Sequence[Group | None], buffers: Sequence[Filled]) -> None:
        self._groups = groups
        self._buffers = buffers
        self._due: int | None = None
        self._under_way: int | None = None

    def expect(self, number: int) -> None:
        """A group is gathered next, when `start` is called."""
        self._due = number

    def start(self, recorder: Recorder) -> None:
        """Start to gather the weights that are due, if any; what the device was given before still
        reads what their buffer held."""
        if self._due is None:
            return
        self._under_way, self._due = self._due, None
        group = self._groups[self._under_way]
        if group is not None:
            buffer, layout = self._buffers[group.buffer], group.layout
            fill = partial(buffer.fill, group.share, layout.length, own=layout.is_cut)
            _turn(buffer, recorder)(fill)

    def wait(self, number: int, recorder: Recorder) -> None:
        """What comes next on the device finds the group's weights."""
        if self._under_way != number:
            self.expect(number)
            self.start(recorder)
        self._under_way = None
        group = self._groups[number]
        if group is not None:
            buffer = self._buffers[group.buffer]
            _turn(buffer, recorder)(buffer.wait)


def _turn(buffer: Filled, recorder: Recorder) -> Recorder:
    return at_once if buffer.recordable else recorder


def _layouts(groups: Sequence[Sequence[Sequence[Tensor]]], size: int) -> list[Layout]:
    """Of each group's runs of weights: whole weights for each of `size` ranks, where that is even
    enough (UNEVEN), and else the bytes in so many equal pieces.

    Weights of one run adjoin, and of quantized ones each of the tensors that they wrap. All ranks
    come to the same.
    """
    held = [0] * size
    found = []
    for runs in groups:
        columns = [column for run in runs for column in zip(*map(plain, run), strict=True)]
        layout = _whole(columns, held)
        mean = sum(layout.lengths) / size
        if layout.length > UNEVEN * mean:
            layout = _cut(columns, size)
        held = [a + b for a, b in zip(held, layout.lengths, strict=True)]
        found.append(layout)
    return found


def _whole(columns: Sequence[Sequence[Tensor]], held: Sequence[int]) -> Layout:
    """Whole columns for each rank: the largest first, to who has least, and held least before."""
    owned: list[list[tuple[Tensor, int]]] = [[] for _ in held]
    lengths = [0] * len(held)
    counts = [_aligned(sum(x.nbytes for x in column)) for column in columns]
    for i in sorted(range(len(columns)), key=lambda i: -counts[i]):
        rank = min(range(len(held)), key=lambda r: (lengths[r], held[r]))
        at = lengths[rank]
        for tensor in columns[i]:
            owned[rank].append((tensor, at))
            at += tensor.nbytes
        lengths[rank] += counts[i]
    length = max(lengths)
    places = [(x, rank * length + at) for rank, own in enumerate(owned) for x, at in own]
    return Layout(places, length, lengths, is_cut=False)


def _cut(columns: Sequence[Sequence[Tensor]], size: int) -> Layout:
    """Columns one behind the other, cut into pieces of one length."""
    places: list[tuple[Tensor, int]] = []
    at = 0
    for column in columns:
        at = _aligned(at)
        for tensor in column:
            places.append((tensor, at))
            at += tensor.nbytes
    length = _aligned(-(-at // size))
    return Layout(places, length, [length] * size, is_cut=True)


def _aligned(count: int) -> int:
    return count + -count % ALIGNMENT


def _view(whole: Tensor, like: Tensor, begin: int) -> Tensor:
    """A tensor like another one, from a byte of a buffer on."""
    there = whole[begin : begin + like.nbytes].view(like.dtype)
    return there.as_strided(like.shape, like.stride(), there.storage_offset())
