"""Which generation a call belongs to, and whether ranks were called with the same thing."""

import math

import pytest
import torch

from piflux.memory.memory import Memory
from piflux.parts import wide
from piflux.policies.schedule import Schedule
from piflux.policies.step import apart, current, is_under_way
from piflux.ranks import agreement, header
from piflux.ranks.agreement import PROJECTIONS, Sketch, sketches
from piflux.ranks.packet import Packet
from piflux.ranks.virtual import virtual_ranks
from piflux.runtime import ops
from piflux.runtime.runtime import Runtime
from piflux.runtime.streams import STALE_CALLS, Roles, Seen, Stream

ROLES = Roles(latents=(0,), clocks=(1,), conditions=(2,), names={0: "x", 1: "t", 2: "prompt"})


def clock(value):
    return [torch.tensor([value])]


def observed(*calls):
    """Whether each (timestep, latents) was taken for the step after the one before."""
    stream = Stream(None, [], 0)
    return [stream.observe(clock(t), [x]) for t, x in calls]


def trajectory(seed, sigmas):
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, 1, 64, 8, generator=generator)
    return [(s, (1 - s) * image + s * noise) for s in sigmas]


def test_an_image_goes_on_while_its_clock_runs():
    assert observed(*trajectory(0, [1.0, 0.8, 0.5, 0.1])) == [False, True, True, True]


def test_a_clock_that_turns_back_is_another_image():
    first, second = trajectory(0, [1.0, 0.6, 0.2]), trajectory(1, [1.0, 0.6])
    assert observed(*first, *second) == [False, True, True, False, True]


def test_a_clock_that_stands_still_is_in_doubt():
    assert observed(*trajectory(0, [1.0, 1.0, 0.9])) == [False, False, True]


def test_an_aborted_image_does_not_go_on_in_another_one():
    """The next image starts lower than the last one stopped: only its noise tells."""
    assert observed(*trajectory(0, [1.0, 0.9]), *trajectory(1, [0.8, 0.7])) == [
        *(False, True),
        *(False, True),
    ]


def test_latents_of_another_shape_are_in_doubt():
    (t, x), (u, y) = trajectory(0, [1.0, 0.9])
    assert observed((t, x), (u, y[:, :32])) == [False, False]


def test_a_tensor_is_the_same_until_it_is_written():
    x = torch.randn(4)
    seen = Seen(x)
    assert seen.again(x)
    assert seen.again(x.clone())
    assert not seen.again(x + 1)
    assert not seen.again(x[:2])
    x.add_(1)
    assert not seen.again(x)


def test_views_of_a_buffer_that_was_written_are_not_the_same():
    """As where one buffer holds the positive and the negative prompt by turns."""
    buffer = torch.randn(2, 4)
    seen = Seen(buffer[:1])
    assert seen.again(buffer[:1])
    buffer.add_(1)
    assert not seen.again(buffer[:1])


def test_an_inference_tensor_is_compared_by_content():
    with torch.inference_mode():
        x = torch.randn(4)
        seen = Seen(x)
        assert seen.again(x)
        x.add_(1)
        assert not seen.again(x)


def test_each_condition_has_its_stream_and_old_ones_end():
    runtime = Runtime(Schedule(), None)
    prompts = [torch.randn(3) for _ in range(2)]

    def stream_of(prompt):
        with runtime.call("graph", ROLES, (torch.randn(1, 4), torch.ones(1), prompt)) as call:
            return call.stream

    conditional, unconditional = map(stream_of, prompts)
    assert conditional is not unconditional
    assert [stream_of(p) for p in prompts] == [conditional, unconditional]
    for _ in range(STALE_CALLS + 1):
        stream_of(prompts[0])
    assert list(runtime.streams) == [conditional]


