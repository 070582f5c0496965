"""Decoding in bands of rows over real ranks: what the whole picture's decoder makes of it."""

import copy
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
import torch.nn.functional as F
from captures import captured_once
from diffusers.callbacks import PipelineCallback
from models import tiny_pipeline
from pipelines import autoencoder, drawn
from test_pipeline import draw
from torch import nn

import piflux
from piflux.integrations.bands import Bands, MixesRows
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.virtual import VirtualRanks

EXACT = 1e-5
LATENTS = (2, 4, 7, 5)  # seven rows: neither two nor three ranks get equal bands


def latents() -> torch.Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))


def deep() -> diffusers.AutoencoderKL:
    """Three resolutions, with the convolutions around the decoder, as Stable Diffusion has them."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=2,
    )
    return drawn(vae)


def tiny() -> diffusers.AutoencoderTiny:
    """Without norms or attention."""
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return drawn(vae)


DECODERS = {"flux": autoencoder, "deep": deep, "tiny": tiny}


def banded(vae, group, z: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A picture, and how many of its rows this rank made."""
    bands = Bands(ProcessRanks.of(group), z.shape[-2])
    band = bands.cut(z)
    with torch.no_grad(), bands:
        band = vae.decode(band, return_dict=False)[0]
    return bands.join(band), band.shape[-2]


def in_bands(rank, group, name):
    return banded(DECODERS[name](), group, latents())


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_bands_join_to_the_whole_picture(ranks, name, n):
    with torch.no_grad():
        want = DECODERS[name]().decode(latents(), return_dict=False)[0]
    pictures, rows = zip(*ranks(n, in_bands, name), strict=True)
    assert want.std() > 0.01
    assert sum(rows) == want.shape[-2]
    for picture in pictures:
        assert picture.shape == want.shape
        assert (picture - want).abs().max() <= EXACT * want.abs().max()
        assert torch.equal(picture, pictures[0])


def in_bfloat16(rank, group):
    return banded(deep().bfloat16(), group, latents().bfloat16())[0]


def test_bands_in_bfloat16_are_as_near_as_the_whole_picture(ranks):
    """To the one in float32."""
    with torch.no_grad():
        true = deep().decode(latents(), return_dict=False)[0]
        rounded = deep().bfloat16().decode(latents().bfloat16(), return_dict=False)[0]
    allowed = (rounded - true).abs().mean()
    for picture in ranks(2, in_bfloat16):
        assert picture.dtype == torch.bfloat16
        assert 0 < (picture - true).abs().mean() <= 1.2 * allowed


def conv(**options):
    return nn.Conv2d(4, 4, 3, **options)


