"""What this host has, and how fast it is: devices, links, kernels; and the policy that follows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from piflux.cost.cost import Choice, Rates, choose
from piflux.cost.rates import measure_link, slowest_rates
from piflux.launch import is_first, join
from piflux.policies.schedule import Schedule
from piflux.ranks.processes import ProcessRanks

PROBE_BYTES = 16 * 2**20
"""What each rank of a probed link sends: the order of one layer's keys and values."""


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        memory_gib: all of its memory.
        free_gib: what nobody uses.
    """

    name: str
    memory_gib: float
    free_gib: float


@dataclass(frozen=True)
class Link:
    """Between two ranks of this host.

    Attributes:
        ranks: the two.
        peer_access: whether the first's GPU reaches the second's memory; None on CPUs.
        gbs: GB/s that each of the two sends while both gather PROBE_BYTES.
    """

    ranks: tuple[int, int]
    peer_access: bool | None
    gbs: float


@dataclass(frozen=True)
class Examined:
    """What the ranks found out together.

    Attributes:
        links: of each pair.
        rates: of the slowest rank's kernels, and of the all-gather of all ranks.
        choice: the policy for the model that was asked about.
    """

    links: tuple[Link, ...]
    rates: Rates
    choice: Choice


def devices() -> list[Device]:
    """The GPUs that this process sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Device(torch.cuda.get_device_name(index), total / 2**30, free / 2**30))
    return found


def decide(
    config: Mapping[str, Any],
    device: torch.device,
    *,
    width: int,
    height: int,
    text_tokens: int,
    dtype: torch.dtype,
) -> tuple[Rates, Choice]:
    """Measure, and choose the policy for a FLUX transformer of `config`, on all ranks alike.

    Every rank of the default group takes part, and what the slowest reaches decides.

    Raises:
        CannotShard: see `preview`.
    """
    from piflux.tools.preview import preview  # imports the compiler, a second

    ranks = ProcessRanks.of(_joined())
    foreseen = preview(
        config,
        Schedule(world_size=ranks.size),
        width=width,
        height=height,
        text_tokens=text_tokens,
        dtype=dtype,
    )
    # One rank's queries are a part, its products' rows too.
    tokens = -(-(width * height // 256 + text_tokens) // ranks.size)
    query = config["num_attention_heads"], tokens, config["attention_head_dim"]
    sent = foreseen.layers[0].kv_bytes // (ranks.size - 1)
    rates = slowest_rates(ranks, query, dtype, device, sent)
    return rates, choose(foreseen.layers, rates)


def examine(
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    on_link: Callable[[Link], None] | None = None,
) -> Examined:
    """As one of several ranks: measure each pair's link, the kernels, and choose.

    Args:
        config: see `decide`.
        options: its keyword arguments.
        on_link: called on rank 0 with each link as soon as it is measured.
    """
    device = join()
    links = []
    for pair in itertools.combinations(range(dist.get_world_size()), 2):
        link = _link(pair, device)
        if on_link is not None and is_first():
            on_link(link)
        links.append(link)
    rates, choice = decide(config, device, **options)
    return Examined(tuple(links), rates, choice)


def _link(pair: tuple[int, int], device: torch.device) -> Link:
    """Measured by the two, told to all."""
    group = dist.new_group(list(pair))
    gbs = 0.0
    if dist.get_rank() in pair:
        gbs = measure_link(ProcessRanks.of(group), device, PROBE_BYTES)
    reaches = torch.cuda.can_device_access_peer(*pair) if device.type == "cuda" else None
    # The two's own slower one, which the others' infinity leaves alone.
    (least,) = ProcessRanks.of(_joined()).least([gbs or math.inf])
    return Link(pair, reaches, least)


def _joined() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "called on the ranks that `join` joined"
    return group
