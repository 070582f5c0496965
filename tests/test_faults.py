"""What a fault of one rank makes of the image, and of the next one; `faults.py` runs many more."""

import math
import os
import socket
import threading
from contextlib import contextmanager, nullcontext
from itertools import count, cycle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captures import captured_once
from faults import COMPILING, KINDS, LIMIT_S, LOST, MEASURING, Fault, faults, try_out
from models import flux_inputs, tiny_flux
from ranks import Pool
from test_fragments import Model
from test_fragments import inputs as fragments_inputs
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.guards import CheckFunctionManager

import piflux
from piflux.compile import compiler
from piflux.compile.choices import Choices
from piflux.errors import RankFailed, RankLost, RanksDisagree
from piflux.integrations.alike import SameWeights, _scales
from piflux.ranks import environment
from piflux.ranks.agreement import Norm
from piflux.ranks.board import Answer, Board, Silent, bounded
from piflux.ranks.epochs import Epoch
from piflux.ranks.groups import resolve_group
from piflux.ranks.links import Link
from piflux.ranks.meeting import Meeting
from piflux.ranks.presence import HURRY_S, Wait
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.waiting import SURE, Waiting

SOME = [
    Fault("killed", "rotate", 2, 0, 0, None),
    Fault("killed", "gather", 3, 1, 2, 1),
    Fault("ended", "displaced", 2, 1, 4, 2),
    Fault("stopped", "rotate", 2, 1, 3, None),
    Fault("stopped", "gather", 3, 0, 2, 1),
    Fault("raises", "gather", 3, 2, 3, 1),
    Fault("interrupted", "rotate", 2, 0, 2, None),
    Fault("out of memory", "displaced", 2, 1, 1, 0),
    Fault("noise", "rotate", 2, 1, 3, None),
    Fault("prompt", "displaced", 3, 1, 4, None),
    Fault("prompt", "gather", 2, 1, 1, None),  # before any condition has come twice
    Fault("prompt", "rotate", 3, 2, 1, None),
    Fault("clock", "gather", 2, 0, 2, None),
    Fault("weights", "rotate", 2, 1, 0, None),
    Fault("skips", "rotate", 2, 0, 2, None),
    Fault("leaves", "rotate", 2, 1, 4, None),
    Fault("leaves", "gather", 2, 0, 0, None),
    Fault("same nan", "rotate", 2, 0, 0, None),
    Fault("killed", "auto", 3, 2, MEASURING, 1),
    Fault("stopped", "auto", 3, 1, MEASURING, None),
    Fault("raises", "auto", 2, 0, MEASURING, 2),
    Fault("interrupted", "auto", 2, 1, COMPILING, None),
]


@pytest.mark.parametrize("fault", SOME, ids=str)
def test_a_fault_is_told_or_outlived(fault):
    """Nothing silent, nothing stuck; an image outlives a rank, and the next one is right."""
    judged = try_out(fault)
    assert not judged.bad, "\n".join(judged.told)
    told = "\n".join(judged.told)
    if fault.kind in ("raises", "interrupted", "out of memory"):
        at = {MEASURING: "the measurement", COMPILING: "the model's capture"}.get(
            fault.step, "step"
        )
        assert f"RankFailed: rank {fault.rank} stopped in {at}" in told
    left = {"killed": fault.size - 1, "ended": fault.size - 1}.get(fault.kind)
    if left is not None:  # one alone, too: in the next image it has a program again
        assert told.count(f"programs for [{left}]") == left
    if fault.kind == "stopped":
        assert f"rank {fault.rank}, image 2: Excluded" in told
    if fault.kind in ("noise", "prompt", "clock", "weights", "skips", "leaves"):
        assert "RanksDisagree" in told
        assert not judged.right


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


MASK = "xxxx.x.x"


