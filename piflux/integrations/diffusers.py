"""What the graph of a transformer can't see of the diffusers pipeline around it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from piflux.capture.views import View, view_of
from piflux.errors import CannotCapture, StepsUnforeseen
from piflux.integrations.alike import Decoder, Edits, facts_of, telling_of_edits
from piflux.integrations.bands import Bands, MixesRows
from piflux.integrations.times import shown
from piflux.policies.masks import Compute
from piflux.policies.step import Foreseen
from piflux.ranks.agreement import check_agreement
from piflux.ranks.groups import serves
from piflux.ranks.processes import ProcessRanks
from piflux.runtime.runtime import Runtime

log = logging.getLogger(__name__)

CALLBACKS = ("callback", "callback_on_step_end")
"""The arguments of pipelines' calls that are called after each step."""


def is_pipeline(target: Any) -> bool:
    """Whether `target` is a diffusers pipeline; does not import diffusers."""
    module = sys.modules.get("diffusers.pipelines.pipeline_utils")
    return module is not None and isinstance(target, module.DiffusionPipeline)


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of the pipeline and of pipelines that it holds, by dotted attribute name.

    They are what diffusers has among its transformers, and components that are named so: a second
    expert (Wan), one for passes without a prompt (Ideogram 4), someone's own. One that several
    pipelines share is named once.

    Raises:
        ValueError: it has none.
    """
    modules: dict[str, nn.Module] = {}
    for path, each in _pipelines_of(pipe):
        for name, module in each.components.items():
            known = any(module is other for other in modules.values())
            if isinstance(module, nn.Module) and _is_transformer(name, module) and not known:
                modules[f"{path}{name}"] = module
    if not modules:
        raise ValueError(
            f"{type(pipe).__name__} has no transformer: piflux splits diffusion transformers; for "
            "another denoiser call piflux.parallelize on the module itself"
        )
    return modules


def _is_transformer(name: str, module: nn.Module) -> bool:
    of_diffusers = any(
        kind.__module__.startswith("diffusers.models.transformers.")
        for kind in type(module).__mro__
    )
    return of_diffusers or "transformer" in name.split("_")


def _pipelines_of(pipe: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The pipeline and those that it holds, with what stands before their components' names."""
    yield path, pipe
    for name, value in vars(pipe).items():
        if is_pipeline(value):
            yield from _pipelines_of(value, f"{path}{name}.")


def has_step_cache(model: nn.Module) -> bool:
    """Whether `enable_cache` was called; free, unlike `refuse_step_caches`."""
    return getattr(model, "is_cache_enabled", False)


def refuse_step_caches(model: nn.Module) -> None:
    """diffusers' step caches decide in Python, block by block, what a step computes or reuses.

    The one graph of all steps can't. Nor would it go together: a block that is left out leaves
    other ranks waiting in their collectives, or remembered keys and values older than they are
    taken for.

    Raises:
        CannotCapture: `model` has one, by `enable_cache` or by hooks of its blocks.
    """
    caches = [type(model._cache_config).__name__] if has_step_cache(model) else []
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hooks = registry.hooks.values() if registry is not None else ()
        caches += [type(hook).__name__ for hook in hooks if hook._is_stateful]
    if caches:
        raise CannotCapture(
            f"{caches[0]} is enabled on this {type(model).__name__}: what it computes changes from "
            "step to step, but piflux captures one graph and runs it in every step. Disable it (in "
            "diffusers: transformer.disable_cache()), and give piflux.parallelize compute='auto', "
            "which leaves out whole steps"
        )


# Whether all ranks are in one pipeline's call, none of them in a callback of its own.
_TOGETHER = ContextVar("piflux_together", default=False)


def ranks_of(pipe: Any) -> ProcessRanks | None:
    """Those that share a parallelized pipeline; None if they are all in this process."""
    ranks = pipe._piflux_modules[0]._piflux_compiler.runtime.ranks
    return ranks if isinstance(ranks, ProcessRanks) else None


def set_compute(pipe: Any, compute: Compute) -> None:
    """Which steps of a parallelized pipeline's next images are computed, on all ranks alike.

    What was compiled stays as it is. `compute` is as in `parallelize`, and was read.
    """
    for runtime in pipe._piflux_runtimes():
        runtime.settle(replace(runtime.schedule, compute=compute))


def sharing(pipe: Any, sister: Any) -> Any:
    """A pipeline like `sister`, of another class with the same parts, with the transformers of the
    parallelized `pipe`: what was compiled serves both."""
    originals = {id(module._piflux_target): module for module in pipe._piflux_modules}
    modules = {name: originals[id(module)] for name, module in transformers_of(sister).items()}
    return parallel_pipeline(sister, modules)


