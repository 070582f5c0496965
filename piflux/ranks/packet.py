"""Several tensors that go to all ranks in one all-gather."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from piflux.parts import wide
from piflux.ranks.protocol import Ranks

# Where a tensor's share of a packet's row begins, in bytes: kernels read so many at once.
ALIGNMENT = 16


class Packet:
    """Memory for several tensors that go to all ranks in one all-gather, once or over and over.

    An attention's keys and values are gathered so: each collective has a latency and a launch of
    its own, and a step of FLUX.1 has 57 attentions. What belongs to one token lies together, so
    that the tokens of all ranks, one rank's after the other's, are tensors of one stride.

    Args:
        ranks: who sends and receives.
        like: the tensors, each (.., part tokens, width), in any layout; those of the other ranks
            are like them.

    Attributes:
        recordable: see `Gathering`.
    """

    def __init__(self, ranks: Ranks, like: Sequence[Tensor]) -> None:
        self._shapes = [x.shape for x in like]
        self._dtypes = [x.dtype for x in like]
        self._device = like[0].device
        tokens = like[0].shape[-2]
        sizes = [x.nbytes // tokens for x in like]
        padded = [size + -size % ALIGNMENT for size in sizes]
        starts = [sum(padded[:i]) for i in range(len(sizes))]
        self._row = sum(padded)
        self._columns = [slice(a, a + size) for a, size in zip(starts, sizes, strict=True)]
        self._gathering = ranks.persistent_gather(tokens * self._row, self._device)
        self.recordable = self._gathering.recordable

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it can hold these."""
        return (
            [x.shape for x in tensors] == self._shapes
            and [x.dtype for x in tensors] == self._dtypes
            and tensors[0].device == self._device
        )

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Copy in what is to be sent; `tensors` may then be written over."""
        for place, x in zip(self._opened(self._gathering.piece), tensors, strict=True):
            to, of = wide(place, x)
            to.copy_(of)

    def start(self) -> None:
        """Send what was written."""
        self._gathering.start()

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        self._gathering.wait()

    def read(self) -> Sequence[Sequence[Tensor]]:
        """What has arrived: for each of the tensors, one per rank, by rank."""
        return list(zip(*map(self._opened, self._gathering.pieces), strict=True))

    def read_whole(self) -> Sequence[Tensor] | None:
        """What has arrived: each of the tensors with the tokens of all ranks, rank by rank.

        None where they don't lie together.
        """
        whole = self._gathering.whole
        return None if whole is None else self._opened(whole)

    def _opened(self, packed: Tensor) -> list[Tensor]:
        """The tensors that a packet, or several that lie together, holds."""
        rows = packed.view(-1, self._row)
        return [
            rows[:, column].view(dtype).view(-1, *shape[:-2], shape[-1]).movedim(0, -2)
            for column, shape, dtype in zip(self._columns, self._shapes, self._dtypes, strict=True)
        ]
