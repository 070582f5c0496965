"""The rows of `piflux bench`: ways to run the model, each in processes of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflux.cost.clock import between, mark, synchronize
from piflux.pipelines.quantized import quantize
from piflux.ranks.copies import peak_bytes
from piflux.tools.bench.models import ARCHITECTURES, TEXT_TOKENS, Architecture, Inputs, build
from piflux.tools.bench.ways import EARLY, Result, Settings

ROW_TIMEOUT_S = 1800
"""After which a rank of a row that doesn't end is ended."""

Model = Callable[..., Any]
Generation = Callable[[Tensor], contextlib.AbstractContextManager[Any]]
Image = Callable[[Model, Generation, Architecture, Inputs, int], list[float]]
Prepared = tuple[Model, Generation]


# --- rows: each makes a model ready to be called step by step -----------------------------------


def _image(
    call: Model, generation: Generation, architecture: Architecture, inputs: Inputs, steps: int
) -> list[float]:
    """One denoise loop of Euler steps: milliseconds of each."""
    latents: Tensor = inputs[architecture.latents]
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    times = [architecture.scale * sigma for sigma in sigmas]
    timesteps = torch.tensor(times, device=latents.device, dtype=latents.dtype)
    marks = [mark(latents.is_cuda)]
    with generation(timesteps[:-1]):
        for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
            step = architecture.step(inputs, latents, timesteps[i : i + 1])
            latents = latents + (then - now) * architecture.predicted(call(**step))
            marks.append(mark(latents.is_cuda))
    return between(marks)


@dataclass(frozen=True)
class Row:
    """How `ways.WAYS` of the same name runs.

    Attributes:
        prepare: from the untouched model, whether it is on a GPU and further settings of
            `parallelize`, where the way takes any, to what is called at each step, and what opens
            an image of given timesteps.
        image: one denoise loop of what is prepared, with such inputs and so many steps:
            milliseconds of each.
    """

    prepare: Callable[..., Prepared]
    image: Image = _image


def _eager(model: nn.Module, on_gpu: bool) -> Prepared:
    return model, contextlib.nullcontext


def _compiled(model: nn.Module, on_gpu: bool) -> Prepared:
    model.compile(fullgraph=True)
    return model, contextlib.nullcontext


def _compiled_blocks(model: Any, on_gpu: bool) -> Prepared:
    model.compile_repeated_blocks(fullgraph=True)
    return model, contextlib.nullcontext


def _piflux(**options: Any) -> Callable[..., Prepared]:
    def prepare(model: nn.Module, on_gpu: bool, **more: Any) -> Prepared:
        import piflux

        # A CPU machine may have no C++ compiler for inductor.
        inner = "inductor" if on_gpu else "eager"
        parallel = piflux.parallelize(model, inner=inner, **options | more)
        return parallel, lambda timesteps: piflux.generation(parallel, timesteps=timesteps)

    return prepare


def _diffusers(kind: str) -> Callable[[nn.Module, bool], Prepared]:
    def prepare(model: Any, on_gpu: bool) -> Prepared:
        from diffusers import ContextParallelConfig

        dist.init_process_group("cpu:gloo,cuda:nccl")
        model.set_attention_backend("_native_cudnn")
        degree = {f"{kind}_degree": dist.get_world_size()}
        model.enable_parallelism(config=ContextParallelConfig(**degree))
        model.compile_repeated_blocks(fullgraph=True)
        return model, contextlib.nullcontext

    return prepare


def _fp8(prepare: Callable[..., Prepared]) -> Callable[..., Prepared]:
    def quantized(model: nn.Module, on_gpu: bool, **more: Any) -> Prepared:
        quantize(model, "fp8")
        return prepare(model, on_gpu, **more)

    return quantized


def _para_attention(model: nn.Module, on_gpu: bool) -> Prepared:
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


def _xdit_ulysses(model: Any, on_gpu: bool) -> Prepared:
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


def _xdit_pipefusion(model: nn.Module, on_gpu: bool) -> Prepared:
    from xfuser import xFuserFluxPipeline

    pipe, config = _xdit(model, pipefusion_parallel_degree=int(os.environ["WORLD_SIZE"]))
    pipe.set_progress_bar_config(disable=True)
    return xFuserFluxPipeline(pipe, config), contextlib.nullcontext


