"""Which ranks share the work: a given group, the default one, or one that torchrun announced."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from piflux.runtime.ranks import ProcessRanks, Ranks, VirtualRanks

# A dead peer is noticed after this long at the latest.
DEFAULT_TIMEOUT_S = 60.0


def resolve_group(group: dist.ProcessGroup | DeviceMesh | VirtualRanks | None) -> Ranks | None:
    """The ranks to run on; None for one rank alone.

    Without a group it is the default one; where none is initialised but torchrun's environment is
    present, it is initialised (NCCL on CUDA, gloo on CPU) with a timeout of `PIFLUX_TIMEOUT_S`
    seconds (60 if unset); elsewhere there is one rank.

    Raises:
        ValueError: a mesh of more than one dimension, or a group this process isn't in.
        RuntimeError: a group for CUDA where there is none.
        TypeError: something else.
    """
    if isinstance(group, VirtualRanks):
        return group if group.size > 1 else None
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"piflux needs a 1-D DeviceMesh, got {group.ndim} dimensions: pass one of them, "
                "as in mesh['ring']"
            )
        group = group.get_group()
    if group is None:
        if not dist.is_initialized():
            if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
                return None
            _initialise()
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "this rank is not a member of the given group: call piflux.parallelize only on the "
            "ranks of the group"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a ProcessGroup, a 1-D DeviceMesh, virtual ranks or None, got "
            f"{type(group).__name__}"
        )
    if "nccl" in dist.get_backend_config(group) and not torch.cuda.is_available():
        raise RuntimeError(
            "the process group is NCCL's, but this machine has no CUDA device: initialise "
            "torch.distributed with backend='gloo' to run on CPUs"
        )
    return ProcessRanks(group) if group.size() > 1 else None


def _initialise() -> None:
    asked = os.environ.get("PIFLUX_TIMEOUT_S", DEFAULT_TIMEOUT_S)
    try:
        timeout = timedelta(seconds=float(asked))
    except ValueError:
        raise ValueError(f"PIFLUX_TIMEOUT_S must be seconds, got {asked!r}") from None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    # A program that never heard of the group can't destroy it. gloo's threads may hold the last
    # collective's tensors, and to free them in an interpreter that ends is to abort.
    atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def serves(ranks: Ranks | None, device: torch.device) -> bool:
    """Whether the ranks can send each other tensors of `device`."""
    if not isinstance(ranks, ProcessRanks):
        return True
    served = dist.get_backend_config(ranks.group)
    return device.type in dict(pair.split(":") for pair in served.split(",") if ":" in pair)


def check_device(ranks: Ranks | None, device: torch.device) -> None:
    """Raises RuntimeError where the ranks' process group can't move tensors of `device`."""
    if isinstance(ranks, ProcessRanks) and not serves(ranks, device):
        raise RuntimeError(
            f"the model is on {device.type}, but the process group serves only "
            f"{dist.get_backend_config(ranks.group)}: move the model, or initialise "
            "torch.distributed with 'cpu:gloo,cuda:nccl'"
        )
