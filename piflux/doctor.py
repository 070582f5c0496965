"""What this machine can do, and which policy suits it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from piflux.bench import FLUX_DEV, flops, gemm_tflops
from piflux.runtime.ranks import all_gather
from piflux.schedule import Policy

# A gather that takes at most this share of a step is worth being exact.
NEGLIGIBLE = 0.05
# Of a step's time, what displaced may send: links are slower while kernels run.
HIDDEN = 0.8
_MEGABYTES = 16  # that a rank sends to measure a link


def choose_policy(sent_s: float, compute_s: float) -> tuple[Policy, str]:
    """The freshest keys and values whose transfer a step can afford, and the reason in words.

    Args:
        sent_s: seconds to all-gather all keys and values of a step.
        compute_s: seconds that a rank computes in a step.
    """
    share = sent_s / compute_s
    what = f"gathering keys and values takes {share:.1%} of a step's computing"
    if share <= NEGLIGIBLE:
        return "gather", f"{what}: exact, at next to no cost"
    if share <= HIDDEN:
        return "displaced", f"{what}: it hides behind it, so they are one step old"
    return "rotate", f"{what}: too long to hide, so none are sent"


def step_times(
    config: dict[str, Any], tokens: int, ranks: int, tflops: float, link_gbs: float, bytes_: int
) -> tuple[float, float]:
    """(seconds to all-gather, seconds to compute) of one step of a FLUX transformer on a rank.

    Args:
        config: the transformer's.
        tokens: text and image.
        ranks: that share them.
        tflops: rate of a matrix product here.
        link_gbs: GB/s that a rank sends.
        bytes_: of one number.
    """
    layers = config["num_layers"] + config["num_single_layers"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    compute_s = sum(flops(layers, width, tokens)) / ranks / tflops / 1e12
    sent = 2 * width * bytes_ * layers * tokens / ranks * (ranks - 1)
    return sent / link_gbs / 1e9, compute_s


def measure_link(group: dist.ProcessGroup, device: torch.device) -> float:
    """GB/s that a rank sends in an all-gather, the slowest rank's median; the same on all ranks."""
    size = group.size()
    mine = torch.rand(_MEGABYTES * 2**18 // (size - 1), device=device)
    everyones = mine.new_empty(size * len(mine))
    times = []
    for _ in range(6):
        dist.barrier(group)
        start = time.perf_counter()
        all_gather(everyones, mine, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    seconds = torch.tensor(statistics.median(times[1:]), device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return mine.nbytes * (size - 1) / seconds.item() / 1e9


def choose_here(
    config: dict[str, Any], tokens: int, group: dist.ProcessGroup
) -> tuple[Policy, str]:
    """`choose_policy` for a FLUX transformer by what is measured now; the same on all ranks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width = config["num_attention_heads"] * config["attention_head_dim"]
    mine = gemm_tflops(tokens // group.size(), width, device, dtype)
    rate = torch.tensor(mine, device=device)
    dist.all_reduce(rate, op=dist.ReduceOp.MIN, group=group)
    link = measure_link(group, device)
    return choose_policy(
        *step_times(config, tokens, group.size(), rate.item(), link, dtype.itemsize)
    )


def machine() -> dict[str, Any]:
    """Versions, processors and GPUs, with which GPUs reach each other's memory."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    for name in ("piflux", "torch", "diffusers", "transformers", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    count = torch.cuda.device_count()
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(count)]
    if count:
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(str(x) for x in torch.cuda.nccl.version())
        found["peer_access"] = [
            [i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)]
            for i in range(count)
        ]
    return found


def advice(link_gbs: float, ranks: int, device: torch.device) -> dict[str, Any]:
    """Which policy this machine would choose for FLUX.1-dev at 1024 x 1024, and why."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, width = 4096 + 512, FLUX_DEV["num_attention_heads"] * FLUX_DEV["attention_head_dim"]
    tflops = gemm_tflops(tokens if device.type == "cuda" else 256, width, device, dtype)
    sent_s, compute_s = step_times(FLUX_DEV, tokens, ranks, tflops, link_gbs, dtype.itemsize)
    policy, reason = choose_policy(sent_s, compute_s)
    return {
        "ranks": ranks,
        "link_gbs": link_gbs,
        "gemm_tflops": tflops,
        "gather_ms": 1000 * sent_s,
        "compute_ms": 1000 * compute_s,
        "policy": policy,
        "reason": reason,
    }
