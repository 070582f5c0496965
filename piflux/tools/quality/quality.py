"""`piflux quality`: how far pictures drift from one rank's, as numbers, tables and pictures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from piflux.demo import PROMPTS
from piflux.launch import alone
from piflux.policies.schedule import Schedule
from piflux.tools.image_cost import measured_cost
from piflux.tools.interrupts import importing
from piflux.tools.options import (
    LARGEST_SEED,
    GuidanceOption,
    ModelOption,
    SeedOption,
    beyond,
    check_model,
    check_side,
    check_tokens,
    config_of,
    default_side,
    finite,
    folder,
    folder_of,
    is_hub_id,
    text_tokens,
)
from piflux.tools.options import prompts as prompts_of
from piflux.tools.quality.variants import CANDIDATES, SMALLER, Variant

VARIANTS = (
    "rotate sync_steps=1 order=0",
    "rotate sync_steps=1",
    "rotate order=0",
    "rotate",
    "displaced sync_steps=1 order=0",
    "displaced",
)
"""What is measured where nothing else is asked for."""


def quality(
    model: ModelOption = "demo",
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable: 'rotate sync_steps=0,2 order=0'. Default: several."),
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeatable. Default: 2, 4.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file, one a line.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use the first so many.")] = None,
    seed: SeedOption = 0,
    steps: Annotated[int, typer.Option(min=1)] = 28,
    size: Annotated[
        int | None, typer.Option(help="Pixels a side. Default: 1024; demo: as trained.")
    ] = None,
    guidance: GuidanceOption = None,
    link: Annotated[
        float,
        typer.Option(min=1e-6, callback=finite, help="GB/s a rank sends, for the modelled cost."),
    ] = 25.0,
    bench: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A bench.json, for measured cost instead."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 8,
    out: Annotated[Path, typer.Option(file_okay=False, help="A folder.")] = Path("out/quality"),
    json_: Annotated[bool, typer.Option("--json", help="Print the record, nothing else.")] = False,
    tune_: Annotated[
        bool, typer.Option("--tune", help="Choose a schedule within a budget and save it.")
    ] = False,
    max_lpips: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="--tune: LPIPS to reach.")
    ] = None,
    max_ms: Annotated[
        float | None, typer.Option(min=1e-6, callback=finite, help="--tune: modelled ms a step.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            callback=finite,
            help="--tune: GiB a rank, of the transformer; also tries int4.",
        ),
    ] = None,
) -> None:
    """Measure how far pictures drift from one rank's: PSNR, SSIM, LPIPS, step by step."""
    budgets = [x for x in (max_lpips, max_ms) if x is not None]
    if len(budgets) != tune_ or (memory is not None and not tune_):
        raise typer.BadParameter(
            "--tune goes with one of --max-lpips and --max-ms, and --memory with --tune"
        )
    variants = []
    for text in variant or VARIANTS:
        try:
            variants.append(Variant.parse(text))
        except ValueError as error:
            raise typer.BadParameter(f"--variant {error}") from None
        wrong = beyond(variants[-1].options, steps) if variant else None
        if wrong is not None:
            name, value, said = wrong
            raise typer.BadParameter(f"--variant {text!r}: {name}={value}: {said}")
    rank_counts = ranks or [2, 4]
    smaller = () if memory is None else SMALLER
    candidates = variant or [*CANDIDATES, *smaller]
    asked = [Variant.parse(text) for text in candidates] if tune_ else variants
    timed = None if bench is None else _timed(bench, asked, rank_counts, steps)
    check_model(model)
    side = default_side(model) if size is None else size
    check_side("--size", side, least=64)  # LPIPS sees nothing smaller
    texts = (list(PROMPTS) if prompts is None else prompts_of(prompts))[:count]
    if seed + len(texts) - 1 > LARGEST_SEED:
        raise typer.BadParameter(f"--seed {seed}: the last of {len(texts)} seeds is beyond 64 bits")
    if tune_ and len(texts) < 2:
        raise typer.BadParameter("tuning needs two prompts: one to choose by, one to judge by")
    folder(out)
    with importing():
        import torch

        from piflux.pipelines.arguments import Asked, arguments
        from piflux.pipelines.folders import load, pipeline_class
        from piflux.tools.quality.charts import markdown, plot_drift, plot_frontier, sheet_of
        from piflux.tools.quality.drift import check_pictures, measure, summary
        from piflux.tools.records import header
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # as a rank has; on shared cores more can be ten times slower
    source = str(folder_of(model)) if is_hub_id(model) else model
    kind, call = arguments(pipeline_class(source), Asked(steps, (side, side), guidance))
    check_pictures(kind)
    if config_of(source, "").get("_class_name") == "FluxPipeline":
        check_tokens(max(rank_counts), side, side, text_tokens(model))
    pipe, more = load(source, torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    call |= more

    console = Console(stderr=json_)
    seeds = list(range(seed, seed + len(texts)))
    inner = "inductor" if device == "cuda" else "eager"
    if tune_:
        options = {"link_gbs": link, "bench": timed, "inner": inner, "batch": batch, **call}
        budget = (max_lpips, max_ms, memory)
        _tune(console, pipe, texts, seeds, rank_counts, budget, candidates, out, options)
        return
    drawings = -(-len(texts) // batch) * (1 + len(variants) * len(rank_counts))
    with Progress(console=console) as progress:
        task = progress.add_task("1 rank", total=drawings * steps)
        one, rows, drawn = alone(
            measure,
            pipe,
            texts,
            seeds,
            variants,
            rank_counts,
            link_gbs=link,
            bench=timed,
            inner=inner,
            batch=batch,
            on_step=lambda what: progress.update(task, advance=1, description=what),
            **call,
        )
    record = {
        **header(),
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
    names = ("quality.json", "quality.md", "sheet.png", "drift.png", "frontier.png")
    paths = [out / name for name in names]
    paths[0].write_text(json.dumps(record, indent=2) + "\n")
    paths[1].write_text(markdown(rows))
    sheet_of(texts[:8], one, rows, drawn, paths[2])
    plot_drift(rows, paths[3])
    plot_frontier(rows, paths[4])
    if json_:
        print(json.dumps(record))
        return
    console.print(_table(summary(rows), f"{model}, {steps} steps"))
    console.print(escape(f"Saved {', '.join(map(str, paths))}"))


def _table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """For a terminal.

    Args:
        rows: by `summary`.
        title: what was drawn.
    """
    columns = ("ranks", "variant", "PSNR, dB", "SSIM", "LPIPS", "cost")
    table = Table(*columns, title=escape(f"{title}; cost: of one rank's step"))
    for x in rows:
        table.add_row(
            str(x["ranks"]),
            escape(x["variant"]),
            *(f"{x[k]:.4g}" for k in ("psnr", "ssim", "lpips", "cost")),
        )
    return table


def _tune(
    console: Console,
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    rank_counts: list[int],
    asked: tuple[float | None, float | None, float | None],
    candidates: Sequence[str],
    out: Path,
    options: dict[str, Any],
) -> None:
    """A file of settings for each number of ranks.

    Args:
        asked: LPIPS, milliseconds a step and GiB a rank.
        candidates: to begin with.
    """
    from piflux.tools.quality.drift import Pictures, summary
    from piflux.tools.quality.tuning import Budget, masks_of, tune

    with Progress(*Progress.get_default_columns()[:1], TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("1 rank", total=None)
        options = options | {"on_step": lambda what: bar.update(task, description=what)}
        half = len(prompts) // 2
        try:
            max_lpips, max_ms, memory = asked
            budget = Budget(
                max_lpips,
                None if max_ms is None else max_ms / 1000,
                None if memory is None else memory * 2**30,
            )
            first, second = (
                Pictures(pipe, prompts[part], seeds[part], **options)
                for part in (slice(half), slice(half, None))
            )
            masks = masks_of(first)
            # What took longest, for one who loses patience with the rest.
            (out / "masks.json").write_text(json.dumps(masks, indent=1) + "\n")
            tuned = {n: tune(first, n, budget, masks, candidates) for n in rank_counts}
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        judged = {n: second.row(chosen, n)[0] for n, (chosen, _) in tuned.items()}
    for n, (chosen, rows) in tuned.items():
        path = out / f"schedule-{n}.json"
        path.write_text(json.dumps(chosen.options) + "\n")
        (out / f"tuned-{n}.json").write_text(
            json.dumps([asdict(x) for x in (*rows, judged[n])]) + "\n"
        )
        console.print(_table(summary([judged[n]]), "prompts that it was not chosen by"))
        saved = f"Saved {path}: piflux.parallelize(pipe, policy={str(path)!r})"
        console.print(saved, soft_wrap=True, markup=False, highlight=False)


def _timed(
    bench: Path, variants: Sequence[Variant], rank_counts: Sequence[int], steps: int
) -> dict[str, Any]:
    """The record in `bench`, known to have what every variant's cost needs."""
    try:
        record = json.loads(bench.read_text())
        for n, variant in itertools.product(rank_counts, variants):
            measured_cost(record, Schedule(**variant.options, world_size=n), steps)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--bench {bench}: is no JSON: {error}") from None
    except ValueError as error:
        raise typer.BadParameter(f"--bench {bench}: {error}") from None
    except (KeyError, TypeError):
        raise typer.BadParameter(f"--bench {bench}: not what piflux bench writes") from None
    return record
