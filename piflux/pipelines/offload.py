"""Models that are on the host, and on the device only while they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def visit(model: nn.Module, device: torch.device) -> None:
    """From now on a model on the host goes to `device` for each call of it, and leaves it after.

    What it has on the host stays there, so that nothing is copied back, and ranks that have mapped
    one file share its memory. For models that run once an image, such as text encoders.
    """
    from accelerate.hooks import ModelHook, add_hook_to_module, send_to_device

    class Visit(ModelHook):
        execution_device = device  # pipelines make their inputs where this says

        def __init__(self) -> None:
            self.at_home: list[tuple[Tensor, Tensor]] = []

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for x in (*module.parameters(), *module.buffers()):
                if x.device != device:
                    self.at_home.append((x, x.data))
                    x.data = x.data.to(device)
            return send_to_device(args, device), send_to_device(kwargs, device)

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            for x, home in self.at_home:
                x.data = home
            self.at_home = []
            return output

    add_hook_to_module(model, Visit(), append=True)
