"""The benchmark on CPU ranks: rows, the floor, what it writes."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch.distributed as dist
from models import tiny_flux
from typer.testing import CliRunner

from piflux.policies.schedule import Schedule
from piflux.tools.bench import bench
from piflux.tools.bench.bench import Floor, chart, markdown, measure_floor, run_row
from piflux.tools.bench.rows import FLUX_DEV, ROWS, Result, Settings, build, is_in_a_block

FLOOR = Floor(8 * 10**12, 2 * 10**12, 800.0, 500.0)


def results():
    return [
        Result("eager", 1, [20.0, 30.0, 22.0], 1.5, 24.0),
        Result("rotate", 2, [10.0, 12.0], 3.0, None, 2_000_000, 10_000),
        Result("absent", 2, error="ImportError: no module"),
    ]


def test_the_floor_is_arithmetic_at_the_measured_rates():
    assert FLOOR.ms(1) == pytest.approx(14.0)
    assert FLOOR.ms(2) == pytest.approx(7.0)
    measured = measure_floor(128, 128)
    assert measured.linear_flops == 2 * 12 * 256**2 * 128 * 6
    assert measured.attention_flops == 4 * 128**2 * 256 * 6
    assert 0 < measured.ms(1) < 1000


def test_flux_dev_is_counted_right():
    """At 1024 x 1024 a step of FLUX.1-dev is 59.5 + 14.9 TFLOP."""
    config = FLUX_DEV
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers = config["num_layers"] + config["num_single_layers"]
    assert bench.flops(layers, width, 4096 + 512) == (
        pytest.approx(59.5e12, rel=1e-3),
        pytest.approx(14.9e12, rel=3e-3),
    )


def test_table():
    lines = markdown(results(), FLOOR).splitlines()
    assert lines[2] == "| eager | 1 | 22.0 | 8.0 | 1.57x | 1.5 s | 24.0 GiB |  |"
    assert lines[3].startswith("| rotate | 2 | 11.0 |")
    assert lines[3].endswith("|  | 2.0 / 0.01 MB |")
    assert "ImportError: no module" in lines[4]


def test_chart(tmp_path):
    chart(results(), FLOOR, "title", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_rows_on_cpu_ranks(tmp_path):
    command = [sys.executable, "-m", "piflux.tools.bench.bench", "--row=eager", "--row=rotate"]
    command += ["--height=128", "--width=128", "--steps=3", "--images=1", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No CUDA device" in done.stdout
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["command"].startswith("piflux bench --row=eager --row=rotate --height=128")
    assert record["versions"]["diffusers"] == version("diffusers")
    eager, rotate = record["rows"]
    assert (eager["ranks"], rotate["ranks"]) == (1, 2)
    assert len(eager["step_ms"]) == len(rotate["step_ms"]) == 3
    assert rotate["steady_bytes"] == 32 * 64 * 4  # half of 64 latent tokens
    assert rotate["sync_bytes"] > rotate["steady_bytes"]
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}


@pytest.mark.parametrize(
    ("row", "policy", "settings"),
    [
        ("gather", "gather", {}),
        ("rotate", "rotate", {}),
        ("rotate-recompute", "rotate", {"sync": "recompute"}),
        ("rotate-int8", "rotate", {"compression": "int8"}),
        ("displaced", "displaced", {}),
        ("displaced-int8", "displaced", {"compression": "int8"}),
    ],
)
def test_rows_are_of_the_policy_that_they_name(row, policy, settings):
    model, _ = ROWS[row].prepare(tiny_flux(), False)
    assert model._piflux_compiler.runtime.schedule == Schedule(policy, **settings)


def test_a_loop_of_its_own_is_timed_as_a_whole(monkeypatch):
    """PipeFusion's steps overlap, so that what lies between two of them is no step's time."""
    calls = []
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))

    def call(**settings):
        time.sleep(0.06)
        calls.append(settings)

    _, inputs = build("cpu", False, 128, 96)
    start = time.perf_counter()
    (mean,) = ROWS["xdit-pipefusion"].image(call, nullcontext, inputs, 3)
    whole = 1e3 * (time.perf_counter() - start)
    before, settings, after = calls
    assert before == after == "barrier"
    assert (settings["height"], settings["width"]) == (128, 96)
    assert (settings["num_inference_steps"], settings["max_sequence_length"]) == (3, 64)
    assert settings["latents"] is inputs["hidden_states"]
    assert 20 <= mean <= whole / 3


def test_what_is_quantized():
    """All that multiplies tokens in blocks, and no modulation."""
    model = tiny_flux(double=2, single=3)
    chosen = [name for name, module in model.named_modules() if is_in_a_block(module, name)]
    assert len(chosen) == 2 * (2 * 4 + 2 * 2) + 3 * 5
    assert not [name for name in chosen if "norm" in name]
    assert "proj_out" not in chosen and "x_embedder" not in chosen


def test_a_row_that_fails_says_why(tmp_path):
    log = tmp_path / "row.log"
    result = run_row(Settings("nonsense", 1, 128, 128, 2, 1), "nvlink", log)
    assert result.error is not None
    assert "KeyError: 'nonsense'" in result.error
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--height=100", "multiple of 16"),
        ("--row=nonsense", "choose from"),
        ("--row=compiled", "needs a GPU"),
    ],
)
def test_wrong_arguments(argument, message):
    import typer

    app = typer.Typer()
    app.command()(bench.bench)
    done = CliRunner().invoke(app, [argument])
    assert done.exit_code == 2
    assert message in done.output
