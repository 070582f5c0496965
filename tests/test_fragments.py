"""Models of which Dynamo makes several graphs: each is split, and all are of one step."""

import gc
import logging
import re
import weakref
from functools import partial
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import piflux
from piflux.compile import compiler
from piflux.errors import CannotShard, NoAttention, RanksDisagree
from piflux.ranks.agreement import Constants, Roughly
from piflux.runtime.fragments import Fragment, Graphs, Ran

DIM = 8
STEPS = 4
EXACT = 1e-5


class Model(nn.Module):
    """Three blocks of attention, each in a graph of its own, and what depends on the time.

    `breaks` ends a graph, as whatever Dynamo can't follow does.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(3))
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x, t, prompt):
        x = self.head(x) + t[:, None, None]  # nothing to split
        for block in self.blocks:
            x = self.step(block, torch.cat([prompt, x], 1))[:, prompt.shape[1] :]
        return self.head(x)

    def step(self, block, x):
        torch._dynamo.graph_break()
        q, k, v = block(x)[:, None].chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v)[:, 0]


class OnData(Model):
    """Branches on data, as models of videos do on masks; a branch has attention of its own."""

    def step(self, block, x):
        if x.sum() > 1e9:
            x = x + 1
        return super().step(block, x)


class Valid(Model):
    """Only the prompt's tokens that are not zero take part, and zeros fill up what they leave."""

    def step(self, block, x):
        keep = torch.nonzero(x[0, :, 0], as_tuple=False).flatten()
        q, k, v = block(x[:, keep])[:, None].chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + F.pad(out, (0, 0, x.shape[1] - out.shape[1], 0))


def inputs(prompt=0, time=0.9):
    """Latents, a time and one of several prompts."""
    text = torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(prompt))
    return torch.ones(1, 12, DIM).cumsum(1) / 12, torch.full((1,), time), text


def parallel(model, n=2, policy="rotate"):
    return piflux.parallelize(model, group=piflux.virtual_ranks(n), policy=policy, inner="eager")


def off(model, got, args):
    with torch.no_grad():
        return (got - model(*args)).abs().max().item()


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("cls", [Model, OnData, Valid])
def test_exact(cls, n):
    model, args = cls().eval(), inputs()
    if cls is Valid:
        args[2][:, 0] = -model.head.bias[0]  # anything
        args[2][:, 1] = 0
    split = parallel(model, n, "gather")
    assert off(model, split(*args), args) < EXACT
    assert sum(graph.attentions for graph in piflux.explain(split).graphs) >= 1


def test_blocks_that_share_a_graph_remember_each_their_own():
    """Of a still image what is remembered is fresh; another block's would not be."""
    model, args = Model().eval(), inputs()
    split = parallel(model)
    with piflux.generation(split):
        for _ in range(STEPS):
            assert off(model, split(*args), args) < EXACT
    assert "no one graph" in str(piflux.explain(split))


