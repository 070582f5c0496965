"""What the steps of an image cost under a schedule: modelled, or as measured. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from piflux.policies.schedule import Schedule

if TYPE_CHECKING:
    from piflux.compile.report import GraphReport


@dataclass(frozen=True)
class Cost:
    """Seconds of a schedule's steps, for one picture.

    Attributes:
        one_s: one rank's step.
        sync_s: a sync step.
        steady_s: any other step.
        mean_s: a step, mean over an image.
    """

    one_s: float
    sync_s: float
    steady_s: float
    mean_s: float

    @classmethod
    def of(
        cls, schedule: Schedule, steps: int, one_s: float, sync_s: float, steady_s: float
    ) -> Cost:
        """Of an image of so many steps, of which those that are skipped cost nothing."""
        computed = [step for step in schedule.steps(steps) if step.computed]
        mean_s = sum(sync_s if step.sync else steady_s for step in computed) / steps
        return cls(one_s, sync_s, steady_s, mean_s)


def modelled_cost(
    report: GraphReport, steps: int, step_s: float, link_gbs: float, batch: int = 1
) -> Cost:
    """From one rank's `step_s`, for an image of `steps`.

    Computing is shared evenly, but for the tokens that two ranks compute. What is gathered within
    a step adds to it; what `displaced` sends hides behind it, as far as it is as long. A recomputed
    sync step takes one rank's time. Weights that are shared hide behind the computing, as far as it
    is as long. The time of launching work is not modelled.

    Args:
        report: of the variant, compiled for `batch` pictures.
        steps: denoise steps of an image.
        step_s: seconds a step of one picture on one rank.
        link_gbs: GB/s that a rank sends.
        batch: pictures that the report's bytes are for.
    """
    schedule = report.schedule
    lengths = [b for b in report.boundaries if b.verb == "shard"]
    share = sum(sum(b.part_lengths) for b in lengths) / sum(sum(b.lengths) for b in lengths)
    local, second = share * step_s, 1e9 * link_gbs * batch
    sync = step_s if schedule.sync == "recompute" else local + report.sync_bytes / second
    sent = report.steady_bytes / second
    steady = schedule.kind.step_s(local, sent)
    if report.shared is not None:
        waits = report.shared.wait_s(batch * local, link_gbs) / batch
        sync, steady = sync + waits, steady + waits
    return Cost.of(schedule, steps, step_s, sync, steady)


def measured_cost(bench: Mapping[str, Any], schedule: Schedule, steps: int) -> Cost:
    """From what `piflux bench` measured, with its model, size and machine, for an image of `steps`.

    One rank's step is the fastest row's of one rank; a gathered sync step is the row `gather`'s, a
    recomputed one is one rank's; any other step is the median of the row named like the policy,
    with '-int8' or '-int4' after it where changes are compressed.

    Args:
        bench: the record, as `bench.json` has it.
        schedule: the variant's, with its ranks.
        steps: denoise steps of an image.

    Raises:
        ValueError: a row is missing or failed.
    """
    medians = {
        (row["row"], row["ranks"]): statistics.median(row["step_ms"]) / 1000
        for row in bench["rows"]
        if row["error"] is None
    }
    alone = [median for (_, ranks), median in medians.items() if ranks == 1]
    recompute = schedule.sync == "recompute"
    row = schedule.policy + (f"-{schedule.compression}" if schedule.compresses else "")
    needed = {(row, schedule.world_size)}
    needed |= set() if recompute else {("gather", schedule.world_size)}
    missing = [f"{name!r} on {ranks} ranks" for name, ranks in sorted(needed - medians.keys())]
    if not alone:
        missing.append("any row on one rank")
    if missing:
        raise ValueError(f"the benchmark did not measure {', '.join(missing)}")
    sync = min(alone) if recompute else medians["gather", schedule.world_size]
    return Cost.of(schedule, steps, min(alone), sync, medians[row, schedule.world_size])
