"""What the server costs and bears: its overhead, a flood, killed ranks, and groups as load asks.

    python benchmarks/serving.py overhead
    python benchmarks/serving.py flood --requests 2000 --clients 64 --size 64 --steps 4
    python benchmarks/serving.py kills --seconds 300 --every 20
    python benchmarks/serving.py load --model flux.1-random --size 1024 --steps 28

Each starts servers of its own on this machine, asks them over HTTP, and prints a table; --out takes
all numbers. With --direct it asks the engine, without HTTP. A picture is wrong if a pixel is
farther from its seed's first picture than rounding explains. With --model flux.1-random the
architecture of FLUX.1-dev draws, with random weights.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from piflux.demo import PROMPTS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console(width=140)

RANDOM = "flux.1-random"
SEEDS = 8
"""Different pictures that are asked for, in turn."""

ROUNDING = {"demo": 2, RANDOM: 64}
"""Levels of 256 that a pixel may differ by where other groups draw. In bfloat16, with random
weights, rounding comes to more than a trained model makes of it."""

READY_S = 900.0

DirectOption = Annotated[bool, typer.Option("--direct", help="Ask the engine, without HTTP.")]
ModelOption = Annotated[str, typer.Option(help=f"'demo', a folder, or '{RANDOM}'.")]
Ranks = Annotated[int, typer.Option(min=1)]
Size = Annotated[int, typer.Option(help="Pixels a side.")]
Steps = Annotated[int, typer.Option(min=1)]
Inner = Annotated[str, typer.Option(help="What compiles: inductor or eager.")]
Out = Annotated[Path | None, typer.Option(help="A file for all numbers.")]


@dataclass(frozen=True)
class Served:
    """What a server is started with."""

    model: str
    ranks: int
    size: int
    steps: int
    inner: str
    groups: tuple[int, ...] | None = None
    queue: int = 4096

    def engine(self) -> Any:
        from piflux.serving.engine import RankEngine

        source: Any = self.model
        if source == RANDOM:
            from piflux.tools.bench.models import random_flux

            source = random_flux
        return RankEngine(
            source,
            self.ranks,
            name="model",
            sizes=[(self.size, self.size)],
            groups=self.groups,
            queue=self.queue,
            inner=self.inner,
        )


@dataclass
class Answered:
    """What a client saw of one request.

    Attributes:
        seconds: from asking to the picture.
        seed: of the picture.
        status: HTTP's number, 0 if there was no answer.
        ranks: that drew it.
        wrong: how far its worst pixel is from the seed's first picture; -1 if there is none.
    """

    seconds: float
    seed: int
    status: int
    ranks: int = 0
    wrong: int = -1
    recovered: int = 0


@dataclass
class Server:
    """A server that is ready, and the pictures of its seeds."""

    served: Served
    port: int
    pid: int
    client: Any
    known: dict[int, Any] = field(default_factory=dict)

    async def ask(self, seed: int, user: str = "") -> Answered:
        import httpx2  # here, since --direct needs none

        body = {
            "prompt": PROMPTS[seed % len(PROMPTS)],
            "seed": seed,
            "size": f"{self.served.size}x{self.served.size}",
            "num_inference_steps": self.served.steps,
            "response_format": "b64_json",
            "user": user,
        }
        began = time.perf_counter()
        try:
            answer = await self.client.post("/v1/images/generations", json=body)
        except httpx2.HTTPError as error:
            console.print(f"no answer: {error!r}")
            return Answered(time.perf_counter() - began, seed, 0)
        seconds = time.perf_counter() - began
        if answer.status_code != 200:
            console.print(answer.status_code, answer.text[:300])
            return Answered(seconds, seed, answer.status_code)
        told = answer.json()
        data = base64.b64decode(told["data"][0]["b64_json"])
        report = told["piflux"]
        wrong = self.compare(seed, Image.open(io.BytesIO(data)))
        return Answered(seconds, seed, 200, report["ranks"], wrong, report["recovered"])

    def compare(self, seed: int, image: Image.Image) -> int:
        """How far its worst pixel is from the seed's first picture."""
        pixels = np.asarray(image.convert("RGB")).astype(np.int16)
        return int(np.abs(self.known.setdefault(seed, pixels) - pixels).max())

    async def ranks(self) -> int:
        """How many live, as the server tells."""
        told = (await self.client.get("/metrics")).text
        (line,) = [x for x in told.splitlines() if x.startswith("piflux_ranks ")]
        return round(float(line.split()[1]))

    def memory(self) -> dict[str, int]:
        """Megabytes of the front and of its ranks together."""
        found = {"front": _resident(self.pid), "ranks": 0}
        found["ranks"] = sum(map(_resident, self.workers()))
        return found

    def workers(self) -> list[int]:
        """Processes of ranks, by their ids."""
        return self.processes()[: self.served.ranks]

    def processes(self) -> list[int]:
        """Those of ranks, the eldest first; then the spare one, if it is there."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
            if parent == self.pid and b"piflux.serving.worker" in words:
                began = int((path / "stat").read_text().rpartition(")")[2].split()[19])
                found.append((began, int(path.name)))
        return [pid for _, pid in sorted(found)]


@dataclass
class Direct(Server):
    """An engine of this process, in place of a server."""

    engine: Any = None

    async def ask(self, seed: int, user: str = "") -> Answered:
        from piflux.serving.jobs import Drawn, Job, Refused

        side, prompt = self.served.size, PROMPTS[seed % len(PROMPTS)]
        job = Job("", prompt, (seed,), size=(side, side), steps=self.served.steps, user=user)
        began = time.perf_counter()
        try:
            async for event in self.engine.submit(job):
                if isinstance(event, Drawn):
                    seconds, report = time.perf_counter() - began, event.report
                    wrong = self.compare(seed, event.images[0])
                    return Answered(seconds, seed, 200, report.ranks, wrong, report.recovered)
        except Refused as refused:
            console.print(refused.status, str(refused))
            return Answered(time.perf_counter() - began, seed, refused.status)
        raise AssertionError("a job ends by its pictures, or is refused")

    async def ranks(self) -> int:
        return int(self.engine.state().ranks)

    def only(self, groups: tuple[int, ...] | None) -> None:
        """From now on ranks form groups of these sizes alone."""
        from piflux.serving.grouping import teams_of

        self.engine._teams = teams_of(self.served.ranks, groups)


@asynccontextmanager
async def directly(served: Served) -> AsyncIterator[Direct]:
    """An engine that is ready."""
    engine, began = served.engine(), time.monotonic()
    try:
        await engine.start()
        while engine.state().phase == "starting" and time.monotonic() - began < READY_S:
            await asyncio.sleep(0.1)
        if engine.state().phase != "ready":
            raise SystemExit(f"the engine did not become ready: {engine.state().reason}")
        console.print(f"ready after {time.monotonic() - began:.1f} s: {served}")
        yield Direct(served, 0, os.getpid(), None, {}, engine)
    finally:
        await engine.end(0)


def _cpu_s(pid: int) -> float:
    """Seconds of cores that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096 // 2**20


