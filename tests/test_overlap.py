"""Keys and values are sent as soon as they exist, and other work fills the time they travel."""

# ruff: noqa: E501 (snapshots)

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from graphs import capture, text, transformed
from models import flux_inputs, tiny_flux
from test_numerics import EXACT, needs_compiler, sample
from torch import fx, nn
from torch._inductor.utils import run_and_get_code

import piflux
from piflux.compile.compiler import Compiler
from piflux.graph.nodes import op_name
from piflux.passes.split.layout import layout
from piflux.passes.split.overlap import overlap
from piflux.policies.schedule import Schedule
from piflux.policies.step import current
from piflux.ranks.virtual import VirtualRanks
from piflux.runtime.runtime import Runtime
from piflux.runtime.streams import Roles


class Block(nn.Module):
    """As FLUX's single blocks have it: `order` says what is written before the attention."""

    def __init__(self, order="mqkv", between=lambda x: x, turned=lambda y, x: y):
        super().__init__()
        self.order = order
        self.between = between
        self.turned = turned
        self.w = nn.ParameterDict({name: torch.eye(4) for name in "mqkv"})

    def forward(self, x):
        def attend():
            q, k = (self.turned(made[name], x)[:, None] for name in "qk")
            return F.scaled_dot_product_attention(q, k, made["v"][:, None])[:, 0]

        made = {}
        for name in self.order:
            made[name] = attend() if name == "a" else F.linear(self.between(x), self.w[name])
        return x + made.get("a", 0) + made["m"] if "a" in made else x + attend() + made["m"]


