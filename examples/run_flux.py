"""FLUX on several ranks: `torchrun --nproc_per_node=2 examples/run_flux.py --print-output`."""

import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from rich.console import Console
from rich.table import Table

import piflux
from piflux.cost.clock import StepClock, synchronize
from piflux.demo import NOTE, PROMPTS
from piflux.pipelines.arguments import arguments
from piflux.pipelines.folders import add_loras, as_kind, load, pipeline_class
from piflux.ranks.copies import peak_bytes
from piflux.ranks.groups import own_device
from piflux.tools import options
from piflux.tools.bench.models import FLUX_DEV, random_model
from piflux.tools.generate import Request, show

RANDOM_NOTE = (
    "The weights are random: FLUX.1-dev's architecture, timed without its checkpoint. "
    "No image, and prompts are without effect: there is neither VAE nor text encoder."
)

console = Console()


@dataclass(frozen=True)
class Result:
    """What rank 0 measured in the timed call; warm-ups, and so compilation, come before it.

    Attributes:
        pictures: drawn in one batch.
        step_ms: milliseconds from the end of one denoise step to the end of the next. The first
            step has no entry, since text encoding runs before it.
        total_s: seconds of the whole call, with text encoders and VAE where there are any.
        peak_memory_gib: most GPU memory allocated during the call; None on CPUs.
        note: what has to be said wherever the image or the times are shown.
    """

    model: str
    device: str
    torch: str
    ranks: int
    policy: str
    sync_steps: tuple[int, ...] | int
    refresh_every: int | None
    sync: str
    compiled: bool
    height: int
    width: int
    pictures: int
    steps: int
    step_ms: list[float]
    median_step_ms: float
    total_s: float
    peak_memory_gib: float | None
    note: str


def main(
    model: Annotated[
        str, typer.Option(help="A local folder, a hub id, or 'demo': piflux's small pipeline.")
    ] = "black-forest-labs/FLUX.1-dev",
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="FLUX.1-dev's architecture, random weights; latents only."
        ),
    ] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Default: one that suits the model. Repeatable: all are drawn in one batch."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 28,
    seed: options.SeedOption = 0,
    height: Annotated[int | None, typer.Option(help="Default: 1024; demo: 256.")] = None,
    width: Annotated[int | None, typer.Option(help="Default: 1024; demo: 256.")] = None,
    guidance_scale: options.GuidanceOption = 3.5,
    warmups: Annotated[int, typer.Option(min=0, help="Short untimed calls before.")] = 1,
    policy: Annotated[
        Literal["gather", "rotate", "displaced", "none"],
        typer.Option(help="'none': one rank without piflux, to compare with."),
    ] = "rotate",
    sync_steps: options.SyncStepsOption = None,
    refresh_every: options.RefreshOption = None,
    sync: options.SyncOption = "gather",
    order: options.OrderOption = 1,
    compression: options.CompressionOption = "none",
    compute: options.ComputeOption = "all",
    negative_prompt: options.NegativeOption = None,
    image: options.ImageOption = None,
    mask: options.MaskOption = None,
    lora: options.LoraOption = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, in one batch.")] = 1,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="By inductor. Default: on a GPU."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the image goes; several get numbers.")] = Path(
        "out/flux.png"
    ),
    print_output: Annotated[
        bool, typer.Option("--print-output", help="Draw it in the terminal as well.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the measurements go.")
    ] = None,
) -> None:
    """Make an image with FLUX, or several at once, on all ranks that torchrun started; time it."""
    try:
        device = own_device()
    except piflux.PifluxError as error:
        raise typer.BadParameter(str(error)) from None
    demo = model == "demo" or (device.type == "cpu" and not random_weights)
    default_size = options.default_side("demo" if demo else model)
    height = default_size if height is None else height
    width = default_size if width is None else width
    compile_ = device.type == "cuda" if compile_ is None else compile_
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check_arguments(model, random_weights, device, height, width, policy, ranks)
    settings = options.settings(
        "rotate" if policy == "none" else policy,
        sync_steps,
        refresh_every,
        steps,
        sync=sync,
        order=order,
        compression=compression,
        compute=compute,
    )
    say = console.print if int(os.environ.get("RANK", "0")) == 0 else lambda *_: None
    texts = prompt or [PROMPTS[0] if demo else "A red fox in fresh snow, early morning light"]
    texts = [options.prompt(text) for text in texts for _ in range(count)]

    if random_weights:
        if prompt or negative_prompt or image or mask or lora:
            say("Random weights ignore the prompt, and what else says what to draw.")
        pipe: Any = random_flux_dev(device)
        call = random_embeddings(device) | {"output_type": "latent"}
        call |= {"height": height, "width": width, "guidance_scale": guidance_scale}
    else:
        if demo and model != "demo":
            say(f"No CUDA device: piflux's small pipeline runs instead of {model}.")
        request = Request(
            model="demo" if demo else str(options.folder_of(model)),
            prompts=tuple(texts),
            out=None,
            settings=settings,
            steps=steps,
            size=(width, height),
            guidance=guidance_scale,
            negative=negative_prompt,
            image=image,
            mask=mask,
            loras=options.loras(lora),
        )
        try:
            pipe, call = prepared(request, device)
        except piflux.PifluxError as error:
            raise typer.BadParameter(str(error)) from None

    if policy == "none":
        pipe.set_progress_bar_config(disable=None)
        if compile_:
            pipe.transformer.compile(fullgraph=True)
    else:
        pipe = piflux.parallelize(
            pipe,
            **settings,
            inner="inductor" if compile_ else "eager",
        )

    pictures = 1 if random_weights else len(texts)

    def generate(num_inference_steps: int, clock: StepClock | None = None) -> Any:
        """The images, or latents of shape (1, tokens, 64); the same noise at every call."""
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(pictures)]
        return pipe(
            **call,
            num_inference_steps=num_inference_steps,
            generator=generators,
            callback_on_step_end=clock,
        ).images

    for _ in range(warmups):
        generate(min(steps, 3))  # one step of each kind, and one to spare
    clock = StepClock(device.type == "cuda")
    synchronize(device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    images = generate(steps, clock)
    synchronize(device.type == "cuda")
    total_s = time.perf_counter() - start

    step_ms = clock.step_ms()
    result = Result(
        model="demo" if demo else "FLUX.1-dev, random weights" if random_weights else model,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        ranks=ranks,
        policy=policy,
        sync_steps=settings["sync_steps"],
        refresh_every=refresh_every,
        sync=sync,
        compiled=compile_,
        height=height,
        width=width,
        pictures=pictures,
        steps=steps,
        step_ms=step_ms,
        median_step_ms=statistics.median(step_ms) if step_ms else total_s * 1000,
        total_s=total_s,
        peak_memory_gib=peak_bytes() / 2**30 if device.type == "cuda" else None,
        note=NOTE if demo else RANDOM_NOTE if random_weights else "",
    )
    if int(os.environ.get("RANK", "0")) == 0:
        report(result)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(asdict(result), indent=2) + "\n")
        if not random_weights:
            output.parent.mkdir(parents=True, exist_ok=True)
            for image, path in zip(images, options.numbered(output, pictures), strict=True):
                image.save(path)
                console.print(f"Saved {path}")
                if print_output:
                    show(image, console)
    if dist.is_initialized():
        dist.destroy_process_group()


