"""`python -m piflux.quality`: how far pictures drift, by policy, ranks and schedule.

Ranks are virtual ones in this process: the same graphs, the same pictures, no second device. Every
variant draws the same prompts from the same noise as one rank does, and is compared picture by
picture.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skimage.metrics import structural_similarity
from torch import Tensor

import piflux
from piflux.cost import Cost, measured_cost, modelled_cost
from piflux.demo import PROMPTS
from piflux.generate import load
from piflux.lpips import LPIPS
from piflux.options import ModelOption, check_model, check_side, default_side, setting
from piflux.options import prompts as prompts_of
from piflux.schedule import Schedule

VARIANTS = (
    "rotate sync_steps=1 order=0",
    "rotate sync_steps=1",
    "rotate order=0",
    "rotate",
    "displaced sync_steps=1 order=0",
    "displaced",
)
"""What is measured where nothing else is asked for."""

CANDIDATES = tuple(
    f"{policy} sync_steps={steps}"
    for policy in ("rotate", "displaced")
    for steps in ("1", "0,2", "0,3", "0,2,5", "3", "0,1,3,7", "6")
)
"""What tuning chooses from."""

BEST_DB = 100.0
"""PSNR of equal pictures, which has no finite value."""


@dataclass(frozen=True)
class Variant:
    """Settings of `parallelize` by the words that name them: 'rotate sync_steps=0,3 order=0'."""

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A policy, then `setting=value`; several values are separated by commas.

        Raises:
            ValueError: an unknown policy or setting, or a value out of range.
        """
        policy, *words = text.split() or [""]
        options: dict[str, Any] = {"policy": policy}
        known = set(inspect.signature(piflux.parallelize).parameters) - {
            "target",
            "group",
            "policy",
            "inner",
        }
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in known:
                raise ValueError(
                    f"{text!r}: {word!r} is no setting; write setting=value with one of "
                    f"{', '.join(sorted(known))}"
                )
            options[name] = setting(value)
        try:
            Schedule(**options)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        return cls(" ".join([policy, *words]), options)


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
    for start in range(0, len(seeds), batch):
        some = seeds[start : start + batch]
        states: list[Tensor] = []
        clock = [time.perf_counter()]

        def keep(_: Any, step: int, at: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            states.append(tensors["latents"].float().cpu())  # noqa: B023 (called in this round)
            clock.append(time.perf_counter())  # noqa: B023
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
        times += [(b - a) / len(some) for a, b in itertools.pairwise(clock)]
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
        bench: what `piflux.bench` wrote, for measured cost instead.
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


def compare(name: str, ranks: int, one: Drawn, other: Drawn, judge: LPIPS, cost: Cost) -> Row:
    """`other`'s pictures against `one`'s, each against its own."""
    error = (one.images - other.images).square().flatten(1).mean(dim=1)
    psnr = (-10 * error.log10()).clamp(max=BEST_DB)
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
    return Row(name, ranks, psnr.tolist(), ssim, lpips.tolist(), drift, cost)


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
        raise ValueError(f"no schedule is within the budget; what there is:\n{markdown(rows)}")
    chosen = variants[rows.index(best)]
    _, (judged,), _ = measure(pipe, prompts[half:], seeds[half:], [chosen], [ranks], **options)
    return chosen, rows, judged


# --- what is written -------------------------------------------------------------------------


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


def markdown(rows: Sequence[Row]) -> str:
    """A line a row; the cost is a share of one rank's step: of a sync step, of others, mean."""
    lines = [
        "| ranks | variant | PSNR, dB: mean | median | worst | gained | SSIM | LPIPS "
        "| cost: sync | steady | mean |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, x in zip(rows, summary(rows), strict=True):
        error = "" if x["gain_db_error"] is None else f" ± {x['gain_db_error']:.2f}"
        gained = "" if x["gain_over"] == row.variant else f"{x['gain_db']:+.2f}{error}"
        sync, steady = row.cost.sync_s / row.cost.one_s, row.cost.steady_s / row.cost.one_s
        lines.append(
            f"| {row.ranks} | {row.variant} | {x['psnr']:.2f} | {x['median_psnr']:.2f} "
            f"| {x['worst_psnr']:.2f} | {gained} | {x['ssim']:.4f} | {x['lpips']:.4f} "
            f"| {sync:.3f} | {steady:.3f} | {x['cost']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def contact_sheet(
    prompts: Sequence[str], one: Drawn, rows: Sequence[Row], drawn: Sequence[Drawn]
) -> Image.Image:
    """A row a prompt, a column a variant, the first one rank's; under each picture its PSNR."""
    side, label = 160, 34
    font = ImageFont.load_default(size=11)
    columns = [("one rank", one, None)]
    columns += [(f"{r.variant}\n{r.ranks} ranks", d, r) for r, d in zip(rows, drawn, strict=True)]  # type: ignore[misc]
    sheet = Image.new("RGB", (side * len(columns), label + (side + label) * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, pictures, row) in enumerate(columns):
        pen.text((column * side + 2, 2), name, "black", font)
        for index, prompt in enumerate(prompts):
            left, top = column * side, label + index * (side + label)
            array = (pictures.images[index] * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(array).resize((side - 4, side - 4)), (left + 2, top))
            text = prompt.replace(", ", "\n", 1) if row is None else f"{row.psnr[index]:.1f} dB"
            pen.text((left + 2, top + side - 2), text, "black", font)
    return sheet


def plot_drift(rows: Sequence[Row], path: Path) -> None:
    """The latents' relative distance over the steps, a panel for each number of ranks."""
    plt = _pyplot()
    counts, colours = sorted({row.ranks for row in rows}), _colours(rows)
    figure, panels = plt.subplots(
        1,
        len(counts),
        figsize=(1 + 5 * len(counts), 4.5),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, n in zip(panels[0], counts, strict=True):
        for row in rows:
            if row.ranks == n:
                steps = range(1, len(row.drift) + 1)
                axes.plot(steps, row.drift, color=colours[row.variant], label=row.variant)
        axes.set_yscale("symlog", linthresh=1e-3)  # exact steps are at 0
        axes.set(xlabel="step", title=f"{n} ranks")
        axes.legend(fontsize=8)
    # Of all panels at once, when every line is drawn.
    panels[0][0].set(ylabel="distance of latents / their norm", ylim=(0, None))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """LPIPS against the cost, a share of one rank's step; colours are variants, marks are ranks."""
    plt = _pyplot()
    counts, colours = sorted({row.ranks for row in rows}), _colours(rows)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for x in summary(rows):
        place = counts.index(x["ranks"])
        axes.plot(
            x["cost"],
            max(x["lpips"], 1e-6),
            linestyle="",
            marker="osD^vP*X"[place % 8],
            color=colours[x["variant"]],
            label=f"{x['variant']}, {x['ranks']} ranks",
        )
    axes.set(xlabel="a step's time over one rank's", ylabel="LPIPS to one rank", yscale="log")
    axes.margins(x=0.1)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """One for each variant, the same on any number of ranks."""
    palette = _pyplot().get_cmap("tab20").colors
    variants = dict.fromkeys(row.variant for row in rows)
    return {name: palette[i % len(palette)] for i, name in enumerate(variants)}


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# --- the command -----------------------------------------------------------------------------


def quality(
    model: ModelOption = "demo",
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable: 'rotate sync_steps=0,3 order=0'. Default: several."),
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(min=2, help="Repeatable. Default: 2, 4.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file, one a line.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use the first so many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next has the next.")] = 0,
    steps: Annotated[int, typer.Option(min=1)] = 28,
    size: Annotated[
        int | None, typer.Option(help="Pixels a side. Default: 1024; demo: as trained.")
    ] = None,
    guidance: Annotated[float, typer.Option()] = 3.5,
    link: Annotated[float, typer.Option(help="GB/s a rank sends, for the modelled cost.")] = 25.0,
    bench: Annotated[
        Path | None, typer.Option(help="A bench.json, for measured cost instead.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    out: Annotated[Path, typer.Option(help="A folder for what is written.")] = Path("out/quality"),
    json_: Annotated[bool, typer.Option("--json", help="Print the record, nothing else.")] = False,
    tune_: Annotated[
        bool, typer.Option("--tune", help="Choose a schedule within a budget and save it.")
    ] = False,
    max_lpips: Annotated[float | None, typer.Option(help="--tune: LPIPS to reach.")] = None,
    max_ms: Annotated[float | None, typer.Option(help="--tune: modelled ms a step.")] = None,
) -> None:
    """Measure how far pictures drift from one rank's: PSNR, SSIM, LPIPS, step by step."""
    if tune_ == (max_lpips is None and max_ms is None) or (tune_ and variant):
        raise typer.BadParameter("--tune goes with --max-lpips or --max-ms, and without --variant")
    variants = []
    for text in variant or VARIANTS:
        try:
            variants.append(Variant.parse(text))
        except ValueError as error:
            raise typer.BadParameter(f"--variant {error}") from None
    rank_counts = ranks or [2, 4]
    timed = None if bench is None else _timed(bench, variants, rank_counts, steps)
    check_model(model)
    side = default_side(model) if size is None else size
    check_side("--size", side, least=64)  # LPIPS sees nothing smaller
    texts = (list(PROMPTS) if prompts is None else prompts_of(prompts))[:count]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # as a rank has; on shared cores more can be ten times slower
    pipe, call = load(model, torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    call |= {"num_inference_steps": steps, "height": side, "width": side}
    call["guidance_scale"] = guidance

    console = Console(stderr=json_)
    seeds = list(range(seed, seed + len(texts)))
    inner = "inductor" if device == "cuda" else "eager"
    if tune_:
        options = {"link_gbs": link, "bench": timed, "inner": inner, "batch": batch, **call}
        _tune(console, pipe, texts, seeds, rank_counts, max_lpips, max_ms, out, options)
        return
    rounds = -(-len(texts) // batch) * (1 + len(variants) * len(rank_counts))
    with Progress(console=console) as progress:
        task = progress.add_task("1 rank", total=rounds)
        one, rows, drawn = measure(
            pipe,
            texts,
            seeds,
            variants,
            rank_counts,
            link_gbs=link,
            bench=timed,
            inner=inner,
            batch=batch,
            on_batch=lambda what: progress.update(task, advance=1, description=what),
            **call,
        )
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "piflux.quality", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread",
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
        },
        "model": model,
        "steps": steps,
        "size": side,
        "guidance": guidance,
        "link_gbs": None if bench else link,
        "bench": timed and {key: timed[key] for key in ("date", "hardware", "link")},
        "one_rank_step_s": one.step_s,
        "prompts": texts,
        "seeds": seeds,
        "summary": summary(rows),
        "rows": [asdict(row) for row in rows],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "quality.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "quality.md").write_text(markdown(rows))
    contact_sheet(texts[:8], one, rows, drawn).save(out / "sheet.png")
    plot_drift(rows, out / "drift.png")
    plot_frontier(rows, out / "frontier.png")
    if json_:
        print(json.dumps(record))
        return
    columns = ("ranks", "variant", "PSNR, dB", "SSIM", "LPIPS", "cost")
    table = Table(*columns, title=f"{model}, {steps} steps; cost: of one rank's step")
    for x in summary(rows):
        table.add_row(
            str(x["ranks"]),
            x["variant"],
            *(f"{x[k]:.4g}" for k in ("psnr", "ssim", "lpips", "cost")),
        )
    console.print(table)
    console.print(f"Saved {', '.join(str(path) for path in sorted(out.iterdir()))}")


def _tune(
    console: Console,
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    rank_counts: list[int],
    max_lpips: float | None,
    max_ms: float | None,
    out: Path,
    options: dict[str, Any],
) -> None:
    """A file of settings for each number of ranks."""
    out.mkdir(parents=True, exist_ok=True)
    for n in rank_counts:
        halves = -(-(len(prompts) // 2) // options["batch"])
        with Progress(console=console) as progress:
            task = progress.add_task("1 rank", total=(1 + len(CANDIDATES)) * halves + 2)
            try:
                chosen, _, judged = tune(
                    pipe,
                    prompts,
                    seeds,
                    n,
                    max_lpips=max_lpips,
                    max_cost_s=None if max_ms is None else max_ms / 1000,
                    on_batch=lambda what: progress.update(task, advance=1, description=what),  # noqa: B023
                    **options,
                )
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        path = out / f"schedule-{n}.json"
        path.write_text(json.dumps(chosen.options) + "\n")
        console.print(f"{n} ranks: {chosen.name}; on prompts that it was not chosen by:")
        console.print(markdown([judged]), highlight=False)
        console.print(f"Saved {path}: piflux.parallelize(pipe, policy={str(path)!r})")


def _timed(
    bench: Path, variants: Sequence[Variant], rank_counts: Sequence[int], steps: int
) -> dict[str, Any]:
    """The record in `bench`, known to have what every variant's cost needs."""
    if not bench.is_file():
        raise typer.BadParameter(f"--bench {bench}: no such file")
    try:
        record = json.loads(bench.read_text())
        for n, variant in itertools.product(rank_counts, variants):
            measured_cost(record, Schedule(**variant.options, world_size=n), steps)
    except ValueError as error:
        raise typer.BadParameter(f"--bench {bench}: {error}") from None
    except (KeyError, TypeError):
        raise typer.BadParameter(f"--bench {bench}: not what piflux.bench writes") from None
    return record


if __name__ == "__main__":
    typer.run(quality)
