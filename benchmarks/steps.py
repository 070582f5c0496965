"""What one rank of several computes in a steady step, measured on a single GPU without any link.

Virtual ranks (`piflux.virtual_ranks`) run the graphs of real ones by turns in one process. So a
step's time over the number of ranks is what a rank of that many would take if the link were free,
and how long its kernels run shows what the host adds. Virtual ranks record no steps, so that a step
is launched kernel by kernel: read the kernels' time where launching takes longer.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import piflux
from piflux.cost.clock import between, mark, synchronize
from piflux.pipelines.quantized import quantize
from piflux.tools.bench.bench import measure_floor
from piflux.tools.bench.models import build
from piflux.tools.quality.variants import Variant
from piflux.tools.records import header, script

IMAGES = 3


@dataclass(frozen=True)
class Result:
    """One variant on so many ranks.

    Attributes:
        step_ms: median of a steady step, a rank.
        sync_ms: median of a sync step, all tokens by one rank.
        kernels_ms: how long the kernels of one steady step run, a rank; None without a GPU.
        kernels: how many they are, a rank.
        host_ms: until a steady step is issued, a rank.
        first_s: seconds of the first three steps, in which everything is compiled.
        peak_gib: most GPU memory allocated, over all ranks.
        longest: the kernels that take most: name, calls, milliseconds, a rank.
    """

    variant: str
    ranks: int
    step_ms: float
    sync_ms: float
    kernels_ms: float | None
    kernels: int | None
    host_ms: float
    first_s: float
    peak_gib: float | None
    longest: list[tuple[str, float, float]]


def image(call: nn.Module, inputs: dict[str, Tensor], steps: int) -> list[float]:
    """Milliseconds of each of an image's Euler steps."""
    latents = inputs["hidden_states"]
    on_gpu = latents.is_cuda
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    timesteps = torch.tensor(sigmas, device=latents.device, dtype=latents.dtype)
    marks = [mark(on_gpu)]
    with piflux.generation(call, timesteps=timesteps[:-1]):
        for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
            step = inputs | {"hidden_states": latents, "timestep": timesteps[i : i + 1]}
            latents = latents + (then - now) * call(**step, return_dict=False)[0]
            marks.append(mark(on_gpu))
    assert latents.isfinite().all(), "the image is not finite"
    return between(marks)


def last_step(
    call: nn.Module, inputs: dict[str, Tensor], steps: int
) -> tuple[float, list[tuple[str, int, float]]]:
    """Of the last two of an image's steps, on an idle GPU: milliseconds until one is issued, and
    name, calls and milliseconds of every kernel of the other."""
    latents = inputs["hidden_states"]
    timesteps = torch.linspace(1, 0, steps + 1, device=latents.device, dtype=latents.dtype)
    found: list[tuple[str, int, float]] = []
    with piflux.generation(call, timesteps=timesteps[:-1]):
        for i in range(steps):
            synchronize(latents.is_cuda)
            step = inputs | {"timestep": timesteps[i : i + 1]}
            traced = latents.is_cuda and i + 1 == steps
            with profile(activities=[ProfilerActivity.CUDA]) if traced else nullcontext() as run:
                start = time.perf_counter()
                call(**step, return_dict=False)
                issued = time.perf_counter() - start
                synchronize(latents.is_cuda)
            if i + 2 == steps:
                host = 1000 * issued
            for event in run.key_averages() if traced else ():
                if event.device_type == DeviceType.CUDA:
                    found.append((event.key, event.count, event.self_device_time_total / 1000))
    return host, sorted(found, key=lambda kernel: -kernel[2])


def measure(
    model: nn.Module, inputs: dict[str, Tensor], variant: Variant, ranks: int, steps: int
) -> Result:
    on_gpu = inputs["hidden_states"].is_cuda
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    group = piflux.virtual_ranks(ranks)
    call = piflux.parallelize(
        model, group=group, inner="inductor" if on_gpu else "eager", **variant.options
    )
    schedule = call._piflux_compiler.runtime.schedule
    start = time.perf_counter()
    image(call, inputs, 3)
    synchronize(on_gpu)
    first_s = time.perf_counter() - start
    image(call, inputs, steps)  # records what is recorded
    times, syncs = [], []
    for _ in range(IMAGES):
        for i, ms in enumerate(image(call, inputs, steps)):
            if schedule.step(i).sync:
                syncs.append(ms)
            else:
                times.append(ms / ranks)
    host, ran = last_step(call, inputs, steps)
    return Result(
        variant.name,
        ranks,
        statistics.median(times),
        statistics.median(syncs),
        sum(ms for _, _, ms in ran) / ranks if ran else None,
        sum(count for _, count, _ in ran) // ranks if ran else None,
        host / ranks,
        first_s,
        torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        [(name[:100], count / ranks, ms / ranks) for name, count, ms in ran[:20]],
    )


def main(
    variant: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: rotate with order 1 and 0.")
    ] = None,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="Repeatable. Default: 2.")] = None,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 1024,
    steps: Annotated[int, typer.Option(min=4)] = 28,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8", help="As the bench's row rotate-fp8; the floor stays that of bfloat16."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="A folder for steps.json.")] = Path("out/steps"),
) -> None:
    """Time a rank's steady step of FLUX.1-dev's architecture with random weights."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    variants = [Variant.parse(text) for text in variant or ("rotate", "rotate order=0")]
    out.mkdir(parents=True, exist_ok=True)
    floor = measure_floor(size, size)
    model, inputs = build(device, on_gpu, size, size)
    if fp8:
        quantize(model, "fp8")
    results: list[Result] = []
    record: dict[str, Any] = {
        **header("torchao", program=script()),
        "size": size,
        "steps": steps,
        "floor": asdict(floor),
    }
    table = Table("ranks", "variant", "step ms", "floor", "kernels ms", "host ms", "sync ms", "GiB")
    for n in ranks or [2]:
        for one in variants:
            torch._dynamo.reset()
            with torch.no_grad():
                r = measure(model, inputs, one, n, steps)
            results.append(r)
            row = (r.step_ms, floor.ms(n), r.kernels_ms, r.host_ms, r.sync_ms, r.peak_gib)
            table.add_row(str(n), r.variant, *("" if x is None else f"{x:.2f}" for x in row))
            (out / "steps.json").write_text(
                json.dumps(record | {"rows": [asdict(r) for r in results]}, indent=1) + "\n"
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
