"""Ops that write in place: into runs of tokens, into what is cut, before a value is looked at."""

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, transformed
from test_rules import assert_exact

from piflux.errors import CannotShard
from piflux.passes.split.layout import layout


def attend(x):
    return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def control(x, y):
    """A ControlNet's residuals are added to the first tokens, and to all."""
    for n in (4, 7):
        x = attend(x)
        x[:, :n] += y[:, :n]
    return attend(x)


def runs(x, y):
    """By numbers from either end, one token, and a run by what is broadcast over it."""
    x = attend(x)
    x[:, 0:3] *= 2
    x[:, 3:None] *= 3
    x[:, -2:, 1] = 0.5
    x[:, 2] = y[:, 0]
    x[:, 1:-4] = y[:, :1]
    x[:, 9:] = 1
    return attend(x)


def rotated(x, y):
    """Queries and keys of the last tokens, in a block that is no first."""
    q, k = (attend(x * n)[:, None].contiguous() for n in (1, 2))
    for z in (q, k):
        z[:, :, 3:] = z[:, :, 3:] * y[:, 3:]
    return F.scaled_dot_product_attention(q, k, x[:, None])[:, 0]


def first_rotated(x, y):
    """In the first block, where all of it may run whole."""
    q, k = ((x * n)[:, None] for n in (1, 2))
    for z in (q, k):
        z[:, :, 3:] = z[:, :, 3:] * y[:, 3:]
    x = x + F.scaled_dot_product_attention(q, k, x[:, None])[:, 0]
    return attend(x)


def packed(x, y):
    """Runs are put together in memory of their own, of which the last is also the output."""
    for _ in range(2):
        x = attend(x)
        z = torch.zeros(1, 7, 8)
        z[:, :4] = x[:, :4]
        z[:, 4:7] = x[:, 4:]
        x = z
    return x


def filled(x, y):
    z = torch.empty(1, 7, 8)
    z.copy_(attend(x))
    z.mul_(2)
    return attend(z).sum(1) + z.sum(1)


def statements(x, y):
    """What enters the first block is written by its attention, as a statement."""
    x = torch.cat([x * 2, y], 1)
    for _ in range(2):
        z = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        x.add_(z)
        x.addcmul_(z, z)
    return x


def viewed(x, y):
    """A view is taken after its memory was written, and becomes tokens."""
    table = torch.zeros(1, 4, 2, 8)
    table[..., 0, :] = torch.arange(8)
    table.add_(1)
    return attend(x + table.flatten(1, 2)[:, :7])


def viewed_before(x, y):
    """Two views, one from before."""
    z = x.cumsum(1)
    q = z[:, None]
    z[:, 0] = 0
    return F.scaled_dot_product_attention(q, q, q)


def given(x, y):
    """Into an argument by name."""
    z = attend(x)
    w = torch.empty_like(z)
    torch.mul(z, 2, out=w)
    return attend(w)


def converted(x, y):
    """What was written is read by an op that copies only where it must, as Lumina 2 does."""
    z = torch.zeros(1, 7, 8)
    x = attend(x)
    z[:, :4] = x[:, :4]
    z[:, 4:7] = x[:, 4:]
    return attend(z.to(torch.float32).pow(2) + z.type_as(x))


KINDS = control, runs, rotated, first_rotated, packed, filled, statements, viewed, viewed_before
KINDS += given, converted


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_exact(kind, n):
    assert_exact(kind, torch.randn(1, 7, 8), torch.randn(1, 7, 8), n=n)


def test_runs_by_symbolic_sizes():
    """The edge of a run that is written is an edge of segments."""

    def model(x, y):
        x = attend(torch.cat([y, x], 1))
        x[:, y.shape[1] :] *= 2
        return attend(x)

    gm = capture(model, torch.randn(1, 7, 8), torch.randn(1, 4, 8), dynamic=True)
    ctx = transformed(gm)
    (runs,) = {ctx.plan.lengths(found.keys) for found in ctx.plan.attentions}
    assert len(runs) == 2
    assert not any(length.is_number for length in runs)


def test_what_does_not_write_is_no_match():
    """Copies of a value that nobody writes are where they were: right after it."""
    ctx = transformed(capture(attend, torch.randn(1, 7, 8)), passes=(layout,))
    assert ctx.plan.cuts
    assert not ctx.plan.cut_after
    assert not ctx.plan.join_after


def into_an_input(x):
    y = attend(x)
    x[:, :4] = y[:, :4]
    return attend(x)


def by_a_tensor(x):
    y = attend(x)
    y[:, torch.tensor([0, 3])] = 0
    return attend(y)


@pytest.mark.parametrize("kind", [into_an_input, by_a_tensor], ids=lambda kind: kind.__name__)
def test_refused(kind):
    with pytest.raises(CannotShard, match=r"in place|mixes tokens") as error:
        transformed(capture(kind, torch.randn(1, 7, 8)))
    assert error.value.op == "operator.setitem"
