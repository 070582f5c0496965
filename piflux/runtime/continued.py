"""A stream's predictions of the steps that are not computed.

From step to step a prediction moves on a smooth path, as keys and values do. So the last two
computed ones are remembered, and where a step is skipped the last is moved on along the line
through both, by the same share of their change as keys and values are (`piflux.memory.ages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piflux.memory.ages import BELIEF, FARTHEST
from piflux.policies.masks import NEEDED


class Continued:
    """The last two predictions that were computed, with their times. Waits for no device."""

    def __init__(self) -> None:
        self._known = 0
        self._times: list[Tensor] = []
        self._last: Sequence[Any] = ()
        self._before: Sequence[Any] = ()

    @property
    def is_ready(self) -> bool:
        """Whether as many are known as it takes."""
        return self._known >= NEEDED

    def forget(self) -> None:
        """What was computed says nothing of what comes."""
        self._known = 0

    def keep(self, now: Tensor, outputs: Sequence[Any]) -> None:
        """A step was computed.

        Args:
            now: its time, a scalar.
            outputs: what the model's graph returned, gathered, which others may write over.
        """
        fresh = [x.clone() if isinstance(x, Tensor) else x for x in outputs]
        if not self._known:
            self._times, self._before = [now, now], fresh
        else:
            # A solver that comes to one time twice (Heun) has a better prediction at the second.
            again = now == self._times[1]
            self._times = [torch.where(again, self._times[0], self._times[1]), now]
            self._before = [
                torch.where(again.to(x.device), x, y) if _moves(y) else y
                for x, y in zip(self._before, self._last, strict=True)
            ]
        self._last = fresh
        self._known += 1

    def at(self, now: Tensor) -> tuple[Any, ...]:
        """The outputs as they are at the time `now`; what is no number in floating point stays."""
        before, last = self._times
        gap = before - last
        ahead = (BELIEF * (last - now) / gap).clamp(-FARTHEST, FARTHEST)
        ahead = torch.where(gap == 0, 0.0, ahead)
        return tuple(_moved(x, y, ahead) for x, y in zip(self._before, self._last, strict=True))


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _moved(before: Any, last: Any, ahead: Tensor) -> Any:
    if not isinstance(last, Tensor):
        return last
    if not _moves(last):
        return last.clone()
    first, second = last.float(), before.float()
    return (first + ahead.to(last.device) * (first - second)).to(last.dtype)
