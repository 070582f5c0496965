"""`policy='auto'`: what it takes, that it says so, and that it measures once."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from captures import captured_once
from torch import nn

import piflux
from piflux.cost import remembered
from piflux.cost.cost import Rates


class Attention(nn.Module):
    def forward(self, x, t):
        q = (x + t)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


X = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
FAST, SLOW = Rates(1e-6, 1e-6, 1e3), Rates(1e3, 1e3, 1e-9)


def one_image(group, steps=None, **options):
    """The policy of a model after a first call, what the call logged, and what explain says."""
    model = Attention()
    parallel = piflux.parallelize(model, group=group, policy="auto", inner="eager", **options)
    times = None if steps is None else torch.linspace(1, 0, steps + 1)[:-1]
    with (
        mock.patch("piflux.compile.choices.log.warning") as warning,
        piflux.generation(parallel, timesteps=times),
    ):
        assert (parallel(X, torch.ones(1)) - model(X, torch.ones(1))).abs().max() < 1e-6
    lines = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    return parallel._piflux_compiler.runtime.schedule, lines, str(piflux.explain(parallel))


@captured_once()
def chosen(rank, group, folder):
    """What models take one after the other, and how often ranks measured until then."""
    measured, found = [], []

    def measure(*args):
        measured.append(args)
        return SLOW if len(measured) == 1 else FAST

    own = str(Path(folder) / str(rank))
    with (
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": own, "LOCAL_RANK": "0"}),
        mock.patch.object(remembered, "slowest_rates", measure),
    ):
        for _ in range(2):
            found.append((*one_image(group, sync="recompute"), len(measured)))
        if rank == 1:
            remembered.rates_file().unlink()
        found.append((*one_image(group, sync="recompute"), len(measured)))
        found.append((*one_image(group, steps=1), len(measured)))
        remembered.rates_file().write_text("no JSON")
        found.append((*one_image(group, sync_steps=1, steps=9), len(measured)))
        with mock.patch.object(remembered, "slowest_rates", return_value=SLOW):
            remembered.rates_file().unlink()
            for options in ({}, {"sync_steps": (0, 2)}, {"steps": 10}):
                options = {"steps": 9} | options
                found.append((*one_image(group, **options), len(measured)))
    return found


def test_all_ranks_take_what_was_measured_once(ranks, tmp_path):
    """Also if one rank has forgotten it, or what is remembered can't be read."""
    first, second = ranks(2, chosen, str(tmp_path))
    for rank, results in enumerate((first, second)):
        schedules, lines, explained, measured = zip(*results, strict=True)
        policies = [x.policy for x in schedules]
        assert policies == ["rotate"] * 2 + ["gather"] * 3 + ["rotate"] * 3
        assert [x.sync for x in schedules] == ["recompute", "recompute", *["gather"] * 6]
        # Of few steps the second is the other sync step, but where the usual ones were asked for.
        assert [x.sync_steps for x in schedules[5:]] == [(0, 1), (0, 2), (0, 2)]
        assert measured == (1, 1, 2, 2, 3, 3, 3, 3)
        assert all(len(x) == (rank == 0) for x in lines)
        assert all("note: policy 'auto' took" in x for x in explained)
    (slow,), (few,), (many,) = first[0][1], first[3][1], first[4][1]
    assert "'rotate' for 2 ranks on CPU" in slow and "at 1e-09 GB/s" in slow
    assert "1 steps an image: each of so few steps is a sync step" in few
    assert "9 steps an image: keys and values travel" in many


@pytest.mark.parametrize(("size", "why"), [(1, "one rank, 1 att"), (2, "no link lies between")])
def test_without_a_link_it_is_exact(size, why):
    schedule, (line,), explained = one_image(piflux.virtual_ranks(size))
    assert schedule.policy == "gather"
    assert why in line and line in explained
