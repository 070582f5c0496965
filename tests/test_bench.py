"""The benchmark on CPU ranks: rows, the floor, what it writes."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import tiny_flux
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from piflux.policies.schedule import Schedule
from piflux.tools import cli, options
from piflux.tools.bench import bench as bench_module
from piflux.tools.bench import rows
from piflux.tools.bench.bench import Floor, chart, markdown, measure_floor, run_row
from piflux.tools.bench.models import ARCHITECTURES, build, count_flops
from piflux.tools.bench.rows import ROWS, Row, measure
from piflux.tools.bench.ways import EARLY, MODELS, WAYS, Result, Settings

FLOOR = Floor(8 * 10**12, 2 * 10**12, 800.0, 500.0)


def results():
    return [
        Result("eager", 1, [20.0, 30.0, 22.0], [1.5, 0.5, 0.4, 0.3, 0.2, 0.1], 24.0),
        Result("rotate", 2, [10.0, 12.0], [3.0, 0.75, 0.5, 0.25], None, 2_000_000, 10_000),
        Result("absent", 2, error="ImportError: no module"),
    ]


def test_the_floor_is_arithmetic_at_the_measured_rates():
    assert FLOOR.ms(1) == pytest.approx(14.0)
    assert FLOOR.ms(2) == pytest.approx(7.0)
    measured = measure_floor(128, 128)
    # Beside the blocks there are embedders, modulations and the head.
    blocks = 2 * 12 * 256**2 * 128 * 6
    assert blocks < measured.linear_flops < 1.2 * blocks
    assert measured.attention_flops == 4 * 128**2 * 256 * 6
    assert 0 < measured.ms(1) < 1000


def test_table():
    lines = markdown(results(), FLOOR).splitlines()
    images = "1.50 s | 0.50 s | 0.20 s"  # the first, the second, and the median of what is timed
    assert lines[2] == f"| eager | 1 | 22.0 | 8.0 | 1.57x | {images} | 24.0 GiB |  |"
    assert lines[3].startswith("| rotate | 2 | 11.0 |")
    assert lines[3].endswith("| 3.00 s | 0.75 s | 0.25 s |  | 2.0 / 0.01 MB |")
    assert "ImportError: no module" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_other_numbers_of_steps_have_a_table():
    rows = [
        Result("gather", 2, [1.0], [1.0] * 4, further_s={4: [0.3], 8: [0.5, 0.7, 0.6]}),
        Result("gather-18", 2, [1.0], [1.0] * 4),
        Result("rotate", 2, error="ImportError: no module"),
    ]
    *_, empty, heads, rule, whole, none = markdown(rows, FLOOR).splitlines()
    assert (empty, heads) == ("", "| row | ranks | 8 steps, s | 4 steps, s |")
    assert (whole, none) == ("| gather | 2 | 0.600 | 0.300 |", "| gather-18 | 2 |  |  |")
    assert rule.count("|") == heads.count("|")


def test_rows_of_18_computed_steps_draw_no_fewer(monkeypatch, tmp_path):
    """Of a run of 28 steps and 8 they leave the second out; of one of 8 they have no part."""
    asked = {}

    def run(settings, *_):
        asked[settings.row] = settings.steps, settings.further
        return Result(settings.row, settings.ranks, [1.0], [1.0] * 4)

    monkeypatch.setattr(bench_module, "run_row", run)
    monkeypatch.setattr(bench_module, "measure_floor", lambda *_: FLOOR)
    run_bench = partial(CliRunner().invoke, cli.app)
    done = run_bench(["bench", "--steps=28", "--steps=8", "--steps=8", f"--out={tmp_path}"])
    assert done.exit_code == 0, done.output
    assert asked["gather-18"] == (28, ()) and asked["gather"] == (28, (8,))
    asked.clear()
    assert run_bench(["bench", "--steps=8", f"--out={tmp_path}"]).exit_code == 0
    assert asked["gather"] == (8, ()) and not any(row.endswith("-18") for row in asked)


def test_chart(tmp_path):
    chart(results(), FLOOR, "title", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_models_table_is_of_what_bench_writes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from models_table import tables

    def row(name, ranks, first, step_ms):
        images = [first, 1.0, 1.0, 1.0]
        return asdict(Result(name, ranks, step_ms, images, 8.0 + ranks))

    found = [
        row("compiled-blocks", 1, 60.0, [100.0] * 4),
        row("gather", 2, 20.0, [50.0] * 4),
        row("rotate", 2, 10.0, [90.0, 40.0, 80.0, 40.0] + [40.0] * 4),
        asdict(Result("diffusers-ulysses", 2, error="no plan")),
    ]
    record = {"model": "wan", "width": 832, "height": 480, "steps": 4}
    files = [record | {"rows": rows} for rows in (found[:1], found[1:])]
    times, memory = (part.splitlines() for part in tables(files).split("\n\n"))
    assert (len(times), len(memory)) == (3, 3)
    name = "| wan, 832 x 480 "
    assert (
        times[2] == f"{name}| 100.0 | fails | 50.0 (2.00x) | 40.0 (2.50x) | 90, 80 | 20.0, 10.0 |"
    )
    assert memory[2] == f"{name}| 9.0 |  | 10.0 | 10.0 |"
    assert len({line.count("|") for line in times}) == len({x.count("|") for x in memory}) == 1


def test_every_way_can_be_run():
    assert list(WAYS) == list(ROWS)
    assert list(MODELS) == list(ARCHITECTURES)


@pytest.mark.parametrize("model", MODELS)
def test_models_in_small(model):
    """A step of each is a step of its latents, counted as it runs."""
    transformer, inputs = build("cpu", False, 32, 48, model)
    architecture = ARCHITECTURES[model]
    latents = inputs[architecture.latents]
    with torch.no_grad():
        step = architecture.step(inputs, latents, torch.full((1,), architecture.scale))
        with FlopCounterMode(display=False) as counter:
            predicted = architecture.predicted(transformer(**step))
    assert predicted.shape == latents.shape
    assert predicted.isfinite().all() and predicted.std() > 1e-3
    linear, attention = count_flops(model, False, 32, 48)
    assert linear == counter.get_total_flops()  # which knows no attention on CPUs
    assert attention > 0


@pytest.mark.parametrize(
    ("model", "row"), [("qwen-image", "piflux-1"), ("z-image", "eager"), ("wan", "eager")]
)
def test_rows_of_other_models(model, row):
    result = measure(Settings(row, 1, 32, 48, 3, 1, (), model))
    assert len(result.image_s) == EARLY + 1 and len(result.step_ms) == 3
    assert min(result.step_ms) > 0


def test_rows_on_cpu_ranks(ranks, monkeypatch, tmp_path):
    """A row's own processes are below."""
    monkeypatch.setattr(
        "piflux.tools.bench.bench.launch", lambda job, n, *args: ranks.launch(n, job, *args)[0]
    )
    arguments = ["--row=eager", "--row=rotate", "--height=128", "--width=128", "--steps=3"]
    arguments += ["--steps=2", "--images=1", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["piflux", "bench", *arguments])
    done = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert done.exit_code == 0, done.output
    assert "No CUDA device" in done.output
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["command"].startswith("piflux bench --row=eager --row=rotate --height=128")
    assert record["versions"]["diffusers"] == version("diffusers")
    eager, rotate = record["rows"]
    assert (eager["ranks"], rotate["ranks"]) == (1, 2)
    assert len(eager["step_ms"]) == len(rotate["step_ms"]) == 3
    assert (record["steps"], record["further_steps"]) == (3, [2])
    for row in eager, rotate:
        assert [len(seconds) for seconds in row["further_s"].values()] == [1]
    assert "| row | ranks | 2 steps, s |" in (tmp_path / "bench.md").read_text()
    assert rotate["steady_bytes"] == 32 * 64 * 4  # half of 64 latent tokens
    assert rotate["sync_bytes"] > rotate["steady_bytes"]
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}