@torch.no_grad()
def skipping(model, seed, dies_at=None):
    """Latents of an image some of whose steps are skipped."""
    inputs = flux_inputs(seed=seed)
    x, times = inputs.pop("hidden_states"), torch.linspace(1, 0, len(MASK) + 1)[:-1]
    with piflux.generation(model, timesteps=times):
        for i in range(len(MASK)):
            if i == dies_at:
                os._exit(1)
            step = dict(inputs, hidden_states=x, timestep=times[i : i + 1])
            x = x - model(**step, return_dict=False)[0] / len(MASK)
    return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        return x + F.scaled_dot_product_attention(*self.project(x).chunk(3, -1))


@torch.no_grad()
def off_by_inductor(model, seed):
    """How far an image of two steps is from the plain model's."""
    x = y = torch.randn(1, 1, 12, 8, generator=torch.Generator().manual_seed(seed))
    with piflux.generation(model):
        for _ in range(2):
            x, y = model(x), Layer()(y)
    return float((x - y).abs().max())


@captured_once()
def left_alone(rank, group):
    """Two images after the one in which the other rank ended."""
    compiled = piflux.parallelize(Layer(), group=group, policy="gather", inner="eager")
    assert off_by_inductor(compiled, 0) < 1e-5
    options = {"compute": MASK, "inner": "eager"}
    model = piflux.parallelize(tiny_flux(), group=group, **options)
    got = [skipping(model, seed, 4 if rank == 1 and not seed else None) for seed in range(3)]
    plain = piflux.parallelize(tiny_flux(), group=piflux.virtual_ranks(1), **options)
    off = [float((x - skipping(plain, seed)).abs().max()) for seed, x in enumerate(got)][1:]
    uncompiled = off_by_inductor(compiled, 1)
    # Not before, for it to compile no program of two ranks, too.
    inner = mock.Mock(wraps=lookup_backend("inductor"))
    with mock.patch.object(compiled._piflux_compiler, "inner", inner):
        off += [uncompiled, *(off_by_inductor(compiled, seed) for seed in (2, 3))]
    return off, inner.call_count, len(compiled._piflux_compiler.programs)


def test_one_rank_alone_draws_as_one_rank_does():
    """From the next image on: by a program of its own, which skips the steps that it is to skip.

    So it is where inductor compiles it.
    """
    with Pool(2) as pool:
        (off, compiled, programs), ended = pool.run(2, left_alone, timeout=LIMIT_S)
    assert ended.died and max(off) < 1e-5
    assert compiled and programs == 1


def in_fragments(model, seed, dies_at=None):
    """Latents of an image; the rank ends in so many-th gather of its third step."""
    x, _, prompt = fragments_inputs(seed)
    number, original = count(), Link.gather

    def gather(link, *args):
        if i == 2 and next(number) == dies_at:
            os._exit(1)
        return original(link, *args)

    with mock.patch.object(Link, "gather", gather), piflux.generation(model):
        for i in range(5):
            x = x - model(x, torch.full((1,), 1 - i / 5), prompt) / 5
    return x


@torch.no_grad()
def left_in_fragments(rank, group):
    """Likewise, of a model in several graphs; the rank is lost in the midst of a call."""
    model = piflux.parallelize(Model(), group=group, policy="gather", inner="eager")
    got = [in_fragments(model, seed, 1 if rank == 1 and not seed else None) for seed in range(3)]
    plain = piflux.parallelize(Model(), group=piflux.virtual_ranks(1), inner="eager")
    apart = [float((x - in_fragments(plain, seed)).abs().max()) for seed, x in enumerate(got)]
    return apart, [program.schedule.world_size for program in model._piflux_compiler.programs]


def test_one_rank_alone_draws_a_model_in_fragments():
    with Pool(2) as pool:
        (apart, programs), ended = pool.run(2, left_in_fragments, timeout=LIMIT_S)
    assert ended.died and max(apart) < 1e-5
    assert set(programs) == {1}


