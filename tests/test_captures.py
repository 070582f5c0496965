"""What makes the tests cheap: graphs that models share, and what ranks begin with."""

import sys
from unittest import mock

import captures
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import piflux


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x) * self.scale


def called_at(*lengths, scale=1.0):
    """A new model's programs after calls at so many tokens, and how often Dynamo captured."""
    model = Attention()
    parallel = piflux.parallelize(model, group=piflux.virtual_ranks(2), inner="eager")
    with mock.patch.object(captures, "Captured", wraps=captures.Captured) as captured:
        for length in lengths:
            x = torch.randn(1, 1, length, 8)
            assert torch.allclose(parallel(x), model(x), atol=1e-6)
        model.scale = scale
        assert torch.allclose(parallel(x), model(x), atol=1e-6)
    return len(parallel._piflux_compiler.programs), captured.of.call_count


@pytest.mark.usefixtures("captured_once")
def test_models_that_are_alike_are_captured_once():
    """Where sizes vary, too, and numbers that the model holds. None gets a graph that it alone
    would not have had."""
    assert called_at(4, 6, 8, 4) == (2, 2)
    assert called_at(4, 6, 8, 4) == (2, 0)
    assert called_at(4) == (1, 0)  # literal sizes, though others have gone on to symbols
    assert called_at(4, 6, scale=2.0) == (3, 1)
    assert called_at(4, 6, scale=3.0) == (3, 0)
    assert called_at(6, 8) == (2, 2)


def begins_with_pytest(rank, group):
    return "conftest" in sys.modules


def test_ranks_have_imported_what_tests_have(ranks):
    """Being forked from a process of pytest."""
    assert ranks(2, begins_with_pytest) == [True, True]
