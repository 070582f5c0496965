"""Replicas on Ray Serve: jobs whose replica is lost, and one replica for real."""

from __future__ import annotations

import asyncio
import base64
import importlib
import inspect
import io
import pickle
import queue
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import torch
import yaml
from fake_engine import MODEL
from PIL import Image
from servers import get, post

from piflux.demo import TEXT_TOKENS, demo_pipeline
from piflux.serving.jobs import (
    Drawn,
    Event,
    Job,
    Preview,
    Queued,
    Refused,
    Report,
    State,
    Stepped,
)
from piflux.serving.messages import Finished, Gone, Step

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

from ray import serve  # noqa: E402
from ray.exceptions import ActorDiedError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from piflux.serving.cluster import Settings, app  # noqa: E402
from piflux.serving.cluster.leader import Seen, Word  # noqa: E402
from piflux.serving.cluster.replicas import Replicas  # noqa: E402
from piflux.serving.cluster.server import _why  # noqa: E402
from piflux.serving.cluster.workers import _latest, _own_gpu  # noqa: E402

DOCKER = Path(__file__).parent.parent / "docker"
JOB = Job("a", "x", (1,), previews=2)
REPORT = Report("lossless", "gather", 0.0, 2, 2, 2, 0.0, 0.1, 1)
PICTURE = Image.new("RGB", (8, 8))
READY = State("ready", "", 2, 2, (2,), 0, 0, 0.0, memory={0: 10, 1: 20})


def seen(replica: str = "r1", state: State = READY) -> Seen:
    return Seen(replica, state, MODEL)


class Deployment:
    """A handle of replicas that tell what a test says: words, exceptions, or seconds of nothing."""

    def __init__(self, *calls: list[Any]) -> None:
        self.calls, self.jobs, self.cancelled = list(calls), [], 0
        self.draw = self.seen = self

    def options(self, **_: Any) -> Deployment:
        return self

    def remote(self, job: Job | None = None) -> Any:
        if job is None:
            return asyncio.sleep(0, seen())
        self.jobs.append(job)
        return Stream(self, self.calls.pop(0))


class Stream:
    def __init__(self, deployment: Deployment, told: list[Any]) -> None:
        self._deployment, self._told = deployment, told

    async def __anext__(self) -> Word:
        while self._told:
            word = self._told.pop(0)
            if isinstance(word, Exception) and not isinstance(word, Refused):
                raise word
            if not isinstance(word, float):
                return word
            await asyncio.sleep(word)
        raise StopAsyncIteration

    def cancel(self) -> None:
        self._deployment.cancelled += bool(self._told)


async def events(deployment: Deployment, job: Job = JOB) -> list[Event]:
    return [event async for event in Replicas(deployment, 600.0).submit(job)]


def refusal(deployment: Deployment, job: Job = JOB) -> Refused:
    with pytest.raises(Refused) as caught:
        asyncio.run(events(deployment, job))
    return caught.value


def test_a_job_goes_to_another_replica_where_its_own_is_lost() -> None:
    first = [seen(), Queued(0), Stepped(1, 2), Preview(0, [PICTURE]), ActorDiedError()]
    again = [Queued(0), Stepped(1, 2), Preview(0, [PICTURE]), Preview(1, [PICTURE])]
    deployment = Deployment(first, [seen("r2"), *again, Drawn([PICTURE], REPORT)])
    told = asyncio.run(events(deployment))
    assert told[:3] == [Queued(0), Stepped(1, 2), Preview(0, [PICTURE])]
    assert [x.number for x in told if isinstance(x, Preview)] == [0, 1]  # none is shown twice
    drawn = told[-1]
    assert isinstance(drawn, Drawn) and drawn.report.recovered == 1
    assert [job.id for job in deployment.jobs] == ["a", "a"]
    assert deployment.jobs[1].seeds == JOB.seeds  # so it is the same picture


def test_a_job_that_two_replicas_were_lost_with_is_not_tried_again() -> None:
    lost = [seen(), Stepped(1, 2), ActorDiedError()]
    deployment = Deployment(list(lost), list(lost), [Drawn([PICTURE], REPORT)])
    refused = refusal(deployment)
    assert (refused.status, refused.code) == (500, "poisonous") and len(deployment.jobs) == 2


