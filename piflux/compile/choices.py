"""What is chosen when the first graph of a model is compiled, on all ranks alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace as with_fields
from typing import Any, Literal

import torch

from piflux.compile.fitting import Option, Room, options_of, saved_by_8_bits, with_shares
from piflux.compile.program import Counted, Settled
from piflux.compile.report import GraphReport
from piflux.cost.cost import (
    PRICE_OF_EXACT,
    Rates,
    SyncChoice,
    choose,
    choose_sync,
    layers_of,
)
from piflux.cost.memory import Own, free_bytes, held_bytes
from piflux.cost.rates import slowest_rates
from piflux.cost.remembered import device_name, rates_file, remembered_rates
from piflux.cost.shares import SharedWeights
from piflux.errors import DoesNotFit
from piflux.graph.plan import Context
from piflux.graph.sizes import example_size
from piflux.graph.values import tensors
from piflux.memory.shares import Shares
from piflux.policies.schedule import PolicyName, Schedule, sync_steps_of
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.protocol import Ranks

log = logging.getLogger(__name__)

DEVICE = "cuda"
"""Whose memory is counted: no allocator tells how much a host has left for one process."""

LITTLE = 0.1
"""A part of the weights that is not worth telling of: what is left of them in 16 bits, say, when
the blocks' are in 8."""

MemoryLimit = float | Literal["auto"] | None
"""GiB that a rank may hold on its device, with what is there before; 'auto' for what that has."""

Sharing = bool | Literal["auto"]
"""Whether ranks share the weights; 'auto' if they don't fit otherwise."""


def check_memory(memory: Any, shard_weights: Any) -> None:
    """Raises ValueError if one is no `MemoryLimit`, or the other no `Sharing` within it."""
    if not isinstance(shard_weights, bool) and shard_weights != "auto":
        raise ValueError(f"shard_weights must be True, False or 'auto', got {shard_weights!r}")
    if shard_weights == "auto" and memory is None:
        raise ValueError(
            "shard_weights='auto' shares weights that don't fit otherwise: say with memory= into "
            "what, 'auto' or GiB"
        )
    if memory is None or memory == "auto":
        return
    known = isinstance(memory, (int, float)) and not isinstance(memory, bool)
    if not (known and math.isfinite(memory) and memory > 0):
        raise ValueError(f"memory must be 'auto' or a number of GiB, got {memory!r}")


