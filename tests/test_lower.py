"""Calls that Dynamo leaves closed: written as the ops they consist of, or refused by name."""

# ruff: noqa: E501 (snapshots)

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, text, transformed
from test_rules import assert_exact, attend
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from piflux.compile.program import FIRST, PASSES
from piflux.errors import CannotShard
from piflux.passes.split.layout import layout
from piflux.passes.split.lower import lower


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Registered under the name, and with the arguments, that flash-attn has for its own."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal)
    return out.transpose(1, 2).contiguous(), q.new_zeros(q.shape[:3])


@flash_forward.register_fake
def _(q, *args):
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


def flash(x, heads=2, window=-1, causal=False, softcap=0.0, output=0, keys=None):
    q = x.unflatten(-1, (heads, -1))
    k = q if keys is None else q[:, :keys]
    options = (0.0, 0.5, causal, window, window, softcap, None, False)
    return torch.ops.flash_attn._flash_attn_forward(q, k, k, *options)[output].flatten(2)


@torch._dynamo.allow_in_graph
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **kwargs):
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=sm_scale)
    return out.transpose(1, 2) if tensor_layout == "NHD" else out


@torch._dynamo.allow_in_graph
def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_bias, p, scale=scale).transpose(1, 2)


sageattn.__module__ = "sageattention.core"
memory_efficient_attention.__module__ = "xformers.ops.fmha"


