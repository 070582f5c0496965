"""Cache slots: time, ages, and where prediction goes."""

import math
from typing import NamedTuple

import pytest
import torch
from test_schedule import Kernels

import piflux
from piflux.kernels.changes import (
    advance,
    compress,
    compress_in_torch,
    exchange_changes,
    exchange_changes_in_torch,
)
from piflux.kernels.exchange import exchange, exchange_in_torch, place
from piflux.kernels.rounded import (
    Rounded,
    change_bytes,
    change_like,
    value,
    value_of_change,
    version_bytes,
    version_like,
)
from piflux.kernels.rows import changes, row_bytes
from piflux.kernels.versions import advance as advance_rounded
from piflux.kernels.versions import advance_in_torch as advance_rounded_in_torch
from piflux.kernels.versions import (
    change_in_torch,
    change_to,
    exchange_rounded,
    exchange_rounded_in_torch,
    renew,
    renew_in_torch,
)
from piflux.memory.ages import BELIEF, FARTHEST, Ages
from piflux.memory.changes import ChangeSlot
from piflux.memory.memory import Memory
from piflux.memory.places import Places
from piflux.memory.rounded import RoundedSlot
from piflux.memory.slots import Slot
from piflux.parts import part_index
from piflux.runtime.times import Times


def at(value):
    return torch.tensor(float(value))


def time(*clocks, step=0):
    tensors = [torch.as_tensor(clock) for clock in clocks]
    return Times(tensors).at(tensors, step).item()


def test_time_is_the_log_snr_whatever_the_unit():
    assert time(0.25) == pytest.approx(math.log(0.26 / 0.76))
    assert time(torch.tensor([250.0, 250.0])) == pytest.approx(time(0.25))
    assert time(torch.tensor([0.25, 0.25])) == pytest.approx(time(0.25))
    assert time(1.0) == pytest.approx(-time(0.0))
    assert math.isfinite(time(1.0))


def test_clocks_that_stand_still_cancel_out():
    for guidance in (3.5, 3500.0, 1.0):
        first, then = time(0.9, guidance), time(0.8, guidance)
        assert first - then == pytest.approx(time(0.9) - time(0.8), rel=1e-5)


def test_a_clock_that_is_no_sigma_is_the_time_itself():
    """The number of a step of another diffusion, and what begins out of the range of sigma."""
    for first, then in ([999, 250], [-0.5, -0.25], [1200.0, 700.0]):
        clocks = [torch.tensor([x]) for x in (first, then)]
        times = Times(clocks[:1])
        assert [times.at([clock], 0).item() for clock in clocks] == [0, then - first]


def test_each_clock_is_of_its_own_kind():
    clocks = torch.tensor([500]), torch.tensor([0.75, 0.75]), torch.tensor([3.5]), torch.tensor(1e4)
    times = Times(clocks)
    then = torch.tensor([400]), torch.tensor([0.25, 0.25]), torch.tensor([3.5]), torch.tensor(1e4)
    moved = times.at(then, 1) - times.at(clocks, 0)
    assert moved.item() == pytest.approx(-100 + time(0.25) - time(0.75))


def test_of_several_clocks_only_means_are_taken_one_by_one():
    """Since each launch takes the host some microseconds, in each step."""
    clocks = [torch.rand(2) for _ in range(5)]
    with Kernels() as one:
        Times(clocks[:1]).at(clocks[:1], 0)
    with Kernels() as five:
        Times(clocks).at(clocks, 0)
    assert five.launched == one.launched + 2 * 4


def test_a_clock_without_bound_stands_still():
    for guidance in (math.inf, -math.inf, math.nan):
        first, then = time(0.9, guidance), time(0.8, guidance)
        assert first - then == pytest.approx(time(0.9) - time(0.8), rel=1e-5)


def test_without_a_clock_time_is_the_step():
    assert time(step=3) - time(step=5) == 2


def five_in_two(part):
    """Where the tokens of a part stand: five in two parts of three that share one."""
    return Places((5,), 2, part, torch.device("cpu"))


