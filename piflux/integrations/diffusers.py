"""What the graph of a transformer can't see of the diffusers pipeline around it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from piflux.errors import StepsUnforeseen
from piflux.runtime.cache import Foreseen, Runtime
from piflux.runtime.ranks import ProcessRanks

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


class ParallelPipeline:
    """The class that a parallelized pipeline's own class is mixed with."""

    _piflux_runtimes: list[Runtime]
    _piflux_foresees = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One generation: the pipeline's own call, from the same noise on every rank."""
        call = super().__call__  # type: ignore[misc]
        group = _process_group(self._piflux_runtimes)
        bound = inspect.signature(call).bind_partial(*args, **kwargs).arguments
        takes = "generator" in inspect.signature(call).parameters
        if group is not None and takes and bound.get("generator") is None:
            kwargs["generator"] = _shared_generator(group)
        states = [(x, x.get_state()) for x in _generators(bound | kwargs)]
        try:
            return self._piflux_draw(self._piflux_timesteps, *args, **kwargs)
        except StepsUnforeseen:
            log.warning(
                "%s calls its transformer at other times than its scheduler's: drawn once more, "
                "and from now on without knowing them",
                type(self).__name__,
            )
            self._piflux_foresees = False
            for generator, state in states:
                generator.set_state(state)
            return self._piflux_draw(None, *args, **kwargs)

    def _piflux_draw(self, foreseen: Foreseen | None, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for runtime in self._piflux_runtimes:
                stack.enter_context(runtime.generation(foreseen))
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _piflux_timesteps(self) -> Any:
        """Of the image under way; its scheduler has them when the transformer is first called."""
        scheduler = getattr(self, "scheduler", None)
        return getattr(scheduler, "timesteps", None) if self._piflux_foresees else None


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


def _generators(arguments: Mapping[str, Any]) -> list[torch.Generator]:
    """Those that a call draws from."""
    given = arguments.get("generator")
    several = given if isinstance(given, (list, tuple)) else [given]
    return [x for x in several if isinstance(x, torch.Generator)]


def _process_group(runtimes: list[Runtime]) -> dist.ProcessGroup | None:
    ranks = runtimes[0].ranks
    return ranks.group if isinstance(ranks, ProcessRanks) else None


def _shared_generator(group: dist.ProcessGroup) -> torch.Generator:
    """A CPU generator with one seed for all ranks: the first rank's draw from its own default."""
    seed = [int(torch.randint(2**62, ()))]
    dist.broadcast_object_list(seed, group=group, group_src=0)
    return torch.Generator("cpu").manual_seed(seed[0])
