"""Ranks simulated in one process make the images that real ones make."""

import itertools

import pytest
import torch
from captures import captured_once
from models import flux_inputs, sd3_inputs, tiny_flux, tiny_sd3
from test_numerics import EXACT

import piflux

STEPS = 7


def image(model, inputs, steps=STEPS):
    """A few Euler steps; `inputs` of the first."""
    x = inputs["hidden_states"]
    sigmas = torch.linspace(1, 0, steps + 1, device=x.device)
    with piflux.generation(model):
        for now, then in itertools.pairwise(sigmas):
            step = inputs | {"hidden_states": x, "timestep": now.expand(x.shape[0])}
            x = x + (then - now) * model(**step, return_dict=False)[0]
    return x


def settings():
    yield {"policy": "rotate"}
    yield {"policy": "rotate", "sync_steps": 2, "refresh_every": 3}
    yield {"policy": "displaced"}
    yield {"policy": "displaced", "order": 0, "sync_steps": (0, 3)}
    yield {"policy": "rotate", "sync": "recompute", "refresh_every": 3}
    yield {"policy": "gather"}


@captured_once()
def images(rank, group):
    model, inputs = tiny_flux(), flux_inputs()
    return [
        image(piflux.parallelize(model, group=group, inner="eager", **options), inputs)
        for options in settings()
    ]


@pytest.mark.usefixtures("captured_once")
def test_virtual_ranks_equal_real_ones(ranks):
    real = ranks(3, images)[0]
    virtual = [
        image(
            piflux.parallelize(
                tiny_flux(), group=piflux.virtual_ranks(3), inner="eager", **options
            ),
            flux_inputs(),
        )
        for options in settings()
    ]
    for want, got in zip(real, virtual, strict=True):
        assert (want - got).abs().max() <= EXACT
    assert (virtual[0] - virtual[-1]).abs().max() > 100 * EXACT  # rotation does drift


def test_boundaries_inside_the_graph():
    """What is gathered in mid-graph is complete when the last rank has run."""
    model, inputs = tiny_sd3(), sd3_inputs()
    group = piflux.virtual_ranks(3)
    parallel = piflux.parallelize(model, group=group, sync_steps=0, inner="eager")
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
    with piflux.generation(parallel):
        for _ in range(4):  # of the same inputs: what is remembered is right
            got = parallel(**inputs, return_dict=False)[0]
            assert (want - got).abs().max() <= EXACT


@pytest.mark.parametrize("size", [0, 2.0, "2", None])
def test_at_least_one_rank(size):
    with pytest.raises(ValueError, match="at least 1"):
        piflux.virtual_ranks(size)
