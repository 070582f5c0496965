"""A graph that is read from its text is the one that was written, to passes too."""

import pytest
import torch
from graphs import capture, parsed, text, transformed
from test_passes import Block, Model, Timed, Turned

from piflux.graph.nodes import op_name

EXAMPLES = {
    "joint": (Model, (torch.randn(1, 4, 8), torch.randn(1, 7, 8))),
    "timed": (Timed, (torch.randn(1, 7, 8), torch.ones(1))),
    "block": (Block, (torch.randn(1, 6, 4),)),
    "rotary": (Turned, (torch.randn(1, 6, 8), torch.rand(6, 4), torch.rand(6, 4))),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_is_read(name):
    make, inputs = EXAMPLES[name]
    captured = capture(make(), *inputs)
    read = parsed(text(captured, parameters=True))
    read.graph.lint()
    assert text(read) == text(captured)
    assert text(read, parameters=True) == text(captured, parameters=True)
    ops = [[op_name(node) for node in gm.graph.nodes] for gm in (captured, read)]
    assert ops[0] == ops[1]
    for gm in (captured, read):
        transformed(gm)
    assert text(read) == text(captured)
    assert "piflux.cached_sdpa(" in text(read)


def test_what_is_read_must_be_so():
    with pytest.raises(AssertionError, match="y is \\(1, 6, 16\\), not \\(1, 6, 8\\)"):
        parsed("x: (1, 6, 8)\ny: (1, 6, 8) = cat([x, x], -1)\nreturn (y,)")
    with pytest.raises(AssertionError, match="x is written twice"):
        parsed("x: (1, 6, 8)\nx: (1, 6, 8) = mul(x, 2)\nreturn (x,)")
