"""What `piflux bench` knows before it imports torch: models, rows, and what a row comes to."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import Literal

MODELS = ("flux.1", "flux.2", "flux.3", "qwen-image", "z-image", "wan")
"""Architectures that are timed at full size; `models.ARCHITECTURES` has them."""

EARLY = 3
"""Images before the timed ones: the first compiles, and what comes for the second time is
recorded."""

FLUX_1 = ("flux.1",)


@dataclass(frozen=True)
class Way:
    """A way to run a model; `rows.ROWS` does.

    Attributes:
        alone: whether it is one rank's.
        needs_gpu: whether it has no CPU counterpart.
        models: those that it can run.
        quantizes: whether it can run with blocks' weights in 8 bits.
        shares: whether with weights that are shared over the ranks.
        fewest_steps: an image of fewer it can't draw.
    """

    alone: bool = False
    needs_gpu: bool = False
    models: tuple[str, ...] = MODELS
    quantizes: bool = False
    shares: bool = False
    fewest_steps: int = 2


ONE = Way(alone=True, quantizes=True)
SPLIT = Way(quantizes=True, shares=True)
SHARED = Way(quantizes=True)


WAYS = {
    "eager": ONE,
    "compiled": replace(ONE, needs_gpu=True),
    "compiled-blocks": replace(ONE, needs_gpu=True),
    "piflux-1": ONE,
    "piflux-1-18": replace(ONE, fewest_steps=18),
    "piflux-1-fp8": Way(alone=True, needs_gpu=True, models=FLUX_1),
    "gather": SPLIT,
    "gather-shared": SHARED,
    "gather-18": replace(SPLIT, fewest_steps=18),
    "rotate": SPLIT,
    "rotate-shared": SHARED,
    "rotate-18": replace(SPLIT, fewest_steps=18),
    "rotate-fp8": Way(needs_gpu=True, models=FLUX_1, shares=True),
    "rotate-fp8-18": Way(needs_gpu=True, models=FLUX_1, shares=True, fewest_steps=18),
    "rotate-recompute": SPLIT,
    "rotate-int8": SPLIT,
    "rotate-int4": SPLIT,
    "displaced": SPLIT,
    "displaced-int8": SPLIT,
    "displaced-int4": SPLIT,
    "diffusers-ulysses": Way(needs_gpu=True),
    "diffusers-ring": Way(needs_gpu=True),
    "xdit-ulysses": Way(needs_gpu=True, models=FLUX_1),
    "xdit-pipefusion": Way(needs_gpu=True, models=FLUX_1),
    "para-attention": Way(needs_gpu=True, models=FLUX_1),
}


@dataclass(frozen=True)
class Settings:
    """One row's run; everything that its processes need to know.

    Attributes:
        row: its name.
        ranks: its processes.
        height: pixels, a multiple of 16; likewise `width`.
        steps: denoise steps an image.
        images: timed images, after some that are not.
        further: other numbers of steps. Of each, as many images are timed.
        model: one of MODELS.
        quantize: what the blocks' weights are in, beside what the row's name says.
        shard_weights: whether ranks share the weights, likewise.
    """

    row: str
    ranks: int
    height: int
    width: int
    steps: int
    images: int
    further: tuple[int, ...] = ()
    model: str = "flux.1"
    quantize: Literal["none", "fp8", "int8"] = "none"
    shard_weights: bool = False


@dataclass
class Result:
    """What a row's rank 0 measured.

    Attributes:
        step_ms: every timed step of every timed image, in milliseconds.
        image_s: seconds of each image's steps from the very first image on, compilation included;
            the last ones are the timed images.
        peak_memory_gib: most GPU memory allocated in timed steps, what piflux's ranks share
            included; None on CPUs.
        sync_bytes: what a rank sends in a sync step, where piflux runs.
        steady_bytes: and in any other step.
        further_s: seconds of the timed images, by each other number of steps.
        error: why there is nothing else.
    """

    row: str
    ranks: int
    step_ms: list[float] = field(default_factory=list)
    image_s: list[float] = field(default_factory=list)
    peak_memory_gib: float | None = None
    sync_bytes: int | None = None
    steady_bytes: int | None = None
    further_s: dict[int, list[float]] = field(default_factory=dict)
    error: str | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def spread_ms(self) -> float:
        """Between the 10th and the 90th percentile."""
        if len(self.step_ms) < 2:
            return 0.0
        deciles = statistics.quantiles(self.step_ms, n=10, method="inclusive")
        return deciles[-1] - deciles[0]
