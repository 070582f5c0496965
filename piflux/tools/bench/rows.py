"""The rows of `piflux bench`: ways to run the model, each in processes of its own.

`python -m piflux.tools.bench.rows SETTINGS OUT` is one row with all its ranks, as `piflux bench`
starts it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflux.cost.clock import between, mark, synchronize
from piflux.errors import RankFailed
from piflux.ranks.copies import peak_bytes
from piflux.tools.launch import launch

FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL: dict[str, Any] = FLUX_DEV | {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "axes_dims_rope": (16, 24, 24),
}

TEXT_TOKENS = 512
"""Of a prompt, on a GPU."""

Model = Callable[..., Any]
Generation = Callable[[Tensor], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Settings:
    """One row's run; everything that its processes need to know.

    Attributes:
        row: its name.
        ranks: its processes.
        height: pixels, a multiple of 16; likewise `width`.
        steps: denoise steps an image.
        images: timed images, after some that are not.
    """

    row: str
    ranks: int
    height: int
    width: int
    steps: int
    images: int


@dataclass
class Result:
    """What a row's rank 0 measured.

    Attributes:
        step_ms: every timed step of every timed image, in milliseconds.
        first_call_s: seconds of the first two steps, compilation included.
        peak_memory_gib: most GPU memory allocated in timed steps, what piflux's ranks share
            included; None on CPUs.
        sync_bytes: what a rank sends in a sync step, where piflux runs.
        steady_bytes: and in any other step.
        error: why there is nothing else.
    """

    row: str
    ranks: int
    step_ms: list[float] = field(default_factory=list)
    first_call_s: float | None = None
    peak_memory_gib: float | None = None
    sync_bytes: int | None = None
    steady_bytes: int | None = None
    error: str | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def spread_ms(self) -> float:
        """Between the 10th and the 90th percentile."""
        if len(self.step_ms) < 2:
            return 0.0
        deciles = statistics.quantiles(self.step_ms, n=10, method="inclusive")
        return deciles[-1] - deciles[0]


# --- rows: each makes a model ready to be called step by step -----------------------------------


def _image(
    call: Model, generation: Generation, inputs: dict[str, Tensor], steps: int
) -> list[float]:
    """One denoise loop of Euler steps: milliseconds of each."""
    latents = inputs["hidden_states"]
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    timesteps = torch.tensor(sigmas, device=latents.device, dtype=latents.dtype)
    marks = [mark(latents.is_cuda)]
    with generation(timesteps[:-1]):
        for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
            step = inputs | {"hidden_states": latents, "timestep": timesteps[i : i + 1]}
            latents = latents + (then - now) * call(**step, return_dict=False)[0]
            marks.append(mark(latents.is_cuda))
    return between(marks)


@dataclass(frozen=True)
class Row:
    """A way to run the model.

    Attributes:
        prepare: from the untouched model to what is called at each step, and what opens an image
            of given timesteps.
        alone: whether it is one rank's.
        needs_gpu: whether it has no CPU counterpart.
        image: one denoise loop of what is prepared, with such inputs and so many steps:
            milliseconds of each.
    """

    prepare: Callable[[nn.Module, bool], tuple[Model, Generation]]
    alone: bool = False
    needs_gpu: bool = False
    image: Callable[[Model, Generation, dict[str, Tensor], int], list[float]] = _image


def _eager(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
    return model, contextlib.nullcontext


def _compiled(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
    model.compile(fullgraph=True)
    return model, contextlib.nullcontext


def _compiled_blocks(model: Any, on_gpu: bool) -> tuple[Model, Generation]:
    model.compile_repeated_blocks(fullgraph=True)
    return model, contextlib.nullcontext


def _piflux(**options: Any) -> Callable[[nn.Module, bool], tuple[Model, Generation]]:
    def prepare(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
        import piflux

        # A CPU machine may have no C++ compiler for inductor.
        inner = "inductor" if on_gpu else "eager"
        parallel = piflux.parallelize(model, inner=inner, **options)
        return parallel, lambda timesteps: piflux.generation(parallel, timesteps=timesteps)

    return prepare


def _diffusers(kind: str) -> Callable[[nn.Module, bool], tuple[Model, Generation]]:
    def prepare(model: Any, on_gpu: bool) -> tuple[Model, Generation]:
        from diffusers import ContextParallelConfig

        dist.init_process_group("cpu:gloo,cuda:nccl")
        model.set_attention_backend("_native_cudnn")
        degree = {f"{kind}_degree": dist.get_world_size()}
        model.enable_parallelism(config=ContextParallelConfig(**degree))
        model.compile_repeated_blocks(fullgraph=True)
        return model, contextlib.nullcontext

    return prepare


def _fp8(
    prepare: Callable[[nn.Module, bool], tuple[Model, Generation]],
) -> Callable[[nn.Module, bool], tuple[Model, Generation]]:
    def quantized(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
        to_fp8(model)
        return prepare(model, on_gpu)

    return quantized


def to_fp8(model: nn.Module) -> None:
    """Turn the blocks' layers to 8-bit floating point in place, weights and activations by row.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    from torchao import quantization

    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(),
        # Inductor would search for each kernel's best settings, in minutes.
        set_inductor_config=False,
    )
    quantization.quantize_(model, config, is_in_a_block)


