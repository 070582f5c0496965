"""Weights that ranks share: each holds an N-th, and computes the very same."""

import os
from types import SimpleNamespace

import pytest
import torch
from captures import captured_once
from models import flux_inputs, quantized, tiny_flux
from ranks import Pool
from test_copies import Files, Launched
from test_replay import as_captured, farthest, on_tape
from test_virtual_ranks import image
from torch import nn

import piflux
from piflux import api
from piflux.compile import choices
from piflux.cost.cost import Rates
from piflux.errors import (
    CannotCapture,
    CompileError,
    DoesNotFit,
    RanksDisagree,
    WeightsLost,
)
from piflux.memory.aside import Aside, plain
from piflux.memory.shares import Shares, _layouts
from piflux.memory.slots import at_once
from piflux.ranks import processes as runtime_ranks
from piflux.ranks.links import Link

STEPS = 4
DEPTH = {"double": 3, "single": 2}


def model(**options):
    return tiny_flux(**DEPTH, **options)


def whole(group, transformer=None, **options):
    options = {"inner": "eager"} | options
    return piflux.parallelize(transformer or model(), group=group, **options)


def shared(group, transformer=None, **options):
    return whole(group, transformer, shard_weights=True, **options)


def shares_of(parallel):
    return parallel._piflux_compiler.shares


SETTINGS = (
    ("eager", {"policy": "gather"}),
    (as_captured, {"policy": "gather"}),
    (as_captured, {"policy": "rotate", "sync": "recompute"}),
)


@captured_once()
def differences(rank, group):
    """From whole weights, by policy, with graphs as they are and as inductor gets them."""
    inputs, found = flux_inputs(), {}
    for inner, options in SETTINGS:
        parallel = shared(group, inner=inner, **options)
        want = image(whole(group, inner=inner, **options), inputs, STEPS)
        found[str((inner, options))] = [
            torch.equal(want, image(parallel, inputs, STEPS)) for _ in range(2)
        ]
    options = {"inner": as_captured, "policy": "rotate"}
    want = image(whole(group, quantized(model()), **options), inputs, STEPS)
    got = image(shared(group, quantized(model()), **options), inputs, STEPS)
    found["quantized"] = [torch.equal(want, got)]
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_images_are_the_very_same(ranks, world_size):
    for found in ranks(world_size, differences):
        assert all(all(same) for same in found.values()), found


@captured_once()
def counted(rank, group):
    """What `explain` says, and the memory that the weights are in."""
    parallel = shared(group, inner=as_captured)
    all_bytes = sum(x.nbytes for x in parallel.parameters())
    image(parallel, flux_inputs(), 2)
    report, shares = piflux.explain(parallel).graphs[0], shares_of(parallel)
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in parallel.parameters()}
    shared_ = [x.memory for x in shares._buffers] + [x.share for x in shares._groups]
    elsewhere = memory.keys() - {x.data_ptr() for x in shared_}
    own = sum(memory[where].nbytes() for where in elsewhere)
    return {
        "whole": all_bytes,
        "counted": report.weight_bytes,
        "held": own + shares.nbytes,
        "says": str(report),
        "step": sum(x.share.nbytes for x in shares._groups[: len(report.shared.step)]),
        "sent": report.shared.step_bytes,
    }


def test_what_is_counted_is_what_is_held(ranks):
    found, _ = ranks(2, counted)
    assert found["counted"] < 0.9 * found["whole"]
    # Shares and buffers are padded, which is more of a small model than of a large one.
    assert found["held"] == pytest.approx(found["counted"], rel=0.03)
    assert found["step"] == pytest.approx(found["sent"], rel=0.03)
    assert "weights shared" in found["says"] and "once an image" in found["says"]