UNKNOWN = {
    "stride": conv(stride=2, padding=1),
    "dilation": conv(dilation=2, padding=2),
    "no padding": conv(),
    "padding by name": conv(padding="same"),
    "circular padding": conv(padding=1, padding_mode="circular"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "size": lambda x: F.interpolate(x, size=(14, 10)),
    "mean": lambda x: x.mean(-2),
    "flip": lambda x: x.flip(-2),
    "dropout": nn.Dropout(0.5),
    "softmax": lambda x: x.softmax(-2),
    "shuffle": lambda x: F.pixel_shuffle(x, 2),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
}


@pytest.mark.parametrize("op", UNKNOWN.values(), ids=UNKNOWN)
def test_an_op_that_may_mix_rows_is_refused(op):
    """Before a rank sends anything: alone, this one would get no answer."""
    x = torch.zeros(LATENTS)
    bands = Bands(Unanswering(2), LATENTS[-2])
    assert op(x).shape[0] == LATENTS[0]
    with bands, pytest.raises(MixesRows):
        op(x)


class Unanswering(VirtualRanks):
    def gather(self, piece):
        raise AssertionError("sent")


# --------------------------------------------------------------------------------- in a pipeline


class Noting(diffusers.AutoencoderKL):
    """Notes the rows of all latents that it decodes."""

    heights: list[int]

    def decode(self, z, *args, **kwargs):
        self.heights.append(z.shape[-2])
        return super().decode(z, *args, **kwargs)


def noting_pipeline():
    pipe = tiny_pipeline()
    pipe.vae.__class__ = Noting
    pipe.vae.heights = []
    return pipe


def preview(pipe, step, timestep, kwargs):
    pipe.vae.decode(torch.zeros(1, 4, 5, 7), return_dict=False)
    return {}


class Previews(PipelineCallback):
    """The same as one of diffusers' own callbacks, which says what it wants to see."""

    tensor_inputs = ("latents",)

    def callback_fn(self, pipe, step, timestep, kwargs):
        assert "latents" in kwargs
        return preview(pipe, step, timestep, kwargs)


ROWS, BAND, PREVIEW, STEPS = 10, 5, 5, 5
PIXELS = {"output_type": "pt"}


class Situation(NamedTuple):
    """How a pipeline is called, and what comes of it.

    Attributes:
        rows: of every latent that the first of two ranks decodes, in order.
        change: made to the pipeline before it is parallelized.
        first: options of the call on the first rank.
        others: likewise on the others.
    """

    rows: list[int]
    change: Callable[[Any], None] = lambda pipe: None
    first: dict[str, Any] = PIXELS
    others: dict[str, Any] = PIXELS


def with_tiles(pipe):
    pipe.vae.enable_tiling()


def with_an_unknown_op(pipe):
    pipe.vae.decoder.conv_act = nn.Softmax(-2)


PREVIEWS = [PREVIEW] * STEPS
SITUATIONS = {
    "pixels": Situation([BAND]),
    "tiles": Situation([ROWS], with_tiles),
    "unknown op": Situation([BAND, ROWS], with_an_unknown_op),
    "latents elsewhere": Situation([ROWS], others={"output_type": "latent"}),
    "preview on one": Situation(
        [*PREVIEWS, BAND], first=PIXELS | {"callback_on_step_end": preview}
    ),
    "preview by a class": Situation(
        [*PREVIEWS, BAND], first=PIXELS | {"callback_on_step_end": Previews()}
    ),
}


@captured_once()
def drawn_in(rank, group, name):
    """An image and the rows of what was decoded for it."""
    situation, pipe = SITUATIONS[name], noting_pipeline()
    situation.change(pipe)
    parallel = piflux.parallelize(pipe, group=group, policy="gather", inner="eager")
    image = draw(parallel, 0, **(situation.others if rank else situation.first))
    rows = list(pipe.vae.heights)
    if rank == 0:  # outside of a call a rank is alone
        parallel.vae.decode(torch.zeros(1, 4, 5, 7))
        assert pipe.vae.heights == [*rows, 5]
    return image, rows


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_pipeline_decodes_in_bands_where_all_ranks_do(ranks, name):
    pipe = noting_pipeline()
    SITUATIONS[name].change(pipe)
    want = draw(pipe, 0, **PIXELS)
    image, rows = ranks(2, drawn_in, name)[0]
    assert rows == SITUATIONS[name].rows
    assert (image - want).abs().max() <= EXACT


@captured_once()
def more_ranks_than_rows(rank, group):
    pipe = noting_pipeline()
    parallel = piflux.parallelize(pipe, group=group, policy="gather", inner="eager")
    return draw(parallel, 0, **PIXELS, height=4), pipe.vae.heights


def test_fewer_rows_than_ranks_are_decoded_whole(ranks):
    want = draw(tiny_pipeline(), 0, **PIXELS, height=4)
    for image, rows in ranks(3, more_ranks_than_rows):
        assert rows == [2]
        assert (image - want).abs().max() <= EXACT


@captured_once()
def drawn_by_a_plain_pipeline(rank, group):
    """Around a parallel transformer, with the parallel pipeline's autoencoder."""
    pipe = noting_pipeline()
    parallel = piflux.parallelize(pipe, group=group, policy="gather", inner="eager")
    plain = diffusers.FluxPipeline(**parallel.components)
    plain.set_progress_bar_config(disable=True)
    return draw(plain, 0, output_type="latent" if rank else "pt"), pipe.vae.heights


def test_a_plain_pipeline_decodes_whole_pictures(ranks):
    """It can't know whether all ranks want one: the second doesn't, and the first must not wait."""
    (image, rows), (_, others) = ranks(2, drawn_by_a_plain_pipeline)
    assert (rows, others) == ([ROWS], [])
    assert (image - draw(tiny_pipeline(), 0, **PIXELS)).abs().max() <= EXACT


@pytest.mark.parametrize("group", [None, piflux.virtual_ranks(2)], ids=["one", "virtual"])
def test_one_process_decodes_as_ever(group):
    pipe = tiny_pipeline()
    assert piflux.parallelize(pipe, group=group, inner="eager").vae is pipe.vae


@captured_once()
def seen(rank, group, folder):
    """A parallel pipeline's autoencoder is the pipeline's own, on disk and in a copy, too."""
    pipe = tiny_pipeline()
    parallel = piflux.parallelize(pipe, group=group, inner="eager")
    assert parallel.vae is not pipe.vae and isinstance(parallel.vae, diffusers.AutoencoderKL)
    assert parallel.vae.decoder is pipe.vae.decoder
    assert type(copy.deepcopy(parallel.vae)) is diffusers.AutoencoderKL
    again = piflux.parallelize(
        diffusers.FluxPipeline(**pipe.components | {"vae": parallel.vae}),
        group=group,
        policy="gather",
        inner="eager",
    )
    if rank == 0:
        parallel.save_pretrained(folder)
    return draw(again, 0, **PIXELS)


def test_a_parallel_autoencoder_is_still_one(ranks, tmp_path):
    want = draw(tiny_pipeline(), 0, **PIXELS)
    for image in ranks(2, seen, str(tmp_path)):
        assert (image - want).abs().max() <= EXACT
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
