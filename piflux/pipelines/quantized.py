"""Transformers' blocks in 8 bits, made from what a folder has, layer by layer."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from piflux.errors import CannotLoad
from piflux.pipelines.blocks import blocks_of
from piflux.pipelines.together import can_share, weights_together

Quantization = Literal["fp8", "int8"]

MULTIPLE = 16
"""Of rows and columns, as 8-bit matrix products of GPUs want them."""

_ONE_ROW = re.compile(r"norm|mod|emb|time", re.IGNORECASE)
"""In names within a block: layers that multiply one row of numbers, of the time, not tokens. They
are computed for all steps at once, and their rounding would show in every token."""


def quantize(
    model: nn.Module,
    kind: Quantization,
    device: torch.device | str | None = None,
    home: torch.device | str | None = None,
) -> int:
    """Turn the linear layers of a model's blocks to 8 bits, in place, by torchao.

    Weights are scaled by row, and activations by token as they come, so that the matrix products
    run in 8 bits, too. 'fp8' needs a GPU that has such products (compute capability 8.9). Layers
    that multiply the embedded time stay as they are, and so do those whose sizes are no multiples
    of 16.

    Args:
        model: in bfloat16 or float32, on any device.
        kind: 'fp8' (e4m3) or 'int8'.
        device: where each layer is quantized, one at a time, so that `model` need not fit there as
            it is. None: where it is.
        home: where it is left. None: on `device`. On the host ranks of one machine have it once,
            where all ranks of the default process group call this together.

    Returns:
        How many layers were turned.

    Raises:
        CannotLoad: torchao is not installed, the GPU can't do it, or nothing was found to turn.
    """
    if find_spec("torchao") is None:
        raise CannotLoad(
            "weights in 8 bits take the package torchao: pip install 'piflux[quantize]'"
        )
    # What it says while it is imported is for those who build it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao import quantization

    layers = layers_of(model)
    if not layers:
        raise CannotLoad(
            f"{type(model).__name__} has no blocks with linear layers that could be turned to 8 "
            "bits: leave its weights as they are"
        )
    config: Any
    if kind == "fp8":
        _check_fp8(torch.device(device or layers[0].weight.device))
        # Else inductor would search for each kernel's best settings, in minutes.
        config = quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), set_inductor_config=False
        )
    else:
        config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)

    def turn(layer: nn.Linear) -> None:
        if device is not None:
            layer.to(device)
        quantization.quantize_(layer, config)
        if home is not None:
            layer.to(home)

    if home is not None and torch.device(home).type == "cpu" and can_share():
        weights_together(layers, turn)
    else:
        for layer in layers:
            turn(layer)
    return len(layers)


def layers_of(model: nn.Module) -> list[nn.Linear]:
    """Those of a model's blocks that multiply tokens."""
    return [
        layer
        for block in blocks_of(model)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
        and not _ONE_ROW.search(name)
        and not any(size % MULTIPLE for size in layer.weight.shape)
    ]


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device is a GPU that multiplies 8-bit floating point numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _check_fp8(device: torch.device) -> None:
    if multiplies_fp8(device):
        return
    what = "a device that is no GPU"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        what = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    raise CannotLoad(
        f"fp8: {what} multiplies no 8-bit floating point numbers, which takes compute capability "
        "8.9: take int8"
    )