def own(part):
    """Which of five tokens are of a part of two."""
    return five_in_two(part).sources >= 0


def read_line(ages, now):
    ages.look(now)
    return ages.line.tolist()


def test_a_line_goes_through_both_versions():
    """Five tokens in two parts of three that share one; part 1 is renewed."""
    ages = Ages((5,), at(4))
    assert read_line(ages, at(3)) == [1] * 5  # one version knows no way
    ages.renew(at(3))
    assert read_line(ages, at(2)) == [1 + BELIEF] * 5
    ages.renew_part(own(1), at(2))
    # At 1: two ticks after version 3, which was one tick after 4; one after 2, one after 3, which
    # for these tokens is the first of two versions and no longer the newer.
    assert ages.newer.tolist() == [True, True, False, False, False]
    assert read_line(ages, at(1)) == [*[1 + 2 * BELIEF] * 2, *[-BELIEF] * 3]
    ages.renew(at(1))
    assert ages.was.tolist() == [True, True, False, False, False]
    assert ages.newer.all()
    assert read_line(ages, at(0)) == [*[1 + BELIEF / 2] * 2, *[1 + BELIEF] * 3]


def test_ages_begin_anew_where_they_are():
    """As for a second image, whose recorded steps read the tensors of the first."""
    ages = Ages((5,), at(4))
    ages.renew(at(3))
    ages.renew_part(own(1), at(2))
    ages.look(at(1))
    line, newer, ahead = ages.line, ages.newer, ages.ahead
    assert ahead.tolist() == [2 * BELIEF] * 2 + [BELIEF] * 3
    ages.advance(at(9), first=True, sync=True, own=None)
    assert ages.line is line and ages.newer is newer
    assert ages.ahead is ahead and ahead.tolist() == [0] * 5
    assert newer.all() and read_line(ages, at(8)) == [1] * 5


def test_places_turn_in_place():
    places = Places((5, 3), 2, 0, torch.device("cpu"))
    index, sources = places.index, places.sources
    assert index.tolist() == [0, 1, 2, 5, 6]
    assert sources.tolist() == [0, 1, 2, -1, -1, 3, 4, -1]
    places.turn(1)
    assert places.index is index and index.tolist() == [2, 3, 4, 6, 7]
    assert places.sources is sources and sources.tolist() == [-1, -1, 0, 1, 2, -1, 3, 4]


def test_times_next_to_each_other_do_not_leap():
    ages = Ages((2,), at(1))
    ages.renew(at(1 - 1e-6))
    assert read_line(ages, at(0)) == [1 + FARTHEST] * 2


def kv(value):
    return [torch.full((1, 1, 5, 2), float(value)), torch.full((1, 1, 5, 2), -float(value))]


def tokens(x):
    return x[0][0, 0, :, 0].tolist()


def sync(slot, value, *, alone=False, alike=False):
    """A sync step's keys and values."""

    def write(first):
        for x, y in zip(first, kv(value), strict=True):
            x.copy_(y)

    slot.begin_step(first=alone, sync=True, alike=alike)
    slot.replace(write, (5,), (0, 1), first=alone, alike=alike)


def slot_of(value, ages):
    """A slot that knows one step's keys and values."""
    slot = Slot.like(kv(value), 5, ages)
    sync(slot, value, alone=True)
    return slot


def three(value):
    """A part's keys and values."""
    return [x[..., :3, :] for x in kv(value)]


def test_a_slot_reads_what_its_versions_lead_to():
    ages = Ages((5,), at(4))
    slot = slot_of(1, ages)
    ages.renew(at(3))
    sync(slot, 3)
    ages.look(at(2))
    ages.renew_part(own(1), at(2))
    places = five_in_two(1)
    assert places.sources.tolist() == [-1, -1, 0, 1, 2]
    keys, values = slot.read(places, three(7), keep=True)
    assert keys[0, 0, :, 0].tolist() == [3 + 2 * BELIEF] * 2 + [7] * 3
    assert torch.equal(values, -keys)
    assert (tokens(slot.first), tokens(slot.second)) == ([3] * 5, [1, 1, 7, 7, 7])
    ages.renew(at(1))
    sync(slot, 9)
    assert (tokens(slot.first), tokens(slot.second)) == ([9] * 5, [3, 3, 7, 7, 7])


