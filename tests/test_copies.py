"""Gathers by copy engines: each rank writes its keys and values into the other ranks' memory.

Without GPUs the memory is that of files, which all ranks have mapped, and gloo's barrier stands in
for that of torch's symmetric memory.
"""

from itertools import count
from pathlib import Path
from weakref import WeakValueDictionary

import pytest
import torch
import torch.distributed as dist
from captures import captured_once
from models import flux_inputs, tiny_flux
from test_numerics import EXACT
from test_replay import SAME, as_captured, farthest, on_tape
from test_virtual_ranks import image
from torch._C import _distributed_c10d as distributed
from torch.distributed import _symmetric_memory

import piflux
from piflux import parts
from piflux.policies import gather
from piflux.ranks import copies
from piflux.ranks import processes as runtime_ranks
from piflux.ranks.links import Link
from piflux.ranks.meeting import Meeting
from piflux.recording import recorded as replay
from piflux.runtime import ops

STEPS = 6


class Files(copies.Peers):
    """Ranks that share files in a folder."""

    def __init__(self, group, folder):
        super().__init__(runtime_ranks.ProcessRanks.of(group).link, torch.device("cpu"))
        self._pg = group
        self._folder = Path(folder)
        self._numbers = count()

    def share(self, count):
        number = next(self._numbers)

        def memory(rank):
            path = str(self._folder / f"{number}-{rank}")
            return torch.from_file(path, shared=True, size=count, dtype=torch.uint8)

        memory(self.rank)
        dist.barrier(self._pg)  # all are there
        every = [memory(rank) for rank in range(self.size)]
        return every[self.rank], Mapped(every, self._pg)


class Mapped:
    def __init__(self, every, group):
        self._every, self._group = every, group

    def get_buffer(self, rank, sizes, dtype):
        return self._every[rank].view(dtype).view(sizes)

    def barrier(self, channel, timeout_ms):
        assert timeout_ms > 0
        dist.barrier(self._group)


LAUNCHED: WeakValueDictionary[int, copies.Copies] = WeakValueDictionary()


@torch.library.custom_op("twin::launch", mutates_args=())
def launch(piece: torch.Tensor, starts: bool) -> None:
    """What a recording of a GPU holds of a gather."""
    gathering = LAUNCHED[piece.data_ptr()]
    gathering.is_pending = False
    (copies.Copies.start if starts else copies.Copies.wait)(gathering)
    gathering.is_pending = starts


@torch.library.custom_op("twin::fill", mutates_args=())
def fill(memory: torch.Tensor, piece: torch.Tensor, length: int, own: bool) -> None:
    """Likewise, of one that sends other memory each time."""
    gathering = LAUNCHED[memory.data_ptr()]
    gathering.is_pending = False
    copies.Copies.fill(gathering, piece, length, own=own)
    gathering.is_pending = True


class Launched(copies.Copies):
    """What was sent is there at once. Whoever looks at it must have waited all the same."""

    is_pending = False

    def __init__(self, count, peers, **options):
        super().__init__(count, peers, **options)
        LAUNCHED[self.piece.data_ptr()] = self

    def __getattribute__(self, name):
        assert name not in ("whole", "pieces") or not self.is_pending, "nobody waited for it"
        return super().__getattribute__(name)

    def start(self):
        torch.ops.twin.launch(self.piece, True)
        return self

    def fill(self, piece, length, *, own):
        torch.ops.twin.fill(self.piece, piece, length, own)

    def wait(self):
        torch.ops.twin.launch(self.piece, False)
        return super().__getattribute__("pieces")  # a recording has waited for nothing yet


def through_files(patch, group, folder):
    """Packets go this way from here on. Returns the collectives that are started all the same."""
    peers = Files(group, folder)
    patch.setattr(runtime_ranks.ProcessRanks, "_reached", lambda *_: peers)
    patch.setattr(runtime_ranks, "Copies", Launched)
    started, original = [], Link.gather

    def counted(*args, **kwargs):
        started.append(args)
        return original(*args, **kwargs)

    patch.setattr(Link, "gather", counted)
    return started


EVEN = {"image_hw": (6, 6), "text": 12}  # of which 2 and 3 ranks have parts without a shared token
UNEVEN = {"image_hw": (5, 7), "text": 13}


