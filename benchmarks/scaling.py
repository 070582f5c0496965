"""What an image takes on several GPUs of one host, by a model made of measured parts. Runs no step.

Measured on one GPU: a rank's step without any link and a sync step (`steps.py`), and one rank's
step (`piflux bench`). Counted in the captured graph: arithmetic, bytes and all-gathers
(`piflux.cost.cost`). Given: what a link does (LINKS). A step is the sum of

    arithmetic  matrix products and attention at the rates that `steps.py` measured
    rest        what else a rank's measured step takes: norms, pointwise ops, products that are
                slower because they are small, gaps between kernels
    memory      keys and values moved about in memory: prediction, filling caches, joining parts
                where they don't arrive in their places
    wait        for keys and values, beyond what is computed while they travel
    final       the gather of the prediction
    host        what the host needs beyond all of this to issue the step, if it is not recorded

docs/measuring.md lists what is assumed. The rows are those of `piflux bench`, which checks them.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from piflux.cost.cost import Layer, Rates
from piflux.policies.schedule import Schedule
from piflux.tools import options
from piflux.tools.bench.models import FLUX_DEV
from piflux.tools.image_cost import Cost
from piflux.tools.preview import Preview, preview
from piflux.tools.records import header, script

RESULTS = Path(__file__).parent / "results"
TEXT_TOKENS = 512
"""Of a prompt, in `piflux.tools.bench.models.build`."""

ROWS: dict[str, dict[str, Any]] = {
    "gather": {"policy": "gather"},
    "rotate": {"policy": "rotate"},
    "rotate-recompute": {"policy": "rotate", "sync": "recompute"},
    "displaced": {"policy": "displaced"},
}
"""As `piflux.tools.bench.ways.WAYS` names them."""

VARIANT = "rotate"
"""The row of steps.json whose steps are taken: `rotate` with its defaults."""

OTHER = ("piflux-1-fp8", "piflux-1-18")
"""Rows of one rank that compute something else."""

EXCHANGE = "_exchange"
"""The kernel that predicts (`piflux.kernels`): it moves 3 numbers for each that is held."""

HOST_MS = 40.43
"""One rank's step, issued kernel by kernel, on one H200 (2026-11-24, torch 2.11): 'host ms of
issuing one step' in `results/2026-11-24-steps-h200.json`."""

WIDTH = 130
"""Columns that the tables need: no number is cut short on a narrow terminal."""


# --- links ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """How an all-gather's time depends on its ranks and bytes.

    Attributes:
        gbs: GB/s that a rank sends while all gather, on any number of ranks.
        latency_s: of an all-gather of two ranks.
        hop_s: that each further rank adds.
        direct: whether keys and values go by copy engines, into memory that attention reads; else
            they are joined in memory after they have arrived.
    """

    gbs: float
    latency_s: float
    hop_s: float
    direct: bool = False

    @classmethod
    def parse(cls, text: str) -> tuple[str, Link]:
        """'nvlink' or another of LINKS, or 'name:GB/s:us:us', latency and what a rank adds.

        Raises:
            ValueError: neither.
        """
        name, *numbers = text.split(":")
        if not numbers and name in LINKS:
            return name, LINKS[name]
        try:
            gbs, latency, hop = (float(number) for number in numbers)
        except ValueError:
            gbs = math.nan
        if not (0 < gbs < math.inf and 0 <= latency < math.inf and 0 <= hop < math.inf):
            raise ValueError(f"{text!r}: choose from {', '.join(LINKS)}, or write name:GB/s:us:us")
        return name, cls(gbs, latency / 1e6, hop / 1e6)

    def rates(self, ranks: int, linear_tflops: float, attention_tflops: float) -> Rates:
        latency = self.latency_s + (ranks - 2) * self.hop_s
        return Rates(linear_tflops, attention_tflops, self.gbs, latency)


# Measured on two H200 of one host, torch 2.11, CUDA 13, FLUX.1-dev's size at 1024 x 1024, before
# this program was written; neither date nor command were kept.
_LAYER = 2 * 2304 * 3072 * 2  # bytes: a layer's keys and values of half of the tokens
_FINAL = 2048 * 64 * 2  # bytes: half of the prediction
_LAYER_S, _FINAL_S = 0.137e-3, 0.03e-3  # gathering them over NVLink
_LAYER_NO_P2P_S = 1.15e-3  # without peer access
_ULYSSES_S, _ULYSSES_SOCKETS_S = 83.4e-3, 724e-3  # a step of diffusers' Ulysses; 57 layers, which
# each send as many bytes as _LAYER: half of the local queries, keys, values and outputs.

_NVLINK_GBS = (_LAYER - _FINAL) / (_LAYER_S - _FINAL_S) / 1e9
_LATENCY_S = _FINAL_S - _FINAL / _NVLINK_GBS / 1e9

LINKS = {
    "nvlink": Link(_NVLINK_GBS, _LATENCY_S, 3.4e-6, direct=True),
    "no-p2p": Link(_LAYER / (_LAYER_NO_P2P_S - _LATENCY_S) / 1e9, _LATENCY_S, 5.7e-6),
    "sockets": Link(
        57 * _LAYER / (_ULYSSES_SOCKETS_S - _ULYSSES_S + 57 * _LAYER_S) / 1e9, _LATENCY_S, 14e-6
    ),
}
"""By the names of `piflux bench --link`. NVLink's two numbers follow from its two measured gathers;
the others' latency is NVLink's, an assumption. What a further rank adds is a step of NCCL's ring as
NCCL's own model has it (src/graph/tuning.cc, hwLat, Simple: NVLink, PCI, network)."""