@asynccontextmanager
async def running(served: Served) -> AsyncIterator[Server]:
    """A server that is ready."""
    import httpx2

    command = [sys.executable, __file__, "server", json.dumps(asdict(served))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits
        ) as client:
            server = Server(served, port, process.pid, client)
            began = time.monotonic()
            while (await client.get("/readyz")).status_code != 200:
                if process.poll() is not None or time.monotonic() - began > READY_S:
                    raise SystemExit("the server did not become ready")
                await asyncio.sleep(0.2)
            console.print(f"ready after {time.monotonic() - began:.1f} s: {served}")
            yield server
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    finally:
        process.kill()
        process.wait()


@app.command(hidden=True)
def server(given: str) -> None:
    """Serve, and print the port."""
    from piflux.serving.server import listen, serve

    engine = Served(**json.loads(given)).engine()
    listening = listen("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  its log lines
    serve(engine, listening, "127.0.0.1")


def _told(answers: list[Answered], served: Served, seconds: float) -> dict[str, Any]:
    """What a run of requests came to."""
    done = sorted(x.seconds for x in answers if x.status == 200)
    wrong = ROUNDING.get(served.model, ROUNDING["demo"])

    def quantile(share: float) -> float:
        return done[min(len(done) - 1, math.ceil(share * len(done)) - 1)] if done else math.nan

    return {
        "requests": len(answers),
        "lost": sum(x.status != 200 for x in answers),
        "wrong": sum(x.wrong > wrong for x in answers),
        "worst pixel": max((x.wrong for x in answers), default=-1),
        "recovered": sum(x.recovered > 0 for x in answers),
        "a minute": 60 * len(done) / seconds,
        "mean_s": statistics.mean(done) if done else math.nan,
        "p50_s": quantile(0.5),
        "p95_s": quantile(0.95),
        "p99_s": quantile(0.99),
        "mean ranks": statistics.mean([x.ranks for x in answers if x.status == 200] or [0]),
    }


def _columns(answers: list[Answered]) -> dict[str, list[Any]]:
    """By field, what clients saw, in the order of answers."""
    names = [x.name for x in fields(Answered)]
    return {
        name: [round(x, 4) for x in (getattr(answer, name) for answer in answers)] for name in names
    }


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)


def _save(out: Path | None, name: str, rows: list[dict[str, Any]], answers: Any) -> None:
    if out is None:
        return
    from piflux.tools.records import header

    record = header(program=("python", "benchmarks/serving.py"), ranks=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record | {"what": name, "rows": rows, "answers": answers}))


