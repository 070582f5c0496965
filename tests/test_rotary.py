"""Norm and rotary embedding of heads in one kernel: which are fused, and that they agree."""

import pytest
import torch
import torch.nn.functional as F
from graphs import captured_flux, transformed
from models import flux_inputs, sd3_inputs, tiny_flux, tiny_sd3
from test_products import check, fused
from torch import nn

from piflux.compile.program import PASSES
from piflux.graph.nodes import op_name
from piflux.kernels.rotary import norm_rotary
from piflux.passes.speed import fuse_rotary as rotary
from piflux.passes.speed.fuse_rotary import fuse_rotary

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; its twin is above"
)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(rotary, "DEVICE", "cpu")


def tables(tokens, head_dim, heads_first=False, **options):
    """Of random angles; each pair of neighbours has one."""
    angle = torch.rand(tokens, head_dim // 2, **options) * 6
    shape = (None, None) if heads_first else (None, slice(None), None)
    return [x.repeat_interleave(2, 1)[shape] for x in (angle.cos(), angle.sin())]


def norm(x, weight, eps=1e-6):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def turn(x, cos, sin):
    """As diffusers' `apply_rotary_emb` has it."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class Heads(nn.Module):
    """Attention of which `embed` gives queries that are keys, too, (1, tokens, heads, 4)."""

    def __init__(self, embed, tokens=6):
        super().__init__()
        self.embed = embed
        self.weight, self.other = (nn.Parameter(torch.rand(4)) for _ in range(2))
        for name, x in zip(("cos", "sin"), tables(tokens, 4), strict=True):
            self.register_buffer(name, x)

    def forward(self, x):
        q = self.embed(self, x).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2)


def count(embed, **options):
    return fused(fuse_rotary, Heads(embed), torch.randn(1, 6, 2, 4), **options)[0]


def plain(block, x):
    return turn(norm(x, block.weight), block.cos, block.sin)


def test_only_on_gpus(monkeypatch):
    assert count(plain) == 0
    monkeypatch.setattr(rotary, "DEVICE", "cpu")
    assert count(plain) == 1


def turned(x):
    """(-b, a) for each (a, b), in other words than `turn`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).view(x.shape)


def pieces(block, x, norms):
    """Two tokens and four, each with a norm of its own, as a double block's text and image."""
    both = zip(norms, (x[:, :2], x[:, 2:]), strict=True)
    return turn(torch.cat([n(piece) for n, piece in both], 1), block.cos, block.sin)


def behind_heads(block, x):
    cos, sin = (table.transpose(1, 2) for table in (block.cos, block.sin))
    return turn(norm(x.transpose(1, 2), block.weight), cos, sin).transpose(1, 2)


def in_another_order(block, x):
    x = norm(x, block.weight)
    return (block.sin * turned(x) + block.cos * x).to(x.dtype)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "embed",
    [
        plain,
        behind_heads,
        in_another_order,
        # Tables of a narrower type, which the kernel reads as they are.
        lambda b, x: turn(norm(x, b.weight), b.cos.bfloat16().float(), b.sin.bfloat16().float()),
        lambda b, x: pieces(b, x, [lambda y: norm(y, b.weight), lambda y: norm(y, b.other)]),
    ],
)
def test_forms(on_cpu, embed, world_size):
    assert count(embed, world_size=world_size) == 1


def halves(block, x):
    """Pairs are half a head apart."""
    x = norm(x, block.weight)
    a, b = x.chunk(2, -1)
    return (x * block.cos + torch.cat([-b, a], -1) * block.sin).to(x.dtype)


def the_other_way_round(block, x):
    x = norm(x, block.weight)
    a, b = x.unflatten(-1, (2, 2)).unbind(-1)
    return (x * block.cos + torch.stack([b, -a], -1).flatten(-2) * block.sin).to(x.dtype)


def no_pairs(block, x):
    x = norm(x, block.weight)
    a, _ = x.unflatten(-1, (2, 2)).unbind(-1)
    return (x * block.cos + torch.stack([-a, a], -1).flatten(-2) * block.sin).to(x.dtype)


def of_something_else(block, x):
    x, y = norm(x, block.weight), norm(x, block.other)
    return (x * block.cos + turned(y) * block.sin).to(x.dtype)


