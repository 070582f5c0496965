"""FLUX.1-dev's whole pipeline at full size on GPUs that are held to less memory than they have.

    python benchmarks/limited.py /dev/shm/flux --make
    python benchmarks/limited.py /dev/shm/flux --limit 24 --quantize fp8 --offload
    python benchmarks/limited.py /dev/shm/flux --limit 16 --quantize fp8 --offload --shard-weights

The folder that `--make` writes, 34 GB, has random weights, text encoders of full size among them,
and the demo's tokenizers. Pictures are drawn as `piflux generate` draws them. A line of JSON for
each rank: the most memory at once, in GiB, of tensors, of what the allocator has taken for them,
and of all that its GPU has given; by the first also, picture by picture, the median milliseconds of
a step, and seconds from prompt to pixels. Without a GPU it is the demo, and there is no limit.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from piflux.launch import launch
from piflux.ranks.groups import own_device
from piflux.tools import options

T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@dataclass(frozen=True)
class Job:
    """What each rank does.

    Attributes:
        folder: of the pipeline.
        limit: GiB that a rank may hold on its GPU; None for all.
        quantize: see `piflux generate`; likewise `offload`.
        settings: of `parallelize`.
        steps: of a picture; likewise `size`, pixels a side.
        pictures: how many.
    """

    folder: str
    limit: float | None
    quantize: Literal["none", "fp8", "int8"]
    offload: bool
    settings: dict[str, Any]
    steps: int
    size: int
    pictures: int


def make(folder: Path) -> None:
    import diffusers
    import transformers

    from piflux.demo import demo_pipeline
    from piflux.tools.bench.models import random_flux

    pipe: Any = demo_pipeline()
    device = own_device()
    if device.type == "cuda":
        drawn, _ = random_flux(device)
        torch.set_default_dtype(torch.bfloat16)
        with device:
            clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L))
            t5 = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL))
        torch.set_default_dtype(torch.float32)
        pipe = diffusers.FluxPipeline(
            scheduler=drawn.scheduler,
            vae=drawn.vae,
            transformer=drawn.transformer,
            text_encoder=clip,
            tokenizer=pipe.tokenizer,
            text_encoder_2=t5,
            tokenizer_2=pipe.tokenizer_2,
        )
    pipe.save_pretrained(folder)


def work(job: Job) -> None:
    from piflux.ranks.copies import peak_bytes
    from piflux.tools.generate import Request, generate

    device = own_device()
    if job.limit is not None and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(job.limit * 2**30 / whole, device)
    with tempfile.TemporaryDirectory() as folder:
        made = generate(
            Request(
                job.folder,
                tuple(f"a red apple, {i}" for i in range(job.pictures)),
                Path(folder) / "apple.png",
                job.settings,
                steps=job.steps,
                size=(job.size, job.size),
                guidance=3.5,
                quantize=job.quantize,
                offload=job.offload,
            )
        )
    row: dict[str, Any] = {"rank": int(os.environ.get("RANK", "0"))}
    if made is not None:  # on the first rank
        row["step_ms"] = [round(1000 * picture.step_s, 2) for picture in made.pictures]
        row["picture_s"] = [round(picture.total_s, 2) for picture in made.pictures]
    if device.type == "cuda":
        free, all_ = torch.cuda.mem_get_info(device)
        taken = peak_bytes(), torch.cuda.max_memory_reserved(device), all_ - free
        row["gib"] = [round(x / 2**30, 2) for x in taken]
    print(json.dumps(row), flush=True)


def main(
    folder: Path,
    make_: Annotated[bool, typer.Option("--make", help="Write the folder, and no more.")] = False,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    policy: Annotated[Literal["gather", "rotate", "displaced"], typer.Option()] = "gather",
    limit: Annotated[float | None, typer.Option(min=1, help="GiB. Default: all.")] = None,
    quantize: options.QuantizeOption = "none",
    offload: Annotated[bool, typer.Option("--offload")] = False,
    shard_weights: options.ShardWeightsOption = False,
    steps: Annotated[int, typer.Option(min=2)] = 28,
    pictures: Annotated[int, typer.Option(min=1, help="The first compiles.")] = 4,
) -> None:
    if make_:
        make(folder)
        return
    on_gpu = torch.cuda.is_available()
    inner = "inductor" if on_gpu else "eager"
    settings = {"policy": policy, "shard_weights": shard_weights, "inner": inner}
    size = 1024 if on_gpu else 256
    launch(work, ranks, Job(str(folder), limit, quantize, offload, settings, steps, size, pictures))


if __name__ == "__main__":
    typer.run(main)
