"""Finding out early, on all ranks, that they were not called with the same thing.

Ranks that hold different latents still run every collective and make a wrong image. So the first
step of each generation begins with one small all-gather of a fingerprint: versions, schedule, and
for each input its shape, dtype and a sketch of its content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.errors import RanksDisagree

PROJECTIONS = 8
# Relative to the norm. Rounding to bfloat16 moves an element by at most 2^-8 of itself, and so a
# projection by less than 0.4% of the norm; other noise moves one by about the norm itself.
TOLERANCE = 0.02

# What stands for minus infinity in masks is of any size up to the largest of its dtype. The squares
# of what is smaller than this have a sum in float32.
HUGE = 1e15


@runtime_checkable
class Approximate(Protocol):
    """What ranks may know a little differently from each other, by rounding."""

    def differs(self, other: Any) -> bool:
        """From another of its kind by more than that."""


@dataclass(frozen=True)
class Sketch:
    """Shape, dtype and a few random projections of a tensor (Johnson and Lindenstrauss, 1984)."""

    shape: tuple[int, ...]
    dtype: str
    norm: float
    projections: tuple[float, ...]
    huge: tuple[float, ...]  # likewise, norm first, of the signs of huge and infinite elements

    @classmethod
    def of(cls, x: Tensor) -> Sketch:
        """The projections are onto cosines of incommensurate frequencies: the same on every
        device without a shared random generator. Synchronises host and device."""
        flat = x.detach().reshape(-1).float()
        index = torch.arange(flat.numel(), device=x.device, dtype=torch.float32)
        is_huge = flat.abs() > HUGE  # a NaN is not
        both = torch.stack([flat.masked_fill(is_huge, 0), flat.sign().masked_fill(~is_huge, 0)])
        numbers = [both.norm(dim=1)]
        numbers += [both @ torch.cos(index * math.sqrt(2 + k) + k) for k in range(PROJECTIONS)]
        (norm, *projections), huge = torch.stack(numbers, 1).tolist()
        return cls(tuple(x.shape), str(x.dtype), norm, tuple(projections), tuple(huge))

    def differs(self, other: Sketch) -> bool:
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return True
        mine, theirs = (self.norm, *self.projections), (other.norm, *other.projections)
        return not (_close(mine, theirs) and _close(self.huge, other.huge))

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        huge = f", {self.huge[0] ** 2:.0f} huge or infinite" if self.huge[0] else ""
        return f"{self.dtype.removeprefix('torch.')}[{shape}], norm {self.norm:.6g}{huge}"


def _close(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """Of two norms and projections; a NaN on either side is close to nothing."""
    scale = TOLERANCE * max(mine[0], theirs[0])
    return all(abs(a - b) <= scale for a, b in zip(mine, theirs, strict=True))


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What all ranks must have in common; values are strings or `Approximate`."""
    common: dict[str, Any] = {"torch version": torch.__version__}
    common |= {name: str(value) for name, value in settings.items()}
    common |= {f"input {name}": Sketch.of(x) for name, x in inputs.items()}
    return common


def check_agreement(mine: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Compare fingerprints over `group`; every rank raises, or none.

    Raises:
        RanksDisagree: naming each thing that differs and its value on every rank.
    """
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, dict(mine), group=group)
    names = list(dict.fromkeys(name for theirs in everyones for name in theirs))
    differing = [name for name in names if _differs([theirs.get(name) for theirs in everyones])]
    if differing:
        lines = ["the ranks were not called with the same thing:"]
        for name in differing:
            lines.append(f"  {name}")
            lines += [f"    rank {r}: {theirs.get(name)}" for r, theirs in enumerate(everyones)]
        lines.append(
            "Give every rank the same prompt, the same starting noise (one seed for all), the same "
            "settings and the same torch version."
        )
        raise RanksDisagree("\n".join(lines))


def _differs(values: list[Any]) -> bool:
    first, *others = values
    if isinstance(first, Approximate):
        return any(type(x) is not type(first) or first.differs(x) for x in others)
    return any(x != first for x in others)
