"""The truth: what several ranks compute together is right.

`gather` is judged by the untouched model, `rotate` and `displaced` by the oracle. Virtual ranks run
what real ones run. Real ones, over gloo, are where processes are what is tested: what travels, in
which bits, who may differ from the others, and where a group comes from.
"""

import shutil
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from captures import captured_once
from models import (
    control_samples,
    denoise,
    flux_inputs,
    quantized,
    sd3_inputs,
    tiny_flux,
    tiny_sd3,
)
from oracle import Oracle, window
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import piflux
from piflux.integrations.alike import SameWeights
from piflux.pipelines.quantized import quantize

STEPS = 9
EXACT = 1e-5

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler",
)


def sample(model):
    """The model as a function from keyword arguments to the sample alone."""
    return lambda **inputs: model(**inputs, return_dict=False)[0]


@torch.no_grad()
def exact(model, inputs) -> Tensor:
    return sample(model)(**inputs)


def assert_equal(results, want, tolerance=EXACT):
    """Every rank's samples are the wanted ones."""
    for rank, got in enumerate(results):
        assert len(got) == len(want)
        for number, (image, truth) in enumerate(zip(got, want, strict=True)):
            worst = (image - truth).abs().max().item()
            assert worst <= tolerance, f"rank {rank}, sample {number}: off by {worst:.2e}"


# ---------------------------------------------------------------------------------------- gather


@captured_once()
def gathered(rank, group, build, cases):
    """One sample per case, all by one parallel model."""
    model = piflux.parallelize(build(), group=group, policy="gather", inner="eager")
    return [sample(model)(**inputs) for inputs in cases]


def judge_gather(ranks, n, build, cases):
    model = build()
    want = [exact(model, inputs) for inputs in cases]
    assert_equal(ranks(n, gathered, build, cases), want)


def test_gather_is_exact_at_every_size(virtual):
    """Three resolutions and four batch sizes one after the other, all by one model."""
    cases = [
        flux_inputs(),
        flux_inputs(image_hw=(4, 4), text=77),
        flux_inputs(image_hw=(3, 6), text=16, batch=2),
        flux_inputs(image_hw=(5, 5), batch=3),
        flux_inputs(batch=4),
    ]
    judge_gather(virtual, 3, tiny_flux, cases)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_gather_is_exact_where_parts_overlap(virtual, n):
    """77 text tokens and 39 image tokens: no number of ranks divides them."""
    case = flux_inputs(image_hw=(3, 13), text=77, batch=2)
    judge_gather(virtual, n, tiny_flux, [case])


def test_gather_without_guidance(virtual):
    judge_gather(virtual, 2, partial(tiny_flux, guidance=False), [flux_inputs(guidance=False)])


def test_gather_with_3d_ids(virtual):
    judge_gather(virtual, 3, tiny_flux, [flux_inputs(ids_3d=True, batch=2)])


def test_gather_of_sd3(virtual):
    """Patchify and unpatchify lie inside the model, with another order of segments.

    At several sizes it is judged with the other models.
    """
    judge_gather(virtual, 2, tiny_sd3, [sd3_inputs(image_hw=(4, 5), text=77, batch=2)])


def test_gather_with_control(virtual):
    """Fewer residuals than blocks, so that each serves several."""
    build = partial(tiny_flux, double=2, single=3)
    inputs = flux_inputs()
    residuals = control_samples(build(), inputs, double=1, single=2)
    assert (exact(build(), inputs | residuals) - exact(build(), inputs)).abs().max() > 0.1
    judge_gather(virtual, 2, build, [inputs | residuals])


@pytest.mark.parametrize("where, dtype", [("ranks", torch.bfloat16), ("virtual", torch.float16)])
def test_gather_in_half_precision(request, where, dtype):
    """As far from the fp32 truth as the untouched model in that precision is, give or take.

    bfloat16 over real ranks, since gloo doesn't know it.
    """
    ranks = request.getfixturevalue(where)
    build, inputs = partial(tiny_flux, dtype=dtype), flux_inputs(dtype=dtype)
    truth = exact(build().float(), {name: value.float() for name, value in inputs.items()})
    rounding = (exact(build(), inputs) - truth).abs().max().item()
    for (got,) in ranks(2, gathered, build, [inputs]):
        assert got.dtype == dtype
        assert (got - truth).abs().max() <= 2 * rounding + torch.finfo(dtype).eps


def quantized_flux():
    return quantized(tiny_flux())


def test_gather_of_a_quantized_model(virtual):
    """Its weights are tensors of a subclass, which wrap 8-bit integers."""
    inputs = flux_inputs()
    assert (exact(quantized_flux(), inputs) - exact(tiny_flux(), inputs)).abs().max() > 0.1
    judge_gather(virtual, 3, quantized_flux, [inputs])


