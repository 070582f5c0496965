"""The small pipeline, and what `examples/run_flux.py` says to wrong arguments."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from piflux.demo import IMAGE_SIZE, NOTE, PROMPTS, TEXT_TOKENS, demo_file, demo_pipeline

RUN_FLUX = Path(__file__).parent.parent / "examples" / "run_flux.py"


@cache
def demo() -> Any:
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(
    noise_seed: int = 0, prompt: str = PROMPTS[0], size: int | None = 64, steps: int = 3
) -> Tensor:
    """(3, size, size), values from 0 to 1; None is the pipeline's own size."""
    return demo()(
        prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        max_sequence_length=TEXT_TOKENS,
        generator=torch.Generator().manual_seed(noise_seed),
        output_type="pt",
    ).images[0]


def test_seed_and_prompt_decide_the_image() -> None:
    reference = image()
    torch.manual_seed(123)
    assert torch.equal(image(), reference)
    for other in (image(noise_seed=1), image(prompt="A blue fox, 日本")):
        assert not torch.equal(other, reference)


def test_it_draws_what_it_was_told() -> None:
    """Red below green leaves, on white: the strawberry of the demo."""
    assert PROMPTS[0] == "strawberry, flat style, white background"
    picture = image(size=None, steps=8)
    assert picture.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    corners = picture[:, [8, 8, -8, -8], [8, -8, 8, -8]]
    assert corners.min() > 0.85
    red, green, blue = picture
    berry = (red > 0.6) & (green < 0.45) & (blue < 0.45)
    leaves = (green > red) & (green > blue + 0.1)
    assert 0.08 < berry.float().mean() < 0.6
    assert 0.01 < leaves.float().mean() < 0.3
    rows = torch.arange(IMAGE_SIZE, dtype=torch.float)
    heights = [(mask.sum(1) * rows).sum() / mask.sum() for mask in (leaves, berry)]
    assert heights[0] < heights[1]


def test_weights_are_small_files_without_paths() -> None:
    files = [path for path in demo_file("model").rglob("*") if path.is_file()]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in tensors) < 60e6
    assert max(path.stat().st_size for path in tensors) < 16e6
    assert not any("_name_or_path" in p.read_text() for p in files if p.suffix == ".json")


def test_guidance_is_without_effect() -> None:
    """As the model card says: it was trained with one value of it."""
    transformer = demo().transformer
    pooled, clock = torch.randn(1, 192), torch.tensor([500.0])
    first, second = (
        transformer.time_text_embed(clock, torch.tensor([scale]), pooled) for scale in (1e3, 5e3)
    )
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def run_flux() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_flux", RUN_FLUX)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_flux"] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def to_tensor(picture: Image.Image) -> Tensor:
    """(height, width, 3), values from 0 to 255."""
    return torch.from_numpy(np.array(picture)).int()


def invoke(run_flux: ModuleType, *arguments: str, ranks: int = 1) -> tuple[int, str]:
    """The exit status and all output, as one line without the frame around an error."""
    app = typer.Typer(add_completion=False)
    app.command()(run_flux.main)
    environment = {"WORLD_SIZE": str(ranks), "COLUMNS": "200", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, arguments, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=demo", "--height=100"], "--height must be a multiple of 16 from 16 on, got 100"),
        (["--model=demo", "--width=0"], "--width must be a multiple of 16 from 16 on, got 0"),
        (["--model=./no/such/folder"], "--model ./no/such/folder: no such folder"),
        (["--model=demo", "--policy=pipefusion"], "'gather', 'rotate', 'displaced', 'none'"),
        (["--model=demo", "--steps=0"], "--steps"),
        (["--model=demo", "--sync-steps=-1"], "--sync-steps must be an integer >= 0"),
        (["--model=demo", "--refresh-every=0"], "--refresh-every"),
    ],
)
def test_wrong_arguments(run_flux: ModuleType, arguments: list[str], message: str) -> None:
    status, output = invoke(run_flux, *arguments)
    assert status == 2
    assert message in output


def test_no_policy_is_for_one_rank(run_flux: ModuleType) -> None:
    status, output = invoke(run_flux, "--model=demo", "--policy=none", ranks=2)
    assert status == 2
    assert "--policy none is for one rank, not 2" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_random_weights_need_a_gpu(run_flux: ModuleType) -> None:
    status, output = invoke(run_flux, "--random-weights")
    assert status == 2
    assert "there is no CUDA device" in output


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("policy", ["rotate", "none"])
def test_one_rank_makes_an_image(run_flux: ModuleType, tmp_path: Path, policy: str) -> None:
    status, output = invoke(
        run_flux,
        "--model=demo",
        f"--policy={policy}",
        "--no-compile",
        "--height=64",
        "--width=48",
        "--steps=3",
        "--warmups=0",
        "--print-output",
        f"--output={tmp_path / 'new' / 'image.png'}",
        f"--json={tmp_path / 'times.json'}",
    )
    assert status == 0, output
    assert NOTE in output
    assert (tmp_path / "new" / "image.png").stat().st_size > 1000
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["ranks"] == 1
    assert times["policy"] == policy
    assert times["pictures"] == 1
    assert len(times["step_ms"]) == 2
    assert times["total_s"] > 0


@pytest.mark.usefixtures("few_blocks")
def test_several_prompts_are_one_batch(run_flux: ModuleType, tmp_path: Path) -> None:
    """The second picture is the one that its seed gives alone."""
    small = ("--model=demo", "--no-compile", "--height=64", "--width=64", "--steps=2")
    small += ("--warmups=0", f"--json={tmp_path / 'times.json'}")
    both = tuple(f"--prompt={prompt}" for prompt in PROMPTS[:2])
    status, output = invoke(run_flux, *small, *both, "--seed=3", f"--output={tmp_path / 'a.png'}")
    assert status == 0, output
    assert json.loads((tmp_path / "times.json").read_text())["pictures"] == 2
    status, output = invoke(run_flux, *small, both[1], "--seed=4", f"--output={tmp_path / 'b.png'}")
    assert status == 0, output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-1.png", "a-2.png", "b.png"]
    first, second, alone = (
        to_tensor(Image.open(tmp_path / name)) for name in ("a-1.png", "a-2.png", "b.png")
    )
    assert (second - alone).abs().max() <= 1
    assert (first - alone).abs().max() > 10
