"""What a user writes on a command line: read, or refused with what to write instead.

Imports torch only where GPUs are counted: all else is checked before it.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from piflux.demo import IMAGE_SIZE, TEXT_TOKENS, demo_file
from piflux.errors import CannotLoad, PackageMissing
from piflux.launch import cores, is_joined
from piflux.pipelines.arguments import read_picture
from piflux.policies.masks import read_compute
from piflux.policies.schedule import (
    BEST_SYNC_STEPS,
    SETTINGS,
    Schedule,
    read_settings,
)

SMALLEST = 16
"""Pixels of a picture's side."""

LARGEST_SEED = 2**64 - 1
"""Of torch's generators."""


def finite(value: float | None) -> float | None:
    """Also refuses 'nan', which no range leaves out."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


ModelOption = Annotated[
    str, typer.Option(help="'demo', a folder of a diffusers pipeline, or a Hub id.")
]
SyncStepsOption = Annotated[
    str | None,
    typer.Option(
        help="Steps that gather everything, as '0,2', or how many first ones. Default: "
        f"{','.join(map(str, BEST_SYNC_STEPS))}; more with skipped steps."
    ),
]
RefreshOption = Annotated[
    int | None, typer.Option(min=1, help="Later on, one step in so many gathers everything.")
]
SyncOption = Annotated[
    Literal["gather", "recompute", "auto"],
    typer.Option(help="How a sync step comes by keys and values."),
]
OrderOption = Annotated[
    int, typer.Option(min=0, max=1, help="1: predict remembered keys and values. 0: don't.")
]
CompressionOption = Annotated[
    Literal["none", "int8", "int4"],
    typer.Option(help="Of what prediction remembers: its changes; int4: versions, too."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="GiB of each GPU that may be held, or 'auto' for all: takes settings that fit."
    ),
]
ComputeOption = Annotated[
    str,
    typer.Option(help="Steps that are computed: all, auto, how many, or a mask: xxxx.x.x."),
]
ShardWeightsOption = Annotated[
    bool,
    typer.Option(
        "--shard-weights", help="Each rank holds a share of each block's weights; gathered as used."
    ),
]
QuantizeOption = Annotated[
    Literal["none", "fp8", "int8"],
    typer.Option(help="8-bit weights in the transformer's blocks, made as it is loaded."),
]
QuantizeOnDemandOption = Annotated[
    Literal["none", "fp8", "int8", "auto"],
    typer.Option(
        help="8-bit weights in the transformer's blocks, made as it is loaded; auto: if they don't "
        "fit into --memory otherwise."
    ),
]
OffloadOption = Annotated[
    bool,
    typer.Option("--offload", help="Text encoders are in the host's memory but while they run."),
]
GuidanceOption = Annotated[
    float | None, typer.Option(callback=finite, help="Its scale. Default: the pipeline's.")
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Of the first picture; the next has the next.")
]
NegativeOption = Annotated[
    str | None, typer.Option(help="What not to draw: two passes a step, by --guidance.")
]
ImageOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A picture to start from, edit or follow."),
]
MaskOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="White where --image is painted anew."),
]
LoraOption = Annotated[
    list[str] | None, typer.Option(help="PATH[:scale], a file or folder. Repeatable.")
]


def setting(text: str) -> int | str | tuple[int | str, ...]:
    """'3' -> 3, '0,2' -> (0, 2), 'recompute' -> 'recompute'."""
    values = tuple(
        int(word) if word.lstrip("-").isdigit() else word for word in text.split(",") if word
    )
    if not values:
        return text
    return values if "," in text else values[0]


def settings(
    policy: str,
    sync_steps: str | None,
    refresh_every: int | None,
    steps: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Returns those of `parallelize`, known to be in range; a file's take the place of the others.

    Args:
        policy: its name, 'auto' or a file; the others as options give them.
        sync_steps: None for the default.
        refresh_every: likewise.
        steps: of an image, where that is known.
        others: `sync`, `order`, `compression` and `compute`.
    """
    given: dict[str, Any] = {
        "policy": policy,
        "sync_steps": None if sync_steps is None else setting(sync_steps),
        "refresh_every": refresh_every,
        **others,
    }
    read: dict[str, Any] = {}
    try:
        given["compute"] = read_compute(setting(str(given.get("compute", "all"))))
        if policy.endswith(".json"):
            read = read_settings(policy)
            given |= read
        Schedule(**(given | ({"policy": "rotate"} if policy == "auto" else {})))
    except ValueError as error:
        also = ", 'auto', or a .json file of settings" if "unknown policy" in str(error) else ""
        from_file = policy.endswith(".json")
        said = str(error).removeprefix(f"policy {policy!r}: ")
        told = f"--policy {policy}: {said}" if from_file else _as_options(said)
        raise typer.BadParameter(f"{told}{also}") from None
    # Sync steps of a file may be those of an image of more steps: what it has not is not computed.
    named = given if "sync_steps" not in read else given | {"sync_steps": None}
    wrong = None if steps is None else beyond(named, steps)
    if wrong is not None:
        name, value, said = wrong
        option = name.replace("_", "-")
        where = f"--policy {policy}: {name}={value}" if name in read else f"--{option} {value}"
        raise typer.BadParameter(f"{where}: {said}")
    return given


