"""Policies unrolled over steps, and the windows that parts are made of."""

from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import piflux
from piflux.parts import join, part_index, part_length, windows
from piflux.policies.named import POLICIES
from piflux.policies.schedule import PolicyName, Schedule, sync_steps_of


def syncs(schedule, steps=12):
    return [t for t in range(steps) if schedule.step(t).sync]


def test_gather_syncs_at_every_step_and_stays():
    schedule = Schedule("gather", world_size=3)
    assert syncs(schedule, 5) == [0, 1, 2, 3, 4]
    assert {schedule.step(t).parts for t in range(5)} == {(0, 1, 2)}


def test_rotate_turns_by_one_part_a_step():
    schedule = Schedule("rotate", world_size=3)
    assert syncs(schedule) == [0, 2]
    assert [schedule.step(t).parts for t in range(4)] == [
        (0, 1, 2),
        (1, 2, 0),
        (2, 0, 1),
        (0, 1, 2),
    ]


def test_displaced_stays():
    schedule = Schedule("displaced", sync_steps=2, world_size=2)
    assert syncs(schedule) == [0, 1]
    assert {schedule.step(t).parts for t in range(5)} == {(0, 1)}


@pytest.mark.parametrize(
    ("sync_steps", "refresh_every", "want"),
    [
        (0, None, [0]),
        (1, 4, [0, 4, 8]),
        (2, 4, [0, 1, 5, 9]),
        (1, 1, list(range(12))),
        (20, None, list(range(12))),
        ((0, 6), 4, [0, 6, 10]),  # none is counted back from the last named one
    ],
)
def test_sync_steps_come_first_and_then_every_so_often(sync_steps, refresh_every, want):
    assert syncs(Schedule("rotate", sync_steps, refresh_every, world_size=2)) == want


def test_recomputing_every_step_is_refused():
    with pytest.raises(ValueError, match="sync steps only"):
        Schedule("gather", sync="recompute")
    with pytest.raises(ValueError, match="choose 'gather' or 'recompute'"):
        Schedule(sync="never")


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_under_rotation_no_cached_part_is_older_than_its_turn(world_size):
    """In a rank's cache the part it computes is fresh, the others are of the last turn."""
    schedule = Schedule("rotate", world_size=world_size)
    for rank in range(world_size):
        written = dict.fromkeys(range(world_size), 0)
        for t in range(1, 3 * world_size):
            written[schedule.step(t).parts[rank]] = t
            assert max(t - last for last in written.values()) <= world_size - 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("lengths", [(8,), (12,), (9, 16), (9, 7, 31)])
def test_parts_cover_everything_and_are_equally_long(lengths, world_size):
    x = torch.arange(sum(lengths) * 2).reshape(1, -1, 2)
    parts = [x.index_select(1, part_index(lengths, world_size, p)) for p in range(world_size)]
    assert {p.shape[1] for p in parts} == {sum(part_length(n, world_size) for n in lengths)}
    assert torch.equal(join(parts, range(world_size), 1, lengths), x)
    order = list(reversed(range(world_size)))
    assert torch.equal(join([parts[p] for p in order], order, 1, lengths), x)
    whole = torch.zeros_like(x)
    assert join(parts, range(world_size), -2, lengths, whole) is whole
    assert torch.equal(whole, x)


class Kernels(TorchDispatchMode):
    """Counts the ops that are no views: on a GPU each is a launch."""

    launched = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.launched += not op.is_view
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("world_size", [2, 8])
def test_joining_more_parts_launches_no_more_kernels(world_size):
    lengths = (9, 16)
    x = torch.randn(2, 3, 25, 4)
    parts = [x.index_select(-2, part_index(lengths, world_size, p)) for p in range(world_size)]
    with Kernels() as kernels:
        join(parts, range(world_size), -2, lengths, torch.empty_like(x))
    assert kernels.launched == 2  # the memory to write to, and one copy


def test_windows_that_do_not_fit_move_back_over_their_neighbours():
    starts = [[w.full for w in windows((7, 4), 3, part)] for part in range(3)]
    assert starts == [[0, 7], [3, 9], [4, 9]]


