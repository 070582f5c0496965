"""What came of every transformer class of diffusers, in small: the second half of docs/support.md.

    python tests/support.py                                # of all, in half an hour
    python tests/support.py --write LatteTransformer3DModel

Those that are asked for are run, each in a process of its own; `--write` puts what came of them
into the page, which says of pipelines what comes of their transformers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
HEADING = "## Every transformer class of diffusers"
EXACT = 1e-4
RANKS = (2, 3)
STEPS = 6
TIMEOUT = 600

Outcome = tuple[str, str]
"""'exact', 'refused', 'fails', 'wrong' or 'not tried', and a remark."""


def outcome(name: str) -> Outcome:
    """What comes of a class here.

    As `tests/test_model_zoo.py` judges: `gather`, and `rotate` of an image that stands still, are
    the untouched model's.
    """
    import torch
    from captures import captured_once
    from classes import CLASSES, build, called
    from torch.utils._pytree import tree_leaves

    import piflux
    from piflux.errors import PifluxError

    case = CLASSES[name]
    if case.untried:
        return "not tried", case.untried
    torch.set_num_threads(1)
    model = build(name)

    def samples(module: Any) -> list[torch.Tensor]:
        return [x for x in tree_leaves(called(module, case)) if isinstance(x, torch.Tensor)]

    with torch.no_grad():
        want = samples(model)
    assert all(x.std() > 0.1 for x in want), "what it gives is near constant"

    def distance(got: list[torch.Tensor]) -> float:
        assert [x.shape for x in got] == [x.shape for x in want]
        return max(
            ((x - y).abs().max() / y.std().clamp(min=1)).item()
            for x, y in zip(got, want, strict=True)
        )

    worst, notes = {}, []
    try:
        with captured_once():
            for policy in ("gather", "rotate"):
                for ranks in RANKS:
                    parallel = piflux.parallelize(
                        model, group=piflux.virtual_ranks(ranks), policy=policy, inner="eager"
                    )
                    with piflux.generation(parallel):
                        steps = STEPS if policy == "rotate" else 1
                        errors = [distance(samples(parallel)) for _ in range(steps)]
                    worst[f"{policy} on {ranks}"] = max(errors)
                    report = piflux.explain(parallel)
                    assert sum(graph.attentions for graph in report.graphs)
                    notes = [note for note in report.notes if "no one graph" in note]
                    assert len(report.notes) == len(notes), report.notes
    except PifluxError as error:
        return "refused", told(error)
    except Exception as error:
        return "fails", f"{type(error).__name__}: {first_line(error)}"
    wrong = {where: error for where, error in worst.items() if not error <= EXACT}
    if wrong:
        return "wrong", ", ".join(f"{where}: {error:.1e}" for where, error in wrong.items())
    return "exact", "in fragments" if notes else ""


def told(error: Exception) -> str:
    """The reason for a refusal, and the op."""
    reason = getattr(error, "reason", "") or first_line(error)
    op = f": `{error.op}`" if hasattr(error, "op") else ""
    return f"{reason}{op}"


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def outcome_apart(name: str) -> Outcome:
    """In a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return "fails", f"no answer in {TIMEOUT} s"
    try:
        status, remark = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return "fails", done.stderr.strip().splitlines()[-1]
    return status, remark


def page() -> tuple[str, dict[str, Outcome]]:
    """The page without its second half, and the outcomes that this has."""
    first, _, second = PAGE.read_text().partition(HEADING)
    found: dict[str, Outcome] = {}
    for line in second.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            found[cells[0].strip("`")] = cells[1], cells[2] if len(cells) > 2 else ""
    return first, found


def pipelines() -> dict[str, str]:
    """For each pipeline class of diffusers what it denoises with: a transformer, or something
    else."""
    import diffusers

    found = {}
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name)
        if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
            continue
        if cls is diffusers.DiffusionPipeline:
            continue
        kinds = [kind for given in cls._get_signature_types().values() for kind in given]
        names = sorted({getattr(kind, "__name__", "") for kind in kinds} & transformers())
        unet = any("unet" in key for key in cls._get_signature_types())
        found[name] = names[0] if names else "a UNet" if unet else "neither"
    return found


def transformers() -> set[str]:
    """The transformer classes of diffusers."""
    from diffusers import ModelMixin
    from diffusers.models import transformers as module

    classes = {name: getattr(module, name) for name in dir(module)}
    return {
        name
        for name, cls in classes.items()
        if inspect.isclass(cls) and issubclass(cls, ModelMixin)
    }


def drawn() -> dict[str, list[str]]:
    """For each pipeline class that the table above has, the rows."""
    from pipelines import CASES, Studio

    found: dict[str, list[str]] = {}

    class Noted(Studio):
        def draw(self, pipe: Any, seed: int = 0, **options: Any) -> None:
            rows = found.setdefault(type(pipe).__name__, [])
            if case.name not in rows:
                rows.append(case.name)

    for case in CASES.values():
        case.images(Noted())
    return found


def second_half(found: dict[str, Outcome]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers"))
    counts = {s: [status for status, _ in found.values()].count(s) for s, _ in found.values()}
    lines = [
        HEADING,
        "",
        "Each was built small from a configuration of its own, at depth 3 or more, and called with "
        "all the",
        "inputs that its pipelines give (`tests/classes.py`), by `tests/support.py` on "
        f"{date.today()} with",
        f"{versions}, on 2 and 3 ranks of one process.",
        "",
        "- `exact`: `gather`, and each step of `rotate` of an image that stands still, gave what",
        "  the untouched class gives, to 1e-4 in fp32. In fragments: Dynamo makes several graphs.",
        "- `refused`: it raised one of piflux's own errors, with this reason and op.",
        "",
        f"Of {len(found)} classes: "
        + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        + ".",
        "",
        "| class | result | remark |",
        "|---|---|---|",
    ]
    for name, (status, remark) in sorted(found.items()):
        lines.append(f"| `{name}` | {status} | {remark.replace('|', '/')} |")
    lines += [
        "",
        "## Every pipeline class of diffusers",
        "",
        "A pipeline that stands in the first table was drawn. Of the others its transformer tells: "
        "the",
        "pipeline itself was not tried, for want of a small copy of all its other parts.",
        "",
        "| pipeline | denoises with | result |",
        "|---|---|---|",
    ]
    rows = drawn()
    for name, what in pipelines().items():
        if name in rows:
            result = f"drawn: {len(rows[name])} of the rows above"
        elif what in found:
            status, _ = found[what]
            result = f"not tried; its transformer: {status}"
        else:
            result = "not tried: nothing that it holds is a transformer of diffusers"
        lines.append(f"| `{name}` | {f'`{what}`' if what in found else what} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--one", action="store_true", help="here; print it as JSON")
    parser.add_argument("--write", action="store_true", help="put it into the page")
    args = parser.parse_args()
    if args.one:
        (name,) = args.names
        print(json.dumps(outcome(name)))
        return
    from classes import CLASSES

    first, found = page()
    for name in args.names or CLASSES:
        found[name] = outcome_apart(name)
        print(f"{name:42}", *found[name], flush=True)
    if args.write:
        PAGE.write_text(first + second_half(found))


if __name__ == "__main__":
    main()
