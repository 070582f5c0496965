"""Steps that are recorded once: the images stay the same, whatever changes between calls.

A GPU records kernels in CUDA graphs. Their twin here is a tape of the ops that ran: played again,
it knows the tensors by address and nothing of Python, so what a step left to Python would show.
Collectives are on it as functions to call.
"""

import itertools
import math
import operator

import pytest
import torch
from captures import captured_once
from models import Int8Weight, flux_inputs, quantized, sd3_inputs, tiny_flux, tiny_sd3
from test_virtual_ranks import STEPS, image
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import piflux
from piflux.compile.segments import segments_of, with_weights
from piflux.kernels import products
from piflux.memory.memory import Memory
from piflux.passes.speed.enclose import HEAD
from piflux.passes.speed.fuse_linears import WEIGHTS
from piflux.ranks.links import Link
from piflux.recording import recorded as replay
from piflux.recording.recorder import SharedSite
from piflux.runtime import ops

SAME = 1e-6


class Tape(TorchDispatchMode):
    """Every op below piflux's own, with the tensors that it read and made.

    Args:
        longest: how many steps can be recorded.
    """

    def __init__(self, longest):
        super().__init__()
        self.longest = longest
        self.eager = 0
        self.sent = set()
        self.steps = []
        self.before = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "twin":  # of a collective that is recorded: here it would run, alone
            self.append(func, args, kwargs)
            self.note(args[0].data_ptr(), waits=args[1] is False)
            return None
        if func.namespace == "piflux":
            # As on a GPU: Python runs while the tape does, and is not on it.
            with self:
                return getattr(ops, func._opname)._init_fn(*args, **kwargs)
        self.before += [(x, x.clone()) for x in written(func, args, kwargs)]
        made = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, made))
        return made

    def eagerly(self, function):
        self.eager += 1
        self.append(function, (), {})

    def append(self, function, args, kwargs):
        self.steps.append((function, args, kwargs, None))
        if len(self.steps) > self.longest:
            raise RuntimeError("operation not permitted when stream is capturing")

    def note(self, gathering, *, waits):
        """As CUDA has it: what another stream does is waited for where it was recorded."""
        if not waits:
            self.sent.add(gathering)
        elif gathering in self.sent:
            self.sent.remove(gathering)
        else:
            raise RuntimeError("dependency created on uncaptured work in another stream")

    def end(self):
        if self.sent:
            raise RuntimeError("capturing stream has unjoined work")

    def undo(self):
        for x, before in reversed(self.before):
            x.copy_(before)

    def play(self):
        for func, args, kwargs, made in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def written(func, args, kwargs):
    """What an op writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[i] if i < len(args) else kwargs[argument.name]


class Recorder:
    """Stands in for `replay.record`, and counts: also what recordings leave to be called."""

    def __init__(self):
        self.recorded = self.played = self.eager = 0
        self.longest = math.inf
        self.link = None
        self.together = True  # whether all ranks record the same kinds

    def record(self, run, site):
        self.recorded += 1
        if self.together and self.link is not None:
            # A GPU that records touches no memory, a tape does: what travels has to arrive before.
            self.link._gloo.barrier().wait()
        tape = Tape(self.longest)
        # Recording launches nothing: what `run` computed by the way must not be needed, and what
        # it wrote over must not be missed.
        try:
            with tape:
                outputs = run(tape.eagerly)
            tape.end()
        finally:
            tape.undo()
            self.eager += tape.eager
        for x in outputs:
            if isinstance(x, torch.Tensor):
                x.fill_(torch.nan)

        def play():
            self.played += 1
            tape.play()

        return play, outputs


def as_captured(gm, example_inputs):
    """An inner compiler, as 'eager' is, for which graphs are prepared as for inductor."""
    return gm.forward


def on_tape(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "TURNS", True)  # a tape shares no memory with another
    monkeypatch.setattr(replay, "record", recorder.record)
    gather = Link.gather

    def noted(link, *args, **kwargs):
        recorder.link = link
        return gather(link, *args, **kwargs)

    monkeypatch.setattr(Link, "gather", noted)
    return recorder


@pytest.fixture
def recorder(monkeypatch, captured_once):
    return on_tape(monkeypatch)


def parallel(model, n, inner, **options):
    return piflux.parallelize(model, group=piflux.virtual_ranks(n), inner=inner, **options)


def check(n, cases, recorded, played, recorder, **options):
    """Images of `cases`, one after the other, recorded and not, are the same."""
    model = tiny_flux(double=2, single=2)
    plain, taped = (parallel(model, n, inner, **options) for inner in ("eager", as_captured))
    for inputs in cases:
        assert (image(plain, inputs) - image(taped, inputs)).abs().max() <= SAME
    assert (recorder.recorded, recorder.played) == (recorded, played)


STEADY = STEPS - 2  # two sync steps by default
MORE_STEPS = 9


@pytest.mark.parametrize(
    "options", [{}, {"order": 0}, {"compression": "int8"}, {"compression": "int4"}]
)
def test_one_recording_serves_all_parts_and_images(recorder, options):
    """A rank's first step of each kind runs as it is, and is recorded: two kinds of sync steps and
    the steady ones."""
    cases = [flux_inputs(seed=seed) for seed in range(3)]
    check(3, cases, 3 * 3, 3 * (3 * STEPS - 3), recorder, **options)


def test_steps_that_are_computed_whole_are_not_recorded(recorder):
    cases = [flux_inputs(seed=seed) for seed in range(3)]
    check(3, cases, 3, 3 * (3 * STEADY - 1), recorder, sync="recompute")


def test_refreshed_caches_stay_where_they_are(recorder):
    # Sync at 0, 1, 4: each finds other parts, or is the first.
    check(2, [flux_inputs()], 2 * 4, 2 * (STEPS - 4), recorder, sync_steps=2, refresh_every=3)


def test_other_sizes_are_recorded_anew(recorder):
    """At once, while compiling is what took longest; later when their steps come again."""
    cases = [flux_inputs(text=text) for text in (5, 6, 7, 8, 8, 8)]
    # Of the last size a steady step in its first image, both sync steps in its second.
    recorded, played = 3 * 3 + 3, 3 * (STEPS - 3) + (STEADY - 1) + 2 * STEPS
    check(2, cases, 2 * recorded, 2 * played, recorder)


def test_programs_of_other_sizes_are_recorded_at_one_site(recorder, monkeypatch):
    """So that they use the same memory; of a second size sizes are symbols, in a program anew."""
    sites, record = [], recorder.record

    def noted(run, site):
        sites.append(site)
        return record(run, site)

    monkeypatch.setattr(replay, "record", noted)
    monkeypatch.setattr(SharedSite, "get", lambda site: site)
    model = parallel(tiny_flux(), 2, as_captured)
    for text in (5, 6):
        image(model, flux_inputs(text=text))
    assert len(model._piflux_compiler.programs) == 2
    assert len(sites) == 2 * 2 * 3 and len(set(sites)) == 1


def test_a_site_is_given_up_with_its_last_recording(monkeypatch):
    """Its memory can't be recorded in again."""

    class Graph:
        pass

    for name in ("Stream", "MemPool"):
        monkeypatch.setattr(torch.cuda, name, object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shared = SharedSite()
    site = shared.get()
    assert shared.get() is site  # nothing was recorded there yet
    first, second = site.graph(), site.graph()
    del first
    assert shared.get() is site
    del second
    assert shared.get() is not site


def test_what_is_left_of_a_graph_computes_the_same(recorder):
    """SD3 makes a picture of its tokens after they are gathered."""
    model, inputs = tiny_sd3(), sd3_inputs()
    plain, taped = parallel(model, 2, "eager"), parallel(model, 2, as_captured)
    assert (image(plain, inputs) - image(taped, inputs)).abs().max() <= SAME
    assert recorder.played == 2 * (STEADY - 1)


def two_prompts(model, steps=STEPS):
    """Steps of two prompts by turns, as guidance has them, twice."""
    first, second = flux_inputs(seed=1), flux_inputs(seed=2)
    latents = []
    for seed in range(2):
        x = flux_inputs(seed=seed)["hidden_states"]
        with piflux.generation(model):
            for now, then in itertools.pairwise(torch.linspace(1, 0, steps + 1)):
                step = {"hidden_states": x, "timestep": now.expand(1), "return_dict": False}
                a, b = (model(**prompt | step)[0] for prompt in (first, second))
                x = x + (then - now) * (a + 0.5 * (a - b))
        latents.append(x)
    return torch.stack(latents)


def test_each_prompt_has_its_recording(recorder):
    model = tiny_flux()
    want = two_prompts(parallel(model, 2, "eager"))
    assert (two_prompts(parallel(model, 2, as_captured)) - want).abs().max() <= SAME
    assert recorder.recorded == 2 * 2 * 3
    assert recorder.played == 2 * 2 * (2 * STEPS - 3)


def weight(model):
    return model.single_transformer_blocks[0].proj_out


def test_parameters_may_change_in_place_and_may_move(recorder):
    model, inputs = tiny_flux(), flux_inputs()
    plain, taped = parallel(model, 2, "eager"), parallel(model, 2, as_captured)
    images = [image(taped, inputs)]
    with torch.no_grad():
        weight(model).weight.mul_(1.5)
    images.append(image(taped, inputs))
    assert recorder.recorded == 2 * 3
    assert (images[1] - image(plain, inputs)).abs().max() <= SAME
    assert (images[1] - images[0]).abs().max() > 100 * SAME
    with torch.no_grad():
        weight(model).weight.data = weight(model).weight * 1.5
    images.append(image(taped, inputs))
    # In the first image after it only what comes twice: the steady steps.
    assert recorder.recorded == 2 * 3 + 2
    assert (images[2] - image(plain, inputs)).abs().max() <= SAME


def test_what_quantized_parameters_wrap_may_move(recorder):
    model, inputs = quantized(tiny_flux()), flux_inputs()
    plain, taped = parallel(model, 2, "eager"), parallel(model, 2, as_captured)
    first = image(taped, inputs)
    assert recorder.recorded == 2 * 3
    for name in ("scales", "values"):
        wrapped = weight(model).weight
        setattr(wrapped, name, -getattr(wrapped, name))
        recorded, then = recorder.recorded, image(taped, inputs)
        assert recorder.recorded == recorded + 2
        assert (then - image(plain, inputs)).abs().max() <= SAME
    assert (then - first).abs().max() <= SAME  # minus times minus


def test_names_of_what_parameters_wrap_are_asked_for_once(monkeypatch):
    """By a class in Python, which takes longer than all else that a step's key is made of."""
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    inner, plain = Int8Weight.of(torch.randn(4, 4)), torch.randn(4)
    nested = Int8Weight(inner, torch.randn(4, 1), 3.0)
    fixed = replay._Fixed([plain, nested, 2.5], moving=())
    monkeypatch.delattr(Int8Weight, "__tensor_flatten__")
    memories = plain, inner.values, inner.scales, nested.scales
    assert fixed.key([plain, nested, 2.5]) == (*[x.data_ptr() for x in memories], 2.5)


def test_where_a_step_is_played_nobody_looks_where_weights_lie(recorder, monkeypatch):
    """It takes the host milliseconds. That they are where they were, the step's key says."""
    looked, adjoin = [], products._adjoin
    monkeypatch.setattr(products, "_adjoin", lambda xs: bool(looked.append(xs)) or adjoin(xs))
    model, inputs = tiny_flux(), flux_inputs()
    taped = parallel(model, 2, as_captured)
    image(taped, inputs)
    assert looked and recorder.recorded == 2 * 3
    looked.clear()
    image(taped, inputs)
    assert not looked and recorder.recorded == 2 * 3
    with torch.no_grad():
        query = model.transformer_blocks[0].attn.to_q
        query.weight.data = query.weight.clone()
    image(taped, inputs)
    assert looked and recorder.recorded > 2 * 3


class Joined(nn.Module):
    def forward(self, a, b):
        return (torch.cat([a, b]),)


class Doubled(nn.Module):
    def forward(self, x, w):
        return (x * 2 + w,)


@pytest.mark.parametrize("reader", ["head", "others", "none"])
def test_a_head_is_given_parameters_if_it_alone_reads_weights(reader):
    graph = fx.Graph()
    x, a, b = map(graph.placeholder, "xab")
    call = graph.call_module(WEIGHTS, (a, b)) if reader != "none" else None
    w = a if call is None else graph.call_function(operator.getitem, (call, 0))
    head = graph.call_module(HEAD, (x, w))
    made = graph.call_function(operator.getitem, (head, 0))
    graph.output((made, w) if reader == "others" else (made,))
    gm = fx.GraphModule({WEIGHTS: Joined(), HEAD: Doubled()}, graph)
    before, own = str(graph), gm.get_submodule(HEAD).forward
    run = with_weights(gm, own)
    if reader != "head":
        assert run is own and str(graph) == before
        return
    assert head.args == (x, a, b) and len(graph.find_nodes(op="call_module")) == 1
    (got,) = segments_of(gm, {HEAD: run})(torch.ones(4), torch.ones(2), torch.zeros(2))
    assert got.tolist() == [3, 3, 2, 2]


def test_an_image_that_failed_leaves_nothing_to_the_next(recorder):
    """Numbers that are not finite must not outlive the image that made them."""
    model, inputs = tiny_flux(), flux_inputs()
    taped = parallel(model, 2, as_captured)
    assert (
        not image(taped, inputs | {"pooled_projections": torch.full((1, 16), torch.inf)})
        .isfinite()
        .all()
    )
    want = image(parallel(model, 2, "eager"), inputs)
    assert (image(taped, inputs) - want).abs().max() <= SAME


@pytest.mark.parametrize(
    "policy, recorded, played",
    [
        # All but the first step.
        ("gather", 2, 2 * (STEPS - 1)),
        # Two kinds of sync steps; steady ones, whose versions change places from step to step, so
        # that two recordings take turns, and those after a sync step, with nothing on its way.
        ("displaced", 2 * 5, 2 * (STEPS - 5)),
    ],
)
def test_what_virtual_ranks_send_stays_where_it_is(recorder, policy, recorded, played):
    check(2, [flux_inputs()], recorded, played, recorder, policy=policy)


def test_an_input_on_another_device_is_not_recorded(recorder, monkeypatch):
    """What is read from the host's memory would be recorded as it was."""
    monkeypatch.setattr(replay, "DEVICE", "cuda")
    check(2, [flux_inputs()], 0, 0, recorder)


@pytest.mark.usefixtures("captured_once")
def test_a_recording_that_fails_is_told_and_done_without(monkeypatch, caplog):
    def fail(run, site):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "TURNS", True)  # a tape shares no memory with another
    monkeypatch.setattr(replay, "record", fail)
    model, inputs = tiny_flux(), flux_inputs()
    got = image(parallel(model, 2, as_captured), inputs)
    assert (got - image(parallel(model, 2, "eager"), inputs)).abs().max() <= SAME
    told = [r.message for r in caplog.records if "not permitted" in r.message]
    assert [message.split()[0] for message in told] == ["sync", "steady"]


