"""Bad input and bad luck: a clear error on every rank, no hang, and nothing lost."""

import os
from unittest import mock

import diffusers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captures import captured_once
from models import denoise, flux_inputs, tiny_flux, tiny_pipeline
from ranks import Failure, Pool, virtual
from torch import nn

import piflux
from piflux.errors import RankFailed
from piflux.ranks.groups import bring, check_device
from piflux.ranks.processes import ProcessRanks


def caught(act, *args, **kwargs) -> Failure | None:
    """What calling this raises; an error that all ranks share is no reason to stop the job."""
    try:
        act(*args, **kwargs)
    except Exception as error:
        return Failure.of(error)
    return None


def assert_all(failures, kind, *words):
    """Every rank raised this kind of error, with a message that has all these words."""
    for rank, failure in enumerate(failures):
        assert failure is not None, f"rank {rank} raised nothing"
        assert failure.isa(kind), f"rank {rank}: {failure.traceback}"
        for word in words:
            assert word in failure.message, f"rank {rank}: no {word!r} in: {failure.message}"


def test_errors_have_a_common_base():
    for error in (piflux.CannotShard, piflux.NoAttention, piflux.RanksDisagree):
        assert issubclass(error, piflux.PifluxError)


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy": "rotated"}, ["rotated", "gather", "rotate", "displaced"]),
        ({"sync_steps": -1}, ["sync_steps", "-1"]),
        ({"refresh_every": 0}, ["refresh_every", "0"]),
    ],
    ids=["policy", "sync_steps", "refresh_every"],
)
@pytest.mark.parametrize("target", [tiny_flux, tiny_pipeline], ids=["model", "pipeline"])
def test_arguments_out_of_range(target, options, words):
    """Found where the user wrote them, before anything is compiled."""
    assert_all([caught(piflux.parallelize, target(), **options)], ValueError, *words)


def test_parallelizing_twice():
    once = piflux.parallelize(tiny_flux(), inner="eager")
    assert_all([caught(piflux.parallelize, once, inner="eager")], ValueError, "already")
    pipe = piflux.parallelize(tiny_pipeline(), inner="eager")
    assert_all([caught(piflux.parallelize, pipe, inner="eager")], ValueError, "already")


STEP_CACHES = [
    diffusers.FirstBlockCacheConfig(),
    diffusers.TaylorSeerCacheConfig(),
    diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
    diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500, is_guidance_distilled=True),
]


@pytest.mark.parametrize("config", STEP_CACHES, ids=lambda config: type(config).__name__)
def test_a_step_cache_is_refused(config):
    """By its name, until it is disabled."""
    model = tiny_flux()
    model.enable_cache(config)
    refusal = caught(piflux.parallelize, model, inner="eager")
    assert_all([refusal], piflux.CannotCapture, type(config).__name__, "disable_cache()")
    model.disable_cache()
    piflux.parallelize(model, inner="eager")


@captured_once()
def step_cached(rank, group):
    """Enabled after an image."""
    parallel = piflux.parallelize(tiny_flux(), group=group, inner="eager")
    before = parallel(**flux_inputs()).sample
    parallel.enable_cache(diffusers.FirstBlockCacheConfig())
    refusal = caught(parallel, **flux_inputs())
    parallel.disable_cache()
    return refusal, before, parallel(**flux_inputs()).sample


def test_a_step_cache_enabled_later_is_refused(virtual):
    refusals, before, after = zip(*virtual(2, step_cached), strict=True)
    assert_all(refusals, piflux.CannotCapture, "FirstBlockCacheConfig", "disable_cache()")
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


def test_a_step_cache_on_the_blocks_alone_is_refused():
    """Applied without `enable_cache`, before and after."""
    model = tiny_flux()
    parallel = piflux.parallelize(model, inner="eager")
    diffusers.hooks.apply_first_block_cache(model, diffusers.FirstBlockCacheConfig())
    refusals = [
        caught(piflux.parallelize, model, inner="eager"),
        caught(parallel, **flux_inputs()),
    ]
    assert_all(refusals, piflux.CannotCapture, "FBCHeadBlockHook is enabled")


