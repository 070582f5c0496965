"""A pipeline's models with all of their weights, or none: what loaders only warn of is refused."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piflux.errors import CannotLoad
from piflux.memory.aside import plain

LIBRARIES = ("diffusers", "transformers")
"""Whose loaders report the keys that they did not find, or did not need."""

FEW = 3
"""So many keys are quoted."""


def models_of(folder: str, **options: Any) -> dict[str, nn.Module]:
    """The models of a pipeline's folder, by the names of its parts; what is no model is left out.

    Args:
        folder: of the pipeline; of a hub's id nothing is loaded here.
        options: of the loaders.

    Raises:
        CannotLoad: a part lacks weights, or has some that its config knows nothing of.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return {}
    found = {}
    for name, part in json.loads(index.read_text()).items():
        kind = _kind(part)
        if kind is None:
            continue
        where = f"{folder}/{name}"
        try:
            model, report = kind.from_pretrained(where, output_loading_info=True, **options)
        except Exception as error:  # whatever loaders trip over in a broken folder
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CannotLoad(
                f"{where} can't be loaded: {type(error).__name__}: {' '.join(lines)[:500]}"
            ) from error
        lacks, surplus = _keys(report, "missing_keys"), _keys(report, "unexpected_keys")
        if lacks or surplus:
            told = [
                f"{what} {len(keys)}: {', '.join(keys[:FEW])}{', ..' if len(keys) > FEW else ''}"
                for what, keys in (("it lacks", lacks), ("it has too many,", surplus))
                if keys
            ]
            raise CannotLoad(
                f"{where}: the weights are not those that its config.json describes: "
                f"{'; '.join(told)}. Fetch the folder anew"
            )
        found[name] = model
    return found


def check_numbers(pipe: Any, folder: str, device: torch.device) -> None:
    """Every weight is a number; by its norm, on `device`, to which each is brought for it.

    Raises:
        CannotLoad: one is not, or is infinite.
    """
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        # Of those in 8 bits the scales.
        weights = [
            (key, x)
            for key, weight in part.named_parameters()
            for x in plain(weight.detach())
            if x.is_floating_point() and x.element_size() > 1
        ]
        if not weights:
            continue
        norms = [
            torch.linalg.vector_norm(x.to(device), dtype=torch.float32).cpu() for _, x in weights
        ]
        finite = torch.stack(norms).isfinite().tolist()
        wrong = [key for (key, _), is_finite in zip(weights, finite, strict=True) if not is_finite]
        if wrong:
            raise CannotLoad(
                f"{folder}/{name}: {len(wrong)} weights are not numbers, or infinite: "
                f"{', '.join(wrong[:FEW])}. Fetch the folder anew"
            )


def _kind(part: Any) -> Any:
    """The class of a model that a pipeline's index names, None for other parts."""
    if not isinstance(part, list) or len(part) != 2 or part[0] not in LIBRARIES:
        return None
    kind = getattr(import_module(part[0]), part[1], None)
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None


def _keys(report: Any, name: str) -> list[str]:
    return sorted(map(str, report.get(name, ())))
