"""Ways to compute less of an image on one rank, beside each other, on the demo's model.

    python benchmarks/step_caches.py --prompts benchmarks/prompts.txt --seed 1000

Each is compared with the picture of 28 Euler steps, which is what most of them stand for, and with
one of 200 steps of second order, which none of them knows: a method that only changes the solver
leads to another picture than 28 steps do, and not to a worse one. What is computed is counted in
arithmetic that ran, so that a first block that always runs counts.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import piflux
from piflux.demo import IMAGE_SIZE, PROMPTS, TEXT_TOKENS, demo_pipeline
from piflux.tools import options
from piflux.tools.quality.charts import contact_sheet
from piflux.tools.quality.drift import draw, encode, psnr
from piflux.tools.quality.lpips import LPIPS
from piflux.tools.records import header, script

STEPS = 28
"""Of the full picture."""

NEARLY_EXACT = 200
"""Steps, of second order, of the picture that solvers lead to."""

FIRST = 6
"""Steps that TaylorSeer computes before it begins."""

Prepared = contextlib.AbstractContextManager[Any]


@dataclass(frozen=True)
class Method:
    """A way to draw.

    Attributes:
        name: as the table has it.
        prepare: gives the pipeline that draws, of one that nobody else uses meanwhile.
        steps: of the sampler; None for those of the full picture.
        alone: whether it decides by what it computes, and so draws pictures one by one.
        computed: how many steps are, where arithmetic can't be counted as it runs.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    steps: int | None = None
    alone: bool = False
    computed: int | None = None


@dataclass
class Row:
    """What a method came to; a number a picture.

    Attributes:
        computed: steps' worth of arithmetic that ran, mean over pictures.
        psnr: dB, to the full picture; likewise `lpips`.
        solved_psnr: to the one of NEARLY_EXACT steps; likewise `solved_lpips`.
    """

    name: str
    computed: float
    psnr: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    solved_psnr: list[float] = field(default_factory=list)
    solved_lpips: list[float] = field(default_factory=list)


@contextlib.contextmanager
def euler(pipe: Any) -> Iterator[Any]:
    """As the pipeline comes."""
    yield pipe


@contextlib.contextmanager
def second_order(pipe: Any) -> Iterator[Any]:
    """DPM-Solver++(2M), a multistep solver of second order, for flow matching."""
    before, shift = pipe.scheduler, pipe.scheduler.config
    pipe.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift.shift,
        use_dynamic_shifting=shift.use_dynamic_shifting,
        time_shift_type="exponential",
    )
    try:
        yield pipe
    finally:
        pipe.scheduler = before


@contextlib.contextmanager
def cached(config: Callable[[Any], Any], pipe: Any) -> Iterator[Any]:
    """With one of diffusers' caches."""
    pipe.transformer.enable_cache(config(pipe))
    try:
        yield pipe
    finally:
        pipe.transformer.disable_cache()


@contextlib.contextmanager
def skipping(computed: int, inner: str, pipe: Any) -> Iterator[Any]:
    yield piflux.parallelize(pipe, compute=computed, inner=inner)


def magnitudes(draws: Callable[[Any], Any], pipe: Any) -> list[float]:
    """MagCache's ratios of this model, which its calibration prints, of one picture."""
    printed = io.StringIO()
    calibrating = partial(MagCacheConfig, num_inference_steps=STEPS, calibrate=True)
    with contextlib.redirect_stdout(printed), cached(lambda _: calibrating(), pipe) as ready:
        draws(ready)
    found = re.search(r"^\[(.*)\]$", printed.getvalue().splitlines()[-2])
    assert found is not None, printed.getvalue()
    return [float(x) for x in found.group(1).split(",")]


def methods(inner: str, ratios: Sequence[float]) -> list[Method]:
    """All rows; piflux compiles by `inner`."""
    found = [Method(f"{STEPS} Euler steps", euler)]
    for n in (18, 14, 10):
        name = f"piflux, {n} of {STEPS} steps"
        found.append(Method(name, partial(skipping, n, inner), computed=n))
    found += [Method(f"{n} Euler steps", euler, n) for n in (18, 14, 10)]
    found += [Method(f"{n} steps of second order", second_order, n) for n in (STEPS, 18, 14, 10)]
    for threshold in (0.03, 0.06, 0.1, 0.15, 0.25):
        config = partial(FirstBlockCacheConfig, threshold=threshold)
        prepare = partial(cached, lambda _, config=config: config())
        found.append(Method(f"First Block Cache, {threshold}", prepare, alone=True))
    for interval, order, lite in (
        *((2, 1, False), (3, 1, False)),
        *((2, 1, True), (3, 1, True), (4, 1, True), (2, 2, True)),
    ):
        config = partial(
            TaylorSeerCacheConfig,
            cache_interval=interval,
            disable_cache_before_step=FIRST,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=lite,
        )
        prepare = partial(cached, lambda _, config=config: config())
        what = "the whole" if lite else "attentions"
        found.append(Method(f"TaylorSeer of {what}, every {interval}, order {order}", prepare))
    for threshold, most in ((0.02, 2), (0.06, 3), (0.12, 4), (0.24, 5)):
        config = partial(
            MagCacheConfig,
            threshold=threshold,
            max_skip_steps=most,
            num_inference_steps=STEPS,
            mag_ratios=torch.tensor(ratios),
        )
        prepare = partial(cached, lambda _, config=config: config())
        found.append(Method(f"MagCache, {threshold}, at most {most}", prepare))
    return found


