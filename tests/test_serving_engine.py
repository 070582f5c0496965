"""The engine of the server: who draws what, and what becomes of jobs whose ranks are lost."""

import asyncio
import base64
import functools
import gc
import io
import queue
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import numpy as np
import openai
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from models import small_demo, small_demo_on
from PIL import Image
from safetensors.torch import save_file
from servers import PATIENCE_S, served

from piflux.demo import TEXT_TOKENS, demo_pipeline
from piflux.errors import CannotLoad
from piflux.serving import build_app
from piflux.serving import engine as engine_module
from piflux.serving import seats as seats_module
from piflux.serving.engine import RankEngine
from piflux.serving.grouping import Pace
from piflux.serving.jobs import Drawn, Job, Preview, Queued, Refused, Stepped
from piflux.serving.messages import (
    Draw,
    End,
    Failed,
    Finished,
    Gone,
    Load,
    Loaded,
    Shown,
    Step,
    Stop,
)
from piflux.serving.previews import Previews
from piflux.serving.processes import LOOPBACK, LocalWorkers, Store

# --- the engine, on workers that only pretend --------------------------------------------------


class Hall:
    """Workers that answer as `act(worker, draw)` says; by default they draw at once. `holds` tells
    whether they leave what they are to draw to warm up.

    Attributes:
        workers: all that were started.
        draws: what rank 0 of each group was told to draw for jobs, in order.
        prepared: how often a spare process was asked for.
    """

    def __init__(self, act=None, loads=True, holds=False):
        self.act, self.loads, self.holds = act, loads, holds
        self.workers: list[Pretended] = []
        self.draws: list[Draw] = []
        self.prepared = 0

    def open(self):
        return "nowhere", 1

    def start(self, number, hear):
        self.workers.append(Pretended(self, number, hear))
        return self.workers[-1]

    def prepare(self):
        self.prepared += 1

    def close(self):
        self.closed = True


class Pretended:
    def __init__(self, hall, number, hear):
        self.hall, self.number, self.hear = hall, number, hear
        self.told = []
        self.ended = False

    def send(self, command):
        self.told.append(command)
        if isinstance(command, Load):
            takes = {"image", "negative_prompt", "guidance_scale"}
            if self.hall.loads:
                self.hear(
                    Loaded("cpu", "Pipe", frozenset(takes), False, True, 16, (64, 64), 28, 100)
                )
            else:
                self.kill()
        elif isinstance(command, End):
            self.kill()
        elif isinstance(command, Draw):
            warms = command.pictures[0].prompt == ""
            if not warms and command.group.rank == 0:
                self.hall.draws.append(command)
            if warms and self.hall.holds:
                return
            if warms or self.hall.act is None:
                self.draw(command)
            else:
                self.hall.act(self, command)

    def draw(self, draw, ranks=None, leads=None):
        """Answer with a picture whose only colour is the seed."""
        leads = draw.group.rank == 0 if leads is None else leads
        size = draw.group.size
        seconds = draw.asked.steps * {1: 1.0, 2: 0.55}[size]
        self.hear(Step(draw.number, draw.asked.steps, draw.asked.steps))
        images = [Image.new("L", (1, 1), p.seed) for p in draw.pictures] if leads else None
        self.hear(Finished(draw.number, images, False, ranks or size, seconds, None, 100))

    def kill(self):
        if not self.ended:
            self.ended = True
            self.hear(Gone(f"rank {self.number} was killed"))


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(engine_module, "TICK_S", 0.01)
    for name, seconds in {"START_PAUSE_S": 0.001, "WORKERS_END_S": 0.1}.items():
        monkeypatch.setattr(seats_module, name, seconds)


def job(seed=1, *more, user="", **given):
    return Job(f"job {seed}", f"prompt {seed}", (seed, *more), user=user, **given)


async def drawn(engine, asked):
    """All events of a job, of which the last is returned alone, too."""
    events = [event async for event in engine.submit(asked)]
    assert isinstance(events[-1], Drawn)
    return events[-1], events


def colours(done):
    return [image.getpixel((0, 0)) for image in done.images]