@captured_once()
def images(rank, group, folder, options, shape):
    """By collectives and by copies; how often a gathered whole had to be copied together."""
    model, inputs = tiny_flux(), flux_inputs(**shape)
    want = image(piflux.parallelize(model, group=group, inner="eager", **options), inputs, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        started = through_files(patch, group, folder)
        joined, original = [], parts.join
        for module in (ops, gather):  # of predictions, and of keys and values
            patch.setattr(module, "join", lambda *args: joined.append(args) or original(*args))
        parallel = piflux.parallelize(model, group=group, inner="eager", **options)
        got = [image(parallel, inputs, STEPS) for _ in range(2)]
    return [float((x - want).abs().max()) for x in got], len(started), len(joined)


ATTENTIONS = 2


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "gather"},
        {"policy": "displaced"},
        {"policy": "displaced", "order": 0},
        {"policy": "displaced", "compression": "int8"},
        {"policy": "rotate", "sync_steps": 2},
    ],
    ids=["gather", "displaced", "unpredicted", "int8", "rotate"],
)
def test_images_are_those_of_collectives(ranks, tmp_path, world_size, options):
    for apart, started, _ in ranks(world_size, images, tmp_path, options, UNEVEN):
        assert max(apart) <= EXACT
        assert started == 2 * STEPS  # the predictions


@pytest.mark.parametrize("shape, copied", [(EVEN, 0), (UNEVEN, 2 * ATTENTIONS)])
def test_what_lies_together_is_read_where_it_arrived(ranks, tmp_path, shape, copied):
    """For attention, in whatever order; the prediction is put in order."""
    for apart, _, joined in ranks(2, images, tmp_path, {"policy": "gather"}, shape):
        assert max(apart) <= EXACT
        assert joined == 2 * STEPS * (copied + 1)


@captured_once()
def recorded(rank, group, folder, options):
    """How far recorded images are from others, and what was recorded and left out of it."""
    with pytest.MonkeyPatch.context() as patch:
        through_files(patch, group, folder)
        recorder = on_tape(patch)
        plain, taped = (
            piflux.parallelize(tiny_flux(), group=group, inner=inner, **options)
            for inner in ("eager", as_captured)
        )
        made = [
            image(model, flux_inputs(**EVEN, seed=seed), STEPS)
            for seed in range(2)
            for model in (plain, taped)
        ]
    return farthest(made), recorder.recorded, recorder.played, recorder.eager


@pytest.mark.parametrize(
    "options, kinds",
    [
        ({"policy": "gather"}, 1),
        # Two kinds of sync steps; steady ones that find nothing on its way, and those that do,
        # whose versions change places from step to step.
        ({"policy": "displaced"}, 5),
        ({"policy": "displaced", "compression": "int4"}, 4),
    ],
)
def test_a_step_with_copies_is_recorded_whole(ranks, tmp_path, options, kinds):
    """What a step sends for the next one to read arrives at its end, in the same recording."""
    for apart, made, played, eager in ranks(2, recorded, tmp_path, options):
        assert apart <= SAME
        assert (made, played, eager) == (kinds, 2 * STEPS - kinds, 0)


@captured_once()
def one_that_fails(rank, group, folder, longest, policy):
    """Rank 0 can't record steps of more ops, the other can."""
    with pytest.MonkeyPatch.context() as patch:
        if policy == "displaced":
            patch.setattr(replay, "EARLY", 0)  # steps are recorded in their turn
        through_files(patch, group, folder)
        recorder = on_tape(patch)
        recorder.together = False
        if rank == 0:
            recorder.longest = longest
        plain, taped = (
            piflux.parallelize(tiny_flux(), group=group, inner=inner, policy=policy)
            for inner in ("eager", as_captured)
        )
        made = [image(model, flux_inputs(**EVEN), STEPS) for model in (plain, taped)]
    return farthest(made), recorder.recorded, recorder.played


@pytest.mark.parametrize("longest", [0, 170])
def test_a_rank_that_fails_to_record_goes_on_with_the_others(ranks, tmp_path, longest):
    """Where it fails in a send, or in waiting for one, it sends again from the same memory."""
    (first, tried, none), (second, _, played) = ranks(
        2, one_that_fails, tmp_path, longest, "gather"
    )
    assert max(first, second) <= SAME
    assert (tried, none) == (1, 0) and played == STEPS - 1


def test_what_a_failed_recording_did_not_send_is_not_waited_for(ranks, tmp_path):
    """`displaced`: Python's notes of what is under way are those of before it."""
    (first, tried, none), (second, _, played) = ranks(2, one_that_fails, tmp_path, 0, "displaced")
    assert max(first, second) <= SAME
    assert (tried > 0, none) == (True, 0) and played > 0


def about_peers(rank, group, folder):
    """What peers without GPUs say: where it goes, and what it holds."""
    ranks = runtime_ranks.ProcessRanks.of(group)
    assert copies.reach(ranks.link, torch.device("cpu"), ranks.exchange) is None
    peers = Files(group, folder)
    first, second = (copies.Copies(count, peers) for count in (5, 7))
    both = copies.shared_bytes()
    del first
    one = copies.shared_bytes()
    return both - one, second.piece.numel()


