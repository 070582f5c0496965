"""The time of a step, by which remembered keys and values age.

Which time makes keys and values change evenly depends on how the model was trained. On the demo's
model, which is of flow matching, their steps are of nearly even length if time is the log-SNR; over
sigma they are ten times as long close to pure noise as half way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The log-SNR is infinite at sigma 0 and 1. It ends where this much of the other is mixed in.
SOFTENING = 0.01

# Pipelines show a model sigma, the share of noise in the latent, or so many times that.
SHOWN = 1000.0


class Times:
    """The times of one image's steps. Does not wait for the device.

    A clock is an input of at most one number a picture. One in floating point that begins within 0
    and 1, or 0 and `SHOWN`, is taken for flow matching's sigma; its time is
    log(sigma / (1 - sigma)), which falls from step to step. Any other, such as the number of a step
    of another kind of diffusion, is the time itself, counted from its first value. Clocks that
    stand still, such as guidance, add a constant, which differences lose.

    Args:
        clocks: as they are in the first step.
    """

    def __init__(self, clocks: Sequence[Tensor]) -> None:
        if not clocks:
            return
        self._first = _means(clocks)
        self._scales = torch.where(self._first > 1, SHOWN, 1.0)
        self._are_sigma = (self._first >= 0) & (self._first <= SHOWN)
        for is_sigma, clock in zip(self._are_sigma, clocks, strict=True):
            if not clock.is_floating_point():
                is_sigma.fill_(False)

    def at(self, clocks: Sequence[Tensor], step: int) -> Tensor:
        """The time of a step, a scalar in float32.

        Args:
            clocks: as they are in it.
            step: its index, by which time falls for a model without clocks.
        """
        if not clocks:
            return torch.tensor(-float(step))
        means = _means(clocks)
        sigmas, moved = _log_snr(means / self._scales), means - self._first
        return torch.where(self._are_sigma, sigmas, moved).sum()


def _means(clocks: Sequence[Tensor]) -> Tensor:
    """(clocks,) in float32."""
    # What no time can be, such as a guidance without bound, stands still.
    means = torch.stack([clock.float().mean() for clock in clocks])
    return means.nan_to_num(0.0, posinf=0.0, neginf=0.0)


def _log_snr(sigma: Tensor) -> Tensor:
    sigma = sigma.clamp(0, 1)
    return ((sigma + SOFTENING) / (1 - sigma + SOFTENING)).log()
