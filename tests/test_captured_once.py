"""A model that is parallelized several times is captured once, and each has programs of its own."""

import gc
import os
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from faults import LIMIT_S
from ranks import Pool
from torch import nn

import piflux
from piflux.capture import captures


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        for block in self.blocks:
            q = block(x)[:, None]
            x = x + F.scaled_dot_product_attention(q, q, q)[:, 0]
        return x


def tokens(count):
    return torch.randn(1, count, 8, generator=torch.Generator().manual_seed(count))


def over(model, size, **settings):
    group = piflux.virtual_ranks(size) if size > 1 else None
    return piflux.parallelize(model, group=group, policy="gather", inner="eager", **settings)


def programs(parallel):
    return len(parallel._piflux_compiler.programs)


def is_right(parallel, model, *counts):
    return all(torch.allclose(parallel(tokens(n)), model(tokens(n)), atol=1e-6) for n in counts)


@pytest.fixture
def captured():
    """Counts graphs that Dynamo captured."""
    with mock.patch.object(captures, "Captured", wraps=captures.Captured) as counted:
        yield lambda: counted.of.call_count


def test_groups_of_any_size_share_what_was_captured(captured):
    model = Model()
    several = [over(model, size) for size in (1, 2, 3)]
    assert all(is_right(parallel, model, 6) for parallel in (*several, *several))
    assert captured() == 1
    assert [programs(x) for x in several] == [1, 1, 1]
    sizes = [piflux.explain(x).graphs[0].schedule.world_size for x in several]
    assert sizes == [1, 2, 3]


def test_a_model_that_changed_is_captured_once_more(captured):
    """By a hook, for each that is called after it came; and when it is gone, not again."""
    model = Model()
    first, second = over(model, 2), over(model, 3)
    assert is_right(first, model, 6) and is_right(second, model, 6)
    hook = model.blocks[0].register_forward_hook(lambda module, args, given: given * 2)
    assert is_right(first, model, 6) and is_right(second, model, 6)
    assert captured() == 2
    hook.remove()
    assert is_right(first, model, 6) and is_right(second, model, 6)
    assert captured() == 2


def test_where_sizes_vary_too(captured):
    model = Model()
    first, second = over(model, 2), over(model, 3)
    assert is_right(first, model, 6, 12, 18)
    assert captured() == 2  # of 6 tokens, and of any
    assert is_right(second, model, 12, 18, 6)
    assert is_right(first, model, 6, 24)
    assert captured() == 2
    assert [programs(first), programs(second)] == [2, 1]


def asks(relation, asked):
    """An inner compiler whose programs are for sizes with the relation alone, or without it."""

    def inner(gm, example_inputs):
        sizes = {i: x for i, x in enumerate(example_inputs) if isinstance(x, torch.SymInt)}
        found = {i: bool(relation(size)) for i, size in sizes.items()}  # which makes it a guard
        asked.extend(found.values())

        def run(*args):
            assert found == {i: relation(args[i]) for i in found}
            return gm(*args)

        return run

    return inner


def test_what_a_later_program_asks_of_sizes_is_asked_at_each_call(captured):
    """Dynamo has looked only at what the first one asked."""
    model, asked = Model(), []
    any_ = over(model, 2)
    small = piflux.parallelize(model, policy="gather", inner=asks(lambda n: n < 15, asked))
    assert is_right(any_, model, 6, 12)
    assert is_right(small, model, 12) and asked == [True]
    assert captured() == 2
    assert is_right(small, model, 9)
    assert captured() == 2
    assert is_right(small, model, 20)
    assert captured() == 3 and asked == [True]  # of 20 tokens, by a capture of its own
    assert is_right(small, model, 24) and asked == [True, False]
    assert is_right(small, model, 9, 20, 24, 12) and is_right(any_, model, 6, 20, 12)
    assert asked == [True, False]


