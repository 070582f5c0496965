"""Skipped steps: nothing runs in them, and what they predict is what the oracle says.

Of loops that the tests write themselves, and of diffusers' pipelines and samplers, where the plain
model is continued by hand (`ByHand`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import pipelines
import pytest
import torch
from captures import captured_once
from models import denoise, flux_inputs, tiny_flux, tiny_pipeline
from oracle import Oracle, log_snr
from test_numerics import EXACT, sample
from test_pipeline import draw, halve, look
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import piflux
from piflux.compile.compiler import _PerCall
from piflux.policies.masks import default_mask, mask_of, read_compute
from piflux.policies.schedule import Schedule

STEPS = 12
MASK = "xxx.x.x..x.x"
TIMES = torch.linspace(1, 0, STEPS + 1)[:-1]


# ------------------------------------------------------------------------------------ as data


@pytest.mark.parametrize(
    "given, want",
    [
        ("all", "all"),
        ("auto", "auto"),
        (18, 18),
        ("xx.x", "xx.x"),
        ([True, True, False], "xx."),
        ((1, 1, 0, 1), "xx.x"),
    ],
)
def test_what_compute_may_be(given, want):
    assert read_compute(given) == want


@pytest.mark.parametrize(
    "given, said",
    [
        ("most", "a number of steps, or a mask"),
        ("", "a number of steps, or a mask"),
        (1, "at least 2 steps"),
        (True, "a number of steps, or a mask"),
        (0.5, "a number of steps, or a mask"),
        ("x.xx", "one of the first 2 steps"),
        ([True, False], "one of the first 2 steps"),
    ],
)
def test_what_compute_may_not_be(given, said):
    with pytest.raises(ValueError, match=said):
        piflux.parallelize(torch.nn.Linear(1, 1), compute=given)


def test_masks():
    assert mask_of("all", 3) == "xxx"
    assert mask_of("xx.x", 4) == "xx.x"
    assert mask_of("xx.x", 5) is None
    assert mask_of("auto", 9) == "x" * 9
    assert mask_of("auto", 10).count("x") == 6
    assert mask_of("auto", 28).count("x") == 18
    assert default_mask(18, 28) == "xxxxxxxxx.x.x.x.x..x.x.x.x.x"
    assert default_mask(10, 28) == "xxx.x..x...x....x......x.x.x"
    for steps in (2, 3, 9, 28, 50):
        for computed in range(2, steps + 3):
            mask = default_mask(computed, steps)
            assert len(mask) == steps and mask.count("x") == min(computed, steps)
            assert mask.startswith("xx"), mask


def test_parts_turn_with_what_is_computed():
    """Were every other step skipped, two ranks would else compute the same part for ever."""
    steps = Schedule("rotate", (0,), world_size=2, compute="xx.x.x.x").steps(8)
    assert [step.computed for step in steps] == [c == "x" for c in "xx.x.x.x"]
    assert [step.parts[0] for step in steps if step.computed] == [0, 1, 0, 1, 0]
    assert [step.index for step in steps] == list(range(8))


def test_a_sync_step_that_is_skipped_comes_later():
    steps = Schedule("rotate", (0, 2, 5), 4, world_size=2, compute="xx.xxxxxx..x").steps(12)
    assert [step.index for step in steps if step.sync and step.computed] == [0, 3, 5, 11]


def test_more_sync_steps_where_steps_are_skipped():
    for n, syncs in ((1, (0, 2, 5)), (2, (0, 2, 5)), (3, (0, 2, 5, 10, 16))):
        assert Schedule("rotate", compute=18, world_size=n).first_syncs == syncs
    assert Schedule("rotate", compute="xxxxxx").first_syncs == Schedule("rotate").first_syncs
    assert Schedule("rotate", (0, 3), compute=18).first_syncs == (0, 3)


def test_a_mask_in_a_file(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"policy": "displaced", "compute": "xxx.x"}')
    model = piflux.parallelize(torch.nn.Linear(1, 1), policy=str(path))
    assert model._piflux_compiler.runtime.schedule == Schedule("displaced", compute="xxx.x")


# ----------------------------------------------------------------------------------- by an oracle


def image(model, times=TIMES):
    """Latents after each step of a plain Euler loop."""
    with piflux.generation(model, timesteps=times):
        return list(denoise(sample(model), flux_inputs(), STEPS))


def parallel(n, **options):
    group = piflux.virtual_ranks(n) if n > 1 else None
    return piflux.parallelize(tiny_flux(), group=group, inner="eager", **options)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    "n, options",
    [
        (1, {}),
        (2, {"policy": "gather"}),
        (2, {"policy": "rotate"}),
        (3, {"policy": "rotate", "sync_steps": (0, 3), "refresh_every": 4}),
        (3, {"policy": "displaced", "sync_steps": (0, 5)}),
        (2, {"policy": "displaced", "order": 0}),
    ],
)
def test_skipped_steps_equal_the_oracle(n, options):
    """With remembered keys and values of their true ages; the sync steps at 3 and 5 are skipped."""
    got = image(parallel(n, compute=MASK, **options))
    want = denoise(
        Oracle(
            tiny_flux(), n, **{"policy": "gather", "sync_steps": (0, 2, 5)} | options, mask=MASK
        ),
        flux_inputs(),
        STEPS,
    )
    plain = list(denoise(sample(tiny_flux()), flux_inputs(), STEPS))
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= EXACT
    assert (got[2] - plain[2]).abs().max() <= EXACT or n > 1
    assert (got[-1] - plain[-1]).abs().max() > 100 * EXACT


@pytest.mark.usefixtures("captured_once")
def test_a_number_takes_the_default_mask_of_the_announced_steps():
    """Two images one after the other; and one that begins in the middle, as from a picture."""
    model = parallel(2, policy="gather", compute=8)
    for _ in range(2):
        got = image(model)[-1]
        want = list(
            denoise(
                Oracle(tiny_flux(), 2, "gather", mask=default_mask(8, STEPS)), flux_inputs(), STEPS
            )
        )[-1]
        assert (got - want).abs().max() <= EXACT


class Ops(TorchDispatchMode):
    """What one call of a graph dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.names.append(op.name())
        return op(*args, **kwargs or {})

    @property
    def computed(self) -> bool:
        return any("sdpa" in name or "attention" in name for name in self.names)

    @property
    def waits(self) -> list[str]:
        """Those for which the host would wait for a GPU."""
        return [x for x in self.names if x in ("aten::_local_scalar_dense", "aten::equal")]


