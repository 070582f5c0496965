"""Linear layers of one input become one, and products apply GELU: which do, and that they agree."""

# ruff: noqa: E501 (snapshots)

import copy
import re
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import sympy
import torch
import torch.nn.functional as F
from captures import captured_once
from expecttest import TestCase
from graphs import capture, captured_flux, text, transformed
from models import Int8Weight, flux_inputs, sd3_inputs, tiny_flux, tiny_sd3
from safetensors.torch import load_file, save_file
from test_numerics import EXACT
from test_replay import as_captured, parallel
from test_virtual_ranks import image
from torch import nn

from piflux.compile.program import PASSES
from piflux.kernels.products import adjoining, linear_gelu, linear_of_cat
from piflux.passes.speed import fuse_gelu as gelu
from piflux.passes.speed import sigmoid_gelu as sigmoid
from piflux.passes.speed.fuse_gelu import fuse_gelu
from piflux.passes.speed.fuse_linears import fuse_linears

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; its twin is above"
)


class Block(nn.Module):
    """Attention beside an MLP, as FLUX's single blocks have them."""

    def __init__(self, bias=True, activate=lambda m: F.gelu(m, approximate="tanh")):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4, bias) for _ in range(3))
        self.up, self.out = nn.Linear(4, 8), nn.Linear(12, 4)
        self.activate = activate

    def forward(self, x):
        q, k, v = (to(x)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        a = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.out(torch.cat([a, self.activate(self.up(x))], -1))


def fused(run, model, *args, world_size=2, rotates=False):
    """How many layers `run` fuses, and the graph afterwards, which is the same if it fuses none."""
    gm = capture(model, *args)
    ctx = transformed(gm, world_size, PASSES if world_size > 1 else PASSES[:1])
    ctx.rotates = rotates
    before = str(gm.graph)
    count = run(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    if not count:
        assert str(gm.graph) == before and not list(gm.children())
    return count, gm


def x():
    return torch.randn(1, 6, 4)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gelu, "DEVICE", "cpu")
    monkeypatch.setattr(gelu, "DTYPES", (torch.float32,))


@pytest.fixture
def by_sigmoid_on_cpu(monkeypatch):
    monkeypatch.setattr(sigmoid, "DEVICE", "cpu")
    monkeypatch.setattr(sigmoid, "DTYPES", (torch.float32,))


# ------------------------------------------------------------------------------------------- linear


def products(gm):
    """How many linear layers are left."""
    return sum(n.target is F.linear for n in gm.graph.nodes)


class TestFuseLinears(TestCase):
    def test_where_steps_send_nothing_the_query_is_part_of_it(self):
        count, gm = fused(fuse_linears, Block(bias=False), x(), rotates=True)
        self.assertEqual(count, 3)
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 4)
weights: (12, 4) = weights(to_q.weight, to_k.weight, to_v.weight)
adjoining_1: (12, 4) = getitem(weights, 0)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
linear_5: (1, 3, 12) = linear(x_part, adjoining_1)
linear_1: (1, 3, 4) = narrow(linear_5, -1, 4, 4)
k: (1, 1, 3, 4) = getitem(linear_1, (:, None))
linear_2: (1, 3, 4) = narrow(linear_5, -1, 8, 4)
v: (1, 1, 3, 4) = getitem(linear_2, (:, None))
sent: (1) = piflux.send_kv(k, v, 0, 2)
linear: (1, 3, 4) = narrow(linear_5, -1, 0, 4)
q: (1, 1, 3, 4) = getitem(linear, (:, None))
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, k, v, None, None, False, [6], 0, 2, sent)
a: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
linear_3: (1, 3, 8) = linear(x_part, up.weight, up.bias)
gelu: (1, 3, 8) = gelu(linear_3, approximate='tanh')
cat: (1, 3, 12) = cat([a, gelu], -1)
linear_4: (1, 3, 4) = linear(cat, out.weight, out.bias)
linear_4_whole: (1, 6, 4) = piflux.unshard(linear_4, 1, [6], 2)
return (linear_4_whole,)
""",
        )


class Two(nn.Module):
    """Attentions to the same text, one after the other, as Wan's blocks have them."""

    def __init__(self):
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.values = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, y):
        for key, value in zip(self.keys, self.values, strict=True):
            q, k, v = (h[:, None] for h in (x, key(y), value(y)))
            x = x + F.scaled_dot_product_attention(q, q, q)[:, 0]
            x = x + F.scaled_dot_product_attention(x[:, None], k, v)[:, 0]
        return x