class ParallelPipeline(View):
    """The class that a parallelized pipeline's own class is mixed with."""

    _piflux_modules: list[Any]
    _piflux_decoder: Decoder
    _piflux_foresees = True
    _piflux_votes = False  # whether a rank has a callback, which may edit on that rank alone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One generation: the pipeline's own call, from the same noise on every rank."""
        ranks = ranks_of(self)
        with contextlib.ExitStack() as stack:
            for runtime in self._piflux_runtimes():
                stack.enter_context(runtime.alone(type(self).__name__))
            if ranks is not None:
                stack.enter_context(ranks.image())
            return self._piflux_call(ranks, *args, **kwargs)

    def _piflux_call(self, ranks: ProcessRanks | None, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        signature = inspect.signature(call)
        bound = signature.bind_partial(*args, **kwargs)
        together, edits = False, None
        if ranks is not None:
            ranks.doing = "the pipeline's beginning"
            more = self._piflux_decoder.facts(getattr(self, "vae", None))
            together, edits = _meet(signature, bound.arguments, more, self._piflux_device(), ranks)
        self._piflux_votes = edits is not None
        if any(runtime.schedule.skips for runtime in self._piflux_runtimes()):
            _wrap_callbacks(
                bound.arguments, lambda callback: telling_of_edits(callback, self._piflux_edited)
            )
        calls = sum(module._piflux_calls for module in self._piflux_modules)
        images = self._piflux_images(bound, together)
        if edits is not None:
            assert ranks is not None, "callbacks are watched for other ranks"
            ranks.surviving(lambda: ranks.agree(edits.facts()), "the pipeline's end")
        if calls == sum(module._piflux_calls for module in self._piflux_modules):
            log.warning(
                "%s drew without calling what piflux parallelized: every rank computed all of it",
                type(self).__name__,
            )
        return images

    def _piflux_images(self, bound: inspect.BoundArguments, together: bool) -> Any:
        """Draw, and once more if the steps' times were foreseen wrongly."""
        randoms = [*_generators(bound.arguments), *_defaults(self._piflux_device())]
        states = [(x, x.get_state()) for x in randoms]
        with _set(_TOGETHER, together):
            try:
                return self._piflux_draw(self._piflux_times, *bound.args, **bound.kwargs)
            except StepsUnforeseen:
                log.warning(
                    "%s calls its transformer at other times than its scheduler's: drawn once "
                    "more, and from now on without knowing them",
                    type(self).__name__,
                )
                self._piflux_foresees = False
                for generator, state in states:
                    generator.set_state(state)
                return self._piflux_draw(None, *bound.args, **bound.kwargs)

    def _piflux_draw(self, foreseen: Foreseen | None, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for module, runtime in zip(self._piflux_modules, self._piflux_runtimes(), strict=True):
                stack.enter_context(runtime.generation(foreseen))
                runtime.votes = self._piflux_votes
                type(module)._piflux_unchecked = True
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _piflux_runtimes(self) -> list[Runtime]:
        return [module._piflux_compiler.runtime for module in self._piflux_modules]

    def _piflux_edited(self) -> None:
        """A callback may have edited what the next step is of."""
        for runtime in self._piflux_runtimes():
            runtime.edits += 1

    def _piflux_device(self) -> torch.device:
        """Where the pipeline draws its noise."""
        return torch.device(self._execution_device)  # type: ignore[attr-defined]

    def _piflux_times(self, clock: Tensor) -> Sequence[Tensor]:
        """Of the image under way; its scheduler has them when the transformer is first called."""
        scheduler = getattr(self, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None) if self._piflux_foresees else None
        return [] if timesteps is None else shown(timesteps, clock)


class ParallelDecoder(View):
    """The class that the class of a parallelized pipeline's autoencoder is mixed with."""

    _piflux_ranks: ProcessRanks

    def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Each rank decodes a band of rows, if all are here and the decoder can be split.

        It can be if the latents have a row for every rank, aren't to be taken in tiles, and
        `Bands` knows all of the decoder's ops.
        """
        decode = super().decode  # type: ignore[misc]
        ranks = self._piflux_ranks

        def act() -> Any:
            return self._piflux_decode(decode, latents, *args, **kwargs)

        if not _TOGETHER.get():
            return decode(latents, *args, **kwargs)
        ranks.doing = "decoding"
        return ranks.surviving(act, "decoding")

    def _piflux_decode(
        self, decode: Callable[..., Any], latents: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        ranks = self._piflux_ranks
        split = (
            ranks.size > 1
            and not getattr(self, "use_tiling", False)
            and latents.dim() == 4
            and latents.shape[-2] >= ranks.size
            and serves(ranks, latents.device)
        )
        if not split:
            return decode(latents, *args, **kwargs)
        bands = Bands(ranks, latents.shape[-2])
        band = bands.cut(latents)
        try:
            with bands:
                decoded = decode(band, *args, **kwargs)
        except MixesRows as op:
            log.info("%s decodes on every rank: %s may mix rows", type(self).__name__, op)
            return decode(latents, *args, **kwargs)
        if isinstance(decoded, tuple):
            return (bands.join(decoded[0]),)
        return type(decoded)(sample=bands.join(decoded.sample))


def parallel_pipeline(pipe: Any, modules: Mapping[str, Any]) -> Any:
    """A pipeline like `pipe` with `modules` for its transformers; `pipe` stays as it is.

    Pipelines that it holds are replaced likewise. Only the group's first rank shows a progress bar.
    """
    parallel = list(modules.values())
    ranks = parallel[0]._piflux_compiler.runtime.ranks
    view = view_of(pipe, ParallelPipeline, _piflux_modules=parallel, _piflux_decoder=Decoder())
    view.__dict__ = dict(pipe.__dict__)
    for name, component in pipe.components.items():
        for module in parallel:
            if component is module._piflux_target:
                setattr(view, name, module)
    for name, value in vars(pipe).items():
        if is_pipeline(value):
            setattr(view, name, parallel_pipeline(value, modules))
    if isinstance(ranks, ProcessRanks):
        vae = getattr(pipe, "vae", None)
        if hasattr(vae, "decode"):
            view.vae = _parallel_decoder(vae, ranks)
        if ranks.rank != 0:
            view.set_progress_bar_config(
                **{**getattr(pipe, "_progress_bar_config", {}), "disable": True}
            )
        _offload_to_own_gpu(view)
    return view


def _parallel_decoder(vae: Any, ranks: ProcessRanks) -> Any:
    plain = getattr(vae, "_piflux_target", vae)
    # What `torch.compile` makes of a module compiles its forward, which no pipeline calls, and
    # passes `decode` on.
    plain = getattr(plain, "_orig_mod", plain)
    return view_of(plain, ParallelDecoder, _piflux_ranks=ranks)


def _offload_to_own_gpu(view: Any) -> None:
    """Model offload, where it is enabled or will be, brings weights to this rank's GPU.

    By itself it takes the first GPU for every rank.
    """
    if not torch.cuda.is_available():
        return
    own, chosen = torch.cuda.current_device(), getattr(view, "_offload_device", None)
    view._offload_gpu_id = own
    elsewhere = chosen is not None and chosen.type == "cuda" and chosen.index != own
    if elsewhere and getattr(view, "_all_hooks", None):
        view.enable_model_cpu_offload(gpu_id=own)


def _generators(arguments: Mapping[str, Any]) -> list[torch.Generator]:
    """Those that a call draws from."""
    given = arguments.get("generator")
    several = given if isinstance(given, (list, tuple)) else [given]
    return [x for x in several if isinstance(x, torch.Generator)]


def _defaults(device: torch.device) -> list[torch.Generator]:
    """PyTorch's own, from which a call without a generator draws."""
    found = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    return found


def _meet(
    signature: inspect.Signature,
    arguments: dict[str, Any],
    more: Mapping[str, Any],
    device: torch.device,
    ranks: ProcessRanks,
) -> tuple[bool, Edits | None]:
    """Make a call's arguments fit for all ranks.

    Where no generator is given all ranks draw from what the first one's default generators are at,
    as it would alone. In a callback a rank may be alone, for it alone may have one.

    Returns:
        Whether all will decode pictures, and what callbacks edit, if any rank has one.

    Raises:
        RanksDisagree: on every rank, if they were called with different arguments.
    """
    defaults = {name: x.default for name, x in signature.parameters.items()}
    facts = {**facts_of(defaults | arguments), **more}
    calls_back = any(arguments.get(name) is not None for name in CALLBACKS)
    shares = arguments.get("generator") is None
    states = [x.get_state() for x in _defaults(device)] if shares else []
    mine = arguments.get("output_type") != "latent", calls_back, states
    everyones = ranks.surviving(
        lambda: ranks.exchange((facts, mine), "a pipeline's arguments"), "the pipeline's beginning"
    )
    check_agreement([theirs for theirs, _ in everyones])
    if shares:
        # A rank on the CPU has one generator less than one with a GPU.
        for generator, state in zip(_defaults(device), everyones[0][1][2], strict=False):
            generator.set_state(state)
    edits = Edits()
    _wrap_callbacks(arguments, lambda callback: edits.watching(_apart(callback)))
    pictures = all(pictures for _, (pictures, _, _) in everyones)
    watched = any(watched for _, (_, watched, _) in everyones)
    return pictures, edits if watched else None


def _wrap_callbacks(
    arguments: dict[str, Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Those of a pipeline's call, in place."""
    for name in CALLBACKS:
        callback = arguments.get(name)
        if callback is None:
            continue
        if hasattr(callback, "tensor_inputs"):  # what pipelines read off diffusers' own callbacks
            arguments[f"{name}_tensor_inputs"] = callback.tensor_inputs
        arguments[name] = wrap(callback)


def _apart(callback: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _set(_TOGETHER, False):
            return callback(*args, **kwargs)

    return call


@contextlib.contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