def in_int8():
    model = tiny_flux(double=2, single=2)
    quantize(model, "int8")
    return model


def in_fp8():
    from torchao.quantization import quant_api

    model = tiny_flux(double=2, single=2, dtype=torch.bfloat16)
    # Both ask for a GPU that is fast at it; a CPU computes the same.
    asks = mock.patch.object(quant_api, "_check_hardware_support")
    with asks, mock.patch("piflux.pipelines.quantized._check_fp8"):
        quantize(model, "fp8")
    return model


@pytest.mark.skipif(
    find_spec("torchao") is None,
    reason="needs torchao, which prints warnings wherever it is installed; its twin is above",
)
@pytest.mark.parametrize(("build", "dtype"), [(in_int8, torch.float32), (in_fp8, torch.bfloat16)])
def test_gather_of_a_model_that_torchao_quantized(virtual, build, dtype):
    """Activations, too, are in 8 bits: scaled by token, so that parts are rounded as the whole."""
    assert is_traceable_wrapper_subclass(build().transformer_blocks[0].attn.to_q.weight)
    judge_gather(virtual, 2, build, [flux_inputs(dtype=dtype)])


@captured_once()
def returned(rank, group):
    model = tiny_flux()
    parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
    inputs = flux_inputs()
    return (
        parallel(**inputs).sample,
        parallel(**inputs, return_dict=False)[0],
        model(**inputs).sample.detach(),
        parallel(**inputs).sample.requires_grad,
    )


def test_return_dict_both_ways_and_the_original_untouched(virtual):
    """Parallelizing leaves the target a one-rank model of its own; no gradients are kept."""
    want = exact(tiny_flux(), flux_inputs())
    for *images, requires_grad in virtual(2, returned):
        assert_equal([images], [want] * 3)
        assert requires_grad is False


# ------------------------------------------------------------------------------------------ LoRA


def with_lora(model):
    torch.manual_seed(1)
    model.add_adapter(
        LoraConfig(
            r=2,
            lora_alpha=2,  # what a state dict without metadata is loaded with
            target_modules=["to_q", "to_k", "to_v", "proj_mlp", "add_k_proj"],
            init_lora_weights=False,
        )
    )
    return model


@captured_once()
def lora_loaded(rank, group, weights):
    parallel = piflux.parallelize(tiny_flux(), group=group, policy="gather", inner="eager")
    plain = sample(parallel)(**flux_inputs())
    parallel.load_lora_adapter(weights, prefix="transformer")
    loaded = sample(parallel)(**flux_inputs())
    halved = sample(parallel)(**flux_inputs(), joint_attention_kwargs={"scale": 0.5})
    parallel.disable_lora()
    return [plain, loaded, halved, sample(parallel)(**flux_inputs())]


def test_a_lora_counts_from_the_call_after_it_was_loaded(virtual):
    """At its scale, until it is disabled. One that was there before is judged with pipelines."""
    model, inputs = with_lora(tiny_flux()), flux_inputs()
    plain, loaded = exact(tiny_flux(), inputs), exact(model, inputs)
    halved = exact(model, inputs | {"joint_attention_kwargs": {"scale": 0.5}})
    assert min((loaded - plain).abs().max(), (loaded - halved).abs().max()) > 0.1
    weights = {
        f"transformer.{name}": value for name, value in get_peft_model_state_dict(model).items()
    }
    assert_equal(virtual(2, lora_loaded, weights), [plain, loaded, halved, plain])


# -------------------------------------------------------------------------- rotate and displaced


def image(build, inputs, **options):
    """The latents after each step."""
    model = piflux.parallelize(build(), **options)
    with piflux.generation(model):
        return list(denoise(sample(model), inputs, STEPS))


@captured_once()
def drawn(rank, group, build, inputs, options):
    return image(build, inputs, group=group, inner="eager", **options)


@captured_once()
def drawn_by_inductor(rank, group, build, inputs, options):
    return image(build, inputs, group=group, inner="inductor", **options)


