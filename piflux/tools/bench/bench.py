"""`piflux bench`: milliseconds a denoise step, piflux beside one GPU and beside peers.

Every row runs in processes and a process group of its own, one row after the other, and all rows of
a call share weights, inputs and link, so their ratios mean something where absolute times drift.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table

from piflux.errors import RankFailed
from piflux.launch import launch
from piflux.tools import options
from piflux.tools.bench.ways import EARLY, MODELS, WAYS, Result, Settings

LINKS: dict[str, dict[str, str]] = {
    "nvlink": {},
    "no-p2p": {"NCCL_P2P_DISABLE": "1"},
    "sockets": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
"""NCCL's environment for each link: as it is, as without peer access, as between hosts."""

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


def measure_floor(height: int, width: int, model: str = "flux.1") -> Floor:
    """Count the FLOPs of a step and time the two kernels that do most of them."""
    import torch

    from piflux.cost.rates import measure_rates
    from piflux.tools.bench.models import attention_shape, count_flops

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if not on_gpu:
        torch.set_num_threads(1)  # as a rank has
    shape = attention_shape(model, on_gpu, height, width)
    rates = measure_rates(*shape, dtype, device)
    return Floor(*count_flops(model, on_gpu, height, width), *rates)


# --- the command ---------------------------------------------------------------------------------

console = Console()


