"""What rides on the gather of a prediction: where a rank is, and with what.

Ranks agree on an image's first step. Later one may leave a step out, or a callback, an adapter or
the hardware may change what it computes with: all collectives fit together, and the picture is
wrong on all ranks. So each prediction comes with a few numbers, which are compared where they
arrive: at once on CPUs, on a GPU into a flag that is read at the image's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from piflux.ranks.agreement import TOLERANCE, cosines

PROJECTIONS = 4
CLOCKS = 4
"""So many of the clocks' numbers are told as they are, the others in a sum."""

PLACES = ("image", "call of the image", "step")
"""Where a rank is: whole numbers."""

NUMBERS = len(PLACES) + CLOCKS + 1
"""That are compared exactly; those of the latents follow."""

BYTES = 8 * (NUMBERS + 1 + PROJECTIONS + 1)
"""The last number is a wish, in which ranks may differ."""


def header_of(
    places: Sequence[int],
    clocks: Sequence[Tensor],
    latents: Sequence[Tensor],
    *,
    wish: bool = False,
) -> Tensor:
    """(numbers,) in float64, made without waiting for the device.

    Args:
        places: see PLACES.
        clocks: of the call.
        latents: likewise, at least one, and what else is another at each step.
        wish: whether this rank wants the image to end; see `wishes`.
    """
    device = latents[0].device
    pinned = device.type == "cuda"  # else the host might wait
    where = torch.tensor([*places, wish], dtype=torch.float64, pin_memory=pinned)
    where = where.to(device, non_blocking=True)
    times = [x.reshape(-1).to(device, torch.float64) for x in clocks]
    time = torch.cat([*times, torch.zeros(CLOCKS, dtype=torch.float64, device=device)])
    first, rest = time[:CLOCKS], time[CLOCKS:].sum().reshape(1)
    found = [
        torch.cat([x.norm().reshape(1), _cosines(PROJECTIONS, x.numel(), device) @ x])
        for x in (latent.detach().reshape(-1).to(device, torch.float32) for latent in latents)
    ]
    return torch.cat([where[:-1], first, rest, torch.stack(found).sum(0).double(), where[-1:]])


_cosines = lru_cache(maxsize=4)(cosines)  # some megabytes each


def apart(headers: Tensor) -> Tensor:
    """Whether any of (ranks, numbers) differs from the first: one flag, on their device."""
    exact, latents = headers[:, :NUMBERS], headers[:, NUMBERS:-1]
    scale = TOLERANCE * latents[:, :1].max()
    near = (latents - latents[0]).abs() <= scale
    return ~(_same(exact, exact[0]).all() & (near | _same(latents, latents[0])).all())


def wishes(headers: Tensor) -> Tensor:
    """Whether any of (ranks, numbers) wants the image to end: one flag, on their device."""
    return (headers[:, -1] != 0).any()


def _same(a: Tensor, b: Tensor) -> Tensor:
    """By element; what is not a number on both sides is the same."""
    return (a == b) | (a.isnan() & b.isnan())


def tell(headers: Tensor) -> str:
    """What differs, rank by rank."""
    lines = ["the ranks are not at the same point of the same image:"]
    names = [*PLACES, *["time"] * CLOCKS, "sum of other times"]
    told = {name: headers[:, i] for i, name in reversed(list(enumerate(names)))}
    for i in range(len(PLACES), NUMBERS):
        if not _same(headers[:, i], headers[0, i]).all():
            told["time"] = headers[:, i]
            break
    told["norm of the latents"] = headers[:, NUMBERS]
    for k in range(1, PROJECTIONS + 1):
        told[f"projection {k} of the latents"] = headers[:, NUMBERS + k]
    scale = TOLERANCE * headers[:, NUMBERS].max()
    for name, values in told.items():
        exact = "latents" not in name
        near = (values - values[0]).abs() <= (0 if exact else scale)
        if not (near | _same(values, values[0])).all():
            numbers = ", ".join(f"{x:.9g}" for x in values.tolist())
            lines.append(f"  {name}: {numbers}, by rank")
    lines.append(
        "Every rank must make the same calls with the same latents, prompts and other inputs: the "
        "same steps, callbacks that change the same, the same interrupts"
    )
    return "\n".join(lines)