def run(hall, test, ranks=2, **given):
    """`await test(engine)` with an engine that is ready; within seconds."""

    async def all_of_it():
        engine = RankEngine("demo", ranks, workers=hall, **given)
        await engine.start()
        try:
            await until(lambda: engine.state().phase == "ready")
            return await test(engine)
        finally:
            await engine.end(0)

    return asyncio.run(asyncio.wait_for(all_of_it(), PATIENCE_S))


async def until(is_so, seconds=PATIENCE_S):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be so"
        await asyncio.sleep(0.002)


def test_one_job_is_drawn_by_all_ranks_and_many_by_one_each():
    hall = Hall()

    async def test(engine):
        done, _ = await drawn(engine, job(7))
        assert colours(done) == [7]
        assert done.report.ranks == 2 and done.report.policy == "gather"
        many = await asyncio.gather(*(drawn(engine, job(i)) for i in range(40)))
        assert [colours(done) for done, _ in many] == [[i] for i in range(40)]
        with pytest.raises(Refused, match="lora"):
            await drawn(engine, job(1, loras=(("ink", 1.0),)))

    run(hall, test)
    sizes = [draw.group.size for draw in hall.draws]
    assert sizes[0] == 2
    assert set(sizes[2:20]) == {1}, "once they wait"


@pytest.mark.parametrize(("inner", "warming"), [("eager", [0, 1, 2]), ("inductor", [0])])
def test_ranks_warm_up_at_once_where_none_finds_what_another_compiled(inner, warming):
    """Each has the model to capture, which takes a rank most of its start."""
    hall = Hall(holds=True)

    async def all_of_it():
        engine = RankEngine("demo", 3, workers=hall, inner=inner)
        await engine.start()
        await until(lambda: any(isinstance(x, Draw) for w in hall.workers for x in w.told))
        for _ in range(5):  # it has dispatched all it can
            await asyncio.sleep(2 * engine_module.TICK_S)
        await engine.end(0)

    asyncio.run(asyncio.wait_for(all_of_it(), PATIENCE_S))
    drew = [w.number for w in hall.workers if any(isinstance(x, Draw) for x in w.told)]
    assert drew == warming


def test_pictures_of_a_job_come_in_the_order_of_its_seeds_with_all_steps_counted():
    async def test(engine):
        done, events = await drawn(engine, job(5, 3, 9))
        assert colours(done) == [5, 3, 9]
        assert events[-2] == Stepped(3 * 28, 3 * 28)

    run(Hall(), test)


def test_users_are_served_in_turn():
    held = []
    hall = Hall(lambda worker, draw: held.append((worker, draw)))

    async def test(engine):
        many = [
            asyncio.ensure_future(drawn(engine, job(i, user=user)))
            for i, user in enumerate(["a", "a", "a", "a", "b", "c"])
        ]
        await until(lambda: len(held) >= 1)
        while not all(task.done() for task in many):
            while held:
                worker, draw = held.pop(0)
                worker.draw(draw)
            await asyncio.sleep(0.001)
        assert not [task.exception() for task in many if task.exception()]
        queued = [e for e in (await many[5])[1] if isinstance(e, Queued)]
        assert queued, "it was told how many were before it"

    run(hall, test, ranks=1)
    # The first two begin before b and c have come.
    order = [draw.pictures[0].seed for draw in hall.draws]
    assert order.index(4) <= 2 and order.index(5) <= 3


def test_a_rank_that_dies_is_replaced_and_its_group_draws_on():
    def act(worker, draw):
        if draw.group.rank == 1 and len(hall.draws) == 1:
            worker.kill()
        elif draw.group.size == 2 and len(hall.draws) == 1:
            worker.draw(draw, ranks=1)
        else:
            worker.draw(draw)

    hall = Hall(act)

    async def test(engine):
        done, _ = await drawn(engine, job(7))
        assert colours(done) == [7]
        assert done.report.recovered == 1 and done.report.ranks == 1
        await until(lambda: engine.state().groups == (2,))  # whole, and warm
        assert engine.state().replaced == 1
        assert hall.prepared == 2, "at the start, and for the next rank that is lost"
        done, _ = await drawn(engine, job(8))
        assert done.report.ranks == 2 and done.report.recovered == 0

    run(hall, test)
    assert [worker.number for worker in hall.workers] == [0, 1, 1]
    first, second = (draw.group.name for draw in hall.draws)
    assert first != second, "those that were left never meet the new one in the old group"