@pytest.mark.parametrize(
    ("row", "policy", "settings"),
    [
        ("gather", "gather", {}),
        ("gather-18", "gather", {"compute": 18}),
        ("rotate", "rotate", {}),
        ("rotate-18", "rotate", {"compute": 18}),
        ("piflux-1-18", "rotate", {"compute": 18}),
        ("rotate-recompute", "rotate", {"sync": "recompute"}),
        ("rotate-int8", "rotate", {"compression": "int8"}),
        ("rotate-int4", "rotate", {"compression": "int4"}),
        ("displaced", "displaced", {}),
        ("displaced-int8", "displaced", {"compression": "int8"}),
        ("displaced-int4", "displaced", {"compression": "int4"}),
    ],
)
def test_rows_are_of_the_policy_that_they_name(row, policy, settings):
    model, _ = ROWS[row].prepare(tiny_flux(), False)
    assert model._piflux_compiler.runtime.schedule == Schedule(policy, **settings)


def test_rows_that_share_do():
    """That are said to: one rank says that there is nothing."""
    for name, way in WAYS.items():
        if way.shares and "fp8" not in name:
            model, _ = ROWS[name].prepare(tiny_flux(), False, shard_weights=True)
            assert "nothing to share" in str(model._piflux_compiler.runtime.notes)


