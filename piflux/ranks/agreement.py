"""Finding out early, on all ranks, that they were not called with the same thing.

Ranks that hold different latents still run every collective and make a wrong image. So the first
step of each generation begins with one small all-gather of a fingerprint: versions, schedule, and
for each input its shape, dtype and a sketch of its content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from piflux.errors import RanksDisagree

PROJECTIONS = 8
# Relative to the norm. Rounding to bfloat16 moves an element by at most 2^-8 of itself, and so a
# projection by less than 0.4% of the norm; other noise moves one by about the norm itself.
TOLERANCE = 0.02

# What stands for minus infinity in masks is of any size up to the largest of its dtype. The squares
# of what is smaller than this have a sum in float32.
HUGE = 1e15

AT_ONCE = 1 << 21
"""Elements that are projected at once: their cosines take 64 MB."""

ACCURACY = 1e-5
"""Of a norm in float32, as kernels of different machines sum it up."""

MOST_TOLD = 8
"""Things that differ are told with each rank's value; of more only how many."""

FEW = 8
"""A tensor of so few elements says when, or how: a timestep, a guidance. Ranks have them alike."""


@runtime_checkable
class Approximate(Protocol):
    """What ranks may know a little differently from each other, by rounding."""

    def differs(self, other: Any) -> bool:
        """From another of its kind by more than that."""


class Norm(float):
    """A weight's norm, which may differ by rounding."""

    accuracy = ACCURACY

    def differs(self, other: Norm) -> bool:
        """By more; also where one alone is infinite, or not a number."""
        if self == other or math.isnan(self) and math.isnan(other):
            return False
        finite = math.isfinite(self) and math.isfinite(other)
        return not finite or abs(self - other) > self.accuracy * max(self, other)


class Roughly(Norm):
    """The norm of what was computed, which rounding may have changed many times."""

    accuracy = TOLERANCE

    def __str__(self) -> str:
        return f"norm {self:.6g}"


class Constants(str):
    """A checksum of a graph's constants; '' if one is a symbol, as it may be on one rank alone."""

    def differs(self, other: Constants) -> bool:
        return bool(self and other and self != other)


def norm_of(x: Tensor) -> Tensor:
    """Of all numbers, in float32, without a copy of those that kernels read as they are."""
    native = x.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return torch.linalg.vector_norm(x if native else x.float(), dtype=torch.float32)


@dataclass(frozen=True)
class Sketch:
    """Shape, dtype and a few random projections of a tensor (Johnson and Lindenstrauss, 1984).

    Attributes:
        numbers: all elements of a tensor of few, which are compared exactly.
        usual: norm and projections of what is neither huge nor not a number.
        huge: likewise of the signs and sizes, in powers of 2, of huge and infinite elements.
        nan: likewise of where elements are not a number.
    """

    shape: tuple[int, ...]
    dtype: str
    numbers: tuple[float, ...]
    usual: tuple[float, ...]
    huge: tuple[float, ...]
    nan: tuple[float, ...]

    @classmethod
    def of(cls, x: Tensor) -> Sketch:
        """See `sketches`."""
        return sketches({"": x})[""]

    def differs(self, other: Sketch) -> bool:
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return True
        if not all(map(_same, self.numbers, other.numbers)):
            return True
        mine, theirs = (self.usual, self.huge, self.nan), (other.usual, other.huge, other.nan)
        return not all(map(_close, mine, theirs))

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        told = f"{self.dtype.removeprefix('torch.')}[{shape}]"
        if self.shape and 0 in self.shape:
            return told
        if self.numbers:
            return f"{told}, {', '.join(f'{x:.9g}' for x in self.numbers)}"
        huge = ", some huge or infinite" if self.huge[0] else ""
        nan = f", {self.nan[0] ** 2:.0f} not a number" if self.nan[0] else ""
        return f"{told}, norm {self.usual[0]:.6g}{huge}{nan}"


def sketches(tensors: Mapping[str, Tensor]) -> dict[str, Sketch]:
    """A sketch of each tensor, which does not depend on the others.

    The host waits once for each device that they are on.
    """
    flat = {name: x.detach().reshape(-1) for name, x in tensors.items()}
    numbers: dict[str, Tensor] = {}
    for device in {x.device for x in flat.values()}:
        here = {name: x for name, x in flat.items() if x.device == device}
        numbers |= zip(here, _numbers(list(here.values())), strict=True)
    return {name: _sketch(x, numbers[name]) for name, x in tensors.items()}