@captured_once()
def real(rank, group, options):
    """Three images by real ranks, recorded and not: how far they are apart, and counts."""
    images = []
    with pytest.MonkeyPatch.context() as patch:
        recorder = on_tape(patch)
        model = tiny_flux()
        plain, taped = (
            piflux.parallelize(model, group=group, inner=inner, **options)
            for inner in ("eager", as_captured)
        )
        for seed in range(3):
            inputs = flux_inputs(seed=seed)
            images += [image(plain, inputs, MORE_STEPS), image(taped, inputs, MORE_STEPS)]
    return farthest(images), recorder.recorded, recorder.played


@pytest.mark.parametrize(
    "options, recorded, played",
    [
        # Of each image the first step is one kind and the third another. The first of each kind
        # runs as it is.
        ({}, 3, 3 * MORE_STEPS - 3),
        # Steps 0, 3, 5 and 7; three ranks hold the same parts at 0 and 3 only.
        ({"sync_steps": (0, 3), "refresh_every": 2}, 5, 3 * MORE_STEPS - 5),
    ],
    ids=["rotate", "refreshed"],
)
def test_over_real_ranks(ranks, options, recorded, played):
    for apart, *counts in ranks(3, real, options):
        assert apart <= SAME
        assert counts == [recorded, played]


