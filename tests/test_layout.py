"""The layout pass: which dimensions carry tokens, what runs on a part, what is refused."""

# ruff: noqa: E501 (snapshots)

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from expecttest import TestCase
from graphs import capture, captured_flux, layouts, transformed
from test_rules import assert_exact

from piflux.errors import CannotShard, NoAttention
from piflux.graph.axes import Axis
from piflux.graph.nodes import plain_name
from piflux.graph.sizes import example_size
from piflux.graph.targets import SHARD
from piflux.graph.values import tensors
from piflux.passes.split.layout import layout

DECIDE = (layout,)


def attend(x):
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def joint(text, image):
    both = attend(torch.cat([text, image], 1))
    return both[:, text.shape[1] :]


def reminded(x, keys, values):
    keys, values = (torch.cat([past, x], 1)[:, None] for past in (keys, values))
    return F.scaled_dot_product_attention(x[:, None], keys, values)[:, 0]


def found(function, *args, dynamic=False):
    gm = capture(function, *args, dynamic=dynamic)
    return layouts(transformed(gm, passes=DECIDE), gm)


class TestFinds(TestCase):
    def test_up_and_down_from_attention(self):
        self.assertExpectedInline(
            found(attend, torch.randn(1, 6, 8)),
            """\
x whole {1: [6]}
getitem part {2: [6]}
getitem_1 part {2: [6]}
getitem_2 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_3 part {1: [6]}
add part {1: [6]}
""",
        )

    def test_segments_in_order(self):
        self.assertExpectedInline(
            found(joint, torch.randn(1, 4, 8), torch.randn(1, 6, 8)),
            """\
text whole {1: [4]}
image whole {1: [6]}
cat part {1: [4, 6]}
getitem part {2: [4, 6]}
getitem_1 part {2: [4, 6]}
getitem_2 part {2: [4, 6]}
scaled_dot_product_attention part {2: [4, 6]}
getitem_3 part {1: [4, 6]}
both part {1: [4, 6]}
getitem_4 part {1: [6]}
""",
        )

    def test_remembered_keys_and_values_are_the_same_tokens(self):
        """Born at two inputs, they meet nowhere but in attention."""
        self.assertExpectedInline(
            found(reminded, torch.randn(1, 6, 8), *torch.randn(2, 1, 4, 8)),
            """\
x whole {1: [6]}
keys whole {1: [4]}
values whole {1: [4]}
cat part {1: [4, 6]}
keys part {2: [4, 6]}
cat_1 part {1: [4, 6]}
values part {2: [4, 6]}
getitem_2 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_3 part {1: [6]}
""",
        )

    def test_segments_of_symbolic_length(self):
        self.assertExpectedInline(
            found(joint, torch.randn(1, 4, 8), torch.randn(1, 6, 8), dynamic=True),
            """\
text whole {1: [s12]}
image whole {1: [s62]}
cat part {1: [s12, s62]}
getitem part {2: [s12, s62]}
getitem_1 part {2: [s12, s62]}
getitem_2 part {2: [s12, s62]}
scaled_dot_product_attention part {2: [s12, s62]}
getitem_3 part {1: [s12, s62]}
both part {1: [s12, s62]}
getitem_7 part {1: [s62]}
""",
        )

    def test_a_joint_table_is_cut_where_its_users_are(self):
        """One input for text and image together turns out to be two segments."""

        def model(text, image, table):
            return attend(torch.cat([text, image], 1) * table)

        inputs = torch.randn(1, 4, 8), torch.randn(1, 6, 8), torch.randn(10, 8)
        self.assertExpectedInline(
            found(model, *inputs),
            """\
text whole {1: [4]}
image whole {1: [6]}
table whole {0: [4, 6]}
cat part {1: [4, 6]}
mul part {1: [4, 6]}
getitem part {2: [4, 6]}
getitem_1 part {2: [4, 6]}
getitem_2 part {2: [4, 6]}
scaled_dot_product_attention part {2: [4, 6]}
getitem_3 part {1: [4, 6]}
add part {1: [4, 6]}
""",
        )

    def test_ops_that_mix_stay_whole_before_and_after_attention(self):
        """The mean over the input and the sum over the output run on every token."""

        def model(x):
            y = attend(x.sin() - x.mean(1, keepdim=True))
            return y.cumsum(1)

        self.assertExpectedInline(
            found(model, torch.randn(1, 6, 8)),
            """\
x whole {1: [6]}
sin part {1: [6]}
sub part {1: [6]}
getitem part {2: [6]}
getitem_1 part {2: [6]}
getitem_2 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_3 part {1: [6]}
y part {1: [6]}
""",
        )

    def test_cross_attention_to_conditions_is_local(self):
        """Keys and values that are no query's tokens are whole on every rank."""

        def model(x, prompt):
            y = attend(x)
            return F.scaled_dot_product_attention(y[:, None], prompt[:, None], prompt[:, None])

        gm = capture(model, torch.randn(1, 6, 8), torch.randn(1, 5, 8))
        ctx = transformed(gm, passes=DECIDE)
        self.assertEqual(len(ctx.plan.attentions), 1)
        self.assertExpectedInline(
            layouts(ctx, gm),
            """\
x whole {1: [6]}
getitem part {2: [6]}
getitem_1 part {2: [6]}
getitem_2 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_3 part {1: [6]}
y part {1: [6]}
getitem_4 part {2: [6]}
scaled_dot_product_attention_1 part {2: [6]}
""",
        )

    def test_a_mask_keeps_its_keys_whole(self):
        def model(x, mask):
            q = x[:, None]
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

        self.assertExpectedInline(
            found(model, torch.randn(1, 6, 8), torch.ones(1, 1, 6, 6, dtype=torch.bool)),
            """\
x whole {1: [6]}
mask whole {2: [6]}
q part {2: [6]}
scaled_dot_product_attention part {2: [6]}
""",
        )


