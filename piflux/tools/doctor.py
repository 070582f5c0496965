"""What this host has, and how fast it is: devices, links, kernels; and the policy that follows."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from piflux.cost.clock import median_seconds
from piflux.cost.cost import Choice, Rates, choose
from piflux.cost.rates import measure_rates
from piflux.policies.schedule import Schedule
from piflux.ranks.processes import all_gather
from piflux.tools.launch import join

PACKAGES = ("piflux", "torch", "diffusers", "transformers", "triton")

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


def versions(*others: str) -> dict[str, str]:
    """Of Python, CUDA, NCCL, what piflux stands on and `others`; 'none' for what isn't there."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *others):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["cuda"] = torch.version.cuda or "none"
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "none"
    return found


def memory_gib() -> float:
    """Of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def measure_link(group: dist.ProcessGroup, device: torch.device, count: int) -> float:
    """GB/s that a rank of `group` sends while all gather `count` bytes from each of them."""
    piece = torch.zeros(count, dtype=torch.uint8, device=device)
    whole = torch.empty(count * group.size(), dtype=torch.uint8, device=device)
    seconds = median_seconds(lambda: all_gather(whole, piece, group=group), device.type == "cuda")
    return count * (group.size() - 1) / seconds / 1e9


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

    group = dist.group.WORLD
    assert group is not None, "called on the ranks that `join` joined"
    foreseen = preview(
        config,
        Schedule(world_size=group.size()),
        width=width,
        height=height,
        text_tokens=text_tokens,
        dtype=dtype,
    )
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    # One rank's queries are a part, its products' rows too.
    tokens = -(-(width * height // 256 + text_tokens) // group.size())
    sent = foreseen.layers[0].kv_bytes // (group.size() - 1)
    measured = torch.tensor(
        [
            *measure_rates(tokens, heads, head_dim, dtype, device),
            measure_link(group, device, sent),
        ],
        device=device,
    )
    dist.all_reduce(measured, op=dist.ReduceOp.MIN, group=group)
    rates = Rates(*measured.tolist())
    return rates, choose(foreseen.layers, rates)


def examine(config: Mapping[str, Any], options: Mapping[str, Any]) -> Examined:
    """As one of several ranks: measure each pair's link, the kernels, and choose.

    Args:
        config: see `decide`.
        options: its keyword arguments.
    """
    device = join()
    links = []
    for pair in itertools.combinations(range(dist.get_world_size()), 2):
        group = dist.new_group(list(pair))
        gbs = torch.zeros((), device=device)
        if dist.get_rank() in pair:
            gbs += measure_link(group, device, PROBE_BYTES)
        dist.all_reduce(gbs, op=dist.ReduceOp.MAX)
        reaches = torch.cuda.can_device_access_peer(*pair) if device.type == "cuda" else None
        links.append(Link(pair, reaches, gbs.item()))
    rates, choice = decide(config, device, **options)
    return Examined(tuple(links), rates, choice)