def test_never_over_an_attention():
    count, gm = fused(fuse_linears, Two(), x(), torch.randn(1, 5, 4), world_size=1)
    assert count == 4
    assert products(gm) == 2


def test_what_overlap_put_behind_a_send_stays_there():
    """Keys and values become one product; the query's runs while they travel."""
    count, gm = fused(fuse_linears, Block(), x())
    assert count == 2
    assert products(gm) == 2 + 2  # and those of the MLP


class Uneven(Block):
    """Keys are of another layer's width, and values have no bias."""

    def __init__(self):
        super().__init__()
        self.to_k, self.to_v = nn.Linear(4, 8), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        q, k, v = (to(x)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(q, k[..., :4], v)[:, 0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_layers_of_other_shapes_stay(world_size):
    assert fused(fuse_linears, Uneven(), x(), world_size=world_size, rotates=True)[0] == 0


def test_parameters_in_a_memory_of_others_stay():
    """As those of sharded data parallelism: who writes there must be seen."""
    model, flat = Block(bias=False), torch.randn(100)
    for i, layer in enumerate((model.to_q, model.to_k, model.to_v)):
        layer.weight.data = flat[20 * i : 20 * i + 16].view(4, 4)
    assert fused(fuse_linears, model, x())[0] == 0


def test_a_shared_parameter_stays():
    model = Block(bias=False)
    model.to_v.weight = model.to_k.weight
    assert fused(fuse_linears, model, x())[0] == 0


def test_weights_that_are_inputs_stay():
    """They belong to the caller, who may bring others each time."""
    w = torch.randn(4, 4)

    def model(x, w_q, w_k):
        q, k = F.linear(x, w_q)[:, None], F.linear(x, w_k)[:, None]
        return F.scaled_dot_product_attention(q, k, k)[:, 0]

    assert fused(fuse_linears, model, x(), w, w + 1, rotates=True)[0] == 0


class Rows(Int8Weight):
    """With a `cat` of its own, as torchao's fp8 weights have one."""

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is not torch.ops.aten.cat.default:
            return super().__torch_dispatch__(op, types, args, kwargs)
        weights = args[0]
        inside = [torch.cat([getattr(x, name) for x in weights]) for name in ("values", "scales")]
        return cls(*inside, weights[0].clipped)


class Unable(Int8Weight):
    """Without: it has no such op."""

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.cat.default:
            raise NotImplementedError(op)
        return super().__torch_dispatch__(op, types, args, kwargs)


class Wholly(Rows):
    """With one scale for all rows."""

    @classmethod
    def of(cls, weight, clipped=3.0):
        one = Rows.of(weight, clipped)
        return cls(one.values, one.scales.amax(0, keepdim=True), clipped)


def in_8_bits(kind, model=None, clipped=(3.0, 3.0, 3.0)):
    torch.manual_seed(0)
    model = model or Block()
    for name, c in zip(("to_q", "to_k", "to_v"), clipped, strict=True):
        layer = getattr(model, name)
        layer.weight = nn.Parameter(kind.of(layer.weight.detach(), c), requires_grad=False)
    return model


def test_quantized_layers_become_one():
    count, gm = fused(fuse_linears, in_8_bits(Rows), x(), rotates=True)
    assert count == 3 and products(gm) == 3
    (layer, *_) = (n for n in gm.graph.nodes if n.target is F.linear and n.args[0].name == "x_part")
    weight = layer.args[1].meta["example_value"]
    assert (
        type(weight) is Rows and weight.values.shape == (12, 4) and weight.scales.shape == (12, 1)
    )
    # Those of different settings are none.
    model = in_8_bits(Rows, clipped=(3.0, 3.0, 2.0))
    assert fused(fuse_linears, model, x(), rotates=True)[0] == 2


@pytest.mark.skipif(
    find_spec("torchao") is None,
    reason="needs torchao, which prints warnings wherever it is installed; its twin is above",
)
def test_torchao_s_fp8_layers_become_one():
    from torchao import quantization

    model = Block().to(torch.bfloat16)
    # torchao asks for a GPU that is fast at it; a CPU computes the same.
    with mock.patch.object(quantization.quant_api, "_check_hardware_support"):
        by_row = quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), set_inductor_config=False
        )
        quantization.quantize_(model, by_row)
    count, gm = fused(fuse_linears, model, x().to(torch.bfloat16), rotates=True)
    assert count == 3 and products(gm) == 3


