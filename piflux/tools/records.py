"""What stands beside every number that is written down: when, where, with what, how."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist

PACKAGES = ("piflux", "torch", "diffusers", "transformers", "triton")


def header(*packages: str, program: Sequence[str] = ("piflux",), ranks: int = 1) -> dict[str, Any]:
    """The head of a record that goes into a file.

    Args:
        packages: whose versions are written down beside those of `versions`.
        program: how this process was started, without its arguments.
        ranks: how many devices like this one were at work.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*program, *sys.argv[1:]]),
        "hardware": hardware(ranks),
        "versions": versions(*packages),
    }


def script() -> tuple[str, str]:
    """`program` of a benchmark that Python runs as a file."""
    return "python", sys.argv[0]


def hardware(ranks: int = 1) -> str:
    """'2 x NVIDIA H200', or what stands for CPUs."""
    if not torch.cuda.is_available():
        return "CPU, one thread a rank"
    return (f"{ranks} x " if ranks > 1 else "") + torch.cuda.get_device_name()


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
