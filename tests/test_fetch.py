"""Where a program gathers weights that ranks share: before which blocks, and which together."""

import re

import pytest
import torch
from expecttest import TestCase
from graphs import capture, captured_flux, text, transformed
from models import Int8Weight
from test_outline import Blocks, plain
from torch import nn

from piflux.compile.program import PASSES, prepare
from piflux.cost.shares import SharedWeights, expected
from piflux.graph.blocks import find_blocks
from piflux.graph.targets import FETCH
from piflux.passes.speed.enclose import HEAD
from piflux.passes.speed.fetch import fetch
from piflux.passes.speed.outline import outline


def fetched(model, *args):
    gm = capture(model, *args)
    ctx = transformed(gm, 2, (*PASSES, outline, fetch))
    gm.graph.lint()
    return gm, ctx


class TestFetch(TestCase):
    def test_while_a_block_computes_the_next_one_s_weights_arrive(self):
        gm, ctx = fetched(Blocks(plain), torch.randn(1, 6, 4))
        self.assertExpectedInline(
            text(gm),
            """\
x: (1, 6, 4)
piece_0: (1, 3, 4) = piece_0(x)
x: (1, 3, 4) = getitem(piece_0, 0)
slots_from: None = piflux.runtime.ops.slots_from(0)
fetch: None = piflux.runtime.ops.fetch(None, 0)
piece_1: (1, 3, 4) = piece_1(x, weights.0)
x_1: (1, 3, 4) = getitem(piece_1, 0)
slots_from_1: None = piflux.runtime.ops.slots_from(1)
fetch_1: None = piflux.runtime.ops.fetch(0, 1)
piece_2: (1, 3, 4) = piece_1(x_1, weights.1)
x_2: (1, 3, 4) = getitem(piece_2, 0)
slots_from_2: None = piflux.runtime.ops.slots_from(2)
fetch_2: None = piflux.runtime.ops.fetch(1, None)
piece_3: (1, 3, 4) = piece_1(x_2, weights.2)
x_3: (1, 3, 4) = getitem(piece_3, 0)
piece_4: (1, 6, 4) = piece_2(x_3)
add_3_whole: (1, 6, 4) = getitem(piece_4, 0)
return (add_3_whole,)
""",
        )
        self.assertEqual([x.runs for x in ctx.gathered], [((2,),), ((3,),)])
        self.assertEqual([x.buffer for x in ctx.gathered], [0, 1])

    def test_what_was_joined_adjoins(self):
        """Queries are joined with nothing, as their projection stands behind the send."""
        gm, ctx = prepared()
        names = [_short(n.name) for n in gm.graph.find_nodes(op="placeholder")]
        runs = [" ".join(names[i] for i in run) for run in ctx.gathered[0].runs]
        self.assertExpectedInline(
            "\n".join(x for x in runs if "attn" in x) + "\n",
            """\
1_attn_to_k_weight_ 1_attn_to_v_weight_
1_attn_to_k_bias_ 1_attn_to_v_bias_
1_attn_add_k_proj_weight_ 1_attn_add_v_proj_weight_
1_attn_add_k_proj_bias_ 1_attn_add_v_proj_bias_
1_attn_norm_k_weight_
1_attn_norm_added_k_weight_
1_attn_to_q_weight_
1_attn_to_q_bias_
1_attn_add_q_proj_weight_
1_attn_add_q_proj_bias_
1_attn_norm_q_weight_
1_attn_norm_added_q_weight_
1_attn_to_out_0_weight_
1_attn_to_out_0_bias_
1_attn_to_add_out_weight_
1_attn_to_add_out_bias_
""",
        )

    def test_hoisted_weights_arrive_as_they_are_read(self):
        gm, _ = prepared()
        lines = [re.sub(r"leading\(.*", "leading(...)", x) for x in text(gm.hoisted).splitlines()]
        lines = [x for x in lines if re.search("fetch|= leading|linear\\(", x)]
        self.assertExpectedInline(
            "\n".join(lines) + "\n",
            """\
fetch: None = piflux.runtime.ops.fetch(4, 5)
leading: (1, 48) (1, 48) = leading(...)
emb_10: (1, 288) = linear(silu_4, linear.weight, linear.bias)
fetch_1: None = piflux.runtime.ops.fetch(5, 6)
emb_11: (1, 288) = linear(silu_4, linear.weight, linear.bias)
emb_12: (1, 288) = linear(silu_4, linear.weight, linear.bias)
emb_13: (1, 288) = linear(silu_4, linear.weight, linear.bias)
emb_14: (1, 144) = linear(silu_4, linear.weight, linear.bias)
fetch_2: None = piflux.runtime.ops.fetch(6, None)
emb_15: (1, 144) = linear(silu_4, linear.weight, linear.bias)
emb_16: (1, 144) = linear(silu_4, linear.weight, linear.bias)
emb_17: (1, 96) = linear(to_42, linear.weight, linear.bias)
""",
        )