# --- what was measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One GPU's times; seconds.

    Attributes:
        tokens: text and image, of the model that was timed.
        linear_tflops: rate of a large matrix product; likewise `attention_tflops`.
        one_s: a step of one rank.
        step_s: by ranks, a rank's steady step of `rotate`.
        exchange_s: by ranks, how much of it is prediction.
        fill_s: what a sync step takes to fill one rank's caches.
    """

    tokens: int
    linear_tflops: float
    attention_tflops: float
    one_s: float
    step_s: Mapping[int, float]
    exchange_s: Mapping[int, float]
    fill_s: float

    @classmethod
    def of(cls, steps: Any, bench: Any) -> Measured:
        """From the records of `steps.py` and of `piflux bench`, as their JSON has them.

        A sync step of virtual ranks is computed once and fills each rank's caches, so what it takes
        grows by `fill_s` with each rank: the slope of least squares.

        Raises:
            ValueError: they do not hold what is needed, or not of one machine and size.
        """
        timed, alone = _rows(steps, "steps.json"), _rows(bench, "bench.json")
        size = _number(steps, "steps.json", "size")
        if _card(bench) != _card(steps):
            raise ValueError(
                f"steps.json is of {steps.get('hardware')!r}, bench.json of "
                f"{bench.get('hardware')!r}: times of two machines can't be compared"
            )
        if (bench.get("width"), bench.get("height")) != (size, size):
            raise ValueError(f"steps.json is of {size} x {size} pixels, bench.json is not")
        medians = [
            statistics.median(row["step_ms"]) / 1000
            for row in alone
            if row.get("ranks") == 1 and row.get("step_ms") and row.get("row") not in OTHER
        ]
        if not medians:
            raise ValueError("bench.json has no row of one rank")
        rows = {row.get("ranks"): row for row in timed if row.get("variant") == VARIANT}
        if len(rows) < 2:
            raise ValueError(
                f"steps.json has {len(rows)} rows of {VARIANT!r}, and two numbers of ranks are the "
                "least: run steps.py --ranks 2 --ranks 4 --ranks 8 --variant rotate"
            )
        step, exchange, sync = {}, {}, {}
        for row in rows.values():
            ranks = int(_number(row, "steps.json", "ranks"))
            where = f"steps.json, {ranks} ranks"
            step[ranks] = _number(row, where, "step_ms") / 1000
            sync[ranks] = _number(row, where, "sync_ms") / 1000
            kernels = row.get("longest") or []
            exchange[ranks] = sum(ms for name, _, ms in kernels if name == EXCHANGE) / 1000
            if not 0 < exchange[ranks] < step[ranks]:
                raise ValueError(
                    f"{where}: the kernel {EXCHANGE} takes {1000 * exchange[ranks]:.3g} ms of a "
                    f"step of {1000 * step[ranks]:.3g} ms; only on a GPU are kernels timed"
                )
        fill_s = statistics.linear_regression(list(sync), list(sync.values())).slope
        if fill_s <= 0:
            raise ValueError("steps.json: a sync step that fills more caches takes no longer")
        floor = steps.get("floor") or {}
        return cls(
            int(size) ** 2 // 256 + TEXT_TOKENS,
            _number(floor, "steps.json, floor", "linear_tflops"),
            _number(floor, "steps.json, floor", "attention_tflops"),
            min(medians),
            step,
            exchange,
            fill_s,
        )


def _card(record: Any) -> str:
    """The GPU's name, of one or of several alike."""
    return str(record.get("hardware")).split(" x ")[-1]


