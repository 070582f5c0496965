"""Eight ranks, real ones and virtual ones: what they draw, compile and hold.

35 image and 13 text tokens are cut into windows of 5 and 2, of which the last overlap. The first
image has more steps than there are ranks, so that every rank has computed every part; the second is
left after two sync steps and two others.
"""

import contextlib
from itertools import islice

import pytest
from captures import captured_once
from models import HEAD_DIM, denoise, flux_inputs, tiny_flux
from oracle import Oracle
from test_numerics import assert_equal, sample
from torch._dynamo.utils import counters

import piflux

RANKS = 8
STEPS, OF_THE_SECOND = 10, 4
TOKEN = 2 * 3 * HEAD_DIM * 4  # bytes of a key and a value: 3 heads in float32
ATTENTIONS, TOKENS, PART = 2, 35 + 13, 5 + 2
HELD = {
    "gather": 0,
    "rotate": ATTENTIONS * 2 * TOKENS * TOKEN,  # two versions
    # And, in buffers of their own, what a rank has sent and what arrives.
    "displaced": ATTENTIONS * (2 * TOKENS + (1 + RANKS) * PART) * TOKEN,
}


def steps(make_step):
    """The latents after each step of two images of one prompt; `make_step` begins an image."""
    other = {"hidden_states": flux_inputs(seed=2)["hidden_states"]}
    yield from denoise(make_step(), flux_inputs(), STEPS)
    yield from islice(denoise(make_step(), flux_inputs() | other, STEPS), OF_THE_SECOND)


def wanted(policy):
    return list(steps(lambda: Oracle(tiny_flux(), RANKS, policy)))


def held(model):
    """Bytes of all memory that cache slots refer to between two steps."""
    runtime, tensors = model._piflux_compiler.runtime, []
    for stream in runtime.streams:
        for slot in stream.memory.slots.values():
            tensors += [*slot.first, *slot.second]
            if slot.packet is not None:
                gathering = slot.packet._gathering
                tensors += [gathering.piece, gathering.whole]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def drawn(model):
    """After each step of both images: the latents, graphs compiled by then, bytes held then."""
    counters.clear()
    found = []
    with contextlib.ExitStack() as stack:

        def begin():
            stack.close()
            stack.enter_context(piflux.generation(model))
            return sample(model)

        for latents in steps(begin):
            found.append((latents, counters["stats"]["unique_graphs"], held(model)))
    return tuple(map(list, zip(*found, strict=True)))


@captured_once()
def drawn_by_one_of_eight(rank, group, policy):
    model = piflux.parallelize(tiny_flux(), group=group, policy=policy, inner="eager")
    return *drawn(model), piflux.explain(model).graphs[-1].cache_bytes


def test_eight_ranks(ranks):
    """They draw as the oracle does, compile in the first step alone, and hold no more over time.

    By the policy that sends in every step, and from the first after a sync step behind itself.
    """
    results = ranks(RANKS, drawn_by_one_of_eight, "displaced")
    assert_equal([latents for latents, *_ in results], wanted("displaced"))
    for _, graphs, bytes_held, reported in results:
        assert set(graphs) == {1}
        assert reported == HELD["displaced"]
        # Step 2 is the last sync step; displaced has sent something in every step after it.
        assert set(bytes_held[3:STEPS]) == {bytes_held[-1]} == {reported}
        assert max(bytes_held) == reported


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("policy", list(HELD))
def test_eight_virtual_ranks(policy):
    """As real ones, and in one process lies what all eight remember and send."""
    group = piflux.virtual_ranks(RANKS)
    model = piflux.parallelize(tiny_flux(), group=group, policy=policy, inner="eager")
    latents, graphs, bytes_held = drawn(model)
    assert_equal([latents], wanted(policy))
    assert set(graphs) == {1}
    assert set(bytes_held[3:STEPS]) == {bytes_held[-1]} == {RANKS * HELD[policy]}