def test_a_job_that_kills_its_ranks_twice_is_refused_and_others_are_not():
    def act(worker, draw):
        if draw.pictures[0].seed == 66:
            worker.kill()
        else:
            worker.draw(draw)

    hall = Hall(act)

    async def test(engine):
        others = [asyncio.ensure_future(drawn(engine, job(i))) for i in range(4)]
        with pytest.raises(Refused, match="lost 2 times") as refused:
            await drawn(engine, job(66))
        assert (refused.value.status, refused.value.code) == (500, "poisonous")
        assert [colours(done) for done, _ in await asyncio.gather(*others)] == [
            [i] for i in range(4)
        ]
        await until(lambda: engine.state().ranks == 2)

    run(hall, test)
    assert sum(draw.pictures[0].seed == 66 for draw in hall.draws) == 2


def test_a_job_whose_ranks_lose_each_other_is_drawn_again():
    """As on GPUs, where the image is lost with the rank."""

    def act(worker, draw):
        if draw.group.rank == 0:
            worker.hear(Shown(draw.number, 0, [Image.new("L", (1, 1))]))
        if len(hall.draws) > 1 or draw.group.size == 1:
            worker.draw(draw)
        elif draw.group.rank == 1:
            worker.kill()
        else:
            worker.hear(Failed(draw.number, "lost", "rank 1 died"))

    hall = Hall(act)

    async def test(engine):
        done, events = await drawn(engine, job(7, previews=1))
        assert colours(done) == [7] and done.report.recovered == 1
        assert sum(isinstance(x, Preview) for x in events) == 1, "though it was drawn twice"

    run(hall, test)


def test_an_error_is_told_once_and_a_fit_of_the_model_is_the_askers():
    def act(worker, draw):
        kind = "error" if draw.pictures[0].seed == 1 else "refused"
        lost = Failed(draw.number, "lost", "rank 0 stopped")
        own = Failed(draw.number, kind, f"{kind}: no")
        worker.hear(own if draw.group.rank == 0 else lost)

    hall = Hall(act)

    async def test(engine):
        for seed, status in ((1, 500), (2, 400)):
            with pytest.raises(Refused, match=": no") as refused:
                await drawn(engine, job(seed))
            assert refused.value.status == status
        for bad in (
            job(1, mask=Image.new("L", (8, 8))),
            job(1, size=(60, 64)),
            job(1, steps=0),
            job(1, true_cfg=2.0),
            job(1, images=2 * (Image.new("L", (8, 8)),)),
        ):
            with pytest.raises(Refused) as refused:
                await drawn(engine, bad)
            assert refused.value.status == 400 and refused.value.field

    run(hall, test)
    assert len(hall.draws) == 2


def test_a_client_that_goes_away_stops_all_ranks_of_its_group():
    held = []
    hall = Hall(lambda worker, draw: held.append((worker, draw)))

    async def test(engine):
        events = engine.submit(job(1))
        assert await anext(events) == Queued(0)
        going = asyncio.ensure_future(anext(events))
        await until(lambda: len(held) == 2)
        (first, draw), (second, _) = held
        first.hear(Step(draw.number, 1, 28))
        assert await going == Stepped(1, 28)
        await events.aclose()
        for worker in (first, second):
            assert worker.told[-1] == Stop(draw.number)
            worker.hear(Finished(draw.number, None, True, 2, 0.1, None, 100))
        hall.act = None
        done, _ = await drawn(engine, job(2))  # in the same group, since its ranks are at one point
        assert done.report.ranks == 2
        assert hall.draws[0].group.name == hall.draws[1].group.name

    run(hall, test)


