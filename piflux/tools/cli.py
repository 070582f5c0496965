"""The commands of `piflux`.

What a user writes is checked before torch is imported, which takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

import piflux
from piflux.errors import INTERRUPTED, PackageMissing, PifluxError, RankFailed, plain
from piflux.launch import alone, cores, is_first, is_joined, launch
from piflux.policies.schedule import Schedule, sync_steps_of
from piflux.tools import options
from piflux.tools.bench.bench import bench
from piflux.tools.interrupts import importing
from piflux.tools.quality.quality import quality

if TYPE_CHECKING:
    from piflux.tools.doctor import Link

WrongUsage: Any = typer.BadParameter.__base__
"""Click's UsageError, or Typer's own of that name."""


class Commands(TyperGroup):
    """What can go wrong in any command becomes one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        def interrupt(*_: Any) -> NoReturn:
            raise KeyboardInterrupt

        # torchrun ends its ranks itself: there the default, which no collective can hold up.
        before = None if is_joined() else signal.signal(signal.SIGTERM, interrupt)
        try:
            return super().invoke(ctx)
        except WrongUsage as error:
            if is_first():  # all ranks were called alike
                print(f"Error: {_said(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except PifluxError as error:
            if is_first() or isinstance(error, RankFailed):  # the rest fails on every rank alike
                print(f"Error: {plain(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if is_first():
                print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def _said(error: Any) -> str:
    """What a wrong argument comes to, without the name that a library has for its kind."""
    return str(error.format_message()).replace(": Value error, ", ": ")


app = typer.Typer(
    cls=Commands,
    name="piflux",
    help="Diffusion transformers split over ranks by rewriting their graphs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # frames and colours cost a third of what --help takes
)


def _version(asked: bool) -> None:
    if asked:
        print(f"piflux {piflux.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


Ranks = Annotated[
    int | None, typer.Option(min=1, help="Default: the GPUs here, else 2; torchrun's under it.")
]
PolicyOption = Annotated[
    str, typer.Option(help="gather, rotate, displaced, auto, or a file from quality --tune.")
]
Size = Annotated[
    str | None,
    typer.Option(help="Width x height: 1024x768. Default: demo 256x256, else the pipeline's."),
]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file instead, one a line.")] = None,
    model: options.ModelOption = "demo",
    ranks: Ranks = None,
    policy: PolicyOption = "auto",
    sync_steps: options.SyncStepsOption = None,
    refresh_every: options.RefreshOption = None,
    sync: options.SyncOption = "gather",
    order: options.OrderOption = 1,
    compression: options.CompressionOption = "none",
    memory: options.MemoryOption = None,
    compute: options.ComputeOption = "all",
    shard_weights: options.ShardWeightsOption = False,
    quantize: options.QuantizeOnDemandOption = "none",
    offload: options.OffloadOption = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Default: the pipeline's own number.")
    ] = None,
    size: Size = None,
    seed: options.SeedOption = 0,
    guidance: options.GuidanceOption = None,
    negative_prompt: options.NegativeOption = None,
    image: options.ImageOption = None,
    mask: options.MaskOption = None,
    lora: options.LoraOption = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 1,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a video.")] = None,
    fps: Annotated[int, typer.Option(min=1, help="Frames a second of a video.")] = 16,
    inner: Annotated[
        Literal["inductor", "eager"] | None, typer.Option(help="Default: inductor on GPUs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A PNG, or an MP4 for videos; more of them get numbers.")
    ] = None,
    show_: Annotated[bool, typer.Option("--show", help="Draw them in the terminal, too.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the record, nothing else.")] = False,
) -> None:
    """Draw pictures or videos on several ranks, launched here or by torchrun."""
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give either a prompt, or a file of them with --prompts")
    given = options.prompts(prompts) if prompts is not None else [options.prompt(str(prompt))]
    texts = [text for text in given for _ in range(count)]
    if seed + len(texts) - 1 > options.LARGEST_SEED:
        raise typer.BadParameter(f"--seed {seed}: the last of {len(texts)} seeds is beyond 64 bits")
    options.check_model(model)
    known_steps = steps or (28 if model == "demo" else None)
    others = {
        "sync": sync,
        "order": order,
        "compression": compression,
        "compute": compute,
    }
    settings = options.settings(policy, sync_steps, refresh_every, known_steps, **others)
    settings["memory"] = options.memory(memory)
    if quantize == "auto" and memory is None:
        raise typer.BadParameter(
            "--quantize auto turns weights to 8 bits if they don't fit otherwise: say with "
            "--memory into what, auto or GiB"
        )
    pixels = options.size(size)
    if mask is not None and image is None:
        raise typer.BadParameter("--mask says where --image is painted anew: give both")
    options.check_picture("--image", image)
    options.check_picture("--mask", mask)
    loras = options.loras(lora)
    options.check_packages(quantize, loras)
    out = options.picture(out)

    with importing():
        import torch

        from piflux.tools import generate as work
    total = options.ranks(ranks)
    if not options.is_hub_id(model):
        _check_size(model, total, pixels, batch)
    on_gpu = torch.cuda.is_available()
    options.check_gpu(offload=offload, quantize=quantize, memory=settings["memory"])
    # Nobody else looks at these weights, or goes on without one of the ranks that hold them.
    settings["shard_weights"] = shard_weights or ("auto" if memory is not None else False)
    settings["inner"] = inner or ("inductor" if on_gpu else "eager")
    request = work.Request(
        model=str(options.folder_of(model)) if options.is_hub_id(model) else model,
        prompts=tuple(texts),
        out=out,
        settings=settings,
        steps=steps,
        size=pixels,
        seed=seed,
        guidance=guidance,
        negative=negative_prompt,
        image=image,
        mask=mask,
        loras=loras,
        batch=batch,
        frames=frames,
        fps=fps,
        quantize=quantize,
        offload=offload,
    )
    console = Console(stderr=json_)
    if not on_gpu and is_first():
        console.print(f"No CUDA device: {total} rank(s) on the CPU.")
    if is_joined() or total == 1:
        made = alone(work.generate, request)
    else:
        made = launch(work.generate, total, request, outlives=True)
    if made is None:  # another rank's to tell
        return
    made = replace(made, model=model)
    if json_:
        print(json.dumps(asdict(made)))
    for picture in made.pictures:
        if not json_:
            pace = "" if picture.step_s is None else f", {picture.step_s:.3f} s a step (median)"
            together = f", {picture.batch} at once" if picture.batch > 1 else ""
            console.print(
                f"Saved {picture.path}: {picture.total_s:.1f} s{pace} on {made.ranks} rank(s)"
                f"{together}",
                soft_wrap=True,
                markup=False,  # a file's name may look like it
            )
        if show_ and Path(picture.path).suffix.lower() in options.PICTURES:
            work.show_file(picture.path, console)


def _check_size(model: str, ranks: int, pixels: tuple[int, int] | None, batch: int) -> None:
    """Refuses what ranks can't share or hold, where that is known without a call."""
    import torch

    side = options.default_side(model)
    width, height = pixels or (side, side)
    if options.config_of(model, "").get("_class_name") == "FluxPipeline":
        options.check_tokens(ranks, width, height, options.text_tokens(model))
    if pixels is None:
        return
    if torch.cuda.is_available():
        memory = float(ranks * torch.cuda.get_device_properties(0).total_memory)
        options.check_memory(model, width, height, batch, 2, memory, f"{ranks} GPU(s) here")
    else:
        from piflux.tools.records import memory_gib

        memory = memory_gib() * 2**30
        options.check_memory(model, width, height, batch, 4, memory, "this host")


@app.command()
def serve(
    model: options.ModelOption = "demo",
    ranks: Ranks = None,
    host: Annotated[str, typer.Option(help="Name or address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="A file of keys, one a line; also PIFLUX_API_KEYS."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everyone ask who reaches --host.")
    ] = False,
    quality_: Annotated[
        Literal["lossless", "high", "medium", "low"],
        typer.Option("--quality", help="Of requests that name none."),
    ] = "lossless",
    schedule: Annotated[
        list[str] | None,
        typer.Option(help="QUALITY=FILE, of quality --tune, in place of ours. Repeatable."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Compiled before it is ready: 1024x1024,768x1344. Default: the model's."),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Ranks that draw a picture together: 1,2. Default: as the load asks."),
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(help="A folder of NAME.safetensors, which requests name.")
    ] = None,
    quantize: options.QuantizeOption = "none",
    offload: options.OffloadOption = False,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait.")] = 256,
    batch: Annotated[
        int, typer.Option(min=1, help="Of several requests drawn at once, where that is faster.")
    ] = 1,
    deadline: Annotated[
        float, typer.Option(min=1, help="Seconds for a request that names no other.")
    ] = 600.0,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that requests have after SIGTERM.")
    ] = 30.0,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder for compiled code.")
    ] = None,
    inner: Annotated[
        Literal["inductor", "eager"] | None, typer.Option(help="Default: inductor on GPUs.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="By Ray Serve, on the cluster that is there.")
    ] = False,
    replicas: Annotated[
        str, typer.Option(help="With --ray, groups of --ranks: 2, or 1-4, as the queue asks.")
    ] = "1",
    hosts: Annotated[
        int, typer.Option(min=1, help="With --ray, over which a replica's ranks are spread.")
    ] = 1,
) -> None:
    """Warm models behind OpenAI's images API, with a page to draw on.

    SIGTERM or Ctrl-C: what was taken is drawn, and the server ends.
    """
    if is_joined():
        raise typer.BadParameter("piflux serve starts its ranks itself: start it without torchrun")
    options.check_model(model)
    pixels = options.sizes(sizes)
    blocks = options.groups(groups)
    files = options.schedules(schedule)
    if loras is not None and not loras.is_dir():
        raise typer.BadParameter(f"--loras {loras}: no such folder")
    options.check_packages(quantize, () if loras is None else (loras,))
    with importing(), _served():
        from piflux.serving.engine import RankEngine
        from piflux.serving.guard import is_loopback
        from piflux.serving.keys import WrongKeys, read_keys
        from piflux.serving.server import listen, names_of
        from piflux.serving.server import serve as work
    try:
        keys = read_keys(api_keys)
    except WrongKeys as error:
        option = "" if error.file is None else "--api-keys "
        raise typer.BadParameter(f"{option}{error}") from None
    if keys is None and not insecure and not is_loopback(host):
        raise typer.BadParameter(
            f"--host {host}: others reach it, and there are no API keys. Give --api-keys FILE, or "
            "PIFLUX_API_KEYS; or --insecure, if something in front of it checks who asks"
        )
    listening = listen(host, port)  # before torch is waited for
    console = Console(stderr=True)
    tell = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)
    source = str(options.folder_of(model)) if options.is_hub_id(model) else model
    name = model if options.is_hub_id(model) else None
    fitted = quantize != "none" or offload
    if ray and fitted:
        raise typer.BadParameter("--quantize and --offload don't go with --ray")
    if ray:
        at = host, listening.getsockname()[1]
        listening.close()  # Serve's own processes listen
        fewest, most = options.replicas(replicas)
        with importing(), _served("ray"):
            from pydantic import ValidationError

            from piflux.serving.cluster import Settings
            from piflux.serving.cluster.server import serve as work_on_ray
        try:
            settings = Settings(
                model=source if source == "demo" else str(Path(source).resolve()),
                name=name,
                ranks=ranks or 1,
                hosts=hosts,
                replicas=fewest,
                most_replicas=most,
                queue=queue,
                api_keys=None if api_keys is None else api_keys.resolve(),
                insecure=keys is None,
                names=tuple(names_of(host)) if is_loopback(host) else None,
                quality=quality_,
                sizes=pixels,
                groups=blocks,
                loras=None if loras is None else loras.resolve(),
                schedules={quality: file.resolve() for quality, file in files.items()},
                batch=batch,
                deadline_s=deadline,
                drain_s=drain,
                cache=None if cache is None else cache.resolve(),
                inner=inner,
            )
        except ValidationError as error:
            raise typer.BadParameter("; ".join(each["msg"] for each in error.errors())) from None
        work_on_ray(settings, *at, tell=tell)
        return
    if replicas != "1" or hosts != 1:
        raise typer.BadParameter("--replicas and --hosts go with --ray")
    with importing():
        import torch

        from piflux.pipelines.folders import Fit, Fitted
    options.check_gpu(offload=offload, quantize=quantize)
    try:
        engine = RankEngine(
            Fitted(source, Fit(quantize, offload=offload)) if fitted else source,
            options.ranks(ranks),
            name=name or (Path(source).name if fitted else None),
            sizes=pixels,
            groups=blocks,
            queue=queue,
            batch=batch,
            loras=loras,
            schedules=files,
            deadline_s=deadline,
            cache=cache,
            inner=inner or ("inductor" if torch.cuda.is_available() else "eager"),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    work(
        engine,
        listening,
        host,
        keys=keys,
        quality=quality_,
        drain_s=drain,
        tell=tell,
    )


@contextlib.contextmanager
def _served(extra: str = "serve") -> Iterator[None]:
    """Around imports of what the extra brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "piflux":
            raise
        raise PackageMissing(
            f"piflux serve needs the package {error.name!r}: pip install 'piflux[{extra}]'",
            name=error.name,
        ) from error


@app.command()
def explain(
    model: options.ModelOption = "demo",
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    policy: PolicyOption = "rotate",
    sync_steps: options.SyncStepsOption = None,
    refresh_every: options.RefreshOption = None,
    sync: Annotated[
        Literal["gather", "recompute"], typer.Option(help="How a sync step gets them.")
    ] = "gather",
    order: options.OrderOption = 1,
    compression: options.CompressionOption = "none",
    compute: options.ComputeOption = "all",
    shard_weights: options.ShardWeightsOption = False,
    steps: Annotated[int, typer.Option(min=1, help="Of an image, for the predicted time.")] = 28,
    size: Size = None,
    link: Annotated[
        float | None, typer.Option(min=1e-6, help="GB/s that a rank sends: predicts a step.")
    ] = None,
    linear_tflops: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Of a rank's matrix products. Default: measured here."),
    ] = None,
    attention_tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="Likewise of its attention.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=1e-6, help="GiB of a GPU: says which settings fit.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """What the compiler does to a FLUX.1: no weights are read, and no step runs.

    With --link it predicts the time of a step, and which policy 'auto' would choose: arithmetic at
    the rates, shared evenly; what is gathered within a step adds to it, what 'displaced' sends
    hides behind it. Norms, pointwise ops and launching are left out: a lower bound.
    """
    if policy == "auto" and (link is None or ranks == 1):
        raise typer.BadParameter(
            "--policy auto is chosen by what several ranks send each other: give --ranks 2 or "
            "more, and with --link the GB/s that one sends, which piflux doctor measures"
        )
    others = {
        "sync": sync,
        "order": order,
        "compression": compression,
        "compute": compute,
    }
    settings = options.settings(policy, sync_steps, refresh_every, steps, **others)
    side = options.default_side(model)
    width, height = options.size(size) or (side, side)
    config = options.flux_config(model)
    tokens = options.text_tokens(model)
    options.check_tokens(ranks, width, height, tokens)
    with importing():
        import torch

        from piflux.cost.cost import Rates, choose
        from piflux.cost.rates import measure_rates
        from piflux.tools.image_cost import modelled_cost
        from piflux.tools.preview import preview

    dtype = torch.float32 if model == "demo" else torch.bfloat16
    first = settings | (options.chosen("gather") if policy == "auto" else {})
    foreseen = preview(
        config,
        Schedule(**first, world_size=ranks),
        width=width,
        height=height,
        text_tokens=tokens,
        dtype=dtype,
        shard_weights=shard_weights,
    )
    rates = cost = choice = None
    if link is not None:
        if linear_tflops is None or attention_tflops is None:
            measured = measure_rates(
                -(-(width * height // 256 + tokens) // ranks),
                config["num_attention_heads"],
                config["attention_head_dim"],
                dtype,
                "cuda" if torch.cuda.is_available() else "cpu",
            )
            linear_tflops = linear_tflops or measured[0]
            attention_tflops = attention_tflops or measured[1]
        rates = Rates(linear_tflops, attention_tflops, link)
        if ranks > 1:
            remembering = Schedule(**settings | {"policy": "rotate"}, world_size=ranks)
            if policy == "auto":
                few = sync_steps_of(remembering, steps)
                settings["sync_steps"], remembering = few, replace(remembering, sync_steps=few)
            syncs = sum(remembering.step(index).sync for index in range(steps))
            choice = choose(foreseen.layers, rates, steps, syncs)
        if policy == "auto" and choice is not None:
            settings |= options.chosen(choice.policy)
            foreseen = foreseen.under(Schedule(**settings, world_size=ranks))
        alone = sum(layer.compute_s(rates) for layer in foreseen.whole)
        cost = modelled_cost(foreseen.report, steps, alone, link)
    held = {name: foreseen.under(x).report.memory_bytes for name, x in _all_settings(ranks).items()}
    if json_:
        record: dict[str, Any] = {
            "model": model,
            "size": [width, height],
            "report": asdict(foreseen.report),
            "memory_bytes": held,
        }
        for name, found in (("rates", rates), ("predicted", cost), ("choice", choice)):
            record[name] = None if found is None else asdict(found)
        print(json.dumps(record))
        return
    print(foreseen.report)
    if memory is not None:
        for name, count in held.items():
            fits = "fits" if count <= memory * 2**30 else "does not fit"
            print(f"  {name:38} {count / 2**30:7.4g} GiB, {fits} in {memory:g}")
    if cost is not None:
        print(
            f"predicted: {1000 * cost.mean_s:.4g} ms a step (a sync step {1000 * cost.sync_s:.4g}, "
            f"any other {1000 * cost.steady_s:.4g}), one rank alone {1000 * cost.one_s:.4g}"
        )
    if choice is not None:
        print(f"--policy auto: {choice.policy}; {choice.reason}")


def _all_settings(ranks: int) -> dict[str, Schedule]:
    """Those that differ in memory, as options give them."""
    kinds: list[dict[str, Any]] = [{"policy": "gather"}]
    for policy in ("displaced", "rotate"):
        for more in ({}, {"compression": "int8"}, {"compression": "int4"}, {"order": 0}):
            kinds.append({"policy": policy, **more})
    names = [" ".join(f"--{name} {value}" for name, value in kind.items()) for kind in kinds]
    schedules = [Schedule(**kind, world_size=ranks) for kind in kinds]
    return dict(zip(names, schedules, strict=True))


@app.command()
def doctor(
    ranks: Ranks = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the record, nothing else.")] = False,
) -> None:
    """What this host has, how fast links and kernels are, and the policy that suits them.

    The policy is for FLUX.1-dev at 1024 x 1024 where there are GPUs, else for the demo's model.
    """
    with importing():
        import torch

        from piflux.tools import doctor as work
        from piflux.tools.bench.models import FLUX_DEV
        from piflux.tools.records import memory_gib, versions
    count = options.ranks(ranks)
    gpus = work.devices()
    name = "FLUX.1-dev" if gpus else "demo"
    width = height = options.default_side(name)
    if not gpus:
        options.check_cores(count)
    options.check_tokens(count, width, height, options.text_tokens(name))
    shown = is_first() and not json_
    if shown:
        for index, gpu in enumerate(gpus):
            free = f"{gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free"
            _line(f"GPU {index}", f"{gpu.name}, {free}")
        if not gpus:
            _line("GPUs", "none: ranks run on the CPU, over gloo")
        _line("host", f"{cores()} cores, {memory_gib():.1f} GiB")
        for package, number in versions().items():
            _line(package, number)
    found: work.Examined | None = None
    if count > 1:
        asked = {
            "width": width,
            "height": height,
            "text_tokens": options.text_tokens(name),
            "dtype": torch.bfloat16 if gpus else torch.float32,
        }
        config = FLUX_DEV if gpus else options.flux_config("demo")
        examine = config, asked, _tell_link if shown else None
        found = work.examine(*examine) if is_joined() else launch(work.examine, count, *examine)
    if not is_first():
        return
    if json_:
        record = {
            "devices": [asdict(gpu) for gpu in gpus],
            "cores": cores(),
            "memory_gib": memory_gib(),
            "versions": versions(),
            "ranks": count,
            **(asdict(found) if found else {"links": [], "rates": None, "choice": None}),
        }
        print(json.dumps(record))
        return
    if found is None:
        print("One rank: nothing to share, nothing to send.")
        return
    rates = found.rates
    _line("all-gather of all", f"{rates.link_gbs:.3g} GB/s a rank")
    _line("matrix products", f"{rates.linear_tflops:.3g} TFLOP/s")
    _line("attention", f"{rates.attention_tflops:.3g} TFLOP/s")
    print(
        f"For {name} at {width} x {height} on {count} ranks, --policy auto is "
        f"{found.choice.policy}: {found.choice.reason}."
    )


def _tell_link(link: Link) -> None:
    peer = {None: "", True: ", peer access", False: ", no peer access"}[link.peer_access]
    _line(f"link {link.ranks[0]}-{link.ranks[1]}", f"{link.gbs:.3g} GB/s{peer}")


def _line(what: str, found: str) -> None:
    """At once, in a pipe too."""
    print(f"{what:18} {found}", flush=True)


app.command()(bench)
app.command()(quality)