@contextmanager
def watched() -> Iterator[list[Ops]]:
    """Gives what each call of a graph dispatches."""
    call, calls = _PerCall.__call__, []

    def watching(self: _PerCall, *args: Any) -> Any:
        calls.append(Ops())
        with calls[-1]:
            return call(self, *args)

    with mock.patch.object(_PerCall, "__call__", watching):
        yield calls


@pytest.mark.usefixtures("captured_once")
def test_an_image_that_begins_in_the_middle_has_that_end_of_the_mask():
    """As one from a picture, or of a second expert; its first two steps are computed anyway."""
    assert MASK[5:] == ".x..x.x"
    model, inputs = parallel(2, policy="gather", compute=MASK), flux_inputs()
    with watched() as calls, piflux.generation(model, timesteps=TIMES):
        for time in TIMES[5:]:
            sample(model)(**inputs | {"timestep": time[None]})
    assert [ops.computed for ops in calls] == [c == "x" for c in "xx..x.x"]


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("n", [1, 2])
def test_a_skipped_step_runs_no_graph_and_waits_for_nothing(n):
    model, inputs = parallel(n, compute=MASK), flux_inputs()
    with watched() as calls, piflux.generation(model, timesteps=TIMES):
        for time in TIMES:
            latents = inputs["hidden_states"] * (1 + time)
            sample(model)(**inputs | {"timestep": time[None], "hidden_states": latents})
    assert [ops.computed for ops in calls] == [c == "x" for c in MASK]
    skipped = [ops for ops in calls if not ops.computed]
    assert [ops.waits for ops in skipped] == [[]] * len(skipped)
    assert max(len(ops.names) for ops in skipped) <= 40  # kernels, of a few numbers each