@pytest.mark.parametrize("kind", [Int8Weight, Unable, Wholly])
def test_quantized_layers_that_are_not_held_by_row_stay(kind):
    """Nor those of a class whose own `cat` gives something else, or that has none."""
    assert fused(fuse_linears, in_8_bits(kind), x(), rotates=True)[0] == 0


def test_quantized_weights_in_a_memory_of_others_stay():
    model, flat = in_8_bits(Rows), torch.zeros(100, dtype=torch.int8)
    for i, layer in enumerate((model.to_q, model.to_k, model.to_v)):
        layer.weight.values = flat[20 * i : 20 * i + 16].view(4, 4)
    assert fused(fuse_linears, model, x(), rotates=True)[0] == 0


class Crossed(nn.Module):
    """Three layers of which each two share an input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        a, b, c = self.layers
        for one, other in ((a, b), (b, c), (a, b)):
            q, k = one(x)[:, None], other(x)[:, None]
            x = x + F.scaled_dot_product_attention(q, k, k)[:, 0]
        return x


def test_a_parameter_has_one_place():
    """Who goes with the one cannot go with the other, too; who comes again goes with the same."""
    count, gm = fused(fuse_linears, Crossed(), x(), rotates=True)
    assert count == 2 + 2
    assert products(gm) == 1 + 2 + 1


def test_moved_once_and_fused_again():
    """Parameters that another graph of the model has moved."""
    model = Block()
    adjoining(model.to_q.weight, model.to_k.weight, model.to_v.weight)
    adjoining(model.to_q.bias, model.to_k.bias, model.to_v.bias)
    assert fused(fuse_linears, model, x())[0] == 2
    assert fused(fuse_linears, model, x(), rotates=True)[0] == 3


def test_more_are_moved_to_those_that_were_moved():
    """A graph with sends has fused keys and values alone."""
    model = Block(bias=False)
    adjoining(model.to_k.weight, model.to_v.weight)
    assert fused(fuse_linears, model, x(), rotates=True)[0] == 3


def test_a_graph_that_does_more_than_compute_stays(on_cpu):
    def model(x):
        return block(x).add_(1)

    block = Block()
    assert fused(fuse_linears, model, x())[0] == 0
    assert fused(fuse_gelu, model, x())[0] == 0


def weights():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(n, 3), requires_grad=False) for n in (2, 4, 2)]


def test_adjoining_moves_once():
    parameters = weights()
    want = torch.cat([p.clone() for p in parameters])
    whole = adjoining(*parameters)
    assert torch.equal(whole, want)
    assert whole.untyped_storage().nbytes() == want.nbytes
    assert all(p.untyped_storage().data_ptr() == whole.data_ptr() for p in parameters)
    places = [p.data_ptr() for p in parameters]
    assert adjoining(*parameters).data_ptr() == whole.data_ptr()
    assert torch.equal(adjoining(*parameters[1:]), want[2:])  # as another graph may want them
    assert [p.data_ptr() for p in parameters] == places


def test_adjoining_sees_what_is_written():
    parameters = weights()
    whole = adjoining(*parameters)
    parameters[1].mul_(2)
    assert torch.equal(whole[2:6], parameters[1])
    parameters[1].data = torch.ones(4, 3)
    whole = adjoining(*parameters)
    assert torch.equal(whole, torch.cat(parameters)) and (whole[2:6] == 1).all()


def test_adjoining_is_not_misled_by_neighbours():
    """Three memories that happen to lie one behind the other are not one."""
    block = torch.randn(12)
    memory = block.untyped_storage()
    parts = []
    for i in range(3):
        part = torch.empty(0)
        part.set_(memory[16 * i : 16 * i + 16], 0, (2, 2))
        parts.append(nn.Parameter(part, requires_grad=False))
    assert parts[0].untyped_storage().nbytes() == 16
    assert parts[1].data_ptr() == parts[0].data_ptr() + 16
    assert torch.equal(adjoining(*parts), block.view(6, 2))


def test_adjoining_of_quantized_weights():
    parameters = [nn.Parameter(Rows.of(w.detach()), requires_grad=False) for w in weights()]
    want = torch.cat([p.values * p.scales for p in parameters])
    whole = adjoining(*parameters)
    assert type(whole) is Rows and whole.shape == (8, 3) and whole.clipped == 3.0
    assert torch.equal(whole.values * whole.scales, want)
    for name in ("values", "scales"):
        memory = getattr(whole, name).untyped_storage()
        assert memory.nbytes() == getattr(whole, name).nbytes
        assert all(
            getattr(p, name).untyped_storage().data_ptr() == memory.data_ptr() for p in parameters
        )
    parameters[1].scales.mul_(2)
    assert torch.equal(adjoining(*parameters).scales, torch.cat([p.scales for p in parameters]))
    assert adjoining(*parameters).values.data_ptr() == whole.values.data_ptr()


@pytest.mark.parametrize("made", [False, True])
def test_adjoining_in_inference_mode(made):
    with torch.inference_mode(made):
        parameters = weights()
    want = torch.cat([p.clone() for p in parameters])
    with torch.inference_mode():
        assert torch.equal(adjoining(*parameters), want)
        assert adjoining(*parameters).data_ptr() == adjoining(*parameters).data_ptr()
    with torch.no_grad():
        assert torch.equal(adjoining(*parameters), want)


@pytest.mark.usefixtures("captured_once")
def test_a_model_is_saved_and_moved_as_ever(tmp_path):
    model = tiny_flux()
    want = {name: x.clone() for name, x in model.state_dict().items()}
    image(parallel(model, 2, as_captured), flux_inputs())
    attn = model.transformer_blocks[0].attn
    assert attn.to_k.weight.untyped_storage().nbytes() == 3 * attn.to_k.weight.nbytes
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for saved in (load_file(tmp_path / "model.safetensors"), copy.deepcopy(model).state_dict()):
        assert saved.keys() == want.keys()
        assert all(torch.equal(saved[name], x) for name, x in want.items())


@pytest.mark.usefixtures("captured_once")
def test_all_graphs_of_a_model_want_the_same_places():
    """The whole graph of sync steps, the part's, and those of another policy."""
    model, inputs = tiny_flux(), flux_inputs()
    image(parallel(model, 2, as_captured), inputs)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    for policy in ("gather", "rotate"):
        image(parallel(model, 3, as_captured, policy=policy), inputs)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


