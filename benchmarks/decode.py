"""Seconds that FLUX's autoencoder takes to make pixels: on one rank, and in bands of rows on all.

Run on the ranks that share the picture, on GPUs or CPUs, with random weights:

    torchrun --nproc_per_node=2 benchmarks/decode.py 1024 2048
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from piflux.cost.clock import median_seconds
from piflux.integrations.bands import Bands
from piflux.launch import is_first, join
from piflux.ranks.processes import ProcessRanks
from piflux.tools.records import header, script

LATENT_CHANNELS = 16
PIXELS_A_LATENT = 8


@dataclass(frozen=True)
class Row:
    """One square picture.

    Attributes:
        size: its pixels a side.
        whole_s: median seconds of a rank that decodes all of it.
        bands_s: likewise of ranks that decode a band each, joined on every rank.
        off_by: the greatest difference of a pixel, over the greatest pixel.
    """

    size: int
    whole_s: float
    bands_s: float
    off_by: float


def autoencoder(device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """FLUX.1's, with one seed's weights on every rank."""
    torch.manual_seed(0)
    with device:
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=LATENT_CHANNELS,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return vae.to(dtype).eval()


@torch.no_grad()
def measure(vae: AutoencoderKL, ranks: ProcessRanks, size: int) -> Row:
    side = size // PIXELS_A_LATENT
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, LATENT_CHANNELS, side, side, generator=generator)
    latents = latents.to(vae.device, vae.dtype)
    on_gpu = latents.is_cuda

    def whole() -> Tensor:
        return vae.decode(latents, return_dict=False)[0]

    def in_bands() -> Tensor:
        bands = Bands(ranks, side)
        band = bands.cut(latents)
        with bands:
            band = vae.decode(band, return_dict=False)[0]
        return bands.join(band)

    want = whole()
    off_by = ((in_bands() - want).abs().max() / want.abs().max()).item()
    return Row(size, median_seconds(whole, on_gpu), median_seconds(in_bands, on_gpu), off_by)


def main(
    sizes: Annotated[list[int], typer.Argument(help="Pixels a side, multiples of 8.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
) -> None:
    device = join()
    vae = autoencoder(device, getattr(torch, dtype))
    ranks = ProcessRanks.of(dist.group.WORLD)
    rows = [measure(vae, ranks, size) for size in sizes]
    if not is_first():
        return
    found = {
        **header(program=script(), ranks=ranks.size),
        "ranks": ranks.size,
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "dtype": dtype,
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(found, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + os.linesep)


if __name__ == "__main__":
    typer.run(main)
