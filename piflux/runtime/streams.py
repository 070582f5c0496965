"""Which generation a call belongs to, and whether it goes on with it.

A call of a diffusion transformer has inputs of three roles: *latents* change from step to step,
*clocks* (timestep, guidance: at most one dimension) say where on the way the step is, and
*conditions* (prompt embeddings, ids) stay. A *stream* is the run of calls with the same conditions:
a conditional and an unconditional pass are two streams of one generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from piflux.runtime.slots import Ages, ChangeSlot, Slot, clock_scale, log_snr

# Neighbouring steps of one image correlate (flow matching from sigma 1 to 0.5: 0.7), another
# image's noise does not. Below this a call is not taken for the next step.
LATENT_CORRELATION = 0.5


@dataclass(frozen=True)
class Roles:
    """Positions of a graph's inputs by role; parameters have none."""

    latents: tuple[int, ...]
    clocks: tuple[int, ...]
    conditions: tuple[int, ...]
    names: dict[int, str]

    def pick(self, role: Sequence[int], args: Sequence[Any]) -> list[Tensor]:
        return [args[i] for i in role if isinstance(args[i], Tensor)]

    def inputs(self, args: Sequence[Any]) -> dict[str, Tensor]:
        """Every input that has a role, by name."""
        order = sorted((*self.latents, *self.clocks, *self.conditions))
        return {self.names[i]: args[i] for i in order if isinstance(args[i], Tensor)}


class Seen:
    """A tensor as it was at an earlier call, to tell whether a later one is the same."""

    def __init__(self, x: Tensor) -> None:
        # Inference tensors count no versions, so only a copy can show a change made in place.
        self.version = None if x.is_inference() else x._version
        self.tensor = x.clone() if self.version is None else x

    def again(self, x: Tensor) -> bool:
        """Free if `x` is the very tensor, unmodified; else compares contents, which waits for the
        device."""
        # Written over, the tensor no longer tells what it was: `x` may be a view of it.
        if self.version is not None and self.tensor._version != self.version:
            return False
        if x is self.tensor:
            return True
        if x.shape != self.tensor.shape or x.dtype != self.tensor.dtype:
            return False
        return x.device == self.tensor.device and bool((x == self.tensor).all())


@dataclass
class Stream:
    """The calls of one generation that share conditions, and their cache slots.

    Attributes:
        graph: the compiled graph that they run.
        conditions: what they share.
        used: the number of the latest call.
        index: the latest step, -1 before the first.
        slots: by rank and attention.
        clocks: the latest values, where the generation is inferred.
        latents: likewise.
        direction: the way in which the clocks move, 0 as long as they have not.
    """

    graph: object
    conditions: list[Seen]
    used: int
    index: int = -1
    slots: dict[tuple[int, int], Slot | ChangeSlot] = field(default_factory=dict)
    clocks: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    direction: int = 0
    _scales: list[Tensor] = field(default_factory=list)
    # Of all slots whose tokens are of the same segments; by rank and the segments' lengths.
    _ages: dict[tuple[int, tuple[int, ...]], Ages] = field(default_factory=dict)
    # Those that know of this step, with what the first slot's exchange found.
    _told: dict[tuple[int, tuple[int, ...]], Tensor] = field(default_factory=dict)
    _now: Tensor = field(default_factory=lambda: torch.tensor(0.0))

    def restart(self) -> None:
        self.index, self.direction = -1, 0
        self.slots.clear()

    def tick(self, clocks: Sequence[Tensor]) -> None:
        """A step begins at these clocks."""
        if self.index == 0:
            self._scales = [clock_scale(clock) for clock in clocks]
        self._now = log_snr(clocks, self._scales, self.index)
        self._told.clear()

    def synced(self, rank: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
        """This step computes all tokens of the segments `lengths` that `rank` remembers.

        Returns:
            (tokens,) of bool: whether a token's first version was its newer one.
        """
        key = rank, lengths
        if key not in self._told:
            now = self._now.to(device)
            if self.index == 0:
                self._ages[key] = Ages(lengths, now)
            self._told[key] = self._ages[key].renew(now)
        return self._told[key]

    def ages(
        self, rank: int, lengths: tuple[int, ...], world_size: int, part: int, keep: bool
    ) -> tuple[Ages, Tensor]:
        """The ages that look at this step's time, and the sources of `part`.

        Args:
            keep: whether the part's new versions alone are remembered; else all, as they arrive.
        """
        key = rank, lengths
        ages = self._ages[key]
        sources = ages.sources(world_size, part)
        if key not in self._told:
            now = self._now.to(sources.device)
            ages.look(now)
            if keep:
                ages.renew_part(world_size, part, now)
            else:
                ages.renew(now)
            self._told[key] = sources
        return ages, sources

    def observe(self, clocks: Sequence[Tensor], latents: Sequence[Tensor]) -> bool:
        """Whether this call is certainly the next step after the last observed one.

        It is if every clock that moved went the way the generation's clocks go and at least one
        moved, and the latents resemble the last ones. Synchronises host and device.
        """
        now = [float(value) for clock in clocks for value in clock.reshape(-1).tolist()]
        moves = {(a > b) - (a < b) for a, b in zip(now, self.clocks, strict=False)} - {0}
        way = moves.pop() if len(moves) == 1 and len(now) == len(self.clocks) else 0
        goes_on = (
            way != 0
            and self.direction in (0, way)
            and len(latents) == len(self.latents)
            and all(_resemble(a, b) for a, b in zip(latents, self.latents, strict=True))
        )
        self.direction = way if goes_on else 0
        self.clocks = now
        self.latents = [x.clone() for x in latents]
        return goes_on


def _resemble(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    x, y = a.reshape(-1).float(), b.reshape(-1).float()
    return bool(F.cosine_similarity(x, y, dim=0) >= LATENT_CORRELATION) or bool((x == y).all())