def _rows(record: Any, where: str) -> list[dict[str, Any]]:
    rows = record.get("rows") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where} is no record of a benchmark: it has no rows")
    return rows


def _number(record: Any, where: str, name: str) -> float:
    found = record.get(name)
    if not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ValueError(f"{where}: {name} is {found!r}, not a number above 0")
    return found


# --- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is done in a step at one size, counted in the captured graph.

    Attributes:
        ranks: into how many parts it is cut.
        tokens: text and image.
        part: what one of the ranks does, layer by layer.
        whole: what one rank alone does.
        final_bytes: what a rank sends of the prediction.
    """

    ranks: int
    tokens: int
    part: Sequence[Layer]
    whole: Sequence[Layer]
    final_bytes: int

    @classmethod
    def of(cls, foreseen: Preview, tokens: int) -> Work:
        """Of a preview of `rotate`, whose steady steps send the prediction and nothing else."""
        report = foreseen.report
        assert report.schedule.policy == "rotate"
        ranks = report.schedule.world_size
        return cls(ranks, tokens, foreseen.layers, foreseen.whole, report.steady_bytes)

    @property
    def held_bytes(self) -> float:
        """All keys and values, once."""
        return sum(layer.kv_bytes for layer in self.part) * self.ranks / (self.ranks - 1)


@dataclass(frozen=True)
class Step:
    """A step's terms, see the head of this file; seconds."""

    arithmetic_s: float
    rest_s: float
    memory_s: float = 0.0
    wait_s: float = 0.0
    final_s: float = 0.0
    host_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(getattr(self, term.name) for term in fields(self))


@dataclass(frozen=True)
class Image:
    """What the model says of an image.

    Attributes:
        steady: a step that is no sync step; of `gather`, which has none, a sync step.
        sync: a sync step.
        cost: both, and the mean.
        image_s: seconds of all steps: embeddings given, latents out.
        faster: one rank's time over it.
        sync_share: of its time, the sync steps'.
    """

    steady: Step
    sync: Step
    cost: Cost
    image_s: float
    faster: float
    sync_share: float


