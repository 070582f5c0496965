"""A whole FluxPipeline over ranks, and one that does not know its transformer is parallel."""

import contextlib
import io
import json
from functools import partial
from itertools import cycle

import classes
import pytest
import torch
from captures import captured_once
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import (
    QwenImageCoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from model_zoo import qwen_image
from models import POOLED_DIM, TEXT_DIM, _draw, tiny_flux, tiny_pipeline
from oracle import Oracle

import piflux

TEXT = 13
STEPS = 5
EXACT = 1e-5


def prompt(seed=0, negative=False):
    """Embeddings in place of a prompt, under the pipeline's own argument names."""
    generator = torch.Generator().manual_seed(seed)
    prefix = "negative_" if negative else ""
    return {
        f"{prefix}prompt_embeds": torch.randn(1, TEXT, TEXT_DIM, generator=generator),
        f"{prefix}pooled_prompt_embeds": torch.randn(1, POOLED_DIM, generator=generator),
    }


def draw(pipe, seed=None, **options):
    """Latents of 5 x 7 tokens, from a generator of this seed or from none."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    options = {"output_type": "latent"} | options
    size = {"height": 20, "width": 28, "num_inference_steps": STEPS}
    return pipe(**prompt() | size | options, generator=generator, return_dict=False)[0]


def guided():
    return prompt(seed=9, negative=True) | {"true_cfg_scale": 2.0}


def oracle_pipeline(n, policy, passes=1):
    """A one-rank pipeline whose transformer is the oracle, one for each pass of a step."""
    pipe = tiny_pipeline()
    oracles = cycle([Oracle(tiny_flux(), n, policy) for _ in range(passes)])

    def forward(return_dict, **inputs):
        return (next(oracles)(**inputs),)

    pipe.transformer.forward = forward
    return pipe


def assert_close(images, wanted):
    for image, want in zip(images, wanted, strict=True):
        assert (image - want).abs().max() <= EXACT


def pairs(pipe):
    latents = draw(pipe, 0, num_images_per_prompt=2)
    return latents, draw(pipe, 1, num_images_per_prompt=2, output_type="pt")


@captured_once()
def gathered(rank, group):
    pipe = piflux.parallelize(tiny_pipeline(), group=group, policy="gather", inner="eager")
    return pairs(pipe)


def test_gather_equals_one_rank(ranks):
    """Two images for one prompt: their latents, then decoded ones."""
    want = pairs(tiny_pipeline())
    for images in ranks(2, gathered):
        assert_close(images, want)


@captured_once()
def rotated(rank, group, whole):
    """Twice the same prompt, then with a negative one; `whole` parallelizes the pipeline."""
    pipe = tiny_pipeline()
    options = {"group": group, "policy": "rotate", "inner": "eager"}
    if whole:
        pipe = piflux.parallelize(pipe, **options)
    else:
        pipe.transformer = piflux.parallelize(pipe.transformer, **options)
    return draw(pipe, 0), draw(pipe, 1), draw(pipe, 1, **guided()), draw(pipe, 0)


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
def test_every_call_is_an_image_of_its_own(ranks, whole):
    """As fresh oracles have it, whether piflux saw the calls or inferred them."""
    want = [
        draw(oracle_pipeline(2, "rotate"), 0),
        draw(oracle_pipeline(2, "rotate"), 1),
        draw(oracle_pipeline(2, "rotate", passes=2), 1, **guided()),
        draw(oracle_pipeline(2, "rotate"), 0),
    ]
    for images in ranks(2, rotated, whole):
        assert_close(images, want)


@captured_once()
def seedless(rank, group):
    """Ranks whose global random states differ, as those of real processes do."""
    pipe = piflux.parallelize(tiny_pipeline(), group=group, policy="gather", inner="eager")
    torch.manual_seed(rank)
    return draw(pipe), draw(pipe)


def test_without_a_generator_ranks_draw_as_the_first_alone(ranks):
    """From its default generator, one image after the other."""
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    want = draw(pipe), draw(pipe)
    for images in ranks(2, seedless):
        assert_close(images, want)


def halve(pipe, step, timestep, kwargs):
    """A callback that edits the second step's latents, in place as well as by what it returns."""
    if step == 1:
        kwargs["latents"].mul_(0.5)
    return {"latents": kwargs["latents"] * (0.5 if step == 2 else 1)}


def halve_last(pipe, step, timestep, kwargs):
    """A callback whose edit no step of the model sees."""
    return {"latents": kwargs["latents"] * (0.5 if step == STEPS - 1 else 1)}


def look(pipe, step, timestep, kwargs):
    """A callback that edits nothing."""
    return {"latents": kwargs["latents"]}


def others_of(pipe):
    """Gives the autoencoder another weight, and the old one back."""
    bias = pipe.vae.decoder.conv_out.bias

    @torch.no_grad()
    def change():
        bias.add_(1)

    @torch.no_grad()
    def undo():
        bias.sub_(1)

    return change, undo


@captured_once()
def unlike(rank, group):
    """What several calls were refused for, in which rank 1 does something else, and what the
    others drew."""
    pipe = tiny_pipeline()
    parallel = piflux.parallelize(pipe, group=group, policy="gather", inner="eager")
    told, drawn = [], []

    def attempt(**options):
        try:
            drawn.append(draw(parallel, 0, **options))
        except piflux.RanksDisagree as error:
            told.append(str(error))

    first = rank == 0
    attempt(num_inference_steps=STEPS if first else STEPS + 1)
    attempt(**{"callback_on_step_end": halve} if first else {})
    attempt(callback_on_step_end=halve if first else look)
    attempt(callback_on_step_end=halve_last if first else look)
    attempt(callback_on_step_end=halve)
    attempt(**{"callback_on_step_end": look} if first else {})
    for changes, undoes in ((pipe.vae.enable_tiling, pipe.vae.disable_tiling), others_of(pipe)):
        if not first:
            changes()
        attempt(output_type="pt")
        if not first:
            undoes()
    weight = pipe.transformer.single_transformer_blocks[0].attn.to_k.weight
    with torch.no_grad():
        weight.mul_(1 if first else 1.001)
    attempt()
    with torch.no_grad():
        weight.div_(1 if first else 1.001)
    attempt()
    return told, drawn


def test_ranks_that_do_unlike_things_are_told(ranks):
    """All of them, what it was; who does the same, or only looks, is let be."""
    want = [draw(tiny_pipeline(), 0, callback_on_step_end=halve), *[draw(tiny_pipeline(), 0)] * 2]
    for told, drawn in ranks(2, unlike):
        steps, one, other, late, tiling, decoder, weights = told
        assert "argument num_inference_steps" in steps and "rank 1: 6" in steps
        assert "norm of the latents" in one and "norm of the latents" in other
        assert "edits by callbacks" in late
        assert "the autoencoder's use_tiling" in tiling
        assert "the autoencoder's decoder.conv_out.bias" in decoder
        assert "weight single_transformer_blocks.0.attn.to_k.weight" in weights
        assert "transformer_blocks.0.attn.to_q" not in weights
        assert_close(drawn, want)


@captured_once()
def compiled_autoencoder(rank, group):
    whole, method = tiny_pipeline(), tiny_pipeline()
    whole.vae = torch.compile(whole.vae, backend="eager")
    method.vae.decode = torch.compile(method.vae.decode, backend="eager")
    options = {"group": group, "policy": "gather", "inner": "eager"}
    return [draw(piflux.parallelize(x, **options), 1, output_type="pt") for x in (whole, method)]


def test_an_autoencoder_may_be_compiled(ranks):
    want = draw(tiny_pipeline(), 1, output_type="pt")
    for images in ranks(2, compiled_autoencoder):
        assert_close(images, [want] * 2)


@captured_once()
def alone(rank, group):
    """A second instance, used by rank 0 alone: it must not wait for anyone."""
    call = FluxPipeline.__call__
    pipe, other = tiny_pipeline(), tiny_pipeline()
    parallel = piflux.parallelize(pipe, group=group, policy="gather", inner="eager")
    assert isinstance(parallel, FluxPipeline)
    assert FluxPipeline.__call__ is call
    assert type(other) is FluxPipeline
    image = draw(parallel, 0)
    return [image, draw(other, 0)] if rank == 0 else [image]


def test_other_instances_stay_untouched(ranks):
    want = draw(tiny_pipeline(), 0)
    for images in ranks(2, alone):
        assert_close(images, [want] * len(images))


class Stopped(Exception):
    """What a user's callback raises to give an image up."""


def stop(pipe, step, timestep, kwargs):
    if step == 2:
        raise Stopped
    return kwargs


@captured_once()
def given_up(rank, group):
    pipe = piflux.parallelize(tiny_pipeline(), group=group, policy="displaced", inner="eager")
    with contextlib.suppress(Stopped):
        draw(pipe, 1, callback_on_step_end=stop)
    return draw(pipe, 0)


def test_an_image_given_up_leaves_nothing_behind(ranks):
    want = draw(oracle_pipeline(2, "displaced"), 0)
    for image in ranks(2, given_up):
        assert_close([image], [want])


@captured_once()
def progress(rank, group):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config()
    pipe = piflux.parallelize(pipe, group=group, policy="gather", inner="eager")
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        draw(pipe, 0)
    return shown.getvalue()


def test_rank_0_alone_shows_progress(ranks):
    first, second = ranks(2, progress)
    assert f"{STEPS}/{STEPS}" in first
    assert second == ""


def inspected(rank, group, folder):
    """What a pipeline or a user reaches for on a transformer, before and after a call."""
    model = tiny_flux()
    parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
    assert parallel is not model
    assert isinstance(parallel, torch.nn.Module)
    assert isinstance(parallel, FluxTransformer2DModel)
    pipe = tiny_pipeline()
    pipe.transformer = parallel
    for _ in range(2):
        assert parallel.config == model.config
        assert (parallel.dtype, parallel.device) == (model.dtype, model.device)
        assert list(parallel.state_dict()) == list(model.state_dict())
        assert list(parallel.attn_processors) == list(model.attn_processors)
        assert not parallel.training
        for ours, theirs in zip(parallel.parameters(), model.parameters(), strict=True):
            assert ours is theirs
        with parallel.cache_context("cond"):
            pass
        assert pipe.dtype == model.dtype
        draw(pipe, 0)
    if rank == 0:
        parallel.save_pretrained(f"{folder}/transformer")
        pipe.save_pretrained(f"{folder}/pipeline")
    return None


def test_attributes_survive(ranks, tmp_path):
    """A parallel transformer is still the transformer, on disk too."""
    ranks(2, inspected, str(tmp_path))
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    want = tiny_flux().state_dict()
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())