def test_a_step_that_fails_leaves_no_cache_behind():
    runtime = Runtime(Schedule(), None)
    with pytest.raises(ZeroDivisionError), runtime.call("graph", ROLES, (None, None, None)):
        raise ZeroDivisionError
    assert not runtime.streams
    with pytest.raises(RuntimeError, match="no step is under way"):
        current()


def test_ops_outside_of_a_call_say_so():
    x = torch.randn(1, 4, 2)
    with pytest.raises(RuntimeError, match="no step is under way"):
        ops.shard(x, 1, [4], 2)


def test_a_call_inside_of_a_call_has_its_own_step():
    """Also one that is no step, of a model that runs on one rank alone."""
    runtime = Runtime(Schedule(), None)

    def inputs(prompt):
        return torch.randn(1, 4), torch.ones(1), torch.full((3,), prompt)

    def outer():
        before = current()
        with runtime.call("inner", ROLES, inputs(2.0)) as call:
            inner = call.run(current)
        with apart():
            assert not is_under_way()
        assert current() is before
        return before, inner

    with runtime.call("outer", ROLES, inputs(1.0)) as call:
        before, inner = call.run(outer)
    assert before.memory is not inner.memory
    assert not is_under_way()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sketches_see_other_noise_but_no_rounding(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 64, 32)
    rounded = Sketch.of(x.to(dtype).float())
    assert not Sketch.of(x).differs(rounded)
    assert Sketch.of(x).differs(Sketch.of(torch.randn(1, 64, 32)))
    assert Sketch.of(x).differs(Sketch.of(x * 1.1))
    assert Sketch.of(x).differs(Sketch.of(x[:, :32]))
    assert Sketch.of(x).differs(Sketch.of(x.to(dtype)))
    assert Sketch.of(x).differs(Sketch.of(torch.full_like(x, math.nan)))
    assert not Sketch.of(torch.zeros(30)).differs(Sketch.of(torch.zeros(30)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20, 3e38])
@pytest.mark.parametrize("count", [1, 64])
def test_the_same_extreme_on_all_ranks_is_agreement(value, count):
    """Whatever it does to a picture; and it hides no other difference."""
    x = torch.linspace(-1, 1, count)
    extreme = x.index_fill(0, torch.tensor([0]), value)
    assert not Sketch.of(extreme).differs(Sketch.of(extreme.clone()))
    assert Sketch.of(extreme).differs(Sketch.of(x))
    if count > 1:
        assert Sketch.of(extreme).differs(Sketch.of(extreme.roll(1)))
        assert Sketch.of(extreme).differs(Sketch.of(torch.where(extreme == x, 1.2 * x, extreme)))


def step_inputs():
    """As a step has them, and what numbers can be beside: by name, of any dtype and size."""
    torch.manual_seed(0)
    return {
        "latents": torch.randn(1, 256, 16),
        "prompt": torch.randn(1, 77, 32, dtype=torch.bfloat16),
        "ids": torch.arange(768).view(256, 3),
        "mask": torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1) > 0, -math.inf),
        "padding": torch.arange(77) < 50,
        "broken": torch.randn(9).index_fill(0, torch.tensor([3]), math.nan),
        "timestep": torch.tensor([0.1], dtype=torch.float64),
        "guidance": torch.tensor(math.nan),
        "nothing": torch.zeros(0, 4),
    }


def test_sketches_are_of_each_by_itself():
    """So that of ranks with different inputs the message names no others."""
    inputs = step_inputs()
    together = sketches(inputs)
    for name, x in inputs.items():
        alone = Sketch.of(x)
        assert list(together) == list(inputs) and str(together[name]) == str(alone)
        assert not together[name].differs(alone)
    for name in ("timestep", "guidance", "nothing"):
        assert together[name].numbers == pytest.approx(inputs[name].flatten().tolist(), nan_ok=True)
    for name in ("latents", "prompt", "ids", "padding"):
        x = inputs[name].flatten().double()
        index = torch.arange(len(x), dtype=torch.float32)
        waves = [torch.cos(index * math.sqrt(2 + k) + k).double() for k in range(PROJECTIONS)]
        want = [x.norm().item(), *[(x @ wave).item() for wave in waves]]
        assert together[name].usual == pytest.approx(want, rel=1e-4, abs=1e-4 * want[0])
        assert not any(together[name].huge + together[name].nan)
    assert together["mask"].usual == (0,) * (1 + PROJECTIONS)
    assert together["mask"].huge[0] == pytest.approx(129 * math.sqrt(36))
    assert together["broken"].nan[0] == 1


