"""How long a first image waits: seconds from the first call of a FLUX to its result, by phase.

Each row runs in a process of its own, with inductor's cache empty (cold) or as the row before it
left it (warm), with repeated blocks compiled once ("blocks") or the graph as a whole ("whole").
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch._dynamo.backends.registry import lookup_backend

import piflux
from piflux.compile import compiler
from piflux.tools.bench.models import FLUX_DEV
from piflux.tools.records import hardware, header, script

WORKER = "COLD_START_WORKER"
STEPS = 10


@dataclass(frozen=True)
class Model:
    """FLUX.1-dev's architecture at some width and depth, and the two sizes it is called with.

    Attributes:
        double, single: blocks.
        heads, head_dim: the width.
        pixels: of the square image, a multiple of 16.
        second: likewise, of the second resolution.
        text: tokens.
    """

    double: int
    single: int
    heads: int
    head_dim: int
    pixels: int
    second: int
    text: int

    def build(self, device: str) -> torch.nn.Module:
        dim = self.head_dim
        config = FLUX_DEV | {
            "num_layers": self.double,
            "num_single_layers": self.single,
            "num_attention_heads": self.heads,
            "attention_head_dim": dim,
            "axes_dims_rope": (dim // 8, dim * 7 // 16, dim * 7 // 16),
        }
        torch.manual_seed(0)
        with torch.device(device):
            return FluxTransformer2DModel(**config).to(_dtype(device)).eval()

    def inputs(self, device: str, pixels: int) -> dict[str, Any]:
        """The keyword arguments of one denoise step at batch 1."""
        tokens, dtype = (pixels // 16) ** 2, _dtype(device)
        with torch.device(device):
            return {
                "hidden_states": torch.randn(1, tokens, FLUX_DEV["in_channels"], dtype=dtype),
                "encoder_hidden_states": torch.randn(
                    1, self.text, FLUX_DEV["joint_attention_dim"], dtype=dtype
                ),
                "pooled_projections": torch.randn(
                    1, FLUX_DEV["pooled_projection_dim"], dtype=dtype
                ),
                "timestep": torch.ones(1, dtype=dtype),
                "guidance": torch.full((1,), 3.5, dtype=dtype),
                "img_ids": torch.zeros(tokens, 3, dtype=dtype),
                "txt_ids": torch.zeros(self.text, 3, dtype=dtype),
                "return_dict": False,
            }


@dataclass(frozen=True)
class Result:
    """One process; seconds unless said otherwise.

    Attributes:
        capture: Dynamo, from the call to the backend.
        passes: the backend without its inner compiler.
        inner: the inner compiler.
        inner_calls: how often it was called.
        first_call: from the backend's end to the first result.
        total: from the call to its result.
        second: the first call at the second resolution.
        second_captures: graphs that it captured anew.
        step_ms: milliseconds a step at the first resolution, the median of some.
    """

    capture: float
    passes: float
    inner: float
    inner_calls: int
    first_call: float
    total: float
    second: float
    second_captures: int
    step_ms: float


def measure(model: Model, blocks: bool, dynamic: bool) -> Result:
    """Run in a fresh process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer = model.build(device)
    inductor = lookup_backend("inductor")
    entered: list[float] = []
    left: list[float] = []
    inner: list[float] = []

    def timed_inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        start = time.perf_counter()
        compiled = inductor(gm, inputs)
        inner.append(time.perf_counter() - start)
        return compiled

    compile_graph = compiler.Compiler.__call__

    def timed_backend(self: compiler.Compiler, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        entered.append(time.perf_counter())
        compiled = compile_graph(self, gm, inputs)
        left.append(time.perf_counter())
        return compiled

    parallel = piflux.parallelize(transformer, inner=timed_inner)

    def call(inputs: dict[str, Any]) -> float:
        start = time.perf_counter()
        parallel(**inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    inputs = model.inputs(device, model.pixels)
    if dynamic:
        # Only these: with dynamic=True floats are inputs, too, and equal sizes one symbol.
        torch._dynamo.mark_dynamic(inputs["hidden_states"], 1)
        torch._dynamo.mark_dynamic(inputs["img_ids"], 0)
    keep = compiler.outline if blocks else lambda gm, ctx: 0
    with (
        mock.patch.object(compiler, "outline", keep),
        mock.patch.object(compiler.Compiler, "__call__", timed_backend),
    ):
        began = time.perf_counter()
        total = call(inputs)
        spent = sum(inner)
        calls = len(inner)
        second = call(model.inputs(device, model.second))
    return Result(
        capture=entered[0] - began,
        passes=left[0] - entered[0] - spent,
        inner=spent,
        inner_calls=calls,
        first_call=began + total - left[0],
        total=total,
        second=second,
        second_captures=len(entered) - 1,
        step_ms=1e3 * statistics.median(call(inputs) for _ in range(STEPS)),
    )


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _row(model: Model, blocks: bool, dynamic: bool, cache: str) -> Result:
    """A process with inductor's cache in folder `cache`."""
    task = json.dumps({"model": asdict(model), "blocks": blocks, "dynamic": dynamic})
    env = os.environ | {WORKER: task, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, __file__], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def main(
    double: Annotated[int, typer.Option(help="Double blocks.")] = 19,
    single: Annotated[int, typer.Option(help="Single blocks.")] = 38,
    heads: Annotated[int | None, typer.Option(help="24 on a GPU, else 2.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="128 on a GPU, else 32.")] = None,
    pixels: Annotated[int | None, typer.Option(help="1024 on a GPU, else 128.")] = None,
    dynamic: Annotated[
        bool, typer.Option(help="Image tokens as a symbol from the first call on.")
    ] = True,
    whole: Annotated[bool, typer.Option(help="The graph as a whole, too.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Where to write JSON.")] = None,
) -> None:
    """Time the first call of FLUX.1-dev's architecture with random weights, on one rank."""
    gpu = torch.cuda.is_available()
    side = pixels or (1024 if gpu else 128)
    model = Model(
        double,
        single,
        heads or (24 if gpu else 2),
        head_dim or (128 if gpu else 32),
        side,
        side * 3 // 4,
        512 if gpu else 32,
    )
    rows: dict[str, Result] = {}
    for name, blocks in (("blocks", True), ("whole", False))[: 1 + whole]:
        with tempfile.TemporaryDirectory() as cache:
            for start in ("cold", "warm"):
                rows[f"{name}, {start}"] = _row(model, blocks, dynamic, cache)
    table = Table(
        title=f"{double} + {single} blocks, {model.heads} x {model.head_dim}, {hardware()}"
    )
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for field in Result.__dataclass_fields__:
        values = (asdict(result)[field] for result in rows.values())
        table.add_row(field, *(f"{value:.4g}" for value in values))
    Console().print(table)
    if output is not None:
        report = {
            **header(program=script()),
            "model": asdict(model),
            "dynamic": dynamic,
            "rows": {name: asdict(result) for name, result in rows.items()},
        }
        output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if task := os.environ.get(WORKER):
        settings = json.loads(task)
        settings["model"] = Model(**settings["model"])
        print(json.dumps(asdict(measure(**settings))))
    else:
        typer.run(main)