def test_no_picture_outlives_its_job():
    """However it ends, and without waiting for Python to look for circles, which it seldom does."""
    held = []

    def act(worker, draw):
        seed = draw.pictures[0].seed
        if draw.group.rank == 0:
            worker.hear(Shown(draw.number, 0, [Image.new("L", (1, 1))]))
        if seed == 1 or len(hall.draws) > 1 and seed == 4:
            worker.draw(draw)
        elif seed == 2:
            worker.hear(Failed(draw.number, "error", "no"))
        elif seed == 4 and draw.group.rank == 1:
            worker.kill()
        elif seed == 4:
            worker.hear(Failed(draw.number, "lost", "rank 1 died"))
        else:
            held.append((worker, draw))

    hall = Hall(act)

    async def test(engine):
        def asked(seed, **given):
            return job(seed, previews=1, images=(Image.new("L", (64, 64)),), **given)

        async def done():
            await drawn(engine, asked(1))

        async def drawn_again():
            done, _ = await drawn(engine, asked(4))
            assert done.report.recovered == 1

        async def leaves_none(end, *given):
            await end(*given)
            await until(lambda: not engine._calls)
            hall.draws.clear()
            for worker in hall.workers:
                worker.told.clear()
            await until(lambda: not pictures_alive())

        async def refused(status, *given, **more):
            came = None
            try:
                await drawn(engine, asked(*given, **more))
            except Refused as refused:  # `pytest.raises` would keep it
                came = refused.status
            assert came == status

        async def leave():
            events = engine.submit(asked(3))
            assert await anext(events) == Queued(0)
            await until(lambda: len(held) == 2)
            await events.aclose()
            answer()

        async def late():
            await refused(504, 3, deadline_s=0.01)
            answer()

        def answer():
            while held:
                worker, draw = held.pop()
                worker.hear(Finished(draw.number, None, True, 2, 0.1, None, 100))

        gc.collect()
        gc.freeze()  # what there is already is not looked through again and again
        gc.disable()
        try:
            await leaves_none(done)
            await leaves_none(refused, 500, 2)
            await leaves_none(leave)
            await leaves_none(late)
            await leaves_none(drawn_again)
        finally:
            gc.enable()

    run(hall, test, groups=[2])


def pictures_alive():
    return sum(isinstance(x, Image.Image) for x in gc.get_objects())


def test_what_is_late_is_refused_and_the_queue_is_bounded():
    held = []
    hall = Hall(lambda worker, draw: held.append((worker, draw)))

    async def test(engine):
        going = [asyncio.ensure_future(drawn(engine, job(i))) for i in range(3)]
        await until(lambda: engine.state().waiting == 2)
        with pytest.raises(Refused) as refused:
            await drawn(engine, job(9))
        assert refused.value.status == 429 and refused.value.retry_after_s >= 1
        going[2].cancel()  # who goes away makes room
        await until(lambda: engine.state().waiting == 1)
        with pytest.raises(Refused) as refused:
            await drawn(engine, job(9, deadline_s=0.02))
        assert (refused.value.status, refused.value.code) == (504, "deadline")
        assert engine.state().waiting == 1
        hall.act = None
        for worker, draw in held:
            worker.draw(draw)
        assert [colours(done) for done, _ in await asyncio.gather(*going[:2])] == [[0], [1]]

    run(hall, test, ranks=1, queue=2)


def test_ranks_that_do_not_step_are_ended_and_the_job_is_drawn():
    def act(worker, draw):
        if len(hall.draws) > 1:
            worker.draw(draw)

    hall = Hall(act)

    async def test(engine):
        done, _ = await drawn(engine, job(3))  # once, for the group to have drawn the shape
        assert colours(done) == [3] and done.report.recovered == 1
        assert engine.state().replaced == 2

    run(hall, test, stuck_s=0.05, groups=[2])


