"""einops in both its forms: traced through by Dynamo, or closed in its graphs."""

from types import FunctionType

import einops
import pytest
import torch
from graphs import capture, transformed
from test_rules import assert_exact, attend

from piflux.compile.program import FIRST, PASSES
from piflux.errors import CannotShard


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


NAMES = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack")


def closed(function):
    """As einops before 0.8.2 has it: allowed in graphs as it is."""
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    made.__kwdefaults__, made.__module__ = function.__kwdefaults__, function.__module__
    return torch._dynamo.allow_in_graph(made)


@pytest.fixture(params=["closed", "as installed"])
def ops(request):
    functions = {name: getattr(einops, name) for name in NAMES}
    if request.param == "closed":
        functions = {name: closed(function) for name, function in functions.items()}
    return functions


def model(x, weight, ops):
    heads = ops["rearrange"](attend(x), "b l (h d) -> b h l d", h=2)
    y = attend(ops["rearrange"](heads, "b h l d -> b l (h d)"))
    half = ops["reduce"](y, "b l (r d) -> b l d", "mean", r=2)
    y = attend(y + ops["repeat"](half, "b l d -> b l (r d)", r=2))
    joined, lengths = ops["pack"]([y, attend(2 * y)], "b * d")
    first, second = ops["unpack"](attend(joined), lengths, "b * d")
    y = ops["rearrange"]([first, second], "n b l d -> n b l d")[1]
    return attend(ops["einsum"](y, weight, "b l d, e d -> b l e"))


def test_exact(ops):
    for n in (2, 3):
        assert_exact(lambda x, w: model(x, w, ops), 0.1 * torch.randn(1, 7, 8), torch.eye(8), n=n)


def test_symbolic_sizes(ops):
    def model(x, y):
        both, lengths = ops["pack"]([x, y], "b * d")
        x, y = ops["unpack"](attend(both), lengths, "b * d")
        return attend(ops["rearrange"](x, "b (l k) d -> b l (k d)", l=x.shape[1]))

    gm = capture(model, torch.randn(1, 7, 8), torch.randn(1, 5, 8), dynamic=True)
    transformed(gm, passes=(*FIRST, *PASSES))


def test_refused(ops):
    """Tokens that become channels, at the line that has them so."""

    def mixed(x):
        y = ops["rearrange"](attend(x), "b (l k) d -> b l (k d)", k=2)
        return attend(y)

    gm = capture(mixed, torch.randn(1, 8, 8))
    with pytest.raises(CannotShard, match=r"mixes tokens(?s:.*)test_einops.py"):
        transformed(gm, passes=(*FIRST, *PASSES))
