"""The tables of several models, of times (docs/speed.md) and memory (docs/memory.md), as Markdown.

    for model in flux.1 flux.2 flux.3 qwen-image z-image wan; do
        piflux bench --model $model --out out/$model --row compiled-blocks \
            --row diffusers-ulysses --row gather --row rotate --steps 10 --images 1
    done
    python benchmarks/models_table.py out/*/bench.json

Times are medians of all timed steps, in milliseconds; a ratio is to compiled blocks on one GPU. The
sync steps are the first timed image's. The first image is compiled in its course. Rows of one model
and size may be in several files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from piflux.policies.schedule import Schedule

ALONE, ROWS = "compiled-blocks", ("diffusers-ulysses", "gather", "rotate")


def tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Two tables, from what `piflux bench` wrote for each model."""
    times = [
        f"| model, size | {' | '.join((ALONE, *ROWS))} | sync steps of `rotate` "
        "| first image, s: `gather`, then `rotate` |",
        "|---" * (4 + len(ROWS)) + "|",
    ]
    memory = [f"| model, size | {' | '.join((ALONE, *ROWS))} |", "|---" * (2 + len(ROWS)) + "|"]
    for record, rows in _by_model(records):
        name = f"{record['model']}, {record['width']} x {record['height']}"
        cells = [_time(rows, row) for row in (ALONE, *ROWS)]
        times.append(f"| {' | '.join([name, *cells, _syncs(record, rows), _first(rows)])} |")
        cells = [_peak(rows.get(row)) for row in (ALONE, *ROWS)]
        memory.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*times, "", *memory]) + "\n"


def _by_model(
    records: Sequence[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The first record of each model and size, with the rows of all of its records by name."""
    found: dict[Any, tuple[Mapping[str, Any], dict[str, Any]]] = {}
    for record in records:
        what = tuple(record[key] for key in ("model", "width", "height", "steps"))
        _, rows = found.setdefault(what, (record, {}))
        rows |= {row["row"]: row for row in record["rows"] if row["error"] is None}
    return list(found.values())


def _time(rows: Mapping[str, Any], name: str) -> str:
    if name not in rows:
        return "fails"
    median = statistics.median(rows[name]["step_ms"])
    if name == ALONE or ALONE not in rows:
        return f"{median:.1f}"
    return f"{median:.1f} ({statistics.median(rows[ALONE]['step_ms']) / median:.2f}x)"


def _syncs(record: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    if "rotate" not in rows:
        return ""
    syncs = Schedule("rotate", world_size=rows["rotate"]["ranks"]).first_syncs
    times = rows["rotate"]["step_ms"][: record["steps"]]
    return ", ".join(f"{times[i]:.0f}" for i in syncs if i < len(times))


def _first(rows: Mapping[str, Any]) -> str:
    return ", ".join(f"{rows[x]['image_s'][0]:.1f}" for x in ("gather", "rotate") if x in rows)


def _peak(row: Mapping[str, Any] | None) -> str:
    peak = None if row is None else row["peak_memory_gib"]
    return "" if peak is None else f"{peak:.1f}"


def main(
    records: Annotated[list[Path], typer.Argument(help="bench.json of each model.")],
) -> None:
    print(tables([json.loads(path.read_text()) for path in records]), end="")


if __name__ == "__main__":
    typer.run(main)