class Model:
    """The times of steps.

    Args:
        measured: at one size, on one GPU.
        counted: the work at that size, for each number of ranks that was measured.
        host_s: until a step is issued kernel by kernel.

    Raises:
        ValueError: a measured step takes less than its arithmetic at the measured rates.
    """

    def __init__(self, measured: Measured, counted: Mapping[int, Work], host_s: float) -> None:
        self._measured = measured
        self._host_s = host_s
        self._moved: dict[int, float] = {}  # bytes a second, by ranks
        rates = Rates(measured.linear_tflops, measured.attention_tflops, math.inf)
        whole = next(iter(counted.values())).whole
        points = [(float(measured.tokens), measured.one_s - _arithmetic_s(whole, rates))]
        for ranks, work in counted.items():
            exchange_s = measured.exchange_s[ranks]
            self._moved[ranks] = 3 * work.held_bytes / exchange_s
            rest = measured.step_s[ranks] - exchange_s - _arithmetic_s(work.part, rates)
            points.append((measured.tokens / ranks, rest))
        self._rest = sorted(points)
        for tokens, rest in self._rest:
            if rest < 0:
                raise ValueError(
                    f"a step of {tokens:g} tokens takes {-1000 * rest:.3g} ms less than its "
                    f"arithmetic at {rates.linear_tflops:.4g} and {rates.attention_tflops:.4g} "
                    "TFLOP/s: the rates and the steps can't be of one machine"
                )

    def rest_s(self, tokens: float) -> float:
        """Of a rank that computes so many tokens: on lines through what was measured, below the
        least of it as there, beyond the most in proportion."""
        (least, least_s), *_, (most, most_s) = self._rest
        if tokens <= least:
            return least_s
        if tokens >= most:
            return most_s * tokens / most
        pairs = itertools.pairwise(self._rest)
        (a, a_s), (b, b_s) = next(pair for pair in pairs if tokens <= pair[1][0])
        return a_s + (b_s - a_s) * (tokens - a) / (b - a)

    def one_s(self, work: Work) -> float:
        """A step of one rank."""
        m = self._measured
        rates = Rates(m.linear_tflops, m.attention_tflops, math.inf)
        return _arithmetic_s(work.whole, rates) + self.rest_s(work.tokens)

    def steps(self, work: Work, schedule: Schedule, link: Link) -> tuple[Step, Step]:
        """A steady and a sync step of a rank."""
        m, ranks = self._measured, work.ranks
        rates = link.rates(ranks, m.linear_tflops, m.attention_tflops)
        arithmetic, rest = _arithmetic_s(work.part, rates), self.rest_s(work.tokens / ranks)
        final = rates.gather_s(work.final_bytes, 1)
        once = work.held_bytes / self._moved[ranks]  # to read or write all keys and values
        waits = sum(layer.wait_s(rates) for layer in work.part)
        joining = 0.0 if link.direct else 2 * once  # pieces are read, the whole is written
        if schedule.policy == "gather":
            step = Step(arithmetic, rest, joining, waits, final)
            return step, step
        fill = m.fill_s * work.tokens / m.tokens
        if schedule.sync == "recompute":
            whole = _arithmetic_s(work.whole, rates)
            sync = self._issued(Step(whole, self.rest_s(work.tokens), fill))
        else:
            sync = Step(arithmetic, rest, fill, waits, final)
        if schedule.policy == "rotate":
            return Step(arithmetic, rest, 3 * once, 0.0, final), sync
        # Prediction, which keeps nothing, and the copy of what is sent.
        memory = (3 - 1 / ranks + 2 / ranks) * once + joining
        travel = sum(layer.gather_s(rates) for layer in work.part)
        wait = max(0.0, travel - arithmetic - rest - memory)
        return Step(arithmetic, rest, memory, wait, final), self._issued(sync)

    def image(self, work: Work, schedule: Schedule, link: Link, steps: int) -> Image:
        """An image of so many steps."""
        steady, sync = self.steps(work, schedule, link)
        cost = Cost.of(schedule, steps, self.one_s(work), sync.total_s, steady.total_s)
        syncs = sum(schedule.step(index).sync for index in range(steps))
        image_s = steps * cost.mean_s
        return Image(
            steady, sync, cost, image_s, cost.one_s / cost.mean_s, syncs * sync.total_s / image_s
        )

    def _issued(self, step: Step) -> Step:
        """`step`, as the host issues it kernel by kernel."""
        return Step(**asdict(step) | {"host_s": max(0.0, self._host_s - step.total_s)})


def _arithmetic_s(layers: Sequence[Layer], rates: Rates) -> float:
    return sum(layer.compute_s(rates) for layer in layers)


# --- the command ---------------------------------------------------------------------------------


