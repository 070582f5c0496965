"""Keys and values of grouped heads, which attention repeats itself."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, text, transformed
from test_rules import assert_exact, attend

import piflux
from piflux.compile.program import FIRST, PASSES
from piflux.graph.plan import Context
from piflux.passes.split.ungroup import ungroup

X = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(1))


def by_interleaving(x, times):
    return x.repeat_interleave(times, dim=2)


def by_copies(x, times):
    return x.unsqueeze(3).repeat(1, 1, 1, times, 1).flatten(2, 3)


def by_expansion(x, times):
    b, s, heads, size = x.shape
    return x.unsqueeze(-2).expand(b, s, heads, times, size).reshape(b, s, heads * times, size)


def grouped(repeat=by_interleaving, values=None, move=lambda x: x.transpose(1, 2), mask=None):
    """A model whose four heads of queries have two of keys and values."""

    def model(x):
        query = x.unflatten(-1, (4, 2))
        key, value = (
            repeat(y.unflatten(-1, (2, 2)), 2)
            for repeat, y in ((repeat, x[..., :4]), (values or repeat, x[..., 4:].cos()))
        )
        q, k, v = map(move, (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    return model


class TestUngroup(TestCase):
    def test_grouped_heads(self):
        self.assertExpectedInline(
            text(capture(grouped(values=by_copies), X)),
            """\
x: (1, 7, 8)
query: (1, 7, 4, 2) = x.unflatten(-1, (4, 2))
y: (1, 7, 4) = getitem(x, (Ellipsis, :4))
getitem_1: (1, 7, 4) = getitem(x, (Ellipsis, 4:))
y_1: (1, 7, 4) = getitem_1.cos()
unflatten_1: (1, 7, 2, 2) = y.unflatten(-1, (2, 2))
key: (1, 7, 4, 2) = unflatten_1.repeat_interleave(2, dim=2)
unflatten_2: (1, 7, 2, 2) = y_1.unflatten(-1, (2, 2))
unsqueeze: (1, 7, 2, 1, 2) = unflatten_2.unsqueeze(3)
repeat: (1, 7, 2, 2, 2) = unsqueeze.repeat(1, 1, 1, 2, 1)
value: (1, 7, 4, 2) = repeat.flatten(2, 3)
q: (1, 4, 7, 2) = query.transpose(1, 2)
k: (1, 4, 7, 2) = key.transpose(1, 2)
v: (1, 4, 7, 2) = value.transpose(1, 2)
out: (1, 4, 7, 2) = scaled_dot_product_attention(q, k, v, attn_mask=None)
transpose_3: (1, 7, 4, 2) = out.transpose(1, 2)
flatten_1: (1, 7, 8) = transpose_3.flatten(2)
return (flatten_1,)
""",
        )

    def test_ungroup(self):
        gm = capture(grouped(values=by_copies), X)
        transformed(gm, passes=(ungroup,))
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 7, 8)
query: (1, 7, 4, 2) = x.unflatten(-1, (4, 2))
y: (1, 7, 4) = getitem(x, (Ellipsis, :4))
getitem_1: (1, 7, 4) = getitem(x, (Ellipsis, 4:))
y_1: (1, 7, 4) = getitem_1.cos()
unflatten_1: (1, 7, 2, 2) = y.unflatten(-1, (2, 2))
unflatten_2: (1, 7, 2, 2) = y_1.unflatten(-1, (2, 2))
q: (1, 4, 7, 2) = query.transpose(1, 2)
k_1: (1, 2, 7, 2) = unflatten_1.transpose(1, 2)
v_1: (1, 2, 7, 2) = unflatten_2.transpose(1, 2)
out: (1, 4, 7, 2) = scaled_dot_product_attention(q, k_1, v_1, attn_mask=None, enable_gqa=True)
transpose_3: (1, 7, 4, 2) = out.transpose(1, 2)
flatten_1: (1, 7, 8) = transpose_3.flatten(2)
return (flatten_1,)
""",
        )


FORMS = [
    {},
    {"repeat": by_copies},
    {"repeat": by_expansion, "values": by_copies},
    {"move": lambda x: x.permute(0, 2, 1, 3).contiguous()},
    {"mask": MASK},
]


def ungroup_in(gm, n=2):
    return ungroup(gm, Context(n))


@pytest.mark.parametrize("options", FORMS)
def test_forms_of_repetition(options):
    model = grouped(**options)
    assert ungroup_in(capture(model, X)) == 1
    assert ungroup_in(capture(model, X, dynamic=True)) == 1
    assert_exact(model, X, n=3)


def test_what_is_remembered_is_not_repeated():
    group = piflux.virtual_ranks(2)

    class Model(torch.nn.Module):
        def forward(self, x):
            return grouped()(x)

    parallel = piflux.parallelize(Model(), group=group, policy="rotate", inner="eager")
    with torch.no_grad(), piflux.generation(parallel):
        parallel(X)
        (stream,) = parallel._piflux_compiler.runtime.streams
        assert {slot.first[0].shape for slot in stream.memory.slots.values()} == {(1, 2, 7, 2)}
        counted = piflux.explain(parallel).graphs[0].cache_bytes
    assert counted == 2 * 2 * 7 * 2 * 2 * 4  # versions of keys and values: tokens, heads, numbers


@pytest.mark.parametrize(
    "model",
    [
        attend,
        grouped(lambda x, n: x.repeat(1, 1, n, 1)),  # heads by turns are no groups
        grouped(lambda x, n: x.repeat_interleave(n, dim=2).cos()),
        grouped(lambda x, n: x.repeat_interleave(n, dim=2) * 2, by_copies),
        grouped(lambda x, n: x.unsqueeze(2).repeat(1, 1, n, 1, 1).flatten(2, 3)),
        grouped(values=lambda x, n: x[:, :, :1].repeat_interleave(2 * n, dim=2)),  # other groups
    ],
)
def test_other_keys_and_values_stay(model):
    assert ungroup_in(capture(model, X)) == 0


def test_on_one_rank_nothing_is_gathered():
    assert ungroup_in(capture(grouped(), X), 1) == 0


def test_attention_to_own_tokens_repeats_under_a_mask():
    """Of each of several frames by itself: it stays PyTorch's, whose kernels know one of both."""
    mask = torch.zeros(1, 1, 3, 3)

    def model(x):  # 7 frames of 3 tokens
        frames = attend(x)[0][:, None].expand(7, 3, 8) * torch.arange(3)[:, None]
        return attend(grouped(mask=mask)(frames)[:, 0][None])

    gm = capture(model, X)
    transformed(gm, passes=(*FIRST, *PASSES))
    (own,) = [n for n in gm.graph.nodes if n.target is F.scaled_dot_product_attention]
    assert own.kwargs["enable_gqa"] is False
    assert_exact(model, X, n=3)
