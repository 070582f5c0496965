"""`make demo`: pictures on 1 and on 2 CPU ranks, side by side, with times, PSNR and LPIPS."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from piflux.demo import PROMPTS
from piflux.tools.options import numbered
from piflux.tools.quality.charts import contact_sheet
from piflux.tools.quality.drift import psnr
from piflux.tools.quality.lpips import LPIPS

OUT = Path("out")
PICTURES = PROMPTS[:4]
"""Drawn in one batch: a step of a single one is too small to share well (docs/experiments.md)."""

console = Console()


def main() -> None:
    rows, results = [], []
    for prompt in PICTURES:
        console.print(f"Prompt: {prompt}")
    for ranks in (1, 2):
        images, result = generate(ranks)
        rows.append(images)
        results.append(result)
    one, two = results

    labels = [
        f"{name}, {result['median_step_ms'] / 1000:.2f} s a step"
        for name, result in (("1 rank", one), ("2 ranks", two))
    ]
    below = [[label] * len(PICTURES) for label in labels]
    contact_sheet(rows, below, OUT / "demo-side-by-side.png")

    table = Table("", "1 rank", "2 ranks", "speed-up")
    for name, seconds in (
        ("seconds a step (median)", lambda result: result["median_step_ms"] / 1000),
        (f"seconds for all {len(PICTURES)} pictures", lambda result: result["total_s"]),
    ):
        before, after = seconds(one), seconds(two)
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}x")
    arrays = [np.stack([np.array(image) for image in images]) for images in rows]
    pair = [torch.from_numpy(x).permute(0, 3, 1, 2) / 255 for x in arrays]
    decibels, lpips = psnr(*pair).mean().item(), LPIPS()(*pair).mean().item()
    console.print(table)
    console.print(
        "The pictures on 2 ranks against those on 1, in the mean: "
        f"PSNR {decibels:.2f} dB, LPIPS {lpips:.4f}"
    )
    console.print(one["note"])
    console.print(f"Saved {', '.join(str(path) for path in sorted(OUT.glob('demo-*.png')))}")


def generate(ranks: int) -> tuple[list[Image.Image], dict[str, Any]]:
    """Run `run_flux.py` on `ranks` CPU ranks of one thread each: the pictures, what it measured."""
    name = f"demo-{ranks}rank{'s' if ranks > 1 else ''}"
    image, measurements = OUT / f"{name}.png", OUT / f"{name}.json"
    command = ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "examples/run_flux.py"]
    command += ["--model=demo", "--policy=rotate", *(f"--prompt={x}" for x in PICTURES)]
    command += ["--no-compile"]  # inductor needs a C++ compiler
    command += [f"--output={image}", f"--json={measurements}"]
    console.rule(f"{ranks} rank{'s' if ranks > 1 else ''}")
    console.print("$", shlex.join(command), highlight=False, soft_wrap=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    python = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    subprocess.run(python, env=environment, check=True)
    paths = numbered(image, len(PICTURES))
    return [Image.open(path) for path in paths], json.loads(measurements.read_text())


if __name__ == "__main__":
    main()