# ------------------------------------------------------------------------- with collectives in them


def pair(group, **options):
    """A model, its parallel one whose steps are not recorded, and one whose steps are."""
    model = tiny_flux()
    return model, *(
        piflux.parallelize(model, group=group, inner=inner, **options)
        for inner in ("eager", as_captured)
    )


def farthest(images):
    """How far images that were recorded are from those before them, which were not."""
    pairs = zip(images[::2], images[1::2], strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@captured_once()
def in_pieces(rank, group, options):
    """Two images: how far they are apart, what was recorded, and collectives in each step."""
    started, advance = Link.gather, Memory.advance
    steps = []

    def counted(*args, **kwargs):
        steps[-1] += 1
        return started(*args, **kwargs)

    def advanced(self, *args, **kwargs):
        steps.append(0)
        advance(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "gather", counted)
        patch.setattr(Memory, "advance", advanced)
        recorder = on_tape(patch)
        _, *models = pair(group, **options)
        images = [
            image(model, flux_inputs(seed=seed), MORE_STEPS)
            for seed in range(2)
            for model in models
        ]
    return farthest(images), (recorder.recorded, recorder.played), steps


GATHERS = 2 + 1  # one for each attention, and the prediction's


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "options, recorded, played",
    [
        # All but the first step of the first image.
        ({"policy": "gather"}, 1, 2 * MORE_STEPS - 1),
        # A sync step, the first step after it, which finds nothing on its way, and the others.
        ({"policy": "displaced", "order": 0, "sync_steps": 1}, 3, 2 * MORE_STEPS - 3),
        # Two kinds of sync steps, and with prediction the other steps write versions by turns.
        ({"policy": "displaced"}, 5, 2 * MORE_STEPS - 5),
        ({"policy": "displaced", "compression": "int8"}, 4, 2 * MORE_STEPS - 4),
        ({"policy": "displaced", "compression": "int4"}, 4, 2 * MORE_STEPS - 4),
    ],
    ids=["gather", "displaced", "predicted", "int8", "int4"],
)
def test_between_collectives_steps_are_recorded(ranks, world_size, options, recorded, played):
    for apart, counts, collectives in ranks(world_size, in_pieces, options):
        assert apart <= SAME
        assert counts == (recorded, played)
        assert collectives == [GATHERS] * 2 * 2 * MORE_STEPS