@app.command()
def overhead(
    model: ModelOption = "demo",
    size: Size = 256,
    steps: Steps = 28,
    count: Annotated[int, typer.Option(min=1)] = 20,
    inner: Inner = "inductor",
    direct: DirectOption = False,
    out: Out = None,
) -> None:
    """The pipeline's own call and a request to the server, in turn, on one rank."""
    import torch

    import piflux
    from piflux.pipelines.folders import load
    from piflux.ranks.groups import own_device
    from piflux.tools.bench.models import random_flux

    async def measure() -> tuple[list[float], list[float]]:
        device = own_device()
        pipe, more = random_flux(device) if model == RANDOM else load(model, device)
        pipe.set_progress_bar_config(disable=True)
        pipe = piflux.parallelize(pipe, policy="gather", inner=inner)
        own, served = [], []
        async with (directly if direct else running)(Served(model, 1, size, steps, inner)) as at:
            for i in range(count + 2):
                began = time.perf_counter()
                pipe(
                    PROMPTS[0],
                    num_inference_steps=steps,
                    width=size,
                    height=size,
                    generator=torch.Generator().manual_seed(0),
                    **more,
                )
                own.append(time.perf_counter() - began)
                answer = await at.ask(0)
                assert answer.status == 200, "nothing is lost where nothing fails"
                served.append(answer.seconds)
                if i < 2:
                    own.clear()
                    served.clear()
        return own, served

    own, served = asyncio.run(measure())
    ratio = statistics.median(b / a for a, b in zip(own, served, strict=True))
    row = {
        "own call, s": statistics.median(own),
        "request, s": statistics.median(served),
        "more, %": 100 * (statistics.median(served) / statistics.median(own) - 1),
        "median of pairs, %": 100 * (ratio - 1),
    }
    _show(f"{model}, {size} pixels, {steps} steps, medians of {count}", [row])
    _save(out, "overhead", [row], {"own": own, "served": served})