@pytest.mark.usefixtures("captured_once")
def test_what_is_continued_is_the_callers_own():
    """Whatever is done to it in place, nothing that comes later is of it."""
    images = []
    for spoils in (False, True):
        model, inputs, out = parallel(1, compute=MASK), flux_inputs(), []
        with piflux.generation(model, timesteps=TIMES):
            for time in TIMES:
                x = sample(model)(**inputs | {"timestep": time[None]})
                out.append(x.clone())
                if spoils:
                    x.zero_()
        images.append(torch.stack(out))
    assert torch.equal(*images)


def two_times(model, times):
    """A loop that calls twice at each time but the first, as Heun's method does."""
    x, out = flux_inputs()["hidden_states"], []
    for time in times:
        v = model(**flux_inputs() | {"timestep": time[None], "hidden_states": x})
        x = x - 0.05 * v
        out.append(v)
    return out


@pytest.mark.usefixtures("captured_once")
def test_of_two_predictions_of_one_time_the_second_counts():
    times = torch.cat([TIMES[:1], TIMES[1:].repeat_interleave(2)])[:9]  # a, b, b, c, c, ..
    model = parallel(1, compute="xxx.xx.xx")
    with piflux.generation(model, timesteps=times):
        got = two_times(sample(model), times)
    known: list[tuple[float, Tensor]] = []
    for i, (now, value) in enumerate(zip(map(float, times), got, strict=True)):
        if i in (3, 6):
            (before, old), (last, new) = known[-2:]
            ahead = 0.75 * (log_snr(now) - log_snr(last)) / (log_snr(last) - log_snr(before))
            assert (value - (new + min(ahead, 3.0) * (new - old))).abs().max() <= EXACT
        else:
            known = [(time, v) for time, v in known if time != now] + [(now, value)]


# ---------------------------------------------------------------------------- what is not skipped


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    "compute, said", [(8, "was not known"), ("auto", "was not known"), ("xxx.x", "is for one of 5")]
)
def test_all_is_computed_where_no_mask_fits(compute, said, caplog):
    """And it is told, once."""
    model = parallel(1, compute=compute)
    for _ in range(2):
        got = image(model, TIMES if isinstance(compute, str) and "." in compute else None)
    want = list(denoise(sample(tiny_flux()), flux_inputs(), STEPS))
    assert (got[-1] - want[-1]).abs().max() <= EXACT
    assert caplog.text.count(said) == 1
    assert said in str(piflux.explain(model))


def test_a_backend_takes_a_mask():
    """The image's beginning is inferred; of a number nobody says how many there are."""
    options = {"compute": MASK, "inner": "eager"}
    torch._dynamo.reset_code(tiny_flux().forward.__code__)
    model = torch.compile(tiny_flux(), backend=piflux.backend, options=options)
    with torch.no_grad():
        got = list(denoise(sample(model), flux_inputs(), STEPS))[-1]
        again = list(denoise(sample(model), flux_inputs(), STEPS))[-1]
    want = list(denoise(Oracle(tiny_flux(), 1, "gather", mask=MASK), flux_inputs(), STEPS))[-1]
    assert (got - want).abs().max() <= EXACT
    assert (again - want).abs().max() <= EXACT
    for compute in (8, "auto"):
        model = torch.compile(
            tiny_flux(seed=1), backend=piflux.backend, options={"compute": compute}
        )
        with pytest.raises(Exception, match="Give it a mask"), torch.no_grad():
            model(**flux_inputs())


# ------------------------------------------------------------------------------------- callbacks


