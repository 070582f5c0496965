"""How a skipped step is continued, and by what it is skipped: tried on the demo's model.

    python benchmarks/continued.py

Rules to continue by, each with the masks that a greedy search finds for it on some pictures, judged
on others; then steps that are skipped by an estimate of the error, as an adaptive solver does,
picture by picture against the mask of as many computed steps. Loops of its own, on one rank: what
won is in `piflux.runtime.continued`, and `piflux quality` measures that.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from piflux.demo import IMAGE_SIZE, TEXT_TOKENS, demo_pipeline
from piflux.tools import options
from piflux.tools.quality.drift import encode, psnr
from piflux.tools.quality.lpips import LPIPS
from piflux.tools.quality.tuning import search_masks
from piflux.tools.records import header, script

PROMPTS = Path(__file__).parent / "results" / "2026-11-23-drift-h200.json"
"""Its 64 prompts 'tune' are to search by, its 64 prompts 'report' to judge by."""

STEPS = 28
NUMBERS = (22, 20, 18, 16, 14, 12, 10, 8)
"""Of computed steps, which are judged."""


@dataclass(frozen=True)
class Rule:
    """How what is known is moved on.

    Attributes:
        over: the time in which it moves evenly: 'sigma' or 'log-SNR'.
        of: 'prediction', or the 'clean image' that latents and prediction stand for.
        order: 0 holds the last one, 1 takes the line through two, 2 the parabola through three.
        belief: the share of the change that is believed.
    """

    over: str = "log-SNR"
    of: str = "prediction"
    order: int = 1
    belief: float = 1.0

    def __str__(self) -> str:
        return f"{self.of}, order {self.order}, {self.belief:g} of it over {self.over}"


RULES = (
    Rule(order=0),
    *(Rule(over, belief=belief) for over in ("sigma", "log-SNR") for belief in (1.0, 0.75, 0.5)),
    *(
        Rule(over, order=2, belief=belief)
        for over in ("sigma", "log-SNR")
        for belief in (1.0, 0.75)
    ),
    *(Rule(over, "clean image", belief=b) for over in ("sigma", "log-SNR") for b in (1.0, 0.75)),
)
SEARCHED = (
    Rule(belief=0.75),
    Rule("sigma"),
    Rule(of="clean image", belief=0.75),
    Rule(order=2),
)
"""For which masks are searched, the first being what piflux does."""

Known = tuple[float, Tensor, Tensor]
"""A sigma, the prediction at it, and its latents."""


class Case:
    """Some pictures, from their noise to their latents and pixels."""

    def __init__(self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        self.pipe, self.model = pipe, pipe.transformer
        self.device = self.model.device
        channels = self.model.config.in_channels // 4
        size = (IMAGE_SIZE, IMAGE_SIZE, torch.float32, self.device)
        drawn = [
            pipe.prepare_latents(1, channels, *size, torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self.noise, self.ids = torch.cat([noise for noise, _ in drawn]), drawn[0][1]
        self.texts = encode(pipe, prompts, max_sequence_length=TEXT_TOKENS, batch=32)
        config = pipe.scheduler.config
        shift = calculate_shift(
            self.noise.shape[1],
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=shift)
        self.sigmas: list[float] = pipe.scheduler.sigmas.tolist()

    def predict(self, latents: Tensor, sigma: float) -> Tensor:
        full = {"device": self.device, "dtype": torch.float32}
        guided = self.model.config.guidance_embeds
        predicted: Tensor = self.model(
            hidden_states=latents,
            encoder_hidden_states=self.texts["prompt_embeds"],
            pooled_projections=self.texts["pooled_prompt_embeds"],
            timestep=torch.full((len(latents),), sigma, **full),
            guidance=torch.full((len(latents),), 3.5, **full) if guided else None,
            img_ids=self.ids,
            txt_ids=torch.zeros(TEXT_TOKENS, 3, **full),
            return_dict=False,
        )[0]
        return predicted

    def draw(self, mask: str, rule: Rule) -> Tensor:
        """The last latents."""
        latents, known = self.noise, list[Known]()
        for i, step in enumerate(mask):
            sigma, then = self.sigmas[i : i + 2]
            if step == "x":
                predicted = self.predict(latents, sigma)
                known = [*known, (sigma, predicted, latents)][-3:]
            else:
                predicted = continued(rule, known, latents, sigma)
            latents = latents + (then - sigma) * predicted
        return latents

    def pixels(self, latents: Tensor) -> Tensor:
        vae, images = self.pipe.vae, []
        for some in latents.split(16):
            x = self.pipe._unpack_latents(some, IMAGE_SIZE, IMAGE_SIZE, self.pipe.vae_scale_factor)
            x = x / vae.config.scaling_factor + vae.config.shift_factor
            images.append((vae.decode(x, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(images)


def log_snr(sigma: float) -> float:
    return math.log((sigma + 0.01) / (1 - sigma + 0.01))


def continued(rule: Rule, known: Sequence[Known], latents: Tensor, sigma: float) -> Tensor:
    """The prediction at `sigma`."""
    clock = log_snr if rule.over == "log-SNR" else float
    clean = rule.of == "clean image"
    values = [x - at * v if clean else v for at, v, x in known]
    times, now, last = [clock(at) for at, _, _ in known], clock(sigma), values[-1]
    order = min(rule.order, len(known) - 1)
    if order == 1:
        ahead = rule.belief * (now - times[-1]) / (times[-1] - times[-2])
        last = last + max(-3.0, min(3.0, ahead)) * (last - values[-2])
    elif order == 2:
        weights = [math.prod((now - b) / (a - b) for b in times if b != a) for a in times]
        curve = sum((w * x for w, x in zip(weights, values, strict=True)), torch.zeros_like(last))
        last = last + rule.belief * (curve - last)
    return (latents - last) / sigma if clean else last


def distance(latents: Tensor, full: Tensor) -> Tensor:
    """(pictures,): over the norm."""
    return (latents - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)


def by_error(case: Case, tolerance: float) -> tuple[Tensor, list[int]]:
    """The last latents, and how many steps of each picture were computed.

    By a skipped step the error of the line through two computed ones grows with the product of the
    ways to both. So each computed step tells by how much, and the next but one is skipped as long
    as what is expected of it is below the tolerance: a step late, so that no host would wait.
    """
    latents, pictures = case.noise, len(case.noise)
    like = torch.zeros(pictures, dtype=torch.float64, device=case.device)
    times, values = [like] * 2, [torch.zeros_like(latents)] * 2
    rate, coming = like + math.inf, like + math.inf
    known, skipped = like.long(), like.long()
    for i, sigma in enumerate(case.sigmas[:-1]):
        now = log_snr(sigma)
        ahead = (0.75 * (now - times[1]) / (times[1] - times[0])).clamp(-3, 3).nan_to_num()
        guess = values[1] + ahead[:, None, None].float() * (values[1] - values[0])
        way = ((now - times[1]) * (now - times[0])).abs()
        skip = (rate * way < tolerance) & (known > 2) & (skipped < 4)
        predicted = case.predict(latents, sigma)  # of all: which are skipped differs by picture
        wrong = distance(guess, predicted).double() / way
        coming, rate = (
            torch.where(skip, coming, torch.where(known > 1, wrong, math.inf)),
            torch.where(skip, rate, coming),
        )
        keep = ~skip[:, None, None]
        values = [torch.where(keep, values[1], values[0]), torch.where(keep, predicted, values[1])]
        times = [torch.where(skip, times[0], times[1]), torch.where(skip, times[1], now)]
        known, skipped = known + ~skip, torch.where(skip, skipped + 1, 0)
        latents = latents + (case.sigmas[i + 1] - sigma) * torch.where(keep, predicted, guess)
    return latents, known.tolist()


@torch.no_grad()
def main(
    count: Annotated[int, typer.Option(min=1, help="Pictures to search by.")] = 24,
    judged: Annotated[int, typer.Option(min=1, help="Pictures to judge by.")] = 64,
    searched: Annotated[int, typer.Option(min=1, help="Rules to search masks for.")] = len(
        SEARCHED
    ),
    out: Annotated[Path, typer.Option(help="A folder.", file_okay=False)] = Path("out/continued"),
) -> None:
    """Try all rules, and write continued.json."""
    options.folder(out)
    pipe = demo_pipeline().to("cuda" if torch.cuda.is_available() else "cpu")
    prompts = json.loads(PROMPTS.read_text())["prompts"]
    first = Case(pipe, prompts["tune"][:count], range(3000, 3000 + count))
    second = Case(pipe, prompts["report"][:judged], range(1000, 1000 + judged))
    judge, ours = LPIPS().to(first.device), SEARCHED[0]
    near = first.draw("x" * STEPS, ours)
    full = second.pixels(second.draw("x" * STEPS, ours))

    def judged_by(latents: Tensor) -> tuple[list[float], list[float]]:
        images = second.pixels(latents)
        pairs = zip(full.split(8), images.split(8), strict=True)
        found = [judge(a.to(first.device), b.to(first.device)) for a, b in pairs]
        return torch.cat(found).tolist(), psnr(full, images).tolist()

    record: dict[str, Any] = header(program=script()) | {"rows": [], "by error": []}
    masks: dict[Rule, dict[int, str]] = {}
    for rule in SEARCHED[:searched]:
        masks[rule] = search_masks(
            lambda mask, rule=rule: distance(first.draw(mask, rule), near).mean().item(),
            STEPS,
            min(NUMBERS),
        )
    of_ours: dict[int, tuple[list[float], list[float]]] = {}
    for rule in RULES:
        whose = rule if rule in masks else ours
        for n in NUMBERS:
            mask = masks[whose][n]
            lpips, db = judged_by(second.draw(mask, rule))
            if rule == ours:
                of_ours[n] = lpips, db
            row = {"rule": str(rule), "mask of": str(whose), "mask": mask, "computed": n}
            row |= {"lpips": lpips, "psnr": db}
            record["rows"].append(row)
            print(f"{rule}: {mask} {statistics.mean(db):.2f} / {statistics.mean(lpips):.6f}")
    for tolerance in (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04):
        latents, computed = by_error(second, tolerance)
        for n in set(computed) - of_ours.keys():
            mask = masks[ours].get(n, masks[ours][min(NUMBERS)])
            of_ours[n] = judged_by(second.draw(mask, ours))
        lpips, db = judged_by(latents)
        static = [[of_ours[n][which][i] for i, n in enumerate(computed)] for which in (0, 1)]
        wins = sum(a > b for a, b in zip(db, static[1], strict=True))
        row = {"tolerance": tolerance, "computed": computed, "lpips": lpips, "psnr": db}
        record["by error"].append(row | {"static lpips": static[0], "static psnr": static[1]})
        means = [statistics.mean(x) for x in (computed, db, lpips, static[1], static[0])]
        print("by error: {:.1f} computed, {:.2f} / {:.6f}; by mask {:.2f} / {:.6f}".format(*means))
        print(f"nearer by error: {wins} of {len(db)}")
    (out / "continued.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    typer.run(main)