def _short(name):
    return re.sub(r"^.*blocks_modules_|_(modules|parameters)", "", name)


def prepared():
    gm = captured_flux(double=2, single=3)
    ctx = transformed(gm, 2, PASSES)
    prepare(gm, ctx, shares=True)
    return gm, ctx


def test_each_group_is_fetched_once_and_two_buffers_take_turns():
    gm, ctx = prepared()
    fetches = [n.args for n in getattr(gm, HEAD).graph.find_nodes(op="call_function", target=FETCH)]
    step = [i for i, x in enumerate(ctx.gathered) if not x.hoisted]
    assert fetches == [(None, 0), *((i, i + 1) for i in step[:-1]), (step[-1], None)]
    assert [ctx.gathered[i].buffer for i in step] == [i % 2 for i in step]
    positions = [i for x in ctx.gathered for run in x.runs for i in run]
    assert len(positions) == len(set(positions))


def test_bytes_are_those_of_the_weights():
    gm, ctx = prepared()
    inputs = gm.graph.find_nodes(op="placeholder")
    for x in ctx.gathered:
        weights = [inputs[i].meta["example_value"] for run in x.runs for i in run]
        assert x.bytes == sum(weight.nbytes for weight in weights)
    most = max(x.bytes for x in ctx.gathered if not x.hoisted)
    assert all(x.bytes <= most for x in ctx.gathered)


def test_the_first_block_stays_whole_and_so_does_what_no_block_reads_alone():
    class Shared(Blocks):
        """All blocks read one weight beside their own."""

        def __init__(self):
            super().__init__(plain, 4)
            self.shared = nn.Parameter(torch.eye(4))

        def forward(self, x):
            for number, weight in enumerate(self.weights):
                x = self.block(x, weight, number) @ self.shared
            return x + 1

    gm, ctx = fetched(Shared(), torch.randn(1, 6, 4))
    inputs = gm.graph.find_nodes(op="placeholder")
    gathered = [inputs[i].name for x in ctx.gathered for run in x.runs for i in run]
    assert len(gathered) == 3
    assert not any("shared" in name or "weights_0" in name for name in gathered)


@pytest.mark.parametrize("depth", [1, 0])
def test_a_graph_without_repeated_blocks_stays(depth):
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return plain(x, self.weight, 0) if depth else plain(plain(x, x[0, :4], 0), x[0, :4], 1)

    gm = capture(Once(), torch.randn(1, 6, 4))
    ctx = transformed(gm, 2, (*PASSES, outline))
    before = str(gm.graph)
    assert fetch(gm, ctx) == 0 and not ctx.gathered and str(gm.graph) == before


def test_weights_with_gaps_stay_whole():
    """A view of a wider matrix does not fill its memory."""
    model = Blocks(plain)
    wide = torch.randn(3, 4, 8)
    model.weights = nn.ParameterList(nn.Parameter(x[:, :4]) for x in wide)
    gm = capture(model, torch.randn(1, 6, 4))
    ctx = transformed(gm, 2, (*PASSES, outline))
    assert fetch(gm, ctx) == 0


def test_a_quantized_weight_counts_what_it_wraps():
    model = Blocks(plain)
    model.weights = nn.ParameterList(
        nn.Parameter(Int8Weight.of(torch.randn(4, 4)), requires_grad=False) for _ in range(3)
    )
    _, ctx = fetched(model, torch.randn(1, 6, 4))
    assert [x.bytes for x in ctx.gathered] == [4 * 4 + 4 * 4] * 2


def test_what_is_counted_before_the_passes_is_close():
    """It has hoisted weights as their blocks', and so the buffers too large."""
    _, ctx = prepared()
    graph = captured_flux(double=2, single=3).graph
    before = SharedWeights.of(expected(graph, find_blocks(graph)), 2)
    exact = SharedWeights.of(ctx.gathered, 2)
    assert exact.held_bytes < before.held_bytes < 1.5 * exact.held_bytes


def test_how_long_a_step_waits_for_weights():
    """A hundred bytes a block on two ranks, at 1 GB/s: 50 ns to send each."""
    shared = SharedWeights(2, (100, 100, 100), (80,))
    assert (shared.whole_bytes, shared.held_bytes) == (380, 190 + 200)
    assert (shared.step_bytes, shared.image_bytes) == (150, 40)
    assert shared.among(1000) == 1000 - 380 + 390
    # Of four blocks' computing the last one's hides nothing.
    assert shared.wait_s(100e-9, 1.0) == pytest.approx(150e-9 - 75e-9)
    assert shared.wait_s(200e-9, 1.0) == 0