# --------------------------------------------------------------------------------------------- GELU


def gelus(activate=lambda m: F.gelu(m, approximate="tanh"), bias=True, **options):
    model = Block(activate=activate)
    if not bias:
        model.up.register_parameter("bias", None)
    return fused(fuse_gelu, model, x(), **options)[0]


def test_only_on_gpus_and_in_16_bits(monkeypatch):
    assert gelus() == 0
    monkeypatch.setattr(gelu, "DEVICE", "cpu")
    assert gelus() == 0
    monkeypatch.setattr(gelu, "DTYPES", (torch.float32,))
    assert gelus() == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_the_tanh_form_right_behind_a_layer_with_a_bias(on_cpu, world_size):
    assert gelus(world_size=world_size) == 1
    assert gelus(F.gelu, world_size=world_size) == 0
    assert gelus(F.silu, world_size=world_size) == 0
    assert gelus(bias=False, world_size=world_size) == 0
    assert gelus(lambda m: F.gelu(m * 2, approximate="tanh"), world_size=world_size) == 0
    assert gelus(lambda m: F.gelu(m, approximate="tanh") + m, world_size=world_size) == 0


@pytest.mark.parametrize(
    "read",
    [
        lambda block, c: block.out(c) + c.sum(),  # somebody else reads it
        lambda block, c: block.out(c * 2),
        lambda block, c: block.out(c.transpose(1, 2).reshape(1, 6, 12)),
    ],
)
def test_a_cat_that_a_layer_does_not_read_alone_stays(on_cpu, read):
    class Other(Block):
        def forward(self, x):
            q = self.to_q(x)[:, None]
            a = F.scaled_dot_product_attention(q, q, q)[:, 0]
            return read(self, torch.cat([a, self.activate(self.up(x))], -1))

    count, gm = fused(fuse_gelu, Other(), x(), world_size=1)
    assert count == 1
    assert not gm.graph.find_nodes(
        op="call_function", target=torch.ops.piflux.linear_of_cat.default
    )


