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
        """The projections are onto cosines of incommensurate frequencies: the same on every
        device without a shared random generator. Synchronises host and device."""
        flat = x.detach().reshape(-1)
        shape, dtype = tuple(x.shape), str(x.dtype)
        if flat.numel() <= FEW:
            numbers = tuple(map(float, flat.double().tolist()))
            return cls(shape, dtype, numbers, (), (), ())
        flat = flat.float()
        index = torch.arange(flat.numel(), device=x.device, dtype=torch.float32)
        is_nan, is_huge = flat.isnan(), flat.abs() > HUGE
        # An infinity counts as twice the largest number.
        size = flat.abs().log2().clamp(max=129)
        three = torch.stack(
            [
                flat.masked_fill(is_huge | is_nan, 0),
                (flat.sign() * size).masked_fill(~is_huge, 0),
                is_nan.float(),
            ]
        )
        found = [three.norm(dim=1)]
        found += [three @ torch.cos(index * math.sqrt(2 + k) + k) for k in range(PROJECTIONS)]
        return cls(shape, dtype, (), *map(tuple, torch.stack(found, 1).tolist()))

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


def _same(a: float, b: float) -> bool:
    return a == b or math.isnan(a) and math.isnan(b)


def _close(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """Of two norms and projections."""
    scale = TOLERANCE * max(mine[:1] + theirs[:1], default=0.0)
    return all(abs(a - b) <= scale for a, b in zip(mine, theirs, strict=True))


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What all ranks must have in common; values are strings or `Approximate`."""
    common: dict[str, Any] = {"torch version": torch.__version__}
    common |= {name: str(value) for name, value in settings.items()}
    common |= {f"input {name}": Sketch.of(x) for name, x in inputs.items()}
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
