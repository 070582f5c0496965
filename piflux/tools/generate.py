"""Pictures by a pipeline whose transformer is split over ranks, saved as they are made."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import piflux
from piflux.cost.clock import StepClock, synchronize
from piflux.demo import TEXT_TOKENS, demo_pipeline
from piflux.errors import CannotLoad, CannotSave
from piflux.policies.schedule import PolicyName
from piflux.tools.doctor import decide
from piflux.tools.launch import is_first, join


@dataclass(frozen=True)
class Request:
    """What all ranks have to know to make pictures together.

    Attributes:
        model: 'demo', or a folder of a diffusers pipeline.
        prompts: one a picture; picture i starts from the noise of seed + i.
        paths: where they go, PNG.
        settings: of `parallelize`; with the policy 'auto' the ranks measure and choose one.
        steps: denoise steps.
        size: width and height in pixels.
        seed: of the first picture.
        guidance: its scale.
    """

    model: str
    prompts: tuple[str, ...]
    paths: tuple[Path, ...]
    settings: dict[str, Any]
    steps: int
    size: tuple[int, int]
    seed: int
    guidance: float


@dataclass(frozen=True)
class Picture:
    """One that was saved.

    Attributes:
        step_s: median seconds of its steps, without the first; None for one step.
        total_s: seconds of the whole call, with text encoders and VAE.
    """

    path: str
    prompt: str
    seed: int
    step_s: float | None
    total_s: float


@dataclass(frozen=True)
class Made:
    """What a request came to.

    Attributes:
        device: of rank 0.
        settings: the request's, with the policy that was chosen.
        reason: why, if it was chosen on the ranks.
    """

    model: str
    device: str
    ranks: int
    settings: dict[str, Any]
    reason: str | None
    pictures: tuple[Picture, ...]


def generate(request: Request) -> Made | None:
    """As one rank of several, or alone: make the pictures. Rank 0 saves them, and says what it did.

    Raises:
        CannotLoad: the model's folder.
        CannotSave: on rank 0.
        PifluxError: see `parallelize`.
    """
    device = join()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    first = is_first()
    pipe, call = load(request.model, device)
    settings, reason = dict(request.settings), None
    if settings["policy"] == "auto":
        settings["policy"], reason = _chosen(pipe.transformer, device, ranks, request)
    pipe = piflux.parallelize(pipe, **settings)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    with _progress(request, shown=first) as advance:
        for index, (prompt, path) in enumerate(zip(request.prompts, request.paths, strict=True)):
            clock = StepClock(device.type == "cuda", advance)
            start = time.perf_counter()
            image = pipe(
                prompt,
                width=request.size[0],
                height=request.size[1],
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                generator=torch.Generator().manual_seed(request.seed + index),
                callback_on_step_end=clock,
                **call,
            ).images[0]
            synchronize(device.type == "cuda")
            total_s, times = time.perf_counter() - start, clock.step_ms()
            if not first:
                continue
            step_s = statistics.median(times) / 1000 if times else None
            picture = Picture(str(path), prompt, request.seed + index, step_s, total_s)
            save(image, path, _told(request, picture, ranks, settings))
            pictures.append(picture)
    if not first:
        return None
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return Made(request.model, name, ranks, settings, reason, tuple(pictures))


def text_tokens(model: str) -> int:
    """Of a prompt, padding included: what the pipelines of FLUX pass to its transformer."""
    return TEXT_TOKENS if model == "demo" else 512


def load(model: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline on `device`, and what its call needs beside what a user says.

    Args:
        model: 'demo', a folder, or a hub id.
        device: on a GPU it is loaded in bfloat16, elsewhere in float32.

    Raises:
        CannotLoad: the folder holds no pipeline that can be loaded.
    """
    import diffusers

    _quiet()
    if model == "demo":
        return demo_pipeline().to(device), {"max_sequence_length": TEXT_TOKENS}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    version = tuple(int(x) for x in diffusers.__version__.split(".")[:2])
    # Before it had its new name, the new one was taken for an unknown argument and left aside.
    name = "dtype" if version >= (0, 40) else "torch_dtype"
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{name: dtype})
        return pipe.to(device), {}
    except Exception as error:  # whatever diffusers trips over in a broken folder
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[-1] if lines else "it said nothing"
        raise CannotLoad(f"{model} can't be loaded: {type(error).__name__}: {said}") from error


def _quiet() -> None:
    """Leave the terminal to piflux: one progress bar, and no advice of the libraries below."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _chosen(
    transformer: Any, device: torch.device, ranks: int, request: Request
) -> tuple[PolicyName, str]:
    """The policy that suits a FLUX on these ranks, and why; the same on all of them."""
    if ranks == 1:
        return "gather", "one rank has all keys and values"
    _, choice = decide(
        transformer.config,
        device,
        width=request.size[0],
        height=request.size[1],
        text_tokens=text_tokens(request.model),
        dtype=transformer.dtype,
    )
    return choice.policy, choice.reason


@contextlib.contextmanager
def _progress(request: Request, *, shown: bool) -> Iterator[Callable[[], None] | None]:
    """One bar for all steps of all pictures: gives what advances it by a step."""
    if not shown:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(request.prompts) * request.steps)
        ends: list[float] = []

        def advance() -> None:
            ends.append(time.perf_counter())
            pace = f"{ends[-1] - ends[-2]:.2f} s a step" if len(ends) > 1 else "first step done"
            progress.update(task, advance=1, description=pace)

        yield advance


def _told(
    request: Request, picture: Picture, ranks: int, settings: dict[str, Any]
) -> dict[str, str]:
    """What the PNG says of itself."""
    told = {
        "prompt": picture.prompt,
        "model": request.model,
        "seed": picture.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "ranks": ranks,
        **settings,
        "torch": torch.__version__,
        "piflux": piflux.__version__,
    }
    return {name: str(value) for name, value in told.items()}


def save(image: Image.Image, path: Path, told: dict[str, str]) -> None:
    """Write all of the picture or nothing.

    Raises:
        CannotSave: the disk or the folder did not let it.
    """
    info = PngInfo()
    for name, text in told.items():
        info.add_itxt(name, text)
    unfinished = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".png", delete=False) as file:
            unfinished = file.name
            image.save(file, format="PNG", pnginfo=info)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except OSError as error:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
        raise CannotSave(f"{path} can't be saved: {error.strerror or error}") from error


def numbered(path: Path, count: int) -> tuple[Path, ...]:
    """`apple.png` for one picture; apple-01.png to apple-12.png for twelve."""
    if count == 1:
        return (path,)
    digits = len(str(count))
    return tuple(path.with_stem(f"{path.stem}-{i:0{digits}}") for i in range(1, count + 1))


def show(image: Image.Image, console: Console) -> None:
    """The picture in the terminal, by its graphics protocol or half blocks."""
    terminal = sys.__stdout__
    if terminal and terminal.isatty() and 0 in os.get_terminal_size(terminal.fileno()):
        console.print("The picture isn't shown: this terminal doesn't say how large it is.")
        return
    # Asks the terminal what it can draw as soon as it is imported.
    from textual_image.renderable import Image as TerminalImage

    console.print(TerminalImage(image, width=min(console.width, 80)))