def beyond(settings: Mapping[str, Any], steps: int) -> tuple[str, str, str] | None:
    """Which setting names steps that an image of `steps` steps has not: name, value, and why.

    Args:
        settings: of a schedule, in range.
        steps: of an image.
    """
    compute, syncs = settings.get("compute", "all"), settings.get("sync_steps")
    if compute not in ("all", "auto"):
        count = len(compute) if isinstance(compute, str) else compute
        if count > steps or isinstance(compute, str) and count < steps:
            return "compute", str(compute), f"an image has {steps} steps"
    last = max(syncs, default=-1) + 1 if isinstance(syncs, tuple) else syncs or 0
    if last > steps:
        value = ",".join(map(str, syncs)) if isinstance(syncs, tuple) else str(syncs)
        return "sync_steps", value, f"an image has {steps} steps, 0 to {steps - 1}"
    return None


def _as_options(said: str) -> str:
    """What a schedule says of its fields, as a command line spells them."""
    names = "|".join(("policy", *SETTINGS[1:]))
    pattern = rf"\b({names})(?==| must\b)"
    return re.sub(pattern, lambda found: "--" + found[1].replace("_", "-"), said)


def memory(text: str | None) -> float | str | None:
    """'auto', or GiB: '24' -> 24.0; None where nothing is asked for."""
    if text is None or text == "auto":
        return text
    try:
        count = float(text)
    except ValueError:
        count = 0.0
    if not (math.isfinite(count) and count > 0):
        raise typer.BadParameter(f"--memory {text}: write 'auto', or a number of GiB, as in 24")
    return count


def chosen(policy: str) -> dict[str, Any]:
    """What 'auto' settles: 'gather' has no sync steps that could be recomputed."""
    from piflux.policies.named import POLICIES

    return {"policy": policy} | ({} if POLICIES[policy].remembers else {"sync": "gather"})


HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_hub_id(model: str) -> bool:
    return HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def check_model(model: str) -> None:
    """Refuses what is neither 'demo', nor a pipeline's folder, nor a Hub id."""
    if model == "demo" or is_hub_id(model):
        return
    if not (model and Path(model).is_dir()):
        raise typer.BadParameter(
            f"--model {model or repr(model)}: no such folder, and no Hub id like "
            "black-forest-labs/FLUX.1-dev"
        )
    if not (Path(model) / "model_index.json").is_file():
        raise typer.BadParameter(
            f"--model {model}: no pipeline there: it has no model_index.json, which "
            "save_pretrained writes"
        )


def folder_of(model: str, *, configs: bool = False) -> Path:
    """The folder of a pipeline, which is fetched if `model` is a Hub id; or only its configs."""
    if model == "demo":
        return demo_file("model")
    if not is_hub_id(model):
        return Path(model)
    import huggingface_hub

    try:
        if not _is_cached(model):
            huggingface_hub.model_info(model)  # says why it can't be had in fewer words
        if configs:
            return Path(huggingface_hub.snapshot_download(model, allow_patterns=["*.json"]))
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(model))
    except Exception as error:  # whatever a network and its libraries trip over
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[0] if lines else type(error).__name__
        raise typer.BadParameter(
            f"--model {model}: no such folder, and as a Hub id it can't be fetched: {said}. Fetch "
            "it where the Hub can be reached, and give its folder"
        ) from None


def _is_cached(model: str) -> bool:
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(model, "model_index.json"), str)


def config_of(model: str, part: str) -> dict[str, Any]:
    """The config of a folder's part, or its model_index; empty where it has none."""
    folder = demo_file("model") if model == "demo" else Path(model)
    path = folder / "model_index.json" if part == "" else folder / part / "config.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def flux_config(model: str) -> dict[str, Any]:
    """Of the pipeline's transformer, which must be FLUX.1's."""
    check_model(model)
    path = folder_of(model, configs=True) / "transformer" / "config.json"
    try:
        config = json.loads(path.read_text())
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise typer.BadParameter(
            f"--model {model}: {path} is not the config of a transformer, which save_pretrained "
            "writes"
        ) from None
    if kind != "FluxTransformer2DModel":
        raise typer.BadParameter(
            f"--model {model}: its transformer is a {kind}, and only FLUX.1's inputs are known "
            "without a call. Draw with it in Python, and print piflux.explain(pipe) afterwards"
        )
    return config