def judge_image(ranks, n, build, inputs, options, *, job=drawn, tolerance=EXACT):
    want = list(denoise(Oracle(build(), n, **options), inputs, STEPS))
    assert_equal(ranks(n, job, build, inputs, options), want, tolerance)


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
def test_four_ranks_equal_the_oracle(ranks, policy):
    """35 image and 13 text tokens: both overlap where parts meet."""
    judge_image(ranks, 4, tiny_flux, flux_inputs(), {"policy": policy})


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
def test_a_quantized_model_equals_the_oracle(virtual, policy):
    judge_image(virtual, 2, quantized_flux, flux_inputs(), {"policy": policy})


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
@pytest.mark.parametrize("order", [0, 1])
def test_a_refreshed_image_equals_the_oracle(virtual, policy, order):
    options = {"policy": policy, "sync_steps": 2, "refresh_every": 3, "order": order}
    judge_image(virtual, 4, tiny_flux, flux_inputs(), options)


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
@pytest.mark.parametrize("order", [0, 1])
def test_sync_steps_apart_equal_the_oracle(virtual, policy, order):
    options = {"policy": policy, "sync_steps": (0, 3), "order": order}
    judge_image(virtual, 3, tiny_flux, flux_inputs(), options)


@pytest.mark.parametrize("compression", ["int8", "int4"])
@pytest.mark.parametrize("policy", ["rotate", "displaced"])
def test_compressed_changes_equal_the_oracle(virtual, policy, compression):
    """In double precision, where no number is rounded up by one and down by the other."""
    build, inputs = partial(tiny_flux, dtype=torch.float64), flux_inputs(dtype=torch.float64)
    options = {"policy": policy, "refresh_every": 4, "compression": compression}
    judge_image(virtual, 4, build, inputs, options)
    images = [
        list(denoise(Oracle(build(), 4, policy, refresh_every=4, compression=c), inputs, STEPS))[-1]
        for c in ("none", compression)
    ]
    assert (images[0] - images[1]).abs().max() > 10 * EXACT  # so it does compress


def test_without_sync_steps_the_first_one_fills_the_cache(virtual):
    options = {"policy": "rotate", "sync_steps": 0}
    judge_image(virtual, 2, tiny_flux, flux_inputs(), options)


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
def test_other_shapes_equal_the_oracle(virtual, policy):
    """A batch of two, long text, and control residuals that are cut with the image."""
    model, inputs = tiny_flux(), flux_inputs(batch=2, image_hw=(3, 7), text=77)
    inputs |= control_samples(model, inputs, double=1, single=1)
    judge_image(virtual, 3, tiny_flux, inputs, {"policy": policy})


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
def test_sd3_equals_the_oracle(virtual, policy):
    judge_image(virtual, 3, tiny_sd3, sd3_inputs(), {"policy": policy})


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
def test_enough_sync_steps_are_gather(virtual, policy):
    want = list(denoise(Oracle(tiny_flux(), 2, "gather"), flux_inputs(), STEPS))
    options = {"policy": policy, "sync_steps": STEPS}
    assert_equal(virtual(2, drawn, tiny_flux, flux_inputs(), options), want)


@needs_compiler
def test_inductor_equals_the_oracle(ranks):
    """Fused kernels round differently; over nine steps that may grow a little.

    What `displaced` sends travels between real ranks while kernels run. `rotate` is compiled in
    the tests of repeated blocks.
    """
    options, job = {"policy": "displaced"}, drawn_by_inductor
    judge_image(ranks, 2, tiny_flux, flux_inputs(), options, job=job, tolerance=5e-5)


@captured_once()
def marked(rank, group, policy):
    """Rank 1 alone adds one to every output token that it computes."""
    model = tiny_flux()
    if rank == 1:
        with torch.no_grad():
            model.proj_out.bias += 1
    parallel = piflux.parallelize(model, group=group, policy=policy, inner="eager")
    # Weights that differ are refused, as they should be.
    with piflux.generation(parallel), mock.patch.object(SameWeights, "compare"):
        return [sample(parallel)(**flux_inputs()) for _ in range(5)]