def test_hooks_that_remember_nothing_are_no_step_cache():
    model = tiny_flux()
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(
        model.transformer_blocks[0]
    )
    registry.register_hook(diffusers.hooks.ModelHook(), "nothing")
    piflux.parallelize(model, inner="eager")


def outside(rank, group):
    piflux.parallelize(tiny_flux(), group=dist.new_group([0, 1]), inner="eager")


def test_a_group_this_rank_is_not_in(ranks):
    *members, third, fourth = ranks.errors(4, outside)
    assert members == [None, None]
    assert_all([third, fourth], ValueError, "group")


def cuda_asked_for(rank, group):
    with mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"):
        piflux.parallelize(tiny_flux(), group=group, inner="eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is not absent here")
def test_cuda_asked_for_and_absent(ranks):
    """The group is NCCL's, which a machine without CUDA can only pretend."""
    assert_all(ranks.errors(2, cuda_asked_for), RuntimeError, "CUDA", "gloo")


def on_meta(rank, group):
    piflux.parallelize(tiny_flux().to("meta"), group=group, inner="eager")


def test_a_device_the_group_does_not_serve(ranks):
    assert_all(ranks.errors(2, on_meta), RuntimeError, "meta")


def on_another_gpu(rank, group):
    """What a model on the first GPU meets on every rank; this machine need not have a GPU."""
    there = torch.device("cuda", 0)
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=rank),
        mock.patch("piflux.ranks.groups.serves", return_value=True),
    ):
        return [caught(check_device, ProcessRanks.of(group), there)]


def test_a_model_on_another_ranks_gpu(ranks):
    (first,), (second,) = ranks(2, on_another_gpu)
    assert first is None
    assert_all([second], RuntimeError, "cuda:0", "rank 1", ".to('cuda:1')", "set_device")


class Elsewhere(nn.Linear):
    """A layer that says it is on a GPU, and notes where it is moved."""

    def __init__(self, device):
        super().__init__(1, 1)
        self.device = torch.device(device)

    def parameters(self, recurse=True):
        return iter([mock.Mock(device=self.device)])

    def to(self, device):
        self.device = torch.device(device)
        return self


def brought(rank, group):
    """A pipeline's modules as `.to("cuda")` leaves them; one is on a GPU of its own choice."""
    model, encoder, apart = Elsewhere("cuda:0"), Elsewhere("cuda:0"), Elsewhere("cuda:3")
    hooked, on_cpu = Elsewhere("cuda:0"), Elsewhere("cpu")
    hooked._hf_hook = None
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=rank),
        mock.patch.object(torch.cuda, "empty_cache"),
    ):
        bring(ProcessRanks.of(group), model, [encoder, apart])
        bring(ProcessRanks.of(group), hooked)
        bring(ProcessRanks.of(group), on_cpu)
    return [str(x.device) for x in (model, encoder, apart, hooked, on_cpu)]


def test_a_model_is_brought_to_the_ranks_gpu(ranks):
    """With what came along to the wrong one; what hooks move, they move themselves."""
    assert ranks(2, brought) == [
        ["cuda:0", "cuda:0", "cuda:3", "cuda:0", "cpu"],
        ["cuda:1", "cuda:1", "cuda:3", "cuda:0", "cpu"],
    ]


# ------------------------------------------------------------------------------------ what is cut


def unattentive(rank, group):
    parallel = piflux.parallelize(nn.Sequential(nn.Linear(8, 8)), group=group, inner="eager")
    parallel(torch.randn(1, 16, 8))


def test_a_target_without_attention(ranks):
    assert_all(ranks.errors(2, unattentive), piflux.NoAttention, "scaled_dot_product_attention")


SHORT = {"image_hw": (2, 2), "text": 2}


@captured_once()
def short(rank, group):
    """Text of two tokens with an image of four, then one of each, on three ranks."""
    target = tiny_flux(single=0)
    model = piflux.parallelize(target, group=group, policy="gather", inner="eager")
    image = model(**flux_inputs(**SHORT)).sample
    return caught(model, **flux_inputs(image_hw=(1, 1), text=1)), image


@torch.no_grad()
def test_more_parts_than_tokens(virtual):
    """Two parts then have the same token; but not of all tokens, which is refused by number."""
    want = tiny_flux(single=0)(**flux_inputs(**SHORT)).sample
    refused, images = zip(*virtual(3, short), strict=True)
    assert_all(refused, piflux.CannotShard, "2 tokens", "3 ranks")
    for image in images:
        assert (image - want).abs().max() < 1e-5