class Outer(DiffusionPipeline):
    """It shares a transformer with the pipeline inside, which draws, and has one of its own."""

    def __init__(self, transformer, guiding_transformer):
        super().__init__()
        self.register_modules(transformer=transformer, guiding_transformer=guiding_transformer)
        self.inner = tiny_pipeline()
        self.inner.transformer = transformer

    def __call__(self, use_inner=True, **options):
        return self.inner(**options) if use_inner else None


def test_transformers_of_pipelines_within_are_found(caplog):
    outer = Outer(tiny_flux(), tiny_flux(seed=1))
    inner = outer.inner
    want = draw(outer, 0)
    with captured_once():
        options = {"group": piflux.virtual_ranks(2), "policy": "gather", "inner": "eager"}
        parallel = piflux.parallelize(outer, **options)
        assert_close([draw(parallel, 0)], [want])
    assert parallel.inner.transformer is parallel.transformer
    assert parallel.transformer._piflux_calls == STEPS
    assert parallel.guiding_transformer._piflux_target is outer.guiding_transformer
    assert outer.inner is inner and type(inner) is FluxPipeline
    assert "drew without calling" not in caplog.text
    parallel(use_inner=False)
    assert "drew without calling what piflux parallelized" in caplog.text


def masked(prefix=""):
    """Embeddings of a prompt of two, with their mask."""
    embeds = torch.randn(1, TEXT, TEXT_DIM, generator=torch.Generator().manual_seed(len(prefix)))
    mask = torch.ones(1, TEXT, dtype=torch.long)
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}


