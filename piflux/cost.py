"""What a step costs, by arithmetic or as measured, and the policy that follows. Runs nothing.

Of a graph are counted linear layers, matrix products, the attentions that share their tokens over
the ranks, and bytes sent. Norms, pointwise ops, launching and latencies are not: a lower bound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from piflux.passes.plan import Context, example_size, tensors
from piflux.passes.rules import PRODUCTS, op_name
from piflux.report import GraphReport
from piflux.schedule import Policy, Schedule

PRICE_OF_EXACT = 0.05
"""Of a step's compute: what 'auto' pays for keys and values that are exact. A preference; nothing
hides an all-gather whose result the next kernel reads."""


@dataclass(frozen=True)
class Rates:
    """What a device and its links do.

    Attributes:
        linear_tflops: of a matrix product of the model's shape.
        attention_tflops: of an attention of the model's shape.
        link_gbs: GB/s that a rank sends while all ranks gather.
    """

    linear_tflops: float
    attention_tflops: float
    link_gbs: float


@dataclass(frozen=True)
class Layer:
    """What one rank does from one attention, excluded, to the next, included.

    Attributes:
        linear_flops: of matrix products; after the last attention, they count as its layer's.
        attention_flops: of the attention.
        kv_bytes: what a rank sends for the others to have its keys and values.
    """

    linear_flops: int
    attention_flops: int
    kv_bytes: int

    def compute_s(self, rates: Rates) -> float:
        linear, attention = self.linear_flops, self.attention_flops
        return (linear / rates.linear_tflops + attention / rates.attention_tflops) / 1e12

    def gather_s(self, rates: Rates) -> float:
        return self.kv_bytes / rates.link_gbs / 1e9


@dataclass(frozen=True)
class Choice:
    """The policy for a model on these ranks.

    Attributes:
        policy: 'gather', 'displaced' or 'rotate'.
        reason: why, with its numbers.
        gather_s: seconds a step that keys and values travel.
        compute_s: seconds a step that a rank computes.
    """

    policy: Policy
    reason: str
    gather_s: float
    compute_s: float


def choose(layers: Sequence[Layer], rates: Rates) -> Choice:
    """The policy with the freshest keys and values that a step can afford.

    'gather', where attention waits for them, if all its waiting is at most PRICE_OF_EXACT of the
    compute; else 'displaced', where they travel while the step computes, if that takes as long;
    else 'rotate', which sends none.
    """
    gather = sum(layer.gather_s(rates) for layer in layers)
    compute = sum(layer.compute_s(rates) for layer in layers)
    travel = (
        f"keys and values travel {gather * 1000:.3g} ms a step at {rates.link_gbs:.3g} GB/s, "
        f"{gather / compute:.1%} of its {compute * 1000:.3g} ms of compute"
    )
    policy: Policy
    if gather <= PRICE_OF_EXACT * compute:
        policy, why = "gather", "little for exact ones"
    elif gather <= compute:
        policy, why = "displaced", "too long to wait for, but it hides behind them"
    else:
        policy, why = "rotate", "too long to hide, so none are sent"
    return Choice(policy, f"{travel}: {why}", gather, compute)


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
        """Of an image of so many steps."""
        syncs = sum(schedule.step(index).sync for index in range(steps))
        mean_s = (syncs * sync_s + (steps - syncs) * steady_s) / steps
        return cls(one_s, sync_s, steady_s, mean_s)


def modelled_cost(
    report: GraphReport, steps: int, step_s: float, link_gbs: float, batch: int = 1
) -> Cost:
    """From one rank's `step_s`, for an image of `steps`.

    Computing is shared evenly, but for the tokens that two ranks compute. What is gathered within
    a step adds to it; what `displaced` sends hides behind it, as far as it is as long. A recomputed
    sync step takes one rank's time. The time of launching work is not modelled.

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
    steady = max(local, sent) if schedule.policy == "displaced" else local + sent
    return Cost.of(schedule, steps, step_s, sync, steady)


def measured_cost(bench: Mapping[str, Any], schedule: Schedule, steps: int) -> Cost:
    """From what `piflux bench` measured, with its model, size and machine, for an image of `steps`.

    One rank's step is the fastest row's of one rank; a gathered sync step is the row `gather`'s, a
    recomputed one is one rank's; any other step is the median of the row named like the policy.

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
    needed = {(schedule.policy, schedule.world_size)}
    needed |= set() if recompute else {("gather", schedule.world_size)}
    missing = [f"{name!r} on {ranks} ranks" for name, ranks in sorted(needed - medians.keys())]
    if not alone:
        missing.append("any row on one rank")
    if missing:
        raise ValueError(f"the benchmark did not measure {', '.join(missing)}")
    sync = min(alone) if recompute else medians["gather", schedule.world_size]
    return Cost.of(schedule, steps, min(alone), sync, medians[schedule.policy, schedule.world_size])


def layers_of(gm: fx.GraphModule, ctx: Context) -> tuple[Layer, ...]:
    """One layer for each depth of attention in a graph that all passes have run on.

    Parallel attentions make one layer. For a graph rewritten for one rank nothing is sent.
    """
    attentions = {found.node: found for found in ctx.plan.attentions}
    level: dict[fx.Node, int] = {}  # how many attentions stand upstream, one after the other
    for node in gm.graph.nodes:
        above = max((level[x] + (x in attentions) for x in node.all_input_nodes), default=0)
        level[node] = above
    depth = 1 + max(level[node] for node in attentions)

    linear, attended, sent = ([0] * depth for _ in range(3))
    for node, found in attentions.items():
        query, key, value = (x for x in node.args[:3] if isinstance(x, fx.Node))
        lengths = [example_size(n, tensors(node)[0]) for n in ctx.plan.lengths(found.keys)]
        attended[level[node]] += 2 * sum(lengths) * (_numel(query) + _numel(node))
        if ctx.world_size > 1:
            others = ctx.world_size - 1
            sent[level[node]] += others * sum(
                _numel(x) * tensors(x)[0].element_size() for x in (key, value)
            )
    for node in gm.graph.nodes:
        if op_name(node) in PRODUCTS:
            left = tensors(node.all_input_nodes[0])[0]
            flops = 2 * _numel(node) * example_size(left.shape[-1], left)
            linear[min(level[node], depth - 1)] += flops
    return tuple(map(Layer, linear, attended, sent))


def _numel(node: fx.Node) -> int:
    (x,) = tensors(node)
    return math.prod(example_size(size, x) for size in x.shape)