def test_a_job_that_no_replica_has_begun_waits_for_one(monkeypatch) -> None:
    monkeypatch.setattr("piflux.serving.cluster.replicas.RESEND_PAUSE_S", 0.0)
    ending = [seen(), Refused(503, "ending", "the server ends")]
    lost: list[Any] = [seen(), Queued(0), ActorDiedError()]
    deployment = Deployment(list(lost), list(lost), ending, [Drawn([PICTURE], REPORT)])
    drawn = asyncio.run(events(deployment))[-1]
    assert isinstance(drawn, Drawn) and drawn.report.recovered == 0


def test_what_a_replica_refuses_is_refused() -> None:
    refused = refusal(Deployment([seen(), Refused(400, "invalid_value", "no", field="size")]))
    assert (refused.status, refused.field, str(refused)) == (400, "size", "no")
    failed = refusal(Deployment([seen(), Refused(500, "failed", "ValueError: x")]))
    assert (failed.status, failed.code) == (500, "failed")
    full = refusal(Deployment([BackPressureError(3, 3)]))
    assert (full.status, full.code) == (429, "queue_full") and full.retry_after_s


def test_a_deadline_holds_while_no_replica_answers() -> None:
    deployment = Deployment([3600.0, Drawn([PICTURE], REPORT)])
    refused = refusal(deployment, replace(JOB, deadline_s=0.2))
    assert (refused.status, refused.code) == (504, "deadline")
    assert deployment.cancelled == 1


def test_a_replica_gets_the_time_that_is_left() -> None:
    deployment = Deployment(
        [seen(), Stepped(1, 2), 0.2, ActorDiedError()], [Drawn([PICTURE], REPORT)]
    )
    asyncio.run(events(deployment, replace(JOB, deadline_s=600.0)))
    first, second = (job.deadline_s for job in deployment.jobs)
    assert first is not None and second is not None and second < first - 0.15


def test_one_that_waits_for_a_replica_learns_how_many_are_before_it(monkeypatch) -> None:
    monkeypatch.setattr("piflux.serving.cluster.replicas.JOB_BEAT_S", 0.02)

    async def both() -> list[Event]:
        engine = Replicas(Deployment([3600.0], [0.1, seen(), Drawn([PICTURE], REPORT)]), 600.0)
        async with aclosing(engine.submit(JOB)) as before:  # type: ignore[type-var]
            assert await anext(before) == Queued(0)
            assert engine.state().waiting == 1
            return [event async for event in engine.submit(JOB)]

    told = asyncio.run(both())
    assert told[0] == Queued(1) and isinstance(told[-1], Drawn)


def test_to_close_a_job_is_to_cancel_it() -> None:
    async def close() -> Deployment:
        deployment = Deployment([seen(), Stepped(1, 2), 3600.0])
        engine = Replicas(deployment, 600.0)
        async with aclosing(engine.submit(JOB)) as told:  # type: ignore[type-var]
            assert await anext(told) == Stepped(1, 2)
            assert engine.state().drawing == 1
        assert engine.state().drawing == 0
        return deployment

    assert asyncio.run(close()).cancelled == 1


async def begun(engine: Replicas) -> None:
    """Once its job is with a replica."""
    while not engine.state().waiting + engine.state().drawing:
        await asyncio.sleep(0.01)


def test_the_end_waits_for_jobs_and_takes_no_more() -> None:
    async def end() -> None:
        engine = Replicas(
            Deployment([seen(), 0.2, Drawn([PICTURE], REPORT)], [seen(), 3600.0]), 600.0
        )
        await engine.start()
        job = asyncio.ensure_future(_all(engine.submit(JOB)))
        await begun(engine)
        await engine.end(600.0)
        assert isinstance(job.result()[-1], Drawn)
        with pytest.raises(Refused, match="ends"):
            await anext(engine.submit(JOB))

    async def hurry() -> None:
        engine = Replicas(Deployment([seen(), 3600.0]), 600.0)
        job = asyncio.ensure_future(_all(engine.submit(JOB)))
        await begun(engine)
        await engine.end(0.1)
        with pytest.raises(Refused, match="ends"):
            await job

    asyncio.run(end())
    asyncio.run(hurry())