def test_tensors_of_many_elements_are_projected_piece_by_piece(monkeypatch):
    inputs = step_inputs()
    whole = sketches(inputs)
    monkeypatch.setattr(agreement, "AT_ONCE", 100)
    for name, found in sketches(inputs).items():
        for mine, theirs in ((found.usual, whole[name].usual), (found.huge, whole[name].huge)):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4 * (mine or (0,))[0])


def test_sketches_wait_for_the_device_once(monkeypatch):
    waits = []
    for name in ("cpu", "item", "__bool__", "__float__", "__int__", "__index__"):
        plain = getattr(torch.Tensor, name)
        spy = lambda x, name=name, plain=plain: waits.append(name) or plain(x)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, spy)
    sketches(step_inputs())
    assert waits == ["cpu"]


def test_devices_are_asked_one_by_one(monkeypatch):
    """Where some inputs are on the host and others on a GPU."""
    asked = []

    def numbers(flat):
        asked.append([(x.device.type, len(x)) for x in flat])
        return [torch.full((len(x),), len(x)) for x in flat]

    monkeypatch.setattr(agreement, "_numbers", numbers)
    inputs = {"a": torch.zeros(1), "b": torch.zeros(2, device="meta"), "c": torch.zeros(3)}
    assert [x.numbers for x in sketches(inputs).values()] == [(1,), (2, 2), (3, 3, 3)]
    assert sorted(asked) == [[("cpu", 1), ("cpu", 3)], [("meta", 2)]]


@pytest.mark.parametrize("a, b", [(3.5, math.inf), (3.5, 3.565), (1.0, 0.985), (1e20, 2e20)])
def test_numbers_are_compared_exactly(a, b):
    """A timestep, a guidance: of few elements, so that none is lost in a norm."""
    assert Sketch.of(torch.tensor([a])).differs(Sketch.of(torch.tensor([b])))
    assert not Sketch.of(torch.tensor(a)).differs(Sketch.of(torch.tensor(a)))


