"""Which ranks share the work: a given group, the default one, or one that torchrun announced."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from piflux.errors import RankFailed
from piflux.ranks import environment
from piflux.ranks.board import Silent, bounded
from piflux.ranks.meeting import Meeting
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.protocol import Ranks
from piflux.ranks.virtual import VirtualRanks

log = logging.getLogger(__name__)


def resolve_group(
    group: dist.ProcessGroup | DeviceMesh | Meeting | VirtualRanks | None,
) -> Ranks | None:
    """The ranks to run on; None for one rank alone.

    Without a group it is the default one; where none is initialised but torchrun's environment is
    present, it is initialised (NCCL on CUDA, gloo on CPU); elsewhere there is one rank. All have to
    join within `PIFLUX_TIMEOUT_S` seconds (60 if unset).

    Raises:
        RankFailed: they did not.
        ValueError: a mesh of more than one dimension, or a group this process isn't in.
        RuntimeError: a group for CUDA where there is none.
        TypeError: something else.
    """
    if isinstance(group, VirtualRanks):
        return group if group.size > 1 else None
    if isinstance(group, Meeting):
        return ProcessRanks.of(group) if group.size > 1 else None
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
    return ProcessRanks.of(group) if group.size() > 1 else None


def _initialise() -> None:
    environment.check()
    within_s = environment.timeout_asked() or environment.DEFAULT_TIMEOUT_S
    backend = "gloo"
    if torch.cuda.is_available():
        own_device()
        backend = "cpu:gloo,cuda:nccl"
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    try:
        # With torch's own timeout: what else the program does in this group may take longer.
        bounded(lambda: dist.init_process_group(backend), within_s)
    except (Silent, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RankFailed(
            f"rank {rank} could not join the others: {why}. It looked for the store of {size} "
            f"ranks at {where} (MASTER_ADDR, MASTER_PORT). Is it theirs, do all of them run, and "
            f"is {environment.TIMEOUT}={within_s:.3g} s enough for all to start?"
        ) from error
    # A program that never heard of the group can't destroy it. gloo's threads may hold the last
    # collective's tensors, and to free them in an interpreter that ends is to abort.
    atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device() -> torch.device:
    """This rank's GPU, made the current one; the CPU where there is no CUDA.

    Raises:
        RankFailed: the rank has no GPU of its own.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = environment.count("LOCAL_RANK", 0), torch.cuda.device_count()
    if local_rank >= gpus:
        raise RankFailed(
            f"rank {local_rank} of this host has no GPU of its own: there are {gpus}; start as "
            "many ranks as there are GPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def serves(ranks: Ranks | None, device: torch.device) -> bool:
    """Whether the ranks can send each other tensors of `device`."""
    if not isinstance(ranks, ProcessRanks):
        return True
    return device.type in ranks.backends


def check_device(ranks: Ranks | None, device: torch.device) -> None:
    """Whether ranks can compute on `device` and send each other its tensors.

    Raises:
        RuntimeError: their process group doesn't serve it, or it is another GPU than this rank's.
    """
    if not isinstance(ranks, ProcessRanks):
        return
    if not serves(ranks, device):
        raise RuntimeError(
            f"the model is on {device.type}, but the process group serves only "
            f"{', '.join(ranks.backends)}: move the model, or initialise "
            "torch.distributed with 'cpu:gloo,cuda:nccl'"
        )
    own = _own_gpu(device)
    if device != own:
        raise RuntimeError(
            f"the model is on {device}, but rank {ranks.rank} computes on {own}: move the model "
            f"there with .to('{own}'), or make {device} the current device with "
            "torch.cuda.set_device before piflux.parallelize"
        )


def bring(ranks: Ranks | None, model: nn.Module, others: Sequence[nn.Module] = ()) -> None:
    """Move a model from another rank's GPU to this rank's own.

    A script that says `.to("cuda")` before it has joined the others puts every rank's model on the
    first GPU.

    Args:
        ranks: who shares the work.
        model: a denoiser, moved in place.
        others: moved as well where they are on the same GPU as the model.
    """
    device = _device(model)
    own = _own_gpu(device)
    # Hooks put weights where they are needed themselves: what is here now is no mistake.
    hooked = any(hasattr(m, "_hf_hook") for x in (model, *others) for m in x.modules())
    if not isinstance(ranks, ProcessRanks) or device == own or hooked:
        return
    log.warning(
        "rank %d: moved from %s, where another rank computes, to %s. Call piflux.parallelize "
        'first and .to("cuda") after it, and no other rank\'s memory is needed',
        ranks.rank,
        device,
        own,
    )
    for module in (model, *others):
        if _device(module) == device:
            module.to(own)
    torch.cuda.empty_cache()  # what was theirs is the other rank's again


def _device(model: nn.Module) -> torch.device:
    tensors: Any = (*model.parameters(), *model.buffers())
    return next((x.device for x in tensors), torch.device("cpu"))


def _own_gpu(device: torch.device) -> torch.device:
    """This rank's GPU, for a GPU; any other device stays as it is."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
