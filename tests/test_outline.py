"""Repeated blocks become calls of one module, which the inner compiler sees once."""

# ruff: noqa: E501 (snapshots)

import pytest
import torch
import torch.nn.functional as F
from captures import captured_once
from expecttest import TestCase
from graphs import capture, text, transformed
from models import Int8Weight, flux_inputs, quantized, sd3_inputs, tiny_flux, tiny_sd3
from test_numerics import EXACT, needs_compiler, sample
from test_virtual_ranks import image, settings
from torch import nn
from torch._dynamo.utils import counters

import piflux
from piflux.compile.program import PASSES
from piflux.passes.speed.outline import outline


def attend(x):
    q = x[:, None]
    return F.scaled_dot_product_attention(q, q, q)[:, 0]


class Blocks(nn.Module):
    """`block(x, weight, number)` for each of `depth` weights."""

    def __init__(self, block, depth=3):
        super().__init__()
        self.block = block
        self.weights = nn.ParameterList(torch.eye(4) + i for i in range(depth))

    def forward(self, x):
        x = x * 2
        for number, weight in enumerate(self.weights):
            x = self.block(x, weight, number)
        return x + 1


def plain(x, weight, number):
    return x + attend(F.linear(x, weight))


def outlined(block, world_size=1, depth=3, **options):
    """The number of blocks outlined, and the graph afterwards."""
    gm = capture(Blocks(block, depth), torch.randn(1, 6, 4), **options)
    ctx = transformed(gm, world_size, PASSES if world_size > 1 else ())
    before = str(gm.graph)
    count = outline(gm, ctx)
    gm.graph.lint()
    if not count:
        assert str(gm.graph) == before and not list(gm.children())
    return count, gm


class TestOutline(TestCase):
    def test_static(self):
        count, gm = outlined(plain, world_size=2)
        self.assertEqual(count, 3)
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 4)
piece_0: (1, 3, 4) = piece_0(x)
x: (1, 3, 4) = getitem(piece_0, 0)
slots_from: None = piflux.runtime.ops.slots_from(0)
piece_1: (1, 3, 4) = piece_1(x, weights.0)
x_1: (1, 3, 4) = getitem(piece_1, 0)
slots_from_1: None = piflux.runtime.ops.slots_from(1)
piece_2: (1, 3, 4) = piece_1(x_1, weights.1)
x_2: (1, 3, 4) = getitem(piece_2, 0)
slots_from_2: None = piflux.runtime.ops.slots_from(2)
piece_3: (1, 3, 4) = piece_1(x_2, weights.2)
x_3: (1, 3, 4) = getitem(piece_3, 0)
piece_4: (1, 6, 4) = piece_2(x_3)
add_3_whole: (1, 6, 4) = getitem(piece_4, 0)
return (add_3_whole,)
""",
        )
        self.assertExpectedInline(
            text(gm.piece_1),
            """\
x: (1, 3, 4)
linear: (1, 3, 4) = linear(x, weights.0)
q: (1, 1, 3, 4) = getitem(linear, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [6], 0, 2, sent)
getitem_1: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
x_1: (1, 3, 4) = add(x, getitem_1)
return (x_1,)
""",
        )

    def test_dynamic(self):
        count, gm = outlined(plain, world_size=2, dynamic=True)
        self.assertEqual(count, 3)
        self.assertExpectedInline(
            text(gm),
            """\