def test_peers(ranks, tmp_path):
    assert ranks(2, about_peers, tmp_path) == [(2 * 5, 7)] * 2


class Reported:
    """A link whose ranks have told these hosts and GPUs."""

    def __init__(self, told):
        self.told = told
        self.size = len(told)

    def exchange(self, mine, what):
        assert not isinstance(mine, tuple) or mine == self.told[0]
        return self.told if isinstance(mine, tuple) else [mine] * self.size


@pytest.mark.parametrize(
    "told, p2p, reaches, why",
    [
        ([("a", "0"), ("a", "1")], True, True, "one host"),
        ([("a", "0"), ("b", "1")], True, False, "another host"),
        ([("a", "0"), ("a", "2")], True, False, "a GPU that this process does not see"),
        ([("a", "0"), ("a", "1")], False, False, "no peer access"),
    ],
)
def test_gpus_of_one_host_that_reach_each_other(monkeypatch, told, p2p, reaches, why):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert _decided(monkeypatch, told, p2p) is reaches, why
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert not _decided(monkeypatch, told, p2p)


def test_two_ranks_of_one_gpu_do_not_copy(monkeypatch):
    assert not _decided(monkeypatch, [("a", "0"), ("a", "0")], True)


class ByName:
    """Of torch's symmetric memory what has no need of a GPU: whose memory it is, by a name."""

    def __init__(self):
        self.names = set()

    def set_group_info(self, name, rank, size, store):
        assert name not in self.names, "torch refuses a name that it knows"
        self.names.add(name)

    def empty_strided_p2p(self, size, stride, dtype, device):
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    def rendezvous(self, memory, name):
        return distributed._resolve_process_group(name)  # raises if nobody holds it


def test_memory_is_shared_more_than_once(monkeypatch):
    """By one model, and by another one of the same ranks."""
    monkeypatch.setattr(_symmetric_memory, "_SymmetricMemory", ByName())
    link = Link(Meeting(dist.HashStore(), "twice", 0, 1), within_s=5)
    first, second = (copies.Peers(link, torch.device("cpu")) for _ in range(2))
    shared = [first.share(8)[1], first.share(8)[1], second.share(8)[1]]
    assert shared == shared[:1] * 3
    del first, shared
    second.share(8)


def test_memory_that_can_not_be_shared_is_told_and_done_without(monkeypatch, caplog):
    def refused(*_):
        raise RuntimeError("pidfd_getfd: operation not permitted")

    monkeypatch.setattr(copies, "Copies", refused)
    assert not _decided(monkeypatch, [("a", "0"), ("a", "1")], True, copies_work=False)
    assert "operation not permitted" in caplog.text


def test_a_model_on_another_than_the_current_gpu_does_not_copy(monkeypatch):
    assert not _decided(monkeypatch, [("a", "0"), ("a", "1")], True, current=1)


def _decided(monkeypatch, told, p2p, copies_work=True, current=0):
    monkeypatch.setattr(copies.socket, "gethostname", lambda: "a")
    monkeypatch.setattr(copies, "_uuid", str)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: p2p)
    monkeypatch.setattr(copies, "Peers", lambda link, device: "peers")
    if copies_work:
        monkeypatch.setattr(copies, "Copies", lambda count, peers: None)
    link = Reported(told)
    found = copies.reach(link, torch.device("cuda", 0), link.exchange)
    assert found in (None, "peers")
    return found is not None


def on_gpus(rank, group, options):
    """As `images`, between real GPUs, with steps recorded."""
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    model = tiny_flux(single=2).cuda()
    inputs = {k: v.cuda() for k, v in flux_inputs(**EVEN).items()}
    made = []
    for reach in (lambda *_: None, copies.reach):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime_ranks, "reach", reach)
            parallel = piflux.parallelize(model, group=group, inner=as_captured, **options)
            made.append(torch.stack([image(parallel, inputs, STEPS) for _ in range(3)]).cpu())
            runtime = parallel._piflux_compiler.runtime
            found = list(runtime.ranks._peers.values())
    return float((made[0] - made[1]).abs().max()), [peers is not None for peers in found]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; its twins are above")
@pytest.mark.parametrize("policy", ["gather", "displaced", "rotate"])
def test_on_gpus(ranks, policy):
    for apart, copied in ranks(2, on_gpus, {"policy": policy}):
        assert apart <= 1e-4
        assert copied == [True]
