"""Where the windows of a segment lie, and how parts are cut out and put together again.

A tensor's token dimension is a run of segments, in order; `lengths` are their full lengths. Part
`p` of the dimension is the concatenation of every segment's window `p`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def part_length(length: int, world_size: int) -> int:
    """ceil(length / world_size): all parts of a segment are equally long."""
    return (length + world_size - 1) // world_size


class Window(NamedTuple):
    """`length` tokens that stand at `full` in the whole dimension and at `local` in the part."""

    full: int
    local: int
    length: int


def windows(lengths: Sequence[int], world_size: int, part: int) -> Iterator[Window]:
    """One window per segment.

    Window `part` of a segment starts at min(part * ceil, length - ceil): where `world_size` does
    not divide the length, the last windows overlap their neighbours instead of being padded.
    """
    full = local = 0
    for length in lengths:
        size = part_length(length, world_size)
        yield Window(full + min(part * size, length - size), local, size)
        full += length
        local += size


def places(lengths: Sequence[int], world_size: int, part: int) -> Tensor:
    """Where each token of part `part` stands in the whole: (part tokens,) in int64, on the CPU."""
    return torch.cat(
        [torch.arange(w.full, w.full + w.length) for w in windows(lengths, world_size, part)]
    )


def write(
    whole: Tensor, dim: int, lengths: Sequence[int], world_size: int, part: int, piece: Tensor
) -> None:
    """Write part `part` into `whole` in place."""
    for w in windows(lengths, world_size, part):
        whole.narrow(dim, w.full, w.length).copy_(piece.narrow(dim, w.local, w.length))


def join(
    pieces: Sequence[Tensor],
    parts: Sequence[int],
    dim: int,
    lengths: Sequence[int],
    whole: Tensor | None = None,
) -> Tensor:
    """The whole dimension from every part; `pieces[i]` is part `parts[i]`.

    Tokens in an overlap were computed twice; the later part's stand.
    """
    if whole is None:
        shape = list(pieces[0].shape)
        shape[dim] = sum(lengths)
        whole = pieces[0].new_empty(shape)
    for part, piece in sorted(zip(parts, pieces, strict=True), key=lambda pair: pair[0]):
        write(whole, dim, lengths, len(parts), part, piece)
    return whole