s27: s27
x: (1, s27, 4)
piece_0: (1, ((s27 + 1)//2), 4) = piece_0(s27, x)
x: (1, ((s27 + 1)//2), 4) = getitem(piece_0, 0)
slots_from: None = piflux.runtime.ops.slots_from(0)
piece_1: (1, ((s27 + 1)//2), 4) = piece_1(s27, x, weights.0)
x_1: (1, ((s27 + 1)//2), 4) = getitem(piece_1, 0)
slots_from_1: None = piflux.runtime.ops.slots_from(1)
piece_2: (1, ((s27 + 1)//2), 4) = piece_1(s27, x_1, weights.1)
x_2: (1, ((s27 + 1)//2), 4) = getitem(piece_2, 0)
slots_from_2: None = piflux.runtime.ops.slots_from(2)
piece_3: (1, ((s27 + 1)//2), 4) = piece_1(s27, x_2, weights.2)
x_3: (1, ((s27 + 1)//2), 4) = getitem(piece_3, 0)
piece_4: (1, s27, 4) = piece_2(s27, x_3)
add_3_whole: (1, s27, 4) = getitem(piece_4, 0)
return (add_3_whole,)
""",
        )
        self.assertExpectedInline(
            text(gm.piece_1),
            """\
s27: s27
x: (1, ((s27 + 1)//2), 4)
linear: (1, ((s27 + 1)//2), 4) = linear(x, weights.0)
q: (1, 1, ((s27 + 1)//2), 4) = getitem(linear, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, ((s27 + 1)//2), 4) = piflux.cached_sdpa(q, q, q, None, None, False, [s27], 0, 2, sent)
getitem_1: (1, ((s27 + 1)//2), 4) = getitem(scaled_dot_product_attention, (:, 0))
x_1: (1, ((s27 + 1)//2), 4) = add(x, getitem_1)
return (x_1,)
""",
        )


# --------------------------------------------------------------------------------- what is no match


def test_without_repetition_nothing_changes():
    assert outlined(plain, depth=1)[0] == 0


def wired(x, weight, number):
    """The same ops in the same order, but the first block subtracts the other way."""
    y = F.linear(x, weight)
    a = attend(y)
    return y - a if number else a - y


def scaled(x, weight, number):
    return x + attend(F.linear(x, weight)) * (1 + number)


@pytest.mark.parametrize("block, count", [(wired, 2), (scaled, 0)])
def test_only_equal_blocks_share_a_module(block, count):
    """Of three wired blocks two are equal; no two are of the scaled ones."""
    assert outlined(block)[0] == count


def in_place(x, weight, number):
    return plain(x, weight, number).mul_(2)


def random(x, weight, number):
    return plain(x, weight, number) + torch.rand_like(x)


def in_a_mode(x, weight, number):
    with torch.autocast("cpu", enabled=False):
        return plain(x, weight, number)


@pytest.mark.parametrize("block", [in_place, random, in_a_mode])
def test_what_does_more_than_compute_stays(block):
    assert outlined(block)[0] == 0


class Quantized(Blocks):
    """Each weight is 8 bits wide and clipped at so many standard deviations."""

    def __init__(self, clipped, dtypes):
        super().__init__(plain, len(clipped))
        torch.manual_seed(0)
        weights = [Int8Weight.of(torch.randn(4, 4), c) for c in clipped]
        for weight, dtype in zip(weights, dtypes, strict=True):
            weight.values = weight.values.to(dtype)
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)


@pytest.mark.parametrize(
    "clipped, dtypes, blocks",
    [
        ((3.0, 3.0, 3.0), (torch.int8, torch.int8, torch.int8), 3),
        ((3.0, 3.0, 2.0), (torch.int8, torch.int8, torch.int8), 2),
        ((3.0, 3.0, 3.0), (torch.int8, torch.int8, torch.int16), 2),
    ],
    ids=["alike", "another context", "another dtype inside"],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_weights_of_a_subclass_are_arguments_if_they_are_alike(clipped, dtypes, blocks, dynamic):
    """In what they wrap, and in what they are rebuilt from."""
    model, x = Quantized(clipped, dtypes), torch.randn(1, 6, 4)
    gm = capture(model, x, dynamic=dynamic)
    assert outline(gm, transformed(gm, 1, ())) == blocks
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=piflux.backend, options={"inner": "aot_eager"}, fullgraph=True
    )
    with torch.no_grad():
        assert (compiled(x) - model(x)).abs().max() <= EXACT


class Sized(Blocks):
    """Every block reads a size that was taken before the first."""

    def forward(self, x):
        x = x * 2
        size = x.shape
        for number, weight in enumerate(self.weights):
            x = self.block(x, weight, number).reshape(size)
        return x + 1


def test_blocks_that_share_a_tuple_stay():
    model, x = Sized(plain), torch.randn(1, 6, 4)
    gm = capture(model, x, dynamic=True)
    assert outline(gm, transformed(gm, 1, ())) == 0
    compiled = torch.compile(
        model, backend=piflux.backend, options={"inner": "aot_eager"}, dynamic=True, fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


# ------------------------------------------------------------------------------------------- counts


# Of a FLUX: embedders, a double block, what joins, a single block, and the last one with the head.
PIECES = 5


class Inner:
    """An inner compiler that runs graphs as they are, and counts those it was given."""

    def __init__(self):
        self.calls = 0

    def __call__(self, gm, example_inputs):
        self.calls += 1
        return gm.forward


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("world_size", [1, 2])
def test_calls_of_the_inner_compiler_do_not_grow_with_depth(world_size):
    group = None if world_size == 1 else piflux.virtual_ranks(world_size)
    for double, single in ((2, 3), (3, 5)):
        inner = Inner()
        parallel = piflux.parallelize(
            tiny_flux(double=double, single=single), group=group, inner=inner
        )
        sample(parallel)(**flux_inputs())
        assert inner.calls == PIECES


def test_another_size_needs_no_other_pieces():
    inner, model = Inner(), tiny_flux(double=2, single=3)
    compiled = torch.compile(
        model,
        backend=piflux.backend,
        options={"inner": inner},
        dynamic=True,
        fullgraph=True,
    )
    counters.clear()
    for size in ({}, {"image_hw": (4, 6), "text": 14}):
        inputs = flux_inputs(**size)
        with torch.no_grad():
            want = sample(model)(**inputs)
            assert torch.equal(sample(compiled)(**inputs), want)
    assert inner.calls == PIECES
    assert counters["stats"]["unique_graphs"] == 1


# ----------------------------------------------------------------------------------------- numerics


def drawn(model, inputs, inner, options):
    group = piflux.virtual_ranks(3)
    with captured_once():
        return image(piflux.parallelize(model, group=group, inner=inner, **options), inputs)


@pytest.mark.parametrize("options", list(settings()))
def test_pieces_compute_the_very_same(options):
    """In sync and other steps, with a cache for each of three ranks."""
    model, inputs, inner = tiny_flux(double=2, single=3), flux_inputs(), Inner()
    got = drawn(model, inputs, inner, options)
    assert torch.equal(got, drawn(model, inputs, "eager", options))
    # Who computes whole sync steps has a graph of the whole, too.
    assert inner.calls == PIECES * (2 if options.get("sync") == "recompute" else 1)


def test_pieces_of_a_quantized_model():
    model, inputs, inner = quantized(tiny_flux(double=2, single=3)), flux_inputs(), Inner()
    got = drawn(model, inputs, inner, {"policy": "rotate"})
    assert torch.equal(got, drawn(model, inputs, "eager", {"policy": "rotate"}))
    assert inner.calls == PIECES
    through_aot = drawn(model, inputs, "aot_eager", {"policy": "rotate"})
    assert (through_aot - got).abs().max() <= EXACT


def test_pieces_of_another_model():
    model, inputs, inner = tiny_sd3(layers=4), sd3_inputs(), Inner()
    got = drawn(model, inputs, inner, {"policy": "displaced"})
    assert torch.equal(got, drawn(model, inputs, "eager", {"policy": "displaced"}))
    assert inner.calls > 2


@pytest.mark.usefixtures("captured_once")
@needs_compiler
def test_inductor():
    """The graph as a whole is off by 5.02e-5 after these steps, as its pieces are.

    On one rank it has symbols for sizes, below.
    """
    model, inputs = tiny_flux(double=2, single=3), flux_inputs()
    want, got = (
        image(piflux.parallelize(model, group=piflux.virtual_ranks(2), inner=inner), inputs)
        for inner in ("eager", "inductor")
    )
    assert (got - want).abs().max() <= 10 * EXACT
    assert not torch.equal(got, want)  # inductor did compile


@needs_compiler
def test_inductor_at_another_size():
    """Text as long as the channels are many, and image tokens under two symbols that are one."""
    model = tiny_flux(double=2, single=3)
    compiled = torch.compile(model, backend=piflux.backend, fullgraph=True)
    counters.clear()
    for image_hw in ((4, 4), (5, 7)):
        inputs = flux_inputs(image_hw=image_hw, text=16)
        with torch.no_grad():
            want = sample(model)(**inputs)
        for name, dim in (("hidden_states", 1), ("img_ids", 0)):
            torch._dynamo.mark_dynamic(inputs[name], dim)
        with torch.no_grad():
            assert (sample(compiled)(**inputs) - want).abs().max() <= 10 * EXACT
    assert counters["stats"]["unique_graphs"] == 1
