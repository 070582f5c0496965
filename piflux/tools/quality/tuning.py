"""The best schedule within a budget: policy, sync steps, and which steps are computed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from piflux.policies.masks import COMPUTED, FEWEST_STEPS, NEEDED, SKIPPED
from piflux.policies.schedule import Schedule
from piflux.tools.quality.drift import Pictures, Row
from piflux.tools.quality.variants import Variant

SPARSEST = 3
"""Masks are searched down to one computed step in so many."""


@dataclass(frozen=True)
class Budget:
    """One of the two: the mean LPIPS to reach, or the seconds a step to stay below.

    Attributes:
        max_lpips: the one.
        max_cost_s: the other.
        max_bytes: beside it, of what a rank holds; None for no bound.

    Raises:
        ValueError: both, or none.
    """

    max_lpips: float | None = None
    max_cost_s: float | None = None
    max_bytes: float | None = None

    def __post_init__(self) -> None:
        if (self.max_lpips is None) == (self.max_cost_s is None):
            raise ValueError(
                "tuning needs one budget: the LPIPS to reach, or the cost to stay below"
            )

    def holds(self, row: Row) -> bool:
        if self.max_lpips is not None:
            return statistics.mean(row.lpips) <= self.max_lpips
        return self.affords(row.cost.mean_s)

    def affords(self, cost_s: float) -> bool:
        return self.max_cost_s is None or cost_s <= self.max_cost_s

    def spent(self, row: Row) -> float:
        """Less is better, of rows within the budget."""
        return row.cost.mean_s if self.max_lpips is not None else statistics.mean(row.lpips)


def search_masks(distance: Callable[[str], float], steps: int, fewest: int) -> dict[int, str]:
    """A mask for each number of computed steps, from all of them down to `fewest`.

    In each round one more step is left out: the one without which pictures stay nearest. Few steps
    are tried for it. The more steps are left out, the farther pictures are, so that a distance of
    an earlier round is a bound from below. A step whose bound is above the nearest distance found
    is not tried ("Accelerated greedy algorithms", Minoux 1978).

    Args:
        distance: of the pictures under a mask from those of all steps.
        steps: of an image.
        fewest: at least as many are computed.
    """
    mask = COMPUTED * steps
    found = {steps: mask}
    last = dict.fromkeys(range(NEEDED, steps), 0.0)  # by step, without which it was measured last
    for computed in range(steps - 1, max(fewest, NEEDED) - 1, -1):
        tried: set[int] = set()
        while (nearest := min(last, key=last.__getitem__)) not in tried:
            last[nearest] = distance(_without(mask, nearest))
            tried.add(nearest)
        mask = _without(mask, nearest)
        del last[nearest]
        found[computed] = mask
    return found


def _without(mask: str, step: int) -> str:
    return mask[:step] + SKIPPED + mask[step + 1 :]


def masks_of(pictures: Pictures) -> dict[int, str]:
    """Those of one rank, for each number of computed steps; few steps are all computed.

    How far continued predictions drift and how far remembered keys and values do hardly add up, so
    that they serve any number of ranks.
    """
    if pictures.steps < FEWEST_STEPS:
        return {pictures.steps: COMPUTED * pictures.steps}
    return search_masks(
        lambda mask: pictures.distance(Variant.of(policy="gather", compute=mask)),
        pictures.steps,
        pictures.steps // SPARSEST,
    )


def tune(
    pictures: Pictures,
    ranks: int,
    budget: Budget,
    masks: Mapping[int, str],
    candidates: Sequence[str],
) -> tuple[Variant, list[Row]]:
    """The best schedule within a budget.

    Of each candidate with all steps computed, then with as few as the budget allows, then with
    other sync steps among those that are computed.

    Args:
        pictures: to choose by; others are to judge by.
        ranks: on how many ranks.
        budget: what it has to keep to.
        masks: by number of computed steps; see `masks_of`.
        candidates: variants to begin with.

    Returns:
        The schedule, and all that were drawn.

    Raises:
        ValueError: nothing is within the budget.
    """
    search = _Search(pictures, ranks, budget, masks)
    for text in candidates:
        search.fewest(Variant.parse(text))
    if search.best is None:
        if not any(map(search.holds_memory, search.drawn)):
            least = min(search.bytes_of(x) for x in search.drawn)
            raise ValueError(
                f"no schedule is within the memory: the least that a rank holds is "
                f"{least / 2**30:.3g} GiB"
            )
        nearest = min(statistics.mean(row.lpips) for row in search.rows)
        cheapest = min(row.cost.mean_s for row in search.rows)
        raise ValueError(
            f"no schedule is within the budget: the least LPIPS that one reaches is {nearest:.4f}, "
            f"the lowest cost {1000 * cheapest:.4g} ms a step"
        )
    search.resync()
    return search.best[0], search.rows


class _Search:
    """What was drawn so far.

    Attributes:
        rows: of all of it.
        drawn: the variants, in order.
        best: the variant within the budget that spends least, with its row.
    """

    def __init__(
        self, pictures: Pictures, ranks: int, budget: Budget, masks: Mapping[int, str]
    ) -> None:
        self.rows: list[Row] = []
        self.drawn: list[Variant] = []
        self.best: tuple[Variant, Row] | None = None
        self._pictures, self._ranks, self._budget, self._masks = pictures, ranks, budget, masks
        self._numbers = sorted(masks)

    def fewest(self, variant: Variant) -> None:
        """A candidate, with all steps and with as many as the budget asks for."""
        if not self.holds_memory(variant):  # as one of its like has shown
            return
        whole = self.draw(variant)
        if not self.holds_memory(variant):
            return
        if self._budget.max_lpips is None:
            # The more the nearer: as many as can be paid.
            sparser = [variant.computing(self._masks[n]) for n in self._numbers[:-1]]
            paid = [x for x in sparser if self._affords(x)]
            if paid and not self._budget.holds(whole):
                self.draw(paid[-1])
            return
        low, high = 0, len(self._numbers) - 1  # all steps are known to do, or nothing is
        while self._budget.holds(whole) and low < high:
            middle = (low + high) // 2
            row = self.draw(variant.computing(self._masks[self._numbers[middle]]))
            if self._budget.holds(row):
                high = middle
            else:
                low = middle + 1

    def resync(self) -> None:
        """One more sync step, or one less, as long as that is better.

        Where sync steps let fewer steps be computed, or are paid for by them, these change too.
        """
        improved = self._ranks > 1
        while improved:
            assert self.best is not None, "there is something to improve"
            before, _ = self.best
            for variant in list(self._neighbours(before)):
                if self._budget.max_lpips is not None or self._affords(variant):
                    self.draw(variant)
            improved = self.best[0] != before

    def _neighbours(self, variant: Variant) -> Iterator[Variant]:
        schedule = Schedule(**variant.options, world_size=self._ranks)
        if not schedule.kind.remembers:
            return
        steps = schedule.steps(self._pictures.steps)
        syncs = {step.index for step in steps if step.sync and step.computed}
        # The first computed steps after skipped ones see the oldest keys and values.
        after_skipped = {
            b.index for a, b in itertools.pairwise(steps) if b.computed and not a.computed
        }
        numbers = [len([step for step in steps if step.computed]) + more for more in (-1, 0, 1)]
        for other in [
            *(syncs | {x} for x in sorted(after_skipped - syncs)),
            *(syncs - {x} for x in sorted(syncs - {0})),
        ]:
            for n in numbers:
                if n in self._masks:
                    yield variant.syncing(other).computing(self._masks[n])

    def _affords(self, variant: Variant) -> bool:
        return self._budget.affords(self._pictures.cost(variant, self._ranks).mean_s)

    def bytes_of(self, variant: Variant) -> float:
        """What a rank holds under it; 0 as long as that is not known."""
        return self._pictures.memory_bytes(variant, self._ranks) or 0.0

    def holds_memory(self, variant: Variant) -> bool:
        """Whether that is within the budget, as far as it is known."""
        return self._budget.max_bytes is None or self.bytes_of(variant) <= self._budget.max_bytes

    def draw(self, variant: Variant) -> Row:
        row, _ = self._pictures.row(variant, self._ranks)
        self.rows.append(row)
        self.drawn.append(variant)
        if not self.holds_memory(variant):
            return row
        better = self.best is None or self._budget.spent(row) < self._budget.spent(self.best[1])
        if self._budget.holds(row) and better:
            self.best = variant, row
        return row
