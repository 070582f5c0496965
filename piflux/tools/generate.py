"""Pictures and videos by a pipeline whose transformer is split over ranks; saved as they come."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import piflux
from piflux.cost.clock import StepClock, synchronize
from piflux.demo import TEXT_TOKENS, demo_pipeline
from piflux.errors import CannotLoad, CannotSave, RankLost
from piflux.integrations.diffusers import ranks_of
from piflux.ranks.processes import ProcessRanks
from piflux.tools.launch import is_first, join
from piflux.tools.options import numbered
from piflux.tools.weights import check_numbers, models_of


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
        CannotLoad: the model's folder, a LoRA or a picture; or the pipeline has no such option.
        CannotSave: on rank 0.
        PifluxError: see `parallelize`.
    """
    device = join()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    kind = pipeline_class(request.model)
    target, call = arguments(kind, request)
    out = _destination(target, request.out)
    pipe, more = load(request.model, device)
    add_loras(pipe, request.loras)
    pipe = as_kind(pipe, target)
    pipe = piflux.parallelize(pipe, **request.settings)
    pipe.set_progress_bar_config(disable=True)
    shared = ranks_of(pipe)
    pictures: list[Picture] = []
    settings, reason = request.settings, None
    paths = numbered(out, len(request.prompts))
    steps: int = call["num_inference_steps"]
    calls = -(-len(request.prompts) // request.batch)
    timed = _takes(target, "callback_on_step_end")
    with _progress(calls * steps, shown=is_first()) as advance:
        for start in range(0, len(paths), request.batch):
            prompts = list(request.prompts[start : start + request.batch])
            seeds = [request.seed + start + i for i in range(len(prompts))]
            clock = StepClock(device.type == "cuda", advance)
            began = time.perf_counter()
            given = call | more | ({"callback_on_step_end": clock} if timed else {})
            own = partial(_batched, request, prompts, seeds)
            drawn = _drawn(own, pipe, given, shared)
            synchronize(device.type == "cuda")
            total_s, times = time.perf_counter() - began, clock.step_ms()
            if not pictures:
                settings, reason = _taken(pipe, request.settings)
            step_s = statistics.median(times) / 1000 if times else None
            found = drawn.frames if hasattr(drawn, "frames") else drawn.images
            made = [
                Picture(str(path), prompt, seed, step_s, total_s, len(prompts))
                for path, prompt, seed in zip(paths[start:], prompts, seeds, strict=False)
            ]
            size = ranks if shared is None else shared.size
            told = [_told(request, picture, size, settings) for picture in made]
            _save_all(list(zip(found, made, told, strict=True)), request.fps, shared)
            pictures += made
    if shared is not None and shared.rank != 0:
        return None
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    left = ranks if shared is None else shared.size
    return Made(request.model, name, left, settings, reason, tuple(pictures))


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
    """The settings with what 'auto' took, and why; after a call."""
    if settings["policy"] != "auto":
        return settings, None
    report = piflux.explain(pipe)
    schedule, reasons = report.graphs[0].schedule, [x for x in report.notes if "'auto'" in x]
    return settings | {"policy": schedule.policy, "sync": schedule.sync}, reasons[0]


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


# --- what a pipeline takes -----------------------------------------------------------------------


def pipeline_class(model: str) -> Any:
    """The class of a folder's pipeline; no weights are read.

    Raises:
        CannotLoad: diffusers has none of that name.
    """
    import diffusers

    _quiet()
    if model == "demo":
        return diffusers.FluxPipeline
    try:
        name = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        kind = getattr(diffusers, name)
    except Exception as error:  # whatever diffusers trips over in a broken folder
        raise CannotLoad(
            f"{model} can't be loaded: its model_index.json names no pipeline of diffusers "
            f"{diffusers.__version__}: {type(error).__name__}: {_line(error)}"
        ) from error
    return kind


def arguments(kind: Any, request: Request) -> tuple[Any, dict[str, Any]]:
    """The class that draws what is asked for, and what its call takes, but for prompt and noise.

    A pipeline that draws from prompts alone has a sister for pictures to start from, and one for
    masks, which share its parts.

    Args:
        kind: the folder's pipeline.
        request: what is asked for.

    Raises:
        CannotLoad: it takes no such option, or a picture can't be read.
    """
    given: dict[str, Any] = {}
    image = None if request.image is None else _picture(request.image)
    mask = None if request.mask is None else _picture(request.mask)
    if mask is not None and not _takes(kind, "mask_image"):
        kind = _sister(kind, "AUTO_INPAINT_PIPELINES_MAPPING", "mask")
    elif image is not None and not _takes(kind, "image", "control_image"):
        kind = _sister(kind, "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING", "image")
    taken = inspect.signature(kind.__call__).parameters
    if image is not None:
        given["image" if "image" in taken else "control_image"] = image
    if mask is not None:
        given["mask_image"] = mask
    size = request.size
    if image is not None and size is None and not _edits(kind):
        size = image.width // 16 * 16, image.height // 16 * 16
    if size is not None:
        given |= {"width": size[0], "height": size[1]}
    steps = request.steps or taken["num_inference_steps"].default
    given["num_inference_steps"] = steps
    if request.frames is not None:
        given["num_frames"] = request.frames
    if request.guidance is not None:
        given[_guidance(taken)] = request.guidance
    if request.negative is not None:
        given["negative_prompt"] = request.negative
        if "true_cfg_scale" in taken:  # without which FLUX.1 leaves a negative prompt aside
            default = taken[_guidance(taken)].default
            given["true_cfg_scale"] = default if request.guidance is None else request.guidance
    for name in given:
        if name not in taken:
            raise CannotLoad(
                f"{kind.__name__} takes no {name!r}: leave {OPTIONS[name]} out, or take a pipeline "
                "that does"
            )
    given.pop("negative_prompt", None)  # there is one a picture
    return kind, given


OPTIONS = {
    "negative_prompt": "--negative-prompt",
    "image": "--image",
    "control_image": "--image",
    "mask_image": "--mask",
    "width": "--size",
    "height": "--size",
    "num_inference_steps": "--steps",
    "num_frames": "--frames",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--guidance",
}
"""By the arguments of pipelines' calls."""


def _takes(kind: Any, *names: str) -> bool:
    return bool(inspect.signature(kind.__call__).parameters.keys() & set(names))


def _edits(kind: Any) -> bool:
    """Whether the picture is a reference, so that what is drawn has a size of its own."""
    return not _takes(kind, "strength") and not _takes(kind, "control_image")


def _guidance(taken: Mapping[str, inspect.Parameter]) -> str:
    """The argument that scales guidance: Qwen-Image has the other one for models to come."""
    distilled = taken.get("guidance_scale")
    other = "true_cfg_scale" in taken and distilled is not None and distilled.default is None
    return "true_cfg_scale" if other else "guidance_scale"


def _sister(kind: Any, mapping: str, option: str) -> Any:
    """The pipeline of the same family in one of diffusers' mappings of tasks."""
    from diffusers.pipelines import auto_pipeline

    tasks = ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT")
    for task in tasks:
        family = getattr(auto_pipeline, f"AUTO_{task}_PIPELINES_MAPPING")
        for name, found in family.items():
            if found is kind and name in getattr(auto_pipeline, mapping):
                return getattr(auto_pipeline, mapping)[name]
    raise CannotLoad(
        f"{kind.__name__} takes no {option}, and diffusers has no pipeline of its parts that does: "
        f"leave --{option} out"
    )


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise CannotLoad(f"{path} can't be read as a picture: {error}") from error


def _destination(kind: Any, out: Path | None) -> Path:
    """Where to write.

    Raises:
        CannotSave: a video's file is no .mp4, or a picture's no .png.
    """
    suffix = ".mp4" if _takes(kind, "num_frames") else ".png"
    out = out or Path("piflux").with_suffix(suffix)
    if out.suffix.lower() != suffix:
        what = "videos" if suffix == ".mp4" else "pictures"
        raise CannotSave(f"{out}: {kind.__name__} makes {what}; name a file that ends in {suffix}")
    if suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise CannotSave(
            f"{out}: to write a video takes the package imageio-ffmpeg: pip install 'piflux[demo]'"
        )
    return out


def load(model: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline on `device`, and what its call needs beside what a user says.

    Args:
        model: 'demo', a folder, or a hub id.
        device: on a GPU it is loaded in bfloat16, elsewhere in float32.

    Raises:
        CannotLoad: the folder holds no pipeline that can be loaded, or not all of its weights.
    """
    import diffusers

    _quiet()
    if model == "demo":
        return demo_pipeline().to(device), {"max_sequence_length": TEXT_TOKENS}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        models = models_of(model, **_in(dtype))
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **models, **_in(dtype))
        pipe = pipe.to(device)
        check_numbers(pipe, model)
        return pipe, {}
    except CannotLoad:
        raise
    except Exception as error:  # whatever diffusers trips over in a broken folder
        raise CannotLoad(
            f"{model} can't be loaded: {type(error).__name__}: {_line(error)}"
        ) from error


def as_kind(pipe: Any, kind: Any) -> Any:
    """The same parts in a pipeline of another class, in the dtype that they have."""
    if type(pipe) is kind:
        return pipe
    return kind.from_pipe(pipe, **_in(pipe.transformer.dtype))


def _in(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of diffusers' loaders that names a dtype.

    Before it had its new name, the new one was taken for an unknown argument and left aside.
    """
    import diffusers

    version = tuple(int(x) for x in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 40) else "torch_dtype": dtype}


def add_loras(pipe: Any, loras: tuple[tuple[str, float], ...]) -> None:
    """Load adapters into the pipeline and set their scales.

    Raises:
        CannotLoad: one of them, or what adapters need is not installed.
    """
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        raise CannotLoad("a LoRA takes the package peft: pip install 'piflux[demo]'")
    names = [f"lora_{i}" for i in range(len(loras))]
    for (text, _), name in zip(loras, names, strict=True):
        path = Path(text)
        folder, file = (path.parent, path.name) if path.is_file() else (path, None)
        try:
            pipe.load_lora_weights(str(folder), weight_name=file, adapter_name=name)
        except Exception as error:  # whatever diffusers and peft trip over
            raise CannotLoad(
                f"the LoRA {text} can't be loaded into {type(pipe).__name__}: "
                f"{type(error).__name__}: {_line(error)}"
            ) from error
    pipe.set_adapters(names, [scale for _, scale in loras])


def _line(error: Exception) -> str:
    """The last line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _quiet() -> None:
    """Leave the terminal to piflux: one progress bar, and no advice of the libraries below."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _progress(steps: int, *, shown: bool) -> Iterator[Callable[[], None] | None]:
    """One bar for all steps of all pictures: gives what advances it by a step."""
    if not shown:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=steps)
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
            str(unfinished), (width, height), fps=fps, macro_block_size=2, quality=8
        )
        writer.send(None)
        for array in arrays:
            writer.send(np.ascontiguousarray(array, dtype=np.uint8))
        writer.close()
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise CannotSave(f"{path} can't be saved: {error.strerror or error}") from error


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
