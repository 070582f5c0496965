"""The table of step caches, in small: every row draws, and counts what it computed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

FILE = Path(__file__).parents[1] / "benchmarks" / "step_caches.py"
spec = importlib.util.spec_from_file_location("step_caches", FILE)
assert spec is not None and spec.loader is not None
step_caches = importlib.util.module_from_spec(spec)
sys.modules["step_caches"] = step_caches
spec.loader.exec_module(step_caches)

# Counted by hand for 6 steps of 10 blocks, of which the first 2 are computed anyway.
ROWS = {
    "^6 Euler": 6,
    "10 of 6": 10,  # as many as it names, which an image of 6 has not
    "^10 steps of second": 10,
    "First Block Cache, 0.25": None,
    "whole, every 2, order 1": 4,
    "MagCache, 0.24": None,
}


def test_rows(monkeypatch, tmp_path):
    for name, value in {"STEPS": 6, "NEARLY_EXACT": 3, "IMAGE_SIZE": 64, "FIRST": 2}.items():
        monkeypatch.setattr(step_caches, name, value)
    app = typer.Typer()
    app.command()(step_caches.main)
    only = "|".join(ROWS)
    done = CliRunner().invoke(
        app, ["--count=1", "--batch=1", f"--only={only}", f"--out={tmp_path}"]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "caches.json").read_text())["rows"]
    assert len(rows) == len(ROWS)
    for row, computed in zip(rows, ROWS.values(), strict=True):
        assert len(row["psnr"]) == len(row["solved_lpips"]) == 1
        if computed is None:  # decided by what is computed: the first block, or nothing, runs
            assert 2 <= row["computed"] < 6
        else:
            assert row["computed"] == pytest.approx(computed, rel=0.01)
    assert rows[0]["psnr"] == [100.0]
    assert (tmp_path / "sheet.png").exists()