def test_an_engine_that_ends_draws_what_it_has_and_takes_no_more():
    held = []
    hall = Hall(lambda worker, draw: held.append((worker, draw)))

    async def test(engine):
        going = [asyncio.ensure_future(drawn(engine, job(i))) for i in range(2)]
        await until(lambda: held)
        ending = asyncio.ensure_future(engine.end(5))
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refused:
            await drawn(engine, job(9))
        assert refused.value.status == 503
        hall.act = None
        for worker, draw in held:
            worker.draw(draw)
        assert [colours(done) for done, _ in await asyncio.gather(*going)] == [[0], [1]]
        await ending
        assert engine.state().ranks == 0 and hall.closed

    run(hall, test, ranks=1)


def test_ranks_that_never_load_are_told_of_and_not_started_for_ever():
    hall = Hall(loads=False)

    async def test():
        engine = RankEngine("demo", 2, workers=hall)
        await engine.start()
        await until(lambda: engine.state().phase == "failed")
        assert "3 times in a row" in engine.state().reason
        with pytest.raises(Refused) as refused:
            await drawn(engine, job(1))
        assert refused.value.status == 503
        await engine.end(0)

    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))
    assert max(Counter(worker.number for worker in hall.workers).values()) == 3


def test_jobs_of_one_kind_are_drawn_at_once_where_that_is_faster():
    """Two at once take 1.5 times as long as one here, three take four times as long."""

    class Batches(Pretended):
        def draw(self, draw, ranks=None, leads=None):
            n = len(draw.pictures)
            images = [Image.new("L", (1, 1), p.seed) for p in draw.pictures]
            seconds = draw.asked.steps * {1: 1.0, 2: 1.5, 3: 4.0}[n]
            self.hear(Finished(draw.number, images, False, 1, seconds, None, 100))

    hall = Hall()
    hall.start = lambda number, hear: Batches(hall, number, hear)

    async def test(engine):
        jobs = [job(1), job(2, steps=5), *map(job, range(3, 7))]
        many = await asyncio.gather(*(drawn(engine, each) for each in jobs))
        assert [colours(done) for done, _ in many] == [[1], [2], [3], [4], [5], [6]]

    run(hall, test, ranks=1, batch=3)
    drawn_together = [[p.seed for p in draw.pictures] for draw in hall.draws]
    assert drawn_together == [[1], [2], [3, 4], [5, 6]], "and none with one of other steps"


