"""Seconds from a prompt to pixels: FLUX.1-dev whole, every part at its real size.

Text encoders, transformer and autoencoder have random weights, so the picture is noise; on CPUs
they are small ones. Run once for each way, on the ranks that share the picture:

    torchrun --nproc_per_node=2 benchmarks/end_to_end.py rotate --out out/rotate.json
    torchrun --nproc_per_node=2 benchmarks/end_to_end.py diffusers-ulysses --out out/ulysses.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from decode import autoencoder
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import piflux
from piflux.cost.clock import StepClock, synchronize
from piflux.demo import demo_file
from piflux.launch import is_first, join
from piflux.ranks.copies import peak_bytes
from piflux.tools.bench.models import ARCHITECTURES, random_model
from piflux.tools.records import header, script

PROMPT = "A red fox in fresh snow, early morning light"

# Of FLUX.1-dev's text encoders, CLIP-L and T5-XXL; on CPUs as narrow as the small transformer asks.
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
T5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SMALL_CLIP = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
SMALL_T5 = {"d_model": 256, "d_ff": 512, "num_layers": 2, "num_heads": 4}


@dataclass(frozen=True)
class Result:
    """Medians over the timed calls, on rank 0.

    Attributes:
        total_s: the whole call.
        encode_s: of it, the text encoders.
        decode_s: of it, the autoencoder, joining bands included.
        step_ms: between the ends of two denoise steps.
        peak_memory_gib: most GPU memory allocated; None on CPUs.
    """

    way: str
    ranks: int
    size: int
    steps: int
    total_s: float
    encode_s: float
    decode_s: float
    step_ms: float
    peak_memory_gib: float | None


def flux_dev(device: torch.device) -> FluxPipeline:
    """FLUX.1-dev in bfloat16 with one seed's random weights on every rank.

    The tokenizers are those of the project's own model: what the tokens are is of no account here.
    """
    on_gpu = device.type == "cuda"
    clip, t5 = (CLIP, T5) if on_gpu else (SMALL_CLIP, SMALL_T5)
    flux = ARCHITECTURES["flux.1"]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        text_encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, **clip)).eval()
        text_encoder_2 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **t5)).eval()
    torch.set_default_dtype(torch.float32)
    vae = autoencoder(device, dtype)
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(demo_file("model") / "tokenizer"),
        text_encoder_2=text_encoder_2,
        tokenizer_2=AutoTokenizer.from_pretrained(demo_file("model") / "tokenizer_2"),
        transformer=random_model(flux.kind, flux.config(full=on_gpu), device, dtype),
    )


def prepare(pipe: FluxPipeline, way: str) -> Any:
    """The pipeline, as a rank calls it."""
    if way == "compiled-blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    elif way.startswith("diffusers-"):
        from diffusers import ContextParallelConfig

        pipe.transformer.set_attention_backend("_native_cudnn")
        degree = {f"{way.removeprefix('diffusers-')}_degree": dist.get_world_size()}
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(**degree))
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    else:
        inner = "inductor" if torch.cuda.is_available() else "eager"
        pipe = piflux.parallelize(pipe, policy=way, inner=inner)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def timed(owner: Any, name: str, seconds: list[float], on_gpu: bool) -> Iterator[None]:
    """While it lasts, every call of the method `name` is timed, and waited for."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        synchronize(on_gpu)
        start = time.perf_counter()
        result = method(*args, **kwargs)
        synchronize(on_gpu)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


def main(
    way: Annotated[
        Literal[
            "rotate",
            "gather",
            "displaced",
            "diffusers-ulysses",
            "diffusers-ring",
            "compiled-blocks",
        ],
        typer.Argument(help="compiled-blocks: one rank, without piflux."),
    ],
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 1024,
    steps: Annotated[int, typer.Option(min=3)] = 28,
    calls: Annotated[int, typer.Option(min=1, help="Timed ones, after two to warm up.")] = 3,
    picture: Annotated[Path | None, typer.Option(help="Where the last one goes, PNG.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
) -> None:
    device = join()
    on_gpu = device.type == "cuda"
    if way.startswith("diffusers-") and not dist.is_initialized():
        raise typer.BadParameter(f"{way} is for several ranks: start it with torchrun")
    pipe = prepare(flux_dev(device), way)
    ranks = dist.get_world_size() if dist.is_initialized() else 1

    def draw(steps: int, clock: StepClock | None = None) -> Any:
        return pipe(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=clock,
        ).images[0]

    draw(3)
    draw(steps)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    total: list[float] = []
    encode: list[float] = []
    decode: list[float] = []
    step: list[float] = []
    with timed(pipe, "encode_prompt", encode, on_gpu), timed(pipe.vae, "decode", decode, on_gpu):
        for _ in range(calls):
            clock = StepClock(on_gpu)
            synchronize(on_gpu)
            start = time.perf_counter()
            image = draw(steps, clock)
            synchronize(on_gpu)
            total.append(time.perf_counter() - start)
            step += clock.step_ms()
    if is_first():
        result = Result(
            way,
            ranks,
            size,
            steps,
            *map(statistics.median, (total, encode, decode, step)),
            peak_bytes() / 2**30 if on_gpu else None,
        )
        record = {
            **header(program=script(), ranks=ranks),
            **asdict(result),
        }
        print(json.dumps(record))
        if out is not None:
            out.write_text(json.dumps(record, indent=1) + "\n")
        if picture is not None:
            image.save(picture)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