def test_versions_that_are_alike_change_places():
    """What comes next is written over the older one; nothing is moved."""
    slot = slot_of(1, Ages((5,), at(4)))
    first, second = slot.first, slot.second
    sync(slot, 3, alike=True)
    assert slot.first is second and slot.second is first
    assert (tokens(slot.first), tokens(slot.second)) == ([3] * 5, [1] * 5)


def test_what_is_on_its_way_lands_before_what_comes():
    """`displaced`: a sync step's keys and values are newer than those that were sent before it."""
    slot = slot_of(1, Ages((5,), at(4)))
    pieces = [(x[..., :3, :], x[..., 2:, :]) for x in kv(5)]
    slot.packet, slot.under_way = Arrived(*pieces), True
    sync(slot, 9, alike=True)
    assert (tokens(slot.first), tokens(slot.second)) == ([9] * 5, [5] * 5)


def test_what_is_not_kept_is_only_read():
    slot = slot_of(1, Ages((5,), at(4)))
    keys, _ = slot.read(five_in_two(0), three(7), keep=False)
    assert keys[0, 0, :, 0].tolist() == [7, 7, 7, 1, 1]
    assert tokens(slot.first) == tokens(slot.second) == [1] * 5


def test_a_slot_of_order_0_remembers_one_version():
    slot = slot_of(1, None)
    sync(slot, 3)
    read = slot.read(five_in_two(0), three(7), keep=False)
    assert tokens(read) == tokens(slot.first) == [7, 7, 7, 3, 3]
    assert slot.second == []


class Arrived:
    """A packet from every rank: of each tensor the pieces, by rank."""

    recordable = False

    def __init__(self, *pieces):
        self.pieces = pieces

    def wait(self):
        pass

    def read(self):
        return self.pieces


def test_a_packet_carries_one_thing_at_a_time():
    """And comes again once it was given back, or its step begins once more."""
    memory, ranks = Memory(), piflux.virtual_ranks(2)
    first, second = (memory.packet(ranks, kv(0)) for _ in range(2))
    assert first is not second
    memory.give_back(first)
    assert memory.packet(ranks, kv(0)) is first
    memory.give_all_back(1)
    assert memory.packet(ranks, kv(0)) not in (first, second), "they are another rank's"
    memory.give_all_back(0)
    assert [memory.packet(ranks, kv(0)) for _ in range(2)] == [first, second]


def test_a_slot_that_does_not_fit_is_another_one():
    memory, double = Memory(), [x.double() for x in kv(0)]
    slot = memory.slot(0, 3, kv(0), 5, Slot, None)
    assert memory.slot(0, 3, kv(0), 5, Slot, None) is slot and memory.made[0] == 1
    for fresh, tokens in ((kv(0), 6), (double, 6)):
        another = memory.slot(0, 3, fresh, tokens, Slot, None)
        assert another.fits(fresh, tokens) and another is not slot
        slot = another
    assert memory.made == {0: 3} and memory.slots == {(0, 3): slot}


@pytest.mark.parametrize("own", [True, False])
def test_where_ranks_keep_their_own_part_versions_stay_where_they_are(own):
    """Each token's newer version is another's older one, so that none can change places."""
    memory, ages = Memory(), Ages((5,), at(4))
    slot = memory.slot(0, 0, kv(0), 5, Slot, ages)
    first = slot.first[0]
    memory.advance(0, 2, 0, at(3), first=False, sync=True, own=own)
    assert (slot.first[0] is first) == own
    memory.advance(0, 2, 0, at(2), first=True, sync=True, own=own)
    assert slot.first[0].data_ptr() == first.data_ptr()


def slot_of_changes(value, ages=None):
    slot = ChangeSlot.like(kv(value), 5, ages or Ages((5,), at(4)))
    sync(slot, value, alone=True)
    return slot


