"""What is chosen when the first graph of a model is compiled, on all ranks alike."""

from __future__ import annotations

import logging
import math
from dataclasses import replace as with_fields
from typing import Any, Literal

import torch

from piflux.compile.program import Counted
from piflux.compile.report import GraphReport
from piflux.cost.cost import SyncChoice, choose, choose_sync, layers_of
from piflux.cost.memory import Own, free_bytes, held_bytes
from piflux.cost.rates import slowest_rates
from piflux.cost.remembered import device_name, rates_file, remembered_rates
from piflux.cost.shares import SharedWeights, expected
from piflux.errors import DoesNotFit
from piflux.graph.blocks import find_blocks
from piflux.graph.plan import Context
from piflux.graph.sizes import example_size
from piflux.graph.values import tensors
from piflux.memory.shares import Shares
from piflux.policies.schedule import Compression, PolicyName, Schedule, sync_steps_of
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.protocol import Ranks

log = logging.getLogger(__name__)

DEVICE = "cuda"
"""Whose memory is counted: no allocator tells how much a host has left for one process."""

BITS: tuple[Compression, ...] = ("int8", "int4")
"""What keys and values may be remembered in, the likest first."""

MemoryLimit = float | Literal["auto"] | None
"""GiB that a rank may hold on its device, with what is there before; 'auto' for what that has."""


def check_memory(memory: Any) -> None:
    """Raises ValueError if it is no `MemoryLimit`."""
    if memory is None or memory == "auto":
        return
    known = isinstance(memory, (int, float)) and not isinstance(memory, bool)
    if not (known and math.isfinite(memory) and memory > 0):
        raise ValueError(f"memory must be 'auto' or a number of GiB, got {memory!r}")