@contextlib.contextmanager
def counted(counts: bool) -> Iterator[Callable[[], int]]:
    """Gives the floating point operations of what ran inside, by the transformer's blocks."""
    with FlopCounterMode(display=False) if counts else contextlib.nullcontext() as counter:
        yield lambda: sum(
            sum(flops.values())
            for name, flops in (counter.get_flop_counts().items() if counter else ())
            if "transformer_blocks" in name and name.count(".") == 2
        )


def lpips(judge: LPIPS, first: Tensor, second: Tensor) -> list[float]:
    pairs = zip(first.split(8), second.split(8), strict=True)
    return torch.cat([judge(a, b) for a, b in pairs]).tolist()


def main(
    prompts: Annotated[Path | None, typer.Option(help="A file, one a line.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use the first so many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt.")] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    only: Annotated[str, typer.Option(help="Rows whose name matches.")] = "",
    out: Annotated[Path, typer.Option(help="A folder.", file_okay=False)] = Path("out/step-caches"),
) -> None:
    """Draw all rows, and write caches.json, caches.md and sheet.png."""
    options.folder(out)
    texts = (list(PROMPTS) if prompts is None else options.prompts(prompts))[:count]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = demo_pipeline().to(device)
    pipe.set_progress_bar_config(disable=True)
    encoded = encode(pipe, texts, max_sequence_length=TEXT_TOKENS, batch=batch)
    seeds = list(range(seed, seed + len(texts)))
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}

    def drawn(ready: Any, steps: int, batch: int, first: int | None = None) -> Tensor:
        some = {name: x[:first] for name, x in encoded.items()}
        return draw(
            ready, some, seeds[:first], batch=batch, num_inference_steps=steps, **size
        ).images

    judge = LPIPS()
    full = drawn(pipe, STEPS, batch)
    with second_order(pipe) as exact:
        solved = drawn(exact, NEARLY_EXACT, batch)
    ratios = magnitudes(lambda ready: drawn(ready, STEPS, 1, 1), pipe)
    rows, pictures, step_flops = [], [], 0.0
    for method in methods("inductor" if device == "cuda" else "eager", ratios):
        if not re.search(only, method.name):
            continue
        at_once = 1 if method.alone else batch
        with method.prepare(pipe) as ready, counted(method.computed is None) as flops:
            images = drawn(ready, method.steps or STEPS, at_once)
        total = flops() / len(texts)
        step_flops = step_flops or total / STEPS
        computed = total / step_flops if method.computed is None else method.computed
        row = Row(method.name, computed, psnr(full, images).tolist(), lpips(judge, full, images))
        row.solved_psnr = psnr(solved, images).tolist()
        row.solved_lpips = lpips(judge, solved, images)
        rows.append(row)
        pictures.append(images)
        print(_line(row), flush=True)
    record = header(program=script()) | {"prompts": texts, "seeds": seeds, "steps": STEPS}
    record["rows"] = [asdict(row) for row in rows]
    (out / "caches.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "caches.md").write_text("\n".join([*HEAD, *map(_line, rows)]) + "\n")
    shown = range(min(4, len(texts)))
    below = [
        [f"{row.psnr[i]:.1f} dB" if row.psnr[i] < 100 else texts[i] for row in rows] for i in shown
    ]
    sheet = [[images[i].permute(1, 2, 0).numpy() for images in pictures] for i in shown]
    titles = [f"{row.name}: {row.computed:.1f} computed" for row in rows]
    contact_sheet(sheet, below, out / "sheet.png", titles)


HEAD = (
    f"| method | steps' worth computed | to {STEPS} steps: PSNR / LPIPS | worst LPIPS "
    f"| to {NEARLY_EXACT} steps: PSNR / LPIPS |",
    "|---|---|---|---|---|",
)


def _line(row: Row) -> str:
    near, far, near_lpips, far_lpips = (
        sum(x) / len(x) for x in (row.psnr, row.solved_psnr, row.lpips, row.solved_lpips)
    )
    return (
        f"| {row.name} | {row.computed:.1f} | {near:.1f} / {near_lpips:.5f} "
        f"| {max(row.lpips):.4f} | {far:.1f} / {far_lpips:.4f} |"
    )


if __name__ == "__main__":
    typer.run(main)