@pytest.mark.parametrize("policy", ["gather", "rotate", "displaced"])
def test_each_rank_computes_its_own_part(ranks, policy):
    """Nobody computes the whole: a rank's mark lies on its part of each step, and only there.

    The latents stay the same, so remembered keys and values are the fresh ones.
    """
    n, tokens = 3, 35
    plain = exact(tiny_flux(), flux_inputs())
    for images in ranks(n, marked, policy):
        for call, image in list(enumerate(images))[1:]:
            # Calls at one time are two passes of each step, by turns.
            part = (1 + call // 2) % n if policy == "rotate" else 1
            others = torch.ones(tokens, dtype=torch.bool)
            others[window(tokens, n, part)] = False
            mark = (image - plain)[0].mean(-1)
            # In an overlap the later part's tokens count, whichever rank computed them.
            own = window(tokens, n, part)
            stop = window(tokens, n, part + 1).start if part < n - 1 else own.stop
            assert torch.allclose(mark[own.start : stop], torch.ones(1), atol=EXACT)
            assert torch.allclose(mark[others], torch.zeros(1), atol=EXACT)


# ------------------------------------------------------------------------ passes and generations


def guided(cond, uncond, scale=2.0):
    """A step of true classifier-free guidance: two passes over the same latents."""

    def step(encoder_hidden_states, negative, **inputs):
        plus = cond(encoder_hidden_states=encoder_hidden_states, **inputs)
        minus = uncond(encoder_hidden_states=negative, **inputs)
        return minus + scale * (plus - minus)

    return step


def guided_inputs():
    inputs = flux_inputs()
    return inputs | {"negative": flux_inputs(seed=1)["encoder_hidden_states"]}


@captured_once()
def drawn_with_guidance(rank, group, policy):
    model = piflux.parallelize(tiny_flux(), group=group, policy=policy, inner="eager")
    step = guided(sample(model), sample(model))
    with piflux.generation(model):
        explicit = list(denoise(step, guided_inputs(), STEPS))
    return explicit + list(denoise(step, guided_inputs(), STEPS))


@pytest.mark.parametrize("policy", ["rotate", "displaced"])
def test_true_guidance_keeps_a_cache_per_pass(virtual, policy):
    """As two oracles that know nothing of each other, in an explicit and in an inferred image."""
    model = tiny_flux()
    oracles = Oracle(model, 2, policy), Oracle(model, 2, policy)
    want = list(denoise(guided(*oracles), guided_inputs(), STEPS))
    assert_equal(virtual(2, drawn_with_guidance, policy), want * 2)


@captured_once()
def drawn_in_a_row(rank, group, images):
    """No generation is opened, and the very same embeddings serve all images."""
    model = piflux.parallelize(tiny_flux(), group=group, policy="rotate", inner="eager")
    drawn = []
    for image in images:
        inputs = images[0] | {name: image[name] for name in ("hidden_states", "timestep")}
        drawn += denoise(sample(model), inputs, STEPS)
    return drawn


def test_images_in_a_row_begin_afresh(virtual):
    """Other noise, the same noise once more, and an image begun half way down."""
    other = flux_inputs() | {"hidden_states": flux_inputs(seed=2)["hidden_states"]}
    images = [flux_inputs(), other, other, another_image()]
    want = []
    for inputs in images:
        want += denoise(Oracle(tiny_flux(), 2, "rotate"), inputs, STEPS)
    assert_equal(virtual(2, drawn_in_a_row, images), want)


def another_image():
    """Other noise with the same prompt, begun half way down as image to image does."""
    noise = flux_inputs(seed=3)["hidden_states"]
    return flux_inputs() | {"hidden_states": noise, "timestep": torch.full((1,), 0.5)}


@captured_once()
def rewritten(rank, group):
    """Two images whose embeddings lie in the same tensor, which counts no versions."""
    model = piflux.parallelize(tiny_flux(), group=group, policy="rotate", inner="eager")
    drawn = []
    with torch.inference_mode():
        inputs = flux_inputs()
        for seed in (0, 4):
            embeddings = flux_inputs(seed=seed)["encoder_hidden_states"]
            inputs["encoder_hidden_states"].copy_(embeddings)
            drawn += denoise(sample(model), inputs, STEPS)
    return drawn


def test_embeddings_written_in_place_begin_another_image(virtual):
    want = []
    for seed in (0, 4):
        embeddings = flux_inputs(seed=seed)["encoder_hidden_states"]
        inputs = flux_inputs() | {"encoder_hidden_states": embeddings}
        want += denoise(Oracle(tiny_flux(), 2, "rotate"), inputs, STEPS)
    assert_equal(virtual(2, rewritten), want)


@captured_once()
def abandoned(rank, group):
    """An image left after three steps, then another, lower on the way."""
    model = piflux.parallelize(tiny_flux(), group=group, policy="rotate", inner="eager")
    steps = denoise(sample(model), flux_inputs(), STEPS)
    for _ in range(3):
        next(steps)
    return [sample(model)(**another_image())]


def test_an_abandoned_image_leaves_nothing_behind(ranks):
    """The clock goes on downward, but the latents are another image's: a sync step."""
    assert_equal(ranks(2, abandoned), [exact(tiny_flux(), another_image())])


# --------------------------------------------------------------------------------- recompilation


def steady(rank, group):
    """Graphs compiled in the first two steps, and in the 28 after them."""
    counters.clear()
    model = piflux.parallelize(tiny_flux(), group=group, policy="rotate", inner="eager")
    compiled = []
    with piflux.generation(model):
        for _ in denoise(sample(model), flux_inputs(), 30):
            compiled.append(counters["stats"]["unique_graphs"])
    return compiled[1], compiled[-1] - compiled[1]


def test_rotation_recompiles_nothing(virtual):
    """Which part a rank computes is data: 28 steps on four ranks, seven rounds, one graph."""
    for before, after in virtual(4, steady):
        assert before >= 1
        assert after == 0


# --------------------------------------------------------------------- torch.compile, by backend


RESOLUTIONS = [
    {},
    {"image_hw": (4, 6), "text": 14},
    {"image_hw": (7, 3), "text": 21},
]


def compiled_by_backend(rank, group, compile_options, sizes):
    """Some resolutions through torch.compile on the raw model."""
    torch._dynamo.reset()  # literal sizes, whatever ran before in this process
    options = {"policy": "gather", "inner": "eager", "group": group}
    compiled = torch.compile(
        tiny_flux(), backend=piflux.backend, options=options, **compile_options
    )
    with torch.no_grad():
        return [sample(compiled)(**flux_inputs(**size)) for size in sizes]


@pytest.mark.parametrize(
    "compile_options, sizes",
    [
        ({}, RESOLUTIONS),
        ({"dynamic": True, "fullgraph": True}, RESOLUTIONS),
        ({"dynamic": False}, RESOLUTIONS[:2]),
    ],
    ids=["defaults", "dynamic", "static"],
)
def test_backend_is_exact_at_every_capture(virtual, compile_options, sizes):
    """Static capture first and dynamic from the second resolution on, or as asked for."""
    want = [exact(tiny_flux(), flux_inputs(**size)) for size in sizes]
    assert_equal(virtual(2, compiled_by_backend, compile_options, sizes), want)


def compiled_by_name(rank, group):
    """The group is the default one."""
    assert group is dist.group.WORLD
    options = {"policy": "gather", "inner": "eager"}
    compiled = torch.compile(tiny_flux(), backend="piflux", options=options)
    with torch.no_grad():
        return [sample(compiled)(**flux_inputs())]


def test_backend_by_name(ranks):
    names = {entry.name for entry in metadata.entry_points(group="torch_dynamo_backends")}
    if "piflux" not in names:
        pytest.skip("a backend has a name only where the package is installed")
    want = [exact(tiny_flux(), flux_inputs())]
    assert_equal(ranks.alone(2, compiled_by_name), want)


def rotated_by_backend(rank, group):
    torch._dynamo.reset()
    options = {"policy": "rotate", "sync_steps": 2, "inner": "eager", "group": group}
    compiled = torch.compile(tiny_flux(), backend=piflux.backend, options=options)
    with torch.no_grad():
        first = list(denoise(sample(compiled), flux_inputs(), STEPS))
        second = flux_inputs(**RESOLUTIONS[1])
        return first + list(denoise(sample(compiled), second, STEPS))


def test_backend_rotates_like_the_oracle(virtual):
    """With literal sizes in the graph first, then at a second resolution."""
    want = []
    for size in RESOLUTIONS[:2]:
        oracle = Oracle(tiny_flux(), 2, "rotate", sync_steps=2)
        want += denoise(oracle, flux_inputs(**size), STEPS)
    assert_equal(virtual(2, rotated_by_backend), want)


# --------------------------------------------------------------------------- where ranks come from


def test_one_rank_without_torchrun_is_the_model():
    assert not dist.is_initialized()
    model = piflux.parallelize(tiny_flux(), inner="eager")
    want = list(denoise(Oracle(tiny_flux(), 1, "gather"), flux_inputs(), 3))
    assert_equal([list(denoise(sample(model), flux_inputs(), 3))], want)


@captured_once()
def launched():
    model = piflux.parallelize(tiny_flux(), policy="gather", inner="eager")
    return [sample(model)(**flux_inputs())], dist.get_backend(), dist.get_world_size()


def test_torchrun_environment_starts_the_group(ranks):
    for images, backend, world in ranks.launch(2, launched):
        assert_equal([images], [exact(tiny_flux(), flux_inputs())])
        assert (backend, world) == ("gloo", 2)


@captured_once()
def meshed(rank, group):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "token"))
    model = piflux.parallelize(tiny_flux(), group=mesh["token"], policy="gather", inner="eager")
    seed = mesh["data"].get_local_rank()
    return [sample(model)(**flux_inputs(seed=seed))]


def test_a_mesh_dimension_is_a_group(ranks):
    """Two pairs of ranks make two different images at the same time."""
    results = ranks(4, meshed)
    for pair, seed in ((results[:2], 0), (results[2:], 1)):
        assert_equal(pair, [exact(tiny_flux(), flux_inputs(seed=seed))])
