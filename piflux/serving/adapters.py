"""LoRAs in the weights themselves: another adapter is other numbers, and nothing is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from piflux.pipelines.folders import add_loras

Loras = tuple[tuple[str, float], ...]


class Adapters:
    """Which adapters a pipeline's weights have in them.

    Args:
        pipe: a diffusers pipeline, whose weights are changed in place.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._worn: Loras = ()
        self._without: list[tuple[Tensor, Tensor]] = []  # weights, and what was in them

    def wear(self, loras: Loras) -> None:
        """Have these and no others in the weights.

        Args:
            loras: files with their scales.

        Raises:
            CannotLoad: one of them doesn't fit; then there are none in the weights.
        """
        if loras == self._worn:
            return
        with torch.no_grad():
            for weight, before in self._without:
                weight.copy_(before)
        self._worn, self._without = (), []
        if not loras:
            return
        try:
            add_loras(self._pipe, loras)
            layers = _adapted(self._pipe)
            self._without = [(x, x.detach().clone()) for x in layers]
            self._pipe.fuse_lora(components=self._pipe._lora_loadable_modules)
        finally:
            self._pipe.unload_lora_weights()
        with torch.no_grad():
            for weight, _ in self._without:
                weight.add_(0)  # peft changes their data, which doesn't count as another version
        self._worn = loras


def _adapted(pipe: Any) -> list[Tensor]:
    """The weights of layers that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = [x for x in pipe.components.values() if isinstance(x, nn.Module)]
    layers = [m for part in parts for m in part.modules() if isinstance(m, BaseTunerLayer)]
    return [x for layer in layers for x in layer.get_base_layer().parameters()]
