"""How far pictures drift from one rank's, by policy, ranks and schedule; and the best of schedules.

Ranks are virtual ones in this process: the same graphs, the same pictures, no second device. Every
variant draws the same prompts from the same noise as one rank does, and is compared picture by
picture.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import piflux
from piflux.cost.clock import between, mark
from piflux.tools.image_cost import Cost, measured_cost, modelled_cost
from piflux.tools.quality.lpips import LPIPS
from piflux.tools.quality.variants import CANDIDATES, Variant

BEST_DB = 100.0
"""PSNR of equal pictures, which has no finite value."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of some prompts by one model.

    Attributes:
        images: (B, 3, H, W), values from 0 to 1, float32 on the CPU.
        latents: after each step, (B, tokens, channels), likewise.
        step_s: median seconds of a step for one picture.
    """

    images: Tensor
    latents: list[Tensor]
    step_s: float


@dataclass(frozen=True)
class Row:
    """One variant on so many ranks, against one rank; a number a picture.

    Attributes:
        psnr: dB.
        ssim: structural similarity of grey values (Wang et al. 2004).
        lpips: AlexNet's (Zhang et al. 2018).
        drift: for each step, the latents' distance over their norm, mean over pictures.
        cost: by `modelled_cost`, or `measured_cost`.
    """

    variant: str
    ranks: int
    psnr: list[float]
    ssim: list[float]
    lpips: list[float]
    drift: list[float]
    cost: Cost


def encode(
    pipe: Any, prompts: Sequence[str], *, max_sequence_length: int = 512, batch: int = 8
) -> dict[str, Tensor]:
    """What the pipeline's call takes in place of prompts: a row a prompt, on its device."""
    encoded = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch):
            some = list(prompts[start : start + batch])
            encoded.append(
                pipe.encode_prompt(some, None, max_sequence_length=max_sequence_length)[:2]
            )
    tokens, pooled = (torch.cat(texts) for texts in zip(*encoded, strict=True))
    return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}


