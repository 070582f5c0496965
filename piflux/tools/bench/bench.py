"""`piflux bench`: milliseconds a denoise step, piflux beside one GPU and beside peers.

Every row runs in processes and a process group of its own, one row after the other, and all rows of
a call share weights, inputs and link, so their ratios mean something where absolute times drift.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from piflux.cost.rates import measure_rates
from piflux.tools import options
from piflux.tools.bench.rows import FLUX_DEV, ROWS, SMALL, Result, Settings
from piflux.tools.doctor import versions

LINKS = {
    "nvlink": {},
    "no-p2p": {"NCCL_P2P_DISABLE": "1"},
    "sockets": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
"""NCCL's environment for each link: as it is, as without peer access, as between hosts."""

ROW_TIMEOUT_S = 1800

PACKAGES = ("torchao", "xfuser", "para-attn")
"""What single rows need, whose versions are written down with the others'."""

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
        row = ["-m", "piflux.tools.bench.rows", json.dumps(asdict(settings)), str(out)]
        command = [sys.executable, *row]
        environment = os.environ | LINKS[link] | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            printed, errors = process.communicate(timeout=ROW_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Result(settings.row, settings.ranks, error=f"no end after {ROW_TIMEOUT_S} s")
        finally:
            # Killed, it would leave its ranks behind; asked to end, it ends them.
            process.terminate()
            process.communicate()
        if process.returncode != 0 or not out.exists():
            log.write_text(printed + errors)
            return Result(settings.row, settings.ranks, error=f"{_error(errors)} ({log})")
        return Result(**json.loads(out.read_text()))


def _error(stderr: str) -> str:
    """The last exception of a rank, or what the row's last line says."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return next(reversed(named or lines), "the ranks ended without a result")


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
    where = f"{ranks} x {torch.cuda.get_device_name()}" if on_gpu else "CPU, one thread a rank"
    if not on_gpu:
        console.print("No CUDA device: a small model in float32 on CPU ranks, not FLUX.1-dev.")
    floor = measure_floor(height, width)
    over = link if on_gpu else "gloo"
    title = f"{'FLUX.1-dev' if on_gpu else 'small model'}, {width} x {height}, {where}, {over}"
    arguments = sys.argv[2:] if sys.argv[1:2] == ["bench"] else sys.argv[1:]  # python -m
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["piflux", "bench", *arguments]),
        "hardware": where,
        "link": over,
        "versions": versions(*PACKAGES),
        "height": height,
        "width": width,
        "steps": steps,
        "floor": asdict(floor),
    }
    results: list[Result] = []
    with Progress(console=console) as progress:
        task = progress.add_task("rows", total=len(names))
        for name in names:
            progress.update(task, description=name)
            one = 1 if ROWS[name].alone else ranks
            settings = Settings(name, one, height, width, steps, images)
            results.append(run_row(settings, link, out / f"{name}.log"))
            # After each row, for one who loses patience with a later one.
            rows = {"rows": [asdict(r) for r in results]}
            (out / "bench.json").write_text(json.dumps(record | rows, indent=2) + "\n")
            (out / "bench.md").write_text(markdown(results, floor))
            progress.advance(task)

    chart(results, floor, title, out / "bench.png")
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


if __name__ == "__main__":
    typer.run(bench)