def samples(op):
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(2, 5, 6), torch.randn(4, 6), torch.randn(4)
    if op is linear_gelu:
        yield rows, weight, bias
        yield rows.transpose(0, 1), weight, bias
    else:
        yield [rows[..., :1], rows[..., 1:4].contiguous(), rows[..., 4:]], weight, bias
        yield [rows[..., :2], rows[..., 2:]], weight, None


@pytest.mark.parametrize("op", [linear_gelu, linear_of_cat])
def test_ops(op):
    for args in samples(op):
        torch.library.opcheck(op, args)
        first, *rest = args
        want = (
            F.gelu(F.linear(first, *rest), approximate="tanh")
            if op is linear_gelu
            else F.linear(torch.cat(first, -1), *rest)
        )
        torch.testing.assert_close(op(*args), want)


@needs_gpu
@pytest.mark.parametrize("dtype", gelu.DTYPES)
def test_ops_on_a_gpu(dtype):
    """As near to the exact outcome as what they replace."""
    torch.manual_seed(0)
    x = torch.randn(2, 96, 256, device="cuda", dtype=dtype)
    weight = torch.randn(512, 256, device="cuda", dtype=dtype) / 16
    bias = torch.randn(512, device="cuda", dtype=dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    parts = [x[..., :64].contiguous(), x[..., 64:].contiguous()]
    for got, now, want in (
        (linear_of_cat(parts, weight, bias), F.linear(x, weight, bias), exact),
        (
            linear_gelu(x, weight, bias),
            F.gelu(F.linear(x, weight, bias), approximate="tanh"),
            F.gelu(exact, approximate="tanh"),
        ),
    ):
        assert (got - want).norm() <= 1.5 * (now - want).norm()


def by_sigmoid(activate=lambda m: F.gelu(m, approximate="tanh"), model=None):
    return fused(sigmoid.sigmoid_gelu, model or Block(activate=activate), x())[0]


def test_gelu_by_a_sigmoid_on_gpus_and_in_16_bits(monkeypatch):
    assert by_sigmoid() == 0
    monkeypatch.setattr(sigmoid, "DEVICE", "cpu")
    assert by_sigmoid() == 0
    monkeypatch.setattr(sigmoid, "DTYPES", (torch.float32,))
    assert by_sigmoid() == 1


def test_only_the_tanh_form_is_one_of_a_sigmoid(by_sigmoid_on_cpu):
    assert by_sigmoid(lambda m: F.gelu(m * 2, approximate="tanh") + m) == 1
    assert by_sigmoid(F.gelu) == 0
    assert by_sigmoid(F.silu) == 0
    assert by_sigmoid(lambda m: F.gelu(m.double(), approximate="tanh").float()) == 0


@pytest.mark.parametrize("dtype", sigmoid.DTYPES)
def test_gelu_by_a_sigmoid_is_as_exact(monkeypatch, dtype):
    monkeypatch.setattr(sigmoid, "DEVICE", "cpu")

    def model(x):
        q = x[:, None]
        return F.gelu(x, approximate="tanh"), F.scaled_dot_product_attention(q, q, q)

    values = torch.linspace(-12, 12, 4096, dtype=dtype).view(1, -1, 4)
    count, gm = fused(sigmoid.sigmoid_gelu, model, values, world_size=1)
    assert count == 1
    exact = F.gelu(values.double(), approximate="tanh")
    (got, _), now = gm(values), F.gelu(values, approximate="tanh")
    assert got.dtype == dtype
    assert (got - exact).norm() <= 1.01 * (now - exact).norm()
    assert (got - now).abs().max() <= torch.finfo(dtype).eps * 12


# ----------------------------------------------------------------------------------------- numerics


def check(make, inputs, world_size, **options):
    with captured_once():
        plain, quick = (
            image(parallel(make(), world_size, inner, **options), inputs)
            for inner in ("eager", as_captured)
        )
    assert (plain - quick).abs().max() <= EXACT


@pytest.mark.parametrize("policy", ["gather", "displaced", "rotate"])
def test_images_are_the_same(on_cpu, policy):
    check(tiny_flux, flux_inputs(), 2, policy=policy)


def test_on_one_rank(on_cpu):
    check(tiny_flux, flux_inputs(), 1)


def flux_in_8_bits():
    model = tiny_flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        in_8_bits(Rows, block.attn)
    return model


@pytest.mark.parametrize("policy", ["gather", "rotate"])
def test_of_a_quantized_model(by_sigmoid_on_cpu, policy, caplog):
    caplog.set_level("DEBUG", "piflux")
    check(flux_in_8_bits, flux_inputs(), 2, policy=policy)
    assert re.search(r"fuse_linears +[1-9]", caplog.text)
    assert re.search(r"sigmoid_gelu +[1-9]", caplog.text)


def test_of_a_recomputed_sync_step(on_cpu):
    check(tiny_flux, flux_inputs(), 3, sync="recompute", refresh_every=3)


def test_of_sd3(on_cpu):
    check(tiny_sd3, sd3_inputs(), 2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_of_flux(on_cpu, world_size):
    """Projections of each stream of a double block and of a single one, and their MLPs."""
    for run, want in ((fuse_linears, 3 * (2 * 2 + 3)), (fuse_gelu, 2 * 2 + 3)):
        gm = captured_flux(double=2, single=3)
        ctx = transformed(gm, world_size, PASSES if world_size > 1 else PASSES[:1])
        ctx.rotates = True
        assert run(gm, ctx) == want


# ------------------------------------------------------------------------------ inductor's choices


def reduction(numel, hint="INNER"):
    from torch._inductor.runtime.hints import ReductionHint

    return SimpleNamespace(
        reduction_numel=sympy.sympify(numel), get_reduction_hint=lambda: ReductionHint[hint]
    )


def test_a_transformer_s_rows_are_read_once(monkeypatch):
    from torch._inductor.choices import InductorChoices

    from piflux.compile.inductor import Choices

    monkeypatch.setattr(
        InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: False)
    )
    once = Choices.should_use_persistent_reduction
    assert once(reduction(3072), False)
    assert once(reduction(4096), False)
    assert not once(reduction(4097), False)
    assert not once(reduction("s0"), False)
    assert not once(reduction(3072), True)  # several blocks of threads share a row
    assert not once(reduction(128, "DEFAULT"), False)