def test_a_graph_of_its_own_that_became_unfit_is_replaced(captured):
    """As where its program was made anew for fewer ranks."""
    model, asked = Model(), []
    small = piflux.parallelize(model, policy="gather", inner=asks(lambda n: n < 15, asked))
    assert is_right(over(model, 2), model, 6, 12) and is_right(small, model, 12, 20, 24)
    assert asked == [True, False] and captured() == 4
    own = small._piflux_captures.latest._own
    (graph,) = (x for x in own._graphs if x._captured.sizes._symbols)
    small._piflux_compiler.inner = asks(lambda n: n < 30, asked)
    graph.make(small._piflux_captures.latest)
    assert is_right(small, model, 24) and captured() == 4
    assert is_right(small, model, 32) and captured() == 5
    assert small._piflux_captures.latest._own is not own and not own._users
    assert is_right(small, model, 24, 12) and captured() == 6


def test_what_the_first_program_asks_of_sizes_dynamo_looks_at(captured):
    model, asked = Model(), []
    small = piflux.parallelize(model, policy="gather", inner=asks(lambda n: n < 15, asked))
    assert is_right(small, model, 6, 12)
    assert is_right(over(model, 2), model, 12, 20)
    assert captured() == 3 and asked == [True]
    assert is_right(small, model, 9, 20)
    assert asked == [True, False]


def test_programs_go_with_the_model_that_they_were_made_for():
    model = Model()
    first, second = over(model, 2), over(model, 3)
    assert is_right(first, model, 6, 8) and is_right(second, model, 6, 8)
    there = [weakref.ref(x._piflux_compiler) for x in (first, second)]
    graphs = [weakref.ref(x) for x in first._piflux_captures.latest._shared._graphs]
    del first
    gc.collect()
    assert [x() is None for x in there] == [True, False]
    assert is_right(second, model, 6, 8)
    del second
    gc.collect()
    assert there[1]() is None
    assert [x() for x in graphs] == [None, None]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_graph_outlives_who_was_first_to_call_it(captured):
    model = Model()
    first, second = over(model, 2), over(model, 3)
    assert is_right(first, model, 6)
    del first
    gc.collect()
    assert captured() == 1
    assert is_right(second, model, 6)


def test_one_that_can_not_be_made_leaves_the_others(captured):
    """A compiler that fails, whether it is the first to see the graph or not."""
    model = Model()

    def broken(gm, example_inputs):
        raise RuntimeError("no compiler")

    fails = piflux.parallelize(model, policy="gather", inner=broken)
    works = over(model, 2)
    with pytest.raises(Exception, match="no compiler"):
        fails(tokens(6))
    assert is_right(works, model, 6)
    with pytest.raises(RuntimeError, match="no compiler"):
        fails(tokens(6))
    assert is_right(works, model, 6)
    assert captured() == 2  # nothing is kept of a graph that no program was made of


def one_rank_was_first(rank, group):
    """On the first rank the graph was captured before, for a group within it."""
    model = Model()
    if rank == 0:
        assert is_right(over(model, 3), model, 6)
    parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
    return [is_right(parallel, model, n) for n in (6, 6, 12, 6)]


def test_ranks_need_not_have_captured_alike(ranks):
    assert ranks(2, one_rank_was_first) == [[True] * 4] * 2


@torch.no_grad()
def one_is_lost(rank, group):
    """After images of 6 and 12 tokens; then one of 12 by one rank alone, and the next."""
    asked, model = [], Model()
    of_two, of_one = asks(lambda n: n > 2, asked), asks(lambda n: n < 15, asked)
    parallel = piflux.parallelize(model, group=group, policy="gather", inner=of_two)
    right = [is_right(parallel, model, 6), is_right(parallel, model, 12)]
    if rank == 1:
        os._exit(1)
    parallel._piflux_compiler.inner = of_one
    for count in (12, 20, 20, 12):
        with piflux.generation(parallel):
            right.append(is_right(parallel, model, count))
    return right, asked, parallel._piflux_captures.latest._own is not None


def test_what_a_program_for_fewer_ranks_asks_of_sizes():
    """Dynamo has looked at what the one for more ranks asked."""
    with Pool(2) as pool:
        (right, asked, has_own), ended = pool.run(2, one_is_lost, timeout=LIMIT_S)
    assert ended.died and right == [True] * 6
    assert asked[:3] == [True, True, True] and has_own  # two were of the program's two pieces
