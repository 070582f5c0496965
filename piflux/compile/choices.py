"""What is chosen when the first graph of a model is compiled, on all ranks alike."""

from __future__ import annotations

import logging
from dataclasses import replace as with_fields

import torch

from piflux.compile.program import Counted
from piflux.cost.cost import SyncChoice, choose, choose_sync, layers_of
from piflux.cost.rates import slowest_rates
from piflux.cost.remembered import device_name, rates_file, remembered_rates
from piflux.graph.sizes import example_size
from piflux.graph.values import tensors
from piflux.policies.schedule import PolicyName, Schedule
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.protocol import Ranks

log = logging.getLogger(__name__)


class Choices:
    """What is left open of a model's schedule.

    Args:
        policy: whether the policy is; likewise the way to sync, where the schedule has 'auto'.
        ranks: who shares the work; None for one rank alone.
        notes: where to say what was chosen.
    """

    def __init__(self, policy: bool, ranks: Ranks | None, notes: list[str]) -> None:
        self.policy = policy
        self.why_sync = ""
        self._ranks = ranks
        self._notes = notes

    def settle(
        self, schedule: Schedule, part: Counted, whole: Counted | None, steps: int | None
    ) -> tuple[Schedule, str]:
        """Choose what is open, for this graph and all later ones; see `piflux.compile.program`.

        Args:
            schedule: with what is open.
            part: the graph of a part.
            whole: the graph that computes all tokens, where sync steps may.
            steps: of an image, where they are known.
        """
        if self.policy:
            self.policy = False
            schedule = self._choose_policy(schedule, part, steps)
        if schedule.sync == "auto":
            choice = self._choose_sync(part, whole)
            schedule, self.why_sync = with_fields(schedule, sync=choice.sync), choice.reason
        return schedule, self.why_sync

    def _choose_policy(self, schedule: Schedule, part: Counted, steps: int | None) -> Schedule:
        ranks, (_, ctx) = self._ranks, part
        policy: PolicyName = "gather"
        if not isinstance(ranks, ProcessRanks):
            where, why = "", "no link lies between ranks that one process computes"
        else:
            layers = layers_of(*part)
            shape, dtype, device = _query(part)
            sent = layers[0].kv_bytes // (ranks.size - 1)
            rates = remembered_rates(ranks, shape, dtype, device, sent)
            choice = choose(layers, rates)
            where = f" for {ranks.size} ranks on {device_name(device)}"
            policy, why = choice.policy, f"{choice.reason} (rates of {rates_file()})"
            if steps is not None and all(schedule.step(index).sync for index in range(steps)):
                policy, why = "gather", "each of so few steps is a sync step"
        image = "" if steps is None else f", {steps} steps an image"
        line = (
            f"policy 'auto' took '{policy}'{where}, {len(ctx.plan.attentions)} attentions"
            f"{image}: {why}"
        )
        self._notes.append(line)
        if ranks is None or ranks.rank == 0:
            log.warning("%s", line)
        chosen = with_fields(schedule, policy=policy, sync="gather")
        return with_fields(chosen, sync=schedule.sync) if chosen.kind.remembers else chosen

    def _choose_sync(self, part: Counted, whole: Counted | None) -> SyncChoice:
        ranks = self._ranks
        if ranks is None or whole is None or ranks.in_one_process:
            return SyncChoice("gather", "there is nothing to choose")
        layers = layers_of(*part)
        shape, dtype, device = _query(part)
        sent = layers[0].kv_bytes // (ranks.size - 1)
        rates = slowest_rates(ranks, shape, dtype, device, sent)
        return choose_sync(layers, layers_of(*whole), rates)


def _query(part: Counted) -> tuple[list[int], torch.dtype, torch.device]:
    """Shape, dtype and device of the first attention's queries."""
    (query,) = tensors(part[1].plan.attentions[0].node.all_input_nodes[0])
    return [example_size(size, query) for size in query.shape], query.dtype, query.device