def count(size: int, ranks: int) -> Work:
    """FLUX.1-dev's, for `size` x `size` pixels in bfloat16."""
    schedule = Schedule("rotate", world_size=ranks)
    foreseen = preview(
        FLUX_DEV,
        schedule,
        width=size,
        height=size,
        text_tokens=TEXT_TOKENS,
        dtype=torch.bfloat16,
    )
    return Work.of(foreseen, size**2 // 256 + TEXT_TOKENS)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each row and number of ranks; milliseconds where nothing else is said."""
    shown = Table(
        *("ranks", "row", "image, s", "faster", "a step", "steady", "arithmetic", "rest"),
        *("memory", "wait", "final", "host", "sync", "of it sync"),
        title=title,
        box=None,
    )
    for row in rows:
        image: Image = row["image"]
        terms = [image.cost.mean_s, image.steady.total_s]
        terms += [getattr(image.steady, term.name) for term in fields(Step)] + [image.sync.total_s]
        shown.add_row(
            str(row["ranks"]),
            row["row"],
            f"{image.image_s:.2f}",
            f"{image.faster:.2f}x",
            *(f"{1000 * term:.2f}" for term in terms),
            f"{image.sync_share:.0%}",
        )
    return shown


def main(
    measured: Annotated[Path, typer.Option("--steps-json", help="What steps.py wrote.")] = RESULTS
    / "2026-11-28-steps-h200.json",
    alone: Annotated[
        Path, typer.Option("--bench-json", help="What piflux bench wrote of one rank.")
    ] = RESULTS / "2026-11-28-bench-two-h200-fp8.json",
    size: Annotated[
        list[int] | None, typer.Option(help="Pixels a side. Repeatable. Default: 1024, 2048.")
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(
            help="nvlink, no-p2p or sockets, or name:GB/s:us:us, a latency and what each rank "
            "beyond two adds to it. Repeatable. Default: the three."
        ),
    ] = None,
    host_ms: Annotated[
        float, typer.Option(min=0, help="Until a step that is not recorded is issued.")
    ] = HOST_MS,
    steps: Annotated[int, typer.Option(min=1, help="Denoise steps of an image.")] = 28,
    out: Annotated[Path, typer.Option(help="A folder for scaling.json.")] = Path("out/scaling"),
) -> None:
    """Predict an image's time on the numbers of ranks whose steps were measured."""
    try:
        links = dict(Link.parse(text) for text in link or LINKS)
        records = [json.loads(path.read_text()) for path in (measured, alone)]
        known = Measured.of(*records)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    pixels = math.isqrt(256 * (known.tokens - TEXT_TOKENS))
    sizes = size or [1024, 2048]
    for side in sizes:
        options.check_side("--size", side)
    console = Console()
    console.width = max(console.width, WIDTH)
    with console.status("counting in the captured graphs"):
        work = {
            (side, ranks): count(side, ranks) for side in {pixels, *sizes} for ranks in known.step_s
        }
    try:
        model = Model(known, {ranks: work[pixels, ranks] for ranks in known.step_s}, host_ms / 1000)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found: list[dict[str, Any]] = []
    for side in sizes:
        for name, one in links.items():
            rows = [
                {
                    "size": side,
                    "link": name,
                    "ranks": ranks,
                    "row": row,
                    "image": model.image(
                        work[side, ranks], Schedule(**settings, world_size=ranks), one, steps
                    ),
                }
                for ranks in sorted(known.step_s)
                for row, settings in ROWS.items()
            ]
            alone_ms = 1000 * model.one_s(work[side, min(known.step_s)])
            title = f"{side} x {side}, {name}; one rank: {alone_ms:.1f} ms a step"
            console.print(table(title, rows))
            found += rows
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "what": "a model, not a measurement; see benchmarks/scaling.py",
        **header(program=script()),
        "measured": {
            path.name: {name: record.get(name) for name in ("date", "hardware", "versions")}
            for path, record in zip((measured, alone), records, strict=True)
        },
        "steps": steps,
        "links": {name: asdict(one) for name, one in links.items()},
        "host_ms": host_ms,
        "rows": [row | {"image": asdict(row["image"])} for row in found],
    }
    (out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