class Blocks(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def overlapped(model, dynamic=False):
    gm = capture(model, torch.randn(1, 6, 4), dynamic=dynamic)
    transformed(gm)
    gm.graph.lint()
    return gm


def ops(gm):
    """The order of projections, sends and attentions: by the parameter's letter, '>' and 'a'."""
    letters = []
    for node in gm.graph.nodes:
        if op_name(node) == "linear":
            letters.append(node.args[1].name.strip("_")[-1])
        elif "piflux" in str(node.target):
            name = str(node.target).split(".")[1]
            letters += {"send_kv": ">", "cached_sdpa": "a"}.get(name, "")
    return "".join(letters)


class TestOverlap(TestCase):
    def test_static(self):
        self.assertExpectedInline(
            text(overlapped(Block())),
            """\
x: (1, 6, 4)
x_part: (1, 3, 4) = piflux.shard(x, 1, [6], 2)
linear_2: (1, 3, 4) = linear(x_part, w.k)
linear_3: (1, 3, 4) = linear(x_part, w.v)
k: (1, 1, 3, 4) = getitem(linear_2, (:, None))
getitem_2: (1, 1, 3, 4) = getitem(linear_3, (:, None))
sent: (1) = piflux.send_kv(k, getitem_2, 0, 2)
linear: (1, 3, 4) = linear(x_part, w.m)
linear_1: (1, 3, 4) = linear(x_part, w.q)
q: (1, 1, 3, 4) = getitem(linear_1, (:, None))
scaled_dot_product_attention: (1, 1, 3, 4) = piflux.cached_sdpa(q, k, getitem_2, None, None, False, [6], 0, 2, sent)
getitem_3: (1, 3, 4) = getitem(scaled_dot_product_attention, (:, 0))
add: (1, 3, 4) = add(x_part, getitem_3)
add_1: (1, 3, 4) = add(add, linear)
add_1_whole: (1, 6, 4) = piflux.unshard(add_1, 1, [6], 2)
return (add_1_whole,)
""",
        )

    def test_dynamic(self):
        self.assertExpectedInline(
            text(overlapped(Block(), dynamic=True)),
            """\
s27: s27
x: (1, s27, 4)
x_part: (1, ((s27 + 1)//2), 4) = piflux.shard(x, 1, [s27], 2)
linear_2: (1, ((s27 + 1)//2), 4) = linear(x_part, w.k)
linear_3: (1, ((s27 + 1)//2), 4) = linear(x_part, w.v)
k: (1, 1, ((s27 + 1)//2), 4) = getitem(linear_2, (:, None))
getitem_2: (1, 1, ((s27 + 1)//2), 4) = getitem(linear_3, (:, None))
sent: (1) = piflux.send_kv(k, getitem_2, 0, 2)
linear: (1, ((s27 + 1)//2), 4) = linear(x_part, w.m)
linear_1: (1, ((s27 + 1)//2), 4) = linear(x_part, w.q)
q: (1, 1, ((s27 + 1)//2), 4) = getitem(linear_1, (:, None))
scaled_dot_product_attention: (1, 1, ((s27 + 1)//2), 4) = piflux.cached_sdpa(q, k, getitem_2, None, None, False, [s27], 0, 2, sent)
getitem_3: (1, ((s27 + 1)//2), 4) = getitem(scaled_dot_product_attention, (:, 0))
add: (1, ((s27 + 1)//2), 4) = add(x_part, getitem_3)
add_1: (1, ((s27 + 1)//2), 4) = add(add, linear)
add_1_whole: (1, s27, 4) = piflux.unshard(add_1, 1, [s27], 2)
return (add_1_whole,)
""",
        )


@pytest.mark.parametrize(
    "orders, want",
    [
        (["mqkv", "qvkm"], "kv>mqavk>qma"),
        (["mqkv", "mqkv"], "kv>mqakv>mqa"),
        # Written behind the attention, an MLP fills the time if it is its block's own.
        (["mqkv", "qkvam"], "kv>mqakv>qma"),
        (["qkvam", "qkvam"], "kv>qamkv>qma"),
    ],
)
def test_order(orders, want):
    assert ops(overlapped(Blocks(*map(Block, orders)))) == want


def test_attentions_side_by_side_travel_together():
    """The second one's keys are sent before the first's are waited for."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Block("qkvam"), Block("qkvam")

        def forward(self, x):
            x = Block.forward(self.a, x)
            return self.a(x) + self.b(x)

    assert ops(overlapped(Twins())) == "kv>qamkv>qmqkv>ama"


# --------------------------------------------------------------------------------- what is no match


def test_attention_to_conditions_sends_nothing():
    """Their keys and values are whole on every rank."""

    def cross(x, prompt):
        q, c = x[:, None], prompt[:, None]
        own = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(own, c, c)

    gm = capture(cross, torch.randn(1, 6, 8), torch.randn(1, 5, 8))
    transformed(gm)
    assert text(gm).count("piflux.send_kv(") == 1


def test_without_rewritten_attention_nothing_moves():
    gm = capture(Block(), torch.randn(1, 6, 4))
    ctx = transformed(gm, passes=(layout,))
    before = str(gm.graph)
    assert overlap(gm, ctx) == 0
    assert str(gm.graph) == before


# ------------------------------------------------------------------------------- what is left alone


def in_place(x):
    return (x * 2).add_(1)


def random(x):
    return x + torch.rand(4)


def in_a_mode(x):
    with torch.autocast("cpu", enabled=False):
        return x * 2


@pytest.mark.parametrize("between", [in_place, random, in_a_mode])
def test_nothing_moves_past_what_does_more_than_compute(between):
    """Each projection is preceded by such a node, so all stay in the order they were written in."""
    assert ops(overlapped(Block("mqkv", between))) == "mqkv>a"


# ---------------------------------------------------------------------------------- what it is for


class Alone(VirtualRanks):
    """A rank of two whose peer holds the same; it writes down what happens."""

    in_one_process = False

    def __init__(self):
        super().__init__(2)
        self.events = []

    def gather(self, piece, header=None):
        return Late(piece, self.events)

    def persistent_gather(self, count, device):
        return Late(torch.empty(count, dtype=torch.uint8), self.events)

    def run(self, step):
        return step()

    def inner(self, gm, example_inputs):
        """Runs graphs as they are."""

        return Told(gm, self.told).run

    def told(self, target):
        if "linear" in str(target):
            self.events.append("linear")


class Told(fx.Interpreter):
    """Tells of each node before it runs."""

    def __init__(self, gm, tell):
        super().__init__(gm)
        self.tell = tell

    def run_node(self, node):
        self.tell(node.target)
        return super().run_node(node)


class Late:
    """What was to be gathered is read when it is waited for."""

    whole, recordable = None, False

    def __init__(self, piece, events):
        self.piece = piece
        self.events = events

    def start(self):
        self.events.append("start")
        return self

    def wait(self):
        self.events.append("wait")
        self.pieces = [self.piece.clone()] * 2
        return self.pieces


def compiled(model, ranks, inner, policy):
    schedule = Schedule(policy=policy, sync_steps=1, world_size=2, order=0)
    compiler = Compiler(schedule, ranks, inner)
    return compiler, torch.compile(model, backend=compiler, fullgraph=True)


def test_work_between_start_and_wait():
    """Of FLUX: the queries' projections of both streams, or the query's and the MLP's."""
    ranks = Alone()
    _, model = compiled(tiny_flux(double=2, single=2), ranks, ranks.inner, "gather")
    with torch.no_grad():
        sample(model)(**flux_inputs())
    told = " ".join(ranks.events)
    assert told.count("start linear linear wait") == 4
    assert ranks.events.count("start") == ranks.events.count("wait") == 4 + 1  # the prediction


@needs_compiler
def test_inductor_keeps_the_order():
    """Its passes for locality and memory, and its fusions, would undo it."""
    blocks = Blocks(*(Block(turned=lambda y, x: y * x.cos()) for _ in range(3)))
    _, model = compiled(blocks, Alone(), "inductor", "gather")
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(model, torch.randn(1, 6, 4))
    code = next(code for code in codes if "send_kv.default(" in code)
    calls = re.findall(
        r"(?:extern_kernels|torch\.ops\.piflux)\.(\w+).*\(", code.split("def call(")[1]
    )
    # Keys and values are one product, and what can be computed beside them another.
    assert calls == ["mm", "send_kv", "mm", "cached_sdpa"]


def test_what_travels_on_is_a_copy():
    """Compilers reuse the memory of keys that attention has read."""
    runtime = Runtime(Schedule(policy="displaced", world_size=2, sync_steps=1, order=0), Alone())
    roles = Roles((0,), (), (), {0: "x"})

    def attend(fresh):
        context = current()
        context.policy.send(context, 0, (fresh, fresh))
        return context.policy.attend(context, 0, (fresh, fresh), (6,), ordered=True)

    with runtime.generation():
        for number in range(3):
            fresh = torch.full((1, 1, 3, 4), float(number))
            with runtime.call(None, roles, (torch.zeros(6),)) as call:
                read = call.run(partial(attend, fresh))
            fresh.fill_(torch.nan)
    own, peers = read[0][0, 0].split(3)
    assert (own == 2).all() and (peers == 1).all()


def test_an_exception_between_leaves_nothing_behind():
    """What was sent is forgotten with the step, and the next generation begins afresh."""

    class Fails(Alone):
        fails = True

        def told(self, target):
            super().told(target)
            if self.fails and self.events[-2:] == ["start", "linear"]:
                raise MemoryError

    ranks = Fails()
    compiler, model = compiled(Blocks(Block(), Block()), ranks, ranks.inner, "gather")
    x = torch.randn(1, 6, 4)
    with torch.no_grad():
        with pytest.raises(MemoryError):
            model(x)
        assert not compiler.runtime.streams
        ranks.fails = False
        want = model(x)
        assert torch.equal(model(x), want)


# ----------------------------------------------------------------------------------------- numerics


def step(rank, group, x):
    torch.manual_seed(0)
    blocks = Blocks(Block("mqkv"), Block("qkvam"), Block("vkqm"))
    return piflux.parallelize(blocks, group=group, policy="gather", inner="eager")(x)


@pytest.mark.parametrize("world_size", [2, 3])
def test_numerics(virtual, world_size):
    torch.manual_seed(1)
    x = torch.randn(1, 7, 4)
    want = step(0, piflux.virtual_ranks(1), x)
    for got in virtual(world_size, step, x):
        assert (got - want).abs().max() <= EXACT