@captured_once()
def through_files(rank, group, folder):
    """Recorded steps whose weights go by copy engines; how many were recorded, and played."""
    inputs, found = flux_inputs(image_hw=(6, 6), text=12), {}
    for policy in ("gather", "displaced"):
        want = image(whole(group, policy=policy), inputs, STEPS)
        with pytest.MonkeyPatch.context() as patch:
            peers = Files(group, folder / policy)
            patch.setattr(runtime_ranks.ProcessRanks, "_reached", lambda *_, it=peers: it)
            patch.setattr(runtime_ranks, "Copies", Launched)
            recorder = on_tape(patch)
            parallel = shared(group, inner=as_captured, policy=policy)
            got = [image(parallel, inputs, STEPS) for _ in range(3)]
        assert {type(x) for x in shares_of(parallel)._buffers} == {Launched}
        counts = recorder.recorded, recorder.played, recorder.eager
        found[policy] = farthest([want, *got]), counts
    return found


def test_recorded_steps_find_their_weights(ranks, tmp_path):
    """Also between keys and values that the next step reads."""
    for policy in ("gather", "displaced"):
        (tmp_path / policy).mkdir()
    for found in ranks(2, through_files, tmp_path):
        assert all(apart <= 1e-6 for apart, _ in found.values()), found
        assert found["gather"][1] == (1, 3 * STEPS - 1, 0)
        recorded, played, eager = found["displaced"][1]
        assert (recorded + played, eager) == (3 * STEPS, 0), found