class TestRefuses(TestCase):
    def test_no_attention(self):
        with self.assertRaisesRegex(NoAttention, "no scaled_dot_product_attention"):
            transformed(capture(torch.sin, torch.randn(4)), passes=DECIDE)

    def refusal(self, function, *args):
        with pytest.raises(CannotShard) as error:
            transformed(capture(function, *args), passes=DECIDE)
        lines = str(error.value).splitlines()[:4]
        return "\n".join(re.sub(r"/.*/(\S+):\d+", r"\1", line) for line in lines)

    def test_a_mean_between_attentions(self):
        def model(x):
            y = attend(x)
            return attend(y - y.mean(1, keepdim=True))

        self.assertExpectedInline(
            self.refusal(model, torch.randn(1, 6, 8)),
            """\
mixes tokens between two attentions, where no rank holds all of them
  node: %mean
  op:   Tensor.mean
  line: test_layout.py, in model: return attend(y - y.mean(1, keepdim=True))""",
        )

    def test_a_dropout_that_drops(self):
        def model(x):
            return attend(F.dropout(attend(x), 0.1, training=True))

        refusal = self.refusal(model, torch.randn(1, 6, 8))
        assert "call .eval() on the model\n  node: %dropout" in refusal

    def test_an_op_without_a_rule(self):
        def model(x):
            return attend(attend(x).tril())

        self.assertExpectedInline(
            self.refusal(model, torch.randn(1, 6, 8)),
            """\
is an op that piflux has no rule for, so that nothing is known of where it takes tokens: write it in terms of others, or add a rule (CONTRIBUTING.md says how)
  node: %tril
  op:   Tensor.tril
  line: test_layout.py, in model: return attend(attend(x).tril())""",
        )

    def test_fewer_tokens_than_parts(self):
        self.assertExpectedInline(
            self.refusal(attend, torch.randn(1, 1, 8)),
            """\
has 1 token, fewer than 2 ranks have parts for: use fewer ranks or more tokens
  node: %scaled_dot_product_attention
  op:   torch._C._nn.scaled_dot_product_attention
  line: test_layout.py, in attend: return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]""",
        )

    def test_a_single_token_that_is_lost_sight_of(self):
        """Not that the op mixes tokens, as it would be of two: with those it runs."""

        def model(x):
            return attend(attend(x).unflatten(-1, (2, 4)).flatten(2))

        said = self.refusal(model, torch.randn(1, 1, 8))
        assert said.startswith("has a single token here, fewer than two ranks could share")
        assert "\n  node: %unflatten" in said
        transformed(capture(model, torch.randn(1, 2, 8)), passes=DECIDE)

    def test_an_empty_batch(self):
        self.assertExpectedInline(
            self.refusal(attend, torch.randn(0, 6, 8)),
            """\
is empty, of shape (0, 1, 6, 8): 2 ranks have nothing to share. Give the model inputs that hold something
  node: %scaled_dot_product_attention
  op:   torch._C._nn.scaled_dot_product_attention
  line: test_layout.py, in attend: return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]""",
        )

    def test_many_runs_of_few_tokens(self):
        """Cut by themselves, nearly all would be on all ranks."""

        def model(x):
            y = attend(x)
            return attend(torch.cat([y[:, i : i + 1] * i for i in range(8)], 1))

        self.assertExpectedInline(
            self.refusal(model, torch.randn(1, 8, 8)),
            """\
attends to 8 runs of tokens, too short ones to be cut into 2 parts: a part would have 8 tokens where 4 are its share
  node: %scaled_dot_product_attention
  op:   torch._C._nn.scaled_dot_product_attention
  line: test_layout.py, in attend: return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]""",
        )

    def test_tokens_that_meet_their_neighbours(self):
        def model(x):
            y = attend(x)
            y[:, 1:] += y[:, :-1].clone()
            return attend(y)

        self.assertExpectedInline(
            self.refusal(model, torch.randn(1, 9, 8)),
            """\
takes a run of 1 tokens out of 7 and has it meet the others: this mixes tokens
  node: %iadd
  op:   operator.iadd
  line: test_layout.py, in model: y[:, 1:] += y[:, :-1].clone()""",
        )

    def test_a_mask_made_between_attentions(self):
        def model(x):
            y = attend(x)
            q = y[:, None]
            mask = (y @ y.transpose(1, 2))[:, None]
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

        self.assertExpectedInline(
            self.refusal(model, torch.randn(1, 6, 8)),
            """\
needs dimension 3 of %mask whole
  node: %scaled_dot_product_attention_1
  op:   torch._C._nn.scaled_dot_product_attention
  line: test_layout.py, in model: return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)""",
        )

    def test_writing_into_an_input(self):
        def model(x):
            x.mul_(2)
            return attend(x)

        self.assertExpectedInline(
            self.refusal(model, torch.randn(1, 6, 8)),
            """\
writes in place into a value that is cut: write out of place
  node: %mul_
  op:   Tensor.mul_
  line: test_layout.py, in model: x.mul_(2)""",
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_flux_boundaries_are_those_its_authors_wrote_down(dynamic):
    """diffusers' context parallel plan for FLUX is found by dataflow alone."""
    plan = FluxTransformer2DModel._cp_plan
    gm = captured_flux(dynamic=dynamic)
    decided = transformed(gm, passes=DECIDE).plan
    cuts = {
        value.node.name.removeprefix("l_kwargs_").strip("_"): dims
        for (_, value), dims in decided.cuts.items()
    }
    assert cuts == {name: (entry.split_dim,) for name, entry in plan[""].items()}
    ((output, value),) = decided.joins
    assert output.op == "output"
    weight = value.node.args[1]
    assert "proj_out" in weight.name
    assert decided.joins[output, value] == (plan["proj_out"].gather_dim,)
    assert len(decided.layouts[Axis(value.node, 1)]) == 1


def rotated_jointly(text, image, angles):
    """Queries and keys share rotary angles, values share nothing; a second attention follows."""
    q, k, v = (torch.cat([text * n, image * n], 1) for n in (1, 2, 3))
    x = F.scaled_dot_product_attention((q * angles)[:, None], (k * angles)[:, None], v[:, None])
    return attend(x[:, 0])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_run_of_fewer_tokens_than_parts(dynamic):
    inputs = torch.randn(1, 3, 8), torch.randn(1, 16, 8), torch.randn(19, 8)
    gm = capture(rotated_jointly, *inputs, dynamic=dynamic)
    ctx = transformed(gm, world_size=4)
    lengths = {ctx.plan.lengths(found.keys) for found in ctx.plan.attentions}
    assert len(ctx.plan.attentions) == 2
    assert {len(runs) for runs in lengths} == {2}
    cuts = [tensors(n)[0] for n in gm.graph.nodes if n.target is SHARD]
    assert {example_size(x.shape[-2], x) for x in cuts} == {1, 4, 5}


def values_apart(x, values):
    """Keys are of the tokens that queries have, values of an input that meets them nowhere else."""
    x = attend(x)
    return F.scaled_dot_product_attention(x[:, None], x[:, None], values[:, None])


def test_values_are_cut_as_their_keys_are():
    gm = capture(values_apart, torch.randn(1, 6, 8), torch.randn(1, 6, 8))
    plan = transformed(gm, passes=DECIDE).plan
    assert len(plan.attentions) == 2
    assert {plain_name(value.node) for _, value in plan.cuts} == {"x", "values"}


def refined_layers(x, text):
    """Attention over the layers of a text encoder, which are then summed up: (1, T, layers, D)."""
    batch, tokens, layers, width = text.shape
    text = attend(text.reshape(batch * tokens, layers, width))
    text = text.reshape(batch, tokens, layers, width).sum(2)
    both = torch.cat([x, text], 1)
    for _ in range(3):
        both = attend(both)
    return both[:, : x.shape[1]]


def space_then_time(x):
    """(1, frames, tokens, D): attention over space and over time by turns."""
    batch, frames, tokens, width = x.shape
    for _ in range(2):
        x = attend(x.reshape(batch * frames, tokens, width))
        x = x.reshape(batch, frames, tokens, width).transpose(1, 2)
        x = attend(x.reshape(batch * tokens, frames, width))
        x = x.reshape(batch, tokens, frames, width).transpose(1, 2)
    return x


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_over_something_else_than_the_tokens(n, batch):
    """In a batch of two its rows are no run of tokens any more, so it runs whole, before others."""
    assert_exact(refined_layers, torch.randn(batch, 7, 8), torch.randn(batch, 6, 4, 8), n=n)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("n", [2, 3])
def test_space_and_time_by_turns(n, batch):
    """Of two kinds of tokens those that are more are cut: attention over the others is local.

    In a batch of two the places of both pictures lie in a row, and each is cut likewise.
    """
    x = torch.randn(batch, 4, 6, 8)
    plan = transformed(capture(space_then_time, x), passes=DECIDE, world_size=n).plan
    assert [plan.lengths(found.keys) for found in plan.attentions] == [(6,), (6,)]
    assert_exact(space_then_time, x, n=n)


def by_frame(x, faces):
    """A row of 3 frames' tokens; each frame's attend to a face of its own, as Wan Animate's do."""
    for _ in range(2):
        x = attend(x)
        each = x.unflatten(1, (3, -1)).flatten(0, 1)[:, None]
        seen = F.scaled_dot_product_attention(each, faces[:, None], faces[:, None])[:, 0]
        x = x + seen.unflatten(0, (-1, 3)).flatten(1, 2)
    return x.reshape(x.shape[0], 3, -1, 2, 4).transpose(1, 3).flatten(1, 3)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_frame_by_frame(dynamic):
    """A part has the same places of all frames. What unpacks them in the end takes none apart."""
    x, faces = torch.randn(2, 21, 8), torch.randn(6, 5, 8)
    gm = capture(by_frame, x, faces, dynamic=dynamic)
    plan = transformed(gm, world_size=2).plan
    lengths = [plan.lengths(found.keys) for found in plan.attentions]
    fake = tensors(plan.attentions[0].node)[0]
    assert [[example_size(n, fake) for n in runs] for runs in lengths] == [[7] * 3] * 2
    for n in (2, 3):
        assert_exact(by_frame, x, faces, n=n)


def test_tokens_that_are_taken_apart_otherwise_are_refused():
    """Every second one first: these are no runs side by side."""

    def model(x):
        y = attend(x).unflatten(1, (-1, 2)).transpose(1, 2)
        return attend(y.flatten(1, 2))

    with pytest.raises(CannotShard, match="mixes tokens"):
        transformed(capture(model, torch.randn(1, 6, 8)), passes=DECIDE)


def test_an_upstream_network_of_few_tokens():
    """Two of its attentions and two others: what counts is how many tokens they have."""

    def model(x, text):
        for _ in range(2):
            text = attend(text)
        x = x + text.softmax(1).sum(1, keepdim=True)
        return attend(attend(x))

    x = torch.randn(1, 32, 8)
    assert_exact(model, x, torch.randn(1, 6, 8), n=2)
    with pytest.raises(CannotShard, match="mixes tokens"):
        transformed(capture(model, x, torch.randn(1, 30, 8)), passes=DECIDE)


def test_what_must_not_run_whole():
    """An op that mixes the tokens of a model's only two attentions is refused, on either side."""

    def model(x):
        return attend(attend(x).sort(1).values)

    def later(x):
        for _ in range(4):
            x = attend(x)
        return attend(x.sort(1).values)

    for function in (model, later):
        with pytest.raises(CannotShard, match=r"mixes tokens|no rule") as error:
            transformed(capture(function, torch.randn(1, 6, 8)), passes=DECIDE)
        assert error.value.node == "sort"


def rotated_in_part(x, count):
    """All but the first `count` tokens are rotated, in the first attention, too."""

    def rotated(x):
        return torch.cat([x[:, :count], x[:, count:] * 2], 1)[:, None]

    for _ in range(2):
        x = x + F.scaled_dot_product_attention(rotated(x), rotated(x * 3), x[:, None])[:, 0]
    return x


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 7], ids="first_{}".format)
def test_some_tokens_are_rotated(count, n):
    """Also one, which every rank has, and none or all, where a run has no tokens."""
    assert_exact(lambda x: rotated_in_part(x, count), torch.randn(1, 7, 8), n=n)


