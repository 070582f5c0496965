"""Which calls are steps of one pass: passes with the same conditions, inputs that never repeat."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import piflux
from piflux.policies.schedule import Schedule
from piflux.ranks.virtual import virtual_ranks
from piflux.runtime.runtime import Runtime
from piflux.runtime.streams import MOST_ALIKE, Roles

ROLES = Roles((0,), (1,), (2, 3), {0: "x", 1: "t", 2: "prompt", 3: "other"})
TIMELESS = Roles((0,), (), (2, 3), {0: "x", 2: "prompt", 3: "other"})


def steps(calls, roles=ROLES):
    """For each call (latents, time, prompt, other) its stream's number and step."""
    runtime, numbers, found = Runtime(Schedule(world_size=2), virtual_ranks(2)), {}, []
    with runtime.generation():
        for numbers_of_inputs in calls:
            args = [torch.full((1,), float(x)) for x in numbers_of_inputs]
            with runtime.call(None, roles, args) as call:
                stream, step = call.stream, call.step
                found.append(
                    (numbers.setdefault(id(stream), (len(numbers), stream))[0], step.index)
                )
    return found


def test_a_second_pass_with_the_same_conditions_is_a_stream_of_its_own():
    """To the end, also where guidance ends before the image does."""
    passes = [(i, i, 7, 7) for i in range(4) for _ in range(2 if i < 2 else 1)]
    assert steps(passes) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (0, 3)]


def test_a_time_that_a_solver_comes_back_to_is_another_step():
    """As Heun's method does, with other latents."""
    assert steps([(0, 0, 7, 7), (1, 1, 7, 7), (2, 1, 7, 7), (3, 2, 7, 7)]) == [
        (0, i) for i in range(4)
    ]


def test_the_same_call_over_and_over_holds_few_caches():
    streams = {stream for stream, _ in steps([(0, 0, 7, 7)] * 9)}
    assert len(streams) == MOST_ALIKE


@pytest.mark.parametrize("roles", [ROLES, TIMELESS], ids=["with a clock", "without"])
def test_an_input_that_never_repeats_tells_no_streams_apart(roles):
    """Of one pass a step, and of two, whose prompts do repeat."""
    assert steps([(i, i, 7, 100 + i) for i in range(4)], roles) == [(0, i) for i in range(4)]
    passes = [(i, i, prompt, 100 + i) for i in range(3) for prompt in (7, 8)]
    assert steps(passes, roles) == [(stream, i) for i in range(3) for stream in (0, 1)]


def test_an_input_that_has_repeated_tells_streams_apart():
    """Its change in the middle of an image is another pass that begins late."""
    found = steps([(0, 0, 7, 7), (1, 1, 7, 7), (2, 2, 8, 7), (3, 3, 7, 7), (4, 4, 8, 7)])
    assert found == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]


class Waits(TorchDispatchMode):
    """Counts what the host asks of tensors, for which it would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._opname == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def test_no_later_step_of_an_image_waits_for_the_device():
    """Latents that come with positions, which are the same tensor at each step, as FLUX's are."""
    runtime, waits = Runtime(Schedule(world_size=2), virtual_ranks(2)), []
    roles = Roles((0, 4), (1,), (2, 3), {4: "ids"} | ROLES.names)
    stays = [torch.ones(1) for _ in range(3)]
    with runtime.generation():
        for i in range(5):
            with Waits() as counted:
                args = [torch.full((1,), float(i)) for _ in range(2)] + stays
                with runtime.call(None, roles, args):
                    waits.append(counted.count)
    assert waits[1] > 0 == sum(waits[2:])


class Timed(nn.Module):
    """Two attentions over x + what it makes of a time, and a scale for each channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.time = nn.Linear(8, 8), nn.Linear(1, 8)

    def forward(self, x, t, scale):
        for _ in range(2):
            x = x * scale[:, None] + self.time(t.reshape(-1, 1, 1))
            q = self.project(x)[:, None]
            x = x + F.scaled_dot_product_attention(q, q, x[:, None])[:, 0]
        return x


def draw(time, scale):
    """Of 5 calls with what these make of 0.9, 0.8, .. how many were steady, and the model."""
    model = Timed()
    options = {"policy": "rotate", "sync_steps": 1, "inner": "eager"}
    parallel = piflux.parallelize(model, group=piflux.virtual_ranks(2), **options)
    x, steady = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1)), 0
    with piflux.generation(parallel), torch.no_grad():
        for i in range(5):
            now = 0.9 - 0.1 * i
            args = x + 0.1 * i, time(now), scale(now)
            steady += int((parallel(*args) - model(*args)).abs().max() > 1e-5)
    return steady, parallel


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
def test_one_number_a_batch_entry_is_a_clock(shape):
    """With a condition that stays, and with one that never repeats."""
    assert draw(lambda now: torch.full(shape, now), lambda now: torch.ones(1, 8))[0] == 4
    assert draw(lambda now: torch.full(shape, now), lambda now: torch.full((1, 8), now))[0] == 4


def test_an_image_without_steady_steps_is_told_of(caplog):
    """The only clock stands still, so that each call may be another pass of the first step."""
    with caplog.at_level(logging.WARNING, logger="piflux"):
        steady, parallel = draw(lambda now: torch.ones(1), lambda now: torch.full((1, 8), now))
    assert steady == 0
    told = "an image of 5 calls had no steady step"
    assert told in caplog.text
    assert told in str(piflux.explain(parallel))
