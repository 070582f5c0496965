"""Small pictures of latents, by a linear map that is fitted to the pipeline's autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SAMPLES = 8
"""Pictures that the map is fitted on."""

SIZE = 128
"""Pixels a side of each."""

RIDGE = 1e-3
"""Of the least squares, relative to latents' mean square: some channels say little of colour."""


class Previews:
    """What a pipeline's latents look like.

    Args:
        weights: (channels + 1, 3): from latents, and a constant, to colours from 0 to 1.
        unpack: from what the pipeline's callback gets, and the picture's height and width in
            pixels, to (batch, channels, rows, columns), as the map was fitted on.
    """

    def __init__(self, weights: Tensor, unpack: Callable[[Tensor, int, int], Tensor]) -> None:
        self._weights, self._unpack = weights, unpack
        self._before: Tensor | None = None

    @classmethod
    def fit(cls, pipe: Any) -> Previews | None:
        """By least squares, on pictures of coloured blobs that the autoencoder encodes.

        Returns:
            None where the autoencoder has no encoder of pictures, or latents have a form that is
            not known.
        """
        vae: Any = getattr(pipe, "vae", None)
        config: Any = getattr(vae, "config", None)
        unpack = _unpacker(pipe)
        shift: float | Tensor = getattr(config, "shift_factor", None) or 0.0
        scale: float | Tensor | None = getattr(config, "scaling_factor", None)
        if hasattr(pipe, "_unpack_latents_with_ids") and hasattr(vae, "bn"):
            unpack, shift, scale = _of_flux_2(pipe), 0.0, 1.0
        elif scale is None and hasattr(pipe, "_unpack_latents") and hasattr(config, "latents_std"):
            # Of each channel: Qwen-Image. What is not packed are videos.
            shift, spread = (
                torch.tensor(x).view(-1, 1, 1) for x in (config.latents_mean, config.latents_std)
            )
            scale = 1 / spread
        if unpack is None or scale is None or not hasattr(vae, "encode"):
            return None
        parameter = next(vae.parameters())
        pictures = _blobs().to(parameter.device)
        with torch.no_grad():
            encoded = [_encoded(vae, 2 * x[None].to(parameter.dtype) - 1) for x in pictures]
        shift, scale = (
            x.to(parameter.device) if isinstance(x, Tensor) else x for x in (shift, scale)
        )
        latents = (torch.cat(encoded).float() - shift) * scale
        colours = F.interpolate(pictures, latents.shape[-2:], mode="area")
        x = _with_constant(latents).flatten(0, 2).double()
        y = colours.movedim(1, -1).flatten(0, 2).double()
        square = x.T @ x
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square)).to(square)
        return cls(torch.linalg.solve(square + ridge, x.T @ y).float(), unpack)

    def begin(self) -> None:
        """Another picture begins."""
        self._before = None

    def after(self, scheduler: Any, latents: Tensor, *, wanted: bool) -> Tensor | None:
        """What the latents become if the last step's direction is followed to the end.

        Args:
            scheduler: the pipeline's.
            latents: after a step.
            wanted: whether to tell; else they are remembered for the next step.

        Returns:
            Shaped like `latents`; these themselves where the direction is not known.
        """
        before, self._before = self._before, latents
        if not wanted:
            return None
        sigmas, at = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
        # Where noise and picture are mixed in proportion, a step goes straight towards both.
        straight = "FlowMatch" in type(scheduler).__name__
        if before is None or not straight or sigmas is None or not at or at >= len(sigmas):
            return latents
        now, then = float(sigmas[at]), float(sigmas[at - 1])
        if now == then:
            return latents
        return latents - now * (latents - before) / (now - then)

    def pictures(self, latents: Tensor, height: int, width: int) -> list[Image.Image]:
        """One a picture of the batch, with a pixel for each of the latents' places."""
        unpacked = self._unpack(latents, height, width).float()
        colours = _with_constant(unpacked) @ self._weights.to(unpacked.device)
        pixels = (255 * colours.clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
        return [Image.fromarray(x) for x in pixels]


def _encoded(vae: Any, picture: Tensor) -> Tensor:
    """(1, channels, rows, columns) of (1, 3, height, width); of videos' autoencoders, one frame."""
    frames = any(isinstance(x, nn.Conv3d) for x in vae.modules())
    found = vae.encode(picture.unsqueeze(2) if frames else picture).latent_dist.mode()
    return found.squeeze(2) if frames else found


Unpack = Callable[[Tensor, int, int], Tensor]


def _of_flux_2(pipe: Any) -> Unpack:
    """To the autoencoder's own latents, without the batch norm: a token has four of their places.

    Tokens come row by row.
    """
    cell, norm = 2 * pipe.vae_scale_factor, pipe.vae.bn
    mean = norm.running_mean.view(1, -1, 1, 1).float()
    std = (norm.running_var.view(1, -1, 1, 1).float() + pipe.vae.config.batch_norm_eps).sqrt()

    def unpack(latents: Tensor, height: int, width: int) -> Tensor:
        tokens = latents.float().mT.unflatten(-1, (height // cell, width // cell))
        unpacked: Tensor = pipe._unpatchify_latents(tokens * std + mean)
        return unpacked

    return unpack


def _unpacker(pipe: Any) -> Unpack | None:
    """Which shape the pipeline's latents have where callbacks get them."""
    factor = getattr(pipe, "vae_scale_factor", None)
    takes = inspect.signature(getattr(pipe, "_unpack_latents", lambda: None)).parameters
    if len(takes) == len(("latents", "height", "width", "factor")) and factor is not None:

        def unpack(latents: Tensor, height: int, width: int) -> Tensor:
            unpacked: Tensor = pipe._unpack_latents(latents, height, width, factor)
            return unpacked.squeeze(2) if unpacked.dim() == 5 else unpacked

        return unpack
    packed = hasattr(pipe, "_unpack_latents") or hasattr(pipe, "_unpack_latents_with_ids")
    if hasattr(pipe, "prepare_latents") and not packed:
        return lambda latents, height, width: latents
    return None


def _with_constant(latents: Tensor) -> Tensor:
    """(batch, rows, columns, channels + 1) of (batch, channels, rows, columns)."""
    last = latents.movedim(1, -1)
    return torch.cat([last, torch.ones_like(last[..., :1])], -1)


def _blobs() -> Tensor:
    """(SAMPLES, 3, SIZE, SIZE): smooth coloured ones, some with finer ones on them; from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(SAMPLES):
        picture = torch.zeros(1, 3, SIZE, SIZE)
        for cells, share in ((4, 1.0), (16, 0.5), (64, 0.25 * (i % 2))):
            noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
            picture += share * F.interpolate(noise, (SIZE, SIZE), mode="bicubic")
        found.append((1.4 * picture[0] + 0.5).clamp(0, 1))
    return torch.stack(found)
