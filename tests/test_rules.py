"""The rules: how tokens flow through an op, in layouts and in what several ranks compute."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, layouts, transformed
from torch import nn

import piflux
from piflux.errors import CannotShard
from piflux.passes.split.layout import layout

EXACT = 1e-5


def attend(x):
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def found(function, *args, dynamic=False):
    gm = capture(function, *args, dynamic=dynamic)
    return layouts(transformed(gm, passes=(layout,)), gm)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def assert_exact(function, *args, n=3):
    """Parts on `n` ranks are what the function gives. Each run has its own arguments to write into.

    Of virtual ranks a sync step computes the whole, so the steps after it are judged: the same
    arguments give the same keys and values, so that what is remembered is right.
    """
    want = function(*(x.clone() for x in args))
    torch._dynamo.reset()  # literal sizes, whatever ran before
    group = piflux.virtual_ranks(n)
    parallel = piflux.parallelize(Model(function), group=group, policy="rotate", inner="eager")
    with piflux.generation(parallel):
        for step in range(n + 1):
            got = parallel(*(x.clone() for x in args))
            assert (got - want).abs().max() <= EXACT, step


class TestLayouts(TestCase):
    def test_runs_of_a_table_longer_than_the_tokens(self):
        """Overlapping runs serve two segments; a run of one token is no segment."""

        def model(text, image, table):
            text = text * table[2:6] + table[3:4]
            return attend(torch.cat([text, image * table[:6]], 1))

        inputs = torch.randn(1, 4, 8), torch.randn(1, 6, 8), torch.randn(99, 8)
        self.assertExpectedInline(
            found(model, *inputs),
            """\
text whole {1: [4]}
image whole {1: [6]}
getitem whole {0: [4]}
mul part {1: [4]}
text part {1: [4]}
getitem_2 whole {0: [6]}
mul_1 part {1: [6]}
cat part {1: [4, 6]}
getitem_3 part {2: [4, 6]}
getitem_4 part {2: [4, 6]}
getitem_5 part {2: [4, 6]}
scaled_dot_product_attention part {2: [4, 6]}
getitem_6 part {1: [4, 6]}
add_1 part {1: [4, 6]}
""",
        )

    def test_a_run_too_short_to_be_cut_by_itself(self):
        """One more token is a run that every part has whole, before and between attentions."""

        def model(task, text, image):
            both = attend(torch.cat([text, image], 1))
            return attend(torch.cat([torch.cat([task, both], 1), task], 1))

        inputs = torch.randn(1, 1, 8), torch.randn(1, 4, 8), torch.randn(1, 6, 8)
        self.assertExpectedInline(
            found(model, *inputs),
            """\
text whole {1: [4]}
image whole {1: [6]}
task whole {1: [1]}
cat part {1: [4, 6]}
getitem part {2: [4, 6]}
getitem_1 part {2: [4, 6]}
getitem_2 part {2: [4, 6]}
scaled_dot_product_attention part {2: [4, 6]}
getitem_3 part {1: [4, 6]}
both part {1: [4, 6]}
cat_1 part {1: [1, 4, 6]}
cat_2 part {1: [1, 4, 6, 1]}
getitem_4 part {2: [1, 4, 6, 1]}
getitem_5 part {2: [1, 4, 6, 1]}
getitem_6 part {2: [1, 4, 6, 1]}
scaled_dot_product_attention_1 part {2: [1, 4, 6, 1]}
getitem_7 part {1: [1, 4, 6, 1]}
add_1 part {1: [1, 4, 6, 1]}
""",
        )

    def test_sequences_that_become_a_batch(self):
        """Those of the longest's length keep their tokens; others would get padding."""

        def model(*sequences):
            return attend(torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True))

        equal = torch.randn(6, 8), torch.randn(6, 8)
        self.assertIn("pad_sequence part {1: [s", found(model, *equal, dynamic=True))
        self.assertExpectedInline(
            found(model, *equal),
            """\
sequences_0 whole {0: [6]}
sequences_1 whole {0: [6]}
pad_sequence part {1: [6]}
getitem part {2: [6]}
getitem_1 part {2: [6]}
getitem_2 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_3 part {1: [6]}
add part {1: [6]}
""",
        )
        unequal = torch.randn(6, 8), torch.randn(4, 8)
        self.assertExpectedInline(
            found(model, *unequal),
            """\
pad_sequence whole {1: [6]}
getitem part {2: [6]}
getitem_1 part {2: [6]}
getitem_2 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_3 part {1: [6]}
add part {1: [6]}
""",
        )

    def test_a_tensor_that_gives_its_dtype_only(self):
        """Neither cut nor gathered, and not the same tokens."""

        def model(x, time):
            y = attend(x)
            time = time.type_as(y).sin().to(y)
            return attend(y * time)

        self.assertExpectedInline(
            found(model, torch.randn(1, 6, 8), torch.randn(1, 1, 8)),
            """\
x whole {1: [6]}
getitem part {2: [6]}
getitem_1 part {2: [6]}
getitem_2 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_3 part {1: [6]}
y part {1: [6]}
mul part {1: [6]}
getitem_4 part {2: [6]}
getitem_5 part {2: [6]}
getitem_6 part {2: [6]}
scaled_dot_product_attention_1 part {2: [6]}
getitem_7 part {1: [6]}
add_1 part {1: [6]}
""",
        )

    def test_writing_every_token(self):
        """As rotary embeddings are written by halves: the pieces are the same tokens."""

        def model(x, table):
            out = torch.empty_like(x)
            out[..., 0::2] = x[..., 1::2] * table
            out[..., 1::2] = x[..., 0::2]
            return attend(out)

        self.assertExpectedInline(
            found(model, torch.randn(1, 6, 8), torch.randn(6, 4)),
            """\
x whole {1: [6]}
table whole {0: [6]}
out part {1: [6]}
getitem part {1: [6]}
mul part {1: [6]}
getitem_1 part {1: [6]}
getitem_2 part {2: [6]}
getitem_3 part {2: [6]}
getitem_4 part {2: [6]}
scaled_dot_product_attention part {2: [6]}
getitem_5 part {1: [6]}
add part {1: [6]}
""",
        )


