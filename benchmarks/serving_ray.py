"""What replicas on Ray Serve cost and bear: the time of a picture, and replicas that are killed.

    python benchmarks/serving_ray.py --seconds 120 --every 40

Starts a cluster on this machine, asks over HTTP, and kills one replica's leader after the other
while clients ask; none of them asks twice. A picture is wrong if a pixel is farther from its seed's
first one than rounding explains. --out takes all numbers.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import httpx2
import numpy as np
import psutil
import ray
import typer
from PIL import Image
from ray import serve
from rich.console import Console
from rich.table import Table

from piflux.demo import PROMPTS
from piflux.serving.cluster import Settings, app

SEEDS = 8
"""Different pictures that are asked for, in turn."""

ROUNDING = 2
"""Levels of 256 that a pixel may differ by where other groups draw."""

LEADER = "ray::ServeReplica:piflux:Leader"

RANKS = ("ray::_Rank", "piflux-rank")
"""A rank's actor, and its own process."""

ENDS_S = 240.0
"""How long a replica may take to be there again."""


@dataclass
class Answered:
    """What a client saw of one request; `wrong` is how far its worst pixel is off, -1 for none."""

    seconds: float
    status: int
    wrong: int = -1
    recovered: int = 0
    drawn_s: float = 0.0


@dataclass
class Killed:
    """Seconds from a leader's death until Serve knew of it, and until all replicas were there.

    `cpu_s` are those of one core that the new replica's leader and ranks took for it, actors and
    their processes.
    """

    noticed_s: float
    whole_s: float
    cpu_s: float


class Clients:
    """Clients that ask one after the other, each for the next seed's picture."""

    def __init__(self, url: str, size: int, steps: int) -> None:
        self._url, self._size, self._steps = url, size, steps
        self._first: dict[int, Any] = {}

    async def draw(self, client: httpx2.AsyncClient, seed: int) -> Answered:
        began = time.perf_counter()
        asked = {
            "prompt": PROMPTS[seed % len(PROMPTS)],
            "size": f"{self._size}x{self._size}",
            "num_inference_steps": self._steps,
            "seed": seed,
        }
        try:
            answer = await client.post(f"{self._url}/v1/images/generations", json=asked)
        except httpx2.HTTPError:
            return Answered(time.perf_counter() - began, 0)
        seconds = time.perf_counter() - began
        if answer.status_code != 200:
            return Answered(seconds, answer.status_code)
        told = answer.json()
        data = base64.b64decode(told["data"][0]["b64_json"])
        pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=int)
        first = self._first.setdefault(seed, pixels)
        wrong = int(abs(pixels - first).max())
        drawn = told["piflux"]
        return Answered(seconds, 200, wrong, drawn["recovered"], drawn["drawn_s"])

    async def ask(self, count: int, until: float, found: list[Answered]) -> None:
        async with httpx2.AsyncClient(timeout=600) as client:

            async def one(number: int) -> None:
                while time.monotonic() < until:
                    number += 1
                    found.append(await self.draw(client, number % SEEDS))

            await asyncio.gather(*(one(number) for number in range(count)))


