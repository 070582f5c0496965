"""Models that are on the host, and on the device only while they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from piflux.pipelines.blocks import blocks_of


def visit(model: nn.Module, device: torch.device) -> None:
    """From now on a model on the host goes to `device` block by block as it is called.

    What it has on the host stays there, so that nothing is copied back, and ranks that have mapped
    one file share its memory. For models that run once an image, such as text encoders: each call
    sends all of the weights.
    """
    from accelerate.hooks import ModelHook, add_hook_to_module, send_to_device

    class Visit(ModelHook):
        """Takes some tensors to the device for the time of a call."""

        execution_device = device  # pipelines make their inputs where this says

        def __init__(self, tensors: Sequence[Tensor]) -> None:
            self.tensors = tensors
            self.homes: list[Tensor] = []

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.homes = [x.data for x in self.tensors]
            for x in self.tensors:
                x.data = x.data.to(device)
            return send_to_device(args, device), send_to_device(kwargs, device)

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            for x, home in zip(self.tensors, self.homes, strict=True):
                x.data = home
            self.homes = []
            return output

    taken: set[int] = set()
    for block in blocks_of(model):
        own = [x for x in _tensors(block) if id(x) not in taken]
        taken |= set(map(id, own))
        add_hook_to_module(block, Visit(own), append=True)
    rest = [x for x in _tensors(model) if id(x) not in taken]
    add_hook_to_module(model, Visit(rest), append=True)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
