"""How a sync step comes by all keys and values: gathered, recomputed, or by what is faster."""

from unittest import mock

import pytest
import torch
from captures import captured_once
from models import flux_inputs, tiny_flux
from test_numerics import EXACT, sample

import piflux
from piflux.cost.cost import Layer, Rates, choose_sync
from piflux.cost.rates import measure_rates

PART = 3 * (Layer(linear_flops=6 * 10**9, attention_flops=10**9, kv_bytes=10**6),)
WHOLE = 3 * (Layer(linear_flops=12 * 10**9, attention_flops=2 * 10**9, kv_bytes=0),)


@pytest.mark.parametrize(
    ("link_gbs", "beside", "sync"),
    [
        (1.0, 0, "gather"),
        (1 / 11.9, 0, "gather"),  # a layer takes 8 ms and waits 11.9; recomputed it takes 16
        (1 / 12.1, 0, "recompute"),
        (1 / 12.1, 10**9, "gather"),  # a millisecond of it is hidden
        (1e-3, 0, "recompute"),
    ],
)
def test_the_faster_one_is_chosen(link_gbs, beside, sync):
    part = [Layer(x.linear_flops, x.attention_flops, x.kv_bytes, beside) for x in PART]
    choice = choose_sync(part, WHOLE, Rates(1.0, 0.5, link_gbs))
    assert choice.sync == sync
    assert f"{link_gbs:.3g} GB/s" in choice.reason
    assert "computes all tokens 48 ms" in choice.reason


def taking(seconds):
    """In place of a clock, which a busy machine would have its say in."""

    def median_seconds(act, on_gpu, runs):
        act()
        return seconds

    return median_seconds


# At MEDIUM a part of tiny_flux takes 45 ms and the whole 84, so that recomputing is worth it from
# 60 ms of waiting on: a gather takes less, one over the slow link more.
FAST, MEDIUM, SLOW = (1e3, 1e3), (4e-5, 4e-5), (1e-9, 1e-9)


@captured_once()
def called(rank, group, rates, slower, policy="rotate", sync="auto"):
    """The report and the first step's result; `slower` is what rank 1 alone has."""
    model = piflux.parallelize(
        tiny_flux(single=0), group=group, policy=policy, sync=sync, inner="eager"
    )
    kernels = SLOW if rank == 1 and slower == "kernels" else rates
    gather_s = 0.1 if rank == 1 and slower == "link" else 0.001
    with (
        mock.patch("piflux.cost.rates.measure_rates", return_value=kernels),
        mock.patch("piflux.cost.rates.median_seconds", taking(gather_s)),
    ):
        result = sample(model)(**flux_inputs())
    return str(piflux.explain(model)), result


@pytest.mark.parametrize(
    ("rates", "slower", "sync", "sent"),
    [
        (MEDIUM, None, "gather", "10.75 kB"),
        (MEDIUM, "link", "recompute", "0 B"),
        (FAST, None, "recompute", "0 B"),
        (FAST, "kernels", "gather", "10.75 kB"),
    ],
)
def test_the_slowest_rank_decides_for_all(ranks, rates, slower, sync, sent):
    """Without what is slow on one of them, all decide otherwise."""
    with torch.no_grad():
        want = sample(tiny_flux(single=0))(**flux_inputs())
    told = ranks(2, called, rates, slower)
    assert told[0][0] == told[1][0]
    for text, result in told:
        assert f"  sync by '{sync}'".ljust(25) + "at " in text
        assert f"sent in a sync step    {sent} a rank" in text
        assert (result - want).abs().max() <= EXACT


def test_where_there_is_nothing_to_choose_nothing_is_measured(ranks):
    with mock.patch("piflux.compile.choices.slowest_rates", side_effect=AssertionError):
        for group in (piflux.virtual_ranks(1), piflux.virtual_ranks(2)):
            called(0, group, FAST, None)
    text, _ = ranks(2, called, FAST, "link", "gather")[0]
    assert "sync by 'gather'       there is nothing to choose" in text


def set_apart(rank, group):
    model = piflux.parallelize(
        tiny_flux(single=0), group=group, sync="gather" if rank else "auto", inner="eager"
    )
    model(**flux_inputs())


def test_ranks_that_were_told_otherwise(ranks):
    """Found out before one measures and the other waits for something else."""
    for failure in ranks.errors(2, set_apart):
        assert failure.isa(piflux.RanksDisagree)
        assert "sync='auto'" in failure.message and "sync='gather'" in failure.message


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="'sometimes': choose 'gather' or 'recompute', or 'auto'"):
        piflux.parallelize(tiny_flux(), sync="sometimes")


def test_measuring_leaves_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    assert min(measure_rates(8, 2, 4, torch.float32, "cpu", 1)) > 0
    assert torch.equal(torch.rand(3), want)