def after_a_failed_image(rank, group):
    """Rank 1 comes first to what follows it, rank 0 once that waits."""
    ranks = ProcessRanks.of(group)

    def fail():
        with ranks.image():
            ranks.any(False)
            dist.barrier(group)
            raise ValueError("both")

    with pytest.raises(ValueError, match="both"):
        fail()
    dist.barrier(group)
    while rank == 0 and ranks._presence.words[1].here is None:
        ranks._presence.look()
    return ranks.any(rank == 0)


def test_what_follows_a_failed_image_is_not_of_it(ranks):
    """Be it no image: nobody is told a second time of what ended the last one."""
    assert ranks(2, after_a_failed_image) == [True, True]


def images_apart(rank, group):
    """Rank 1 has drawn three images by itself, as of another group's model."""
    ranks = ProcessRanks.of(group)
    for _ in range(3 * rank):
        with ranks.image():
            pass
    if rank == 0:
        with pytest.raises(RanksDisagree, match="image number"), ranks.image():
            ranks.any(False)
    with ranks.image():
        assert ranks.any(rank == 0)
    # Likewise where the beginning of an image is inferred.
    for _ in range(3 * rank):
        with ranks.image():
            pass
    model, x = piflux.parallelize(Attention(), group=group, inner="eager"), torch.ones(1, 1, 12, 8)
    if rank == 0:
        with pytest.raises(RanksDisagree, match="image number"):
            model(x)
    return model(x).equal(Attention()(x))


def test_ranks_that_are_images_apart_are_told_once(ranks):
    assert ranks(2, images_apart) == [True, True]


