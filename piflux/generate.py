"""Pictures from prompts, on ranks that are launched here or were by torchrun."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import Progress

import piflux


class Failed(Exception):
    """What a user has to know, in one line."""


@dataclass(frozen=True)
class Job:
    """What every rank needs to know.

    Attributes:
        model: 'demo', or a folder of a FLUX pipeline.
        prompts: one a picture.
        outputs: where each goes, a PNG.
        settings: of `parallelize`; the policy 'auto' is chosen on the ranks.
        steps: denoise steps; likewise `height`, `width` (pixels), `guidance`.
        seed: of the first picture's noise; the next has the next.
        record: a file for what rank 0 measured, as JSON.
        quiet: whether stdout belongs to the caller.
    """

    model: str
    prompts: Sequence[str]
    outputs: Sequence[str]
    settings: dict[str, Any]
    steps: int
    height: int
    width: int
    seed: int
    guidance: float
    record: str
    quiet: bool


def launched() -> int | None:
    """How many ranks torchrun started, of which this is one; None if it did not."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def run(job: Job, ranks: int) -> dict[str, Any]:
    """Draw on `ranks` ranks, or on those that this is one of.

    Returns:
        What rank 0 measured and wrote.

    Raises:
        Failed: a rank failed, with what it said.
        KeyboardInterrupt: interrupted; no rank is left.
    """
    if launched() is not None or ranks == 1:
        work(job)
    else:
        launch(work, (job,), ranks)
    record = Path(job.record)
    return json.loads(record.read_text()) if record.exists() else {}


def launch(function: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Call `function` on `ranks` new processes of this host, with torchrun's environment.

    Raises:
        Failed: a rank failed, with what it said.
        KeyboardInterrupt: interrupted; no rank is left.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it would say is said in one line below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(config, _rank)(function, arguments, ranks)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise Failed(f"rank {rank} failed: {_last_line(failure.message)}") from None
    except SignalException:
        raise KeyboardInterrupt from None


def _last_line(message: Any) -> str:
    text = message.get("message", message) if isinstance(message, dict) else message
    lines = [line for line in str(text).splitlines() if line.strip()]
    return lines[-1].strip().removeprefix(f"{__name__}.Failed: ") if lines else "it said nothing"


def _rank(function: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    # An interrupt is the launcher's to report: ranks end without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    function(*arguments)


def work(job: Job) -> None:
    """One rank's share. Rank 0 saves the pictures and the record."""
    first = int(os.environ.get("RANK", "0")) == 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    console = Console(stderr=job.quiet, quiet=not first)
    pipe, call = load(job.model, device)
    settings, reason = dict(job.settings), None
    if settings["policy"] == "auto":
        settings["policy"], reason = _chosen(pipe, job)
        console.print(f"policy {settings['policy']}: {reason}")
    pipe = piflux.parallelize(pipe, **settings)
    pipe.set_progress_bar_config(disable=True)

    times: list[float] = []
    with Progress(console=console, disable=not first) as progress:
        task = progress.add_task("", total=job.steps * len(job.prompts))
        for index, (prompt, output) in enumerate(zip(job.prompts, job.outputs, strict=True)):
            clock: list[float] = []

            def tick(_: Any, step: int, at: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                clock.append(time.perf_counter())  # noqa: B023 (called in this round)
                progress.advance(task)
                return tensors

            progress.update(task, description=prompt[:40])
            image = pipe(
                prompt,
                height=job.height,
                width=job.width,
                num_inference_steps=job.steps,
                guidance_scale=job.guidance,
                generator=torch.Generator().manual_seed(job.seed + index),
                callback_on_step_end=tick,
                **call,
            ).images[0]
            times += [b - a for a, b in itertools.pairwise(clock)]
            if first:
                save(image, Path(output), _told(job, index, settings))
    if first:
        record = {
            "model": job.model,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "ranks": launched() or 1,
            "settings": settings,
            "reason": reason,
            "step_s": statistics.median(times) if times else None,
            "images": list(job.outputs),
        }
        Path(job.record).write_text(json.dumps(record))
    if dist.is_initialized():
        dist.destroy_process_group()


def load(model: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline on `device`, and what its call needs beside what a user says.

    Raises:
        Failed: the folder holds no pipeline that can be loaded.
    """
    from diffusers import DiffusionPipeline

    from piflux.demo import TEXT_TOKENS, demo_pipeline

    if model == "demo":
        return demo_pipeline().to(device), {"max_sequence_length": TEXT_TOKENS}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device), {}
    except Exception as error:  # whatever diffusers trips over in a broken folder
        raise Failed(
            f"{model} can't be loaded: {type(error).__name__}: {_last_line(error)}"
        ) from error


def _chosen(pipe: Any, job: Job) -> tuple[str, str]:
    from piflux.doctor import choose_here
    from piflux.groups import resolve_group
    from piflux.runtime.ranks import ProcessRanks

    ranks = resolve_group(None)
    if not isinstance(ranks, ProcessRanks) or ranks.size == 1:
        return "gather", "one rank has nothing to gather"
    tokens = job.height * job.width // 256 + 512
    return choose_here(dict(pipe.transformer.config), tokens, ranks.group)


def _told(job: Job, index: int, settings: dict[str, Any]) -> dict[str, str]:
    """What the PNG says of itself."""
    told = {
        "prompt": job.prompts[index],
        "model": job.model,
        "seed": job.seed + index,
        "steps": job.steps,
        "guidance": job.guidance,
        "ranks": launched() or 1,
        **settings,
        "torch": torch.__version__,
        "piflux": piflux.__version__,
    }
    return {name: str(value) for name, value in told.items()}


def save(image: Image.Image, path: Path, told: dict[str, str]) -> None:
    """Write all of the picture or nothing.

    Raises:
        Failed: the disk or the folder did not let it.
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
        raise Failed(f"{path} can't be saved: {error.strerror or error}") from error


def show(path: Path) -> None:
    """The picture in the terminal, by its graphics protocol or half blocks."""
    # Asks the terminal what it can draw as soon as it is imported.
    from textual_image.renderable import Image as TerminalImage

    console = Console(file=sys.stdout)
    console.print(TerminalImage(Image.open(path), width=min(console.width, 80)))