class TwoAttentions(nn.Module):
    """A transformer of two attentions with something in between."""

    def __init__(self, between, **attention):
        super().__init__()
        self.between, self.attention = between, attention
        self.project = nn.Linear(8, 24)

    def attend(self, x):
        query, key, value = self.project(x).unflatten(-1, (3, 1, 8)).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(query, key, value, **self.attention)
        return x + out.transpose(1, 2).flatten(2)

    def forward(self, hidden_states):
        x = self.attend(hidden_states)
        x = self.between(x)
        return self.attend(x)


def nothing(x):
    return x


def mean(x):
    return x - x.mean(1, keepdim=True)


def cumulate(x):
    return x.cumsum(1)


def reverse(x):
    return x.flip(1)


def roll(x):
    return torch.roll(x, 1, 1)


def neighbour(x):
    return x[:, 1:] - x[:, :-1]


def convolve(x):
    return F.conv1d(x.transpose(1, 2), torch.ones(8, 8, 3), padding=1).transpose(1, 2)


def mix(x):
    return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def normalize(x):
    return F.layer_norm(x, x.shape[1:])


def sort(x):
    return x.sort(1).values


MIXERS = {
    mean: "mean",
    cumulate: "cumsum",
    reverse: "flip",
    roll: "roll",
    neighbour: "operator.",
    convolve: "conv1d",
    mix: "softmax",
    normalize: "layer_norm",
    sort: "sort",
}


def refused(rank, group):
    """Each mixer's refusal."""
    failures = []
    for model in map(TwoAttentions, MIXERS):
        parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
        failures.append(caught(parallel, torch.randn(1, 16, 8)))
    return failures


def test_what_mixes_tokens_is_refused(virtual):
    """An operation other than plain attention between tokens: named, with the line it stands on."""
    mixers = zip(*virtual(2, refused), strict=True)
    for (mixer, op), failures in zip(MIXERS.items(), mixers, strict=True):
        line = mixer.__code__.co_firstlineno + 1
        assert_all(failures, piflux.CannotShard, op, f"test_errors.py:{line}", mixer.__name__)


def select(x):
    return x + x[:, :1]


def swap(x):
    half = x.shape[1] // 2
    return x + torch.cat([x[:, half:], x[:, :half]], 1)


def repeat(x):
    half = x.shape[1] // 2
    return x + torch.cat([x[:, :half], x[:, :half]], 1)


def stride(x):
    return x + x[:, ::2].repeat_interleave(2, 1)


def pair(x):
    return x + torch.tanh(x.reshape(1, -1, 16)).flip(-1).reshape(1, -1, 8)


def scramble(x):
    return x + x.transpose(1, 2).reshape(1, -1, 8)


def split(x):
    first, second = x.chunk(2, 1)
    return torch.cat([first.sin(), second.cos()], 1)


def rotate_features(x):
    return x + x.reshape(1, -1, 4, 2).flip(-1).reshape(1, -1, 8)


def position(x):
    return x * torch.arange(x.shape[1])[:, None]


def count(x):
    return x / x.shape[1]


def ones(x):
    return x + torch.ones(x.shape[1], 1)


def first_only(x):
    return x * (torch.arange(x.shape[1]) < 3)[:, None]


def scatter(x):
    return x.index_add(1, torch.tensor([0]), x[:, 3:4])


def swap_in_place(x):
    x, half = x.clone(), x.shape[1] // 2
    x[:, :half] = x[:, half:]
    return x


def mark_in_place(x):
    x = x.clone()
    x[:, 3] = 1
    return x


