"""Where the windows of a segment lie, and how parts are cut out and put together again.

A tensor's token dimension is a run of segments, in order; `lengths` are their full lengths. Part
`p` of the dimension is the concatenation of every segment's window `p`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
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


def part_index(lengths: Sequence[int], world_size: int, part: int) -> Tensor:
    """Where each token of part `part` stands in the whole: (part tokens,) in int64, on the CPU."""
    return torch.cat(
        [torch.arange(w.full, w.full + w.length) for w in windows(lengths, world_size, part)]
    )


@lru_cache
def _kept(lengths: tuple[int, ...], world_size: int) -> tuple[Window, ...]:
    """Of every part of every segment, in the whole's order, what no later part computes as well.

    A window's `length` may be 0. Kept, since a step asks for it at every attention.
    """
    layout = [list(windows(lengths, world_size, part)) for part in range(world_size)]
    found, end = [], 0
    for segment, length in enumerate(lengths):
        end += length
        stops = [layout[part][segment].full for part in range(1, world_size)] + [end]
        for part, stop in enumerate(stops):
            full, local, _ = layout[part][segment]
            found.append(Window(full, local, stop - full))
    return tuple(found)


def join(
    pieces: Sequence[Tensor],
    parts: Sequence[int],
    dim: int,
    lengths: Sequence[int],
    whole: Tensor | None = None,
) -> Tensor:
    """The whole dimension from every part; `pieces[i]` is part `parts[i]`.

    Tokens in an overlap were computed twice; the later part's stand.

    Args:
        whole: where to write it, contiguous; None for new memory.
    """
    shape, count = pieces[0].shape, len(parts)
    dim %= len(shape)
    if whole is None:
        whole = pieces[0].new_empty((*shape[:dim], sum(lengths), *shape[dim + 1 :]))
    rows, width = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    given = [piece.reshape(rows, piece.shape[dim], width) for piece in pieces]
    target, *given = wide(whole.view(rows, -1, width), *given)
    ordered: list[Tensor] = [target] * count
    for part, piece in zip(parts, given, strict=True):
        ordered[part] = piece
    runs = [
        ordered[i % count].narrow(1, w.local, w.length)
        for i, w in enumerate(_kept(tuple(lengths), count))
    ]
    # One op, and on a GPU one kernel: a copy for each window is N launches a segment, for keys and
    # for values, at every attention.
    torch.cat(runs, 1, out=target)
    return whole


def wide(*tensors: Tensor) -> Sequence[Tensor]:
    """The same memory as the widest integers that all are made of: a copy then moves fewer."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(_holds(x, dtype.itemsize) for x in tensors):
            return [x.view(dtype) for x in tensors]
    return tensors


def _holds(x: Tensor, size: int) -> bool:
    """Whether the last dimension of `x` is in memory one run of units of so many bytes."""
    *strides, last = x.stride()
    steps = (x.shape[-1], x.storage_offset(), *strides)
    return (
        x.element_size() <= size
        and last == 1
        and all(n * x.element_size() % size == 0 for n in steps)
    )
