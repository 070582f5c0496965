"""What a rank's environment says of it, checked where it is read."""

from __future__ import annotations

import math
import os

import torch.distributed as dist

DEFAULT_TIMEOUT_S = 60.0
"""How long a rank is waited for that lives."""

TIMEOUT = "PIFLUX_TIMEOUT_S"


def count(name: str, default: int | None = None, least: int = 0) -> int:
    """A number of ranks, or of one.

    Raises:
        ValueError: naming the variable; it isn't one.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(
            f"{name} must be a whole number from {least} on, got {text!r}: torchrun sets it, and "
            "so must whoever starts ranks without it"
        )
    return number


def check() -> None:
    """What announces this process as a rank fits together.

    Raises:
        ValueError: naming the variable that doesn't.
    """
    size = count("WORLD_SIZE", least=1)
    for name, larger, most in (
        ("RANK", "WORLD_SIZE", size),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", count("LOCAL_WORLD_SIZE", size, 1)),
    ):
        if count(name, 0) >= most:
            raise ValueError(f"{name} is {os.environ[name]}, but {larger} is {most}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"{name} is not set, but RANK and WORLD_SIZE are: torchrun sets all of them; unset "
                "RANK to run alone"
            )
    if not 0 < count("MASTER_PORT") < 2**16:
        raise ValueError(f"MASTER_PORT must be a port, got {os.environ['MASTER_PORT']!r}")


def timeout_asked() -> float | None:
    """Seconds of `PIFLUX_TIMEOUT_S`; None if it is unset.

    Raises:
        ValueError: it is no such number.
    """
    asked = os.environ.get(TIMEOUT)
    if asked is None:
        return None
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{TIMEOUT} must be a number of seconds above 0, got {asked!r}")
    return seconds


def timeout_s(group: dist.ProcessGroup) -> float:
    """How long ranks of a group wait for each other: as asked, or the group's own time if that is
    less than a minute."""
    asked = timeout_asked()
    if asked is not None:
        return asked
    backends = [group._get_backend(device) for device in group._device_types]
    options = [getattr(backend, "options", None) for backend in backends]
    own = [x._timeout.total_seconds() for x in options if x is not None]
    return min(DEFAULT_TIMEOUT_S, *own)