def run_row(settings: Settings, link: str, log: Path) -> Result:
    """Run one row in processes of its own; what goes wrong becomes its `error`, all of it `log`."""
    from piflux.tools.bench.rows import worker

    log.unlink(missing_ok=True)
    try:
        with _environment(LINKS[link] | {"OMP_NUM_THREADS": "1"}):
            result: Result = launch(worker, settings.ranks, settings, str(log.absolute()))
    except RankFailed as error:
        said = str(error).partition("; under torchrun")[0]  # the log has all of it
        return Result(settings.row, settings.ranks, error=f"{said} ({log})")
    log.unlink(missing_ok=True)
    return result


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def markdown(results: list[Result], floor: Floor) -> str:
    """The table, as README shows it. The first image compiles; the second is a user's next one."""
    lines = [
        "| row | ranks | ms a step | spread | of the floor | first image | second | warm "
        "| peak memory | sent, sync / steady |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if r.error is not None:
            lines.append(f"| {r.row} | {r.ranks} | {r.error} | | | | | | | |")
            continue
        memory = "" if r.peak_memory_gib is None else f"{r.peak_memory_gib:.1f} GiB"
        sent = ""
        if r.sync_bytes is not None and r.steady_bytes is not None:
            sent = f"{r.sync_bytes / 1e6:.1f} / {r.steady_bytes / 1e6:.2f} MB"
        lines.append(
            f"| {r.row} | {r.ranks} | {r.median_ms:.1f} | {r.spread_ms:.1f} "
            f"| {r.median_ms / floor.ms(r.ranks):.2f}x | {' | '.join(_images(r))} "
            f"| {memory} | {sent} |"
        )
    numbers = further_steps(results)
    if numbers:
        heads = " | ".join(f"{n} steps, s" for n in numbers)
        lines += ["", f"| row | ranks | {heads} |", "|---" * (2 + len(numbers)) + "|"]
        lines += [
            f"| {r.row} | {r.ranks} | {' | '.join(further_images(r, numbers))} |"
            for r in results
            if r.error is None
        ]
    return "\n".join(lines) + "\n"


def further_steps(results: list[Result]) -> list[int]:
    """The other numbers of steps that any row drew images of, most first."""
    return sorted({n for r in results for n in r.further_s}, reverse=True)


def further_images(result: Result, numbers: list[int]) -> list[str]:
    """Median seconds of the timed images, by number of steps; '' where it drew none."""
    timed = (result.further_s.get(n) for n in numbers)
    return ["" if s is None else f"{statistics.median(s):.3f}" for s in timed]


def _images(result: Result) -> list[str]:
    """The first image, the second, and the timed ones' median."""
    first, second, *_ = result.image_s
    warm = statistics.median(result.image_s[EARLY:])
    return [f"{seconds:.2f} s" for seconds in (first, second, warm)]


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
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}: at full size, with random weights.")
    ] = "flux.1",
    row: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all.")] = None,
    ranks: Annotated[int | None, typer.Option(min=2, help="Default: the GPUs here, or 2.")] = None,
    height: Annotated[int | None, typer.Option(help="Default: the model's usual, 1024.")] = None,
    width: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=2, help="Of an image. Default: 28. Repeatable: the first's are told in full."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Timed images a row.")] = 3,
    link: Annotated[Literal["nvlink", "no-p2p", "sockets"], typer.Option()] = "nvlink",
    quantize: options.QuantizeOption = "none",
    shard_weights: options.ShardWeightsOption = False,
    out: Annotated[
        Path, typer.Option(help="A folder for JSON, table and chart.", file_okay=False)
    ] = Path("out/bench"),
) -> None:
    """Time the denoise loop of an architecture with random weights, row by row."""
    if model not in MODELS:
        raise typer.BadParameter(f"--model {model}: choose from {', '.join(MODELS)}")
    numbers = list(dict.fromkeys(steps or [28]))
    for side, pixels in (("--height", height), ("--width", width)):
        if pixels is not None:
            options.check_side(side, pixels)
    able = [
        name
        for name, way in WAYS.items()
        if model in way.models
        and way.fewest_steps <= numbers[0]
        and (quantize == "none" or way.quantizes)
        and (not shard_weights or way.shares)
    ]
    for name in row or ():
        if name not in able:
            asked = f" --quantize {quantize}" if quantize != "none" else ""
            asked += " --shard-weights" if shard_weights else ""
            asked += f" --steps {numbers[0]}" if numbers[0] != 28 else ""
            raise typer.BadParameter(
                f"--row {name}: for --model {model}{asked} choose from {', '.join(able)}"
            )
    options.check_packages(quantize)
    options.folder(out)

    import torch

    from piflux.tools.bench.models import ARCHITECTURES
    from piflux.tools.records import hardware, header

    on_gpu = torch.cuda.is_available()
    ranks = options.ranks(ranks)
    options.check_gpu(quantize=quantize)
    if not on_gpu:
        options.check_cores(ranks)
    for name in row or ():
        if WAYS[name].needs_gpu and not on_gpu:
            raise typer.BadParameter(f"--row {name} needs a GPU, and there is no CUDA device")
    names = row or [name for name in able if on_gpu or not WAYS[name].needs_gpu]
    usual = ARCHITECTURES[model].size
    width, height = width or usual[0], height or usual[1]
    where = hardware(ranks)
    if not on_gpu:
        console.print("No CUDA device: a small model in float32 on CPU ranks, not the full one.")
    floor = measure_floor(height, width, model)
    over = link if on_gpu else "gloo"
    title = f"{'' if on_gpu else 'small '}{model}, {width} x {height}, {where}, {over}"
    title += f", {quantize} weights" if quantize != "none" else ""
    title += ", shared weights" if shard_weights else ""
    record: dict[str, Any] = header(*PACKAGES, ranks=ranks) | {
        "link": over,
        "model": model,
        "height": height,
        "width": width,
        "steps": numbers[0],
        "further_steps": numbers[1:],
        "quantize": quantize,
        "shard_weights": shard_weights,
        "floor": asdict(floor),
    }
    results: list[Result] = []
    with Progress(console=console) as progress:
        task = progress.add_task("rows", total=len(names))
        for name in names:
            progress.update(task, description=name)
            way = WAYS[name]
            settings = Settings(
                name,
                1 if way.alone else ranks,
                height,
                width,
                numbers[0],
                images,
                tuple(n for n in numbers[1:] if n >= way.fewest_steps),
                model,
                quantize,
                shard_weights,
            )
            results.append(run_row(settings, link, out / f"{name}.log"))
            # After each row, for one who loses patience with a later one.
            rows = {"rows": [asdict(r) for r in results]}
            (out / "bench.json").write_text(json.dumps(record | rows, indent=2) + "\n")
            (out / "bench.md").write_text(markdown(results, floor))
            progress.advance(task)

    chart(results, floor, title, out / "bench.png")
    _print(results, floor, title)
    console.print(escape(f"Saved {', '.join(str(p) for p in sorted(out.glob('bench.*')))}"))
    if all(r.error is not None for r in results):
        raise typer.Exit(1)


def _print(results: list[Result], floor: Floor, title: str) -> None:
    numbers = further_steps(results)
    columns = ("ranks", "ms a step", "of the floor", "first image", "second", "warm")
    table = Table(
        Column("row", no_wrap=True, overflow="fold"),
        *columns,
        *(f"{n} steps, s" for n in numbers),
        title=escape(title),
    )
    for r in results:
        if r.error is not None:
            table.add_row(r.row, str(r.ranks), "failed")
        else:
            ratio = f"{r.median_ms / floor.ms(r.ranks):.2f}x"
            cells = r.row, str(r.ranks), f"{r.median_ms:.1f}", ratio
            table.add_row(*cells, *_images(r), *further_images(r, numbers))
    console.print(table)
    for r in results:  # what was in the way has no room in a column
        if r.error is not None:
            console.print(f"{r.row}: {r.error}", soft_wrap=True, markup=False, highlight=False)