def draw(
    pipe: Any,
    texts: Mapping[str, Tensor],
    seeds: Sequence[int],
    *,
    batch: int = 8,
    on_batch: Callable[[], None] = lambda: None,
    **call: Any,
) -> Drawn:
    """One picture for each row of `texts` (`encode`) and seed; `call` goes to the pipeline."""
    images: list[Tensor] = []
    latents: list[list[Tensor]] = []
    times: list[float] = []
    on_gpu = all(rows.is_cuda for rows in texts.values())
    for start in range(0, len(seeds), batch):
        some = seeds[start : start + batch]
        states: list[Tensor] = []
        clock = [mark(on_gpu)]

        def keep(_: Any, step: int, at: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            states.append(tensors["latents"].float().cpu())  # noqa: B023 (called in this round)
            clock.append(mark(on_gpu))  # noqa: B023
            return tensors

        drawn = pipe(
            **{name: rows[start : start + batch] for name, rows in texts.items()},
            generator=[torch.Generator().manual_seed(seed) for seed in some],
            output_type="pt",
            callback_on_step_end=keep,
            **call,
        )
        images.append(drawn.images.float().cpu().clamp(0, 1))
        latents.append(states)
        times += [ms / 1000 / len(some) for ms in between(clock)]
        on_batch()
    steps = [torch.cat(step) for step in zip(*latents, strict=True)]
    return Drawn(torch.cat(images), steps, statistics.median(times))


def measure(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    variants: Sequence[Variant],
    ranks: Sequence[int],
    *,
    link_gbs: float = 25.0,
    bench: Mapping[str, Any] | None = None,
    inner: str = "eager",
    batch: int = 8,
    max_sequence_length: int = 512,
    on_batch: Callable[[str], None] = lambda what: None,
    **call: Any,
) -> tuple[Drawn, list[Row], list[Drawn]]:
    """What one rank draws, and every variant's numbers and pictures against it.

    Args:
        pipe: a diffusers pipeline that encodes prompts and takes embeddings as FLUX's does.
        prompts: one a picture.
        seeds: of the starting noise, one a picture.
        variants: what to measure.
        ranks: on how many ranks each.
        link_gbs: GB/s that a rank sends, for the modelled cost.
        bench: what `piflux bench` wrote, for measured cost instead.
        inner: the backend that compiles the graphs.
        batch: pictures drawn at once.
        max_sequence_length: tokens of a prompt. Each is encoded once, whatever the variants.
        on_batch: told what was drawn, after each batch.
        call: further arguments of the pipeline's call.
    """
    judge = LPIPS()
    texts = encode(pipe, prompts, max_sequence_length=max_sequence_length, batch=batch)
    one = draw(pipe, texts, seeds, batch=batch, on_batch=lambda: on_batch("1 rank"), **call)
    rows, drawn = [], []
    for n in ranks:
        for variant in variants:
            what = f"{variant.name}, {n} ranks"
            parallel = piflux.parallelize(
                pipe, group=piflux.virtual_ranks(n), inner=inner, **variant.options
            )
            got = draw(
                parallel,
                texts,
                seeds,
                batch=batch,
                on_batch=lambda what=what: on_batch(what),  # type: ignore[misc]
                **call,
            )
            report, steps = piflux.explain(parallel).graphs[0], len(one.latents)
            cost = (
                modelled_cost(report, steps, one.step_s, link_gbs, min(batch, len(prompts)))
                if bench is None
                else measured_cost(bench, report.schedule, steps)
            )
            rows.append(compare(variant.name, n, one, got, judge, cost))
            drawn.append(got)
    return one, rows, drawn


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most BEST_DB: (B, 3, H, W), from 0 to 1 -> (B,)."""
    error = (first - second).square().flatten(1).mean(dim=1)
    return (-10 * error.log10()).clamp(max=BEST_DB)


def compare(name: str, ranks: int, one: Drawn, other: Drawn, judge: LPIPS, cost: Cost) -> Row:
    """`other`'s pictures against `one`'s, each against its own."""
    # Brings parts of SciPy, which every other command would wait for.
    from skimage.metrics import structural_similarity

    ssim = [
        float(structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0))
        for a, b in zip(one.images, other.images, strict=True)
    ]
    lpips = torch.cat(
        [judge(a, b) for a, b in zip(one.images.split(8), other.images.split(8), strict=True)]
    )
    drift = [
        ((a - b).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)).mean().item()
        for a, b in zip(one.latents, other.latents, strict=True)
    ]
    return Row(
        name, ranks, psnr(one.images, other.images).tolist(), ssim, lpips.tolist(), drift, cost
    )


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean, median and worst over pictures, and what is gained over the first row of as many ranks.

    Pictures differ more than variants do, so the gain is paired: the mean difference in PSNR (dB)
    of the same picture, and that mean's standard error (None for one picture).
    """
    first: dict[int, Row] = {}
    found = []
    for row in rows:
        base = first.setdefault(row.ranks, row)
        gains = [a - b for a, b in zip(row.psnr, base.psnr, strict=True)]
        scores = {
            f"{which}{name}": of(values)
            for name, values, worst in (
                ("psnr", row.psnr, min),
                ("ssim", row.ssim, min),
                ("lpips", row.lpips, max),
            )
            for which, of in (
                ("", statistics.mean),
                ("median_", statistics.median),
                ("worst_", worst),
            )
        }
        found.append(
            {"variant": row.variant, "ranks": row.ranks}
            | scores
            | {
                "gain_over": base.variant,
                "gain_db": statistics.mean(gains),
                "gain_db_error": (
                    statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
                ),
                "drift": row.drift[-1],
                "cost_s": row.cost.mean_s,
                "cost": row.cost.mean_s / row.cost.one_s,
            }
        )
    return found


def tune(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    ranks: int,
    *,
    max_lpips: float | None = None,
    max_cost_s: float | None = None,
    **options: Any,
) -> tuple[Variant, list[Row], Row]:
    """The best schedule within a budget: chosen on half of the prompts, judged on the other.

    Args:
        pipe: as for `measure`, likewise `prompts`, `seeds` and `options`.
        ranks: on how many ranks.
        max_lpips: the cheapest schedule whose mean is at most that, if given;
        max_cost_s: else that of the least LPIPS which costs at most so many seconds a step.

    Returns:
        The schedule, all of them on the first half, and the chosen one on the second.

    Raises:
        ValueError: fewer than two prompts, not one of the budgets, or nothing within it.
    """
    if (max_lpips is None) == (max_cost_s is None):
        raise ValueError("tuning needs one budget: the LPIPS to reach, or the cost to stay below")
    if len(prompts) < 2:
        raise ValueError("tuning needs two prompts at least: one to choose by, one to judge by")
    half = len(prompts) // 2
    variants = [Variant.parse(text) for text in CANDIDATES]
    _, rows, _ = measure(pipe, prompts[:half], seeds[:half], variants, [ranks], **options)
    if max_lpips is not None:
        good = [row for row in rows if statistics.mean(row.lpips) <= max_lpips]
        best = min(good, key=lambda row: row.cost.mean_s, default=None)
    else:
        good = [row for row in rows if row.cost.mean_s <= (max_cost_s or 0)]
        best = min(good, key=lambda row: statistics.mean(row.lpips), default=None)
    if best is None:
        nearest = min(statistics.mean(row.lpips) for row in rows)
        cheapest = min(row.cost.mean_s for row in rows)
        raise ValueError(
            f"no schedule is within the budget: the least LPIPS that one reaches is {nearest:.4f}, "
            f"the lowest cost {1000 * cheapest:.4g} ms a step"
        )
    chosen = variants[rows.index(best)]
    _, (judged,), _ = measure(pipe, prompts[half:], seeds[half:], [chosen], [ranks], **options)
    return chosen, rows, judged