def test_flags_are_of_the_row_that_is_run(monkeypatch):
    """Weights are turned before the row has the model, and what it is told takes its options."""
    seen = []
    monkeypatch.setattr(rows, "quantize", lambda model, kind: seen.append(kind))

    def prepare(model, on_gpu, **more):
        seen.append(more)
        return model, nullcontext

    monkeypatch.setitem(ROWS, "rotate", Row(prepare))
    measure(Settings("rotate", 1, 32, 48, 2, 1, (), "flux.1", "int8", True))
    assert seen == ["int8", {"shard_weights": True}]
    seen.clear()
    measure(Settings("rotate", 1, 32, 48, 2, 1))
    assert seen == [{}]


def test_a_loop_of_its_own_is_timed_as_a_whole(monkeypatch):
    """PipeFusion's steps overlap, so that what lies between two of them is no step's time."""
    calls = []
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))

    def call(**settings):
        time.sleep(0.06)
        calls.append(settings)

    _, inputs = build("cpu", False, 128, 96)
    start = time.perf_counter()
    flux = ARCHITECTURES["flux.1"]
    (mean,) = ROWS["xdit-pipefusion"].image(call, nullcontext, flux, inputs, 3)
    whole = 1e3 * (time.perf_counter() - start)
    before, settings, after = calls
    assert before == after == "barrier"
    assert (settings["height"], settings["width"]) == (128, 96)
    assert (settings["num_inference_steps"], settings["max_sequence_length"]) == (3, 64)
    assert settings["latents"] is inputs["hidden_states"]
    assert 20 <= mean <= whole / 3


def test_a_row_that_fails_says_why(tmp_path):
    log = tmp_path / "row.log"
    result = run_row(Settings("nonsense", 1, 128, 128, 2, 1), "nvlink", log)
    assert result.error is not None
    assert "KeyError: 'nonsense'" in result.error
    assert "Traceback" in log.read_text()


def test_what_was_in_a_row_s_way_is_told_whole(capsys):
    failed = Result("gather", 2, error="pip install 'piflux[quantize]'")
    bench_module._print([failed], Floor(1.0, 1.0, 1.0, 1.0), "a [b] c")
    said = " ".join(capsys.readouterr().out.split())
    assert "gather: pip install 'piflux[quantize]'" in said and "a [b] c" in said


def test_without_torchao_no_row_begins(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    done = CliRunner().invoke(cli.app, ["bench", "--quantize=int8"])
    assert done.exit_code == 1
    assert "--quantize int8 takes the package torchao" in done.output


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--height=100", "multiple of 16"),
        ("--row=nonsense", "choose from"),
        ("--model=flux.4", "choose from flux.1, flux.2, flux.3, qwen-image, z-image, wan"),
        ("--model=wan --row=para-attention", "choose from"),
        ("--shard-weights --row=eager", "--shard-weights choose from gather, gather-18, rotate"),
        ("--quantize=int8 --row=rotate-fp8", "--quantize int8 choose from eager, compiled"),
        ("--row=gather-18 --steps=8", "--model flux.1 --steps 8 choose from eager"),
        ("--row=compiled", "needs a GPU"),
        ("--ranks=999", "there are"),
    ],
)
def test_wrong_arguments(argument, message):
    done = CliRunner().invoke(cli.app, ["bench", *argument.split()])
    assert done.exit_code == 2
    assert message in done.output