@captured_once()
def between_recordings(rank, group):
    """Where copies don't reach, gathers of weights are called between what was recorded."""
    inputs = flux_inputs()
    want = image(whole(group, policy="rotate"), inputs, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        recorder = on_tape(patch)
        parallel = shared(group, inner=as_captured, policy="rotate")
        got = [image(parallel, inputs, STEPS) for _ in range(3)]
    return farthest([want, *got]), recorder.played, recorder.eager


def test_gathers_are_called_between_recordings(ranks):
    for apart, played, eager in ranks(2, between_recordings):
        assert apart <= 1e-6
        assert played > 0 and eager > 0


# --- where weights lie, and when they go ----------------------------------------------------------


def runs_of(*counts):
    """Runs of one weight each, of so many times 256 bytes; the last of two that adjoin."""
    runs = [[torch.empty(256 * count, dtype=torch.uint8)] for count in counts[:-1]]
    return [*runs, [torch.empty(128 * counts[-1], dtype=torch.uint8) for _ in range(2)]]


BLOCKS = {"double": (28, 28, 9, 9, 37, 37, 37, 38), "single": (66, 47)}
"""Of FLUX.1, in millions of numbers."""


@pytest.mark.parametrize(
    ("kind", "size", "is_cut"),
    [("double", 2, False), ("double", 3, False), ("single", 2, False), ("single", 3, True)],
)
def test_weights_are_one_rank_s_where_that_is_even(kind, size, is_cut):
    groups = [runs_of(*BLOCKS[kind]) for _ in range(4)]
    held = torch.zeros(size)
    for runs, layout in zip(groups, _layouts(groups, size), strict=True):
        assert layout.is_cut == is_cut
        held += torch.tensor(layout.lengths)
        begins = {id(tensor): begin for tensor, begin in layout.places}
        first, second = (begins[id(x)] for x in runs[-1])
        assert second == first + runs[-1][0].nbytes, "weights of one run adjoin"
        taken = torch.zeros(size * layout.length, dtype=torch.uint8)
        for tensor, begin in layout.places:
            taken[begin : begin + tensor.nbytes] += 1
            of = begin // layout.length
            if not is_cut:
                assert begin + tensor.nbytes <= of * layout.length + layout.lengths[of]
        assert taken.max() == 1
        assert taken.sum() == 256 * sum(BLOCKS[kind])
    assert held.max() <= 1.03 * held.mean(), "over all blocks ranks hold the same"


@pytest.mark.parametrize("count", [512, 513, 1024])
def test_places_hold_a_weight_that_is_cut(count):
    (layout,) = _layouts([[[torch.empty(count, dtype=torch.uint8)]]], 2)
    assert layout.is_cut and 2 * layout.length >= count


@captured_once()
def in_place(rank, group):
    """What a rank's own weights are read in, and what went in which order in a step."""
    went = []
    with pytest.MonkeyPatch.context() as patch:
        parallel = shared(group, policy="gather")
        image(parallel, flux_inputs(), 1)
        gather = Link.gather
        patch.setattr(Link, "gather", lambda *args: went.append(args[3]) or gather(*args))
        image(parallel, flux_inputs(), 1)
    shares = shares_of(parallel)
    own = {x.share.data_ptr() for x in shares._groups if not x.layout.is_cut}
    for buffer in shares._buffers:
        buffer.memory.fill_(0)
    kept = [
        weight.abs().max().item()
        for weight in parallel.parameters()
        if weight.untyped_storage().data_ptr() in own
    ]
    return went, len(own), len(shares._groups), kept


def test_a_rank_reads_its_own_weights_where_they_are_and_sends_keys_first(ranks):
    for went, whole_groups, groups, kept in ranks(2, in_place):
        assert whole_groups == groups
        assert kept and min(kept) > 0, "they were in a buffer"
        # Three blocks' weights go while the block before attends; then the prediction.
        what = ["keys and values", "weights"] * 3 + ["keys and values"] * 2
        assert [x.partition(" (")[0] for x in went] == [*what, "the prediction"]


# --- before the first call -----------------------------------------------------------------------


@captured_once()
def from_the_host(rank, group, wrong):
    transformer = model()
    if wrong and rank:
        with torch.no_grad():
            transformer.transformer_blocks[2].attn.to_out[0].weight[0, 0] += 1
    want = image(
        whole(group, policy="gather"),
        flux_inputs(),
        STEPS,
    )
    parallel = shared(group, transformer, policy="gather")
    shares_of(parallel).aside.put(transformer, torch.device("cpu"))
    absent = all(x.untyped_storage().nbytes() == 0 for x in transformer.parameters())
    try:
        made = image(parallel, flux_inputs(), STEPS)
    except RanksDisagree as error:
        try:
            image(parallel, flux_inputs(), STEPS)
        except RanksDisagree:
            return str(error)
    return absent, torch.equal(made, want), shares_of(parallel).aside.nbytes


def test_each_rank_takes_its_share_from_the_host(ranks):
    assert ranks(2, from_the_host, False) == [(True, True, 0)] * 2


def test_weights_from_the_host_are_compared(ranks):
    """In every image, until they are alike."""
    for said in ranks(2, from_the_host, True):
        assert "of group" in said


@pytest.mark.parametrize("build", [model, lambda: quantized(model())], ids=["plain", "quantized"])
def test_what_was_put_aside_comes_back(build):
    transformer, aside = build(), Aside()
    before = [x.clone() for weight in transformer.parameters() for x in plain(weight.detach())]
    shapes = [(x.shape, x.dtype) for x in transformer.parameters()]
    aside.put(transformer, torch.device("cpu"))
    assert aside.nbytes == sum(x.nbytes for x in before)
    assert [(x.shape, x.dtype) for x in transformer.parameters()] == shapes
    aside.bring()
    after = [x for weight in transformer.parameters() for x in plain(weight.detach())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert aside.nbytes == 0


def test_tied_weights_stay_tied():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    aside = Aside()
    aside.put(tied, torch.device("cpu"))
    aside.bring()
    assert tied[1].weight is tied[0].weight


# --- where memory is short -----------------------------------------------------------------------

FAST, SLOW = Rates(1e-3, 1e-3, 1e6), Rates(1e-3, 1e-3, 1e-9)


@captured_once()
def within(rank, group):
    """What ranks take within a limit, from weights on the host: whether shared, and under what."""
    inputs, found = flux_inputs(), {}
    deep = {"double": 2, "single": 10}  # for buffers to be small beside shares
    usual = whole(group, tiny_flux(**deep))
    want = image(usual, inputs, STEPS)
    need = piflux.explain(usual).graphs[0]
    exact = whole(group, tiny_flux(**deep), policy="gather")
    image(exact, inputs, STEPS)
    least = piflux.explain(exact).graphs[0].memory_bytes

    def taken(limit, rates, *, at_home=True, **options):
        transformer = tiny_flux(**deep)
        memory = {"shard_weights": "auto", "memory": limit / 2**30} | options
        parallel = whole(group, transformer, **memory)
        if at_home:
            shares_of(parallel).aside.put(transformer, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choices, "remembered_rates", lambda *_: rates)
            made = image(parallel, inputs, STEPS)
        schedule = parallel._piflux_compiler.runtime.schedule
        shares = shares_of(parallel)
        assert shares is None or shares.complete
        notes = " ".join(piflux.explain(parallel).notes)
        settings = schedule.policy, schedule.compression, shares is not None
        return settings, torch.equal(made, want), notes

    found["fits"] = taken(need.memory_bytes, SLOW)
    found["fast"] = taken(need.memory_bytes - 1, FAST)
    found["slow"] = taken(need.memory_bytes - 1, SLOW)
    found["last"] = taken(least - 1, SLOW)
    # Whole ones are there, beside which buffers would have to be.
    found["there"] = taken(need.memory_bytes - 1, FAST, at_home=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "hooked", lambda _: rank == 1)
        found["one may not"] = taken(need.memory_bytes - 1, FAST, at_home=False)
    with pytest.raises(DoesNotFit) as raised:
        taken(least - 1, FAST, at_home=False, shard_weights=False)
    return found, str(raised.value)


def test_shared_weights_are_taken_where_they_are_wanted(ranks):
    """On a fast link before anything that changes the image, on a slow one after all of it."""
    (found, refused), (other, _) = ranks(2, within)
    assert found == other
    assert found["fits"][:2] == (("rotate", "none", False), True)
    assert found["fast"][:2] == (("rotate", "none", True), True)
    assert "took policy='rotate', shard_weights=True, " in found["fast"][2]
    assert "waits 0 ms for weights" in found["fast"][2]
    assert found["slow"][0] == ("rotate", "int8", False) and "GB/s" not in found["slow"][2]
    assert found["last"][0] == ("rotate", "int4", True)
    assert found["there"][0] == found["one may not"][0] == ("rotate", "int8", False)
    assert "This would fit: policy='rotate', compression='int4', shard_weights=True, " in refused
    assert "in 8 bits" in refused


def test_weights_are_shared_on_demand_within_a_limit_only():
    group = piflux.virtual_ranks(2)
    with pytest.raises(ValueError, match="say with memory= into what"):
        piflux.parallelize(model(), group=group, shard_weights="auto")
    with pytest.raises(ValueError, match="must be True, False or 'auto', got 'yes'"):
        piflux.parallelize(model(), group=group, shard_weights="yes")


# --- refusals ------------------------------------------------------------------------------------


@captured_once()
def refused(rank, group, act):
    parallel = shared(group)
    image(parallel, flux_inputs(), 2)
    with torch.no_grad():
        act(parallel)
    with pytest.raises(CannotCapture) as raised:
        image(parallel, flux_inputs(), 2)
    return str(raised.value)


def written(parallel):
    parallel.transformer_blocks[1].attn.to_q.weight.mul_(2)


def moved(parallel):
    for x in parallel.parameters():
        x.data = x.data.clone()


@pytest.mark.parametrize(
    "act, said", [(written, "was written into"), (moved, "were moved or replaced")]
)
def test_weights_that_were_changed_since_are_refused(ranks, act, said):
    assert all(said in text for text in ranks(2, refused, act))


def without_blocks(rank, group):
    with pytest.raises(CompileError, match="nothing repeats in this model") as raised:
        image(shared(group, tiny_flux(double=1, single=1)), flux_inputs(), 2)
    return type(raised.value).__name__


def test_a_model_without_repeated_blocks_is_refused_on_all_ranks(ranks):
    assert ranks(2, without_blocks) == ["CompileError"] * 2


@pytest.mark.parametrize("size", [1, 2])
def test_one_process_shares_nothing_and_says_so(size):
    parallel = shared(piflux.virtual_ranks(size), tiny_flux(), policy="gather")
    image(parallel, flux_inputs(), 2)
    (note,) = piflux.explain(parallel).notes
    assert "there is nothing to share" in note and shares_of(parallel) is None


def test_who_lost_a_share_is_told_at_every_call():
    ranks = SimpleNamespace(members=(0, 1, 2))
    shares = Shares(ranks)
    shares.check_members()  # before they are shared any rank may be lost
    shares._members = ranks.members
    shares.check_members()
    ranks.members = (0, 2)
    for _ in range(2):
        with pytest.raises(WeightsLost, match="rank 1 held a share") as raised:
            shares.check_members()
        assert raised.value.ranks == (1,) and not raised.value.resumable


class First:
    """The first of two ranks, to whom nothing comes; `filled` notes what is sent."""

    size, rank, members, epoch = 2, 0, (0, 1), 0

    def __init__(self):
        self.sent = []

    def filled(self, count, device):
        def fill(piece, length, *, own):
            self.sent.append((piece, length, own))

        memory = torch.zeros(2 * count, dtype=torch.uint8)
        return SimpleNamespace(memory=memory, fill=fill, wait=lambda: None, recordable=True)

    def agree(self, facts):
        pass


def gathered(buffer, *runs):
    return SimpleNamespace(runs=runs, buffer=buffer)


GROUPS = gathered(0, [0], [1]), gathered(1, [2]), gathered(0, [3])
"""Two weights that a rank each has, and two that are cut."""


def shared_by_first():
    ranks, weights = First(), [nn.Parameter(torch.full((64,), float(i))) for i in range(4)]
    shares = Shares(ranks)
    return shares, weights, shares.ready(weights, GROUPS)


def test_buffers_are_made_anew_where_ranks_have_met_anew():
    shares, weights, _ = shared_by_first()
    before = [x.memory.data_ptr() for x in shares._buffers]
    held = shares._buffers
    shares.ready(weights, GROUPS)
    assert shares._buffers is held
    shares.ranks.epoch = 1
    shares.ready(weights, GROUPS)
    after = [x.memory.data_ptr() for x in shares._buffers]
    assert not {*before} & {*after}
    assert weights[0].equal(torch.zeros(64)), "its own, where it was"
    assert [weights[1].data_ptr() - 256, weights[2].data_ptr()] == after


def test_what_is_waited_for_is_what_comes():
    shares, _, fetching = shared_by_first()
    whole, cut, _ = shares._groups
    fetching.expect(0)
    fetching.start(at_once)
    fetching.wait(1, at_once)  # a branch that reads it earlier
    assert shares.ranks.sent == [(whole.share, 256, False), (cut.share, 256, True)]
    assert (whole.layout.is_cut, cut.layout.is_cut) == (False, True)
    fetching.wait(1, at_once)
    assert len(shares.ranks.sent) == 3, "another group may have come there since"


@pytest.mark.parametrize(
    "other",
    [[gathered(0, [0], [3])], [gathered(1, [0], [1])]],
    ids=["together", "in another buffer"],
)
def test_graphs_that_share_weights_in_other_ways_are_refused(other):
    shares, weights, _ = shared_by_first()
    with pytest.raises(CompileError, match="reads together what another one reads apart"):
        shares.ready(weights, other)


@pytest.mark.parametrize("number", [0, 1], ids=["in the share", "in a buffer"])
def test_another_parameter_of_shared_memory_is_refused(number):
    """As a module that is moved where it is has."""
    shares, weights, _ = shared_by_first()
    weights[number] = nn.Parameter(weights[number].data)
    with pytest.raises(CannotCapture, match="were moved or replaced since"):
        shares.ready(weights, GROUPS)


def test_weights_that_could_not_all_be_shared_are_refused_for_good():
    shares = Shares(First())
    weights = [nn.Parameter(torch.ones(64)) for _ in range(4)]
    weights[2].untyped_storage().resize_(0)
    with pytest.raises(CannotCapture, match="were moved or replaced since"):
        shares.ready(weights, GROUPS)
    for _ in range(2):
        with pytest.raises(CannotCapture, match="when something went wrong"):
            shares.ready(weights, GROUPS)


@captured_once()
def one_ends(rank, group):
    parallel = shared(group, policy="gather")
    image(parallel, flux_inputs(), 2)
    if rank == 1:
        os._exit(1)
    told = []
    for _ in range(2):
        with pytest.raises(WeightsLost) as raised:
            image(parallel, flux_inputs(), 2)
        told.append(raised.value.ranks)
    return told


def test_a_rank_that_ends_takes_its_share_along():
    """With whole weights the one that is left would run the model itself."""
    with Pool(2) as pool:
        left, ended = pool.run(2, one_ends, timeout=120)
    assert ended.died and left == [(1,), (1,)], left