def a_table_for_each_head(block, x):
    cos, sin = (table.expand(1, 6, 2, 4).contiguous() for table in (block.cos, block.sin))
    return turn(norm(x, block.weight), cos, sin)


@pytest.mark.parametrize(
    "embed",
    [
        halves,
        the_other_way_round,
        no_pairs,
        of_something_else,
        a_table_for_each_head,
        lambda b, x: turn(x, b.cos, b.sin),
        lambda b, x: turn(norm(x, None), b.cos, b.sin),
        lambda b, x: turn(F.layer_norm(x, (4,), b.weight), b.cos, b.sin),
        lambda b, x: turn(F.rms_norm(x, (2, 4), b.weight.expand(2, 4), 1e-6), b.cos, b.sin),
        lambda b, x: pieces(b, x, [lambda y: norm(y, b.weight), lambda y: y]),
        lambda b, x: pieces(b, x, [lambda y: norm(y, b.weight), lambda y: norm(y, b.other, 1e-3)]),
    ],
)
def test_no_match(on_cpu, embed):
    assert count(embed) == 0


def test_a_graph_that_writes_is_left_alone(on_cpu):
    assert count(lambda b, x: plain(b, x).mul_(2)) == 0


def test_other_readers_keep_what_they_read(on_cpu):
    def embed(block, x):
        n = norm(x, block.weight)
        return turn(n, block.cos, block.sin) + n

    found, gm = fused(fuse_rotary, Heads(embed), torch.randn(1, 6, 2, 4))
    assert found == 1
    assert sum(op_name(n) == "rms_norm" for n in gm.graph.nodes) == 1


def samples(dtype=torch.float32, device="cpu"):
    """One piece and two, tokens before heads and behind, heads in wider rows."""
    torch.manual_seed(0)
    like = {"dtype": dtype, "device": device}
    for heads_first in (False, True):
        for lengths, head_dim in (((7,), 8), ((3, 5), 24)):
            xs = [
                torch.randn(2, n, 3, 3 * head_dim, **like)[..., head_dim:-head_dim] for n in lengths
            ]
            xs = [x.transpose(1, 2) if heads_first else x for x in xs]
            weights = [torch.rand(head_dim, **like) for _ in lengths]
            turns = tables(sum(lengths), head_dim, heads_first, device=device)
            yield xs, weights, 1e-6, *turns, 2 if heads_first else 1


def in_steps(xs, weights, eps, cos, sin, dim):
    return turn(
        torch.cat([norm(x, w, eps) for x, w in zip(xs, weights, strict=True)], dim), cos, sin
    )


def test_op():
    for args in samples():
        torch.library.opcheck(norm_rotary, args)
        torch.testing.assert_close(norm_rotary(*args), in_steps(*args))


@needs_gpu
@pytest.mark.parametrize("dtype", rotary.DTYPES)
def test_op_on_a_gpu(dtype):
    """As near to the exact outcome as what it replaces."""
    for args in samples(dtype, "cuda"):
        xs, weights, eps, cos, sin, dim = args
        whole = torch.cat(
            [norm(x.double(), w.double(), eps) for x, w in zip(xs, weights, strict=True)], dim
        )
        want = whole * cos.double() + turned(whole) * sin.double()
        got, now = norm_rotary(*args), in_steps(*args)
        assert got.is_contiguous()
        assert (got - want).norm() <= 1.5 * (now - want).norm()


@pytest.mark.parametrize("policy", ["gather", "displaced", "rotate"])
def test_images_are_the_same(on_cpu, policy):
    check(tiny_flux, flux_inputs(), 2, policy=policy)


def test_on_one_rank(on_cpu):
    check(tiny_flux, flux_inputs(), 1)


def test_of_a_model_without_rotary_embedding(on_cpu):
    check(tiny_sd3, sd3_inputs(), 2)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_of_flux(on_cpu, world_size, dynamic):
    """Queries and keys of each block; with symbols for all numbers, for eps as well, none."""
    gm = captured_flux(double=2, single=3, dynamic=dynamic)
    ctx = transformed(gm, world_size, PASSES if world_size > 1 else PASSES[:1])
    assert fuse_rotary(gm, ctx) == (0 if dynamic else 2 * (2 + 3))
