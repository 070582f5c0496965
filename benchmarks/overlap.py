"""How much of a step's collectives runs behind other kernels, read off a profile of one rank.

    torchrun --nproc_per_node=2 benchmarks/overlap.py gather --out out/overlap

FLUX.1-dev's architecture with random weights, on GPUs. The trace is in Chrome's format.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch.profiler import ProfilerActivity, profile

import piflux
from piflux.launch import is_first, join
from piflux.tools.bench.models import build
from piflux.tools.quality.variants import Variant
from piflux.tools.records import header, script

COLLECTIVE = "nccl", "PtoP"
"""What the names of kernels have, and of copies, that move data between GPUs."""

WAITS = "symmetric_memory"
"""What the names of kernels have that wait for other ranks."""


@dataclass(frozen=True)
class Overlap:
    """One step of one rank, in milliseconds.

    Attributes:
        collectives: kernels or copies of collectives, of which there are so many.
        collective_ms: while at least one runs.
        hidden_ms: of it, while another kernel runs as well.
        compute_ms: while at least one other kernel runs.
        idle_ms: while none runs, from the first kernel to the last.
    """

    variant: str
    ranks: int
    collectives: int
    collective_ms: float
    hidden_ms: float
    compute_ms: float
    idle_ms: float


def overlap_of(events: list[dict[str, Any]], variant: str, ranks: int) -> Overlap:
    """Read off a trace's events. Raises ValueError if it has no kernels."""
    ran = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
    kernels = [e for e in ran if WAITS not in e["name"]]
    if not kernels:
        raise ValueError("the trace has no kernels")
    spans = [
        (e["ts"], e["ts"] + e["dur"], any(name in e["name"] for name in COLLECTIVE))
        for e in kernels
    ]
    collectives = _union([(a, b) for a, b, sends in spans if sends])
    others = _union([(a, b) for a, b, sends in spans if not sends])
    busy = _union([(a, b) for a, b, _ in spans])
    hidden = _length(collectives) + _length(others) - _length(busy)
    whole = busy[-1][1] - busy[0][0]
    return Overlap(
        variant,
        ranks,
        sum(sends for _, _, sends in spans),
        *(
            us / 1000
            for us in (_length(collectives), hidden, _length(others), whole - _length(busy))
        ),
    )


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time in spans that don't touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def main(
    variants: Annotated[list[str], typer.Argument(help="As 'gather' or 'rotate order=0'.")],
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 1024,
    steps: Annotated[int, typer.Option(min=6, help="The one before the last is traced.")] = 8,
    out: Annotated[Path, typer.Option(help="A folder for traces and overlap.json.")] = Path(
        "out/overlap"
    ),
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter(
            "collectives overlap with kernels on GPUs, and there is no CUDA device"
        )
    device = join()
    if not dist.is_initialized():
        raise typer.BadParameter("one rank has no collectives: start it with torchrun")
    model, inputs = build(device, True, size, size)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for text in variants:
        variant = Variant.parse(text)
        torch._dynamo.reset()
        call = piflux.parallelize(model, **variant.options)
        timesteps = torch.linspace(1, 0, steps + 1, device=device, dtype=torch.bfloat16)
        for _ in range(2):  # the first image compiles and records
            with torch.no_grad(), piflux.generation(call, timesteps=timesteps[:-1]):
                for i in range(steps):
                    if i == steps - 2:
                        torch.cuda.synchronize()
                        dist.barrier()
                        run = profile(activities=[ProfilerActivity.CUDA])
                        run.start()
                    call(**inputs | {"timestep": timesteps[i : i + 1]}, return_dict=False)
                    if i == steps - 2:
                        torch.cuda.synchronize()
                        run.stop()
        if is_first():
            name = variant.name.replace(" ", "-").replace("=", "-")
            trace = out / f"{name}.json"
            run.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
            with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
            trace.unlink()
            results.append(asdict(overlap_of(events, variant.name, dist.get_world_size())))
            record = header(program=script(), ranks=dist.get_world_size())
            (out / "overlap.json").write_text(json.dumps(record | {"rows": results}, indent=1))
            print(results[-1])
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