def by_hand(mask, edited=()):
    """A plain pipeline whose transformer is continued by hand, from scratch after edited steps."""
    pipe = tiny_pipeline()
    forward, state = pipe.transformer.forward, {"step": 0}
    known: list[tuple[float, Tensor]] = []

    def call(**inputs):
        time = log_snr(float(inputs["timestep"][0]))
        if state["step"] - 1 in edited:
            known.clear()
        if mask[state["step"]] == "." and len(known) > 1:
            (before, old), (last, new) = known[-2:]
            out = new + 0.75 * (time - last) / (last - before) * (new - old)
        else:
            out = forward(**inputs)[0]
            known.append((time, out))
        state["step"] += 1
        return (out,)

    pipe.transformer.forward = call
    return pipe


def parallel_pipe(n=1, **options):
    group = piflux.virtual_ranks(n) if n > 1 else None
    return piflux.parallelize(
        tiny_pipeline(), group=group, policy="gather", inner="eager", **options
    )


@pytest.mark.usefixtures("captured_once")
def test_after_an_edit_steps_are_computed_until_two_are_known():
    """`halve` edits steps 1 and 2; 3 and 4 are computed, though the mask leaves them out."""
    mask = "xx....xx."
    options = {"num_inference_steps": len(mask)}
    for callback, edited in ((halve, (1, 2)), (look, ())):
        want = draw(by_hand(mask, edited), 0, callback_on_step_end=callback, **options)
        for n in (1, 2):
            got = draw(parallel_pipe(n, compute=mask), 0, callback_on_step_end=callback, **options)
            assert (got - want).abs().max() <= EXACT


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("inference", [False, True])
def test_an_edit_in_place_is_seen(inference):
    def spoil(pipe, step, timestep, kwargs):
        if step == 2:
            kwargs["latents"].mul_(0.5)
        return {}

    mask = "xxx...x.x"
    options = {"num_inference_steps": len(mask), "callback_on_step_end": spoil}
    with torch.inference_mode(inference):
        got = draw(parallel_pipe(compute=mask), 0, **options)
        want = draw(by_hand(mask, (2,)), 0, **options)
    assert (got - want).abs().max() <= EXACT


@captured_once()
def edited_alone(rank, group):
    """What several calls came to in which rank 1 alone has a callback."""
    pipe = piflux.parallelize(
        tiny_pipeline(), group=group, policy="gather", inner="eager", compute="xx...."
    )
    told = []
    for callback in (halve, look):
        alone = {"callback_on_step_end": callback} if rank else {}
        try:
            told.append(draw(pipe, 0, num_inference_steps=6, **alone))
        except piflux.RanksDisagree as error:
            told.append(str(error))
    return told


def test_an_edit_on_one_rank_leaves_none_waiting(ranks):
    """It alone knows that its next step can't be continued: they vote, and that step tells it."""
    for edited, looked in ranks(2, edited_alone):
        assert "norm of the latents" in edited
        want = draw(by_hand("xx...."), 0, num_inference_steps=6)
        assert (looked - want).abs().max() <= EXACT


@captured_once()
def announced(rank, group):
    model = piflux.parallelize(tiny_flux(), group=group, policy="gather", inner="eager", compute=8)
    try:
        image(model, TIMES if rank == 0 else TIMES[:-1])
    except piflux.RanksDisagree as error:
        return str(error)


def test_ranks_that_would_skip_other_steps_are_told(ranks):
    for told in ranks(2, announced):
        assert "computed steps" in told and default_mask(8, STEPS) in told


# ------------------------------------------------------------------------- pipelines and samplers


