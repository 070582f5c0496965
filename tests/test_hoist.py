"""Products of the time leave the step: which they are, and that images stay the same."""

# ruff: noqa: E501 (snapshots)

import itertools
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from expecttest import TestCase
from graphs import capture, captured_flux, text, transformed
from models import flux_inputs, sd3_inputs, tiny_flux, tiny_pipeline, tiny_sd3
from test_numerics import EXACT
from test_replay import Recorder, as_captured, parallel
from test_schedule import Kernels
from torch import fx, nn

import piflux
from piflux.compile.program import PASSES
from piflux.errors import StepsUnforeseen
from piflux.graph.nodes import plain_name
from piflux.graph.values import known
from piflux.passes.speed.hoist import hoist
from piflux.recording import recorded as replay
from piflux.runtime import hoisted
from piflux.runtime.hoisted import Packed, Table

STEPS = 7


class Modulated(nn.Module):
    """One block that is modulated by an embedded time and pooled prompt."""

    def __init__(self, shift=lambda x, m: x + m[:, None]):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.modulate = nn.Linear(4, 4)
        self.shift = shift

    def forward(self, x, t, pooled):
        temb = self.embed(torch.sin(t[:, None] * torch.arange(4.0)) + pooled)
        h = self.shift(x, self.modulate(F.silu(temb)) * 2)
        q = h[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


def moved(model, *args, world_size=2, **options):
    """How many products were moved, and the graph afterwards."""
    return moved_of(capture(model, *args, **options), world_size)


def moved_of(gm, world_size):
    ctx = transformed(gm, world_size, PASSES if world_size > 1 else PASSES[:1])
    before = str(gm.graph)
    count = hoist(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    if not count:
        assert str(gm.graph) == before and not list(gm.children())
    return count, gm


def inputs(batch=1):
    return torch.randn(batch, 6, 4), torch.ones(batch), torch.randn(batch, 4)


class TestHoist(TestCase):
    def test_what_ends_in_a_product_is_moved(self):
        count, gm = moved(Modulated(), *inputs())
        self.assertEqual(count, 2)
        self.assertExpectedInline(
            text(gm),
            """\
t: (1)
pooled: (1, 4)
x: (1, 6, 4)
hoisted: (1, 4) = hoisted(t, pooled, embed.weight, embed.bias, modulate.weight, modulate.bias)
linear_2: (1, 4) = getitem(hoisted, 0)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
mul_1: (1, 4) = mul(linear_2, 2)
getitem_1: (1, 1, 4) = getitem(mul_1, (:, None))
h: (1, 3, 4) = add(x_part, getitem_1)
q: (1, 1, 3, 4) = getitem(h, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [6], 0, 2, sent)
getitem_3: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
getitem_3_whole: (1, 6, 4) = piflux.unshard(getitem_3, 1, [6], 2)
return (getitem_3_whole,)
""",
        )
        self.assertExpectedInline(
            text(gm.hoisted),
            """\
t: (1)
pooled: (1, 4)
leading: (1, 4) = leading(t, pooled, embed.weight, embed.bias)
silu_1: (1, 4) = getitem(leading, 0)
linear_1: (1, 4) = linear(silu_1, modulate.weight, modulate.bias)
return (linear_1,)
""",
        )
        self.assertExpectedInline(
            text(gm.hoisted.leading.module),
            """\
t: (1)
pooled: (1, 4)
getitem: (1, 1) = getitem(t, (:, None))
arange: (4) = arange(4.0)
mul: (1, 4) = mul(getitem, arange)
sin: (1, 4) = sin(mul)
add: (1, 4) = add(sin, pooled)
temb: (1, 4) = linear(add, embed.weight, embed.bias)
silu: (1, 4) = silu(temb)
return (silu,)
""",
        )


def flux_of_any_length():
    model, example = tiny_flux(double=2, single=3), flux_inputs()
    for name, dim in {
        "hidden_states": 1,
        "encoder_hidden_states": 1,
        "img_ids": 0,
        "txt_ids": 0,
    }.items():
        torch._dynamo.mark_dynamic(example[name], dim)
    return capture(model, **example)


class Guided(Modulated):
    """Beside the time, which is embedded, there is a clock that is multiplied as it is."""

    def __init__(self):
        super().__init__()
        self.guide = nn.Linear(1, 4)

    def forward(self, x, t, pooled, guidance):
        return super().forward(x + self.guide(guidance), t, pooled)


class Biased(Modulated):
    """What is added to the product is of the time, too."""

    def forward(self, x, t, pooled):
        temb = self.embed(torch.sin(t[:, None] * torch.arange(4.0)) + pooled)
        q = (x + F.linear(F.silu(temb), self.modulate.weight, temb[0])[:, None])[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


def numbers_for(module):
    """By the names of its inputs."""
    torch.manual_seed(0)
    inputs = module.graph.find_nodes(op="placeholder")
    return {plain_name(n): torch.rand(known(n).shape) / 10 for n in inputs}


TIMES = torch.rand(5, 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "build, clock",
    [
        (captured_flux, "timestep"),
        (captured_flux, "guidance"),
        (lambda: capture(Guided(), *inputs(), torch.ones(1)), "t"),
        (lambda: capture(Biased(), *inputs()), "t"),
    ],
    ids=["flux", "its guidance", "beside another clock", "with a bias of the time"],
)
def test_all_steps_are_what_each_is_by_itself(build, clock):
    _, gm = moved_of(build(), 2)
    module, numbers = gm.hoisted, numbers_for(gm.hoisted)
    found = module(*(numbers | {clock: TIMES}).values())
    for i, time in enumerate(TIMES):
        alone = module(*(numbers | {clock: time}).values())
        torch.testing.assert_close([x[i] for x in found], list(alone))
    assert any(not torch.allclose(x[0], x[1]) for x in found)


def test_a_product_more_takes_one_kernel_more_for_all_steps():
    """What leads to it is the same in all blocks. A double block has two, a single one has one."""
    launched = []
    for depth in ({}, {"double": 2, "single": 3}):
        _, gm = moved_of(captured_flux(**depth), 2)
        numbers = numbers_for(gm.hoisted) | {"timestep": TIMES}
        with Kernels() as kernels:
            gm.hoisted(*numbers.values())
        launched.append(kernels.launched)
    assert launched[1] == launched[0] + 2 + 2


@pytest.mark.parametrize("build", [partial(captured_flux, double=2, single=3), flux_of_any_length])
def test_the_modulations_of_flux(build):
    """Two a double block, one a single one, the last norm's; and two for each of three embedders."""
    captured = build()
    for world_size in (1, 3):
        count, gm = moved_of(fx.GraphModule(captured, deepcopy(captured.graph)), world_size)
        assert count == 2 * 2 + 3 + 1 + 6
        assert len(gm.hoisted.graph.output_node().args[0]) == 2 * 2 + 3 + 1


def test_of_sd3():
    model = tiny_sd3()
    count, _ = moved(lambda **kw: model(**kw, return_dict=False)[0], **sd3_inputs())
    assert count > 4


def test_without_a_clock_there_is_nothing_to_move():
    def model(x, pooled):
        q = x[:, None] + F.linear(pooled, torch.eye(4))[:, None, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]

    assert moved(model, torch.randn(1, 6, 4), torch.randn(1, 4))[0] == 0


def test_products_of_tokens_stay():
    """Here the time is added to tokens before the product."""

    class Late(Modulated):
        def forward(self, x, t, pooled):
            q = self.modulate(x + torch.sin(t)[:, None, None])[:, None]
            return F.scaled_dot_product_attention(q, q, q)[:, 0]

    assert moved(Late(), *inputs())[0] == 0


@pytest.mark.parametrize(
    "shift",
    [lambda x, m: (x * 1).add_(m[:, None]), lambda x, m: x + m[:, None] * torch.rand(1)],
    ids=["in place", "random"],
)
def test_what_does_more_than_compute_stays(shift):
    assert moved(Modulated(shift), *inputs())[0] == 0


# --------------------------------------------------------------------------------------- numerics


def image(model, example, *, times=None, announced=True):
    """A few Euler steps at `times` (linear if None), which the generation knows if `announced`."""
    x = example["hidden_states"]
    sigmas = torch.linspace(1, 0, STEPS + 1) if times is None else times
    scale = example["timestep"][0]
    known = sigmas[:-1] * scale if announced else None
    with piflux.generation(model, timesteps=known):
        for now, then in itertools.pairwise(sigmas):
            step = example | {"hidden_states": x, "timestep": (now * scale).expand(x.shape[0])}
            x = x + (then - now) * model(**step, return_dict=False)[0]
    return x


@pytest.fixture
def reads(monkeypatch, captured_once):
    """One entry for each step whose products were looked up."""
    found = []
    read = Table.read

    def spy(table, clocks, into):
        found.append(table)
        read(table, clocks, into)

    monkeypatch.setattr(Table, "read", spy)
    return found


@pytest.mark.parametrize(
    "build, example", [(tiny_flux, flux_inputs), (tiny_sd3, sd3_inputs)], ids=["flux", "sd3"]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_images_are_the_same_on_one_rank(reads, build, example, batch):
    model, one = build(), example(batch=batch)
    want = image(piflux.parallelize(model, inner="eager"), one)
    alone = piflux.parallelize(model, inner=as_captured)
    assert (image(alone, one) - want).abs().max() <= EXACT
    assert len(reads) == STEPS and len(set(reads)) == 1
    assert (image(alone, one, announced=False) - want).abs().max() <= EXACT
    assert len(reads) == STEPS


@pytest.mark.parametrize("policy", ["rotate", "displaced", "gather"])
def test_images_are_the_same_on_two_ranks(reads, policy):
    model, example = tiny_flux(), flux_inputs()
    want = image(parallel(model, 2, "eager", policy=policy), example)
    got = image(parallel(model, 2, as_captured, policy=policy), example)
    assert (got - want).abs().max() <= EXACT
    assert reads


def test_recorded_steps_read_what_is_looked_up(reads, monkeypatch):
    """Of three images, with and without times that are known."""
    recorder = Recorder()
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "TURNS", True)
    monkeypatch.setattr(replay, "record", recorder.record)
    model = tiny_flux()
    plain, taped = parallel(model, 2, "eager"), parallel(model, 2, as_captured)
    for seed, announced in enumerate((True, False, True)):
        example = flux_inputs(seed=seed)
        want = image(plain, example)
        assert (image(taped, example, announced=announced) - want).abs().max() <= EXACT
    # A rank's steady steps, and two kinds of sync steps.
    assert recorder.recorded == 2 * 3 and recorder.played > 2 * 2 * (STEPS - 3)


def test_steps_in_any_order_and_more_than_once(reads):
    """As schedulers of second order have them."""
    times = torch.tensor([1.0, 0.7, 0.7, 0.4, 0.4, 0.9, 0.0])
    model, example = tiny_flux(), flux_inputs()
    want = image(piflux.parallelize(model, inner="eager"), example, times=times)
    got = image(piflux.parallelize(model, inner=as_captured), example, times=times)
    assert (got - want).abs().max() <= EXACT
    assert len(reads) == len(times) - 1


def steps(model, known, *changes):
    """One image of these steps."""
    with piflux.generation(model, timesteps=known):
        for change in changes:
            model(**flux_inputs() | {name: torch.tensor([x]) for name, x in change.items()})


@pytest.mark.usefixtures("captured_once")
def test_a_step_at_another_time_is_told():
    model = piflux.parallelize(tiny_flux(), inner=as_captured)
    times = [{"timestep": time} for time in (1.0, 0.5, 0.3)]
    steps(model, None, *times)
    steps(model, torch.tensor([1.0, 0.5, 0.3]), *times)
    with pytest.raises(StepsUnforeseen, match="timesteps"):
        steps(model, torch.tensor([1.0, 0.5, 0.4]), *times)


@pytest.mark.usefixtures("captured_once")
def test_guidance_that_changes_is_told():
    model = piflux.parallelize(tiny_flux(), inner=as_captured)
    guided = {"timestep": 1.0, "guidance": 4.0}, {"timestep": 0.5, "guidance": 2.0}
    with pytest.raises(StepsUnforeseen):
        steps(model, torch.tensor([1.0, 0.5]), *guided)


@pytest.mark.parametrize(
    "times",
    [torch.tensor([0.9, 0.5]), torch.tensor([1.0, 3.5]), torch.ones(1000)],
    ids=["the first is not there", "guidance could be meant", "a schedule of training"],
)
def test_in_doubt_each_step_computes_its_own(reads, times):
    model, example = tiny_flux(), flux_inputs()
    alone = piflux.parallelize(model, inner=as_captured)
    with piflux.generation(alone, timesteps=times):
        got = alone(**example, return_dict=False)[0]
    with torch.no_grad():
        assert (got - model(**example, return_dict=False)[0]).abs().max() <= EXACT
    assert not reads


def test_packed_tensors_keep_shapes_dtypes_and_alignment():
    tensors = [torch.randn(3), torch.randn(2, 5).half(), torch.randn(()), torch.randn(1, 70)]
    packed = Packed(tensors)
    first = packed.views
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(packed.views, tensors, strict=True)
    )
    assert all(x.storage_offset() % hoisted.ALIGNMENT == 0 for x in packed.views)
    packed.write([x + 1 for x in tensors])
    assert packed.views is first
    assert all(torch.equal(a, b + 1) for a, b in zip(packed.views, tensors, strict=True))


def test_what_is_aligned_is_packed_by_one_kernel():
    with Kernels() as kernels:
        packed = Packed([torch.ones(2, hoisted.ALIGNMENT), torch.zeros(hoisted.ALIGNMENT)])
    assert kernels.launched == 1 + 2  # the two that were made
    assert packed.buffers[torch.float32].tolist() == [1] * 128 + [0] * 64


# -------------------------------------------------------------------------------------- pipelines


def prompt():
    example = flux_inputs()
    return {
        "prompt_embeds": example["encoder_hidden_states"],
        "pooled_prompt_embeds": example["pooled_projections"],
        "height": 16,
        "width": 32,
        "num_inference_steps": 4,
        "output_type": "pt",
    }


def drawn(pipe):
    return pipe(**prompt(), generator=torch.Generator().manual_seed(3)).images


def test_a_pipeline_knows_its_steps(reads):
    pipe = tiny_pipeline()
    want = drawn(pipe)
    got = drawn(piflux.parallelize(pipe, inner=as_captured))
    assert (got - want).abs().max() <= 1e-4
    assert len(reads) == 4


class Misleading(FlowMatchEulerDiscreteScheduler):
    """Its third step comes at a time that it did not announce."""

    def step(self, *args, **kwargs):
        result = super().step(*args, **kwargs)
        self.timesteps[2] *= 0.99
        return result


def test_a_pipeline_whose_scheduler_misleads_is_drawn_again(reads, caplog):
    pipe = tiny_pipeline()
    pipe.scheduler = Misleading()
    want = drawn(pipe)
    parallel = piflux.parallelize(pipe, inner=as_captured)
    for _ in range(2):
        assert (drawn(parallel) - want).abs().max() <= 1e-4
    assert len(reads) == 4  # of the drawing that was thrown away
    assert [r.levelname for r in caplog.records if "drawn once more" in r.message] == ["WARNING"]
