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
        self._first = [_mean(clock) for clock in clocks]
        self._scales = [torch.where(x > 1, SHOWN, 1.0) for x in self._first]
        self._are_sigma = [
            (x >= 0) & (x <= SHOWN) & clock.is_floating_point()
            for x, clock in zip(self._first, clocks, strict=True)
        ]

    def at(self, clocks: Sequence[Tensor], step: int) -> Tensor:
        """The time of a step, a scalar in float32.

        Args:
            clocks: as they are in it.
            step: its index, by which time falls for a model without clocks.
        """
        if not clocks:
            return torch.tensor(-float(step))
        known = zip(map(_mean, clocks), self._first, self._scales, self._are_sigma, strict=True)
        return torch.stack(
            [
                torch.where(is_sigma, _log_snr(x / scale), x - first)
                for x, first, scale, is_sigma in known
            ]
        ).sum()


def _mean(clock: Tensor) -> Tensor:
    # What no time can be, such as a guidance without bound, stands still.
    return clock.float().mean().nan_to_num(0.0, posinf=0.0, neginf=0.0)


def _log_snr(sigma: Tensor) -> Tensor:
    sigma = sigma.clamp(0, 1)
    return ((sigma + SOFTENING) / (1 - sigma + SOFTENING)).log()
