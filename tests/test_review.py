"""Inputs that tell one pass of a step from another, and settings that make no sense."""

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, transformed
from torch import nn

import piflux


class Labelled(nn.Module):
    """Tokens that attend under a class label and a learned prompt."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 8)
        self.project = nn.Linear(8, 8)

    def forward(self, x, label, prompt, timestep):
        h = self.project(x) + 3 * self.table(label)[:, None] + prompt + timestep[:, None, None]
        q = h[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


@pytest.mark.parametrize("passes", [((0, 0.0), (1, 0.0)), ((0, 0.0), (0, 2.0))])
def test_passes_that_differ_in_any_condition_have_caches_of_their_own(passes):
    model, x, timestep = Labelled(), torch.randn(1, 6, 8), torch.ones(1)
    parallel = piflux.parallelize(model, group=piflux.virtual_ranks(2), inner="eager")
    conditions = [
        (torch.tensor([label]), nn.Parameter(torch.full((1, 1, 8), prompt)))
        for label, prompt in passes
    ]
    with piflux.generation(parallel), torch.no_grad():
        for _ in range(3):  # of the same inputs: what is remembered is right
            for label, prompt in conditions:
                want = model(x, label, prompt, timestep)
                assert (parallel(x, label, prompt, timestep) - want).abs().max() < 1e-5


@pytest.mark.parametrize("inner", [None, 3, "piflux", piflux.backend, "nope"])
def test_what_is_no_inner_compiler(inner):
    with pytest.raises(ValueError, match="unknown inner compiler"):
        piflux.parallelize(Labelled(), inner=inner)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h / h.norm(2),
        lambda h: h / torch.norm(h, 2),
        lambda h: F.softmax(h.view(1, 6, 2, 4)).flatten(2),
        lambda h: h - h.max(1, keepdim=True)[0],
        lambda h: h - h.min(),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_a_dimension_that_is_not_spelled_out(mix):
    """What looks like the number of a dimension is an exponent, or is chosen by the op."""

    def model(x):
        q = mix(F.scaled_dot_product_attention(x, x, x))
        return F.scaled_dot_product_attention(q, q, q)

    with pytest.raises(piflux.CannotShard, match="mixes tokens"):
        transformed(capture(model, torch.randn(1, 6, 8)))


def test_the_larger_of_two_tokens():
    def model(x):
        return F.scaled_dot_product_attention(x, x, torch.max(x, x + 1).min(2 * x))

    transformed(capture(model, torch.randn(1, 6, 8)))


def test_the_raw_backend_is_for_inference():
    compiled = torch.compile(
        Labelled(),
        backend=piflux.backend,
        options={"group": piflux.virtual_ranks(2), "inner": "eager"},
    )
    call = torch.randn(1, 6, 8), torch.tensor([0]), torch.zeros(1, 1, 8), torch.ones(1)
    with pytest.raises(piflux.PifluxError, match="no_grad"):
        compiled(*call)
    with torch.no_grad():
        compiled(*call)
