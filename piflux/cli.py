"""The commands of `piflux`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

import piflux
from piflux.__main__ import INTERRUPTED
from piflux.bench import bench
from piflux.errors import PifluxError
from piflux.generate import Request, load, numbered, show
from piflux.generate import generate as make_pictures
from piflux.launch import is_first, is_joined, join, launch
from piflux.quality import quality
from piflux.schedule import Schedule, read_settings


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
            _say(f"Error: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def _say(message: str) -> None:
    if is_first():
        print(message, file=sys.stderr)


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

Model = Annotated[str, typer.Option(help="'demo', or a folder of a FLUX pipeline.")]
Ranks = Annotated[
    int | None, typer.Option(min=1, help="Default: the GPUs here, else 2; torchrun's under it.")
]
PolicyOption = Annotated[
    str, typer.Option(help="gather, rotate, displaced, auto, or a file from quality --tune.")
]
SyncSteps = Annotated[
    str, typer.Option(help="Steps that gather everything, '0,3', or how many first ones.")
]
Size = Annotated[
    str | None,
    typer.Option(help="Width x height: 1024x768. Default: demo 256x256, else 1024x1024."),
]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file instead, one a line.")] = None,
    model: Model = "demo",
    ranks: Ranks = None,
    policy: PolicyOption = "rotate",
    sync_steps: SyncSteps = "0,3",
    refresh_every: Annotated[int | None, typer.Option(min=1)] = None,
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
    texts = _prompts(prompt, prompts)
    count = _ranks(ranks)
    width, height = _size(size, model)
    settings = _settings(policy, sync_steps, refresh_every)
    settings["inner"] = inner or ("inductor" if torch.cuda.is_available() else "eager")
    if settings["inner"] not in ("inductor", "eager"):
        raise typer.BadParameter(f"--inner {inner}: 'inductor' or 'eager'")
    _check_model(model)
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {out}: pictures are written as .png")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise typer.BadParameter(f"--out {out}: the folder {out.parent} can't be written to")
    request = Request(
        model=model,
        prompts=tuple(texts),
        paths=numbered(out, len(texts)),
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
    model: Model = "demo",
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    policy: PolicyOption = "rotate",
    sync_steps: SyncSteps = "0,3",
    refresh_every: Annotated[int | None, typer.Option(min=1)] = None,
    size: Size = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What the compiler does to a model, without running a step of it."""
    if policy == "auto":
        raise typer.BadParameter("--policy auto is chosen on the ranks: name one, or ask doctor")
    width, height = _size(size, model)
    settings = _settings(policy, sync_steps, refresh_every)
    _check_model(model)
    pipe, call = load(model, torch.device("cpu"))
    pipe = piflux.parallelize(
        pipe, group=piflux.virtual_ranks(ranks), inner=_compiled_only, **settings
    )
    pipe.set_progress_bar_config(disable=True)
    with contextlib.suppress(_Compiled):
        pipe("", height=height, width=width, num_inference_steps=1, **call)
    report = piflux.explain(pipe)
    if json_:
        print(json.dumps([asdict(graph) for graph in report.graphs]))
    else:
        print(report)


class _Compiled(Exception):
    """The compiler has done its work; nothing of the model needs to run."""


def _compiled_only(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
    def stop(*args: Any) -> NoReturn:
        raise _Compiled

    return stop


@app.command()
def doctor(
    ranks: Ranks = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the record, nothing else.")] = False,
) -> None:
    """GPUs, versions, the link's measured bandwidth, and which policy suits this machine."""
    from piflux.doctor import advice, machine

    found = machine()
    gpus = len(found["gpus"])
    count = _ranks(ranks)
    device = torch.device("cuda" if gpus else "cpu")
    if count > 1:
        found["advice"] = advice(launch(_measure, count), count, device)
    if json_:
        print(json.dumps(found))
        return
    console = Console()
    table = Table(show_header=False)
    for name, value in found.items():
        if name not in ("advice", "peer_access", "gpus"):
            table.add_row(name, "not installed" if value is None else str(value))
    for index, name in enumerate(found["gpus"]):
        reach = [str(j) for j, ok in enumerate(found["peer_access"][index]) if ok and j != index]
        table.add_row(f"GPU {index}", f"{name}; peers: {', '.join(reach) or 'none'}")
    if not gpus:
        table.add_row("GPUs", "none: ranks run on the CPU, over gloo")
    console.print(table)
    if "advice" in found:
        told = found["advice"]
        console.print(
            f"{told['ranks']} ranks send {told['link_gbs']:.2f} GB/s each and multiply at "
            f"{told['gemm_tflops']:.2f} TFLOP/s. For FLUX.1-dev at 1024 x 1024 the policy here is "
            f"[bold]{told['policy']}[/bold]: {told['reason']}."
        )
    else:
        console.print("One rank: nothing to share, nothing to send.")


def _measure() -> float:
    """GB/s between the ranks that were launched for it."""
    from piflux.doctor import measure_link

    device = join()
    assert dist.group.WORLD is not None, "launched with torchrun's environment"
    return measure_link(dist.group.WORLD, device)


# --- arguments -----------------------------------------------------------------------------------


def _prompts(prompt: str | None, prompts: Path | None) -> list[str]:
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give a prompt, or a file of them with --prompts")
    if prompts is None:
        assert prompt is not None
        return [prompt]
    if not prompts.is_file():
        raise typer.BadParameter(f"--prompts {prompts}: no such file")
    texts = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    if not texts:
        raise typer.BadParameter(f"--prompts {prompts}: no prompt in it")
    return texts


def _ranks(ranks: int | None) -> int:
    gpus = torch.cuda.device_count()
    if is_joined():
        there = int(os.environ["WORLD_SIZE"])
        if ranks not in (None, there):
            raise typer.BadParameter(f"--ranks {ranks}: torchrun started {there}")
        return there
    count = ranks or gpus or 2
    if gpus and count > gpus:
        raise typer.BadParameter(f"--ranks {count}: there are {gpus} GPUs here")
    return count


def _size(size: str | None, model: str) -> tuple[int, int]:
    from piflux.demo import IMAGE_SIZE

    default = IMAGE_SIZE if model == "demo" else 1024
    if size is None:
        return default, default
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if not found:
        raise typer.BadParameter(f"--size {size}: write width x height, as in 1024x768")
    width, height = (int(text) for text in found.groups())
    if not width or not height or width % 16 or height % 16:
        raise typer.BadParameter(f"--size {size}: both must be multiples of 16")
    return width, height


def _settings(policy: str, sync_steps: str, refresh_every: int | None) -> dict[str, Any]:
    words = sync_steps.split(",")
    if not all(word.isdigit() for word in words):
        raise typer.BadParameter(f"--sync-steps {sync_steps}: write 2, or steps as in 0,3")
    steps = int(sync_steps) if len(words) == 1 else tuple(int(word) for word in words)
    settings: dict[str, Any] = {
        "policy": policy,
        "sync_steps": steps,
        "refresh_every": refresh_every,
    }
    try:
        if policy.endswith(".json"):
            settings |= read_settings(policy)
        Schedule(**(settings | ({"policy": "rotate"} if policy == "auto" else {})))
    except ValueError as error:
        raise typer.BadParameter(f"--policy: {error}") from None
    return settings


def _check_model(model: str) -> None:
    if model == "demo":
        return
    if not Path(model).is_dir():
        raise typer.BadParameter(f"--model {model}: no such folder")
    if not (Path(model) / "model_index.json").is_file():
        raise typer.BadParameter(
            f"--model {model}: no pipeline there: it has no model_index.json, which "
            "save_pretrained writes"
        )