def still(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval().requires_grad_(False)


linear = still(nn.Linear(8, 8))
heads = still(nn.MultiheadAttention(8, 2, batch_first=True))
apart = still(nn.MultiheadAttention(8, 2, bias=False, kdim=8, vdim=4))
layer = still(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
early_norm = still(
    nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
)


class TestLower(TestCase):
    def test_what_becomes_of_calls(self):
        def model(x):
            y = checkpoint(lambda z: checkpoint(linear, z, use_reentrant=False), x)
            return attend(flash(y)) * x.new_full((1, 6, 1), 2.0)

        gm = capture(model, torch.randn(1, 6, 8))
        transformed(gm, passes=FIRST)
        assert not list(gm.children())
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 8)
linear: (1, 6, 8) = linear(x, g_linear.weight, g_linear.bias)
q: (1, 6, 2, 4) = linear.unflatten(-1, (2, -1))
transpose: (1, 2, 6, 4) = q.transpose(1, 2)
transpose_1: (1, 2, 6, 4) = q.transpose(1, 2)
transpose_2: (1, 2, 6, 4) = q.transpose(1, 2)
scaled_dot_product_attention_1: (1, 2, 6, 4) = scaled_dot_product_attention(transpose, transpose_1, transpose_2, dropout_p=0.0, is_causal=False, scale=0.5, enable_gqa=False)
transpose_3: (1, 6, 2, 4) = scaled_dot_product_attention_1.transpose(1, 2)
flatten: (1, 6, 8) = transpose_3.flatten(2)
getitem_3: (1, 1, 6, 8) = getitem(flatten, (:, None))
getitem_4: (1, 1, 6, 8) = getitem(flatten, (:, None))
getitem_5: (1, 1, 6, 8) = getitem(flatten, (:, None))
scaled_dot_product_attention: (1, 1, 6, 8) = scaled_dot_product_attention(getitem_3, getitem_4, getitem_5)
getitem_6: (1, 6, 8) = getitem(scaled_dot_product_attention, (:, 0))
add: (1, 6, 8) = add(flatten, getitem_6)
full: (1, 6, 1) = full((1, 6, 1), 2.0, dtype=torch.float32, device=cpu)
mul: (1, 6, 8) = mul(add, full)
return (mul,)
""",
        )


def test_multi_head_attention():
    """To itself, to a context, with padding and with a mask for each head."""
    hidden = torch.zeros(2, 7)
    hidden[:, 5:] = float("-inf")
    mask = torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(0))

    def model(x, context):
        y = heads(x, x, x, need_weights=False)[0]
        y = y + heads(y, y, y, key_padding_mask=hidden, attn_mask=mask)[0]
        y = y + heads(y, context, context, key_padding_mask=context[..., 0] > 1)[0]
        z = y.transpose(0, 1)
        return attend(apart(z, z, z[..., :4])[0].transpose(0, 1))

    for n in (2, 3):
        assert_exact(model, torch.randn(2, 7, 8), torch.randn(2, 5, 8), n=n)


def test_attention_that_pools_runs_whole():
    """As HunyuanDiT pools its text: one query, and nobody reads the second item, which is None."""

    def model(x, text):
        tokens = text.transpose(0, 1)
        pooled = F.multi_head_attention_forward(
            tokens.mean(0, keepdim=True), tokens, tokens, 8, 2, heads.in_proj_weight,
            heads.in_proj_bias, None, None, False, 0.0, heads.out_proj.weight,
            heads.out_proj.bias, training=False, need_weights=False,
        )[0]  # fmt: skip
        return attend(x + pooled.transpose(0, 1))

    assert_exact(model, torch.randn(1, 7, 8), torch.randn(1, 5, 8))


def test_encoder_layers():
    for n in (2, 3):
        assert_exact(lambda x: attend(early_norm(layer(attend(x)))), torch.randn(2, 7, 8), n=n)


def test_bodies():
    """Of checkpoints, one in another, and of a region that is compiled once."""

    @torch.compiler.nested_compile_region
    def region(x, scale):
        return attend(linear(x) * scale)

    def model(x, scale):
        y = region(region(attend(x), scale), scale)
        return checkpoint(lambda z: checkpoint(attend, linear(z), use_reentrant=False), y)

    for n in (2, 3):
        assert_exact(model, torch.randn(1, 7, 8), torch.rand(8), n=n)


def test_attention_of_other_libraries():
    def model(x):
        y = flash(attend(x))
        q = y.unflatten(-1, (2, 4))
        y = y + sageattn(q, q, q, "NHD", smooth_k=False).flatten(2)
        y = y + sageattn(*[q.transpose(1, 2)] * 3).transpose(1, 2).flatten(2)
        y = y + memory_efficient_attention(q, q[:, :, :1], q[:, :, :1], scale=0.3).flatten(2)
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return flex_attention(heads, heads, heads, scale=0.7).transpose(1, 2).flatten(2)

    for n in (2, 3):
        assert_exact(model, torch.randn(1, 7, 8), n=n)


def test_what_flex_attention_adds_is_gone():
    """Without a block mask it makes one that hides nothing, by `vmap`, and writes into it."""

    def model(x):
        q = x[:, None]
        return flex_attention(q, q, q), torch.vmap(torch.sin)(x)

    gm = capture(model, torch.randn(2, 7, 8))
    assert lower(gm, transformed(gm, passes=())) == 1
    left = [n.name for n in gm.graph.nodes if n.op != "placeholder" and n.users]
    assert [n for n in left if "mask" in n or "child" in n] == []
    assert any("_add_batch_dim" in n for n in left)  # the model's own mapping


def test_made_like_another():
    """Of literal and of symbolic sizes; inside of a `vmap` what is made is mapped, too."""
    rows = torch.rand(3, 8)

    def model(x):
        y = attend(x) * (1 + x.new_zeros(8)) + x.new_full(size=(1, 1, 8), fill_value=2.0)
        y = y + attend(y).new_ones(1, 7, 8) + torch.vmap(lambda r: r.new_ones(8).copy_(r))(rows)[0]
        return attend(y)

    for n in (2, 3):
        assert_exact(model, torch.randn(1, 7, 8), n=n)

    def symbolic(x):
        y = attend(x)
        return attend(y + y.new_ones(y.shape[1], 1) + x.new_empty(x.shape).fill_(2))

    gm = capture(symbolic, torch.randn(1, 7, 8), dynamic=True)
    transformed(gm, passes=(*FIRST, *PASSES))


def test_causal_attention_has_a_mask():
    """On several ranks, of as many keys as queries and of more; one rank computes it as it is."""

    def model(x, past):
        y = attend(x)[:, None]
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True, scale=0.7)[:, 0]
        both = torch.cat([y, past], 1)[:, None]
        y = F.scaled_dot_product_attention(y[:, None], both, both, None, 0.0, True)[:, 0]
        return attend(y)

    inputs = torch.randn(1, 7, 8), torch.randn(1, 4, 8)
    for n in (2, 3):
        assert_exact(model, *inputs, n=n)
        assert_exact(lambda x: attend(flash(attend(x), causal=True)), inputs[0], n=n)
    gm = capture(model, *inputs, dynamic=True)
    transformed(gm, passes=(*FIRST, *PASSES))
    assert sum(n.target is torch.ge for n in gm.graph.nodes) == 2
    alone = capture(model, *inputs)
    transformed(alone, passes=(*FIRST, layout), world_size=1)
    assert not any(n.target is torch.ge for n in alone.graph.nodes)


def test_padding_between_attentions():
    """At either end, with what is given, of tokens and of others; upstream it stays."""

    def model(x):
        y = attend(F.pad(x, (0, 0, 0, 1)))
        y = attend(F.pad(F.pad(y[..., :7], (0, 1)), (0, 0, 2, 0), value=0.5))
        y = F.pad(y[:, None], (0, 0, 0, 0, 1, 1), "constant", 2.0).sum(1)
        return attend(F.pad(y, pad=(0, 0, 0, 3))[:, :11])

    for n in (2, 3):
        assert_exact(model, torch.randn(1, 7, 8), n=n)
    gm = capture(lambda x: attend(F.pad(attend(x), (0, 0, 1, 1), "reflect")), torch.randn(1, 7, 8))
    with pytest.raises(CannotShard, match="mixes tokens") as refusal:
        transformed(gm, passes=(*FIRST, *PASSES))
    assert refusal.value.op.endswith("pad")


REFUSED = [
    ("multi_head_attention_forward", lambda x: x + heads(x, x, x)[1].sum(-1, keepdim=True)),
    ("_transformer_encoder_layer_fwd", lambda x: layer(x, src_key_padding_mask=x[..., 0] > 9)),
    ("_flash_attn_forward", lambda x: flash(x, window=3)),
    ("_flash_attn_forward", lambda x: flash(x, softcap=1.0)),
    ("_flash_attn_forward", lambda x: x + flash(x, output=1).sum()),
    # Its last query sees the last key; PyTorch's first query sees the first one.
    ("_flash_attn_forward", lambda x: flash(x, causal=True, keys=5)),
    (
        "memory_efficient_attention",
        lambda x: memory_efficient_attention(*[x[:, :, None]] * 3, x @ x.mT)[:, :, 0],
    ),
]


@pytest.mark.parametrize(("op", "function"), REFUSED)
def test_refused_by_name(op, function):
    gm = capture(lambda x: attend(function(attend(x))), torch.randn(1, 7, 8))
    with pytest.raises(CannotShard, match=r"test_lower.py") as refusal:
        transformed(gm, passes=(*FIRST, *PASSES))
    assert refusal.value.op.endswith(op)


def test_flex_attention_with_a_mask_or_a_score_is_refused():
    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, 7, 7, device="cpu")
    for options in ({"block_mask": causal}, {"score_mod": lambda s, b, h, q, k: s + q - k}):

        def model(x, options=options):
            q = attend(x)[:, None]
            return attend(flex_attention(q, q, q, **options)[:, 0])

        with pytest.raises(CannotShard, match=r"(?s)no rule.*flex_attention"):
            transformed(capture(model, torch.randn(1, 7, 8)), passes=(*FIRST, *PASSES))
