"""Rates that were measured once on this machine, so that `policy='auto'` need not measure again."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from piflux.cost.cost import Rates
from piflux.cost.rates import slowest_rates
from piflux.ranks.processes import ProcessRanks

log = logging.getLogger(__name__)


def rates_file() -> Path:
    """Where rates are remembered: under `XDG_CACHE_HOME`, or else `~/.cache`."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "piflux" / "rates.json"


def remembered_rates(
    ranks: ProcessRanks,
    query: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    count: int,
) -> Rates:
    """As `slowest_rates`, but what all ranks remember is not measured again.

    All ranks call this together, and get the same.
    """
    shape = "x".join(map(str, query))
    key = f"{_machine(ranks, device)}; attention {shape} {dtype}; {count} bytes"
    known = _read().get(key, [0.0, 0.0, 0.0])
    agreed = ranks.least(known)
    if min(agreed) > 0:
        return Rates(*agreed)
    rates = slowest_rates(ranks, query, dtype, device, count)
    if int(os.environ.get("LOCAL_RANK", ranks.rank)) == 0:  # one of each host
        _write(key, [rates.linear_tflops, rates.attention_tflops, rates.link_gbs])
    return rates


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} with {os.cpu_count()} cores"


def _machine(ranks: ProcessRanks, device: torch.device) -> str:
    """What rates depend on beside a model's shapes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    where = "one host" if here >= ranks.size else f"{here} ranks a host"
    backends = ",".join(f"{device}:{name}" for device, name in ranks.backends.items())
    link = f"{backends} on {where}"
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        link += " with peers" if torch.cuda.can_device_access_peer(0, 1) else " without peers"
    return f"{device_name(device)}; {ranks.size} ranks; torch {torch.__version__}; {link}"


def _read() -> dict[str, Any]:
    """By key, the numbers of `Rates`. A file that can't be read is as good as none: all is measured
    again, and written anew."""
    try:
        found = json.loads(rates_file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is not readable, so rates are measured again: %s", rates_file(), error)
        return {}
    return found if isinstance(found, dict) else {}


def _write(key: str, numbers: Sequence[float]) -> None:
    """Keep these as well; where that is not possible, they are measured again the next time."""
    path = rates_file()
    written = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(_read() | {key: list(numbers)}, indent=1))
        written.replace(path)
    except OSError as error:
        log.warning("rates can't be remembered in %s: %s", path, error)
