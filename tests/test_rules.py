"""The rules: how tokens flow through an op, in layouts and in what several ranks compute."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, layouts, transformed
from torch import nn

import piflux
from piflux.errors import CannotShard
from piflux.passes.split import rules
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
            # Of numbers beyond 1 so much of the largest: processors sum in orders of their own.
            assert (got - want).abs().max() <= EXACT * max(1, want.abs().max()), step


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


# ------------------------------------------------------------------------------ along features


def along_features(x, weight):
    y = attend(x)
    y = y + y.topk(2).values.sum(-1, keepdim=True) + y.argmax(-1, keepdim=True)
    y = y + y.max(-1, keepdim=True)[0] + y.min(2).indices[..., None] + y.median(-1, True)[0]
    y = attend(0.1 * (y.sort(-1)[0] + y.flip(-1) + y.roll((1, 1), (2, 0)) + y.roll(1, -1)))
    best = y.argmax(-1)
    chosen = torch.gather(y, -1, y.argsort(-1)) + F.one_hot(best, 8) * y
    table = torch.embedding(weight, best) + F.embedding(best, weight)
    return attend(0.1 * (chosen + table + y.take_along_dim(best[..., None], -1)))


def products(x, weight):
    y = torch.einsum("...d,ed->...e", attend(x), weight)
    y = y + torch.einsum("bld,zd", y, weight) + torch.einsum("b...d,b...d->b...", y, y)[..., None]
    y = torch.baddbmm(attend(y), y, weight[None].expand(2, 8, 8))
    one, row = torch.matmul(y, weight[0]), torch.mv(y[0], weight[0])
    return attend(
        0.1 * (y + one[..., None] + row[:, None] + torch.matmul(weight[0], y.mT)[..., None])
    )


def moved(x, weight):
    y = attend(x).unflatten(-1, (2, 4)).movedim(2, 0)  # as SD3 splits queries from keys
    y = torch.moveaxis(y, (0, -1), (2, 3)).flatten(2)
    y = torch.swapaxes(torch.transpose(input=attend(y), dim0=0, dim1=1), axis0=1, axis1=0)
    return attend(y.moveaxis(-1, 0).movedim([0], [2]))


@pytest.mark.parametrize("model", [along_features, products, moved])
@pytest.mark.parametrize("n", [2, 3])
def test_ops_that_leave_tokens_alone(model, n):
    torch.manual_seed(0)
    assert_exact(model, 0.3 * torch.randn(2, 7, 8), 0.3 * torch.randn(8, 8), n=n)


def refusal(function, *args, n=2):
    with pytest.raises(CannotShard) as refused:
        transformed(capture(function, *args), n)
    return str(refused.value)


TABLE = torch.ones(8, 8)


def taken_by_itself(numbers):
    numbers = numbers.clamp(max=6)
    return numbers.take_along_dim(numbers, 0)


ALONG_TOKENS = {
    "topk": lambda y: y.topk(7, 1)[0],
    "argmax": lambda y: y + y.argmax(1, keepdim=True),
    "max": lambda y: y + y.max(1, keepdim=True)[0],
    "median": lambda y: y + y.median(1, keepdim=True)[0],
    "gather": lambda y: torch.gather(y, 1, y.argsort(-1).clamp(max=6)),
    "sort": lambda y: y.sort(1)[0],
    "flip": lambda y: y.flip(1, 2),
    "roll": lambda y: y.roll(1),
    "cumprod": lambda y: y.cumprod(1),
    "einsum": lambda y: y + torch.einsum("b...d->bd", y)[:, None],
    "baddbmm": lambda y: torch.baddbmm(y, torch.ones(1, 7, 7), y),
    "matmul": lambda y: y + torch.matmul(torch.ones(7), y)[:, None],
    # Of the same value once the tokens stay, and once they are summed up.
    "torch.functional.einsum": lambda y: y + torch.einsum("bld,bmd->bl", y, y)[..., None],
    "torch.bmm": lambda y: torch.bmm(y[..., :7], y[..., :7]).repeat(1, 1, 8)[..., :8],
    "take_along_dim": lambda y: y + taken_by_itself(y.argmax(-1)[0])[:, None],
    # It writes into the table, whose rows on another rank are looked up by other tokens.
    "embedding": lambda y: y + F.embedding(y.argmax(-1), TABLE.clone(), max_norm=1.0),
}


@pytest.mark.parametrize("op", ALONG_TOKENS)
def test_ops_that_mix_tokens(op):
    """Refused as mixing, not for want of a rule."""
    text = refusal(lambda x: attend(ALONG_TOKENS[op](attend(x))), torch.randn(1, 7, 8))
    assert text.startswith("mixes tokens") and op in text


# ------------------------------------------------------------------------------ what is refused


def test_an_op_that_has_no_rule():
    text = refusal(lambda x: attend(attend(x).tril()), torch.randn(1, 7, 8))
    assert "no rule" in text and "mixes" not in text and "Tensor.tril" in text


@torch.library.custom_op("piflux_test::attention", mutates_args=())
def another_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


another_attention.register_fake(lambda q, k, v: torch.empty_like(q))


@pytest.mark.parametrize("cross", [False, True])
def test_an_unknown_attention_is_named(cross):
    """And no innocent one to another sequence, where there is one."""

    def model(x, y):
        x = another_attention(x, x, x)
        return F.scaled_dot_product_attention(x, y, y) if cross else x

    text = refusal(model, torch.randn(1, 1, 7, 8), torch.randn(1, 1, 5, 8))
    assert "piflux_test.attention" in text and "another library" in text


def counted(x, text, mask):
    n = mask.sum(dim=1).tolist()[0]  # as Lumina 2 takes the tokens of text that count
    return attend(torch.cat([text[:, :n], x], 1))


def found_by_data(x, text, mask):
    kept = torch.nonzero(mask.flatten()).flatten()  # as Mochi does
    return attend(torch.cat([x, text[:, kept]], 1).reshape(1, -1, 2, 4).flatten(2))


@pytest.mark.parametrize("model", [counted, found_by_data])
def test_a_number_of_tokens_that_depends_on_data(model):
    mask = torch.ones(1, 6, dtype=torch.long)
    text = refusal(model, torch.randn(1, 7, 8), torch.randn(1, 6, 8), mask)
    assert "depends on data" in text and "pad to a fixed length" in text
    assert f"in {model.__name__}:" in text


def test_what_fails_in_a_rule_or_a_pass_names_the_op(monkeypatch):
    """Also for a user, without Dynamo's advice to report it to PyTorch."""

    def broken(node, x, *args, **kwargs):
        raise IndexError("no such dimension")

    def model(x):
        return attend(attend(x).tanh())

    with monkeypatch.context() as patch:
        patch.setitem(rules.RULES, "tanh", broken)
        parallel = piflux.parallelize(Model(model), group=piflux.virtual_ranks(2), inner="eager")
        with pytest.raises(CannotShard, match="IndexError: no such dimension") as refused:
            parallel(torch.randn(1, 7, 8))
    text = str(refused.value)
    assert refused.value.op == "Tensor.tanh" and "in model: return attend" in text
    assert "TORCHDYNAMO" not in text and "PyTorch" not in text

    def one_pass(gm, ctx):
        node = next(n for n in gm.graph.nodes if n.target == "tanh")
        return len(node.args[7])

    with pytest.raises(CannotShard, match=r"Tensor\.tanh"):
        transformed(capture(model, torch.randn(1, 7, 8)), passes=(one_pass,))


def test_ops_that_are_decomposed_at_symbolic_sizes():
    """A second size makes sizes symbols: ComfyUI's modulation is then no kernel of fakes."""

    def model(x, t):
        y = attend(torch.addcmul(t[:, None], x, 1 + t[:, None]))
        return attend(torch.addcdiv(y, t[:, None], 2 + y * y))

    parallel = piflux.parallelize(
        Model(model), group=piflux.virtual_ranks(2), policy="rotate", sync_steps=1, inner="eager"
    )
    for tokens in (8, 11):
        args = 0.3 * torch.randn(1, tokens, 8), torch.randn(1, 8)
        with piflux.generation(parallel):
            for _ in range(3):
                assert (parallel(*args) - model(*args)).abs().max() <= EXACT
