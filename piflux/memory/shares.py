"""Weights of which each rank holds a share, and that are gathered where they are needed.

The weights of a block lie side by side in a buffer, of which every rank keeps an N-th. Two buffers
take turns: while a block reads its weights in one, the next block's arrive in the other. Parameters
are views of their buffer for good, so what was recorded finds them; what they hold is right only
from the wait for their group until the next one is gathered there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

BUFFERS = 2

UNPROVEN = (
    "Sharing weights is proven on CPUs only so far: on GPUs compare a picture with one that is "
    "drawn with whole weights before you rely on it"
)
"""Said where they are: what was not seen to the end is not to be relied on unseen."""

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


@dataclass(eq=False)
class Group:
    """Weights of which every rank has a share.

    Attributes:
        weights: parameters.
        places: the plain tensors that they are made of, with where each begins in the buffer.
        buffer: which.
        share: what this rank holds, (bytes,) of uint8.
    """

    weights: Sequence[Tensor]
    places: Sequence[tuple[Tensor, int]]
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
        layouts = [_layout(x) for x in runs]
        self._device = layouts[0][0][0][0].device
        self._count = max(self._padded(count) for _, count in layouts)
        self._make_buffers()
        self._members = self.ranks.members
        _SHARED.update(dict.fromkeys(x for run in runs for y in run for x in y))
        rank, size = self.ranks.rank, self.ranks.size
        for number, (x, (places, count)) in enumerate(zip(gathered, layouts, strict=True)):
            whole = self._buffers[x.buffer].memory
            for tensor, begin in places:
                waited = tensor in self.aside
                if not waited and tensor.nbytes > tensor.untyped_storage().nbytes():
                    self._refuse_moved()  # from where it was put aside
                there = _view(whole, tensor, begin)
                there.copy_(self.aside.take(tensor))
                # Others were compared before. Of those in 8 bits the scales tell.
                if waited and there.is_floating_point() and there.element_size() > 1:
                    name = f"weight {len(self._unchecked)}, of group {number}"
                    self._unchecked[name] = Norm(norm_of(there))
            pieces = whole[: self._padded(count)].view(size, -1)
            weights = [weight for run in runs[number] for weight in run]
            group = Group(weights, places, x.buffer, pieces[rank].clone())
            self._place(group)
            self._groups.append(group)
            self._of |= dict.fromkeys(map(id, weights), group)
        self.aside.bring()
        self.complete = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what whole weights took is for others to have

    def _padded(self, count: int) -> int:
        """Bytes that can be cut into as many pieces as there are ranks."""
        return count + -count % (self.ranks.size * ALIGNMENT)

    def _make_buffers(self) -> None:
        self._epoch = self.ranks.epoch
        self._buffers = []  # first, for their memory to be free
        count = self._count // self.ranks.size
        self._buffers = [self.ranks.filled(count, self._device) for _ in range(BUFFERS)]

    def _place(self, group: Group) -> None:
        """Make the group's weights views of its buffer."""
        whole = self._buffers[group.buffer].memory
        for tensor, begin in group.places:
            tensor.data = _view(whole, tensor, begin)

    def _check_place(self) -> None:
        group = self._groups[0]
        tensor, begin = group.places[0]
        whole = self._buffers[group.buffer].memory
        if tensor.data_ptr() != whole.data_ptr() + begin:
            self._refuse_moved()

    def _is_in_a_buffer(self, weight: Tensor) -> bool:
        memories = {x.memory.untyped_storage().data_ptr() for x in self._buffers}
        return any(x.untyped_storage().data_ptr() in memories for x in plain(weight))

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
        self._under_way: int | None = None

    def start(self, number: int, recorder: Recorder) -> None:
        """Start to gather a group's weights; what the device was given before still reads what its
        buffer held."""
        group = self._groups[number]
        if group is not None:
            buffer = self._buffers[group.buffer]
            _turn(buffer, recorder)(lambda: buffer.fill(group.share))
        self._under_way = number

    def wait(self, number: int, recorder: Recorder) -> None:
        """What comes next on the device finds the group's weights."""
        if self._under_way != number:
            self.start(number, recorder)
        self._under_way = None
        group = self._groups[number]
        if group is not None:
            buffer = self._buffers[group.buffer]
            _turn(buffer, recorder)(buffer.wait)


def _turn(buffer: Filled, recorder: Recorder) -> Recorder:
    return at_once if buffer.recordable else recorder


def _layout(runs: Sequence[Sequence[Tensor]]) -> tuple[list[tuple[Tensor, int]], int]:
    """Plain tensors with where each begins in a buffer, and how many bytes there are.

    Weights of one run adjoin, and of quantized ones each of the tensors that they wrap.
    """
    places: list[tuple[Tensor, int]] = []
    at = 0
    for run in runs:
        for column in zip(*map(plain, run), strict=True):
            at += -at % ALIGNMENT
            for tensor in column:
                places.append((tensor, at))
                at += tensor.nbytes
    return places, at


def _view(whole: Tensor, like: Tensor, begin: int) -> Tensor:
    """A tensor like another one, from a byte of a buffer on."""
    there = whole[begin : begin + like.nbytes].view(like.dtype)
    return there.as_strided(like.shape, like.stride(), there.storage_offset())
