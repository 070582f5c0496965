"""Finding out early, on all ranks, that they were not called with the same thing.

Ranks that hold different latents still run every collective and make a wrong image. So the first
step of each generation begins with one small all-gather of a fingerprint: versions, schedule, and
for each input its shape, dtype and a sketch of its content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.errors import RanksDisagree

PROJECTIONS = 8
# Relative to the norm. Rounding to bfloat16 moves an element by at most 2^-8 of itself, and so a
# projection by less than 0.4% of the norm; other noise moves one by about the norm itself.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Sketch:
    """Shape, dtype and a few random projections of a tensor (Johnson and Lindenstrauss, 1984)."""

    shape: tuple[int, ...]
    dtype: str
    norm: float
    projections: tuple[float, ...]

    @classmethod
    def of(cls, x: Tensor) -> Sketch:
        """The projections are onto cosines of incommensurate frequencies: the same on every
        device without a shared random generator. Synchronises host and device."""
        flat = x.detach().reshape(-1).float()
        index = torch.arange(flat.numel(), device=x.device, dtype=torch.float32)
        numbers = [flat.norm()]
        numbers += [flat @ torch.cos(index * math.sqrt(2 + k) + k) for k in range(PROJECTIONS)]
        norm, *projections = torch.stack(numbers).tolist()
        return cls(tuple(x.shape), str(x.dtype), norm, tuple(projections))

    def differs(self, other: Sketch) -> bool:
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return True
        scale = TOLERANCE * max(self.norm, other.norm)
        mine, theirs = (self.norm, *self.projections), (other.norm, *other.projections)
        # A NaN on either side makes `close` False.
        close = all(abs(a - b) <= scale for a, b in zip(mine, theirs, strict=True))
        return not close

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{self.dtype.removeprefix('torch.')}[{shape}], norm {self.norm:.6g}"


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What all ranks must have in common; values are strings or sketches."""
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
    if isinstance(first, Sketch):
        return any(not isinstance(x, Sketch) or first.differs(x) for x in others)
    return any(x != first for x in others)
