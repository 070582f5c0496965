"""What runs before the last collective becomes one module.

That it computes the same is for `test_replay.py` to show.
"""

# ruff: noqa: E501 (snapshots)

import operator

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, text, transformed

from piflux.compile.program import PASSES
from piflux.graph.plan import Context
from piflux.passes.speed.enclose import enclose


def attend(x):
    q = x[:, None]
    return F.scaled_dot_product_attention(q, q, q)[:, 0]


def enclosed(function, *args, world_size=2, **options):
    """How many nodes were moved, and the graph afterwards."""
    gm = capture(function, *args, **options)
    ctx = transformed(gm, world_size, PASSES if world_size > 1 else ())
    before = str(gm.graph)
    count = enclose(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    if not count:
        assert str(gm.graph) == before and not list(gm.children())
    return count, gm


class TestEnclose(TestCase):
    def test_static(self):
        """What is computed of the whole prediction stays outside."""

        def model(x):
            h = attend(x * 2)
            return h.sum(1), h

        count, gm = enclosed(model, torch.randn(1, 6, 4))
        self.assertEqual(count, len(gm.head.graph.nodes) - 2)
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 4)
head: (1, 3, 4) = head(x)
h_1: (1, 3, 4) = getitem(head, 0)
h_whole: (1, 6, 4) = piflux.unshard(h_1, 1, [6], 2)
sum_1: (1, 4) = h_whole.sum(1)
return (sum_1, h_whole)
""",
        )
        self.assertExpectedInline(
            text(gm.head),
            """\
x: (1, 6, 4)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
mul: (1, 3, 4) = mul(x_part, 2)
q: (1, 1, 3, 4) = getitem(mul, (:, None))
sent: (1) = piflux.send_kv(q, q, 0, 2)
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, q, q, None, None, False, [6], 0, 2, sent)
h: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
return (h,)
""",
        )

    def test_dynamic(self):
        """Sizes are handed in."""

        def model(x):
            return attend(x) / x.shape[1]

        x = torch.randn(1, 6, 4)
        torch._dynamo.mark_dynamic(x, 1)
        _, gm = enclosed(model, x)
        self.assertExpectedInline(
            text(gm),
            """\
s27: s27
x: (1, s27, 4)
head: (1, ((s27 + 1)//2), 4) = head(s27, x)
truediv_1: (1, ((s27 + 1)//2), 4) = getitem(head, 0)
truediv_whole: (1, s27, 4) = piflux.unshard(truediv_1, 1, [s27], 2)
return (truediv_whole,)
""",
        )


def test_on_one_rank_all_of_it_is_moved_and_once():
    count, gm = enclosed(lambda x: attend(x) + 1, torch.randn(1, 6, 4), world_size=1)
    assert [n.op for n in gm.graph.nodes if n.target != operator.getitem] == [
        *("placeholder", "call_module", "output")
    ]
    assert count == len(gm.head.graph.nodes) - 2
    assert enclose(gm, Context(1)) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: attend(x * 2).add_(1),
        lambda x: attend(x + torch.rand_like(x)),
    ],
    ids=["in place", "random"],
)
def test_what_does_more_than_compute_stays(function):
    assert enclosed(function, torch.randn(1, 6, 4))[0] == 0
