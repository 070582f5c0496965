"""What a rank holds is counted before it is held; what does not fit is refused, or not taken."""

import math
import re
import weakref
from unittest import mock

import pytest
import torch
from graphs import captured_flux, transformed
from models import flux_inputs, quantized, tiny_flux
from test_auto import Attention, X
from test_virtual_ranks import image
from torch import fx

import piflux
from piflux.compile import choices
from piflux.cost.memory import Own, free_bytes
from piflux.errors import DoesNotFit, RanksDisagree
from piflux.kernels.products import adjoining
from piflux.memory.rounded import RoundedSlot
from piflux.ranks.virtual import virtual_ranks


def held(memory):
    """Bytes of the slots of one rank."""
    slots = [slot for (rank, _), slot in memory.slots.items() if rank == 0]
    return sum(x.nbytes for slot in slots for x in versions(slot))


def versions(slot):
    if isinstance(slot, RoundedSlot):
        return [x for held in (*slot.versions, *slot.changes) for x in held]
    return [*slot.first, *slot.second]


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    "options",
    [{}, {"order": 0}, {"compression": "int8"}, {"compression": "int4"}, {"policy": "gather"}],
    ids=str,
)
def test_what_is_counted_is_what_is_held(options):
    model = tiny_flux()
    parallel = piflux.parallelize(model, group=virtual_ranks(2), inner="eager", **options)
    found = []
    end = type(parallel._piflux_compiler.runtime.streams).end

    def ending(streams):
        found.extend(held(stream.memory) for stream in streams)
        end(streams)

    with mock.patch.object(type(parallel._piflux_compiler.runtime.streams), "end", ending):
        image(parallel, flux_inputs(), 3)
    (report,) = piflux.explain(parallel).graphs
    assert found == [report.cache_bytes]
    assert report.weight_bytes == sum(x.nbytes for x in model.parameters())


def test_joined_weights_are_counted_each():
    """As they lie once a model was parallelized with its layers joined."""
    model = tiny_flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        attn = block.attn
        adjoining(attn.to_q.weight, attn.to_k.weight, attn.to_v.weight)
    (report,) = piflux.explain(limited(None, model)).graphs
    assert report.weight_bytes == sum(x.nbytes for x in model.parameters())


def test_what_is_read_no_more_is_not_alive_and_views_are_no_memory():
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.exp, (x,))
    view = graph.call_method("reshape", (a, 4, 2))
    b = graph.call_function(torch.exp, (view,))
    c = graph.call_function(torch.exp, (b,))
    graph.output(c)
    values = [torch.zeros(8), torch.zeros(8)]
    values.append(values[1].reshape(4, 2))
    values += [torch.zeros(4, 2), torch.zeros(4, 2)]
    for node, value in zip((x, a, view, b, c), values, strict=True):
        node.meta["example_value"] = value
    # The input was there before; of three results two are alive at once.
    assert Own.of(graph) == (0, 2 * 8 * 4)


def test_a_part_keeps_less_alive_than_the_whole():
    gm = captured_flux()
    whole = Own.of(gm.graph)
    transformed(gm, 2)
    part = Own.of(gm.graph)
    assert 0.4 * whole.step < part.step < 0.8 * whole.step


def test_other_devices_are_not_counted():
    assert free_bytes(torch.device("cpu")) == math.inf


@pytest.mark.parametrize(("fraction", "left"), [(1.0, 30 + 5), (0.25, 25 - 20 + 5)])
def test_what_a_gpu_has_left(fraction, left):
    """Of 100: 30 that nobody has, 20 that torch holds, of which 5 are for later."""
    known = {
        "mem_get_info": (30, 100),
        "memory_reserved": 20,
        "memory_allocated": 15,
        "get_per_process_memory_fraction": fraction,
    }
    told = {name: mock.Mock(return_value=value) for name, value in known.items()}
    with mock.patch.multiple(torch.cuda, **told):
        assert free_bytes(torch.device("cuda", 0)) == left