@app.command()
def flood(
    model: ModelOption = "demo",
    ranks: Ranks = 2,
    size: Size = 64,
    steps: Steps = 4,
    requests: Annotated[int, typer.Option(min=1)] = 2000,
    clients: Annotated[int, typer.Option(min=1)] = 64,
    inner: Inner = "inductor",
    direct: DirectOption = False,
    out: Out = None,
) -> None:
    """So many clients at once, each with one request after the other."""

    async def measure() -> None:
        async with (directly if direct else running)(
            Served(model, ranks, size, steps, inner)
        ) as at:
            for seed in range(SEEDS):
                await at.ask(seed)
            numbers, answers, memory = iter(range(requests)), [], []

            async def ask() -> None:
                for number in numbers:
                    answers.append(await at.ask(number % SEEDS))
                    if len(answers) % max(1, requests // 8) == 0:
                        memory.append({"after": len(answers), **at.memory()})

            began, workers = time.perf_counter(), at.workers()
            before = _cpu_s(at.pid), sum(map(_cpu_s, workers))
            await asyncio.gather(*(ask() for _ in range(clients)))
            row = _told(answers, at.served, time.perf_counter() - began)
            row["front, CPU ms a request"] = 1000 * (_cpu_s(at.pid) - before[0]) / requests
            row["ranks"] = 1000 * (sum(map(_cpu_s, workers)) - before[1]) / requests
        _show(f"{model}, {ranks} ranks, {clients} clients at once", [row])
        _show("megabytes", memory)
        _save(out, "flood", [row], {"answers": _columns(answers), "memory": memory})

    asyncio.run(measure())


@app.command()
def kills(
    model: ModelOption = "demo",
    ranks: Ranks = 2,
    size: Size = 64,
    steps: Steps = 12,
    seconds: Annotated[float, typer.Option(min=1)] = 300,
    every: Annotated[float, typer.Option(min=1, help="Seconds between kills.")] = 20,
    clients: Annotated[int, typer.Option(min=1)] = 4,
    inner: Inner = "inductor",
    direct: DirectOption = False,
    out: Out = None,
) -> None:
    """A rank, taken at random, is killed every so often under load."""

    async def measure() -> None:
        async with (directly if direct else running)(
            Served(model, ranks, size, steps, inner)
        ) as at:
            for seed in range(SEEDS):
                await at.ask(seed)
            answers: list[Answered] = []
            whole: list[float] = []
            cpu: list[float] = []
            began, dice = time.perf_counter(), random.Random(0)

            async def ask(client: int) -> None:
                while time.perf_counter() - began < seconds:
                    answers.append(await at.ask(dice.randrange(SEEDS), user=str(client)))

            async def kill() -> None:
                while time.perf_counter() - began < seconds - every:
                    await asyncio.sleep(every)
                    workers = at.workers()
                    spent = {pid: _cpu_s(pid) for pid in at.processes()}
                    os.kill(dice.choice(workers), signal.SIGKILL)
                    killed = time.perf_counter()
                    while await at.ranks() == ranks:
                        await asyncio.sleep(0.05)
                    while await at.ranks() < ranks and time.perf_counter() - began < seconds:
                        await asyncio.sleep(0.1)
                    whole.append(time.perf_counter() - killed)
                    new = set(at.workers()) - set(workers)
                    cpu.extend(_cpu_s(pid) - spent.get(pid, 0.0) for pid in new)

            await asyncio.gather(kill(), *(ask(i) for i in range(clients)))
            row = _told(answers, at.served, time.perf_counter() - began)
        row |= {"kills": len(whole), "all ranks back, s": statistics.median(whole)}
        row["CPU s of the new one by then"] = statistics.median(cpu)
        _show(f"{model}, {ranks} ranks, one killed every {every:.0f} s", [row])
        _save(out, "kills", [row], {"answers": _columns(answers), "whole": whole, "cpu": cpu})

    asyncio.run(measure())


@app.command()
def load(
    model: ModelOption = "demo",
    ranks: Ranks = 2,
    size: Size = 256,
    steps: Steps = 28,
    seconds: Annotated[float, typer.Option(min=1, help="Of each measurement.")] = 120,
    loads: Annotated[str, typer.Option(help="Of what one image a rank can bear.")] = "0.25,0.6,0.9",
    inner: Inner = "inductor",
    direct: DirectOption = False,
    out: Out = None,
) -> None:
    """Requests at random times, for all ranks together, one rank each, and as the load asks."""
    ways = {f"{ranks} x 1": (1,), f"1 x {ranks}": (ranks,), "as the load asks": None}
    rows: list[dict[str, Any]] = []
    answers: dict[str, Any] = {}

    async def loaded(at: Server, way: str, rate: float, share: float) -> None:
        # The same times of coming for each way.
        took = await _at_random(at, rate, seconds, random.Random(round(1000 * share)))
        row = {"load": share, "way": way} | _told(took[0], at.served, took[1])
        rows.append(row)
        answers[f"{way}, {share}"] = _columns(took[0])
        console.print(*(f"{k} {row[k]:.4g}," if k != "way" else f"{way}," for k in SHORT))
        _save(out, "load", rows, answers)

    shares = [float(x) for x in loads.split(",")]

    async def capacity(at: Server) -> float:
        """How many images a second the ranks draw, alone each."""
        alone = [(await at.ask(seed)).seconds for seed in range(3)]
        both = [_busy(at, seed, max(3.0, 3 * min(alone))) for seed in range(ranks)]
        return sum(await asyncio.gather(*both))

    async def measure_one_engine() -> None:
        async with directly(Served(model, ranks, size, steps, inner)) as at:
            for groups in ways.values():
                at.only(groups)
                for seed in range(SEEDS):
                    await at.ask(seed)
            at.only((1,))
            most = await capacity(at)
            for share in shares:
                for way, groups in ways.items():
                    at.only(groups)
                    await loaded(at, way, share * most, share)

    async def measure() -> None:
        most: float | None = None
        for way, groups in ways.items():
            async with running(Served(model, ranks, size, steps, inner, groups)) as at:
                for seed in range(SEEDS):
                    await at.ask(seed)
                most = most or await capacity(at)
                for share in shares:
                    await loaded(at, way, share * most, share)

    asyncio.run(measure_one_engine() if direct else measure())
    rows.sort(key=lambda row: row["load"])
    kept = [{k: row[k] for k in SHORT} for row in rows]
    _show(f"{model}, {ranks} ranks, {size} pixels, {steps} steps, {seconds:.0f} s each", kept)


SHORT = (
    *("load", "way", "requests", "lost", "wrong", "worst pixel", "a minute", "mean_s", "p50_s"),
    *("p95_s", "p99_s", "mean ranks"),
)


async def _busy(at: Server, seed: int, seconds: float) -> float:
    """Images a second of a client that asks again and again, beside others."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        await at.ask(seed)
        count += 1
    return count / (time.perf_counter() - began)


async def _at_random(
    at: Server, rate: float, seconds: float, dice: random.Random
) -> tuple[list[Answered], float]:
    """As many requests as are due in so many seconds, at random times; until all are answered.

    The number is not random: it would be another load than was meant.
    """
    count = max(1, round(rate * seconds))
    began, asked = time.perf_counter(), []
    for due in sorted(dice.uniform(0, seconds) for _ in range(count)):
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        asked.append(asyncio.ensure_future(at.ask(dice.randrange(SEEDS))))
    answers = list(await asyncio.gather(*asked))
    return answers, time.perf_counter() - began


if __name__ == "__main__":
    app()
