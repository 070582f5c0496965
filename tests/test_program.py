"""Programs: several of one captured graph, and what they consist of."""

from typing import Any

import pytest
import torch
from graphs import text
from models import flux_inputs, tiny_flux
from test_replay import as_captured
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext, tracing

import piflux
from piflux.capture.captured import Captured
from piflux.compile.program import Program, make_program
from piflux.compile.segments import Segments
from piflux.graph.blocks import find_blocks
from piflux.policies.schedule import Schedule


@pytest.fixture(scope="module")
def captured():
    """A small FLUX, captured once, with what a later compilation needs of the capture."""
    found: list[tuple[Captured, TracingContext]] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append((Captured.of(gm, example_inputs), TracingContext.get()))
        return gm.forward

    model = tiny_flux(double=2, single=3)

    def call(**inputs):
        return model(**inputs)

    with torch.no_grad():
        torch.compile(call, backend=keep, fullgraph=True)(**flux_inputs())
    ((captured, context),) = found
    return captured, context


def program(captured, ranks, inner, **schedule) -> Program:
    graph, context = captured
    with tracing(context):
        return make_program(graph, Schedule(world_size=ranks.size, **schedule), ranks, inner)


def test_programs_for_any_ranks_and_policies_are_made_of_one_capture(captured):
    """The capture stays as it was, whatever is made of it."""
    before = text(captured[0].module)
    eager = lookup_backend("eager")
    made = [
        program(captured, piflux.virtual_ranks(n), eager, policy=policy)
        for n, policy in ((2, "gather"), (3, "rotate"), (2, "rotate"))
    ]
    assert [(p.schedule.world_size, p.schedule.policy) for p in made] == [
        (2, "gather"),
        (3, "rotate"),
        (2, "rotate"),
    ]
    parts = [[b.part_lengths for b in p.report.boundaries if b.verb == "shard"] for p in made]
    assert parts[0] == parts[2] != parts[1]
    assert text(captured[0].module) == before


def test_a_program_is_a_list_of_segments(captured):
    made = program(captured, piflux.virtual_ranks(2), as_captured)
    assert isinstance(made.part, Segments)
    assert [segment.name for segment in made.part.segments] == [
        "hoisted",
        "weights",
        "head",
        "collective",
    ]
    written = [number for segment in made.part.segments for number in segment.writes]
    assert len(written) == len(set(written))
    given = set(range(len(captured[0].example_inputs)))
    for segment in made.part.segments:
        assert set(segment.reads) <= given
        given |= set(segment.writes)


def test_blocks_are_found_with_their_attentions_and_parameters(captured):
    graph = captured[0].module.graph
    blocks = find_blocks(graph)
    assert [(block.kind, block.attentions) for block in blocks] == [
        *((0, (i,)) for i in range(2)),
        *((1, (i,)) for i in range(2, 5)),
    ]
    inputs = graph.find_nodes(op="placeholder")
    own = [{inputs[i].name for i in block.inputs} for block in blocks]
    assert all("transformer_blocks_modules_0" in name for name in own[0])
    assert all("single_transformer_blocks_modules_2" in name for name in own[4])
    assert len({len(names) for names in own[2:]}) == 1
    assert not set.intersection(*own)


def test_a_graph_without_repetition_has_no_blocks():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2)
    y = graph.call_function(torch.neg, (x,))
    y.meta["example_value"] = torch.empty(2)
    graph.output((y,))
    assert find_blocks(graph) == ()
