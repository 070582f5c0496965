"""Which steps of an image are computed: a mask as text, or how many. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

COMPUTED, SKIPPED = "x", "."

NEEDED = 2
"""Computed predictions that another one is continued from."""

FEWEST_STEPS = 10
"""Below so many steps 'auto' computes all: neighbours are too far apart."""

SHARE = 18 / 28
"""Of the steps, those that 'auto' computes."""

Compute = str | int


def read_compute(given: str | int | Sequence[object]) -> Compute:
    """What `parallelize(compute=)` was given, as a schedule holds it.

    Args:
        given: 'all', 'auto', a number of steps, or a mask: text like 'xxxx.x.x', or a sequence of
            bools, true for computed steps.

    Raises:
        ValueError: anything else, or a mask that leaves out one of the first two steps.
    """
    if isinstance(given, str):
        mask = given
        if given in ("all", "auto"):
            return given
    elif isinstance(given, int) and not isinstance(given, bool):
        if given < NEEDED:
            raise ValueError(
                f"compute={given}: at least {NEEDED} steps of an image are computed, from which "
                "others are continued"
            )
        return given
    elif isinstance(given, Sequence) and all(step in (0, 1) for step in given):
        mask = "".join(COMPUTED if step else SKIPPED for step in given)
    else:
        raise ValueError(_wrong(given))
    if not mask or set(mask) - {COMPUTED, SKIPPED}:
        raise ValueError(_wrong(given))
    if SKIPPED in mask[:NEEDED]:
        raise ValueError(
            f"compute={mask!r} leaves out one of the first {NEEDED} steps, from which others are "
            f"continued: begin with {COMPUTED * NEEDED!r}"
        )
    return mask


def _wrong(given: object) -> str:
    return (
        f"compute={given!r}: choose 'all', 'auto', a number of steps, or a mask with an "
        f"{COMPUTED!r} for each step that is computed and a {SKIPPED!r} for each that is not, as "
        "in 'xxxx.x.x' (in Python also a bool for each step)"
    )


def mask_of(compute: Compute, steps: int) -> str | None:
    """The mask of an image of so many steps; None if `compute` is one for another number."""
    if compute == "all" or compute == "auto" and steps < FEWEST_STEPS:
        return COMPUTED * steps
    if compute == "auto":
        return default_mask(round(SHARE * steps), steps)
    if isinstance(compute, int):
        return default_mask(compute, steps)
    return compute if len(compute) == steps else None


def default_mask(computed: int, steps: int) -> str:
    """Which steps to compute where their number is all that is known.

    All of a first share of the image; then every second step until twice that share; then ever
    fewer, in inverse proportion to how far the image is; but every second one again in the last
    seventh, unless less than a third of all are computed. So are the masks that a greedy search
    finds on two models, and it is nearly as good as they are; see docs/skipped.md.

    Args:
        computed: how many; all, if the image has no more.
        steps: of the image.
    """
    end = steps - (steps // 7 if 3 * computed >= steps else 0)

    def shares(first: float) -> list[float]:
        """Of computed steps about each step, where the first so many are all computed."""
        thinning = [min(0.5, first / (step + 1)) if step < end else 0.5 for step in range(steps)]
        return [1.0 if step < max(first, NEEDED) else x for step, x in enumerate(thinning)]

    low, high = 0.0, float(steps)
    for _ in range(50):  # bisection, far below a step
        first = (low + high) / 2
        low, high = (first, high) if sum(shares(first)) < computed else (low, first)
    mask, due = "", 0.0
    for share in shares(high):
        due += share
        takes = due > mask.count(COMPUTED) + 1 - 1e-6
        mask += COMPUTED if takes else SKIPPED
    return mask
