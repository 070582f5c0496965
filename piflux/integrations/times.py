"""What pipelines make of a scheduler's timesteps before they hand them to the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Rounding included.
_FORMS: tuple[Callable[[Tensor, torch.dtype], Tensor], ...] = (
    lambda t, dtype: t.to(dtype),  # Stable Diffusion 3, Wan
    lambda t, dtype: t.to(dtype) / 1000,  # FLUX, Qwen-Image
    lambda t, dtype: (t / 1000).to(dtype),
    lambda t, dtype: ((1000 - t) / 1000).to(dtype),  # Z-Image
)


def shown(timesteps: Tensor, clock: Tensor) -> list[Tensor]:
    """The times of all steps, in each form in which a clock may show them.

    Args:
        timesteps: (steps,): a scheduler's, or those that the model is called with.
        clock: the model's input that tells the time, for its dtype and device.

    Returns:
        Each (steps,), like `clock`.
    """
    return [form(timesteps.to(clock.device), clock.dtype) for form in _FORMS]