def test_a_packet_carries_tensors_of_any_layout_and_dtype():
    """What is sent is a copy; each token begins at a multiple of 16 bytes."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(1, 5, 3, 2, dtype=torch.bfloat16).transpose(1, 2),
        torch.arange(35, dtype=torch.uint8).view(5, 7),
        torch.randn(2, 2, 5, 8, dtype=torch.float64)[..., ::2],
    ]
    ranks = virtual_ranks(2)

    def step():
        sent = [x + ranks.rank for x in tensors]
        packet = Packet(ranks, sent)
        packet.write(sent)
        packet.start()
        for x in sent:
            x.zero_()
        packet.wait()
        for pieces, x in zip(packet.read(), tensors, strict=True):
            assert len(pieces) == 2
            for rank, piece in enumerate(pieces):
                assert torch.equal(piece, x + rank)
                assert piece.data_ptr() % 16 == piece.stride(-2) * piece.element_size() % 16 == 0
        for whole, x in zip(packet.read_whole(), tensors, strict=True):
            assert torch.equal(whole, torch.cat([x, x + 1], -2))
        return ranks.rank

    assert ranks.run(step) == 0


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "x, size",
    [
        (torch.randn(3, 8, dtype=BF16), 8),
        (torch.randn(3, 8, dtype=BF16)[:, 4:], 8),
        (torch.randn(3, 8, dtype=BF16)[:, 2:], 4),
        (torch.randn(3, 8, dtype=BF16)[:, 1:5], 2),
        (torch.randn(3, 6, dtype=BF16), 4),
        (torch.randn(8, 4, dtype=BF16).t(), 2),
        (torch.randn(3, 5), 4),
        (torch.randn(3, 5, dtype=torch.float64), 8),
        (torch.zeros(3, 4, dtype=torch.uint8), 4),
        (torch.zeros(3, 5, dtype=torch.uint8), 1),
    ],
)
def test_wide_views_are_of_the_same_memory(x, size):
    (found,) = wide(x)
    assert found.element_size() == size
    assert found.data_ptr() == x.data_ptr() and torch.equal(found.view(x.dtype), x)
    narrow = torch.zeros(2, 1, dtype=x.dtype)
    assert all(y.element_size() == x.element_size() for y in wide(x, narrow))


def test_packets_are_the_same_in_every_step():
    """Whatever the order in which two that travel at once are given back."""
    memory, ranks, like = Memory(), virtual_ranks(2), [torch.zeros(1, 2, 3, 4)]
    first, second = memory.packet(ranks, like), memory.packet(ranks, like)
    assert first is not second
    for one, other in ((first, second), (second, first)):
        memory.give_back(one)
        memory.give_back(other)
        assert memory.packet(ranks, like) is first and memory.packet(ranks, like) is second
    memory.give_all_back(ranks.rank)
    assert memory.packet(ranks, like) is first
    assert memory.packet(ranks, [torch.zeros(1, 2, 3, 8)]) not in (first, second)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_a_mask_is_itself_and_no_other(low):
    """What stands for minus infinity hides neither where it stands nor what stands beside it."""
    mask = torch.linspace(0, 1, 32).masked_fill(torch.arange(32) >= 20, low)
    assert not Sketch.of(mask).differs(Sketch.of(mask.clone()))
    assert Sketch.of(mask).differs(Sketch.of(mask.roll(1)))
    assert Sketch.of(mask).differs(Sketch.of(mask.masked_fill(mask == low, -low)))
    if low < -1e15:
        assert Sketch.of(mask).differs(Sketch.of(torch.where(mask == low, mask, mask * 2)))


def test_headers_tell_ranks_that_came_apart():
    """By where they are, exactly; by latents up to rounding; and the same extremes are the same."""
    x, t = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])

    def ahead(places=(1, 2, 3), t=t, x=x):
        return header.header_of(places, [t], [x])

    nan, infinite = x * math.nan, x.index_fill(1, torch.tensor([3]), math.inf)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    same = [ahead(), ahead(x=x.clone()), ahead(x=x * 1.001)]
    assert not header.apart(torch.stack(same))
    for each in (ahead(x=nan), ahead(x=infinite), ahead(t=t / 0)):
        assert not header.apart(torch.stack([each, each]))
    for name, other in {
        "step": ahead((1, 2, 4)),
        "call of the image": ahead((1, 3, 3)),
        "time": ahead(t=t * 1.001),
        "norm of the latents": ahead(x=x * 1.05),
        "projection": ahead(x=x + 0.2 * noise),
        "latents": ahead(x=nan),
    }.items():
        for both in ([ahead(), other], [other, ahead()], [ahead(), ahead(), other]):
            headers = torch.stack(both)
            assert header.apart(headers)
            assert name in header.tell(headers)
    assert 8 * ahead().numel() == header.BYTES


def test_a_wish_rides_on_a_header_and_tells_no_ranks_apart():
    x, t = torch.ones(1, 4, 4), torch.tensor([0.5])
    without, wishing = (header.header_of((1, 2, 3), [t], [x], wish=wish) for wish in (False, True))
    assert not header.apart(torch.stack([without, wishing]))
    assert header.wishes(torch.stack([without, wishing, without]))
    assert not header.wishes(torch.stack([without, without]))
