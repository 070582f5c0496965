"""`make demo`: one image on 1 and on 2 CPU ranks, side by side, with times, PSNR and LPIPS."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio

from piflux.demo import PROMPTS
from piflux.lpips import LPIPS

OUT = Path("out")
PROMPT = PROMPTS[0]
MARGIN = 40  # pixels for a label above an image

console = Console()


def main() -> None:
    images, results = [], []
    console.print(f"Prompt: {PROMPT}")
    for ranks in (1, 2):
        image, result = generate(ranks)
        images.append(image)
        results.append(result)
    one, two = results

    labels = [
        f"{name}, {result['median_step_ms'] / 1000:.2f} s a step"
        for name, result in (("1 rank", one), ("2 ranks", two))
    ]
    side_by_side(images, labels).save(OUT / "demo-side-by-side.png")

    table = Table("", "1 rank", "2 ranks", "speed-up")
    for name, seconds in (
        ("seconds a step (median)", lambda result: result["median_step_ms"] / 1000),
        ("seconds the image", lambda result: result["total_s"]),
    ):
        before, after = seconds(one), seconds(two)
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}x")
    arrays = [np.array(image) for image in images]
    psnr = peak_signal_noise_ratio(*arrays)
    lpips = LPIPS()(*(torch.from_numpy(x).permute(2, 0, 1)[None] / 255 for x in arrays)).item()
    console.print(table)
    console.print(f"The image on 2 ranks against that on 1: PSNR {psnr:.2f} dB, LPIPS {lpips:.4f}")
    console.print(one["note"])
    console.print(f"Saved {', '.join(str(path) for path in sorted(OUT.glob('demo-*.png')))}")


def generate(ranks: int) -> tuple[Image.Image, dict[str, Any]]:
    """Run `run_flux.py` on `ranks` CPU ranks of one thread each: the image, the measurements."""
    name = f"demo-{ranks}rank{'s' if ranks > 1 else ''}"
    image, measurements = OUT / f"{name}.png", OUT / f"{name}.json"
    command = ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "examples/run_flux.py"]
    command += ["--model=demo", "--policy=rotate", f"--prompt={PROMPT}"]
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
    return Image.open(image), json.loads(measurements.read_text())


def side_by_side(images: list[Image.Image], labels: list[str]) -> Image.Image:
    """The images from left to right, each under its label; all of one size."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=MARGIN // 2)
    for column, (image, label) in enumerate(zip(images, labels, strict=True)):
        middle = (column * width + width // 2, MARGIN // 2)
        draw.text(middle, label, fill="black", font=font, anchor="mm")
        sheet.paste(image, (column * width, MARGIN))
    return sheet


if __name__ == "__main__":
    main()