def called(n, room, **options):
    """A model that was called where each rank has so many bytes left."""
    patched = mock.patch.multiple(choices, DEVICE="cpu", free_bytes=lambda _: room)
    parallel = piflux.parallelize(Attention(), group=virtual_ranks(n), inner="eager", **options)
    with patched, torch.no_grad():
        parallel(X, torch.ones(1))
    return parallel


def test_what_does_not_fit_is_refused_before_it_is_held():
    with pytest.raises(DoesNotFit) as error:
        called(2, 0)
    said = str(error.value)
    assert "policy='rotate' on 2 ranks takes" in said
    assert "No policy needs so little" in said
    parallel = called(2, math.inf)
    (report,) = piflux.explain(parallel).graphs
    room = 2 * (report.cache_bytes + report.packet_bytes) + report.step_bytes
    assert called(2, room) is not None
    with pytest.raises(DoesNotFit, match="This would fit: policy='rotate', compression='int8', "):
        called(2, room - 1)


@pytest.mark.usefixtures("captured_once")
def test_weights_that_do_not_fit_by_themselves():
    """Told in units that say something of small ones, and of no GPU where there is none."""
    parallel = piflux.parallelize(tiny_flux(), group=virtual_ranks(2), inner="eager", memory=1e-9)
    with torch.no_grad(), pytest.raises(DoesNotFit) as error:
        parallel(**flux_inputs())
    said = str(error.value)
    assert re.search(r"The weights alone are 0\.\d+ MiB more than a rank may hold\. ", said)
    assert "GPU" not in said and " 0.0 " not in said


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_8_bits_are_told_where_they_are_not_taken(in_8_bits):
    model = tiny_flux(double=2)
    if in_8_bits:
        quantized(model.transformer_blocks)
        quantized(model.single_transformer_blocks)
    parallel = piflux.parallelize(model, group=virtual_ranks(2), inner="eager", memory=1e-9)
    with torch.no_grad(), pytest.raises(DoesNotFit) as error:
        parallel(**flux_inputs())
    assert ("weights in 8 bits" in str(error.value)) != in_8_bits


def needed(here=2, **options):
    """Bytes that a process with so many of two ranks takes beside the weights."""
    (report,) = piflux.explain(called(2, math.inf, **options)).graphs
    return here * (report.cache_bytes + report.packet_bytes) + report.step_bytes


def taken(parallel):
    schedule = parallel._piflux_compiler.runtime.schedule
    return schedule.policy, schedule.compression


def test_auto_takes_what_fits():
    """Where it takes `rotate`, that in 8 bits if two versions are too much."""
    left = needed() - 1
    with mock.patch.object(choices.Choices, "_choose_policy", lambda self, schedule, *_: schedule):
        parallel = called(2, left, policy="auto")
    assert taken(parallel) == ("rotate", "int8")
    assert "note: memory: took policy='rotate', compression='int8', " in str(
        piflux.explain(parallel)
    )


LADDER = [
    {"policy": "displaced"},
    {"policy": "displaced", "compression": "int8"},
    {"policy": "displaced", "compression": "int4"},
    {"policy": "rotate", "compression": "int4"},
    {"policy": "gather"},
]


def test_what_is_taken_is_the_nearest_that_fits():
    """From each setting to the next one, where a byte less than it needs is left."""
    room = [needed(**options) for options in LADDER]
    assert room == sorted(set(room), reverse=True)
    for left, options in zip(room, LADDER, strict=True):
        parallel = called(2, left, policy="displaced", memory="auto")
        assert taken(parallel) == (options["policy"], options.get("compression", "none"))
    with pytest.raises(DoesNotFit, match="No policy needs so little"):
        called(2, room[-1] - 1, policy="displaced", memory="auto")


def test_what_fits_is_left_as_it_is_and_told(caplog):
    parallel = called(2, needed(), memory="auto")
    assert taken(parallel) == ("rotate", "none")
    (line,) = piflux.explain(parallel).notes
    assert line.startswith("memory: policy='rotate' fits, ")
    assert [record.message for record in caplog.records if "memory:" in record.message] == [line]
    assert not piflux.explain(called(2, needed())).notes


def limited(memory, model=None):
    """On a device that has no limit of its own."""
    parallel = piflux.parallelize(
        model or tiny_flux(), group=virtual_ranks(2), inner="eager", memory=memory
    )
    image(parallel, flux_inputs(), 1)
    return parallel


