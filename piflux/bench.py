"""`piflux bench`: milliseconds a denoise step, piflux beside one GPU and beside peers.

Every row runs in processes and a process group of its own, one row after the other, and all rows of
a call share weights, inputs and link, so their ratios mean something where absolute times drift.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from piflux import options
from piflux.clock import between, mark, synchronize
from piflux.rates import measure_rates

FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL: dict[str, Any] = FLUX_DEV | {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "axes_dims_rope": (16, 24, 24),
}

LINKS = {
    "nvlink": {},
    "no-p2p": {"NCCL_P2P_DISABLE": "1"},
    "sockets": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
"""NCCL's environment for each link: as it is, as without peer access, as between hosts."""

ROW_TIMEOUT_S = 1800

Model = Callable[..., Any]
Generation = Callable[[Tensor], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Settings:
    """One row's run; everything that its processes need to know.

    Attributes:
        row: its name.
        ranks: its processes.
        height: pixels, a multiple of 16; likewise `width`.
        steps: denoise steps an image.
        images: timed images after the first, untimed one.
    """

    row: str
    ranks: int
    height: int
    width: int
    steps: int
    images: int


@dataclass
class Result:
    """What a row's rank 0 measured.

    Attributes:
        step_ms: every timed step of every timed image, in milliseconds.
        first_call_s: seconds of the first two steps, compilation included.
        peak_memory_gib: most GPU memory allocated in timed steps; None on CPUs.
        sync_bytes: what a rank sends in a sync step, where piflux runs.
        steady_bytes: and in any other step.
        error: why there is nothing else.
    """

    row: str
    ranks: int
    step_ms: list[float] = field(default_factory=list)
    first_call_s: float | None = None
    peak_memory_gib: float | None = None
    sync_bytes: int | None = None
    steady_bytes: int | None = None
    error: str | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def spread_ms(self) -> float:
        """Between the 10th and the 90th percentile."""
        if len(self.step_ms) < 2:
            return 0.0
        deciles = statistics.quantiles(self.step_ms, n=10, method="inclusive")
        return deciles[-1] - deciles[0]


# --- rows: each makes a model ready to be called step by step -----------------------------------


@dataclass(frozen=True)
class Row:
    """A way to run the model.

    Attributes:
        prepare: from the untouched model to what is called at each step, and what opens an image
            of given timesteps.
        alone: whether it is one rank's.
        needs_gpu: whether it has no CPU counterpart.
    """

    prepare: Callable[[nn.Module, bool], tuple[Model, Generation]]
    alone: bool = False
    needs_gpu: bool = False


def _eager(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
    return model, contextlib.nullcontext


def _compiled(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
    model.compile(fullgraph=True)
    return model, contextlib.nullcontext


def _compiled_blocks(model: Any, on_gpu: bool) -> tuple[Model, Generation]:
    model.compile_repeated_blocks(fullgraph=True)
    return model, contextlib.nullcontext


def _piflux(**options: Any) -> Callable[[nn.Module, bool], tuple[Model, Generation]]:
    def prepare(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
        import piflux

        # A CPU machine may have no C++ compiler for inductor.
        inner = "inductor" if on_gpu else "eager"
        parallel = piflux.parallelize(model, inner=inner, **options)
        return parallel, lambda timesteps: piflux.generation(parallel, timesteps=timesteps)

    return prepare


def _diffusers(kind: str) -> Callable[[nn.Module, bool], tuple[Model, Generation]]:
    def prepare(model: Any, on_gpu: bool) -> tuple[Model, Generation]:
        from diffusers import ContextParallelConfig

        dist.init_process_group("cpu:gloo,cuda:nccl")
        model.set_attention_backend("_native_cudnn")
        degree = {f"{kind}_degree": dist.get_world_size()}
        model.enable_parallelism(config=ContextParallelConfig(**degree))
        model.compile_repeated_blocks(fullgraph=True)
        return model, contextlib.nullcontext

    return prepare


ROWS = {
    "eager": Row(_eager, alone=True),
    "compiled": Row(_compiled, alone=True, needs_gpu=True),
    "compiled-blocks": Row(_compiled_blocks, alone=True, needs_gpu=True),
    "piflux-1": Row(_piflux(), alone=True),
    "gather": Row(_piflux(policy="gather")),
    "rotate": Row(_piflux(policy="rotate")),
    "rotate-recompute": Row(_piflux(policy="rotate", sync="recompute")),
    "rotate-int8": Row(_piflux(policy="rotate", compression="int8")),
    "displaced": Row(_piflux(policy="displaced")),
    "displaced-int8": Row(_piflux(policy="displaced", compression="int8")),
    "diffusers-ulysses": Row(_diffusers("ulysses"), needs_gpu=True),
    "diffusers-ring": Row(_diffusers("ring"), needs_gpu=True),
}


# --- in a row's processes ------------------------------------------------------------------------


def measure(settings: Settings) -> Result:
    """Run one row in this process, which is one of its ranks."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    model, inputs = build(device, on_gpu, settings.height, settings.width)
    call, generation = ROWS[settings.row].prepare(model, on_gpu)
    result = Result(settings.row, settings.ranks)
    with torch.no_grad():
        start = time.perf_counter()
        _image(call, generation, inputs, 2)
        synchronize(on_gpu)
        result.first_call_s = time.perf_counter() - start
        _image(call, generation, inputs, settings.steps)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(settings.images):
            result.step_ms += _image(call, generation, inputs, settings.steps)
    if on_gpu:
        result.peak_memory_gib = torch.cuda.max_memory_allocated() / 2**30
    _explain(call, result)
    return result


def _explain(call: Model, result: Result) -> None:
    import piflux
    from piflux.api import ParallelModule

    if isinstance(call, ParallelModule) and result.ranks > 1:
        report = piflux.explain(call).graphs[-1]
        result.sync_bytes, result.steady_bytes = report.sync_bytes, report.steady_bytes


def build(
    device: torch.device | str, on_gpu: bool, height: int, width: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The transformer with random weights, made on `device`, and its inputs at the first step.

    FLUX.1-dev's architecture in bfloat16 on a GPU, a small one in float32 elsewhere. Latents are
    (1, tokens, 64), embeddings (1, 512, 4096) or (1, 64, 256).
    """
    config, dtype = (FLUX_DEV, torch.bfloat16) if on_gpu else (SMALL, torch.float32)
    model = random_flux(config, device, dtype)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    rows, columns = height // 16, width // 16
    text = 512 if on_gpu else 64
    grid = torch.cartesian_prod(
        torch.zeros(1), torch.arange(rows) * 1.0, torch.arange(columns) * 1.0
    )
    inputs = {
        "hidden_states": random(1, rows * columns, 64),
        "encoder_hidden_states": random(1, text, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": grid.to(device, dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }
    return model, inputs


def random_flux(
    config: dict[str, Any], device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A FLUX transformer with random weights, the same on every rank, made on `device`."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**config).to(dtype)
    model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def _image(
    call: Model, generation: Generation, inputs: dict[str, Tensor], steps: int
) -> list[float]:
    """One denoise loop of Euler steps: milliseconds of each."""
    latents = inputs["hidden_states"]
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    timesteps = torch.tensor(sigmas, device=latents.device, dtype=latents.dtype)
    marks = [mark(latents.is_cuda)]
    with generation(timesteps[:-1]):
        for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
            step = inputs | {"hidden_states": latents, "timestep": timesteps[i : i + 1]}
            latents = latents + (then - now) * call(**step, return_dict=False)[0]
            marks.append(mark(latents.is_cuda))
    return between(marks)


# --- the floor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """What a step can't go below: its arithmetic at the rates of this device's own kernels.

    Attributes:
        linear_flops: of one step's matrix products outside of attention.
        attention_flops: of its attentions.
        linear_tflops: rate of a matrix product of the model's shape.
        attention_tflops: rate of an attention of the model's shape.
    """

    linear_flops: int
    attention_flops: int
    linear_tflops: float
    attention_tflops: float

    def ms(self, ranks: int) -> float:
        linear = self.linear_flops / self.linear_tflops
        attention = self.attention_flops / self.attention_tflops
        return (linear + attention) / ranks / 1e9


def measure_floor(height: int, width: int) -> Floor:
    """Count the FLOPs of a step and time the two kernels that do most of them."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    config = FLUX_DEV if on_gpu else SMALL
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    layers = config["num_layers"] + config["num_single_layers"]
    tokens = height * width // 256 + (512 if on_gpu else 64)
    width_ = heads * head_dim
    if not on_gpu:
        torch.set_num_threads(1)  # as a rank has
    linear, attention = flops(layers, width_, tokens)
    return Floor(linear, attention, *measure_rates(tokens, heads, head_dim, dtype, device))


def flops(layers: int, width: int, tokens: int) -> tuple[int, int]:
    """Of one step, outside of attentions and in them.

    A layer multiplies each token by 12 width^2 weights: a double block so for each stream, with 4
    projections and an MLP of 4 widths; a single block with 3, the same MLP and 5 widths out.
    """
    return 2 * 12 * width**2 * tokens * layers, 4 * tokens**2 * width * layers


# --- the command ---------------------------------------------------------------------------------

console = Console()


def run_row(settings: Settings, link: str, log: Path) -> Result:
    """Run one row in processes of its own; what goes wrong becomes its `error`, all of it `log`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={settings.ranks}", "-m", "piflux.bench"),
            *(json.dumps(asdict(settings)), str(out)),
        ]
        environment = os.environ | LINKS[link] | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            printed, errors = process.communicate(timeout=ROW_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Result(settings.row, settings.ranks, error=f"no end after {ROW_TIMEOUT_S} s")
        finally:
            # Killed, torchrun would leave its ranks behind; asked to end, it ends them.
            process.terminate()
            process.communicate()
        if process.returncode != 0 or not out.exists():
            log.write_text(printed + errors)
            return Result(settings.row, settings.ranks, error=f"{_error(errors)} ({log})")
        return Result(**json.loads(out.read_text()))


def _error(stderr: str) -> str:
    """The last exception of a rank in what torchrun printed."""
    lines = [line.split("]: ")[-1].strip() for line in stderr.splitlines()]
    named = [x for x in lines if "Error: " in x and "ChildFailedError" not in x]
    return named[-1] if named else "the ranks ended without a result"


def markdown(results: list[Result], floor: Floor) -> str:
    """The table, as README shows it."""
    lines = [
        "| row | ranks | ms a step | spread | of the floor | first call | peak memory |"
        " sent, sync / steady |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if r.error is not None:
            lines.append(f"| {r.row} | {r.ranks} | {r.error} | | | | | |")
            continue
        memory = "" if r.peak_memory_gib is None else f"{r.peak_memory_gib:.1f} GiB"
        sent = ""
        if r.sync_bytes is not None and r.steady_bytes is not None:
            sent = f"{r.sync_bytes / 1e6:.1f} / {r.steady_bytes / 1e6:.2f} MB"
        lines.append(
            f"| {r.row} | {r.ranks} | {r.median_ms:.1f} | {r.spread_ms:.1f} "
            f"| {r.median_ms / floor.ms(r.ranks):.2f}x | {r.first_call_s:.1f} s "
            f"| {memory} | {sent} |"
        )
    return "\n".join(lines) + "\n"


def chart(results: list[Result], floor: Floor, title: str, path: Path) -> None:
    """A bar a row, with the floor as a mark on it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results if r.error is None][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    names = [f"{r.row}, {r.ranks}" for r in rows]
    bars = axes.barh(names, [r.median_ms for r in rows], color="#4878a8")
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.scatter([floor.ms(r.ranks) for r in rows], names, marker="|", s=200, color="black")
    axes.set(xlabel="milliseconds a step (median); | is the floor", title=title)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bench(
    row: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all.")] = None,
    ranks: Annotated[int | None, typer.Option(min=2, help="Default: the GPUs here, or 2.")] = None,
    height: Annotated[int, typer.Option()] = 1024,
    width: Annotated[int, typer.Option()] = 1024,
    steps: Annotated[int, typer.Option(min=2)] = 28,
    images: Annotated[int, typer.Option(min=1, help="Timed images a row.")] = 3,
    link: Annotated[Literal["nvlink", "no-p2p", "sockets"], typer.Option()] = "nvlink",
    out: Annotated[Path, typer.Option(help="A folder for JSON, table and chart.")] = Path(
        "out/bench"
    ),
) -> None:
    """Time the denoise loop of FLUX.1-dev's architecture with random weights, row by row."""
    on_gpu = torch.cuda.is_available()
    ranks = options.ranks(ranks)
    options.check_side("--height", height)
    options.check_side("--width", width)
    names = row or [name for name in ROWS if on_gpu or not ROWS[name].needs_gpu]
    for name in names:
        if name not in ROWS:
            raise typer.BadParameter(f"--row {name}: choose from {', '.join(ROWS)}")
        if ROWS[name].needs_gpu and not on_gpu:
            raise typer.BadParameter(f"--row {name} needs a GPU, and there is no CUDA device")
    options.folder(out)
    where = torch.cuda.get_device_name() if on_gpu else "CPU, one thread a rank"
    if not on_gpu:
        console.print("No CUDA device: a small model in float32 on CPU ranks, not FLUX.1-dev.")
    floor = measure_floor(height, width)
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("rows", total=len(names))
        for name in names:
            progress.update(task, description=name)
            one = 1 if ROWS[name].alone else ranks
            settings = Settings(name, one, height, width, steps, images)
            results.append(run_row(settings, link, out / f"{name}.log"))
            progress.advance(task)

    over = link if on_gpu else "gloo"
    title = f"{'FLUX.1-dev' if on_gpu else 'small model'}, {width} x {height}, {where}, {over}"
    (out / "bench.md").write_text(markdown(results, floor))
    chart(results, floor, title, out / "bench.png")
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["piflux", *sys.argv[1:]]),
        "hardware": where,
        "link": over,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "height": height,
        "width": width,
        "steps": steps,
        "floor": asdict(floor),
        "rows": [asdict(r) for r in results],
    }
    (out / "bench.json").write_text(json.dumps(record, indent=2) + "\n")
    _print(results, floor, title)
    console.print(f"Saved {', '.join(str(p) for p in sorted(out.glob('bench.*')))}")
    if all(r.error is not None for r in results):
        raise typer.Exit(1)


def _print(results: list[Result], floor: Floor, title: str) -> None:
    table = Table("row", "ranks", "ms a step", "of the floor", title=title)
    for r in results:
        if r.error is not None:
            table.add_row(r.row, str(r.ranks), r.error, "")
        else:
            ratio = r.median_ms / floor.ms(r.ranks)
            table.add_row(r.row, str(r.ranks), f"{r.median_ms:.1f}", f"{ratio:.2f}x")
    console.print(table)


def worker(settings: str, out: str) -> None:
    """One rank of a row: `settings` in JSON, `out` a file for rank 0's result."""
    result = measure(Settings(**json.loads(settings)))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(out).write_text(json.dumps(asdict(result)))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    worker(*sys.argv[1:])