def test_arguments_out_of_range_are_refused(tmp_path):
    for given, told in (
        ({"ranks": 0}, "ranks must be at least 1"),
        ({"queue": 0}, "queue must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"ranks": 2, "groups": [3]}, "of 2 ranks choose among 1, 2"),
    ):
        with pytest.raises(ValueError, match=told):
            RankEngine("demo", **given)
    with pytest.raises(CannotLoad, match="no folder of adapters"):
        RankEngine("demo", loras=tmp_path / "none")


# --- the engine, on two real ranks -------------------------------------------------------------

PROMPT = "rose, flat style, white background"
STEPS = 6
SIZE = 96, 96  # the smallest on which the demo draws anything
START_S = 500  # ranks load, and compile what they warm up


class Prefers(Pace):
    """Takes groups of one size for by far the fastest."""

    def __init__(self, size):
        super().__init__()
        self._size = size

    def seconds(self, size, pixels, computed):
        return 1e-3 if size == self._size else 1e3


class Running:
    """An engine in an event loop of its own thread."""

    def __init__(self, loras):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.engine = RankEngine(small_demo_on, 2, sizes=[SIZE], inner="eager", loras=loras)
        self(self.engine.start())
        self(until(lambda: self.engine.state().phase != "starting", START_S))
        assert self.engine.state().phase == "ready", self.engine.state().reason

    def __call__(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(START_S + 50)

    def draw(self, seed, *more, ranks=None, **given):
        """A job's pictures as (pictures, height, width, 3) of int16, its report, and its events."""
        if ranks is not None:
            self.engine._turns.pace = Prefers(ranks)
        asked = Job("a job", PROMPT, (seed, *more), size=SIZE, steps=STEPS, **given)
        done, events = self(drawn(self.engine, asked))
        return pixels(done.images), done.report, events

    def end(self):
        self(self.engine.end(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(np.int16)


@pytest.fixture(scope="module")
def demo():
    pipe = small_demo()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def alone(demo):
    """What the pipeline itself draws, by seed."""

    return functools.cache(functools.partial(drawn_alone, demo))


def drawn_alone(pipe, seed, **given):
    generator = torch.Generator().manual_seed(seed)
    given |= {"num_inference_steps": STEPS, "width": SIZE[0], "height": SIZE[1]}
    drawn = pipe(PROMPT, generator=generator, max_sequence_length=TEXT_TOKENS, **given)
    return pixels(drawn.images)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"transformer.transformer_blocks.{block}.attn.{name}.{side}.weight": torch.randn(
            shape, generator=generator
        )
        / 8
        for block in (0, 1)
        for name in ("to_q", "to_v")
        for side, shape in (("lora_A", (4, 320)), ("lora_B", (320, 4)))
    }
    save_file(lora, folder / "odd.safetensors")
    save_file({"nonsense": torch.ones(1)}, folder / "broken.safetensors")
    running = Running(folder)
    yield running
    running.end()


def near(a, b):
    """Within what rounding makes of a picture of 8 bits."""
    return np.abs(a - b).max() <= 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_picture_is_the_pipelines_own(running, alone, ranks):
    images, report, events = running.draw(1, ranks=ranks)
    assert near(images, alone(1))
    assert report.ranks == ranks and report.computed == STEPS and report.lpips == 0
    assert [x.step for x in events if isinstance(x, Stepped)] == list(range(1, STEPS + 1))
    assert running.engine.model.edits and running.engine.model.loras == ("broken", "odd")


def test_a_seeds_picture_is_the_same_in_a_batch_and_alone(running, alone):
    running.engine._turns.alone |= {(1, 1): 1.0, (1, 2): 0.5}  # as if two at once were faster
    try:
        images, report, _ = running.draw(1, 2, ranks=1)
    finally:
        del running.engine._turns.alone[1, 2]
    assert report.batch == 2
    assert near(images, np.concatenate([alone(1), alone(2)]))


def drawn_with_previews(pipe, seed):
    """The picture, and what is shown of it after each step."""
    previews, shown = Previews.fit(pipe), []
    previews.begin()

    def ended(pipe, step, timestep, now):
        latents = previews.after(pipe.scheduler, now["latents"], wanted=True)
        shown.append(pixels(previews.pictures(latents, *SIZE[::-1])))
        return {}

    return drawn_alone(pipe, seed, callback_on_step_end=ended), shown


def test_previews_look_like_the_picture():
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    images, shown = drawn_with_previews(pipe, 3)
    small = pixels([Image.fromarray(images[0].astype(np.uint8)).resize((12, 12), Image.BOX)])
    for preview in shown[1::2]:
        assert preview.shape == (1, 12, 12, 3)
        assert np.corrcoef(preview.ravel(), small.ravel())[0, 1] > 0.9


class FlowMatchScheduler(SimpleNamespace):
    """Noise and picture mixed in proportion, as diffusers names such schedulers."""


def test_a_preview_follows_the_last_step_to_the_end():
    noise, picture = torch.full((1, 2), 4.0), torch.full((1, 2), 1.0)
    sigmas = [1.0, 0.75, 0.75, 0.25, 0.0]
    mixed = [sigma * noise + (1 - sigma) * picture for sigma in sigmas]
    previews = Previews(torch.zeros(1, 3), lambda latents, height, width: latents)

    def after(step, kind=FlowMatchScheduler, wanted=True):
        return previews.after(kind(sigmas=sigmas, step_index=step), mixed[step], wanted=wanted)

    assert after(1) is mixed[1], "no step before it"
    assert after(2) is mixed[2], "from a noise level to the same one leads nowhere"
    torch.testing.assert_close(after(3), picture)
    previews.begin()
    assert after(3) is mixed[3], "what was before is another picture"
    assert after(4, kind=SimpleNamespace) is mixed[4], "a scheduler whose steps are not straight"
    previews.begin()
    assert after(2, wanted=False) is None
    torch.testing.assert_close(after(3), picture)


def test_previews_are_told_by_one_rank_evenly_spaced(running, demo):
    _, _, events = running.draw(3, ranks=2, previews=2)
    kinds = [type(x).__name__ for x in events]
    shown = [x for x in events if isinstance(x, Preview)]
    assert [x.number for x in shown] == [0, 1]
    assert [kinds[: kinds.index("Preview")].count("Stepped")] == [2]
    _, wanted = drawn_with_previews(demo, 3)
    for each, preview in zip(shown, wanted[1::2], strict=False):
        assert near(pixels(each.images), preview)


def shaded(height, width):
    """(3, height, width): another slope in each colour, from 0 to 1."""
    shade = torch.linspace(0, 1, height)[:, None] * torch.linspace(1, 0.2, width)
    return torch.stack([shade, shade.flip(0), shade.flip(1)])


def test_previews_of_packed_and_normalised_latents():
    """FLUX.2's, of a small autoencoder with numbers of its own in the batch norm."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.2, 5)
    pipe = diffusers.Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None)
    previews = Previews.fit(pipe)
    height, width = 64, 96
    picture = shaded(height, width)
    with torch.no_grad():
        latents = pipe._pack_latents(pipe._encode_vae_image(2 * picture[None] - 1, None))
        (small,) = previews.pictures(latents, height, width)
    assert small.size == (width // 2, height // 2)
    with torch.no_grad():
        encoded = vae.encode(2 * picture[None] - 1).latent_dist.mode()
    torch.testing.assert_close(previews._unpack(latents, height, width), encoded)
    wanted = F.interpolate(255 * picture[None], (height // 2, width // 2), mode="area")[0]
    near = np.corrcoef(np.asarray(small).ravel(), wanted.movedim(0, -1).numpy().ravel())
    assert near[0, 1] > 0.5  # this autoencoder was never trained


def test_previews_of_an_autoencoder_of_videos():
    """Qwen-Image's, with a mean and a deviation of its own for each channel, on one frame."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.5, -1.0, 2.0, 0.0] * 4,
        latents_std=[0.5, 2.0, 3.0, 1.0] * 4,
    ).eval()
    pipe = diffusers.QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None)
    previews = Previews.fit(pipe)
    height, width = 64, 96
    picture = shaded(height, width)
    with torch.no_grad():
        encoded = vae.encode(2 * picture[None, :, None] - 1).latent_dist.mode()
    told = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in told)
    normal = (encoded - mean) / std
    rows, columns = normal.shape[-2:]
    latents = pipe._pack_latents(normal, 1, 16, rows, columns)
    (small,) = previews.pictures(latents, height, width)
    assert small.size == (columns, rows)
    wanted = F.interpolate(255 * picture[None], (rows, columns), mode="area")[0]
    near = np.corrcoef(np.asarray(small).ravel(), wanted.movedim(0, -1).numpy().ravel())
    assert near[0, 1] > 0.5  # this autoencoder was never trained