def is_in_a_block(module: nn.Module, name: str) -> bool:
    """Whether a layer multiplies tokens, of all blocks: a modulation multiplies one row."""
    layer = isinstance(module, nn.Linear) and "transformer_blocks." in name
    return layer and ".norm" not in name


def _para_attention(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
    from para_attn.context_parallel import init_context_parallel_mesh
    from para_attn.context_parallel.diffusers_adapters import parallelize_transformer

    dist.init_process_group("cpu:gloo,cuda:nccl")
    mesh = init_context_parallel_mesh("cuda", max_ring_dim_size=1)
    parallelize_transformer(model, mesh=mesh)
    # As its documentation has it.
    torch._inductor.config.reorder_for_compute_comm_overlap = True
    model.compile(mode="max-autotune-no-cudagraphs")
    return model, contextlib.nullcontext


def _xdit(transformer: nn.Module, **degrees: int) -> tuple[Any, Any]:
    """A pipeline of this transformer alone, and xDiT's settings with its process groups made."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from xfuser import xFuserArgs
    from xfuser.core.distributed import initialize_runtime_state

    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), transformer=cast(Any, transformer), **cast(Any, absent)
    )
    config, _ = xFuserArgs(**degrees).create_config()
    config.runtime_config.dtype = next(transformer.parameters()).dtype
    initialize_runtime_state(pipe, config)
    return pipe, config


def _xdit_ulysses(model: Any, on_gpu: bool) -> tuple[Model, Generation]:
    from xfuser.core.distributed import get_runtime_state
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    with torch.device("meta"):
        split = xFuserFlux1Transformer2DWrapper.from_config(model.config)
    split.load_state_dict(model.state_dict(), assign=True)
    _xdit(split, ulysses_degree=int(os.environ["WORLD_SIZE"]))
    get_runtime_state().set_input_parameters(
        max_condition_sequence_length=TEXT_TOKENS, split_text_embed_in_sp=True
    )
    split.compile_repeated_blocks(fullgraph=True)
    return split.eval(), contextlib.nullcontext


def _xdit_pipefusion(model: nn.Module, on_gpu: bool) -> tuple[Model, Generation]:
    from xfuser import xFuserFluxPipeline

    pipe, config = _xdit(model, pipefusion_parallel_degree=int(os.environ["WORLD_SIZE"]))
    pipe.set_progress_bar_config(disable=True)
    return xFuserFluxPipeline(pipe, config), contextlib.nullcontext


def _pipefusion_image(
    call: Model, generation: Generation, inputs: dict[str, Tensor], steps: int
) -> list[float]:
    """One denoise loop of xDiT's own: milliseconds of a step in the mean, as steps overlap."""
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    height, width = (16 * (1 + int(x)) for x in inputs["img_ids"][-1, 1:])
    dist.barrier()
    start = mark(latents.is_cuda)
    call(
        prompt_embeds=text,
        pooled_prompt_embeds=inputs["pooled_projections"],
        latents=latents,
        height=height,
        width=width,
        num_inference_steps=steps,
        max_sequence_length=text.shape[1],
        output_type="latent",
        return_dict=False,
    )
    dist.barrier()  # stages end one after the other
    (whole,) = between([start, mark(latents.is_cuda)])
    return [whole / steps]


ROWS = {
    "eager": Row(_eager, alone=True),
    "compiled": Row(_compiled, alone=True, needs_gpu=True),
    "compiled-blocks": Row(_compiled_blocks, alone=True, needs_gpu=True),
    "piflux-1": Row(_piflux(), alone=True),
    "piflux-1-fp8": Row(_fp8(_piflux()), alone=True, needs_gpu=True),
    "gather": Row(_piflux(policy="gather")),
    "rotate": Row(_piflux(policy="rotate")),
    "rotate-fp8": Row(_fp8(_piflux(policy="rotate")), needs_gpu=True),
    "rotate-recompute": Row(_piflux(policy="rotate", sync="recompute")),
    "rotate-int8": Row(_piflux(policy="rotate", compression="int8")),
    "displaced": Row(_piflux(policy="displaced")),
    "displaced-int8": Row(_piflux(policy="displaced", compression="int8")),
    "diffusers-ulysses": Row(_diffusers("ulysses"), needs_gpu=True),
    "diffusers-ring": Row(_diffusers("ring"), needs_gpu=True),
    "xdit-ulysses": Row(_xdit_ulysses, needs_gpu=True),
    "xdit-pipefusion": Row(_xdit_pipefusion, needs_gpu=True, image=_pipefusion_image),
    "para-attention": Row(_para_attention, needs_gpu=True),
}


# --- in a row's processes ------------------------------------------------------------------------


def measure(settings: Settings) -> Result:
    """Run one row in this process, which is one of its ranks."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    model, inputs = build(device, on_gpu, settings.height, settings.width)
    row = ROWS[settings.row]
    call, generation = row.prepare(model, on_gpu)
    result = Result(settings.row, settings.ranks)
    with torch.no_grad():
        start = time.perf_counter()
        row.image(call, generation, inputs, 2)
        synchronize(on_gpu)
        result.first_call_s = time.perf_counter() - start
        for _ in range(2):  # what comes for the second time is recorded
            row.image(call, generation, inputs, settings.steps)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(settings.images):
            result.step_ms += row.image(call, generation, inputs, settings.steps)
    if on_gpu:
        result.peak_memory_gib = peak_bytes() / 2**30
    _explain(call, result)
    return result


def _explain(call: Model, result: Result) -> None:
    import piflux
    from piflux.api import ParallelModule

    if isinstance(call, ParallelModule) and result.ranks > 1:
        report = piflux.explain(call).graphs[-1]
        result.sync_bytes, result.steady_bytes = report.sync_bytes, report.steady_bytes


def build(
    device: torch.device | str, on_gpu: bool, height: int, width: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The transformer with random weights, made on `device`, and its inputs at the first step.

    FLUX.1-dev's architecture in bfloat16 on a GPU, a small one in float32 elsewhere. Latents are
    (1, tokens, 64), embeddings (1, 512, 4096) or (1, 64, 256).
    """
    config, dtype = (FLUX_DEV, torch.bfloat16) if on_gpu else (SMALL, torch.float32)
    model = random_flux(config, device, dtype)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    rows, columns = height // 16, width // 16
    text = TEXT_TOKENS if on_gpu else 64
    grid = torch.cartesian_prod(
        torch.zeros(1), torch.arange(rows) * 1.0, torch.arange(columns) * 1.0
    )
    inputs = {
        "hidden_states": random(1, rows * columns, 64),
        "encoder_hidden_states": random(1, text, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": grid.to(device, dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }
    return model, inputs


def random_flux(
    config: dict[str, Any], device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A FLUX transformer with random weights, the same on every rank, made on `device`."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**config).to(dtype)
    model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def worker(settings: Settings, out: Path) -> None:
    """One rank of a row: `out` is a file for rank 0's result."""
    try:
        result = measure(settings)
    except Exception:
        traceback.print_exc()  # for the row's log: the launcher tells one line of it
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps(asdict(result)))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(settings: str, out: str) -> None:
    """All ranks of a row, which end with this process; `settings` in JSON."""
    row = Settings(**json.loads(settings))
    try:
        launch(worker, row.ranks, row, Path(out))
    except RankFailed as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