class Continuing:
    """A plain transformer, each of whose passes is continued by hand.

    Args:
        mask: of the steps from the first in which it is called.
        time: of a clock's value.
        computed: noted here: for each call, whether it was computed.
    """

    def __init__(self, model: Any, mask: str, time: Callable[[float], float], computed: list[bool]):
        self.forward, self.mask, self.time, self.computed = model.forward, mask, time, computed
        self.passes: dict[int, list[tuple[float, Tensor | None]]] = {}
        model.forward = self

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        condition = inputs["encoder_hidden_states"]
        calls = self.passes.setdefault(condition.data_ptr(), [])
        time = self.time(float(inputs["timestep"].flatten()[0]))
        known = [(then, x) for then, x in calls if x is not None]
        if self.mask[len(calls)] == "." and len(known) > 1:
            (before, old), (last, new) = known[-2:]
            ahead = 0.0 if last == before else 0.75 * (time - last) / (last - before)
            calls.append((time, None))
            self.computed.append(False)
            return (new + max(-3.0, min(3.0, ahead)) * (new - old),)
        out = self.forward(**inputs)[0]
        if known and known[-1][0] == time:  # a better one of the same time
            calls[:] = [(then, None if then == time else x) for then, x in calls]
        calls.append((time, out))
        self.computed.append(True)
        return (out,)


@dataclass
class ByHand(pipelines.Studio):
    """Draws without piflux, by transformers that are continued by hand.

    Attributes:
        masks: of each transformer's steps.
        time: by which predictions move, of a clock's value.
    """

    masks: tuple[str, ...] = ()
    time: Callable[[float], float] = log_snr
    computed: list[bool] = field(default_factory=list)

    def parallel(self, target: Any) -> Any:
        names = [name for name in ("transformer", "transformer_2") if hasattr(target, name)]
        models = [model for name in names if (model := getattr(target, name)) is not None]
        for model, mask in zip(models, self.masks, strict=True):
            Continuing(model, mask, self.time, self.computed)
        return target


def heun(studio: pipelines.Studio) -> None:
    """Two calls at each time but the first."""
    pipe = pipelines.sd3()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    studio.draw(studio.parallel(pipe), **pipelines.PROMPT, num_inference_steps=4)


def thousandth(clock: float) -> float:
    return log_snr(clock / 1000)


PIPELINES = {
    # what is drawn, the mask of the announced steps, by hand the transformer's own, and its time
    "FLUX.1, true CFG": (pipelines.true_guidance, "xxx.x.", ("xxx.x.",), log_snr),
    "FLUX.2": (pipelines.klein_2, "xxx.", ("xxx.",), log_snr),
    "Qwen-Image, guided": (pipelines.qwen, "xxx.x.", ("xxx.x.",), log_snr),
    "SD3.5": (pipelines.stable_diffusion_3, "xxx.x.", ("xxx.x." * 2,), thousandth),
    "Wan": (pipelines.wan_text_to_video, "xxx.x.", ("xxx.x.",), float),
    # The second expert begins at the fifth step, and so computes that and the last.
    "Wan, two experts": (pipelines.wan_experts, "xx.x..", ("xx.x", "xx"), float),
    "image to image": (pipelines.image_to_image, "xxxx..", ("xxx..",), log_snr),
    "Heun": (heun, "xxx.x.x", ("xxx.x.x",), thousandth),
}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_skip_what_is_continued_by_hand(name):
    """One rank's, and two ranks' that gather. Wan's clock, a whole number, is the time itself."""
    drawing, mask, own, time = PIPELINES[name]
    want = ByHand(masks=own, time=time)
    drawing(want)
    assert not all(want.computed)
    for group in (None, piflux.virtual_ranks(2)):
        options = {"group": group, "policy": "gather", "inner": "eager", "compute": mask}
        got = pipelines.Studio(options)
        drawing(got)
        for image, drawn in zip(got.images, want.images, strict=True):
            for x, y in zip(image.latents, drawn.latents, strict=True):
                assert (x - y).abs().max() <= EXACT * y.abs().max()
        plain = pipelines.Studio()
        drawing(plain)
        assert (plain.images[0].latents[-1] - got.images[0].latents[-1]).abs().max() > 100 * EXACT