def prepared(request: Request, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline that draws what is asked for, all pictures in one batch, and its arguments."""
    kind = pipeline_class(request.model)
    target, call = arguments(kind, request.asked())
    pipe, more = load(request.model, device)
    add_loras(pipe, request.loras)
    pipe = as_kind(pipe, target)
    del call["num_inference_steps"]  # warm-ups take fewer
    if request.negative is not None:
        call["negative_prompt"] = [request.negative] * len(request.prompts)
    return pipe, call | more | {"prompt": list(request.prompts)}


def check_arguments(
    model: str,
    random_weights: bool,
    device: torch.device,
    height: int,
    width: int,
    policy: str,
    ranks: int,
) -> None:
    """Raises typer.BadParameter for what can only fail later, and slower."""
    options.check_side("--height", height)
    options.check_side("--width", width)
    if policy == "none" and ranks > 1:
        raise typer.BadParameter(
            f"--policy none is for one rank, not {ranks}: start it with --nproc_per_node=1"
        )
    if random_weights:
        if device.type == "cpu":
            raise typer.BadParameter(
                "--random-weights makes 24 GB of weights on a GPU, and there is no CUDA device: "
                "use --model demo"
            )
    else:
        options.check_model(model)


def random_flux_dev(device: torch.device) -> FluxPipeline:
    """FLUX.1-dev's transformer in bfloat16 with random weights, made on `device`; nothing else."""
    transformer = random_model("FluxTransformer2DModel", FLUX_DEV, device, torch.bfloat16)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def random_embeddings(device: torch.device) -> dict[str, torch.Tensor]:
    """What FLUX.1-dev's text encoders would give: (1, 512, 4096) and (1, 768), bfloat16."""
    generator = torch.Generator("cpu").manual_seed(0)  # a CPU's: the same on every kind of GPU
    shapes = {"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)}
    return {
        name: torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for name, shape in shapes.items()
    }


def report(result: Result) -> None:
    table = Table("", "", show_header=False)
    table.add_row("model", result.model)
    table.add_row("ranks", f"{result.ranks} x {result.device}")
    table.add_row("policy", result.policy)
    table.add_row("compiled", "by inductor" if result.compiled else "no")
    size = f"{result.width} x {result.height}"
    table.add_row("pictures", f"{result.pictures}, {size}, {result.steps} steps")
    table.add_row("a step", f"{result.median_step_ms:.1f} ms (median)")
    table.add_row("whole call", f"{result.total_s:.2f} s")
    if result.peak_memory_gib is not None:
        table.add_row("peak memory", f"{result.peak_memory_gib:.1f} GiB on rank 0")
    console.print(table)
    if result.note:
        console.print(result.note)


if __name__ == "__main__":
    typer.run(main)
