"""What a quality promises: a schedule, and how far its pictures were measured to drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from piflux.policies.masks import FEWEST_STEPS, NEEDED, Compute, mask_of, read_compute
from piflux.policies.schedule import Schedule, read_settings
from piflux.serving.jobs import Quality

MEASURED_STEPS = 28
"""Denoise steps of the images that LPIPS was measured on."""


@dataclass(frozen=True)
class Promise:
    """One quality's.

    Attributes:
        computed: of MEASURED_STEPS steps; others compute as large a share.
        lpips: to one rank's picture of all steps, measured; None if nobody has.
        source: where that number is from.
        settings: of `parallelize`, but for `compute`.
        mask: which steps are computed of images of just as many.
    """

    computed: int
    lpips: float | None
    source: str
    settings: Mapping[str, Any] = field(default_factory=lambda: {"policy": "gather"})
    mask: str | None = None

    def compute(self, steps: int) -> Compute:
        """As `parallelize` takes it, of an image of so many steps.

        All of them where they are too few for any to be left out.
        """
        if self.mask is not None and len(self.mask) == steps:
            return self.mask
        if self.computed >= MEASURED_STEPS or steps < FEWEST_STEPS:
            return "all"
        return max(NEEDED, round(steps * self.computed / MEASURED_STEPS))

    def count(self, steps: int) -> int:
        """How many steps are computed of so many."""
        mask = mask_of(self.compute(steps), steps)
        assert mask is not None, "a mask is only taken for as many steps"
        return mask.count("x")

    def drift(self, steps: int) -> float | None:
        """LPIPS of an image of so many steps: 0 where nothing is left out or remembered."""
        exact = self.settings["policy"] == "gather" and self.count(steps) == steps
        return 0.0 if exact else self.lpips

    def tell(self) -> str:
        """In words."""
        share = "all steps" if self.computed >= MEASURED_STEPS else f"{self.computed} of 28 steps"
        drift = "drift not measured"
        if self.lpips is not None:
            drift = f"LPIPS {self.lpips:.6f}".rstrip("0") if self.lpips else "exact"
        return f"{self.settings['policy']}, {share} computed, {drift}"


MEASURED = "benchmarks/results/2026-11-29-serving-qualities-cpu.json"
"""The demo's model, 16 pictures of 28 steps on one rank: mean LPIPS to those of all steps."""

PROMISES: Mapping[Quality, Promise] = {
    "lossless": Promise(28, 0.0, "exact: what one rank draws, but for rounding"),
    "high": Promise(18, 0.00003, MEASURED),
    "medium": Promise(14, 0.00011, MEASURED),
    "low": Promise(10, 0.0010, MEASURED),
}
"""Of all policies the exact one, whose pictures don't depend on how many ranks draw them: so the
drift is that of the steps that are left out, on any number of ranks."""


def promises_of(files: Mapping[str, Path]) -> dict[Quality, Promise]:
    """What is promised, with the operator's schedules in place of ours.

    Args:
        files: by quality, a schedule as `piflux quality --tune` writes it.

    Raises:
        ValueError: a file that can't be read, an unknown quality, or a schedule for 'lossless'.
    """
    promises = dict(PROMISES)
    for name, path in files.items():
        qualities: tuple[Quality, ...] = get_args(Quality)
        quality = next((x for x in qualities if x == name), None)
        if quality is None or quality == "lossless":
            others = ", ".join(x for x in qualities if x != "lossless")
            raise ValueError(
                f"a schedule for the quality {name!r}: choose one of {others}; 'lossless' is exact"
            )
        settings = read_settings(path)
        compute = read_compute(settings.pop("compute", "all"))
        if isinstance(compute, str) and compute not in ("all", "auto"):
            mask, computed = compute, round(MEASURED_STEPS * compute.count("x") / len(compute))
        else:
            mask = None
            computed = (mask_of(compute, MEASURED_STEPS) or "").count("x")
        Schedule(**settings)
        settings = {"policy": "rotate"} | settings
        promises[quality] = Promise(computed, None, str(path), settings, mask)
    return promises
