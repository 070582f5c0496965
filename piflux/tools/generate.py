"""Pictures and videos by a pipeline whose transformer is split over ranks; saved as they come."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import piflux
from piflux.cost.clock import StepClock, synchronize
from piflux.errors import CannotSave, DoesNotFit, RankLost, WeightsLost
from piflux.integrations.diffusers import ranks_of
from piflux.launch import is_first, join
from piflux.pipelines.arguments import Asked, arguments, read_picture, takes
from piflux.pipelines.folders import Fit, add_loras, as_kind, load, pipeline_class
from piflux.pipelines.quantized import Quantization, multiplies_fp8
from piflux.policies.schedule import CHOSEN
from piflux.ranks.processes import ProcessRanks
from piflux.tools.options import numbered

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What all ranks have to know to make pictures together.

    Attributes:
        model: 'demo', or a folder of a diffusers pipeline.
        prompts: one a picture; picture i starts from the noise of seed + i.
        out: where they go, PNG or MP4; more than one get numbers. None: piflux.png or piflux.mp4.
        settings: of `parallelize`.
        steps: denoise steps; None for the pipeline's own number, as in all that follows.
        size: width and height in pixels.
        seed: of the first picture.
        guidance: its scale.
        negative: what not to draw.
        image: a picture's file, to start from, edit or follow.
        mask: a picture's file, white where `image` is painted anew.
        loras: files or folders, with their scales.
        batch: pictures drawn at once.
        frames: of a video.
        fps: frames a second of a video's file.
        quantize: 'fp8', 'int8' or 'none': of the transformer's blocks; 'auto': if it does not fit
            into the memory of `settings` otherwise.
        offload: whether text encoders are on the host but while they run.
    """

    model: str
    prompts: tuple[str, ...]
    out: Path | None
    settings: dict[str, Any]
    steps: int | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    guidance: float | None = None
    negative: str | None = None
    image: Path | None = None
    mask: Path | None = None
    loras: tuple[tuple[str, float], ...] = ()
    batch: int = 1
    frames: int | None = None
    fps: int = 16
    quantize: Quantization | Literal["none", "auto"] = "none"
    offload: bool = False

    def asked(self) -> Asked:
        """Of each call. Raises CannotLoad where a picture can't be read."""
        return Asked(
            self.steps,
            self.size,
            self.guidance,
            self.negative,
            () if self.image is None else (read_picture(self.image),),
            None if self.mask is None else read_picture(self.mask),
            self.frames,
        )


@dataclass(frozen=True)
class Picture:
    """One that was saved, or a video.

    Attributes:
        step_s: median seconds of its steps, without the first; None for one step.
        total_s: seconds of the whole call, with text encoders and VAE.
        batch: how many were drawn in that call.
    """

    path: str
    prompt: str
    seed: int
    step_s: float | None
    total_s: float
    batch: int = 1


@dataclass(frozen=True)
class Made:
    """What a request came to.

    Attributes:
        device: of rank 0.
        settings: the request's, with what 'auto' took.
        reason: why, if it took anything.
        quantize: what the weights of the transformer's blocks are in; 'none' for as they were.
    """

    model: str
    device: str
    ranks: int
    settings: dict[str, Any]
    reason: str | None
    quantize: Quantization | Literal["none"]
    pictures: tuple[Picture, ...]


