"""Memory of the host that ranks take together while they load a folder and draw two steps.

    python benchmarks/host_memory.py /tmp/flux --make
    python benchmarks/host_memory.py /tmp/flux

The folder that `--make` writes has a FLUX of 330 MB, random weights in float32, as ranks without
GPUs compute. A page that several processes have mapped counts once for all of them together: PSS,
/proc/PID/smaps_rollup. What the same ranks take that only import is taken off. Linux alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer

from piflux.launch import join, launch

CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 10,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 24, 24),
}
EVERY_S = 0.05
"""Between two looks at all ranks."""

STAY_S = 0.5
"""At the end of each job, all ranks."""


@dataclass(frozen=True)
class Job:
    """What each rank does.

    Attributes:
        folder: None to import what it takes to load one, and no more.
        shares: whether ranks share weights.
        quantize: 'int8' for the blocks' weights in 8 bits, which takes torchao; or 'none'.
    """

    folder: str | None
    shares: bool = False
    quantize: Literal["none", "int8"] = "none"


def work(job: Job) -> None:
    import diffusers

    import piflux
    from piflux.pipelines.folders import Fit, load
    from piflux.tools.bench.models import ARCHITECTURES, _make

    diffusers.FluxPipeline  # noqa: B018 (imports it)
    if job.quantize != "none":
        import torchao.quantization  # noqa: F401 (as a rank that only imports has it)
    device = join()
    if job.folder is not None:
        pipe, _ = load(job.folder, device, Fit(job.quantize, job.shares))
        architecture = ARCHITECTURES["flux.1"]
        parallel = piflux.parallelize(
            pipe.transformer, policy="gather", inner="eager", shard_weights=job.shares
        )
        inputs = architecture.inputs(_make(architecture, CONFIG, device, False, 128, 128))
        with torch.no_grad(), piflux.generation(parallel, timesteps=torch.tensor([1.0, 0.5])):
            for now in (1.0, 0.5):
                time_ = torch.tensor([now])
                parallel(**architecture.step(inputs, inputs["hidden_states"], time_))
    if dist.is_initialized():
        dist.barrier()
    time.sleep(STAY_S)


def peak_bytes(ranks: int, job: Job) -> int:
    """The most that all ranks take at once."""
    looks: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            looks.append(sum(map(pss_bytes, children(os.getpid()))))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        launch(work, ranks, job)
    finally:
        ended.set()
        watch.join()
    return max(looks)


def children(parent: int) -> list[int]:
    """Of a process and of all its threads, with theirs."""
    found = []
    for thread in Path(f"/proc/{parent}/task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            found += [child, *children(child)]
    return found


def pss_bytes(process: int) -> int:
    """0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def make(folder: Path) -> None:
    from piflux.demo import demo_pipeline
    from piflux.tools.bench.models import random_model

    pipe: Any = demo_pipeline()
    kind = "FluxTransformer2DModel"
    pipe.register_modules(transformer=random_model(kind, CONFIG, "cpu", torch.float32))
    pipe.save_pretrained(folder)


def main(
    folder: Path,
    make_: Annotated[bool, typer.Option("--make", help="Write the folder first.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Also with weights in 8 bits.")] = False,
) -> None:
    if make_:
        make(folder)
    size = sum(x.stat().st_size for x in folder.rglob("*.safetensors"))
    print(f"{size / 1e6:.0f} MB of weights; torch {torch.__version__}")
    kinds: tuple[Literal["none", "int8"], ...] = ("none", "int8") if int8 else ("none",)
    for quantize in kinds:
        for ranks in (1, 2, 4):
            alone = peak_bytes(ranks, Job(None, quantize=quantize))
            for shares in (False, True) if ranks > 1 else (False,):
                most = peak_bytes(ranks, Job(str(folder), shares, quantize))
                row = {"ranks": ranks, "shared": shares, "quantize": quantize}
                row |= {"peak_mb": round((most - alone) / 1e6)}
                print(json.dumps(row | {"imports_mb": round(alone / 1e6)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
