"""The commands of `piflux`."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

import piflux
from piflux.bench import bench
from piflux.generate import Failed, Job, launch, launched, load, run, show
from piflux.quality import quality
from piflux.schedule import Schedule, read_settings

app = typer.Typer(
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
    outputs = [out]
    if len(texts) > 1:
        outputs = [out.with_stem(f"{out.stem}-{i}") for i in range(len(texts))]
    console = Console(stderr=json_)
    if not torch.cuda.is_available() and _is_first():
        console.print(f"No CUDA device: {count} rank(s) on the CPU.")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model,
            texts,
            [str(path) for path in outputs],
            settings,
            steps,
            height,
            width,
            seed,
            guidance,
            str(Path(folder) / "record.json"),
            json_,
        )
        try:
            record = run(job, count)
        except Failed as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
    if not record:  # another rank's to tell
        return
    if json_:
        print(json.dumps(record))
        return
    if record["step_s"] is not None:
        console.print(f"{record['step_s']:.3f} s a step (median) on {record['ranks']} rank(s)")
    for path in outputs:
        console.print(f"Saved {path}", soft_wrap=True)
        if show_:
            show(path)


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
    try:
        pipe, call = load(model, torch.device("cpu"))
    except Failed as error:
        _fail(str(error))
    pipe = piflux.parallelize(
        pipe, group=piflux.virtual_ranks(ranks), inner=_compiled_only, **settings
    )
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe("", height=height, width=width, num_inference_steps=1, **call)
    except _Compiled:
        pass
    except piflux.PifluxError as error:
        _fail(str(error))
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
        try:
            link = _link(count)
        except Failed as error:
            _fail(str(error))
        found["advice"] = advice(link, count, device)
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


def _link(ranks: int) -> float:
    """GB/s between ranks launched for it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gbs"
        launch(_measure, (str(path),), ranks)
        return float(path.read_text())


def _measure(path: str) -> None:
    from piflux.doctor import measure_link
    from piflux.groups import resolve_group
    from piflux.runtime.ranks import ProcessRanks

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    ranks = resolve_group(None)
    assert isinstance(ranks, ProcessRanks), "launched with torchrun's environment"
    gbs = measure_link(ranks.group, device)
    if ranks.rank == 0:
        Path(path).write_text(str(gbs))
    dist.destroy_process_group()


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
    there, gpus = launched(), torch.cuda.device_count()
    if there is not None:
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


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str) -> NoReturn:
    if _is_first():
        print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(1)