class Choices:
    """What is left open of a model's settings, until a program was made with what is chosen.

    Before that a rank may be lost or raise, and all choose anew.

    Args:
        policy: whether the policy is; likewise the way to sync, where the schedule has 'auto'.
        ranks: who shares the work; None for one rank alone.
        notes: where to say what was chosen.
        memory: within what to choose whatever takes memory. None: that is open if the policy is.
        shares: of the model's weights; None if they are whole.
        may_share: whether they may be shared, in place of whole ones, where memory is short; asked
            when it is. None: they may not. Until then `shares` has what waits on the host.

    Attributes:
        shares: of the weights; None once they are known to be whole.
        shares_are_open: whether that is still to be decided.
    """

    def __init__(
        self,
        policy: bool,
        ranks: Ranks | None,
        notes: list[str],
        memory: MemoryLimit = None,
        shares: Shares | None = None,
        may_share: Callable[[], bool] | None = None,
    ) -> None:
        self._policy_asked = self.policy = policy
        self.memory = memory
        self.shares = shares
        self.shares_are_open = shares is not None and may_share is not None
        self._may_share = may_share
        self._memory_is_open = memory is not None
        self.why_sync = ""
        self._ranks = ranks
        self._is_kept = False
        self._notes = notes
        self._told: list[str] = []  # to be notes once it is kept
        self._shares_taken = False

    def keep(self) -> None:
        """What was chosen last is for this graph and all later ones."""
        self.policy = self._memory_is_open = False
        self._is_kept = True
        if not self._shares_taken:
            self.have_whole_weights()
        self.shares_are_open = False
        self._notes += self._told
        self._told = []

    def reopen(self) -> None:
        """What was kept is chosen anew, but for where the weights are."""
        self.policy, self._memory_is_open = self._policy_asked, self.memory is not None
        self._is_kept = False

    def settle(
        self, schedule: Schedule, part: Counted, whole: Counted | None, steps: int | None
    ) -> Settled:
        """Choose what is open; see `keep`, and `Settle` of `piflux.compile.program`.

        Args:
            schedule: with what is open.
            part: the graph of a part.
            whole: the graph that computes all tokens, where sync steps may.
            steps: of an image, where they are known.
        """
        self._told = []
        if self.policy:
            schedule = self._choose_policy(schedule, part, steps)
        if schedule.sync == "auto":
            choice = self._choose_sync(part, whole)
            schedule, self.why_sync = with_fields(schedule, sync=choice.sync), choice.reason
        taken = self._fitting(schedule, part)
        self._shares_taken = taken.shares
        return Settled(taken.schedule, self.why_sync, self.shares if taken.shares else None)

    def have_whole_weights(self) -> None:
        """If it is open whether weights are shared, they are not: what waits on the host comes."""
        if self.shares_are_open and self.shares is not None:
            self.shares.aside.bring()
            self.shares, self.shares_are_open = None, False

    def _fitting(self, schedule: Schedule, part: Counted) -> Option:
        """The schedule, if its memory fits; one that does, if that was piflux's to choose.

        Raises:
            DoesNotFit: on all ranks, if it does not on one; once choices are kept, on that one.
        """
        ranks, (gm, ctx) = self._ranks, part
        first = Option(schedule, self.shares is not None and not self.shares_are_open)
        device = _query(part)[2]
        limited = isinstance(self.memory, (int, float))
        if device.type != DEVICE and not limited:
            return first
        if ranks is None and self.memory is None or ranks is not None and ranks.size == 1:
            return first  # the last one of several goes on as it can
        room = self._room(Own.of(gm.graph), ctx, device)
        may = self.shares_are_open and self._may_share is not None and self._may_share()
        together = isinstance(ranks, ProcessRanks) and not self._is_kept
        if isinstance(ranks, ProcessRanks) and together:
            free, may_all = ranks.least([room.free, float(may)])
            room, may = with_fields(room, free=free), may_all > 0
        need, free = room.report(first), room.left(first)
        name = "one rank alone" if ranks is None else str(first)
        if room.fits(first):
            if self._memory_is_open:
                self._tell(f"memory: {name} fits, {_takes(need, free)}")
            return first
        options, why = options_of(first), ""
        if may and room.shared.step:
            options, why = self._with_shares(options, part, room.shared)
        others = [] if ranks is None else [x for x in options if room.fits(x)]
        if (self.policy or self._memory_is_open) and others:
            taken = others[0]
            self._tell(
                f"memory: took {taken}, {_takes(room.report(taken), room.left(taken))}; "
                f"{first} would take {_gib(need.memory_bytes)}" + (why if taken.shares else "")
            )
            return taken
        shareable = isinstance(ranks, ProcessRanks) and room.shared.step and not first.shares
        if shareable and not others:  # of a model that would still be on the host
            unloaded = with_fields(room, held=0, free=room.free + room.held)
            others = with_shares(options_of(first), hides=False)
            others = [x for x in others if unloaded.fits(x)]
        choices = "; ".join(f"{x}, {_gib(room.report(x).memory_bytes)}" for x in others)
        error = DoesNotFit(
            f"{name if ranks is None else f'{first} on {ctx.world_size} ranks'} takes "
            f"{_gib(need.memory_bytes)} a rank: "
            f"weights {_gib(need.weight_bytes)}, remembered keys and values "
            f"{_gib(need.cache_bytes)} for each stream, sending them {_gib(need.packet_bytes)}, a "
            f"step {_gib(need.step_bytes)}. {_is_left(free)}. "
            + (f"This would fit: {choices}" if choices else "No policy needs so little")
            + _weights_instead(first, part, room, shareable=bool(shareable))
            + (OTHERS_ON_THE_HOST if device.type == "cuda" else "")
        )
        error.on_all_ranks = together or not isinstance(ranks, ProcessRanks)
        raise error

    def _room(self, own: Own, ctx: Context, device: torch.device) -> Room:
        """Of this rank, as far as it knows."""
        shared = SharedWeights.of(ctx.gathered, ctx.world_size)
        held = own.weights
        if self.shares is not None:
            complete = self.shares.complete
            held = shared.among(held) if complete else held - self.shares.aside.nbytes
        streams = ctx.world_size if self._ranks is not None and self._ranks.in_one_process else 1
        return Room(ctx, own, shared, held, self._left(device, held), streams)

    def _left(self, device: torch.device, held: int) -> float:
        """Bytes that this rank may take beside weights that it holds, so many bytes of them."""
        on_gpu = device.type == DEVICE
        free = free_bytes(device) if on_gpu else math.inf
        if not isinstance(self.memory, (int, float)):
            return free
        return min(free, self.memory * 2**30 - (held_bytes(device) if on_gpu else held))

    def _with_shares(
        self, options: list[Option], part: Counted, shared: SharedWeights
    ) -> tuple[list[Option], str]:
        """Those with shared weights among others, by what steps wait for weights; and how long."""
        rates = self._rates(part)
        compute = sum(layer.compute_s(rates) for layer in layers_of(*part))
        wait = shared.wait_s(compute, rates.link_gbs)
        why = (
            f"; at {rates.link_gbs:.3g} GB/s a step that computes for {compute * 1000:.3g} ms "
            f"waits {wait * 1000:.3g} ms for weights"
        )
        return with_shares(options, hides=wait <= PRICE_OF_EXACT * compute), why

    def _tell(self, line: str) -> None:
        self._told.append(line)
        if self._ranks is None or self._ranks.rank == 0:
            log.warning("%s", line)

    def _rates(self, part: Counted) -> Rates:
        """As they are remembered, or measured now; all ranks ask together."""
        assert isinstance(self._ranks, ProcessRanks), "ranks of one process have no link"
        shape, dtype, device = _query(part)
        sent = layers_of(*part)[0].kv_bytes // (self._ranks.size - 1)
        return remembered_rates(self._ranks, shape, dtype, device, sent)

    def _choose_policy(self, schedule: Schedule, part: Counted, steps: int | None) -> Schedule:
        ranks, (_, ctx) = self._ranks, part
        schedule = with_fields(schedule, sync_steps=sync_steps_of(schedule, steps))
        policy: PolicyName = "gather"
        if ranks is None:
            where, why = " for one rank", "it sends nothing"
        elif not isinstance(ranks, ProcessRanks):
            where, why = "", "no link lies between ranks that one process computes"
        elif ranks.size == 1:
            where, why = "", "no other rank is left"
        else:
            layers, rates, device = layers_of(*part), self._rates(part), _query(part)[2]
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


