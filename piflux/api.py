"""`parallelize`, `generation` and `explain`: what a user calls."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported

from piflux.capture.views import View, view_of
from piflux.compile.compiler import Compiler, make_compiler
from piflux.compile.report import Report
from piflux.integrations.diffusers import (
    has_step_cache,
    is_pipeline,
    parallel_pipeline,
    refuse_step_caches,
    transformers_of,
)
from piflux.policies.schedule import BEST_SYNC_STEPS, Compression, Policy, Sync
from piflux.ranks.groups import bring, check_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from piflux.ranks.ranks import VirtualRanks

Target = TypeVar("Target")


class _LoggerMethod(str):
    """What passes for a method of loggers in a set, and for its name in a record of that set.

    torch 2.11 sorts the functions that its config holds to write them as JSON, and logs at each
    compilation that it can't.
    """

    __slots__ = ()

    @property
    def method(self) -> FunctionType:
        found: FunctionType = getattr(logging.Logger, str(self))
        return found

    def __eq__(self, other: object) -> bool:
        return other is self.method

    def __hash__(self) -> int:
        return hash(self.method)


_DYNAMO = {
    # Models that warn of deprecated inputs would break the graph at the warning.
    "ignore_logger_methods": set(map(_LoggerMethod, ("debug", "info", "warning", "error"))),
    # One graph for each set of optional inputs, adapters and static or dynamic sizes.
    "recompile_limit": 64,
}

_NUMBERS = itertools.count()
"""Of the modules parallelized in this process."""


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Garbage is collected after the call, not in it.

    A first call makes a million objects that stay. With a pipeline's modules loaded, looking
    through all objects for garbage again and again would take a sixth of it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ParallelModule(View, nn.Module):
    """The class that a parallelized module's own class is mixed with; see `View`."""

    _piflux_compiler: Compiler
    _piflux_compiled: Callable[..., Any]
    _piflux_settings: contextlib.AbstractContextManager[Any]

    # Not `forward`: hooks live in the shared `__dict__`, and the target's own call runs them.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameter = next(self.parameters(), None)
        if parameter is not None:
            check_device(self._piflux_compiler.runtime.ranks, parameter.device)
        if has_step_cache(self):
            refuse_step_caches(self)
        with torch.no_grad(), self._piflux_settings, _uncollected():
            if not self._piflux_compiler.reports:
                self._piflux_compiler.prepare()
            try:
                return self._piflux_compiled(*args, **kwargs)
            except Unsupported:
                refuse_step_caches(self)
                if self._piflux_compiler.reports:
                    raise
            # Dynamo need not follow how a first call makes what later ones find: rotary tables.
            self._piflux_target(*args, **kwargs)
            return self._piflux_compiled(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


def parallelize(
    target: Target,
    *,
    group: ProcessGroup | DeviceMesh | VirtualRanks | None = None,
    policy: Policy | str = "rotate",
    sync_steps: int | Sequence[int] = BEST_SYNC_STEPS,
    refresh_every: int | None = None,
    sync: Sync = "gather",
    order: int = 1,
    compression: Compression = "none",
    inner: str | Callable[..., Any] = "inductor",
) -> Target:
    """Split a diffusion transformer, or a diffusers pipeline's, over the ranks of `group`.

    Args:
        target: a module with scaled dot product attention, or a diffusers pipeline. It stays as it
            is, but is moved to this rank's GPU if it is on another one; the result is a drop-in
            that shares its parameters. The module is compiled at its first call, once per input
            signature, for inference only.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group. With none
            initialised and torchrun's environment present, it is initialised; else one rank runs
            alone. `piflux.virtual_ranks(n)` simulates n ranks in this process.
        policy: where attention gets the other parts' keys and values: 'gather' (fresh, exact),
            'rotate' or 'displaced' (remembered). Or the path of a `.json` file with settings that
            take the place of these, as `piflux quality --tune` writes it.
        sync_steps: the sync steps, which gather everything: their numbers, or how many of the
            first steps.
        refresh_every: afterwards, gather everything once in so many steps.
        sync: how a sync step comes by them: 'gather', or 'recompute', where each rank computes
            the whole step without any traffic, for links slower than that, and a second graph is
            compiled. 'auto' measures the link and two kernels at the first call, and chooses what
            is faster, on all ranks alike; `explain` says why.
        order: 1: attention reads remembered keys and values moved on to this step's noise level,
            by the change between their last two versions, which takes a second cache. 0: it reads
            them as they were.
        compression: 'int8': that change is remembered in 8 bits a number in place of the second
            version, and is what 'displaced' sends in steady steps. 'none': as the model computes.
        inner: the Dynamo backend that compiles the final graph: 'inductor', or 'eager' to debug.

    Returns:
        For a module, a module of the same class. For a pipeline, a pipeline of the same class
        whose every call is one generation, and whose ranks start from the same noise and decode
        a band of the picture's rows each.

    Raises:
        ValueError: a setting out of range, a target already parallelized, a foreign group.
        TypeError: a target that is neither a module nor a pipeline.
        RuntimeError: CUDA asked for where there is none, or weights kept on another rank's GPU.
        RankFailed: there are fewer GPUs than ranks on this host.
        CannotCapture: one of diffusers' step caches is enabled; at the next call, if it is later.
        CannotShard, NoAttention, RanksDisagree: at the first call; see `piflux.errors`.
    """
    settings: dict[str, Any] = {
        "group": group,
        "policy": policy,
        "sync_steps": sync_steps,
        "refresh_every": refresh_every,
        "sync": sync,
        "order": order,
        "compression": compression,
        "inner": inner,
    }
    if is_pipeline(target):
        transformers = transformers_of(target)
        compilers = {name: make_compiler(**settings) for name in transformers}
        pipe: Any = target
        others = [x for x in pipe.components.values() if isinstance(x, nn.Module)]
        for name, module in transformers.items():
            bring(compilers[name].runtime.ranks, module, others)
        parts = {
            name: _parallel_module(module, compilers[name]) for name, module in transformers.items()
        }
        return parallel_pipeline(target, parts)
    if isinstance(target, nn.Module):
        return _parallel_module(target, make_compiler(**settings))
    raise TypeError(
        "piflux.parallelize takes an nn.Module or a diffusers pipeline, got "
        f"{type(target).__module__}.{type(target).__name__}"
    )


def _parallel_module(target: nn.Module, compiler: Compiler) -> Any:
    if isinstance(target, ParallelModule):
        raise ValueError(
            f"this {type(target).__name__} is already parallelized: pass the original module"
        )
    if isinstance(target, torch._dynamo.OptimizedModule):
        raise ValueError(
            "this module is already wrapped by torch.compile: pass the original module; "
            "parallelize compiles it"
        )
    refuse_step_caches(target)
    bring(compiler.runtime.ranks, target)
    check_device(
        compiler.runtime.ranks, next((p.device for p in target.parameters()), torch.device("cpu"))
    )
    call = _call(target)
    view = view_of(
        target,
        ParallelModule,
        _piflux_compiler=compiler,
        _piflux_settings=torch._dynamo.config.patch(_DYNAMO),
        _piflux_compiled=staticmethod(_compiled(call, compiler)),
    )
    # Dynamo would keep the code's graphs for good, and they the caches.
    weakref.finalize(view, torch._dynamo.eval_frame.reset_code, call.__code__).atexit = False
    return view


def _call(target: nn.Module) -> FunctionType:
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # Dynamo counts recompilations by code object, and remembers by its name which sizes varied.
    # With one of its own a model is not held to account for others of its class: sizes that they
    # were called with don't make its first graph symbolic.
    code = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def _compiled(call: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    alive = weakref.ref(compiler)

    def piflux(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The compiler, which Dynamo must not keep alive: it remembers backends for good."""
        found = alive()
        assert found is not None, "the module that is being called holds its compiler"
        return found(gm, example_inputs)

    # fullgraph: past its recompile limit Dynamo would else run the model unsharded.
    return torch.compile(call, backend=piflux, fullgraph=True)


def _compilers(target: Any) -> list[Compiler]:
    modules = transformers_of(target).values() if is_pipeline(target) else [target]
    found = [m._piflux_compiler for m in modules if isinstance(m, ParallelModule)]
    if not found:
        raise TypeError(
            f"this {type(target).__name__} is not parallelized: pass what piflux.parallelize gave"
        )
    return found


@contextlib.contextmanager
def generation(target: Any, *, timesteps: Tensor | None = None) -> Iterator[None]:
    """One image: inside the block calls are its denoise steps, and the first is step 0.

    A parallelized pipeline does this by itself at every call. Without it the beginning of an image
    is inferred from the inputs, at the price of a host-device synchronisation each step. Calls with
    the same conditions are steps of one image, so two images of one prompt can't take turns here.

    Args:
        target: what `parallelize` gave.
        timesteps: (steps,): those that the model will be called with, in any order, or the
            scheduler's, which diffusers' models get as thousandths. What depends on them alone is
            then computed for all steps at once.

    Raises:
        TypeError: the target isn't parallelized.
        StepsUnforeseen: at the end, if the first of `timesteps` was met and a later step's was not.
    """
    foreseen = None if timesteps is None else lambda: timesteps
    with contextlib.ExitStack() as stack:
        for compiler in _compilers(target):
            stack.enter_context(compiler.runtime.generation(foreseen))
        yield


def explain(target: Any) -> Report:
    """What the compiler did to a parallelized module or pipeline, graph by graph.

    Raises:
        TypeError: the target isn't parallelized.
    """
    return Report(tuple(r for compiler in _compilers(target) for r in compiler.reports))
