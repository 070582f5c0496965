"""Cache slots: time, ages, and where prediction goes."""

import math
from typing import NamedTuple

import pytest
import torch

from piflux.kernels.changes import (
    advance,
    compress,
    compress_in_torch,
    exchange_changes,
    exchange_changes_in_torch,
)
from piflux.kernels.exchange import exchange, exchange_in_torch, place
from piflux.kernels.rows import changes, row_bytes
from piflux.memory.ages import BELIEF, FARTHEST, Ages
from piflux.memory.changes import ChangeSlot
from piflux.memory.places import Places
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
    ages.begin(at(9))
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
    slot.packet = Arrived(*pieces)
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

    under_way = True

    def __init__(self, *pieces):
        self.pieces = pieces

    def wait(self):
        self.under_way = False

    def read(self):
        return self.pieces


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
        slot.packet = Arrived(*zip(*sent, strict=True))
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
        slot.packet = Arrived(slot._sent(torch.arange(5), [keys]))
        slot.land((5,), (0,))
        errors.append((slot.first[0] - keys).abs().max())
    assert max(errors) < 2 * max(errors[:5]) < 1e-2


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