def _pipefusion_image(
    call: Model, generation: Generation, architecture: Architecture, inputs: Inputs, steps: int
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
    "eager": Row(_eager),
    "compiled": Row(_compiled),
    "compiled-blocks": Row(_compiled_blocks),
    "piflux-1": Row(_piflux()),
    "piflux-1-18": Row(_piflux(compute=18)),
    "piflux-1-fp8": Row(_fp8(_piflux())),
    "gather": Row(_piflux(policy="gather")),
    "gather-shared": Row(_piflux(policy="gather", shard_weights=True)),
    "gather-18": Row(_piflux(policy="gather", compute=18)),
    "rotate": Row(_piflux(policy="rotate")),
    "rotate-shared": Row(_piflux(policy="rotate", shard_weights=True)),
    "rotate-18": Row(_piflux(policy="rotate", compute=18)),
    "rotate-fp8": Row(_fp8(_piflux(policy="rotate"))),
    "rotate-fp8-18": Row(_fp8(_piflux(policy="rotate", compute=18))),
    "rotate-recompute": Row(_piflux(policy="rotate", sync="recompute")),
    "rotate-int8": Row(_piflux(policy="rotate", compression="int8")),
    "rotate-int4": Row(_piflux(policy="rotate", compression="int4")),
    "displaced": Row(_piflux(policy="displaced")),
    "displaced-int8": Row(_piflux(policy="displaced", compression="int8")),
    "displaced-int4": Row(_piflux(policy="displaced", compression="int4")),
    "diffusers-ulysses": Row(_diffusers("ulysses")),
    "diffusers-ring": Row(_diffusers("ring")),
    "xdit-ulysses": Row(_xdit_ulysses),
    "xdit-pipefusion": Row(_xdit_pipefusion, image=_pipefusion_image),
    "para-attention": Row(_para_attention),
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
    model, inputs = build(device, on_gpu, settings.height, settings.width, settings.model)
    row, architecture = ROWS[settings.row], ARCHITECTURES[settings.model]
    if settings.quantize != "none":
        quantize(model, settings.quantize)
    more = {"shard_weights": True} if settings.shard_weights else {}
    call, generation = row.prepare(model, on_gpu, **more)
    result = Result(settings.row, settings.ranks)

    def draw(steps: int) -> tuple[float, list[float]]:
        """Seconds of an image, and milliseconds of its steps."""
        synchronize(on_gpu)
        start = time.perf_counter()
        step_ms = row.image(call, generation, architecture, inputs, steps)
        synchronize(on_gpu)
        return time.perf_counter() - start, step_ms

    with torch.no_grad():
        for image in range(EARLY + settings.images):
            if on_gpu and image == EARLY:
                torch.cuda.reset_peak_memory_stats()
            image_s, step_ms = draw(settings.steps)
            result.image_s.append(image_s)
            result.step_ms += step_ms if image >= EARLY else []
        if on_gpu:
            result.peak_memory_gib = peak_bytes() / 2**30
        for steps in settings.further:
            drawn = [draw(steps) for _ in range(EARLY + settings.images)]
            result.further_s[steps] = [image_s for image_s, _ in drawn[EARLY:]]
    _explain(call, result)
    return result


def _explain(call: Model, result: Result) -> None:
    import piflux
    from piflux.api import ParallelModule

    if isinstance(call, ParallelModule) and result.ranks > 1:
        report = piflux.explain(call).graphs[-1]
        result.sync_bytes, result.steady_bytes = report.sync_bytes, report.steady_bytes


def worker(settings: Settings, log: str) -> Result:
    """One rank of a row; what it prints goes to the file `log`. Ends itself after ROW_TIMEOUT_S."""
    with open(log, "a") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    # Its default action ends the process in whatever collective it waits.
    signal.alarm(ROW_TIMEOUT_S)
    try:
        result = measure(settings)
    except Exception:
        traceback.print_exc()  # the launcher tells one line of it
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    return result
