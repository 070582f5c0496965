"""Cache slots: time, ages, and where prediction goes."""

import math

import pytest
import torch

from piflux.runtime.slots import BELIEF, FARTHEST, Ages, Slot, clock_scale, log_snr


def at(value):
    return torch.tensor(float(value))


def time(*clocks, step=0):
    tensors = [torch.as_tensor(clock) for clock in clocks]
    return log_snr(tensors, [clock_scale(x) for x in tensors], step).item()


def test_time_is_the_log_snr_whatever_the_unit():
    assert time(0.25) == pytest.approx(math.log(0.26 / 0.76))
    assert time(torch.tensor([250, 250])) == pytest.approx(time(0.25))
    assert time(torch.tensor([0.25, 0.25])) == pytest.approx(time(0.25))
    assert time(1.0) == pytest.approx(-time(0.0))
    assert math.isfinite(time(1.0))


def test_clocks_that_stand_still_cancel_out():
    for guidance in (3.5, 3500.0, 1.0):
        first, then = time(0.9, guidance), time(0.8, guidance)
        assert first - then == pytest.approx(time(0.9) - time(0.8), rel=1e-5)


def test_without_a_clock_time_is_the_step():
    assert time(step=3) - time(step=5) == 2


def test_weights_go_along_the_line_through_both_versions():
    """Five tokens in two parts of three that share one; part 1 is renewed."""
    ages = Ages((5,), at(4))
    assert torch.equal(ages.weights(at(3)), torch.zeros(5, 1))  # one version knows no way
    ages.renew(at(3))
    want = BELIEF * torch.ones(5, 1)
    assert torch.allclose(ages.weights(at(2)), want)
    ages.renew_part(2, 1, at(2))
    # At 1: two ticks after version 3, which was one tick after 4; one after 2, one after 3.
    want = BELIEF * torch.tensor([2.0, 2, 1, 1, 1])[:, None]
    assert torch.allclose(ages.weights(at(1)), want)
    ages.renew(at(1))
    want = BELIEF * torch.tensor([0.5, 0.5, 1, 1, 1])[:, None]
    assert torch.allclose(ages.weights(at(0)), want)


def test_times_next_to_each_other_do_not_leap():
    ages = Ages((2,), at(1))
    ages.renew(at(1 - 1e-6))
    assert torch.equal(ages.weights(at(0)), torch.full((2, 1), FARTHEST))


def kv(value):
    return [torch.full((1, 1, 5, 2), float(value)), torch.full((1, 1, 5, 2), -float(value))]


def test_a_slot_reads_what_its_versions_lead_to():
    slot = Slot(kv(1), kv(1))
    slot.renew(kv(3))
    keys, values = slot.predicted(torch.full((5, 1), 0.5))
    assert torch.equal(keys, kv(4)[0])
    assert torch.equal(values, kv(4)[1])
    slot.write((5,), 2, 1, [x[..., :3, :] for x in kv(7)])
    assert slot.last[0][0, 0, :, 0].tolist() == [3, 3, 7, 7, 7]
    assert slot.before[0][0, 0, :, 0].tolist() == [1, 1, 3, 3, 3]


def test_a_slot_of_order_0_remembers_one_version():
    slot = Slot(kv(1))
    slot.renew(kv(3))
    slot.write((5,), 2, 0, [x[..., :3, :] for x in kv(7)])
    assert slot.last[0][0, 0, :, 0].tolist() == [7, 7, 7, 3, 3]
    assert slot.before == []