@pytest.mark.usefixtures("captured_once")
def test_a_limit_is_of_all_that_a_rank_holds():
    (report,) = piflux.explain(limited("auto")).graphs
    need = report.memory_bytes + report.cache_bytes + report.packet_bytes  # of two ranks here
    assert taken(limited(need / 2**30)) == ("rotate", "none")
    assert taken(limited((need - 1) / 2**30)) == ("rotate", "int8")
    with pytest.raises(DoesNotFit):
        limited(report.weight_bytes / 2**30)


def test_on_a_gpu_a_limit_is_of_what_the_process_holds():
    """Text encoders, too: 30 of a limit of 100, of which the GPU itself has 80 left."""
    told = {"free_bytes": lambda _: 80, "held_bytes": lambda _: 30, "DEVICE": "cpu"}
    with mock.patch.multiple(choices, **told):
        for limit, left in [(100, 70), (200, 80)]:
            chosen = choices.Choices(False, None, [], limit / 2**30)
            assert chosen._left(torch.device("cpu"), 1000) == pytest.approx(left)


@pytest.mark.parametrize("memory", [0, -1, math.nan, math.inf, "24", True])
def test_a_limit_is_a_number_of_gib(memory):
    with pytest.raises(ValueError, match="memory must be 'auto' or a number of GiB, got"):
        piflux.parallelize(Attention(), group=virtual_ranks(2), memory=memory)


def told_limits(rank, group):
    """What ranks take of which rank 1 has less left, and where they were given other limits."""
    left = needed(here=1) - rank
    patched = mock.patch.multiple(choices, DEVICE="cpu", free_bytes=lambda _: left)
    own = piflux.parallelize(Attention(), group=group, inner="eager", memory="auto")
    other = piflux.parallelize(Attention(), group=group, inner="eager", memory=1.0 + rank)
    with patched, torch.no_grad():
        own(X, torch.ones(1))
        with pytest.raises(RanksDisagree) as error:
            other(X, torch.ones(1))
    return taken(own), str(error.value)


def told(rank, group):
    """What one rank says where only rank 1 is short of memory."""
    room = 0 if rank else math.inf
    patched = mock.patch.multiple(choices, DEVICE="cpu", free_bytes=lambda _: room)
    parallel = piflux.parallelize(Attention(), group=group, inner="eager")
    control = parallel._piflux_compiler.runtime.ranks
    before = control._given_up
    with patched, torch.no_grad(), pytest.raises(DoesNotFit) as error:
        parallel(X, torch.ones(1))
    # Raised alike, it is told to nobody: who is slow to raise it stops no later call.
    assert control._given_up is before
    with torch.no_grad():
        piflux.parallelize(Attention(), group=group, inner="eager")(X, torch.ones(1))
    return str(error.value)


def test_all_ranks_take_what_fits_on_each(ranks):
    (first, said), (second, _) = ranks(2, told_limits)
    assert first == second == ("rotate", "int8")
    assert "memory" in said and "2.0" in said


def test_all_ranks_are_told_where_one_is_short(ranks):
    first, second = ranks(2, told)
    assert first == second and "a rank has 0 MiB left" in first


@pytest.mark.usefixtures("captured_once")
def test_what_an_image_remembered_is_freed_for_one_of_another_size():
    """Whether that one compiles, as the second size does, or not. Kept for one that is alike."""
    parallel = piflux.parallelize(tiny_flux(), group=virtual_ranks(2), inner="eager")
    streams = parallel._piflux_compiler.runtime.streams
    streams.recycles = True
    left: list[weakref.ref] = []
    for number, text in enumerate((5, 6, 7, 7)):
        with piflux.generation(parallel):
            parallel(**flux_inputs(text=text), return_dict=False)
            (stream,) = streams
            if left:
                assert (left[-1]() is stream.memory) == (number == 3)
                assert (left[-1]() is None) == (number < 3)
            left.append(weakref.ref(stream.memory))
            del stream
    assert len(parallel._piflux_compiler.programs) == 2
