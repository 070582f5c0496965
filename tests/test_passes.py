"""A small model through the passes, one after the other: what the documentation shows."""

# ruff: noqa: E501 (snapshots)

import contextlib
import copy
import functools
from unittest.mock import patch

import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, layouts, text, transformed
from torch import nn

from piflux.compile.program import PASSES
from piflux.passes.runner import run_passes
from piflux.passes.speed import fuse_gelu as gelu
from piflux.passes.speed import fuse_rotary as rotary
from piflux.passes.speed import sigmoid_gelu as by_sigmoid
from piflux.passes.speed.enclose import enclose
from piflux.passes.speed.fetch import fetch
from piflux.passes.speed.fuse_linears import fuse_linears
from piflux.passes.speed.hoist import hoist
from piflux.passes.speed.outline import outline


class Model(nn.Module):
    """Two blocks of attention over text and image together."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, text, image):
        x = torch.cat([text, image], 1)
        for linear in self.blocks:
            q = linear(x).reshape(1, 11, 2, 4).transpose(1, 2)
            attended = F.scaled_dot_product_attention(q, q, q)
            x = x + attended.transpose(1, 2).flatten(2)
        return x[:, 4:]


class Timed(nn.Module):
    """Attention over an image to which a vector made of the time is added."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)

    def forward(self, image, time):
        shift = self.embed(torch.sin(time[:, None] * torch.arange(8.0)))
        q = (image + shift[:, None])[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


class Block(nn.Module):
    """Attention beside an MLP, as FLUX's single blocks have them."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
        self.up, self.out = nn.Linear(4, 8), nn.Linear(12, 4)

    def forward(self, x):
        q, k, v = (to(x)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        a = F.scaled_dot_product_attention(q, k, v)[:, 0]
        m = F.gelu(self.up(x), approximate="tanh")
        return self.out(torch.cat([a, m], -1))


class Turned(nn.Module):
    """Attention with a norm of its heads and rotary embedding, as diffusers has it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(4, 1e-6)

    def forward(self, x, cos, sin):
        n = self.norm(x.unflatten(-1, (2, 4)))
        a, b = n.reshape(*n.shape[:-1], -1, 2).unbind(-1)
        t = torch.stack([-b, a], dim=-1).flatten(3)
        q = (
            (n.float() * cos[None, :, None] + t.float() * sin[None, :, None])
            .to(n.dtype)
            .transpose(1, 2)
        )
        v = x[:, None]
        return F.scaled_dot_product_attention(q, q, v)[:, 0]


@functools.cache
def captured_by_dynamo(model, *shapes):
    return capture(model(), *map(torch.ones, shapes))


def captured(model, *shapes):
    """A copy of its graph for inputs of these shapes."""
    return copy.deepcopy(captured_by_dynamo(model, *shapes))


def after(count):
    """The graph of 4 text and 7 image tokens after the first `count` passes for 2 ranks."""
    gm = captured(Model, (1, 4, 8), (1, 7, 8))
    return gm, transformed(gm, passes=PASSES[:count])


def then(last):
    """The graph after all of `PASSES`, and then `last`."""
    gm, ctx = after(len(PASSES))
    last(gm, ctx)
    return gm


def timed(*last):
    """The graph of the model with a time after all of `PASSES`, and then `last`."""
    gm = captured(Timed, (1, 7, 8), (1,))
    transformed(gm, passes=(*PASSES, *last))
    return gm


def block(*last):
    """The graph of the block after all of `PASSES`, and then `last`."""
    gm = captured(Block, (1, 6, 4))
    ctx = transformed(gm)
    # A GPU's products are wanted of this graph, too.
    with contextlib.ExitStack() as stack:
        for module in (gelu, by_sigmoid):
            stack.enter_context(patch.object(module, "DEVICE", "cpu"))
            stack.enter_context(patch.object(module, "DTYPES", (torch.float32,)))
        for run in last:
            run(gm, ctx)
    return gm


def turned(*last):
    """The graph of the model with rotary embedding after all of `PASSES`, and then `last`."""
    gm = captured(Turned, (1, 6, 8), (6, 4), (6, 4))
    ctx = transformed(gm)
    with patch.object(rotary, "DEVICE", "cpu"):
        for run in last:
            run(gm, ctx)
    return gm


class TestPasses(TestCase):
    def test_captured(self):
        self.assertExpectedInline(
            text(after(0)[0]),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
x: (1, 11, 8) = cat([text, image], 1)
linear: (1, 11, 8) = linear(x, 0.weight, 0.bias)
reshape: (1, 11, 2, 4) = linear.reshape(1, 11, 2, 4)
q: (1, 2, 11, 4) = reshape.transpose(1, 2)
attended: (1, 2, 11, 4) = scaled_dot_product_attention(q, q, q)
transpose_1: (1, 11, 2, 4) = attended.transpose(1, 2)
flatten: (1, 11, 8) = transpose_1.flatten(2)
x_1: (1, 11, 8) = add(x, flatten)
linear_1: (1, 11, 8) = linear(x_1, 1.weight, 1.bias)
reshape_1: (1, 11, 2, 4) = linear_1.reshape(1, 11, 2, 4)
q_1: (1, 2, 11, 4) = reshape_1.transpose(1, 2)
attended_1: (1, 2, 11, 4) = scaled_dot_product_attention(q_1, q_1, q_1)
transpose_3: (1, 11, 2, 4) = attended_1.transpose(1, 2)
flatten_1: (1, 11, 8) = transpose_3.flatten(2)
x_2: (1, 11, 8) = add(x_1, flatten_1)
getitem: (1, 7, 8) = getitem(x_2, (:, 4:))
return (getitem,)
""",
        )

    def test_layout(self):
        gm, ctx = after(1)
        self.assertExpectedInline(
            layouts(ctx, gm),
            """\
text whole {1: [4]}
image whole {1: [7]}
x part {1: [4, 7]}
linear part {1: [4, 7]}
reshape part {1: [4, 7]}
q part {2: [4, 7]}
attended part {2: [4, 7]}
transpose_1 part {1: [4, 7]}
flatten part {1: [4, 7]}
x_1 part {1: [4, 7]}
linear_1 part {1: [4, 7]}
reshape_1 part {1: [4, 7]}
q_1 part {2: [4, 7]}
attended_1 part {2: [4, 7]}
transpose_3 part {1: [4, 7]}
flatten_1 part {1: [4, 7]}
x_2 part {1: [4, 7]}
getitem part {1: [7]}
""",
        )

    def test_layout_edits_nothing(self):
        self.assertEqual(text(after(1)[0]), text(after(0)[0]))

    def test_rewrite_attention(self):
        self.assertExpectedInline(
            text(after(2)[0]),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
x: (1, 11, 8) = cat([text, image], 1)
linear: (1, 11, 8) = linear(x, 0.weight, 0.bias)
reshape: (1, 11, 2, 4) = linear.reshape(1, 11, 2, 4)
q: (1, 2, 11, 4) = reshape.transpose(1, 2)
attended: (1, 2, 11, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [4, 7], 0, 2)
transpose_1: (1, 11, 2, 4) = attended.transpose(1, 2)
flatten: (1, 11, 8) = transpose_1.flatten(2)
x_1: (1, 11, 8) = add(x, flatten)
linear_1: (1, 11, 8) = linear(x_1, 1.weight, 1.bias)
reshape_1: (1, 11, 2, 4) = linear_1.reshape(1, 11, 2, 4)
q_1: (1, 2, 11, 4) = reshape_1.transpose(1, 2)
attended_1: (1, 2, 11, 4) = piflux.cached_sdpa(q_1, q_1, q_1, None, None, False, [4, 7], 1, 2)
transpose_3: (1, 11, 2, 4) = attended_1.transpose(1, 2)
flatten_1: (1, 11, 8) = transpose_3.flatten(2)
x_2: (1, 11, 8) = add(x_1, flatten_1)
getitem: (1, 7, 8) = getitem(x_2, (:, 4:))
return (getitem,)
""",
        )

    def test_shard(self):
        self.assertExpectedInline(
            text(after(3)[0]),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
text_part: (1, 4, 8) = piflux.shard(text, 1, [4], 2)
image_part: (1, 7, 8) = piflux.shard(image, 1, [7], 2)
x: (1, 11, 8) = cat([text_part, image_part], 1)
linear: (1, 11, 8) = linear(x, 0.weight, 0.bias)
reshape: (1, 11, 2, 4) = linear.reshape((1, 6, 2, 4))
q: (1, 2, 11, 4) = reshape.transpose(1, 2)
attended: (1, 2, 11, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [4, 7], 0, 2)
transpose_1: (1, 11, 2, 4) = attended.transpose(1, 2)
flatten: (1, 11, 8) = transpose_1.flatten(2)
x_1: (1, 11, 8) = add(x, flatten)
linear_1: (1, 11, 8) = linear(x_1, 1.weight, 1.bias)
reshape_1: (1, 11, 2, 4) = linear_1.reshape((1, 6, 2, 4))
q_1: (1, 2, 11, 4) = reshape_1.transpose(1, 2)
attended_1: (1, 2, 11, 4) = piflux.cached_sdpa(q_1, q_1, q_1, None, None, False, [4, 7], 1, 2)
transpose_3: (1, 11, 2, 4) = attended_1.transpose(1, 2)
flatten_1: (1, 11, 8) = transpose_3.flatten(2)
x_2: (1, 11, 8) = add(x_1, flatten_1)
getitem: (1, 7, 8) = getitem(x_2, (:, 2:))
getitem_whole: (1, 7, 8) = piflux.unshard(getitem, 1, [7], 2)
return (getitem_whole,)
""",
        )

    def test_overlap(self):
        self.assertExpectedInline(
            text(after(4)[0]),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
text_part: (1, 4, 8) = piflux.shard(text, 1, [4], 2)
image_part: (1, 7, 8) = piflux.shard(image, 1, [7], 2)
x: (1, 11, 8) = cat([text_part, image_part], 1)
linear: (1, 11, 8) = linear(x, 0.weight, 0.bias)
reshape: (1, 11, 2, 4) = linear.reshape((1, 6, 2, 4))
q: (1, 2, 11, 4) = reshape.transpose(1, 2)
sent: (1) = piflux.send_kv(q, q, 0, 2)
attended: (1, 2, 11, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [4, 7], 0, 2, sent)
transpose_1: (1, 11, 2, 4) = attended.transpose(1, 2)
flatten: (1, 11, 8) = transpose_1.flatten(2)
x_1: (1, 11, 8) = add(x, flatten)
linear_1: (1, 11, 8) = linear(x_1, 1.weight, 1.bias)
reshape_1: (1, 11, 2, 4) = linear_1.reshape((1, 6, 2, 4))
q_1: (1, 2, 11, 4) = reshape_1.transpose(1, 2)
sent_1: (1) = piflux.send_kv(q_1, q_1, 1, 2)
attended_1: (1, 2, 11, 4) = piflux.cached_sdpa(q_1, q_1, q_1, None, None, False, [4, 7], 1, 2, sent_1)
transpose_3: (1, 11, 2, 4) = attended_1.transpose(1, 2)
flatten_1: (1, 11, 8) = transpose_3.flatten(2)
x_2: (1, 11, 8) = add(x_1, flatten_1)
getitem: (1, 7, 8) = getitem(x_2, (:, 2:))
getitem_whole: (1, 7, 8) = piflux.unshard(getitem, 1, [7], 2)
return (getitem_whole,)
""",
        )

    def test_propagate(self):
        self.assertExpectedInline(
            text(after(5)[0]),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
text_part: (1, 2, 8) = piflux.shard(text, 1, [4], 2)
image_part: (1, 4, 8) = piflux.shard(image, 1, [7], 2)
x: (1, 6, 8) = cat([text_part, image_part], 1)
linear: (1, 6, 8) = linear(x, 0.weight, 0.bias)
reshape: (1, 6, 2, 4) = linear.reshape((1, 6, 2, 4))
q: (1, 2, 6, 4) = reshape.transpose(1, 2)
sent: (1) = piflux.send_kv(q, q, 0, 2)
attended: (1, 2, 6, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [4, 7], 0, 2, sent)
transpose_1: (1, 6, 2, 4) = attended.transpose(1, 2)
flatten: (1, 6, 8) = transpose_1.flatten(2)
x_1: (1, 6, 8) = add(x, flatten)
linear_1: (1, 6, 8) = linear(x_1, 1.weight, 1.bias)
reshape_1: (1, 6, 2, 4) = linear_1.reshape((1, 6, 2, 4))
q_1: (1, 2, 6, 4) = reshape_1.transpose(1, 2)
sent_1: (1) = piflux.send_kv(q_1, q_1, 1, 2)
attended_1: (1, 2, 6, 4) = piflux.cached_sdpa(q_1, q_1, q_1, None, None, False, [4, 7], 1, 2, sent_1)
transpose_3: (1, 6, 2, 4) = attended_1.transpose(1, 2)
flatten_1: (1, 6, 8) = transpose_3.flatten(2)
x_2: (1, 6, 8) = add(x_1, flatten_1)
getitem: (1, 4, 8) = getitem(x_2, (:, 2:))
getitem_whole: (1, 7, 8) = piflux.unshard(getitem, 1, [7], 2)
return (getitem_whole,)
""",
        )

    def test_outline(self):
        self.assertExpectedInline(
            text(then(outline)),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
piece_0: (1, 6, 8) = piece_0(text, image)
x: (1, 6, 8) = getitem(piece_0, 0)
slots_from: None = piflux.runtime.ops.slots_from(0)
piece_1: (1, 6, 8) = piece_1(x, 0.weight, 0.bias)
x_1: (1, 6, 8) = getitem(piece_1, 0)
slots_from_1: None = piflux.runtime.ops.slots_from(1)
piece_2: (1, 6, 8) = piece_1(x_1, 1.weight, 1.bias)
x_2: (1, 6, 8) = getitem(piece_2, 0)
piece_3: (1, 7, 8) = piece_2(x_2)
getitem_whole: (1, 7, 8) = getitem(piece_3, 0)
return (getitem_whole,)
""",
        )

    def test_outlined_block(self):
        self.assertExpectedInline(
            text(then(outline).piece_1),
            """\
x: (1, 6, 8)
linear: (1, 6, 8) = linear(x, 0.weight, 0.bias)
reshape: (1, 6, 2, 4) = linear.reshape((1, 6, 2, 4))
q: (1, 2, 6, 4) = reshape.transpose(1, 2)
sent: (1) = piflux.send_kv(q, q, 0, 2)
attended: (1, 2, 6, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [4, 7], 0, 2, sent)
transpose_1: (1, 6, 2, 4) = attended.transpose(1, 2)
flatten: (1, 6, 8) = transpose_1.flatten(2)
x_1: (1, 6, 8) = add(x, flatten)
return (x_1,)
""",
        )

    def test_fetch(self):
        gm, ctx = after(len(PASSES))
        run_passes(gm, ctx, (outline, fetch))
        self.assertExpectedInline(
            text(gm),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
piece_0: (1, 6, 8) = piece_0(text, image)
x: (1, 6, 8) = getitem(piece_0, 0)
slots_from: None = piflux.runtime.ops.slots_from(0)
fetch: None = piflux.runtime.ops.fetch(None, 0)
piece_1: (1, 6, 8) = piece_1(x, 0.weight, 0.bias)
x_1: (1, 6, 8) = getitem(piece_1, 0)
slots_from_1: None = piflux.runtime.ops.slots_from(1)
fetch_1: None = piflux.runtime.ops.fetch(0, None)
piece_2: (1, 6, 8) = piece_1(x_1, 1.weight, 1.bias)
x_2: (1, 6, 8) = getitem(piece_2, 0)
piece_3: (1, 7, 8) = piece_2(x_2)
getitem_whole: (1, 7, 8) = getitem(piece_3, 0)
return (getitem_whole,)
""",
        )

    def test_enclose(self):
        self.assertExpectedInline(
            text(then(enclose)),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
head: (1, 4, 8) = head(text, image, 0.weight, 0.bias, 1.weight, 1.bias)
getitem_1: (1, 4, 8) = getitem(head, 0)
getitem_whole: (1, 7, 8) = piflux.unshard(getitem_1, 1, [7], 2)
return (getitem_whole,)
""",
        )

    def test_enclosed_head(self):
        self.assertExpectedInline(
            text(then(enclose).head),
            """\
text: (1, 4, 8)
image: (1, 7, 8)
text_part: (1, 2, 8) = piflux.shard(text, 1, [4], 2)
image_part: (1, 4, 8) = piflux.shard(image, 1, [7], 2)
x: (1, 6, 8) = cat([text_part, image_part], 1)
linear: (1, 6, 8) = linear(x, 0.weight, 0.bias)
reshape: (1, 6, 2, 4) = linear.reshape((1, 6, 2, 4))
q: (1, 2, 6, 4) = reshape.transpose(1, 2)
sent: (1) = piflux.send_kv(q, q, 0, 2)
attended: (1, 2, 6, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [4, 7], 0, 2, sent)
transpose_1: (1, 6, 2, 4) = attended.transpose(1, 2)
flatten: (1, 6, 8) = transpose_1.flatten(2)
x_1: (1, 6, 8) = add(x, flatten)
linear_1: (1, 6, 8) = linear(x_1, 1.weight, 1.bias)
reshape_1: (1, 6, 2, 4) = linear_1.reshape((1, 6, 2, 4))
q_1: (1, 2, 6, 4) = reshape_1.transpose(1, 2)
sent_1: (1) = piflux.send_kv(q_1, q_1, 1, 2)
attended_1: (1, 2, 6, 4) = piflux.cached_sdpa(q_1, q_1, q_1, None, None, False, [4, 7], 1, 2, sent_1)
transpose_3: (1, 6, 2, 4) = attended_1.transpose(1, 2)
flatten_1: (1, 6, 8) = transpose_3.flatten(2)
x_2: (1, 6, 8) = add(x_1, flatten_1)
getitem: (1, 4, 8) = getitem(x_2, (:, 2:))
return (getitem,)
""",
        )

    def test_timed(self):
        self.assertExpectedInline(
            text(timed()),
            """\
time: (1)
image: (1, 7, 8)
image_part: (1, 4, 8) = piflux.shard(image, 1, [7], 2)
getitem: (1, 1) = getitem(time, (:, None))
arange: (8) = arange(8.0)
mul: (1, 8) = mul(getitem, arange)
sin: (1, 8) = sin(mul)
shift: (1, 8) = linear(sin, embed.weight, embed.bias)
getitem_1: (1, 1, 8) = getitem(shift, (:, None))
add: (1, 4, 8) = add(image_part, getitem_1)
q: (1, 1, 4, 8) = getitem(add, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, 4, 8) = piflux.cached_sdpa(q, q, q, None, None, False, [7], 0, 2, sent)
getitem_3: (1, 4, 8) = getitem(scaled_dot_product_attention, (:, 0))
getitem_3_whole: (1, 7, 8) = piflux.unshard(getitem_3, 1, [7], 2)
return (getitem_3_whole,)
""",
        )

    def test_hoist(self):
        self.assertExpectedInline(
            text(timed(hoist)),
            """\
time: (1)
image: (1, 7, 8)
hoisted: (1, 8) = hoisted(time, embed.weight, embed.bias)
shift_1: (1, 8) = getitem(hoisted, 0)
image_part: (1, 4, 8) = piflux.shard(image, 1, [7], 2)
getitem_1: (1, 1, 8) = getitem(shift_1, (:, None))
add: (1, 4, 8) = add(image_part, getitem_1)
q: (1, 1, 4, 8) = getitem(add, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, 4, 8) = piflux.cached_sdpa(q, q, q, None, None, False, [7], 0, 2, sent)
getitem_3: (1, 4, 8) = getitem(scaled_dot_product_attention, (:, 0))
getitem_3_whole: (1, 7, 8) = piflux.unshard(getitem_3, 1, [7], 2)
return (getitem_3_whole,)
""",
        )

    def test_hoisted(self):
        self.assertExpectedInline(
            text(timed(hoist).hoisted),
            """\
time: (1)
leading: (1, 8) = leading(time)
sin_1: (1, 8) = getitem(leading, 0)
shift: (1, 8) = linear(sin_1, embed.weight, embed.bias)
return (shift,)
""",
        )

    def test_leading(self):
        self.assertExpectedInline(
            text(timed(hoist).hoisted.leading.module),
            """\
time: (1)
getitem: (1, 1) = getitem(time, (:, None))
arange: (8) = arange(8.0)
mul: (1, 8) = mul(getitem, arange)
sin: (1, 8) = sin(mul)
return (sin,)
""",
        )

    def test_block(self):
        self.assertExpectedInline(
            text(block()),
            """\
x: (1, 6, 4)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
linear_1: (1, 3, 4) = linear(x_part, to_k.weight, to_k.bias)
k: (1, 1, 3, 4) = getitem(linear_1, (:, None))
linear_2: (1, 3, 4) = linear(x_part, to_v.weight, to_v.bias)
v: (1, 1, 3, 4) = getitem(linear_2, (:, None))
sent: (1) = piflux.send_kv(k, v, 0, 2)
linear: (1, 3, 4) = linear(x_part, to_q.weight, to_q.bias)
q: (1, 1, 3, 4) = getitem(linear, (:, None))
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, k, v, None, None, False, [6], 0, 2, sent)
a: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
linear_3: (1, 3, 8) = linear(x_part, up.weight, up.bias)
m: (1, 3, 8) = gelu(linear_3, approximate='tanh')
cat: (1, 3, 12) = cat([a, m], -1)
linear_4: (1, 3, 4) = linear(cat, out.weight, out.bias)
linear_4_whole: (1, 6, 4) = piflux.unshard(linear_4, 1, [6], 2)
return (linear_4_whole,)
""",
        )

    def test_fuse_linears(self):
        self.assertExpectedInline(
            text(block(fuse_linears)),
            """\
x: (1, 6, 4)
weights: (8, 4) (8) = weights(to_k.weight, to_v.weight, to_k.bias, to_v.bias)
adjoining_2: (8, 4) = getitem(weights, 0)
adjoining_3: (8) = getitem(weights, 1)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
linear_5: (1, 3, 8) = linear(x_part, adjoining_2, adjoining_3)
linear_1: (1, 3, 4) = narrow(linear_5, -1, 0, 4)
k: (1, 1, 3, 4) = getitem(linear_1, (:, None))
linear_2: (1, 3, 4) = narrow(linear_5, -1, 4, 4)
v: (1, 1, 3, 4) = getitem(linear_2, (:, None))
sent: (1) = piflux.send_kv(k, v, 0, 2)
linear: (1, 3, 4) = linear(x_part, to_q.weight, to_q.bias)
q: (1, 1, 3, 4) = getitem(linear, (:, None))
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, k, v, None, None, False, [6], 0, 2, sent)
a: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
linear_3: (1, 3, 8) = linear(x_part, up.weight, up.bias)
m: (1, 3, 8) = gelu(linear_3, approximate='tanh')
cat: (1, 3, 12) = cat([a, m], -1)
linear_4: (1, 3, 4) = linear(cat, out.weight, out.bias)
linear_4_whole: (1, 6, 4) = piflux.unshard(linear_4, 1, [6], 2)
return (linear_4_whole,)
""",
        )

    def test_fuse_gelu(self):
        self.assertExpectedInline(
            text(block(gelu.fuse_gelu)),
            """\
x: (1, 6, 4)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
linear_1: (1, 3, 4) = linear(x_part, to_k.weight, to_k.bias)
k: (1, 1, 3, 4) = getitem(linear_1, (:, None))
linear_2: (1, 3, 4) = linear(x_part, to_v.weight, to_v.bias)
v: (1, 1, 3, 4) = getitem(linear_2, (:, None))
sent: (1) = piflux.send_kv(k, v, 0, 2)
linear: (1, 3, 4) = linear(x_part, to_q.weight, to_q.bias)
q: (1, 1, 3, 4) = getitem(linear, (:, None))
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, k, v, None, None, False, [6], 0, 2, sent)
a: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
m: (1, 3, 8) = piflux.linear_gelu(x_part, up.weight, up.bias)
linear_4: (1, 3, 4) = piflux.linear_of_cat([a, m], out.weight, out.bias)
linear_4_whole: (1, 6, 4) = piflux.unshard(linear_4, 1, [6], 2)
return (linear_4_whole,)
""",
        )

    def test_sigmoid_gelu(self):
        gm = block(by_sigmoid.sigmoid_gelu)
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 4)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
linear_1: (1, 3, 4) = linear(x_part, to_k.weight, to_k.bias)
k: (1, 1, 3, 4) = getitem(linear_1, (:, None))
linear_2: (1, 3, 4) = linear(x_part, to_v.weight, to_v.bias)
v: (1, 1, 3, 4) = getitem(linear_2, (:, None))
sent: (1) = piflux.send_kv(k, v, 0, 2)
linear: (1, 3, 4) = linear(x_part, to_q.weight, to_q.bias)
q: (1, 1, 3, 4) = getitem(linear, (:, None))
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, k, v, None, None, False, [6], 0, 2, sent)
a: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
linear_3: (1, 3, 8) = linear(x_part, up.weight, up.bias)
to: (1, 3, 8) = linear_3.to(torch.float32)
mul: (1, 3, 8) = mul(to, to)
mul_1: (1, 3, 8) = mul(mul, 0.07135481627260025)
add: (1, 3, 8) = add(mul_1, 1.5957691216057308)
mul_2: (1, 3, 8) = mul(add, to)
sigmoid: (1, 3, 8) = sigmoid(mul_2)
mul_3: (1, 3, 8) = mul(sigmoid, to)
m: (1, 3, 8) = mul_3.to(torch.float32)
cat: (1, 3, 12) = cat([a, m], -1)
linear_4: (1, 3, 4) = linear(cat, out.weight, out.bias)
linear_4_whole: (1, 6, 4) = piflux.unshard(linear_4, 1, [6], 2)
return (linear_4_whole,)
""",
        )

    def test_turned(self):
        self.assertExpectedInline(
            text(turned()),
            """\
