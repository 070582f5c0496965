"""How far pictures drift from one rank's, by policy, ranks and schedule.

Ranks are virtual ones in this process: the same graphs, the same pictures, no second device. Every
variant draws the same prompts from the same noise as one rank does, and is compared picture by
picture.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import piflux
from piflux.cost.clock import between, mark
from piflux.errors import CannotLoad
from piflux.pipelines.arguments import takes
from piflux.policies.schedule import Schedule
from piflux.tools.image_cost import Cost, measured_cost, modelled_cost
from piflux.tools.quality.lpips import LPIPS
from piflux.tools.quality.variants import Variant

BEST_DB = 100.0
"""PSNR of equal pictures, which has no finite value."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of some prompts by one model.

    Attributes:
        images: (B, 3, H, W), values from 0 to 1, float32 on the CPU.
        latents: after each step, (B, ...) as the pipeline has them, likewise.
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


def check_pictures(kind: Any) -> None:
    """Refuses a pipeline whose drift is not known to be measured here.

    Args:
        kind: its class.

    Raises:
        CannotLoad: it makes videos, takes no prompts, or doesn't tell of its steps.
    """
    if takes(kind, "num_frames"):
        raise CannotLoad(f"{kind.__name__} makes videos, and quality compares pictures")
    for name in ("prompt", "callback_on_step_end"):
        if not takes(kind, name):
            raise CannotLoad(
                f"{kind.__name__} takes no {name!r}, which quality needs: to draw the same "
                "pictures again, and to look at latents after each step"
            )