def test_meetings_of_one_store_know_nothing_of_each_other():
    """As a server's groups, of which a dead process left its word and its address behind."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meetings = [Meeting(store, *which) for which in (("a", 0, 2), ("a", 1, 2), ("b", 1, 2))]
    first, same, other = (ProcessRanks.of(meeting) for meeting in meetings)
    for ranks in (first, same, other):
        ranks._presence.look()
    assert set(same._presence.words) == {0} and not other._presence.words
    for ranks in (first, same, other):
        ranks.close()


def test_a_rank_that_fails_while_a_program_is_made_is_told_as_it_is():
    """Not as what Dynamo makes of it, here or where another rank is told."""
    x = torch.ones(1, 4, 8)
    for error in (RankFailed("rank 1 stopped"), RankLost("rank 1 died", [1])):
        model = piflux.parallelize(Attention(), group=piflux.virtual_ranks(2))
        failing = mock.patch.object(compiler, "make_program", side_effect=error)
        with failing, pytest.raises(type(error), match=str(error)):
            model(x)
    model = piflux.parallelize(Attention(), group=piflux.virtual_ranks(2))
    failing = mock.patch.object(compiler, "make_program", side_effect=ValueError("too many"))
    with failing, pytest.raises(BackendCompilerFailed) as raised:
        model(x)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = ProcessRanks.of(meeting := Meeting(store, "told", 0, 2))
    ranks.stop(raised.value)
    assert ranks._word().given_up[1] == "rank 0 stopped in the beginning by ValueError: too many"
    ranks.close()
    del meeting


MOMENTS = {
    "the ranks agree on it": (ProcessRanks, "agree", 1),
    "it is made": (compiler._PerCall, "__init__", 0),
    "Dynamo makes guards": (CheckFunctionManager, "__init__", 0),
    "its choices are kept": (Choices, "keep", 0),
    "it is kept": (compiler.Compiler, "keep", 0),
}
"""After which call of which function, in the course of a first call, a rank raises."""


@contextmanager
def raising(owner, name, number, error):
    """Raises once in it, after so many calls of a function."""
    calls, original = count(), getattr(owner, name)

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == number:
            raise error
        return result

    with mock.patch.object(owner, name, call):
        yield


def raises_at_each_moment(rank, group):
    """How far off are the calls after one in which the last rank raised; by moment and size.

    Then how many programs there are.
    """
    last, kinds = dist.get_world_size(group) - 1, cycle((ValueError, KeyboardInterrupt))
    found = {}
    for moment, (owner, name, number) in MOMENTS.items():
        # Within a limit it is asked, of each new graph, what fits on all ranks.
        options = {"policy": "gather", "memory": 4, "inner": "eager"}
        model = piflux.parallelize(Attention(), group=group, **options)
        x = torch.randn(1, 1, 12, 8, generator=torch.Generator().manual_seed(0))
        sizes = (12,) if name in ("agree", "keep") else (12, 6)  # of one program alone
        for size in sizes:
            error = next(kinds)("as asked")
            fault = raising(owner, name, number, error)
            told = f"rank {last} stopped in the model's capture by .*as asked"
            kind, match = (BaseException, "as asked") if rank == last else (RankFailed, told)
            with fault if rank == last else nullcontext(), pytest.raises(kind, match=match):
                model(x[:, :, :size])
            so_far = [x[:, :, :n] for n in sizes if n >= size]
            off = [float((model(y) - Attention()(y)).abs().max()) for y in so_far]
            found[moment, size] = max(off), len(model._piflux_compiler.programs)
    if rank == last:
        model = piflux.parallelize(Attention(), group=group, **options)
    with pytest.raises(RanksDisagree, match="the ranks are at different points"):
        model(x)
    off = float((model(x) - Attention()(x)).abs().max())
    found["one parallelizes its model anew", 12] = off, len(model._piflux_compiler.programs)
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_a_rank_that_raises_before_its_program_runs_has_the_others_program(ranks, n):
    """The others run theirs already. Then all let go of it, and make one."""
    for found in ranks(n, raises_at_each_moment):
        assert max(off for off, _ in found.values()) < 1e-6
        assert {programs for (_, size), (_, programs) in found.items() if size == 12} == {1}
        assert {programs for (_, size), (_, programs) in found.items() if size == 6} == {2}


def apart(rank, group):
    """What is told where one rank has a hook that the others don't have, or other numbers."""
    model, told = piflux.parallelize(Attention(), group=group, policy="gather", inner="eager"), []
    x = torch.randn(1, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    model(x)
    last = rank == dist.get_world_size(group) - 1
    if last:
        hook = model.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(RanksDisagree) as raised:
        model(x)
    told.append(str(raised.value))
    if last:
        hook.remove()
    assert (model(x) - Attention()(x)).abs().max() < 1e-6
    # The packets of a step's keys and values have other bytes on one rank.
    pieces = ProcessRanks.of(group).gather(torch.zeros(1 + rank))
    with pytest.raises(RanksDisagree) as raised:
        pieces.start().wait()
    told.append(str(raised.value))
    assert (model(x) - Attention()(x)).abs().max() < 1e-6
    return told


def test_one_rank_that_computes_something_else_is_told(ranks):
    """All ranks would gather what it sends, and have the same wrong image."""
    for hooked, numbers in ranks(2, apart):
        assert "operations of the model\n    rank 0: 1, " in hooked
        assert "    rank 1: 2, " in hooked
        assert "a gather of pieces (4 bytes)" in numbers and "(8 bytes)" in numbers


class Scaled(Attention):
    """Of which ranks may have other constants, in one way or another."""

    scale, causal, breaks = 1.5, False, False

    def forward(self, x):
        y = x * self.scale
        if self.breaks:
            torch._dynamo.graph_break()
        return x + F.scaled_dot_product_attention(y, y, y, is_causal=self.causal)


def other_constants(rank, group):
    """What is told, and whether a rank for which the scale became a symbol joins the others."""
    told, x = [], torch.rand(1, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    for name, other, breaks in (
        ("scale", 1.25, False),
        ("scale", 2, False),
        ("causal", True, False),
        ("causal", True, True),
    ):
        model = Scaled()
        model.breaks = breaks
        if rank:
            setattr(model, name, other)
        parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
        with pytest.raises(RanksDisagree) as raised, piflux.generation(parallel):
            parallel(x)
        told.append(str(raised.value))
    model = Scaled()
    if rank:
        alone = piflux.parallelize(model, group=piflux.virtual_ranks(2), inner="eager")
        for model.scale in (1.25, 1.75, 1.5):
            alone(x)
    parallel = piflux.parallelize(model, group=group, policy="gather", inner="eager")
    return told, float((parallel(x) - model(x)).abs().max())


def test_a_rank_whose_constants_are_others_is_told(ranks):
    """By a processor that scales, say. The names of its operations are the same."""
    for told, off in ranks(2, other_constants):
        assert all("constants" in x for x in told), told
        assert off < 1e-6


def test_a_process_that_was_forked_of_a_rank_is_none():
    """What it does to the rank's connections, or to its word, would end the rank itself."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = ProcessRanks.of(meeting := Meeting(store, "forked", 0, 2))
    with mock.patch("piflux.ranks.processes.os.getpid", return_value=-1):
        with pytest.raises(RuntimeError, match="was forked of rank 0's, and is no rank"):
            assert ranks.link
        ranks.stop(ValueError("of the child"))
        ranks.close()
    assert ranks._given_up is None and not ranks._ended
    ranks.close()
    del meeting


def test_the_same_seed_gives_the_same_faults():
    many = [fault for fault, _ in zip(faults(1), range(3 * len(KINDS)), strict=False)]
    assert many == [fault for fault, _ in zip(faults(1), range(3 * len(KINDS)), strict=False)]
    assert {fault.kind for fault in many} == set(KINDS)
    assert any(fault.kind in LOST and fault.inside is not None for fault in many)


# --- joining ------------------------------------------------------------------------------------


def joining(rank, group, port):
    """A store that accepts connections and says nothing: torch would wait for half an hour."""
    os.environ.update(
        RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PIFLUX_TIMEOUT_S="1"
    )
    with pytest.raises(RankFailed) as raised:
        resolve_group(None)
    return str(raised.value)


def test_joining_has_a_deadline():
    with socket.socket() as silent, Pool(1, joined=False) as pool:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        (said,) = pool.run(1, joining, str(port), timeout=240)
    assert "rank 1 could not join the others: no answer within 1 s" in said
    assert f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)" in said
    assert "PIFLUX_TIMEOUT_S" in said


RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("RANK", "2"),
        ("RANK", "-1"),
        ("RANK", "first"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "70000"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch, name, value):
    for key, right in RANK.items():
        monkeypatch.setenv(key, right)
    environment.check()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name} ") as raised:
        environment.check()
    assert value in str(raised.value)


@pytest.mark.parametrize("asked", ["0", "-5", "inf", "nan", "soon"])
def test_a_timeout_is_seconds(monkeypatch, asked):
    monkeypatch.setenv("PIFLUX_TIMEOUT_S", asked)
    with pytest.raises(ValueError, match=f"PIFLUX_TIMEOUT_S must be .* got '{asked}'"):
        environment.timeout_asked()


# --- the board ----------------------------------------------------------------------------------


def test_who_asks_does_not_wait_for_ever():
    board, answers = Board(store=None), threading.Event()
    answer = board.ask(lambda _: answers.wait())
    with pytest.raises(Silent, match=r"no answer within 0\.1 s"):
        answer.get(0.1)
    with pytest.raises(Silent):
        bounded(answers.wait, 0.05)
    answers.set()
    answer.get(60)
    with pytest.raises(ZeroDivisionError):
        board.ask(lambda _: 1 / 0).get(60)
    assert board.ask(lambda _: "next").get(60) == "next"
    hangs = threading.Event()
    board.ask(lambda _: hangs.wait())
    with pytest.raises(Silent):
        board.find(lambda _: "another one", 0.2)
    with mock.patch.object(Answer, "get") as get:
        board.find(lambda _: "yet another", 0.2)
    get.assert_called_once_with(0.0)  # who has been silent for so long is not waited for anew
    hangs.set()
    assert board.find(lambda _: "the last", 60) == "the last"
    board.close(60)


# --- waiting ------------------------------------------------------------------------------------


def waiting_for(beats, theirs):
    """Of rank 0 of 2, after so many beats in which it waited for votes, and what is said of it.

    `theirs`: the beats of the other rank, one look at it after the other.
    """

    def word(beat):
        return SimpleNamespace(
            epoch=0, left=None, busy=False, beat=beat, wait=Wait("weights", 5, "step 1", 0.0, 0)
        )

    presence = SimpleNamespace(beat=beats, words={}, gone=dict, answered=0.0, silence_s=5.0)
    epochs = SimpleNamespace(present=Epoch(0, (0, 1), None), allowed=lambda _: math.inf)
    waiting = Waiting(presence, epochs, 0, timeout_s=8)
    for beat in theirs:
        presence.words = {1: word(beat)}
        reason = waiting._reason(Wait("votes", 4, "step 0", 0.0, 0))
    return reason


LONG = int(8 / 4 / HURRY_S)  # beats, at the timeout of 8 s


@pytest.mark.parametrize("beats, theirs", [(LONG, (9, 12)), (9, (LONG, LONG + 3)), (LONG, (LONG,))])
def test_ranks_that_are_slow_are_not_at_different_points(beats, theirs):
    """However many seconds have gone by: one may have what it waits for, and not know it yet."""
    assert waiting_for(beats, theirs) is None


def test_ranks_that_stay_at_different_points_are_told():
    reason = waiting_for(LONG, (LONG, LONG + SURE))
    assert reason.kind == "disagree"
    assert "rank 0: step 0, votes\n  rank 1: step 1, weights" in reason.text


def test_a_device_waits_since_it_came_no_further():
    predictions = SimpleNamespace(progress=1.0, is_device_busy=lambda: True)
    presence = SimpleNamespace(beat=7, say=lambda: SimpleNamespace(doing="step 3"))
    epochs = SimpleNamespace(present=SimpleNamespace(predictions=predictions))
    waiting = Waiting(presence, epochs, 0, timeout_s=8)
    first = waiting.waits()
    presence.beat = 9
    assert waiting.waits() is first and (first.since, first.beat) == (1.0, 7)
    predictions.progress = 2.0
    again = waiting.waits()
    assert (again.since, again.beat) == (2.0, 9)


# --- weights ------------------------------------------------------------------------------------


def test_how_much_adapters_count_is_compared():
    layer = torch.nn.Linear(2, 2)
    layer.scaling = {"style": 0.5}
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer)
    assert _scales(model) == {"scale of adapter style in 1": "0.5"}


def test_what_may_have_changed_is_compared_again():
    model, same = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), SameWeights()
    ranks = SimpleNamespace(agree=lambda facts: None)
    layer = model[1]
    changes = {
        "never compared": lambda: None,
        "written into": lambda: layer.weight.mul_(2),
        "another weight": lambda: setattr(layer, "bias", nn.Parameter(torch.ones(2))),
        "another module": lambda: model.append(nn.Linear(2, 2)),
        "a scale": lambda: setattr(layer, "scaling", {"style": 1.0}),
        "another scale": lambda: layer.scaling.update(style=0.5),
    }
    for name, change in changes.items():
        with torch.no_grad():
            change()
        assert same.may_have_changed(model), name
        same.compare(model, ranks)
        assert not same.may_have_changed(model), name


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_the_same_norm_is_agreement(value):
    assert not Norm(value).differs(Norm(value))
    assert Norm(value).differs(Norm(1.001))
    assert Norm(1.0).differs(Norm(math.nan)) and Norm(1.0).differs(Norm(math.inf))