def scale_in_place(x):
    x = x.clone()
    x[:, : x.shape[1] // 2].mul_(2)
    return x


def all_in_place(x):
    x = x.clone()
    x.mul_(2).add_(1)
    x += 1
    return x


DOUBTFUL = [
    *(select, swap, repeat, stride, pair, scramble, split, rotate_features),
    *(position, count, ones, first_only),
    *(scatter, swap_in_place, mark_in_place, scale_in_place, all_in_place),
]


@torch.no_grad()
def tried(rank, group):
    """For each doubtful operation how far off the results are, or why they were refused.

    The sizes of the first length are literals in the graph, those of the second are symbols.
    """
    outcomes = []
    for between in DOUBTFUL:
        torch.manual_seed(0)
        model = TwoAttentions(between)
        parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
        worst = 0.0
        try:
            for length in (16, 24):
                x = torch.randn(1, length, 8)
                worst = max(worst, (parallel(x) - model(x)).abs().max().item())
            outcomes.append(worst)
        except Exception as error:
            outcomes.append(Failure.of(error))
    return outcomes


@pytest.fixture(scope="module")
def doubtful():
    """By operation, each rank's outcome."""
    return dict(zip(DOUBTFUL, zip(*virtual(2, tried), strict=True), strict=True))


@pytest.mark.parametrize("between", DOUBTFUL, ids=lambda between: between.__name__)
def test_what_may_mix_tokens_is_right_or_refused(doubtful, between):
    """Never a wrong image: slices, views and positions come out right, or nothing comes out."""
    for outcome in doubtful[between]:
        if isinstance(outcome, Failure):
            assert_all([outcome], piflux.CannotShard, between.__name__)
        else:
            assert outcome < 1e-5


def masks(tokens):
    """An additive mask over pairs of tokens, and a mask of keys."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(1, 1, tokens, tokens, generator=generator)
    return [pairs, torch.rand(1, 1, 1, tokens, generator=generator) > 0.5]


def masked(rank, group):
    outcomes = []
    for mask in masks(16):
        torch.manual_seed(0)
        model = TwoAttentions(nothing, attn_mask=mask)
        parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
        hidden_states = torch.randn(1, 16, 8)
        with torch.no_grad():
            want = model(hidden_states)
        try:
            outcomes.append((parallel(hidden_states) - want).abs().max().item())
        except piflux.CannotShard as error:
            outcomes.append(Failure.of(error))
    return outcomes


def test_a_mask_is_cut_or_refused(virtual):
    """Either is right; a wrong image is not."""
    for outcomes in virtual(2, masked):
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                assert "mask" in outcome.message
            else:
                assert outcome < 1e-5


class Broken(TwoAttentions):
    def forward(self, hidden_states):
        x = self.attend(hidden_states)
        torch._dynamo.graph_break()
        return self.attend(x)


@torch.no_grad()
def test_a_graph_break_is_no_silent_fallback():
    """What stands between two breaks is split, and it is told."""
    torch.manual_seed(0)
    model, x = Broken(nothing), torch.randn(1, 16, 8)
    parallel = piflux.parallelize(
        model, group=piflux.virtual_ranks(2), policy="gather", inner="eager"
    )
    assert (parallel(x) - model(x)).abs().max() < 1e-5
    report = piflux.explain(parallel)
    assert [graph.attentions for graph in report.graphs] == [1, 1]
    assert "no one graph" in str(report)


# -------------------------------------------------------------------------------- disagreement


def other_inputs():
    """What rank 1 alone is called with, by the input that differs."""
    inputs = flux_inputs()
    return {
        "hidden_states": {"hidden_states": flux_inputs(seed=1)["hidden_states"]},
        "encoder_hidden_states": {
            "encoder_hidden_states": flux_inputs(seed=1)["encoder_hidden_states"]
        },
        "pooled_projections": {"pooled_projections": inputs["pooled_projections"] + 1},
        "timestep": {"timestep": inputs["timestep"] * 0.5},
        "img_ids": flux_inputs(image_hw=(7, 5)),
        "txt_ids": flux_inputs(text=14),
    }


@captured_once()
def disagreed(rank, group):
    """Each disagreement in turn, then a step on which all agree."""
    model = piflux.parallelize(tiny_flux(), group=group, inner="eager")
    failures = []
    for other in other_inputs().values():
        inputs = flux_inputs() | (other if rank == 1 else {})
        with piflux.generation(model):
            failures.append(caught(model, **inputs, return_dict=False))
    with piflux.generation(model):
        return *failures, model(**flux_inputs(), return_dict=False)[0]


@torch.no_grad()
def test_ranks_that_disagree_on_an_input(ranks):
    """All ranks say which input differs and where; the next image is a good one again."""
    *failures, images = zip(*ranks(3, disagreed), strict=True)
    for name, raised in zip(other_inputs(), failures, strict=True):
        assert_all(raised, piflux.RanksDisagree, name, "rank 1")
    want = tiny_flux()(**flux_inputs()).sample
    for image in images:
        assert (image - want).abs().max() < 1e-5


@captured_once()
def set_apart(rank, group):
    """Rank 1 has another policy, another schedule, or another torch."""
    others = [{"policy": "displaced"}, {"sync_steps": 3}, {"refresh_every": 5}]
    others += [{"compression": "int8"}]
    failures = []
    for other in others:
        options = {"policy": "rotate"} | (other if rank == 1 else {})
        model = piflux.parallelize(tiny_flux(), group=group, inner="eager", **options)
        failures.append(caught(model, **flux_inputs(), return_dict=False))
    model = piflux.parallelize(tiny_flux(), group=group, inner="eager")
    version = "1.0" if rank == 1 else torch.__version__
    with mock.patch.object(torch, "__version__", version):
        failures.append(caught(model, **flux_inputs(), return_dict=False))
    return failures


def test_ranks_that_disagree_on_a_setting(ranks):
    found = zip(*ranks(2, set_apart), strict=True)
    policy, sync_steps, refresh_every, compression, version = found
    assert_all(policy, piflux.RanksDisagree, "policy", "rotate", "displaced", "rank 1")
    assert_all(sync_steps, piflux.RanksDisagree, "sync_steps", "3", "rank 1")
    assert_all(refresh_every, piflux.RanksDisagree, "refresh_every", "5", "rank 1")
    assert_all(compression, piflux.RanksDisagree, "compression", "int8", "rank 1")
    assert_all(version, piflux.RanksDisagree, "torch", "1.0", torch.__version__, "rank 1")


@captured_once()
def rounded(rank, group):
    """Each rank computed the embeddings on hardware of its own."""
    model = piflux.parallelize(tiny_flux(), group=group, policy="gather", inner="eager")
    inputs = flux_inputs()
    for name in ("encoder_hidden_states", "pooled_projections"):
        noise = torch.randn(inputs[name].shape, generator=torch.Generator().manual_seed(rank))
        inputs[name] = inputs[name] * (1 + 1e-3 * noise)
    return model(**inputs, return_dict=False)[0]


@torch.no_grad()
def test_differences_of_rounding_are_no_disagreement(ranks):
    want = tiny_flux()(**flux_inputs()).sample
    for image in ranks(2, rounded):
        assert (image - want).abs().max() < 0.1


# -------------------------------------------------------------------------------------- bad luck

TIMEOUT = 6


@captured_once()
def left_alone(rank, group, policy, leave):
    """Rank 1 leaves after two steps: it dies, or lives and takes no more until rank 0 is done."""
    if leave == "hangs":
        os.environ["PIFLUX_TIMEOUT_S"] = str(TIMEOUT)
    dist.barrier()  # however long one of them has taken to start
    model = piflux.parallelize(tiny_flux(), policy=policy, inner="eager")
    steps = denoise(lambda **x: model(**x, return_dict=False)[0], flux_inputs(), 9)
    for _ in range(2):
        next(steps)
    dist.barrier()
    if rank == 1 and leave == "dies":
        os._exit(1)
    failure = caught(list, steps) if rank == 0 else None
    if leave == "hangs":
        dist.barrier()
    return failure


@pytest.mark.parametrize(
    ("policy", "leave"),
    [("gather", "dies"), ("rotate", "hangs"), ("displaced", "dies"), ("displaced", "hangs")],
)
def test_a_rank_that_is_gone_is_noticed_in_time(policy, leave):
    """In the middle of an image. Without one that died it goes on, one that lives is told of."""
    with Pool(2, group_timeout=3600) as pool:
        stayed, gone = pool.run(2, left_alone, policy, leave, timeout=240)
    assert (gone is not None and gone.died) == (leave == "dies")
    if leave == "dies":
        assert stayed is None, stayed.traceback
    else:
        assert_all([stayed], RankFailed, "waited 6 s", "rank 1: it lives", "PIFLUX_TIMEOUT_S")