x: (1, 6, 8)
cos: (6, 4)
sin: (6, 4)
x_part: (1, 3, 8) = piflux.shard(x, 1, [6], 2)
cos_part: (3, 4) = piflux.shard(cos, 0, [6], 2)
sin_part: (3, 4) = piflux.shard(sin, 0, [6], 2)
unflatten: (1, 3, 2, 4) = x_part.unflatten(-1, (2, 4))
n: (1, 3, 2, 4) = rms_norm(unflatten, (4,), norm.weight, 1e-06)
reshape: (1, 3, 2, 2, 2) = n.reshape((1, 3, 2, -1, 2))
unbind: (1, 3, 2, 2) (1, 3, 2, 2) = reshape.unbind(-1)
a: (1, 3, 2, 2) = getitem(unbind, 0)
b: (1, 3, 2, 2) = getitem(unbind, 1)
neg: (1, 3, 2, 2) = neg(b)
stack: (1, 3, 2, 2, 2) = stack([neg, a], dim=-1)
t: (1, 3, 2, 4) = stack.flatten(3)
float_1: (1, 3, 2, 4) = n.float()
getitem_2: (1, 3, 1, 4) = getitem(cos_part, (None, :, None))
mul: (1, 3, 2, 4) = mul(float_1, getitem_2)
float_2: (1, 3, 2, 4) = t.float()
getitem_3: (1, 3, 1, 4) = getitem(sin_part, (None, :, None))
mul_1: (1, 3, 2, 4) = mul(float_2, getitem_3)
add: (1, 3, 2, 4) = add(mul, mul_1)
to: (1, 3, 2, 4) = add.to(torch.float32)
q: (1, 2, 3, 4) = to.transpose(1, 2)
v: (1, 1, 3, 8) = getitem(x_part, (:, None))
sent: (1) = piflux.send_kv(q, v, 0, 2)
scaled_dot_product_attention: (1, 2, 3, 8) = piflux.cached_sdpa(q, q, v, None, None, False, [6], 0, 2, sent)
getitem_5: (1, 3, 8) = getitem(scaled_dot_product_attention, (:, 0))
getitem_5_whole: (1, 6, 8) = piflux.unshard(getitem_5, 1, [6], 2)
return (getitem_5_whole,)
""",
        )

    def test_fuse_rotary(self):
        self.assertExpectedInline(
            text(turned(rotary.fuse_rotary)),
            """\