def change_of(slot):
    """Of the first key's numbers, whose one scale each of `kv`'s tokens has."""
    numbers, scales = changes(slot.second[0], 2)
    return (numbers * scales)[0, 0, :, 0].tolist()


def test_a_slot_of_changes_reads_what_they_lead_to():
    """`kv` has one value a token, whose change is a scale of 127 steps, without an error."""
    ages = Ages((5,), at(4))
    slot = slot_of_changes(1, ages)
    where = slot.first[0], slot.second[0]
    assert change_of(slot) == [0] * 5
    ages.renew(at(3))
    sync(slot, 128)
    ages.look(at(2))
    ages.renew_part(own(1), at(2))
    keys, values = slot.read(five_in_two(1), three(1), keep=True)
    assert keys[0, 0, :, 0].tolist() == [128 + 127 * BELIEF] * 2 + [1] * 3
    assert torch.equal(values, -keys)
    assert tokens(slot.first) == [128, 128, 1, 1, 1]
    assert change_of(slot) == [127, 127, -127, -127, -127]
    sync(slot, 1)
    assert tokens(slot.first) == [1] * 5
    assert change_of(slot) == [-127, -127, 0, 0, 0]
    # Recorded steps read where they lie.
    assert slot.first[0] is where[0] and slot.second[0] is where[1]


def test_a_slot_of_changes_lands_what_all_have_sent():
    """Five tokens in two parts that share the middle one; every rank adds the same changes."""
    slots = [slot_of_changes(1) for _ in range(2)]
    sent = [
        slot._sent(part_index((5,), 2, part), three(value))
        for slot, part, value in zip(slots, (0, 1), (128, 255), strict=True)
    ]
    for slot in slots:
        slot.packet, slot.under_way = Arrived(*zip(*sent, strict=True)), True
        slot.land((5,), (0, 1))
        assert tokens(slot.first) == [128, 128, 255, 255, 255]
        assert change_of(slot) == [127, 127, 254, 254, 254]
        slot.land((5,), (0, 1))  # there is nothing to land twice
        assert tokens(slot.first) == [128, 128, 255, 255, 255]


def test_errors_of_sent_changes_do_not_grow():
    """Each change makes good for what the last one's rounding took away."""
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 5, 8)
    slot, errors = ChangeSlot.like([keys], 5, Ages((5,), at(4))), []
    slot.replace(lambda first: first[0].copy_(keys), (5,), (0,), first=True, alike=False)
    for _ in range(100):
        keys = keys + 0.1 * torch.randn(keys.shape)
        slot.packet, slot.under_way = Arrived(slot._sent(torch.arange(5), [keys])), True
        slot.land((5,), (0,))
        errors.append((slot.first[0] - keys).abs().max())
    assert max(errors) < 2 * max(errors[:5]) < 1e-2


def rounded_slot_of(value, ages=None):
    slot = RoundedSlot.like(kv(value), 5, ages or Ages((5,), at(4)))
    sync(slot, value, alone=True)
    return slot


def version_in(slot):
    """Of the first key's numbers, which `kv` has alike in a token."""
    return value(slot.versions[0], torch.float32)[0, 0, :, 0].tolist()


def change_in(slot):
    like = torch.empty(1, 1, 5, 2)
    return value_of_change(slot.changes[0], like)[0, 0, :, 0].tolist()


