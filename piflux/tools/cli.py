"""The commands of `piflux`."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from piflux.cost.cost import Rates, choose
from piflux.cost.rates import measure_rates
from piflux.errors import INTERRUPTED, PifluxError, RankFailed, plain
from piflux.policies.schedule import Schedule
from piflux.tools import options
from piflux.tools.bench.bench import bench
from piflux.tools.bench.models import FLUX_DEV
from piflux.tools.doctor import Examined, devices, examine
from piflux.tools.generate import Request, numbered, show, text_tokens
from piflux.tools.generate import generate as make_pictures
from piflux.tools.image_cost import modelled_cost
from piflux.tools.launch import cores, is_first, is_joined, launch
from piflux.tools.options import SYNC_STEPS, ModelOption, RefreshOption, SyncStepsOption
from piflux.tools.quality.quality import quality
from piflux.tools.records import memory_gib, versions


class Commands(TyperGroup):
    """What can go wrong in any command becomes one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        def interrupt(*_: Any) -> NoReturn:
            raise KeyboardInterrupt

        # torchrun ends its ranks itself: there the default, which no collective can hold up.
        before = None if is_joined() else signal.signal(signal.SIGTERM, interrupt)
        try:
            return super().invoke(ctx)
        except PifluxError as error:
            if is_first() or isinstance(error, RankFailed):  # the rest fails on every rank alike
                print(f"Error: {plain(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if is_first():
                print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


app = typer.Typer(
    cls=Commands,
    name="piflux",
    help="Diffusion transformers split over ranks by rewriting their graphs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(quality)

Ranks = Annotated[
    int | None, typer.Option(min=1, help="Default: the GPUs here, else 2; torchrun's under it.")
]
PolicyOption = Annotated[
    str, typer.Option(help="gather, rotate, displaced, auto, or a file from quality --tune.")
]
Size = Annotated[
    str | None,
    typer.Option(help="Width x height: 1024x768. Default: demo 256x256, else 1024x1024."),
]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file instead, one a line.")] = None,
    model: ModelOption = "demo",
    ranks: Ranks = None,
    policy: PolicyOption = "rotate",
    sync_steps: SyncStepsOption = SYNC_STEPS,
    refresh_every: RefreshOption = None,
    steps: Annotated[int, typer.Option(min=1)] = 28,
    size: Size = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    guidance: float = 3.5,
    inner: Annotated[
        str | None, typer.Option(help="inductor or eager. Default: inductor on GPUs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="A PNG; more pictures get numbers.")] = Path(
        "piflux.png"
    ),
    show_: Annotated[bool, typer.Option("--show", help="Draw them in the terminal, too.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the record, nothing else.")] = False,
) -> None:
    """Draw pictures on several ranks, launched here or by torchrun."""
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give a prompt, or a file of them with --prompts")
    texts = options.prompts(prompts) if prompts is not None else [str(prompt)]
    count = options.ranks(ranks)
    settings = options.settings(policy, sync_steps, refresh_every)
    settings["inner"] = inner or ("inductor" if torch.cuda.is_available() else "eager")
    if settings["inner"] not in ("inductor", "eager"):
        raise typer.BadParameter(f"--inner {inner}: 'inductor' or 'eager'")
    options.check_model(model)
    if policy == "auto":
        options.flux_config(model)  # known to be one whose steps can be counted
    width, height = options.size(size, model)
    options.check_tokens(count, width, height, text_tokens(model))
    request = Request(
        model=model,
        prompts=tuple(texts),
        paths=numbered(options.picture(out), len(texts)),
        settings=settings,
        steps=steps,
        size=(width, height),
        seed=seed,
        guidance=guidance,
    )
    console = Console(stderr=json_)
    if not torch.cuda.is_available() and is_first():
        console.print(f"No CUDA device: {count} rank(s) on the CPU.")
    if is_joined() or count == 1:
        made = make_pictures(request)
    else:
        made = launch(make_pictures, count, request)
    if made is None:  # another rank's to tell
        return
    if json_:
        print(json.dumps(asdict(made)))
    elif made.reason:
        console.print(f"policy {made.settings['policy']}: {made.reason}", soft_wrap=True)
    for picture in made.pictures:
        if not json_:
            pace = "" if picture.step_s is None else f", {picture.step_s:.3f} s a step (median)"
            console.print(
                f"Saved {picture.path}: {picture.total_s:.1f} s{pace} on {made.ranks} rank(s)",
                soft_wrap=True,
            )
        if show_:
            show(Image.open(picture.path), console)


@app.command()
def explain(
    model: ModelOption = "demo",
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    policy: PolicyOption = "rotate",
    sync_steps: SyncStepsOption = SYNC_STEPS,
    refresh_every: RefreshOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Of an image, for the predicted time.")] = 28,
    size: Size = None,
    link: Annotated[
        float | None, typer.Option(min=1e-6, help="GB/s that a rank sends: predicts a step.")
    ] = None,
    linear_tflops: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Of a rank's matrix products. Default: measured here."),
    ] = None,
    attention_tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="Likewise of its attention.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What the compiler does to a FLUX: no weights are read, and no step runs.

    With --link it predicts the time of a step, and which policy 'auto' would choose: arithmetic at
    the rates, shared evenly; what is gathered within a step adds to it, what 'displaced' sends
    hides behind it. Norms, pointwise ops and launching are left out: a lower bound.
    """
    if policy == "auto":
        raise typer.BadParameter("--policy auto is chosen on the ranks: name one, or ask doctor")
    width, height = options.size(size, model)
    settings = options.settings(policy, sync_steps, refresh_every)
    config = options.flux_config(model)
    options.check_tokens(ranks, width, height, text_tokens(model))
    tokens, dtype = text_tokens(model), torch.float32 if model == "demo" else torch.bfloat16
    from piflux.tools.preview import (
        preview,  # imports the compiler: wrong usage need not wait for it
    )

    foreseen = preview(
        config,
        Schedule(**settings, world_size=ranks),
        width=width,
        height=height,
        text_tokens=tokens,
        dtype=dtype,
    )
    rates = cost = choice = None
    if link is not None:
        if linear_tflops is None or attention_tflops is None:
            measured = measure_rates(
                -(-(width * height // 256 + tokens) // ranks),
                config["num_attention_heads"],
                config["attention_head_dim"],
                dtype,
                "cuda" if torch.cuda.is_available() else "cpu",
            )
            linear_tflops = linear_tflops or measured[0]
            attention_tflops = attention_tflops or measured[1]
        rates = Rates(linear_tflops, attention_tflops, link)
        alone = sum(layer.compute_s(rates) for layer in foreseen.whole)
        cost = modelled_cost(foreseen.report, steps, alone, link)
        choice = choose(foreseen.layers, rates) if ranks > 1 else None
    if json_:
        record: dict[str, Any] = {
            "model": model,
            "size": [width, height],
            "report": asdict(foreseen.report),
        }
        for name, found in (("rates", rates), ("predicted", cost), ("choice", choice)):
            record[name] = None if found is None else asdict(found)
        print(json.dumps(record))
        return
    print(foreseen.report)
    if cost is not None:
        print(
            f"predicted: {1000 * cost.mean_s:.4g} ms a step (a sync step {1000 * cost.sync_s:.4g}, "
            f"any other {1000 * cost.steady_s:.4g}), one rank alone {1000 * cost.one_s:.4g}"
        )
    if choice is not None:
        print(f"--policy auto: {choice.policy}; {choice.reason}")


@app.command()
def doctor(
    ranks: Ranks = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the record, nothing else.")] = False,
) -> None:
    """What this host has, how fast links and kernels are, and the policy that suits them.

    The policy is for FLUX.1-dev at 1024 x 1024 where there are GPUs, else for the demo's model.
    """
    gpus, count = devices(), options.ranks(ranks)
    name = "FLUX.1-dev" if gpus else "demo"
    width, height = options.size(None, name)
    found: Examined | None = None
    if count > 1:
        asked = {
            "width": width,
            "height": height,
            "text_tokens": text_tokens(name),
            "dtype": torch.bfloat16 if gpus else torch.float32,
        }
        config = FLUX_DEV if gpus else options.flux_config("demo")
        found = examine(config, asked) if is_joined() else launch(examine, count, config, asked)
    if not is_first():
        return
    if json_:
        record = {
            "devices": [asdict(gpu) for gpu in gpus],
            "cores": cores(),
            "memory_gib": memory_gib(),
            "versions": versions(),
            "ranks": count,
            **(asdict(found) if found else {"links": [], "rates": None, "choice": None}),
        }
        print(json.dumps(record))
        return
    console = Console()
    table = Table("", "", show_header=False)
    for index, gpu in enumerate(gpus):
        table.add_row(
            f"GPU {index}", f"{gpu.name}, {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free"
        )
    if not gpus:
        table.add_row("GPUs", "none: ranks run on the CPU, over gloo")
    table.add_row("host", f"{cores()} cores, {memory_gib():.1f} GiB")
    table.add_row("versions", ", ".join(f"{package} {x}" for package, x in versions().items()))
    if found is not None:
        for one in found.links:
            peer = {None: "", True: ", peer access", False: ", no peer access"}[one.peer_access]
            table.add_row(f"link {one.ranks[0]}-{one.ranks[1]}", f"{one.gbs:.3g} GB/s{peer}")
        rates = found.rates
        table.add_row("all-gather of all", f"{rates.link_gbs:.3g} GB/s a rank")
        table.add_row("matrix products", f"{rates.linear_tflops:.3g} TFLOP/s")
        table.add_row("attention", f"{rates.attention_tflops:.3g} TFLOP/s")
    console.print(table)
    if found is None:
        console.print("One rank: nothing to share, nothing to send.")
    else:
        console.print(
            f"For {name} at {width} x {height} on {count} ranks, --policy auto is "
            f"[bold]{found.choice.policy}[/bold]: {found.choice.reason}.",
            soft_wrap=True,
        )