OTHERS_ON_THE_HOST = (
    "; text encoders and autoencoder need not stay on the GPU (enable_model_cpu_offload, --offload)"
)


def _takes(report: GraphReport, free: float) -> str:
    left = f"beside the weights {_gib(free)} are left"
    return f"{_gib(report.memory_bytes)} a rank: {left}"


def _is_left(free: float) -> str:
    """What a rank has beside its weights, or how much they alone are too large."""
    if free < 0:
        return f"The weights alone are {_gib(-free)} more than a rank may hold"
    return f"Beside the weights a rank has {_gib(free)} left"


def _weights_instead(first: Option, part: Counted, room: Room, *, shareable: bool) -> str:
    """What weights come to that are shared, or in 8 bits, where that is left to do."""
    found, whole = [], room.own.weights
    shared = room.shared.among(whole)
    if shareable and shared < whole:  # of few blocks the buffers take more than is shared
        found.append(f"shard_weights=True takes {_gib(shared)} for the weights")
    saved = saved_by_8_bits(*part)
    if saved > LITTLE * whole:
        each = "whole weights" if first.shares else "weights"
        found.append(f"{each} in 8 bits (quantized, --quantize) take about {_gib(whole - saved)}")
    return "".join(f"; {x}" for x in found)


def _gib(count: float) -> str:
    """As memory= takes it; what is small, in MiB."""
    gib = count / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.3g} MiB"


def _query(part: Counted) -> tuple[list[int], torch.dtype, torch.device]:
    """Shape, dtype and device of the first attention's queries."""
    (query,) = tensors(part[1].plan.attentions[0].node.all_input_nodes[0])
    return [example_size(size, query) for size in query.shape], query.dtype, query.device