def test_sync_steps_by_name():
    assert (
        syncs(Schedule("rotate", (3, 1), world_size=2))[:8]
        == syncs(Schedule("rotate", (0, 1, 3), world_size=2))[:8]
    )
    schedule = Schedule("rotate", (0, 3), refresh_every=4, world_size=2)
    assert [t for t in range(12) if schedule.step(t).sync] == [0, 3, 7, 11]
    assert schedule.first_syncs == (0, 3)
    assert Schedule(sync_steps=()).first_syncs == (0,)


def test_few_steps_have_sync_steps_of_their_own():
    for steps, want in ((None, (0, 2)), (9, (0, 1)), (10, (0, 2))):
        assert sync_steps_of(Schedule(world_size=2), steps) == want
        assert sync_steps_of(Schedule(sync_steps=3, world_size=2), steps) == 3


def test_what_is_predicted():
    assert Schedule("rotate", world_size=2).predicts
    assert Schedule("displaced", world_size=2).predicts
    assert not Schedule("rotate", world_size=1).predicts
    assert not Schedule("gather", world_size=2).predicts
    assert not Schedule("rotate", world_size=2, order=0).predicts


def test_what_is_compressed():
    assert Schedule("displaced", world_size=2, compression="int8").compresses
    assert not Schedule("displaced", world_size=2).compresses
    assert not Schedule("gather", world_size=2, compression="int8").compresses
    with pytest.raises(ValueError, match="choose 'none', 'int8' or 'int4'"):
        Schedule(compression="zip")
    for compression in ("int8", "int4"):
        with pytest.raises(ValueError, match=f"'{compression}'.* order=0 remembers one: choose"):
            Schedule(order=0, compression=compression)


@pytest.mark.parametrize(
    "name, value",
    [
        ("order", 2),
        ("order", True),
        ("sync_steps", (0, -1)),
        ("sync_steps", (0.5,)),
        ("sync_steps", True),
        ("sync_steps", "2"),
        ("refresh_every", True),
        ("world_size", 0),
        ("world_size", 2.0),
        ("compute", (0, 2, 5)),  # numbers of steps, as sync_steps takes them
        ("compute", b"xx."),
        ("policy", None),
        ("policy", ["gather"]),
    ],
)
def test_wrong_settings(name, value):
    """By `Schedule` and `parallelize` alike; True is no number."""
    with pytest.raises(ValueError, match=name):
        Schedule(**{name: value})
    if name != "world_size":
        with pytest.raises(ValueError, match=name):
            piflux.parallelize(torch.nn.Linear(1, 1), **{name: value})


def test_sequences_of_steps_are_read_alike():
    assert Schedule(sync_steps=[0, 2]) == Schedule(sync_steps=(0, 2))
    assert Schedule(sync_steps=range(3)).sync_steps == (0, 1, 2)
    assert Schedule(compute=[True, 1, 0]).compute == "xx."


@pytest.mark.parametrize("index", [-1, 1.0, None])
def test_a_step_has_a_number(index):
    with pytest.raises(ValueError, match="step's number"):
        Schedule().step(index)


def test_settings_from_a_file(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"policy": "displaced", "sync_steps": [0, 2], "order": 0}')
    for policy in (path, str(path)):
        model = piflux.parallelize(
            torch.nn.Linear(1, 1), group=piflux.virtual_ranks(2), policy=policy, sync_steps=9
        )
        schedule = model._piflux_compiler.runtime.schedule
        assert schedule == Schedule("displaced", (0, 2), world_size=2, order=0)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "not a file of settings"),
        ("{", "not a file of settings"),
        ("[1]", "JSON object of policy"),
        ('{"ranks": 2}', "JSON object of policy"),
        ('{"policy": "warp"}', "unknown policy 'warp'"),
        ('{"compute": 18}', "only policy has to be there"),
        ('{"policy": "rotate", "compute": [0, 2, 5]}', "compute="),
    ],
)
def test_wrong_files_of_settings(tmp_path, text, said):
    path = tmp_path / "schedule.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        piflux.parallelize(torch.nn.Linear(1, 1), policy=str(path))


def test_every_policy_has_its_name():
    assert tuple(POLICIES) == get_args(PolicyName)