class Choices:
    """What is left open of a model's schedule, until a program was made with what is chosen.

    Before that a rank may be lost or raise, and all choose anew.

    Args:
        policy: whether the policy is; likewise the way to sync, where the schedule has 'auto'.
        ranks: who shares the work; None for one rank alone.
        notes: where to say what was chosen.
        memory: within what to choose whatever takes memory. None: that is open if the policy is.
        shares: of the model's weights; None if they are whole.

    Attributes:
        asked: whether ranks were asked what fits on all of them, in the last choice.
    """

    def __init__(
        self,
        policy: bool,
        ranks: Ranks | None,
        notes: list[str],
        memory: MemoryLimit = None,
        shares: Shares | None = None,
    ) -> None:
        self.policy = policy
        self.memory = memory
        self._memory_is_open = memory is not None
        self.why_sync = ""
        self.asked = False
        self._ranks = ranks
        self._notes = notes
        self._told: list[str] = []  # to be notes once it is kept
        self._shares = shares

    def keep(self) -> None:
        """What was chosen last is for this graph and all later ones."""
        self.policy = self._memory_is_open = False
        self._notes += self._told
        self._told = []

    def settle(
        self, schedule: Schedule, part: Counted, whole: Counted | None, steps: int | None
    ) -> tuple[Schedule, str]:
        """Choose what is open; see `keep`, and `Settle` of `piflux.compile.program`.

        Args:
            schedule: with what is open.
            part: the graph of a part.
            whole: the graph that computes all tokens, where sync steps may.
            steps: of an image, where they are known.
        """
        self._told = []
        self.asked = False
        if self.policy:
            schedule = self._choose_policy(schedule, part, steps)
        if schedule.sync == "auto":
            choice = self._choose_sync(part, whole)
            schedule, self.why_sync = with_fields(schedule, sync=choice.sync), choice.reason
        return self._fitting(schedule, part), self.why_sync

    def _fitting(self, schedule: Schedule, part: Counted) -> Schedule:
        """The schedule, if its memory fits; one that does, if that was piflux's to choose.

        Raises:
            DoesNotFit: on all ranks, if it does not on one.
        """
        ranks, (gm, ctx) = self._ranks, part
        device = _query(part)[2]
        counted = device.type == DEVICE or isinstance(self.memory, (int, float))
        if ranks is None or ranks.size == 1 or not counted:
            return schedule
        own = Own.of(gm.graph)
        free = self._left(device, own)
        if isinstance(ranks, ProcessRanks):
            self.asked = True
            (free,) = ranks.least([free - self._to_come(own, ctx)])
        streams = ranks.size if ranks.in_one_process else 1

        def report(schedule: Schedule) -> GraphReport:
            return GraphReport.of(ctx, schedule, own)

        def fits(schedule: Schedule) -> bool:
            found = report(schedule)
            more = streams * (found.cache_bytes + found.packet_bytes) + found.step_bytes
            return more <= free

        need = report(schedule)
        if fits(schedule):
            if self._memory_is_open:
                self._tell(f"memory: {_settings(schedule)} fits, {_takes(need, free)}")
            return schedule
        others = [x for x in _less_memory(schedule) if fits(x)]
        if (self.policy or self._memory_is_open) and others:
            taken = others[0]
            self._tell(
                f"memory: took {_settings(taken)}, {_takes(report(taken), free)}; "
                f"{_settings(schedule)} would take {_gib(need.memory_bytes)}"
            )
            return taken
        choices = "; ".join(f"{_settings(x)}, {_gib(report(x).memory_bytes)}" for x in others)
        raise DoesNotFit(
            f"{_settings(schedule)} on {ranks.size} ranks takes {_gib(need.memory_bytes)} a rank: "
            f"weights {_gib(need.weight_bytes)}, remembered keys and values "
            f"{_gib(need.cache_bytes)} for each stream, sending them {_gib(need.packet_bytes)}, a "
            f"step {_gib(need.step_bytes)}. Beside the weights a GPU has {_gib(free)} left. "
            + (f"This would fit: {choices}" if choices else "No policy needs so little")
            + self._shared_instead(own, part)
            + ". Weights in 8 bits take about half; text encoders and autoencoder need not stay on "
            "the GPU (enable_model_cpu_offload)"
        )

    def _left(self, device: torch.device, own: Own) -> float:
        """Bytes that this rank may take beside the weights, which it holds."""
        on_gpu = device.type == DEVICE
        free = free_bytes(device) if on_gpu else math.inf
        if not isinstance(self.memory, (int, float)):
            return free
        held = held_bytes(device) if on_gpu else own.weights
        return min(free, self.memory * 2**30 - held)

    def _tell(self, line: str) -> None:
        self._told.append(line)
        if self._ranks is None or self._ranks.rank == 0:
            log.warning("%s", line)

    def _to_come(self, own: Own, ctx: Context) -> int:
        """Bytes of weights that the device doesn't hold yet; less than 0 if it will hold fewer."""
        if self._shares is None or self._shares.complete:
            return 0
        here = own.weights - self._shares.aside.nbytes
        return SharedWeights.of(ctx.gathered, ctx.world_size).among(own.weights) - here

    def _shared_instead(self, own: Own, part: Counted) -> str:
        """What sharing the weights comes to, where that is left to do."""
        gm, ctx = part
        shared = SharedWeights.of(expected(gm.graph, find_blocks(gm.graph)), ctx.world_size)
        if self._shares is not None or not shared.step or not isinstance(self._ranks, ProcessRanks):
            return ""
        return f"; shard_weights=True takes {_gib(shared.among(own.weights))} for the weights"

    def _choose_policy(self, schedule: Schedule, part: Counted, steps: int | None) -> Schedule:
        ranks, (_, ctx) = self._ranks, part
        schedule = with_fields(schedule, sync_steps=sync_steps_of(schedule, steps))
        policy: PolicyName = "gather"
        if not isinstance(ranks, ProcessRanks):
            where, why = "", "no link lies between ranks that one process computes"
        elif ranks.size == 1:
            where, why = "", "no other rank is left"
        else:
            layers = layers_of(*part)
            shape, dtype, device = _query(part)
            sent = layers[0].kv_bytes // (ranks.size - 1)
            rates = remembered_rates(ranks, shape, dtype, device, sent)
            syncs = sum(schedule.step(index).sync for index in range(steps or 0))
            choice = choose(layers, rates, steps, syncs)
            where = f" for {ranks.size} ranks on {device_name(device)}"
            policy, why = choice.policy, f"{choice.reason} (rates of {rates_file()})"
            if steps is not None and all(schedule.step(index).sync for index in range(steps)):
                policy, why = "gather", "each of so few steps is a sync step"
        image = "" if steps is None else f", {steps} steps an image"
        line = (
            f"policy 'auto' took '{policy}'{where}, {len(ctx.plan.attentions)} attentions"
            f"{image}: {why}"
        )
        self._tell(line)
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


def _less_memory(schedule: Schedule) -> list[Schedule]:
    """Others that hold less, those first that are to be taken first: in fewer bits, without what
    `displaced` sends, without anything remembered.

    Whatever else takes less memory belongs here. `order=0` does not: one version takes more than
    both in few bits, and drifts further.
    """
    found = []
    if schedule.kind.remembers:
        for compression in BITS:
            found.append(with_fields(schedule, order=1, compression=compression))
    if schedule.kind.remembers and not schedule.kind.rotates:  # what it sends is held, too
        found.append(with_fields(found[-1], policy="rotate"))
    found.append(with_fields(schedule, policy="gather", sync="gather", order=1, compression="none"))
    return [x for x in found if x != schedule]


def _takes(report: GraphReport, free: float) -> str:
    left = f"beside the weights {_gib(free)} are left"
    return f"{_gib(report.memory_bytes)} a rank: {left}"


def _settings(schedule: Schedule) -> str:
    """As `parallelize` takes them."""
    more = f", compression={schedule.compression!r}" if schedule.compresses else ""
    return f"policy={schedule.policy!r}{more}" + ("" if schedule.order else ", order=0")


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _query(part: Counted) -> tuple[list[int], torch.dtype, torch.device]:
    """Shape, dtype and device of the first attention's queries."""
    (query,) = tensors(part[1].plan.attentions[0].node.all_input_nodes[0])
    return [example_size(size, query) for size in query.shape], query.dtype, query.device
