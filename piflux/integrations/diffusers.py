"""What the graph of a transformer can't see of the diffusers pipeline around it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piflux.capture.views import View, view_of
from piflux.errors import CannotCapture, StepsUnforeseen
from piflux.integrations.bands import Bands, MixesRows
from piflux.integrations.times import shown
from piflux.policies.step import Foreseen
from piflux.ranks.groups import serves
from piflux.ranks.processes import ProcessRanks
from piflux.runtime.runtime import Runtime

log = logging.getLogger(__name__)

# Pipelines with two experts (Wan) name the second so; everyone has the first.
TRANSFORMERS = ("transformer", "transformer_2")


def is_pipeline(target: Any) -> bool:
    """Whether `target` is a diffusers pipeline; does not import diffusers."""
    module = sys.modules.get("diffusers.pipelines.pipeline_utils")
    return module is not None and isinstance(target, module.DiffusionPipeline)


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's transformers by component name.

    Raises:
        ValueError: it has none.
    """
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    modules = {name: m for name, m in found.items() if isinstance(m, nn.Module)}
    if not modules:
        raise ValueError(
            f"{type(pipe).__name__} has no transformer: piflux splits diffusion transformers; for "
            "another denoiser call piflux.parallelize on the module itself"
        )
    return modules


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
            "diffusers: transformer.disable_cache()); to save time take fewer steps or more ranks"
        )


# Whether all ranks are in one pipeline's call, none of them in a callback of its own.
_TOGETHER = ContextVar("piflux_together", default=False)


class ParallelPipeline(View):
    """The class that a parallelized pipeline's own class is mixed with."""

    _piflux_runtimes: list[Runtime]
    _piflux_foresees = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One generation: the pipeline's own call, from the same noise on every rank."""
        call = super().__call__  # type: ignore[misc]
        group = _process_group(self._piflux_runtimes)
        signature = inspect.signature(call)
        bound = signature.bind_partial(*args, **kwargs)
        together = False
        if group is not None:
            together = _meet(bound.arguments, "generator" in signature.parameters, group)
        states = [(x, x.get_state()) for x in _generators(bound.arguments)]
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
            for runtime in self._piflux_runtimes:
                stack.enter_context(runtime.generation(foreseen))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

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
        ranks: Any = self._piflux_ranks
        split = (
            _TOGETHER.get()
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

    Only the group's first rank shows a progress bar.
    """
    runtimes = [module._piflux_compiler.runtime for module in modules.values()]
    ranks = runtimes[0].ranks
    view = view_of(pipe, ParallelPipeline, _piflux_runtimes=runtimes)
    view.__dict__ = dict(pipe.__dict__)
    for name, module in modules.items():
        setattr(view, name, module)
    if isinstance(ranks, ProcessRanks):
        vae = getattr(pipe, "vae", None)
        if hasattr(vae, "decode"):
            plain = getattr(vae, "_piflux_target", vae)
            view.vae = view_of(plain, ParallelDecoder, _piflux_ranks=ranks)
        if ranks.rank != 0:
            view.set_progress_bar_config(
                **{**getattr(pipe, "_progress_bar_config", {}), "disable": True}
            )
    return view


def _generators(arguments: Mapping[str, Any]) -> list[torch.Generator]:
    """Those that a call draws from."""
    given = arguments.get("generator")
    several = given if isinstance(given, (list, tuple)) else [given]
    return [x for x in several if isinstance(x, torch.Generator)]


def _process_group(runtimes: list[Runtime]) -> dist.ProcessGroup | None:
    ranks = runtimes[0].ranks
    return ranks.group if isinstance(ranks, ProcessRanks) else None


def _meet(arguments: dict[str, Any], draws: bool, group: dist.ProcessGroup) -> bool:
    """Make a call's arguments fit for all ranks. Returns whether all will decode pictures.

    Where no generator is given they get one with one seed for all ranks: the first of them draws
    it from its own default. In a callback a rank may be alone, for it alone may have one.
    """
    seed = None
    if draws and arguments.get("generator") is None:
        seed = int(torch.randint(2**62, ()))
    mine = seed, arguments.get("output_type") != "latent"
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, mine, group=group)
    if seed is not None:
        shared = next(x for x, _ in everyones if x is not None)
        arguments["generator"] = torch.Generator("cpu").manual_seed(shared)
    for name in ("callback", "callback_on_step_end"):
        callback = arguments.get(name)
        if callback is None:
            continue
        if hasattr(callback, "tensor_inputs"):  # what pipelines read off diffusers' own callbacks
            arguments[f"{name}_tensor_inputs"] = callback.tensor_inputs
        arguments[name] = _apart(callback)
    return all(pictures for _, pictures in everyones)


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