def test_a_slot_of_few_bits_reads_what_it_leads_to():
    """Scales of one value a token are exact in bfloat16: 127 and 7 steps of powers of two."""
    ages = Ages((5,), at(4))
    slot = rounded_slot_of(127, ages)
    where = [x.data_ptr() for held in (*slot.versions, *slot.changes) for x in held]
    assert (version_in(slot), change_in(slot)) == ([127] * 5, [0] * 5)
    ages.renew(at(3))
    kept = []
    slot.begin_step(first=False, sync=True, alike=False)
    write = slot.replace(
        lambda first: kept.extend(x.copy_(y) for x, y in zip(first, kv(254), strict=True)),
        (5,),
        (0, 1),
        first=False,
        alike=False,
    )
    # A sync step reads what it has written, as it was.
    assert all(torch.equal(x, y) for x, y in zip(write, kv(254), strict=True))
    assert version_in(slot) == [254] * 5
    (change, *_) = change_in(slot)
    assert change == pytest.approx(127, rel=2**-8)
    ages.look(at(2))
    ages.renew_part(own(1), at(2))
    keys, values = slot.read(five_in_two(1), three(1), keep=True)
    assert keys[0, 0, :, 0].tolist() == [*[254 + BELIEF * change] * 2, *[1] * 3]
    assert torch.equal(values, -keys)
    assert version_in(slot)[:2] == [254, 254]
    assert version_in(slot)[2:] == pytest.approx([1] * 3, rel=2**-8)
    assert change_in(slot)[2:] == pytest.approx([1 - 254] * 3, rel=2**-8)
    # Recorded steps read where they lie.
    assert where == [x.data_ptr() for held in (*slot.versions, *slot.changes) for x in held]


def test_a_slot_of_few_bits_holds_what_is_counted():
    keys = torch.zeros(2, 3, 4, 24)
    for dtype in DTYPES:
        slot = RoundedSlot.like([keys.to(dtype)], 37, Ages((37,), at(4)))
        held = sum(x.nbytes for of in (*slot.versions, *slot.changes) for x in of)
        assert held == 2 * 3 * 37 * RoundedSlot.held_bytes(24, dtype.itemsize)
        sent = slot._sent(torch.arange(4), [keys.to(dtype)])
        assert sum(x.nbytes for x in sent) == 2 * 3 * 4 * RoundedSlot.sent_bytes(24, dtype.itemsize)
        assert slot.fits([keys.to(dtype)], 37)
        assert not slot.fits([keys.to(dtype)], 36)
        assert not any(slot.fits([keys.to(other)], 37) for other in DTYPES if other != dtype)
    assert RoundedSlot.held_bytes(128, 2) == version_bytes(128) + change_bytes(128) == 196


def test_a_slot_of_few_bits_lands_what_all_have_sent():
    """Five tokens in two parts that share the middle one; every rank adds the same changes."""
    slots = [rounded_slot_of(127) for _ in range(2)]
    sent = [
        slot._sent(part_index((5,), 2, part), three(value))
        for slot, part, value in zip(slots, (0, 1), (254, 508), strict=True)
    ]
    for slot in slots:
        slot.packet, slot.under_way = Arrived(*zip(*sent, strict=True)), True
        slot.land((5,), (0, 1))
        assert version_in(slot) == pytest.approx([254, 254, 508, 508, 508], rel=2**-7)
        assert change_in(slot) == pytest.approx([127, 127, 381, 381, 381], rel=2**-8)
        before = version_in(slot)
        slot.land((5,), (0, 1))  # there is nothing to land twice
        assert version_in(slot) == before
    assert version_in(slots[0]) == version_in(slots[1])


def test_errors_of_few_bits_do_not_grow():
    """Each change makes good for what the last one's rounding, and the version's, took away."""
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 5, 8)
    slot, errors = RoundedSlot.like([keys], 5, Ages((5,), at(4))), []
    slot.replace(lambda first: first[0].copy_(keys), (5,), (0,), first=True, alike=False)
    for _ in range(100):
        keys = keys + 0.1 * torch.randn(keys.shape)
        slot.packet, slot.under_way = (
            Arrived(*([x] for x in slot._sent(torch.arange(5), [keys]))),
            True,
        )
        slot.land((5,), (0,))
        errors.append((value(slot.versions[0], torch.float32) - keys).abs().max())
    assert max(errors) < 2 * max(errors[:5]) < 0.2


# --------------------------------------------------------------------------------------- exchange

gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; its twin runs on a CPU"
)


class Standing(NamedTuple):
    """`Places` of tokens that are no part of a model's."""

    index: torch.Tensor
    sources: torch.Tensor

    @classmethod
    def of(cls, sources, device="cpu"):
        fresh = (sources >= 0).nonzero()[:, 0]
        return cls(fresh[sources[fresh].argsort()].to(device), sources.to(device))