@pytest.mark.parametrize("n", [2, 3])
def test_padding_of_no_tokens(n):
    def model(x):
        x = torch.cat([x.new_zeros(1, 7 - x.shape[1], 8), x], 1)
        return attend(torch.stack([torch.cat([y[:7] * 2, y[7:]]) for y in attend(x)]))

    assert_exact(model, torch.randn(1, 7, 8), n=n)


@pytest.mark.parametrize("n", [2, 3])
def test_a_token_that_is_cut_off_in_the_end(n):
    """A register token, which is also read once more for all others."""

    def model(x, register):
        y = attend(attend(torch.cat([register, x], 1)))
        return y[:, 1:] * y[:, :1].squeeze(1)[:, None]

    def between(x, register):
        y = attend(torch.cat([register, x], 1))
        return attend(y[:, 1:] * y[:, :1])

    for function in (model, between):
        assert_exact(function, torch.randn(1, 7, 8), torch.randn(1, 1, 8), n=n)


@pytest.mark.parametrize("n", [2, 3])
def test_the_same_tokens_twice(n):
    """A run of the second time, and so of the first, too."""

    def model(x):
        y = attend(torch.cat([x, x], 1))
        return attend(torch.cat([y[:, 7:9] * 2, y[:, :7], y[:, 9:]], 1))

    assert_exact(model, torch.randn(1, 7, 8), n=n)
