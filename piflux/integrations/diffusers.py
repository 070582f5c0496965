"""What the graph of a transformer can't see of the diffusers pipeline around it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from piflux.errors import CannotCapture
from piflux.runtime.cache import Runtime
from piflux.runtime.ranks import ProcessRanks

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


class ParallelPipeline:
    """The class that a parallelized pipeline's own class is mixed with."""

    _piflux_runtimes: list[Runtime]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One generation: the pipeline's own call, from the same noise on every rank."""
        call = super().__call__  # type: ignore[misc]
        group = _process_group(self._piflux_runtimes)
        if group is not None:
            bound = inspect.signature(call).bind_partial(*args, **kwargs).arguments
            if "generator" in inspect.signature(call).parameters and bound.get("generator") is None:
                kwargs["generator"] = _shared_generator(group)
        with contextlib.ExitStack() as stack:
            for runtime in self._piflux_runtimes:
                stack.enter_context(runtime.generation())
            return call(*args, **kwargs)


def parallel_pipeline(pipe: Any, modules: Mapping[str, Any]) -> Any:
    """A pipeline like `pipe` with `modules` for its transformers; `pipe` stays as it is.

    Only the group's first rank shows a progress bar.
    """
    cls = type(pipe)
    runtimes = [module._piflux_compiler.runtime for module in modules.values()]
    group = _process_group(runtimes)
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    view: Any = object.__new__(type(cls.__name__, (ParallelPipeline, cls), members))
    view.__dict__ = dict(pipe.__dict__)
    view._piflux_runtimes = runtimes
    for name, module in modules.items():
        setattr(view, name, module)
    if group is not None and group.rank() != 0:
        view.set_progress_bar_config(
            **{**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        )
    return view


def _process_group(runtimes: list[Runtime]) -> dist.ProcessGroup | None:
    ranks = runtimes[0].ranks
    return ranks.group if isinstance(ranks, ProcessRanks) else None


def _shared_generator(group: dist.ProcessGroup) -> torch.Generator:
    """A CPU generator with one seed for all ranks: the first rank's draw from its own default."""
    seed = [int(torch.randint(2**62, ()))]
    dist.broadcast_object_list(seed, group=group, group_src=0)
    return torch.Generator("cpu").manual_seed(seed[0])