class Block(nn.Module):
    """Projections that are fused, and one of the time, in a graph that all blocks share."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.time = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x, t):
        torch._dynamo.graph_break()
        y = x * (1 + self.time(t[:, None].expand(-1, DIM))[:, None])
        q, k, v = (layer(y)[:, None] for layer in (self.q, self.k, self.v))
        return x + F.scaled_dot_product_attention(q, k, v)[:, 0]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, t, prompt):
        for block in self.blocks:
            x = block(torch.cat([prompt, x], 1), t)[:, prompt.shape[1] :]
        return x


def test_weights_and_products_of_the_time_are_each_blocks_own():
    """Compiled, with times that are known, in two images."""
    model = Blocks().eval()
    split = piflux.parallelize(
        model, group=piflux.virtual_ranks(2), policy="gather", inner="inductor"
    )
    times = [0.9, 0.7]
    for _ in range(2):
        with piflux.generation(split, timesteps=torch.tensor(times)):
            for time in times:
                args = inputs(time=time)
                assert off(model, split(*args), args) < EXACT
    assert len(piflux.explain(split).graphs) == 1


def test_all_fragments_are_at_the_step_of_the_call():
    """Of two passes a step, whose first fragment knows neither the time nor the prompt."""
    split = parallel(Model().eval())
    with piflux.generation(split):
        for step in range(STEPS):
            for prompt in (0, 1):
                x, t, text = inputs(prompt, 1 - step / 10)
                split(x + step / 10, t, text)
        streams = list(split._piflux_compiler.runtime.streams)
        leaders = [stream for stream in streams if stream.leader is None]
        assert [stream.index for stream in leaders] == [STEPS - 1] * 2
        followers = [stream for stream in streams if stream.leader is not None]
        assert len(followers) == 2 * len(Model().blocks)
        assert {stream.index for stream in followers} == {STEPS - 1}
    assert not any("no steady step" in note for note in piflux.explain(split).notes)


def test_another_image_begins_anew():
    """Where nobody says so, as the time goes back."""
    model = Model().eval()
    split = parallel(model)
    for _ in range(2):
        for step in range(3):
            x, t, text = inputs(time=0.9 - step / 10)
            args = x + step / 100, t, text
            got = split(*args)
            if step == 0:
                assert off(model, got, args) < EXACT


class Skips(Model):
    """Leaves blocks out where it is told to."""

    def forward(self, x, t, prompt, skip=False):
        return super().forward(x, t, prompt) if not skip else self.head(x)


def test_a_fragment_that_was_left_out_of_a_step_remembers_nothing():
    model = Skips().eval()
    split = parallel(model)
    with piflux.generation(split):
        for step in range(5):
            x, t, text = inputs(time=1 - step / 10)
            args = x * (1 + step), t, text
            got = split(*args, step in (1, 2))
            if step in (0, 3):
                assert off(model, got, args) < EXACT
        assert off(model, got, args) > EXACT  # it remembers the step before


def test_a_step_that_is_not_computed_runs_no_fragment():
    split = piflux.parallelize(
        Model().eval(), group=piflux.virtual_ranks(2), compute="xx.x", inner="eager"
    )
    with piflux.generation(split):
        given = [split(*inputs(time=0.9 - step / 100)) for step in range(4)]
        streams = list(split._piflux_compiler.runtime.streams)
    assert [stream.index for stream in streams if stream.leader is None] == [3]
    assert {stream.index for stream in streams if stream.leader is not None} == {2}
    assert all(not x.equal(given[2]) for x in (given[0], given[1], given[3]))
    assert off(Model().eval(), given[2], inputs(time=0.88)) < 0.02


def test_no_fragment_has_attention():
    class Plain(Model):
        def step(self, block, x):
            torch._dynamo.graph_break()
            return x + block(x)[..., :DIM]

    with pytest.raises(NoAttention, match=r"(?s)none of the \d graphs.*graph_break"):
        parallel(Plain().eval())(*inputs())


def test_attention_that_dynamo_leaves_out_of_all_graphs():
    class Hidden(Model):
        @torch._dynamo.disable
        def step(self, block, x):
            q = block(x)[:, None, :, :DIM]
            return F.scaled_dot_product_attention(q, q, q)[:, 0]

    with pytest.raises(NoAttention, match=r"(?s)because of:.*disable.*in none of them"):
        parallel(Hidden().eval())(*inputs())


def test_a_fragment_that_cannot_be_split_is_refused():
    class Mixes(Model):
        def step(self, block, x):
            torch._dynamo.graph_break()
            for _ in range(2):
                x = block(x)[:, None, :, :DIM].softmax(2)
                x = F.scaled_dot_product_attention(x, x, x)[:, 0]
            return x

    with pytest.raises(CannotShard, match="mixes tokens"):
        parallel(Mixes().eval())(*inputs())


def test_nothing_of_the_first_call_is_kept():
    """Why it broke is, but not the frames that it broke in; and no cache outlives the module."""
    split = parallel(OnData().eval())
    args = inputs()
    with piflux.generation(split):
        split(*args)
        streams = [weakref.ref(stream) for stream in split._piflux_compiler.runtime.streams]
    latents = weakref.ref(args[0])
    del args
    gc.collect()
    assert latents() is None
    del split
    gc.collect()
    assert not any(stream() for stream in streams)


def test_hooks_that_come_and_go():
    """Each of two sets of hooks has fragments of its own, which are kept."""
    model, args = Model().eval(), inputs()
    split = parallel(model)

    def double(module, args, out):
        return out * 2

    made = []
    for _ in range(3):
        assert off(model, split(*args), args) < EXACT
        with model.blocks[1].register_forward_hook(double):
            assert off(model, split(*args), args) < EXACT
        made.append(list(split._piflux_compiler.programs))
    assert made[1:] == made[:-1]


def test_fragments_outlive_a_call_that_fails(monkeypatch):
    """As by want of memory: the next one need not capture them anew."""
    model, args = Model().eval(), inputs()
    split = parallel(model)
    run, add = compiler.Compiler.run, compiler.Compiler.add
    added, ran = [], count()

    def failing(self, number, args):
        if next(ran) == 2:
            raise torch.OutOfMemoryError("as asked")
        return run(self, number, args)

    def noted(self, *args):
        added.append(add(self, *args))
        return added[-1]

    monkeypatch.setattr(compiler.Compiler, "run", failing)
    monkeypatch.setattr(compiler.Compiler, "add", noted)
    with pytest.raises(torch.OutOfMemoryError):
        split(*args)
    already = len(added)
    assert off(model, split(*args), args) < EXACT
    again = parallel(model)
    ran, added[:] = count(3), added[already:]
    rest, added[:] = len(added), []
    assert off(model, again(*args), args) < EXACT
    assert already and already + rest == len(added)


def test_it_is_said_once(caplog):
    split = parallel(OnData().eval())
    with caplog.at_level(logging.WARNING, "piflux"):
        split(*inputs())
        split(*inputs(1))
    assert len([x for x in caplog.records if "no one graph" in x.getMessage()]) == 1


def test_in_a_process_that_computes_one_rank_alone():
    model, args = OnData().eval(), inputs()
    alone = piflux.parallelize(model, inner="eager")
    assert off(model, alone(*args), args) == 0


def test_fragments_are_recorded_apart(monkeypatch):
    """What one returns is read after another has run, so that they share no memory."""
    sites, make = [], compiler.make_program

    def noted(*args):
        sites.append(args[-1])
        return make(*args)

    monkeypatch.setattr(compiler, "make_program", noted)
    split = parallel(Model())
    with torch.no_grad(), piflux.generation(split):
        split(*inputs())
    assert sites and split._piflux_compiler._site not in sites


class Odd(Model):
    """Whose rank 1 computes something else, in one of several places, once it is told so."""

    where = ""

    def forward(self, x, t, prompt):
        x = super().forward(x, t, prompt)  # which Dynamo leaves out of all graphs
        return x * 2 if self.where == "after" else x

    def step(self, block, x):
        torch._dynamo.graph_break()
        q, k, v = block(self.between(x))[:, None].chunk(3, -1)
        if self.where == "branch":
            v = v * 2
        return x + F.scaled_dot_product_attention(q, k, v)[:, 0]

    @torch._dynamo.disable
    def between(self, x):
        return x * 2 if self.where == "between" else x


def told_of_others(rank, group):
    """What each rank is told where rank 1 computes something else, from some step of an image on.

    And how far the images between these were off.
    """
    model, told, off_by = Odd().eval(), {}, []
    split = piflux.parallelize(model, group=group, policy="gather", inner="eager")

    def image(where="", since=0):
        with piflux.generation(split):
            for step in range(2):
                if rank == 1 and step == since:
                    model.where = where
                args = inputs(time=0.9 - step / 10)
                got = split(*args)
        return off(model, got, args)

    def hooked():
        with model.blocks[1].register_forward_hook(lambda _, args, out: out * 2):
            image()

    off_by.append(image())
    for name, draw in {
        "a hook": hooked if rank == 1 else image,
        "a branch": partial(image, "branch"),
        "a branch, later": partial(image, "branch", 1),
        "between": partial(image, "between"),
        "after": partial(image, "after"),
        "after, later": partial(image, "after", 1),
    }.items():
        with pytest.raises(RanksDisagree) as raised:
            draw()
        told[name] = str(raised.value)
        model.where = ""
        off_by.append(image())
    return told, max(off_by)


def test_ranks_whose_fragments_differ_are_told(ranks):
    """They exchange what fits: all ranks would have the same wrong image."""
    for told, off_by in ranks(2, told_of_others):
        assert off_by < EXACT
        for name, text in told.items():
            lines = text.splitlines()
            assert "hooks and code" in lines[-1]
            if "after" in name:
                assert re.match(
                    r"  output 1 of (call 1 of image \d|the last step, pass 1)", lines[1]
                )
                assert "rank 0: norm" in lines[2] and "rank 1: norm" in lines[3]
                continue
            assert re.match(r"  graph \d of call \d of image \d", lines[1])
            assert ("other than in the first call" in lines[1]) == ("later" in name)
            if "later" in name:
                continue
            assert "block(" in lines[2]
            ops = [
                re.match(r"    rank \d: operations (\d+, \w+), constants \w+; ", x)[1]
                for x in lines[2:4]
            ]
            assert (ops[0] == ops[1]) == (name == "between")
        assert len(told["a hook"].splitlines()) == 5  # the other two blocks' graphs are the same


def test_later_calls_are_compared_where_they_are_not_as_the_first():
    same = Constants("5")
    first, other = Fragment("9, a", same, "x.py:1"), Fragment("9, b", same, "x.py:2")
    graphs = Graphs(measures=False)
    for fragment in (first, other, other):
        graphs.add(fragment, ())
    assert graphs.others((first, other, other), "call 3") == {}
    unknown = Fragment("9, a", Constants(), "x.py:1")  # a number of it became a symbol
    assert graphs.others((unknown, other, other), "call 3") == {}
    changed = Fragment("9, a", Constants("6"), "x.py:1")
    assert len(graphs.others((changed, other, other), "call 3")) == 1
    named = graphs.others((first, first), "call 3")
    assert list(named) == [
        "graph 2 of call 3, other than in the first call",
        "graphs of call 3, other than in the first call",
    ]
    assert named["graphs of call 3, other than in the first call"] == "3"


@pytest.mark.parametrize("mine, theirs, differ", [(1, 1.01, False), (1, 1.03, True)])
def test_what_a_graph_was_called_with_may_differ_by_rounding(mine, theirs, differ):
    here = Ran(Fragment("1, a", Constants("5"), "/one/x.py:1"), (Roughly(mine),))
    there = Ran(Fragment("1, a", Constants("5"), "/another/x.py:1"), (Roughly(theirs),))
    assert here.differs(there) == differ
    assert here.differs(Ran(here.fragment, ()))