def test_ranks_stop_together_and_draw_on(running, alone):
    """An image ends that would take for ever, and the group isn't made anew."""
    running.engine._turns.pace = Prefers(2)

    async def leave():
        events = running.engine.submit(Job("a job", PROMPT, (1,), size=SIZE, steps=100_000))
        async for event in events:
            if isinstance(event, Stepped) and event.step >= 3:
                break
        await events.aclose()
        await until(lambda: not running.engine._calls)

    rounds = dict(running.engine._warmth._rounds)
    running(leave())
    images, report, _ = running.draw(1, ranks=2)
    assert near(images, alone(1)) and report.ranks == 2
    assert dict(running.engine._warmth._rounds) == rounds


def test_adapters_change_the_picture_and_leave_nothing_behind(running, alone):
    with_one, report, _ = running.draw(1, ranks=2, loras=(("odd", 1.0),))
    assert report.ranks == 2
    assert np.abs(with_one - alone(1)).mean() > 1
    by_one_rank, _, _ = running.draw(1, ranks=1, loras=(("odd", 1.0),))
    assert near(by_one_rank, with_one)
    with pytest.raises(Refused, match=r"broken\.safetensors can't be loaded") as refused:
        running.draw(1, ranks=2, loras=(("broken", 1.0),))
    assert refused.value.status == 400
    assert near(running.draw(1, ranks=2)[0], alone(1))


