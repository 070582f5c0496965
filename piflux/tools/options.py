"""What a user writes on a command line: read, or refused with what to write instead."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from piflux.demo import IMAGE_SIZE, demo_file
from piflux.policies.schedule import BEST_SYNC_STEPS, Schedule, read_settings
from piflux.tools.launch import is_joined

ModelOption = Annotated[str, typer.Option(help="'demo', or a folder of a FLUX pipeline.")]
SyncStepsOption = Annotated[
    str, typer.Option(help="Steps that gather everything, '0,2', or how many first ones.")
]
SYNC_STEPS = ",".join(map(str, BEST_SYNC_STEPS))
RefreshOption = Annotated[
    int | None, typer.Option(min=1, help="Later on, one step in so many gathers everything.")
]


def setting(text: str) -> int | str | tuple[int | str, ...]:
    """'3' -> 3, '0,2' -> (0, 2), 'recompute' -> 'recompute'."""
    values = tuple(
        int(word) if word.lstrip("-").isdigit() else word for word in text.split(",") if word
    )
    return values if "," in text else values[0] if values else text


def settings(policy: str, sync_steps: str, refresh_every: int | None) -> dict[str, Any]:
    """Of `parallelize`, known to be in range; a file's take the place of the others."""
    given: dict[str, Any] = {
        "policy": policy,
        "sync_steps": setting(sync_steps),
        "refresh_every": refresh_every,
    }
    try:
        if policy.endswith(".json"):
            given |= read_settings(policy)
        Schedule(**(given | ({"policy": "rotate"} if policy == "auto" else {})))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return given


def check_model(model: str, *, hub: bool = False) -> None:
    """Refuses what is neither 'demo' nor a pipeline's folder, nor a hub id where that will do."""
    if model == "demo" or hub and re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return
    if not Path(model).is_dir():
        also = ", and no hub id like black-forest-labs/FLUX.1-dev" if hub else ""
        raise typer.BadParameter(f"--model {model}: no such folder{also}")
    if not (Path(model) / "model_index.json").is_file():
        raise typer.BadParameter(
            f"--model {model}: no pipeline there: it has no model_index.json, which "
            "save_pretrained writes"
        )


def flux_config(model: str) -> dict[str, Any]:
    """Of the pipeline's transformer, which must be FLUX's."""
    check_model(model)
    path = (demo_file("model") if model == "demo" else Path(model)) / "transformer" / "config.json"
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
            f"--model {model}: its transformer is a {kind}, and only FLUX's inputs are known "
            "without a call. Name a --policy, and ask piflux.explain(pipe) after one"
        )
    return config


def default_side(model: str) -> int:
    """Pixels that the model was trained on."""
    return IMAGE_SIZE if model == "demo" else 1024


def size(text: str | None, model: str) -> tuple[int, int]:
    """Width and height: '1024x768', or the model's own."""
    if text is None:
        return default_side(model), default_side(model)
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise typer.BadParameter(f"--size {text}: write width x height, as in 1024x768")
    width, height = (int(pixels) for pixels in found.groups())
    check_side("--size", width)
    check_side("--size", height)
    return width, height


def check_side(option: str, pixels: int, least: int = 16) -> None:
    if pixels < least or pixels % 16:
        raise typer.BadParameter(f"{option} must be a multiple of 16 from {least} on, got {pixels}")


def prompts(file: Path) -> list[str]:
    """One a line."""
    if not file.is_file():
        raise typer.BadParameter(f"--prompts {file}: no such file")
    try:
        texts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--prompts {file}: can't be read: {error}") from None
    if not texts:
        raise typer.BadParameter(f"--prompts {file}: no prompt in it")
    return texts


def ranks(asked: int | None) -> int:
    """How many: as asked for, as torchrun started, or as there are GPUs, else 2."""
    gpus = torch.cuda.device_count()
    if is_joined():
        started = int(os.environ["WORLD_SIZE"])
        if asked not in (None, started):
            raise typer.BadParameter(f"--ranks {asked}: torchrun started {started}")
        return started
    count = asked or gpus or 2
    if gpus and count > gpus:
        raise typer.BadParameter(
            f"--ranks {count}: there are {gpus} GPUs here; with CUDA_VISIBLE_DEVICES= in front "
            "ranks run on CPUs"
        )
    return count


def check_tokens(ranks: int, width: int, height: int, text: int) -> None:
    """Refuses more ranks than tokens to share: each segment is cut into as many parts."""
    image = width * height // 256
    if ranks > min(image, text):
        raise typer.BadParameter(
            f"--ranks {ranks}: a picture of {width} x {height} has {image} tokens and a prompt "
            f"{text}; each needs as many as there are ranks"
        )


def picture(path: Path) -> Path:
    """Where a PNG can be written."""
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"--out {path}: pictures are written as .png")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"--out {path}: there is no folder {path.parent}")
    _try_to_write(path, path.parent)
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
    """To find out now, not when the work is done."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"--out {option}: {folder} can't be written to: {error.strerror}"
        ) from None
