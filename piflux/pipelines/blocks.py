"""The blocks of a model that has not been captured: found in its tree of modules."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The items of a model's outermost module lists in which a class repeats."""
    lists: dict[str, nn.ModuleList] = {}
    for path, found in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if not isinstance(found, nn.ModuleList) or inside:
            continue
        if len(found) > len({type(block) for block in found}):
            lists[path] = found
    return [block for found in lists.values() for block in found]