@captured_once()
def with_failures(rank, group, options, longest):
    """An image whose recording fails on rank 0 after so many ops, and one after it."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = on_tape(patch)
        recorder.together = False
        if rank == 0:
            recorder.longest = longest
        _, *models = pair(group, **options)
        images = [
            image(model, flux_inputs(seed=seed), MORE_STEPS)
            for seed in range(2)
            for model in models
        ]
    return farthest(images), recorder.played


@pytest.mark.parametrize("policy", ["gather", "displaced"])
@pytest.mark.parametrize("longest", [0, 80])
def test_a_rank_that_fails_to_record_goes_on_with_the_others(ranks, policy, longest):
    (first, none), (second, played) = ranks(2, with_failures, {"policy": policy}, longest)
    assert max(first, second) <= SAME
    assert none == 0 < played


@pytest.mark.parametrize(
    "options, each", [({"policy": "gather"}, 1), ({"policy": "displaced", "order": 0}, 4)]
)
def test_what_changed_is_recorded_anew(recorder, options, each):
    """Images of two sizes, of moved parameters and of two prompts."""
    images, counts = [], []
    model = tiny_flux()
    models = [parallel(model, 2, inner, **options) for inner in ("eager", as_captured)]
    small, large = flux_inputs(), flux_inputs(image_hw=(6, 7), text=9)

    def moved():
        with torch.no_grad():
            weight(model).weight.data = weight(model).weight * 1.5
        return small

    for inputs in (lambda: small, lambda: large, moved):
        now = inputs()
        images += [image(one, now, MORE_STEPS) for one in models]
        counts.append(recorder.recorded)
    images += [two_prompts(one, MORE_STEPS) for one in models]
    counts.append(recorder.recorded)
    assert farthest(images) <= SAME
    assert counts == [2 * n * each for n in (1, 2, 3, 4)]  # one prompt has the small's


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; its twins are above")
@pytest.mark.parametrize("options", [{}, {"order": 0}])
def test_virtual_ranks_on_a_gpu(options):
    """They record nothing; real ones do, on two GPUs in `test_copies.py`."""
    model = tiny_flux(double=2, single=2).cuda()
    cases = [{k: v.cuda() for k, v in flux_inputs(seed=seed).items()} for seed in range(2)]
    plain, prepared = (parallel(model, 3, inner, **options) for inner in ("eager", as_captured))
    for inputs in cases:
        assert (image(plain, inputs) - image(prepared, inputs)).abs().max() <= 1e-4
    assert not any(program.records for program in prepared._piflux_compiler.programs)


@pytest.mark.usefixtures("captured_once")
def test_ranks_that_take_turns_do_not_record(monkeypatch):
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    prepared = parallel(tiny_flux(), 2, as_captured)
    image(prepared, flux_inputs())
    (program,) = prepared._piflux_compiler.programs
    assert not program.records
