"""Real diffusers pipelines over several ranks, and the table of what is supported.

The first half of `docs/support.md` says for each pipeline of `pipelines.CASES` what came of it
here, and a row that says anything else fails. `python tests/test_pipelines.py --write` writes it
anew.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from pipelines import CASES, Case, Drawn, drawn_on, plainly
from ranks import Failure, Ranks, virtual
from support import PAGE as TABLE
from support import page

from piflux.errors import PifluxError

EXACT = 1e-4
UNLIKE = 0.2  # mean difference of pixels; that of two independent noise pictures is 1/3

HEAD = """\
# What is supported

Each row is a pipeline of diffusers, built tiny with random weights and run through its own
`__call__` by `tests/test_pipelines.py`, which fails if a row says anything else than what it found.
Its ranks share one process, or are processes where the row says so; only those decode in bands.
`python tests/test_pipelines.py --write` writes this first table.

- `gather`: how far any pixel or latent is from the untouched pipeline's on one rank, in fp32, with
  pixels between 0 and 1 and latents of unit size.
- `rotate`: `runs` says four things: its schedule ran, sync steps and others; its first step was
  exact; all ranks drew the same; and no step but an image's first compiled a graph, or how many
  did.
- `refused`: it raised one of piflux's own errors. `fails`: it raised another. The remark has its
  message.

Around the transformer:

- The autoencoder's decoder works in bands of rows, one a rank, if it is made of convolutions, group
  norms and attention over two dimensions, as FLUX's is. That decoder takes 10.5 TFLOP at 1024 x
  1024 and 48.5 at 2048 x 2048; a step of FLUX.1-dev's transformer at 1024 x 1024 takes 74. Videos,
  tiles, and latents that only some ranks decode are decoded whole on every rank that wants them.
- Text encoders run on every rank. Running them once would save no time: the other ranks would wait
  as long as the first takes, and then for its embeddings.
"""


@dataclass(frozen=True)
class Row:
    """What was found, or what the table says."""

    ranks: str
    gather: str
    rotate: str
    remark: str

    def statuses(self) -> tuple[str, ...]:
        """Errors aside, which differ from machine to machine."""
        exact = re.fullmatch(r"0|≤ 1e-\d+", self.gather)
        return (self.ranks, "exact" if exact else self.gather, self.rotate, self.remark)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def table() -> dict[str, Row]:
    """The table in the repository; what follows it is `support.py`'s."""
    first, _ = page()
    lines = [line for line in first.splitlines() if line.startswith("|")]
    rows = [cells(line) for line in lines[2:]]
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: Row(*row) for name, *row in rows}


def written(rows: dict[str, Row]) -> str:
    """The first half of the page."""
    lines = ["| pipeline | ranks | `gather` | `rotate` | remark |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.ranks} | {row.gather} | {row.rotate} | {row.remark} |")
    return HEAD + "\n" + "\n".join(lines) + "\n\n"


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert got.isfinite().all()
    return (got - want).abs().max().item()


def error_of(images: list[Drawn], wanted: list[Drawn]) -> float:
    """The greatest over all images, their pixels and their latents at every step."""
    assert len(images) == len(wanted)
    return max(
        distance(x, y)
        for image, want in zip(images, wanted, strict=True)
        for x, y in zip([image.pixels, *image.latents], [want.pixels, *want.latents], strict=True)
    )


def assert_rotated(
    images: list[Drawn], wanted: list[Drawn], first: list[Drawn], allowed: int
) -> None:
    """`first` is what the first rank drew; `allowed` graphs are compiled after a first step."""
    assert error_of(images, first) == 0
    for image, want in zip(images, wanted, strict=True):
        assert len(image.latents) == len(want.latents) > 2
        assert distance(image.latents[0], want.latents[0]) <= EXACT
        # Steps that remember are seen to: exact ones would have gathered.
        assert distance(image.latents[-1], want.latents[-1]) > EXACT
        assert (image.pixels - want.pixels).abs().mean() < UNLIKE
    late = [image.graphs[-1] - image.graphs[0] for image in images]
    assert sum(late) == allowed, f"graphs compiled by each step's end: {[x.graphs for x in images]}"


Run = Callable[..., list[Any]]
"""The fixture `virtual`, or `ranks`."""


def found(run: Run, case: Case) -> Row:
    """Runs a case and judges it."""
    wanted = plainly(case.name)
    for one, other in pairwise(wanted):
        assert one.pixels.shape != other.pixels.shape or distance(one.pixels, other.pixels) > 1e-3
    errors, statuses = [], set()
    for n in case.ranks:
        results = run(n, drawn_on, case.name)
        failures = [x for result in results for x in result.values() if isinstance(x, Failure)]
        if failures:
            assert len(failures) == 2 * len(results), failures
            assert case.error and all(case.error in f.message for f in failures), failures
            statuses |= {"refused" if f.isa(PifluxError) else "fails" for f in failures}
            continue
        assert not case.error, "it is drawn, against what its case says"
        assert all(result["gather"][0].graphs[0] > 0 for result in results)
        errors += [error_of(result["gather"], wanted) for result in results]
        assert max(errors) <= EXACT
        for result in results:
            assert_rotated(result["rotate"], wanted, results[0]["rotate"], case.late)
        statuses.add(f"runs, {case.late} compiled late" if case.late else "runs")
    (status,) = statuses
    remark = "; ".join(filter(None, [f"`{case.error}`" if case.error else "", case.remark]))
    count = ", ".join(map(str, case.ranks)) + (" processes" if case.processes else "")
    return Row(count, bound(errors) if errors else status, status, remark)


def bound(errors: list[float]) -> str:
    """The power of ten that no error is above."""
    worst = max(errors)
    return f"≤ 1e{math.ceil(math.log10(worst)):d}" if worst else "0"


@cache
def rows() -> dict[str, Row]:
    return table()


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_does_what_the_table_says(request, name):
    case = CASES[name]
    row = found(request.getfixturevalue("ranks" if case.processes else "virtual"), case)
    assert name in rows(), "write the table: python tests/test_pipelines.py --write"
    assert rows()[name].statuses() == row.statuses()


def test_the_table_has_no_row_that_no_test_ran():
    assert list(rows()) == list(CASES)
    first, _ = page()
    assert first == written(rows())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help=f"write {TABLE.name}")
    parser.parse_args()
    torch.set_num_threads(1)
    pools = Ranks()
    try:
        rows = {
            name: found(pools if case.processes else virtual, case) for name, case in CASES.items()
        }
        first, _ = page()
        TABLE.write_text(TABLE.read_text().replace(first, written(rows)))
    finally:
        pools.close()