x: (1, 6, 8)
cos: (6, 4)
sin: (6, 4)
x_part: (1, 3, 8) = piflux.shard(x, 1, [6], 2)
cos_part: (3, 4) = piflux.shard(cos, 0, [6], 2)
sin_part: (3, 4) = piflux.shard(sin, 0, [6], 2)
unflatten: (1, 3, 2, 4) = x_part.unflatten(-1, (2, 4))
getitem_2: (1, 3, 1, 4) = getitem(cos_part, (None, :, None))
getitem_3: (1, 3, 1, 4) = getitem(sin_part, (None, :, None))
to: (1, 3, 2, 4) = piflux.norm_rotary([unflatten], [norm.weight], 1e-06, getitem_2, getitem_3, 1)
q: (1, 2, 3, 4) = to.transpose(1, 2)
v: (1, 1, 3, 8) = getitem(x_part, (:, None))
sent: (1) = piflux.send_kv(q, v, 0, 2)
scaled_dot_product_attention: (1, 2, 3, 8) = piflux.cached_sdpa(q, q, v, None, None, False, [6], 0, 2, sent)
getitem_5: (1, 3, 8) = getitem(scaled_dot_product_attention, (:, 0))
getitem_5_whole: (1, 6, 8) = piflux.unshard(getitem_5, 1, [6], 2)
return (getitem_5_whole,)
""",
        )
