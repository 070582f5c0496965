"""The pass that inserts boundaries and makes sizes local, and the example values it leaves."""

# ruff: noqa: E501 (snapshots)

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, text, transformed

from piflux.errors import CannotShard
from piflux.passes.split.layout import layout
from piflux.passes.split.propagate import propagate
from piflux.passes.split.shard import shard


def attend(x):
    q = x[:, None]
    return F.scaled_dot_product_attention(q, q, q)[:, 0]


class TestShard(TestCase):
    def test_literal_sizes(self):
        """reshape, expand, split and slices name sizes; all become the part's."""

        def model(prompt, image):
            both = torch.cat([prompt, image], 1).reshape(1, 11, 2, 4).flatten(2)
            out = attend(both * torch.ones(1, 1, 1).expand(1, 11, 1))
            first, rest = out.split([4, 7], 1)
            return first + out[:, :4], rest + out[:, 4:] + out.narrow(1, 4, 7)

        gm = capture(model, torch.randn(1, 4, 8), torch.randn(1, 7, 8))
        transformed(gm)
        self.assertExpectedInline(
            text(gm),
            """\
prompt: (1, 4, 8)
image: (1, 7, 8)
prompt_part: (1, 2, 8) = piflux.shard(prompt, 1, [4], 2)
image_part: (1, 4, 8) = piflux.shard(image, 1, [7], 2)
cat: (1, 6, 8) = cat([prompt_part, image_part], 1)
reshape: (1, 6, 2, 4) = cat.reshape((1, 6, 2, 4))
both: (1, 6, 8) = reshape.flatten(2)
ones: (1, 1, 1) = ones(1, 1, 1)
expand: (1, 11, 1) = ones.expand(1, 11, 1)
expand_part: (1, 6, 1) = piflux.shard(expand, 1, [4, 7], 2)
mul: (1, 6, 8) = mul(both, expand_part)
q: (1, 1, 6, 8) = getitem(mul, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, 6, 8) = piflux.cached_sdpa(q, q, q, None, None, False, [4, 7], 0, 2, sent)
out: (1, 6, 8) = getitem(scaled_dot_product_attention, (:, 0))
split: (1, 2, 8) (1, 4, 8) = out.split([2, 4], 1)
first: (1, 2, 8) = getitem(split, 0)
rest: (1, 4, 8) = getitem(split, 1)
getitem_4: (1, 2, 8) = getitem(out, (:, :2))
add: (1, 2, 8) = add(first, getitem_4)
add_whole: (1, 4, 8) = piflux.unshard(add, 1, [4], 2)
getitem_5: (1, 4, 8) = getitem(out, (:, 2:))
add_1: (1, 4, 8) = add(rest, getitem_5)
narrow: (1, 4, 8) = out.narrow(1, 2, 4)
add_2: (1, 4, 8) = add(add_1, narrow)
add_2_whole: (1, 7, 8) = piflux.unshard(add_2, 1, [7], 2)
return (add_whole, add_2_whole)
""",
        )

    def test_symbolic_sizes(self):
        def model(prompt, image):
            both = torch.cat([prompt, image], 1)
            both = both.reshape(1, both.shape[1], 2, 4).flatten(2)
            return attend(both)[:, prompt.shape[1] :] / image.shape[1]

        gm = capture(model, torch.randn(1, 4, 8), torch.randn(1, 7, 8), dynamic=True)
        transformed(gm)
        self.assertExpectedInline(
            text(gm),
            """\
s10: s10
s80: s80
prompt: (1, s10, s80)
s62: s62
image: (1, s62, s80)
s10_raised: s10 + 1 = add(s10, 1)
s10_part: ((s10 + 1)//2) = floordiv(s10_raised, 2)
s62_raised: s62 + 1 = add(s62, 1)
s62_part: ((s62 + 1)//2) = floordiv(s62_raised, 2)
tokens_part: (((s10 + 1)//2)) + (((s62 + 1)//2)) = add(s10_part, s62_part)
prompt_part: (1, ((s10 + 1)//2), s80) = piflux.shard(prompt, 1, [s10], 2)
image_part: (1, ((s62 + 1)//2), s80) = piflux.shard(image, 1, [s62], 2)
both: (1, (((s10 + 1)//2)) + (((s62 + 1)//2)), s80) = cat([prompt_part, image_part], 1)
reshape: (1, (((s10 + 1)//2)) + (((s62 + 1)//2)), 2, (s80//2)) = both.reshape((1, tokens_part, 2, 4))
both_1: (1, (((s10 + 1)//2)) + (((s62 + 1)//2)), 2*((s80//2))) = reshape.flatten(2)
q: (1, 1, (((s10 + 1)//2)) + (((s62 + 1)//2)), 2*((s80//2))) = getitem(both_1, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
sym_sum: s10 + s62 = sym_sum([s10, s62])
scaled_dot_product_attention: (1, 1, (((s10 + 1)//2)) + (((s62 + 1)//2)), 2*((s80//2))) = piflux.cached_sdpa(q, q, q, None, None, False, [s10, s62], 0, 2, sent)
getitem_4: (1, (((s10 + 1)//2)) + (((s62 + 1)//2)), 2*((s80//2))) = getitem(scaled_dot_product_attention, (:, 0))
getitem_8: (1, ((s62 + 1)//2), 2*((s80//2))) = getitem(getitem_4, (:, s10_part:))
truediv: (1, ((s62 + 1)//2), 2*((s80//2))) = truediv(getitem_8, s62)
truediv_whole: (1, s62, 2*((s80//2))) = piflux.unshard(truediv, 1, [s62], 2)
return (truediv_whole,)
""",
        )

    def test_patchify_and_unpatchify_inside(self):
        """Tokens born in the graph are cut there; the image is put together before it is one."""

        def model(latent, weight):
            x = F.conv2d(latent, weight, stride=2).flatten(2).transpose(1, 2)
            y = attend(x)
            return y.reshape(1, 2, 3, 2, 2, 2).permute(0, 5, 1, 3, 2, 4).reshape(1, 2, 4, 6)

        gm = capture(model, torch.randn(1, 2, 4, 6), torch.randn(8, 2, 2, 2))
        transformed(gm)
        self.assertExpectedInline(
            text(gm),
            """\
latent: (1, 2, 4, 6)
weight: (8, 2, 2, 2)
conv2d: (1, 8, 2, 3) = conv2d(latent, weight, stride=2)
flatten: (1, 8, 6) = conv2d.flatten(2)
flatten_part: (1, 8, 3) = piflux.shard(flatten, 2, [6], 2)
x: (1, 3, 8) = flatten_part.transpose(1, 2)
q: (1, 1, 3, 8) = getitem(x, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, 3, 8) = piflux.cached_sdpa(q, q, q, None, None, False, [6], 0, 2, sent)
y: (1, 3, 8) = getitem(scaled_dot_product_attention, (:, 0))
y_whole: (1, 6, 8) = piflux.unshard(y, 1, [6], 2)
reshape: (1, 2, 3, 2, 2, 2) = y_whole.reshape(1, 2, 3, 2, 2, 2)
permute: (1, 2, 2, 2, 3, 2) = reshape.permute(0, 5, 1, 3, 2, 4)
reshape_1: (1, 2, 4, 6) = permute.reshape(1, 2, 4, 6)
return (reshape_1,)
""",
        )

    def test_a_mask_is_cut_along_its_queries_only(self):
        def model(x, valid):
            q = x[:, None]
            mask = (valid[:, :, None] & valid[:, None, :])[:, None]
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

        gm = capture(model, torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool))
        transformed(gm)
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 8)
valid: (1, 6)
x_part: (1, 3, 8) = piflux.shard(x, 1, [6], 2)
q: (1, 1, 3, 8) = getitem(x_part, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
getitem_1: (1, 6, 1) = getitem(valid, (:, :, None))
getitem_2: (1, 1, 6) = getitem(valid, (:, None, :))
and: (1, 6, 6) = and_(getitem_1, getitem_2)
mask: (1, 1, 6, 6) = getitem(and, (:, None))
mask_part: (1, 1, 3, 6) = piflux.shard(mask, 2, [6], 2)
scaled_dot_product_attention: (1, 1, 3, 8) = piflux.cached_sdpa(q, q, q, mask_part, None, False, [6], 0, 2, sent)
scaled_dot_product_attention_whole: (1, 1, 6, 8) = piflux.unshard(scaled_dot_product_attention, 2, [6], 2)
return (scaled_dot_product_attention_whole,)
""",
        )

    def test_what_carries_no_tokens_is_no_match(self):
        def model(x, prompt):
            scale = prompt.reshape(1, 5, 2, 4).flatten(2).mean(1, keepdim=True)
            return attend(x) * scale

        gm = capture(model, torch.randn(1, 6, 8), torch.randn(1, 5, 8))
        own = [n for n in gm.graph.nodes if n.name in ("reshape", "flatten", "scale")]
        before = [(n.target, n.args, n.kwargs) for n in own]
        transformed(gm)
        self.assertEqual(len(own), 3)
        self.assertEqual(before, [(n.target, n.args, n.kwargs) for n in own])


def test_propagate_refuses_what_does_not_fit():
    """Were a size left whole, the graph would not run; propagate says so at the op."""

    def model(x):
        return attend(x.reshape(1, 6, 2, 4).flatten(2))

    gm = capture(model, torch.randn(1, 6, 8))

    def forget(gm, ctx):
        reshape = next(n for n in gm.graph.nodes if n.target == "reshape")
        reshape.args = (reshape.args[0], 1, 6, 2, 4)
        return 1

    with pytest.raises(CannotShard, match=r"(?s)does not fit.*%reshape.*Tensor\.reshape"):
        transformed(gm, passes=(layout, shard, forget, propagate))


def test_propagate_leaves_replicated_values_alone():
    def model(x, prompt):
        return attend(x) * prompt.mean(1, keepdim=True)

    gm = capture(model, torch.randn(1, 6, 8), torch.randn(1, 5, 8))
    mean = next(n for n in gm.graph.nodes if n.target == "mean")
    before = mean.meta["example_value"]
    transformed(gm)
    assert mean.meta["example_value"] is before


def test_a_copy_that_would_become_a_view_is_not_written():
    """`contiguous` copies a transposed input, but a part of it is contiguous already."""

    def model(x):
        doubled = x.contiguous().mul_(2)
        return attend(doubled + x)

    with pytest.raises(CannotShard, match="only on a part"):
        transformed(capture(model, torch.randn(1, 8, 12).mT))