def default_side(model: str) -> int:
    """Pixels that the model was trained on."""
    return IMAGE_SIZE if model == "demo" else 1024


def size(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """Width and height: '1024x768'; None for the model's own."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise typer.BadParameter(f"{option} {text}: write width x height, as in 1024x768")
    width, height = (int(pixels) for pixels in found.groups())
    check_side(option, width)
    check_side(option, height)
    return width, height


def check_side(option: str, pixels: int, least: int = SMALLEST) -> None:
    if pixels < least or pixels % 16:
        raise typer.BadParameter(f"{option} must be a multiple of 16 from {least} on, got {pixels}")


def sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """'512x512,1024x768' -> ((512, 512), (1024, 768))."""
    found = (size(one.strip(), "--sizes") for one in (text or "").split(",") if one.strip())
    return tuple(pixels for pixels in found if pixels is not None)


def groups(text: str | None) -> tuple[int, ...] | None:
    """'1,2' -> (1, 2); None for all that the ranks can form."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"--groups {text}: write sizes of groups, as in 1,2")
    return tuple(int(size) for size in text.split(","))


def schedules(texts: Sequence[str] | None) -> dict[str, Path]:
    """'low=tuned.json' -> {'low': Path('tuned.json')}."""
    found = {}
    for text in texts or ():
        quality, equals, file = text.partition("=")
        if not equals or not Path(file).is_file():
            raise typer.BadParameter(
                f"--schedule {text}: write QUALITY=FILE, of a file that exists"
            )
        try:
            settings = read_settings(file)
            read_compute(settings.pop("compute", "all"))
            Schedule(**settings)
        except ValueError as error:
            said = str(error).removeprefix(f"policy {file!r}: ")
            raise typer.BadParameter(f"--schedule {text}: {said}") from None
        found[quality] = Path(file)
    return found


def check_memory(
    model: str, width: int, height: int, batch: int, itemsize: int, memory: float, where: str
) -> None:
    """Refuses pictures that can't be decoded in `memory` bytes.

    Counted are input and output of the decoder's last convolution, in its channels; the tokens of
    text and transformer, and what else is held, come on top.
    """
    vae = config_of(model, "vae")
    channels = (vae.get("block_out_channels") or [vae.get("base_dim", 3)])[0]
    need = 2 * channels * width * height * batch * itemsize
    if need > memory:
        raise typer.BadParameter(
            f"--size {width}x{height}: to decode it takes {need / 2**30:,.0f} GiB at least, and "
            f"{where} has {memory / 2**30:.1f}"
        )


def check_packages(quantize: str, loras: Sequence[Any] = ()) -> None:
    """Refuses what would else be missed once a model's weights are read.

    Raises:
        PackageMissing: with the extra that brings it.
    """
    for option, asked, package, extra in (
        (f"--quantize {quantize}", quantize != "none", "torchao", "quantize"),
        ("--lora", bool(loras), "peft", "demo"),
    ):
        if asked and find_spec(package) is None:
            raise PackageMissing(
                f"{option} takes the package {package}: pip install 'piflux[{extra}]'",
                name=package,
            )


def check_gpu(*, offload: bool = False, quantize: str = "none", memory: object = None) -> None:
    """Refuses what only a GPU can do where there is none."""
    import torch

    if torch.cuda.is_available():
        return
    if offload:
        raise typer.BadParameter("--offload: there is no GPU here to make room on")
    if quantize == "fp8":
        raise typer.BadParameter("--quantize fp8: there is no GPU here that has it: take int8")
    if memory == "auto":
        raise typer.BadParameter("--memory auto: there is no GPU here to be asked: write GiB")


def prompt(text: str) -> str:
    if not text.strip():
        raise typer.BadParameter("the prompt is empty: say what to draw")
    return text


def prompts(file: Path) -> list[str]:
    """One a line."""
    try:
        texts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise typer.BadParameter(f"--prompts {file}: can't be read: {why}") from None
    if not texts:
        raise typer.BadParameter(f"--prompts {file}: no prompt in it")
    return texts


def loras(texts: Sequence[str] | None) -> tuple[tuple[str, float], ...]:
    """'style.safetensors:0.8' -> ('style.safetensors', 0.8); without a scale, 1."""
    found = []
    for text in texts or ():
        path, colon, scale = text.rpartition(":")
        try:
            pair = (path, float(scale)) if colon else (text, 1.0)
        except ValueError:
            pair = text, 1.0
        if not pair[0]:  # to pathlib the current folder
            raise typer.BadParameter(f"--lora {text!r}: write PATH, or PATH:scale")
        if not Path(pair[0]).exists():
            raise typer.BadParameter(f"--lora {text}: no such file or folder: {pair[0]}")
        if not math.isfinite(pair[1]):
            raise typer.BadParameter(f"--lora {text}: the scale is not a finite number")
        found.append(pair)
    return tuple(found)


def check_picture(option: str, path: Path | None) -> None:
    """Refuses what ranks would only find when they begin to draw."""
    if path is None:
        return
    try:
        width, height = read_picture(path).size
    except CannotLoad as error:
        raise typer.BadParameter(f"{option} {error}") from None
    if min(width, height) < SMALLEST:
        raise typer.BadParameter(
            f"{option} {path}: is {width}x{height}, and the smallest picture is "
            f"{SMALLEST}x{SMALLEST}"
        )


def replicas(text: str) -> tuple[int, int | None]:
    """The fewest replicas, and the most if there may be more: of '2' or '1-4'."""
    fewest, dash, most = text.partition("-")
    counts = [x for x in (fewest, most) if x.isdecimal() and int(x) > 0]
    if len(counts) != 1 + bool(dash) or (dash and int(most) < int(fewest)):
        raise typer.BadParameter(f"--replicas {text}: give a number, or two as in 1-4")
    return int(fewest), int(most) if dash else None


def ranks(asked: int | None) -> int:
    """How many: as asked for, as torchrun started, or as there are GPUs, else 2."""
    if is_joined():
        from piflux.ranks import environment

        try:
            environment.check()
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        started = int(os.environ["WORLD_SIZE"])
        if asked not in (None, started):
            raise typer.BadParameter(f"--ranks {asked}: torchrun started {started}")
        return started
    import torch

    gpus = torch.cuda.device_count()
    count = asked or gpus or 2
    if gpus and count > gpus:
        raise typer.BadParameter(
            f"--ranks {count}: there are {gpus} GPUs here; with CUDA_VISIBLE_DEVICES= in front "
            "ranks run on CPUs"
        )
    return count


def check_cores(ranks: int) -> None:
    """Refuses to measure CPU ranks that would wait for a core. Two may: one host must do."""
    if ranks > max(2, cores()):
        raise typer.BadParameter(
            f"--ranks {ranks}: there are {cores()} CPU cores here, and what ranks measure that "
            "wait for one says nothing of links or kernels"
        )


def check_tokens(ranks: int, width: int, height: int, text: int) -> None:
    """Refuses as many ranks as there are tokens to share, or more: FLUX attends to all at once."""
    image = width * height // 256
    if ranks >= image + text:
        raise typer.BadParameter(
            f"--ranks {ranks}: a picture of {width} x {height} and its prompt have {image + text} "
            "tokens, too few for so many ranks: take fewer, or a larger --size"
        )


def text_tokens(model: str) -> int:
    """Of a prompt, padding included: what the pipelines of FLUX.1 pass to its transformer."""
    return TEXT_TOKENS if model == "demo" else 512


def numbered(path: Path, count: int) -> tuple[Path, ...]:
    """`apple.png` for one picture; apple-01.png to apple-12.png for twelve."""
    if count == 1:
        return (path,)
    digits = len(str(count))
    return tuple(path.with_stem(f"{path.stem}-{i:0{digits}}") for i in range(1, count + 1))


PICTURES, VIDEOS = (".png",), (".mp4",)


def picture(path: Path | None) -> Path | None:
    """Where a picture or a video can be written; None for the current folder."""
    if path is not None and path.suffix.lower() not in PICTURES + VIDEOS:
        raise typer.BadParameter(f"--out {path}: pictures are written as .png, videos as .mp4")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"--out {path}: is a folder, name a file")
    parent = Path() if path is None else path.parent
    if not parent.is_dir():
        raise typer.BadParameter(f"--out {path}: there is no folder {parent}")
    _try_to_write(path or parent, parent)
    return path


def folder(path: Path) -> Path:
    """Where files can be written; made if it isn't there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out {path}: can't be made: {error.strerror}") from None
    _try_to_write(path, path)
    return path


def _try_to_write(option: Path, folder: Path) -> None:
    """To find out now, not when the work is done; `os.access` calls all writable to root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"--out {option}: {folder} can't be written to: {error.strerror}"
        ) from None