def encode(
    pipe: Any, prompts: Sequence[str], *, max_sequence_length: int = 512, batch: int = 8
) -> dict[str, Tensor]:
    """What the call of a FLUX.1 takes in place of prompts: a row a prompt, on its device."""
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
    texts: Mapping[str, Any],
    seeds: Sequence[int],
    *,
    batch: int = 8,
    decodes: bool = True,
    on_step: Callable[[], None] = lambda: None,
    **call: Any,
) -> Drawn:
    """One picture for each row of `texts` and seed.

    Args:
        pipe: a diffusers pipeline of pictures.
        texts: arguments of its call with a row a picture: a list of prompts, or what `encode` made.
        seeds: of the starting noise, one a picture.
        batch: pictures drawn at once.
        decodes: whether there are images, and not latents alone.
        on_step: called after each step of each batch.
        call: further arguments of the pipeline's call.
    """
    images: list[Tensor] = []
    latents: list[list[Tensor]] = []
    times: list[float] = []
    on_gpu = pipe.device.type == "cuda"
    for start in range(0, len(seeds), batch):
        some = seeds[start : start + batch]
        states: list[Tensor] = []
        clock = [mark(on_gpu)]

        def keep(_: Any, step: int, at: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            states.append(tensors["latents"].float().cpu())  # noqa: B023 (called in this round)
            clock.append(mark(on_gpu))  # noqa: B023
            on_step()
            return tensors

        drawn = pipe(
            **{name: rows[start : start + batch] for name, rows in texts.items()},
            generator=[torch.Generator().manual_seed(seed) for seed in some],
            output_type="pt" if decodes else "latent",
            callback_on_step_end=keep,
            **call,
        )
        images.append(drawn.images.float().cpu().clamp(0, 1) if decodes else torch.empty(0))
        latents.append(states)
        times += [ms / 1000 / len(some) for ms in between(clock)]
    steps = [torch.cat(step) for step in zip(*latents, strict=True)]
    return Drawn(torch.cat(images), steps, statistics.median(times))


class Pictures:
    """What one rank draws of some prompts, and what variants draw, each against it.

    Variants that differ only in which steps are computed, or sync, share one compiled model.

    Args:
        pipe: a diffusers pipeline of pictures, which draws from prompts and tells of its steps
            (`callback_on_step_end`).
        prompts: one a picture.
        seeds: of the starting noise, one a picture.
        link_gbs: GB/s that a rank sends, for the modelled cost.
        bench: what `piflux bench` wrote, for measured cost instead.
        inner: the backend that compiles the graphs.
        batch: pictures drawn at once.
        on_step: told what is being drawn, after each step of a batch.
        call: further arguments of the pipeline's call.

    Attributes:
        one: what one rank draws.
        steps: of an image.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        link_gbs: float = 25.0,
        bench: Mapping[str, Any] | None = None,
        inner: str = "eager",
        batch: int = 8,
        on_step: Callable[[str], None] = lambda what: None,
        **call: Any,
    ) -> None:
        self._pipe, self._seeds, self._call = pipe, seeds, call | {"batch": batch}
        self._link_gbs, self._bench, self._inner = link_gbs, bench, inner
        self._on_step = on_step
        self._judge = LPIPS()
        self._texts = {"prompt": list(prompts)}
        self._parallel: dict[Any, Any] = {}
        self.one = self._draw(pipe, "1 rank")
        self.steps = len(self.one.latents)

    def row(self, variant: Variant, ranks: int) -> tuple[Row, Drawn]:
        """A variant's numbers and pictures on so many ranks."""
        drawn = self._draw(self._under(variant, ranks), f"{variant.name}, {ranks} ranks")
        cost = self.cost(variant, ranks)
        return compare(variant.name, ranks, self.one, drawn, self._judge, cost), drawn

    def cost(self, variant: Variant, ranks: int) -> Cost:
        """Of a variant whose like was drawn."""
        schedule = Schedule(**variant.options, world_size=ranks)
        if self._bench is not None:
            return measured_cost(self._bench, schedule, self.steps)
        report = piflux.explain(self._parallel[_compiled_as(variant, ranks)]).graphs[0]
        report = replace(report, schedule=schedule)
        pictures = min(self._call["batch"], len(self._seeds))
        return modelled_cost(report, self.steps, self.one.step_s, self._link_gbs, pictures)

    def memory_bytes(self, variant: Variant, ranks: int) -> float | None:
        """What a rank holds that draws one picture under a variant; None if no like was drawn."""
        parallel = self._parallel.get(_compiled_as(variant, ranks))
        if parallel is None:
            return None
        report = piflux.explain(parallel).graphs[0]
        pictures = min(self._call["batch"], len(self._seeds))
        return report.weight_bytes + (report.memory_bytes - report.weight_bytes) / pictures

    def distance(self, variant: Variant, ranks: int = 1) -> float:
        """How far the last latents are from one rank's: over their norm, mean over pictures."""
        drawn = self._draw(self._under(variant, ranks), "masks", decodes=False)
        return _distances(self.one.latents[-1:], drawn.latents[-1:])[0]

    def _draw(self, pipe: Any, what: str, *, decodes: bool = True) -> Drawn:
        told = partial(self._on_step, what)
        return draw(pipe, self._texts, self._seeds, decodes=decodes, on_step=told, **self._call)

    def _under(self, variant: Variant, ranks: int) -> Any:
        """The pipeline whose next picture is drawn under the variant's schedule."""
        key = _compiled_as(variant, ranks)
        if key not in self._parallel:
            group = piflux.virtual_ranks(ranks)
            self._parallel[key] = piflux.parallelize(
                self._pipe, group=group, inner=self._inner, **variant.options
            )
        parallel = self._parallel[key]
        for module in parallel._piflux_modules:
            runtime = module._piflux_compiler.runtime
            runtime.settle(Schedule(**variant.options, world_size=runtime.schedule.world_size))
        return parallel


def _compiled_as(variant: Variant, ranks: int) -> Hashable:
    """What variants of one compiled model have in common."""
    when = ("sync_steps", "refresh_every", "compute")
    return ranks, tuple(sorted(x for x in variant.options.items() if x[0] not in when))


def measure(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    variants: Sequence[Variant],
    ranks: Sequence[int],
    **options: Any,
) -> tuple[Drawn, list[Row], list[Drawn]]:
    """What one rank draws, and every variant's numbers and pictures against it.

    Args:
        pipe: as for `Pictures`, likewise `prompts`, `seeds` and `options`.
        variants: what to measure.
        ranks: on how many ranks each.
    """
    pictures = Pictures(pipe, prompts, seeds, **options)
    found = [pictures.row(variant, n) for n in ranks for variant in variants]
    return pictures.one, [row for row, _ in found], [drawn for _, drawn in found]


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
    drift = _distances(one.latents, other.latents)
    return Row(
        name, ranks, psnr(one.images, other.images).tolist(), ssim, lpips.tolist(), drift, cost
    )


def _distances(ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    return [
        ((a - b).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)).mean().item()
        for a, b in zip(ones, others, strict=True)
    ]


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