def generate(request: Request) -> Made | None:
    """As one rank of several, or alone: make the pictures. Rank 0 saves them, and says what it did.

    Raises:
        CannotLoad: the model's folder, a LoRA or a picture; or the pipeline has no such option.
        CannotSave: on rank 0.
        PifluxError: see `parallelize`.
    """
    device = join()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    kind = pipeline_class(request.model)
    target, call = arguments(kind, request.asked())
    out = _destination(target, request.out)
    quantize, *others = _in_bits(request.quantize, device)
    pipe, more = _parallel(request, quantize, device, target)
    shared = ranks_of(pipe)
    pictures: list[Picture] = []
    settings, reason, quantized = request.settings, None, ""
    paths = numbered(out, len(request.prompts))
    steps: int = call["num_inference_steps"]
    calls = -(-len(request.prompts) // request.batch)
    with _progress(calls, steps, shown=is_first()) as advance:
        for start in range(0, len(paths), request.batch):
            prompts = list(request.prompts[start : start + request.batch])
            seeds = [request.seed + start + i for i in range(len(prompts))]
            clock = StepClock(device.type == "cuda", advance)
            began = time.perf_counter()
            given = call | more | _heard_by(clock, target)
            own = partial(_batched, request, prompts, seeds)
            while True:
                try:
                    drawn = _drawn(own, pipe, given, shared)
                    break
                except DoesNotFit as error:
                    if not (others and error.on_all_ranks):
                        raise
                    quantized = f"quantize: took {others[0]}, since {str(error).partition('. ')[0]}"
                # Out of the clause, which holds all that the call held.
                quantize, others = others[0], []
                if is_first():
                    log.warning("%s", quantized)
                pipe = None
                _free()
                pipe, more = _parallel(request, quantize, device, target)
                shared = ranks_of(pipe)
            synchronize(device.type == "cuda")
            total_s, times = time.perf_counter() - began, clock.step_ms()
            if not pictures:
                settings, reason = _taken(pipe, request.settings)
                reason = "; ".join(filter(None, (quantized, reason))) or None
            step_s = statistics.median(times) / 1000 if times else None
            found = drawn.frames if hasattr(drawn, "frames") else drawn.images
            made = [
                Picture(str(path), prompt, seed, step_s, total_s, len(prompts))
                for path, prompt, seed in zip(paths[start:], prompts, seeds, strict=False)
            ]
            size = ranks if shared is None else shared.size
            settings_told = settings | {"quantize": quantize}
            told = [_told(request, picture, size, settings_told) for picture in made]
            _save_all(list(zip(found, made, told, strict=True)), request.fps, shared)
            pictures += made
    if shared is not None and shared.rank != 0:
        return None
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    left = ranks if shared is None else shared.size
    return Made(request.model, name, left, settings, reason, quantize, tuple(pictures))


def _heard_by(clock: StepClock, kind: Any) -> dict[str, Any]:
    """The argument of a call that tells `clock` of steps; older pipelines have another."""
    if takes(kind, "callback_on_step_end"):
        return {"callback_on_step_end": clock}
    if takes(kind, "callback"):
        return {"callback": lambda step, timestep, latents: clock(None, step, timestep, {})}
    return {}


def _in_bits(
    asked: Quantization | Literal["none", "auto"], device: torch.device
) -> list[Quantization | Literal["none"]]:
    """What to try, in order: of 'auto' the folder's own numbers, then 8 bits."""
    if asked != "auto":
        return [asked]
    return ["none", "fp8" if multiplies_fp8(device) else "int8"]


def _parallel(
    request: Request, quantize: Quantization | Literal["none"], device: torch.device, kind: Any
) -> tuple[Any, dict[str, Any]]:
    """The request's pipeline over the ranks, and what its call needs beside what a user says."""
    several = dist.is_initialized() and dist.get_world_size() > 1  # else nobody takes a share
    share = several and bool(request.settings.get("shard_weights"))
    fit = Fit(quantize, share, request.offload)
    pipe, more = load(request.model, device, fit)
    add_loras(pipe, request.loras)
    pipe = piflux.parallelize(as_kind(pipe, kind), **request.settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe, more


def _free() -> None:
    """What nothing refers to any more but itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drawn(
    own: Callable[[], dict[str, Any]], pipe: Any, given: dict[str, Any], ranks: ProcessRanks | None
) -> Any:
    """What the pipeline draws: once more without a rank that was lost, where it could not go on.

    Args:
        own: makes the arguments that are used up, such as generators.
        pipe: the pipeline.
        given: the other arguments.
        ranks: who shares it.
    """
    if ranks is None:
        return pipe(**given, **own())
    while True:
        drawn, lost = None, False
        try:
            drawn = pipe(**given, **own())
        except WeightsLost:
            raise
        except RankLost:
            lost = True
        done = partial(ranks.exchange, not lost, "whether all have the picture")
        if all(ranks.surviving(done, "the picture's end")):
            return drawn


def _save_all(unsaved: list[Any], fps: int, ranks: ProcessRanks | None) -> None:
    """On the first rank; if it is lost meanwhile, on the next one.

    Args:
        unsaved: images, with their `Picture` and what their files say of themselves.
        fps: of videos.
        ranks: who has them.
    """

    def save_each() -> None:
        while unsaved:
            image, picture, told = unsaved[0]
            path = Path(picture.path)
            if path.suffix.lower() == ".mp4":
                save_video(image, path, fps)
            else:
                save(image, path, told)
            unsaved.pop(0)

    if ranks is None:
        return save_each()

    def act() -> None:
        if ranks.rank == 0:
            save_each()
        ranks.exchange(True, "whether it is saved")

    ranks.surviving(act, "the picture's file")


def _taken(pipe: Any, settings: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The settings with what was left to piflux, and why it took it; after a call."""
    if settings["policy"] != "auto" and settings.get("memory") is None:
        return settings, None
    report = piflux.explain(pipe)
    graph = report.graphs[0]
    taken = {name: getattr(graph.schedule, name) for name in CHOSEN}
    taken["shard_weights"] = graph.shared is not None
    reasons = [x for x in report.notes if x.startswith(("policy 'auto'", "memory:"))]
    return settings | taken, "; ".join(reasons) or None


def _batched(request: Request, prompts: list[str], seeds: list[int]) -> dict[str, Any]:
    """The arguments of which there is one a picture; alone it stands by itself."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    several = len(prompts) > 1
    given: dict[str, Any] = {
        "prompt": prompts if several else prompts[0],
        "generator": generators if several else generators[0],
    }
    if request.negative is not None:
        given["negative_prompt"] = (
            [request.negative] * len(prompts) if several else request.negative
        )
    return given


def _destination(kind: Any, out: Path | None) -> Path:
    """Where to write.

    Raises:
        CannotSave: a video's file is no .mp4, or a picture's no .png.
    """
    suffix = ".mp4" if takes(kind, "num_frames") else ".png"
    out = out or Path("piflux").with_suffix(suffix)
    if out.suffix.lower() != suffix:
        what = "videos" if suffix == ".mp4" else "pictures"
        raise CannotSave(f"{out}: {kind.__name__} makes {what}; name a file that ends in {suffix}")
    if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise CannotSave(
            f"{out}: to write a video takes the package imageio-ffmpeg: pip install 'piflux[demo]'"
        )
    return out


@contextlib.contextmanager
def _progress(calls: int, steps: int, *, shown: bool) -> Iterator[Callable[[Any], None] | None]:
    """One bar for all steps of all calls: gives what advances it by a step of the pipeline's.

    Args:
        calls: of the pipeline.
        steps: of each that were asked for: from a picture it goes a share of them.
        shown: whether there is a bar.
    """
    if not shown:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=calls * steps)
        ends: list[float] = []

        def advance(pipe: Any) -> None:
            ends.append(time.perf_counter())
            pace = f"{ends[-1] - ends[-2]:.2f} s a step" if len(ends) > 1 else "first step done"
            total = calls * getattr(pipe, "num_timesteps", steps)
            progress.update(task, advance=1, total=total, description=pace)

        yield advance


def _told(
    request: Request, picture: Picture, ranks: int, settings: dict[str, Any]
) -> dict[str, str]:
    """What the PNG says of itself."""
    names = ("steps", "guidance", "negative", "image", "mask", "loras")
    asked = {name: getattr(request, name) for name in names}
    told = {
        "prompt": picture.prompt,
        "model": request.model,
        "seed": picture.seed,
        "ranks": ranks,
        **{name: value for name, value in asked.items() if value not in (None, ())},
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


def save_video(frames: Any, path: Path, fps: int) -> None:
    """Write all of the video or nothing: H.264 in an MP4.

    Args:
        frames: PIL's pictures, or one (frames, height, width, 3) array with values from 0 to 1.
        path: likewise `fps`, frames a second.

    Raises:
        CannotSave: the disk, the folder or ffmpeg did not let it.
    """
    import imageio_ffmpeg

    arrays = [
        np.asarray(frame) if isinstance(frame, Image.Image) else (255 * frame).round()
        for frame in frames
    ]
    height, width, _ = arrays[0].shape
    unfinished = path.with_stem(f".{path.stem}-{os.getpid()}")
    try:
        # Sizes as they are: two pixels share a colour, and pictures are of even sides.
        writer = imageio_ffmpeg.write_frames(
            str(unfinished),
            (width, height),
            fps=fps,
            macro_block_size=2,
            quality=8,
            ffmpeg_log_level="quiet",
        )
        writer.send(None)
        for array in arrays:
            writer.send(np.ascontiguousarray(array, dtype=np.uint8))
        writer.close()
        # How ffmpeg ended nobody says: on a full disk it leaves what it has written.
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(unfinished))
        if written != len(arrays):
            raise RuntimeError(f"{written} of {len(arrays)} frames are there")
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or "ffmpeg wrote no whole video: is the disk full?"
        raise CannotSave(f"{path} can't be saved: {why}") from error


def show_file(path: str, console: Console) -> None:
    with Image.open(path) as image:
        show(image, console)


def show(image: Image.Image, console: Console) -> None:
    """The picture in the terminal, by its graphics protocol or half blocks."""
    terminal = sys.__stdout__
    if terminal and terminal.isatty() and 0 in os.get_terminal_size(terminal.fileno()):
        console.print("The picture isn't shown: this terminal doesn't say how large it is.")
        return
    # Asks the terminal what it can draw as soon as it is imported.
    from textual_image.renderable import Image as TerminalImage

    # Without a height it would be as many lines high as its own pixels fill, however wide it is.
    width = min(console.width, 80)
    console.print(TerminalImage(image, width=width, height="auto"))