def pairs(x, table):
    """Rotation of pairs, written by halves."""
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2] * table
    out[..., 1::2] = x[..., 0::2] * table
    return out


def test_writing_between_attentions():
    def model(x, table):
        y = attend(pairs(attend(x), table))
        y[:, :, 3] = 0.5
        y[..., None, 0] = 0.25
        y[:] = y + 1
        return attend(y)

    assert_exact(model, torch.randn(2, 7, 8), torch.randn(7, 4))
    assert_exact(model, torch.randn(2, 1, 8).expand(2, 7, 8), torch.randn(1, 4))


def test_what_is_written_before_it_is_cut():
    """The first key is never hidden, which is written into a mask that every rank has whole."""

    def model(x, kept):
        mask = kept[:, None, None].repeat(1, 1, x.shape[1], 1)
        mask = mask & mask.transpose(2, 3)
        mask[:, :, :, 0] = True
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    kept = torch.ones(1, 7, dtype=torch.bool)
    kept[:, 4:] = False
    assert_exact(model, torch.randn(1, 7, 8), kept)


def test_what_is_written_before_it_is_gathered():
    def model(x):
        y = attend(x)
        y.mul_(2)
        y[..., 0] = 3
        return y

    assert_exact(model, torch.randn(1, 7, 8))


def test_sequences_in_a_batch():
    def model(x, y):
        first, second = attend(x[None])[0], attend(y[None])[0]
        batch = torch.nn.utils.rnn.pad_sequence([first, second], batch_first=True)
        turned = torch.nn.utils.rnn.pad_sequence([first, second])
        return attend(batch) + attend(turned.transpose(0, 1))

    assert_exact(model, torch.randn(7, 8), torch.randn(7, 8))
    with pytest.raises(CannotShard, match="mixes tokens"):
        transformed(capture(model, torch.randn(7, 8), torch.randn(5, 8)))


def test_writing_refused():
    """Other tokens than were there, between reads, or into what is read in two copies."""

    def shifted(x):
        y = attend(x)
        z = torch.zeros_like(y)
        z[:, 1:] = y[:, :-1]
        return attend(z)

    def after_a_gathering(x):
        y = attend(x)
        total = y.sum(1, keepdim=True)
        y.mul_(2)
        return y + total

    def through_two_views(x):
        z = torch.zeros(7, 8)
        first, second = z[None], z[None]
        first[:] = attend(x)
        return attend(second)

    def read_by_a_view(x):
        z = torch.zeros(1, 7, 8)
        z[:] = attend(x)
        return attend(z), z.flatten(1).cumsum(1)

    x = torch.randn(1, 7, 8)
    for model in (shifted, after_a_gathering, through_two_views, read_by_a_view):
        with pytest.raises(CannotShard, match=r"in place|mixes tokens"):
            transformed(capture(model, x))
