"""The programs about skipped steps, in small: every row draws, and counts what it computed."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner


def program(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


step_caches, continued = program("step_caches"), program("continued")


def invoke(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


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
    only = "|".join(ROWS)
    invoke(step_caches.main, "--count=1", "--batch=1", f"--only={only}", f"--out={tmp_path}")
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


def test_rules_and_errors(monkeypatch, tmp_path):
    """Of a model whose predictions lie on a line over sigma, the rule that says so is exact."""

    def predict(self, latents, sigma):
        return torch.ones_like(latents) * (1 + 2 * sigma)

    def pixels(self, latents):
        return latents.reshape(len(latents), 1, -1, 64).sigmoid().expand(-1, 3, -1, -1)

    monkeypatch.setattr(continued, "STEPS", 9)
    monkeypatch.setattr(continued.Case, "pixels", pixels)
    monkeypatch.setattr(continued, "NUMBERS", (7, 6))
    monkeypatch.setattr(continued.Case, "predict", predict)
    invoke(continued.main, "--count=1", "--judged=1", "--searched=2", f"--out={tmp_path}")
    record = json.loads((tmp_path / "continued.json").read_text())
    near = {row["rule"]: min(row["psnr"]) for row in record["rows"] if row["computed"] == 6}
    assert near["prediction, order 1, 1 of it over sigma"] > 95
    assert near["prediction, order 2, 1 of it over sigma"] > 95
    assert near["prediction, order 1, 1 of it over log-SNR"] < 80
    assert near["prediction, order 0, 1 of it over log-SNR"] < 60
    assert len(near) == len(continued.RULES)
    computed = [statistics.mean(row["computed"]) for row in record["by error"]]
    assert computed == sorted(computed, reverse=True) and computed[-1] < 9