def processes(*names: str) -> dict[int, psutil.Process]:
    """Of this process's cluster, by number."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            called = [*process.cmdline()[:1], process.name()]
            if any(each.startswith(names) for each in called):
                found[process.pid] = process
    return found


def running() -> int:
    leader = serve.status().applications["piflux"].deployments["Leader"]
    return int(leader.replica_states.get("RUNNING", 0))


async def kill(replicas: int) -> Killed:
    """Kill one leader, and wait until all replicas are there again."""
    before = processes(LEADER, *RANKS)
    next(iter(processes(LEADER).values())).kill()
    began, noticed = time.monotonic(), 0.0
    while time.monotonic() < began + ENDS_S:
        await asyncio.sleep(0.1)
        count = await asyncio.to_thread(running)
        if count < replicas and not noticed:
            noticed = time.monotonic() - began
        if noticed and count == replicas:
            whole_s = time.monotonic() - began
            times = [x.cpu_times() for n, x in processes(LEADER, *RANKS).items() if n not in before]
            return Killed(noticed, whole_s, sum(x.user + x.system for x in times))
    raise SystemExit(f"a replica wasn't there again after {ENDS_S:.0f} s")


async def measure(
    url: str, replicas: int, clients: int, seconds: float, every: float, size: int, steps: int
) -> tuple[list[Answered], list[Answered], list[Killed]]:
    asking, quiet, loaded, killed = Clients(url, size, steps), [], [], []
    async with httpx2.AsyncClient(timeout=600) as client:
        for number in range(3 * SEEDS):
            quiet.append(await asking.draw(client, number % SEEDS))
    until = time.monotonic() + seconds
    load = asyncio.ensure_future(asking.ask(clients, until, loaded))
    while time.monotonic() + every < until:
        await asyncio.sleep(every)
        killed.append(await kill(replicas))
    await load
    return quiet, loaded, killed


def _rounded(found: Answered | Killed) -> dict[str, float]:
    return {name: round(number, 4) for name, number in asdict(found).items()}


def main(
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    ranks: Annotated[int, typer.Option(min=1, help="Of a replica.")] = 2,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    seconds: Annotated[float, typer.Option(help="Of load.")] = 120.0,
    every: Annotated[float, typer.Option(help="Seconds from one kill to the next.")] = 30.0,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 4,
    model: Annotated[str, typer.Option(help="'demo' or a folder.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="A file for all numbers.")] = None,
) -> None:
    """Ask replicas over HTTP, and kill them meanwhile."""
    console = Console(width=100)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    began = time.monotonic()
    gpus = 1 if os.path.exists("/dev/nvidia0") else 0
    cpus = None if gpus else ranks * replicas + 1
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(
            model=model if model == "demo" else str(Path(model).resolve()),
            ranks=ranks,
            replicas=replicas,
            sizes=((size, size),),
            insecure=True,
        )
        serve.run(app(settings), name="piflux")
        started_s = time.monotonic() - began
        url = f"http://127.0.0.1:{port}"
        quiet, loaded, killed = asyncio.run(
            measure(url, replicas, clients, seconds, every, size, steps)
        )
    finally:
        serve.shutdown()
        ray.shutdown()
    statuses = Counter(each.status for each in loaded)
    lost = sum(count for status, count in statuses.items() if status != 200)
    wrong = sum(each.wrong > ROUNDING for each in (*quiet, *loaded))
    times = sorted(each.seconds for each in loaded)
    added = statistics.median(each.seconds - each.drawn_s for each in quiet)
    drawn = statistics.median(each.drawn_s for each in quiet)
    table = Table(title=f"{replicas} replicas of {ranks} ranks, {clients} clients")
    for name in ("what", "number"):
        table.add_column(name)
    for name, text in (
        ("seconds to start", f"{started_s:.0f}"),
        ("one client: a picture is drawn in", f"{1e3 * drawn:.0f} ms"),
        ("and takes longer, for HTTP and Ray, by", f"{1e3 * added:.1f} ms"),
        ("requests under load", str(len(loaded))),
        ("of them lost, wrong", f"{lost}, {wrong}  {dict(statuses)}"),
        ("drawn again by another replica", str(sum(each.recovered > 0 for each in loaded))),
        (
            "p50, p95, longest",
            f"{times[len(times) // 2]:.2f}, {times[len(times) * 19 // 20]:.2f}, {times[-1]:.2f} s",
        ),
        ("replicas killed", str(len(killed))),
        ("noticed after", " ".join(f"{each.noticed_s:.1f}" for each in killed) + " s"),
        (
            "seconds of a core that its start takes",
            " ".join(f"{each.cpu_s:.0f}" for each in killed),
        ),
        ("whole again after", " ".join(f"{each.whole_s:.1f}" for each in killed) + " s"),
    ):
        table.add_row(name, text)
    console.print(table)
    if out is not None:
        told = {
            "settings": settings.model_dump(mode="json"),
            "when": time.strftime("%Y-%m-%d %H:%M"),
            "command": " ".join(sys.argv),
            "versions": {name: version(name) for name in ("ray", "torch", "diffusers")},
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "started_s": started_s,
            "quiet": [_rounded(each) for each in quiet],
            "loaded": [_rounded(each) for each in loaded],
            "killed": [_rounded(each) for each in killed],
        }
        out.write_text(json.dumps(told) + "\n")
    if lost or wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