def test_the_state_is_that_of_all_replicas() -> None:
    slow = replace(READY, ranks=1, groups=(1,), stepped_s=7.0, replaced=1, memory={1: 30})

    async def state() -> tuple[State, State]:
        engine = Replicas(
            Deployment(
                [seen(), Drawn([PICTURE], REPORT)], [seen("r2", slow), Drawn([PICTURE], REPORT)]
            ),
            600.0,
        )
        before = engine.state()
        for _ in range(2):
            await _all(engine.submit(JOB))
        return before, engine.state()

    before, after = asyncio.run(state())
    assert (before.phase, before.ranks) == ("starting", 0)
    assert (after.phase, after.ranks, after.wanted, after.groups) == ("ready", 3, 4, (2, 1))
    assert (after.stepped_s, after.replaced) == (7.0, 1)
    assert after.memory == {0: 10, 1: 20, 2: 30}


async def _all(told: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in told]


def test_a_refusal_travels_whole() -> None:
    again = pickle.loads(
        pickle.dumps(Refused(429, "queue_full", "later", field="n", retry_after_s=3))
    )
    assert (again.status, again.code, str(again)) == (429, "queue_full", "later")
    assert (again.field, again.retry_after_s) == ("n", 3)


def test_of_steps_that_wait_to_be_told_the_last_is_told() -> None:
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    finished = Finished(1, None, False, 2, 0.1, None, 0)
    gone = Gone("rank 0 has ended")
    for each in (Step(1, 1, 3), Step(1, 2, 3), finished, Step(2, 1, 3), gone):
        told.put(each)
    assert _latest(told) == [Step(1, 2, 3), finished, Step(2, 1, 3), gone]