def _sketch(x: Tensor, numbers: Tensor) -> Sketch:
    shape, dtype = tuple(x.shape), str(x.dtype)
    if x.numel() <= FEW:
        return Sketch(shape, dtype, tuple(numbers.tolist()), (), (), ())
    return Sketch(shape, dtype, (), *map(tuple, numbers.view(3, -1).tolist()))


def _numbers(flat: Sequence[Tensor]) -> Sequence[Tensor]:
    """What sketches of (elements,) each, on one device, are made of: float64, on the host."""
    longest = min(max(map(len, flat)), AT_ONCE)
    waves = cosines(PROJECTIONS, longest, flat[0].device)
    found = [x.double() if len(x) <= FEW else _projected(_kinds(x), waves) for x in flat]
    return torch.cat(found).cpu().split([len(x) for x in found])


def _kinds(x: Tensor) -> Tensor:
    """(3, elements): what is neither huge nor not a number, signs and sizes of what is huge, and
    ones for what is not a number; zeros elsewhere."""
    x, zero = x.float(), torch.zeros((), device=x.device)
    size = x.abs()
    # An infinity counts as twice the largest number.
    signed = size.log2().clamp(max=129).copysign(x)
    usual, huge = torch.where(size <= HUGE, x, zero), torch.where(size > HUGE, signed, zero)
    return torch.stack([usual, huge, x.isnan()])


def _projected(rows: Tensor, waves: Tensor) -> Tensor:
    """Each row's norm and projections: (rows * (1 + PROJECTIONS),) in float64.

    Args:
        rows: (rows, elements).
        waves: the first `AT_ONCE` of the cosines, or as many as there are elements, or more.
    """

    def sums(waves: Tensor, start: int) -> Tensor:
        return torch.stack([waves @ x for x in rows[:, start : start + waves.shape[1]]])

    count = rows.shape[1]
    found = sums(waves[:, :count], 0)
    for start in range(AT_ONCE, count, AT_ONCE):
        more = min(count - start, AT_ONCE)
        found += sums(cosines(PROJECTIONS, more, rows.device, start), start)
    return torch.cat([rows.norm(dim=1, keepdim=True), found], 1).reshape(-1).double()


def cosines(projections: int, count: int, device: torch.device, start: int = 0) -> Tensor:
    """(projections, count), of incommensurate frequencies, at the integers from `start`.

    The same on every device, without a shared random generator. Doesn't wait for the device.
    """
    index = torch.arange(start, start + count, device=device, dtype=torch.float32)
    k = torch.arange(projections, device=device, dtype=torch.float32)[:, None]
    return (index * (k + 2).sqrt()).add_(k).cos_()


def _same(a: float, b: float) -> bool:
    return a == b or math.isnan(a) and math.isnan(b)


def _close(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """Of two norms and projections."""
    scale = TOLERANCE * max(mine[:1] + theirs[:1], default=0.0)
    return all(abs(a - b) <= scale for a, b in zip(mine, theirs, strict=True))


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What all ranks must have in common; values are strings or `Approximate`."""
    common: dict[str, Any] = {"torch version": torch.__version__}
    common |= {n: x if isinstance(x, Approximate) else str(x) for n, x in settings.items()}
    common |= sketches({f"input {name}": x for name, x in inputs.items()})
    return common


def check_agreement(everyones: Sequence[Mapping[str, Any]]) -> None:
    """Compare fingerprints, which all ranks have of all: every rank raises, or none.

    Raises:
        RanksDisagree: naming what differs, at most `MOST_TOLD` things, and its value on every rank.
    """
    names = list(dict.fromkeys(name for theirs in everyones for name in theirs))
    differing = [name for name in names if _differs([theirs.get(name) for theirs in everyones])]
    if differing:
        lines = ["the ranks were not called with the same thing:"]
        for name in differing[:MOST_TOLD]:
            lines.append(f"  {name}")
            lines += [f"    rank {r}: {theirs.get(name)}" for r, theirs in enumerate(everyones)]
        if len(differing) > MOST_TOLD:
            lines.append(f"  and {len(differing) - MOST_TOLD} more")
        lines.append(
            "Give every rank the same prompt, the same starting noise (one seed for all), the same "
            "settings, hooks and code, and the same torch version."
        )
        error = RanksDisagree("\n".join(lines))
        error.on_all_ranks = True
        raise error


def _differs(values: list[Any]) -> bool:
    first, *others = values
    if isinstance(first, Approximate):
        return any(type(x) is not type(first) or first.differs(x) for x in others)
    return any(x != first for x in others)
