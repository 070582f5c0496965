"""Look at what was trained: `python training/show.py MODEL SPRITES OUT`.

Writes pictures of 36 prompts, of pairs of concept and style that training never saw, and of the
training pictures nearest to what was drawn, with how often the nearest is of the prompted concept.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from data import COLOURS, Dataset, caption, compose, held_out, load
from diffusers import FluxPipeline
from model import IMAGE_SIZE, TEXT_TOKENS
from torch import Tensor

STEPS = 28
COLOUR_NAMES = list(COLOURS)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def show(
    model: Annotated[Path, typer.Argument(help="What `train.py export` wrote.")],
    sprites: Annotated[Path, typer.Argument(help="What `data.py build` wrote.")],
    out: Annotated[Path, typer.Argument(help="The folder for pictures and numbers.")],
    guidance: float = 3.5,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    count: Annotated[int, typer.Option(help="Prompts in the measured set.")] = 256,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    data = load(sprites)
    data = dataclasses.replace(data, sprites=data.sprites.to(device))
    unseen = sorted(held_out(data.names))
    pairs = [(c, s) for c in range(len(data.names)) for s in range(len(data.styles))]
    seen = [pair for pair in pairs if pair not in set(unseen)]

    numbers: dict[str, float] = {"guidance": guidance, "steps": STEPS}
    for name, pool, n in (("seen", seen, count), ("held out", unseen, len(unseen))):
        chosen = [pool[i] for i in torch.randperm(len(pool), generator=_seeded(1))[:n].tolist()]
        what = [(c, s, i % len(COLOURS)) for i, (c, s) in enumerate(chosen)]
        drawn = draw(pipe, [_caption(data, *w) for w in what], guidance)
        near = nearest(drawn, [w[2] for w in what], data)
        numbers[f"{name}: nearest is the concept"] = sum(
            pairs[i][0] == w[0] for i, w in zip(near, what, strict=True)
        ) / len(what)
        numbers[f"{name}: nearest is the pair"] = sum(
            pairs[i] == w[:2] for i, w in zip(near, what, strict=True)
        ) / len(what)
        found = [_compose(data, *pairs[i], w[2]) for i, w in zip(near, what, strict=True)]
        titles = [_caption(data, *w).removesuffix(" background") for w in what]
        grid(drawn[:36], titles[:36], out / f"{name.replace(' ', '_')}.png")
        beside = [x for both in zip(drawn[:18], found[:18], strict=True) for x in both]
        labels = [x for t in titles[:18] for x in (t, "nearest in training")]
        grid(beside, labels, out / f"{name.replace(' ', '_')}_nearest.png")
    (out / "show.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers))


def draw(pipe: FluxPipeline, prompts: list[str], guidance: float) -> list[Tensor]:
    """One picture (3, 256, 256) in [0, 1] for each prompt, seeded by its place in the list."""
    pictures: list[Tensor] = []
    for start in range(0, len(prompts), 64):
        some = prompts[start : start + 64]
        pictures += (
            pipe(
                some,
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                max_sequence_length=TEXT_TOKENS,
                generator=[_seeded(start + i) for i in range(len(some))],
                output_type="pt",
            )
            .images.float()
            .cpu()
        )
    return pictures


def nearest(drawn: list[Tensor], colours: list[int], data: Dataset) -> list[int]:
    """For each picture the (concept, style), numbered in rows, whose sprite is nearest to it.

    Compared as 32 x 32 pixels on the prompted background, over a few scales and shifts.
    """
    concepts, styles = data.sprites.shape[:2]
    every = data.sprites.flatten(0, 1)
    best = torch.full((len(drawn), concepts * styles), float("inf"))
    pictures = _small(torch.stack(drawn).to(every.device) * 2 - 1)
    for scale in (0.80, 0.86, 0.92):
        for colour in range(len(COLOURS)):
            rows = [i for i, c in enumerate(colours) if c == colour]
            if not rows:
                continue
            paint = torch.tensor([COLOURS[COLOUR_NAMES[colour]]], device=every.device)
            paint = paint.expand(len(every), 3)
            scales = torch.full((len(every),), scale, device=every.device)
            for dx, dy in ((0, 0), (-0.03, 0), (0.03, 0), (0, -0.03), (0, 0.03)):
                shift = torch.tensor([[dx, dy]], device=every.device).expand(len(every), 2)
                known = _small(compose(every, paint, scales, shift, IMAGE_SIZE // 2))
                apart = torch.cdist(pictures[rows], known).cpu()
                best[rows] = torch.minimum(best[rows], apart)
    return best.argmin(dim=1).tolist()


def _small(pictures: Tensor) -> Tensor:
    """(B, 3, side, side) -> (B, 3 * 32 * 32)."""
    return F.interpolate(pictures, 32, mode="area").flatten(1)


def grid(pictures: list[Tensor], titles: list[str], path: Path, columns: int = 6) -> None:
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.45 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, title in zip(axes.flat, pictures, titles, strict=False):
        axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(title, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _compose(data: Dataset, concept: int, style: int, colour: int) -> Tensor:
    paint = torch.tensor([COLOURS[COLOUR_NAMES[colour]]])
    sprite = data.sprites[concept, style][None].cpu()
    picture = compose(sprite, paint, torch.tensor([0.86]), torch.zeros(1, 2), IMAGE_SIZE)
    return picture[0] / 2 + 0.5


def _caption(data: Dataset, concept: int, style: int, colour: int) -> str:
    return caption(data.names[concept], data.styles[style], COLOUR_NAMES[colour])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    app()