def test_a_rank_s_actor_imports_neither_torch_nor_ray_serve() -> None:
    """It has to be there soon: another process draws."""
    code = (
        "import sys, piflux.serving.cluster.workers;"
        "print({'torch', 'ray.serve', 'fastapi', 'diffusers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_why_nothing_is_served_is_one_line() -> None:
    raised = "a.b.CannotLead: nothing can be drawn: rank 0 failed\n"
    message = f"Failed to start. Error:\nTraceback ...\n  File x, line 1, in f\n{raised}\n"
    failed = SimpleNamespace(message=message, deployments={"Leader": SimpleNamespace(message="")})
    assert _why(failed) == "nothing can be drawn: rank 0 failed"
    failed.message = "The deployment failed to start: something"
    assert _why(failed) == "see the replicas' messages"


@pytest.mark.parametrize(
    "given, visible, place", [([], "", 0), (["1"], None, 1), (["5"], "3,5", 1), (["3"], "3,5", 0)]
)
def test_a_rank_finds_its_gpu_among_all_that_it_sees(monkeypatch, given, visible, place) -> None:
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _own_gpu() == place


def test_a_replica_takes_what_its_ranks_need() -> None:
    one = Settings(ranks=4, cpus=2)
    assert one.bundles(1) == [{"CPU": 8.0, "GPU": 4.0}] and one.strategy == "STRICT_PACK"
    two = Settings(ranks=4, hosts=2)
    assert two.bundles(1) == [{"CPU": 2.0, "GPU": 2.0}] * 2 and two.strategy == "STRICT_SPREAD"
    for wrong in ({"ranks": 3, "hosts": 2}, {"replicas": 2, "most_replicas": 1}, {"rank": 2}):
        with pytest.raises(ValueError, match=r"evenly|fewer than replicas|rank"):
            Settings(**wrong)  # type: ignore[arg-type]
    # As `serve run` and a manifest give them.
    read = Settings(ranks="2", insecure="true", sizes=[[64, 96]])  # type: ignore[arg-type]
    assert (read.ranks, read.insecure, read.sizes) == (2, True, ((64, 96),))


def test_the_manifest_asks_for_what_there_is() -> None:
    """KubeRay would tell of a wrong name only on a cluster."""
    (manifest,) = yaml.safe_load_all((DOCKER / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    spec = manifest["spec"]
    config = ServeDeploySchema(**yaml.safe_load(spec["serveConfigV2"]))
    (found,) = config.applications
    module, name = found.import_path.split(":")
    builder = getattr(importlib.import_module(module), name)
    # By this Serve knows that a config's args are to be read as settings.
    (parameter,) = inspect.signature(builder).parameters.values()
    assert builder is app and parameter.annotation is Settings
    settings = Settings(**found.args)
    (bundle,) = settings.bundles(settings.gpus or 0)
    cluster = spec["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) == bundle["GPU"]
    assert float(worker["resources"]["limits"]["cpu"]) > bundle["CPU"]
    assert group["maxReplicas"] == settings.most_replicas
    assert worker["image"] == head["image"] and cluster["rayVersion"] == ray.__version__
    assert {"containerPort": 8000, "name": "serve"} in head["ports"]
    mounted = {mount["name"]: mount["mountPath"] for mount in worker["volumeMounts"]}
    assert {volume["name"] for volume in group["template"]["spec"]["volumes"]} == set(mounted)
    assert settings.model.startswith(mounted["models"])
    assert str(settings.cache) == mounted["cache"]
    assert "ARG EXTRAS" in (DOCKER / "Dockerfile").read_text()


# --- a replica, for real -------------------------------------------------------------------------

STEPS, SIZE = 3, 64
ASKED = {"prompt": "rose", "size": f"{SIZE}x{SIZE}", "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where one replica of two ranks is served, on a cluster that ends with this."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(
            ranks=2, groups=(2,), sizes=((SIZE, SIZE),), insecure=True, names=("127.0.0.1",)
        )
        serve.run(app(settings), name="piflux")
        url = f"http://127.0.0.1:{port}"
        until(lambda: get(f"{url}/readyz").status_code == 200)
        yield url
        serve.shutdown()
    finally:
        ray.shutdown()


def until(holds: Callable[[], bool], within_s: float = 120.0) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(name: str) -> list[psutil.Process]:
    """Of this process and of its children."""
    found = psutil.Process().children(recursive=True)
    return [each for each in found if name in (each.name(), *each.cmdline()[:1])]


def drawn(answer: httpx2.Response) -> tuple[Any, dict[str, Any]]:
    """The picture's pixels, and what is told of it."""
    assert answer.status_code == 200, answer.text
    told = answer.json()
    image = Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"])))
    return np.asarray(image, dtype=int), told["piflux"]


@pytest.mark.timeout(600)
def test_a_replica_draws_what_the_pipeline_draws_and_outlives_a_rank(url: str) -> None:
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def alone(seed: int, steps: int) -> Any:
        given = {"width": SIZE, "height": SIZE, "max_sequence_length": TEXT_TOKENS}
        generator = torch.Generator().manual_seed(seed)
        image = pipe("rose", generator=generator, num_inference_steps=steps, **given).images[0]
        return np.asarray(image, dtype=int)

    def ask(seed: int, steps: int = STEPS) -> httpx2.Response:
        asked = ASKED | {"seed": seed, "num_inference_steps": steps}
        return post(f"{url}/v1/images/generations", json=asked, timeout=300)

    for seed in (1, 2):
        pixels, told = drawn(ask(seed))
        assert abs(pixels - alone(seed, STEPS)).max() <= 2
        assert (told["ranks"], told["recovered"]) == (2, 0)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, 3, 60)
        until(lambda: "piflux_drawing 1.0" in get(f"{url}/metrics").text)
        time.sleep(0.2)
        (fork_server,), before = children("piflux-forksrv"), set(children("piflux-rank"))
        children("ray::_Rank")[0].kill()
        pixels, told = drawn(asking.result())
    assert told["recovered"] == 1
    assert abs(pixels - alone(3, 60)).max() <= 2
    # The process that drew has ended with its actor, and the next one is of the same fork server.
    until(lambda: len(set(children("piflux-rank")) - before) == 1)
    assert len(children("piflux-rank")) == 2 and children("piflux-forksrv") == [fork_server]
    assert {each.ppid() for each in children("piflux-rank")} == {fork_server.pid}
    # The other name is not the server's, which says so through Serve, too.
    assert get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code == 403