def test_a_picture_can_be_edited(running, alone):
    """By the sister class, with the same compiled transformer."""
    before = Image.fromarray(alone(1)[0].astype(np.uint8))
    images, report, _ = running.draw(9, ranks=2, images=(before,))
    assert report.ranks == 2 and images.shape == alone(1).shape
    assert 1 < np.abs(images - alone(1)).mean() < np.abs(alone(9) - alone(1)).mean()


def test_a_spare_process_that_has_died_becomes_no_rank():
    workers, gone = LocalWorkers(1, Load("demo", "eager")), queue.SimpleQueue()
    workers.prepare()
    spare = workers._spare
    workers.prepare()
    assert workers._spare is spare, "one is enough"
    spare.kill()
    spare.end()
    worker = workers.start(0, gone.put)
    assert worker.process.pid != spare.pid
    worker.kill()
    assert gone.get(timeout=60) == Gone("rank 0 was killed by SIGKILL")
    workers.prepare()
    spare = workers._spare
    workers.close()
    assert not spare.is_alive


def test_a_store_is_there_at_once_and_ends_with_its_object(monkeypatch):
    imported = threading.Event()
    real = dist.TCPStore

    def late(*args, **options):
        assert imported.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(dist, "TCPStore", late)
    store = Store(LOOPBACK)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(real, LOOPBACK, store.port, is_master=False, wait_for_workers=False)
        time.sleep(0.05)
        assert not joining.done()
        imported.set()
        joining.result().set("name", "value")
        assert joining.result().get("name") == b"value"
    port = store.port
    store._keeping.join()
    del store
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, port))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_store_that_cannot_be_kept(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no store")

    monkeypatch.setattr(dist, "TCPStore", broken)
    store = Store(LOOPBACK)
    store._keeping.join()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, store.port))


class Lent:
    """An engine that a server neither starts nor ends."""

    def __init__(self, engine):
        self.model, self.submit, self.state = engine.model, engine.submit, engine.state

    async def start(self):
        pass

    async def end(self, within_s):
        pass


def test_a_server_draws_with_it(running, alone):
    """For OpenAI's client: the pipeline's own picture, and an edit of it, with previews."""
    running.engine._turns.pace = Prefers(2)
    more = {"seed": 1, "num_inference_steps": STEPS}
    with served(build_app(Lent(running.engine)), running.loop) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        drawn = client.images.generate(prompt=PROMPT, extra_body=more)
        (made,) = drawn.data
        file = base64.b64decode(made.b64_json)
        assert near(pixels([Image.open(io.BytesIO(file))]), alone(1))
        assert drawn.piflux["ranks"] == 2 and drawn.piflux["steps"] == STEPS
        asked = {"image": file, "prompt": PROMPT, "stream": True, "partial_images": 1}
        events = list(client.images.edit(**asked, extra_body=more))
    kinds = [event.type.removeprefix("image_edit.") for event in events]
    assert kinds.count("partial_image") == 1 and kinds[-1] == "completed"
    assert kinds.count("progress") == events[-2].steps > 1


def test_a_killed_rank_costs_no_picture_and_comes_back(running, alone):
    running.engine._turns.pace = Prefers(2)
    seat = running.engine._seats[0]  # which would have told the picture
    replaced = running.engine.state().replaced
    spare = running.engine._seats._workers._spare.pid

    async def kill():
        asked = Job("a job", PROMPT, (2,), size=SIZE, steps=STEPS)
        events = running.engine.submit(asked)
        async for event in events:
            if event == Stepped(2, STEPS):
                seat.worker.kill()
        return event

    done = running(kill())
    assert near(pixels(done.images), alone(2)) and done.report.recovered == 1
    running(until(lambda: running.engine.state().groups == (2,), START_S))
    assert running.engine.state().replaced == replaced + 1
    assert seat.worker.process.pid == spare
    images, report, _ = running.draw(2, ranks=2)
    assert near(images, alone(2)) and report.ranks == 2