def wan():
    options = {"in_channels": 16, "out_channels": 16, "num_layers": 1}
    model = WanTransformer3DModel(**classes.WAN | options)
    return _draw(model, 0)


MODULAR = {
    "flux": (FluxCoreDenoiseStep, tiny_flux, FlowMatchEulerDiscreteScheduler, prompt),
    "qwen": (
        QwenImageCoreDenoiseStep,
        qwen_image,
        partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
        lambda: masked() | masked("negative_"),
    ),
    "wan": (
        WanCoreDenoiseStep,
        wan,
        partial(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True),
        lambda: {
            "prompt_embeds": masked()["prompt_embeds"],
            "negative_prompt_embeds": masked("negative_")["negative_prompt_embeds"],
            "num_frames": 5,
        },
    ),
}


@pytest.mark.parametrize("name", MODULAR)
def test_a_modular_pipeline_draws(name):
    """It passes a transformer what the signature of its forward names; two of them in two passes.

    Where nobody says when an image begins, each pass goes on by itself.
    """
    blocks, build, schedule, given = MODULAR[name]
    modular, transformer = blocks().init_pipeline(), build()
    modular.set_progress_bar_config(disable=True)

    def drawn(transformer):
        modular.update_components(scheduler=schedule(), transformer=transformer)
        generator = torch.Generator().manual_seed(0)
        size = {"height": 80, "width": 112, "num_inference_steps": STEPS}
        return modular(**given() | size, generator=generator, output="latents")

    want = drawn(transformer)
    with captured_once():
        parallel = piflux.parallelize(
            transformer, group=piflux.virtual_ranks(2), policy="gather", inner="eager"
        )
        assert (drawn(parallel) - want).abs().max() <= 3 * EXACT
    assert parallel._piflux_calls == STEPS * (1 if name == "flux" else 2)
    assert piflux.explain(parallel).notes == ()
    with pytest.raises(TypeError, match="modular pipeline, parallelize the transformer"):
        piflux.parallelize(modular)