def versions(dtype, device="cpu", seed=0, heads=3, tokens=37, dim=24):
    """Two versions and a part of tokens 5 to 14 and 30 to 36, laid out (batch, tokens, heads, dim)
    as projections write it; some tokens' newer version is the first."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 2, heads, tokens, dim, generator=generator)
    fresh = torch.randn(2, 16, heads, dim, generator=generator).transpose(1, 2)
    sources = torch.full((tokens,), -1, dtype=torch.int32)
    sources[5:14], sources[30:37] = torch.arange(9), torch.arange(9, 16)
    line = 4 * torch.rand(tokens, generator=generator) - 1
    newer = torch.rand(tokens, generator=generator) < 0.5
    kv = [x.to(device, dtype) for x in (first, second, fresh)]
    return *kv, *(x.to(device) for x in (sources, line, newer))


def token_by_token(first, second, fresh, sources, line, newer, keep):
    """What `exchange` is to do, in float64 and in words."""
    read = torch.empty_like(first)
    for token, source in enumerate(sources.tolist()):
        if source < 0:
            a, b = first[..., token, :].double(), second[..., token, :].double()
            read[..., token, :] = b + line[token].double() * (a - b)
        else:
            read[..., token, :] = fresh[..., source, :]
            if keep:
                version = first if newer[token] else second
                version[..., token, :] = fresh[..., source, :]
    return read


def check_exchange(function, dtype, keep, device="cpu"):
    first, second, *others = versions(dtype)
    both = torch.stack([first, second]).to(device)
    fresh, sources, line, newer = (x.to(device, copy=True) for x in others)
    want = token_by_token(first, second, *others, keep)
    places = Standing.of(sources, device)
    got = function(*both, fresh, places, line, newer, both if keep else None)
    assert got.dtype == dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got.cpu(), want)
    args = (*both, fresh, places.sources, line, newer)
    for mine, theirs in zip(args, (first, second, *others), strict=True):
        assert torch.equal(mine.cpu(), theirs)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exchange_equals_a_loop_over_tokens(dtype, keep):
    check_exchange(exchange_in_torch, dtype, keep)


@gpu
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exchange_by_kernel_equals_a_loop_over_tokens(dtype, keep):
    check_exchange(exchange, dtype, keep, "cuda")


def test_exchange_meets_either_version_exactly():
    first, second, fresh, sources, line, newer = versions(torch.float32)
    both = torch.stack([first, second])
    fresh, nothing = fresh[..., :0, :], Standing.of(sources.fill_(-1))
    for share, version in ((1, first), (0, second)):
        line.fill_(share)
        read = exchange_in_torch(*both, fresh, nothing, line, newer, both)
        assert torch.equal(read, version)


def test_exchange_takes_heads_without_a_batch():
    first, second, fresh, sources, *rest = versions(torch.float32)
    both, places = torch.stack([first, second]), Standing.of(sources)
    one = both[:, 0].clone()
    whole = exchange_in_torch(*both, fresh, places, *rest, both)
    assert torch.equal(exchange_in_torch(*one, fresh[0], places, *rest, one), whole[0])
    assert torch.equal(one, both[:, 0])


def check_place(dtype, device="cpu"):
    whole, _, fresh, sources, *_ = versions(dtype)
    index = torch.cat([torch.arange(5, 14), torch.arange(30, 37)])
    want = token_by_token(whole.clone(), whole, fresh, sources, torch.zeros(37), index, False)
    got = whole.to(device)
    place(got, fresh.to(device), index.to(device))
    assert torch.equal(got.cpu(), want)
    assert torch.equal(got[..., :5, :].cpu(), whole[..., :5, :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_is_put_in_its_place(dtype):
    check_place(dtype)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_puts_a_part_in_its_place(dtype):
    check_place(dtype, "cuda")


# ---------------------------------------------------------------------------------------- changes


def number_by_number(new, old):
    """What `compress` is to do, in float64 and in words: what rows say, and their scales."""
    change = new.double() - old.double()
    scales = (change.abs().amax(-1, keepdim=True) / 127).float().double()
    return torch.where(scales == 0, 0.0, (change / scales).round() * scales), scales


def check_compress(function, dtype, device="cpu"):
    old, _, new, *_ = versions(dtype)
    old = old[..., : new.shape[-2], :].contiguous()
    old[..., 3, :] = new[..., 3, :]
    rows = function(new.to(device), old.to(device)).cpu()
    assert rows.shape == (*new.shape[:-1], row_bytes(new.shape[-1]))
    numbers, scales = changes(rows, new.shape[-1])
    want, want_scales = number_by_number(new, old)
    torch.testing.assert_close(scales.double(), want_scales, rtol=1e-6, atol=0)
    # Half way between two numbers either will do.
    assert ((numbers * scales - want).abs() <= 1.001 * want_scales).all()
    assert ((numbers * scales - want).abs() > 1e-3 * want_scales).double().mean() < 0.01
    assert numbers.abs().amax(-1).unique().tolist() == [0, 127]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_rounds_each_number(dtype):
    check_compress(compress_in_torch, dtype)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_by_kernel_rounds_each_number(dtype):
    check_compress(compress, dtype, "cuda")


def check_exchange_changes(function, dtype, keep, device="cpu"):
    version, before, fresh, sources, ahead, _ = versions(dtype)
    rows = compress_in_torch(version, before)
    moved = version.double().clone()
    advance(moved, rows)
    args = [x.to(device) for x in (version.clone(), rows.clone(), fresh, ahead)]
    args.insert(3, Standing.of(sources, device))
    got = function(*args, keep)
    assert got.dtype == dtype
    assert got.is_contiguous()
    want = version.double() + ahead[:, None].double() * (moved - version.double())
    own = sources >= 0
    want[..., own, :] = fresh.double()
    torch.testing.assert_close(got.cpu(), want.to(dtype))
    kept, kept_rows = version.clone(), rows.clone()
    if keep:
        kept[..., own, :] = fresh
        kept_rows[..., own, :] = compress_in_torch(fresh, version[..., own, :])
    assert torch.equal(args[0].cpu(), kept)
    numbers, scales = changes(args[1].cpu(), fresh.shape[-1])
    want_numbers, want_scales = changes(kept_rows, fresh.shape[-1])
    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)
    # Half way between two numbers either will do.
    torch.testing.assert_close(numbers.double(), want_numbers.double(), rtol=0, atol=1)
    assert (numbers != want_numbers).double().mean() < 0.01


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exchange_of_changes(dtype, keep):
    check_exchange_changes(exchange_changes_in_torch, dtype, keep)


@gpu
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exchange_of_changes_by_kernel(dtype, keep):
    check_exchange_changes(exchange_changes, dtype, keep, "cuda")


@pytest.mark.parametrize("head_dim", [1, 5, 64])
def test_rows_of_any_head_dim(head_dim):
    new, old = torch.randn(2, 2, 3, 4, head_dim)
    numbers, scales = changes(compress(new, old), head_dim)
    assert numbers.shape == new.shape
    assert scales.shape == (2, 3, 4, 1)
    assert ((numbers * scales - (new - old)).abs() <= 0.501 * scales).all()


# ---------------------------------------------------------------------------------------- rounded


def in_words(x, largest):
    """What `x` is rounded to, in float64 and number by number, and the scales."""
    x = x.double()
    scales = (x.abs().amax(-1, keepdim=True) / largest).float().bfloat16().double()
    shares = (x / scales).nan_to_num().round().clamp(-largest, largest)
    return shares * scales, scales


def held_like(x):
    """Memory with what must be written over in it."""
    return [
        Rounded(*(y.view(torch.uint8).fill_(0xA5).view(y.dtype) for y in like(x.shape, x.device)))
        for like in (version_like, change_like)
    ]


def version_of(x):
    version, change = held_like(x)
    renew_in_torch(version, change, x, alone=True)
    return version


def check_held(version, change, last, before):
    """A version is `last`, rounded; its change is from `before` to it, rounded to fewer bits."""
    got = value(version, torch.float64), value_of_change(change, before.double())
    for mine, exact, largest in zip(
        got, (last, last.double() - before.double()), (127, 7), strict=True
    ):
        want, scales = in_words(exact.cpu(), largest)
        off = (mine.cpu() - want).abs()
        # Half way between two numbers either will do.
        assert (off <= 1.001 * scales).all()
        assert (off > 1e-3 * scales).double().mean() < 0.01


ODD = {"dim": 23}  # a head's halves are not alike
ROUNDED = pytest.mark.parametrize(("dtype", "size"), [*((x, {}) for x in DTYPES), (DTYPES[1], ODD)])


def check_renew(function, dtype, size, device="cpu"):
    first, second, *_ = (x.to(device) for x in versions(dtype, **size))
    first[..., 3, :] = 0  # a scale of nothing
    version, change = held_like(first)
    function(version, change, second, alone=True)
    check_held(version, change, second, second)
    before = value(version, torch.float64)
    function(version, change, first, alone=False)
    check_held(version, change, first, before)


@ROUNDED
def test_a_sync_step_rounds_each_number(dtype, size):
    check_renew(renew_in_torch, dtype, size)


@gpu
@ROUNDED
def test_a_kernel_rounds_each_number(dtype, size):
    check_renew(renew, dtype, size, "cuda")


def check_change_and_advance(change_of, advance, dtype, size, device="cpu"):
    first, _, new, *_ = (x.to(device) for x in versions(dtype, **size))
    version = version_of(first[..., : new.shape[-2], :].contiguous())
    before = value(version, torch.float64)
    change = change_of(new, version)
    after = before + value_of_change(change, before)
    assert torch.equal(value(version, torch.float64), before)
    want, scales = in_words((new.double() - before).cpu(), 7)
    assert (((after - before).cpu() - want).abs() <= 1.001 * scales).all()
    advance(version, change)
    check_held(version, change, after, after - value_of_change(change, before))


@ROUNDED
def test_a_rounded_change_moves_a_version_on(dtype, size):
    check_change_and_advance(change_in_torch, advance_rounded_in_torch, dtype, size)


@gpu
@ROUNDED
def test_a_kernel_moves_a_version_on(dtype, size):
    check_change_and_advance(change_to, advance_rounded, dtype, size, "cuda")


def check_exchange_rounded(function, dtype, keep, size, device="cpu"):
    first, second, fresh, sources, ahead, _ = versions(dtype, **size)
    version, change = held_like(second.to(device))
    renew_in_torch(version, change, second.to(device), alone=True)
    renew_in_torch(version, change, first.to(device), alone=False)
    last, moved = value(version, torch.float64).cpu(), value_of_change(change, first.double()).cpu()
    held = [x.clone() for x in (*version, *change)]
    places = Standing.of(sources, device)
    got = function(version, change, fresh.to(device), places, ahead.to(device), keep)
    assert got.dtype == dtype
    assert got.is_contiguous()
    own = sources >= 0
    want = last + ahead[:, None].double() * moved
    want[..., own, :] = fresh.double()
    torch.testing.assert_close(got.cpu(), want.to(dtype))
    for now, then in zip((*version, *change), held, strict=True):
        stays = torch.ones(len(sources), dtype=torch.bool) if not keep else ~own
        assert torch.equal(now[..., stays, :].cpu(), then[..., stays, :].cpu())
    if keep:
        mine = (Rounded(*(x[..., own, :].cpu() for x in of)) for of in (version, change))
        check_held(*mine, fresh, last[..., own, :])


@pytest.mark.parametrize("keep", [True, False])
@ROUNDED
def test_exchange_of_few_bits(dtype, size, keep):
    check_exchange_rounded(exchange_rounded_in_torch, dtype, keep, size)


@gpu
@pytest.mark.parametrize("keep", [True, False])
@ROUNDED
def test_exchange_of_few_bits_by_kernel(dtype, size, keep):
    check_exchange_rounded(exchange_rounded, dtype, keep, size, "cuda")
