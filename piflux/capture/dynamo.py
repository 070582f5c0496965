"""How Dynamo is made to capture a whole model once, and to tell what a backend says.

Each trick stands in a function, or a value, of its own, with the reason for it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import fx, nn

from piflux.errors import PifluxError

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


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


SETTINGS = {
    # Models that warn of deprecated inputs would break the graph at the warning.
    "ignore_logger_methods": set(map(_LoggerMethod, ("debug", "info", "warning", "error"))),
    # One graph for each set of optional inputs, adapters and static or dynamic sizes.
    "recompile_limit": 64,
    # Past the limit Dynamo would else run the model unsharded.
    "fail_on_recompile_limit_hit": True,
}

_NUMBERS = itertools.count()
"""Of the modules parallelized in this process."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
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


def settings() -> contextlib.AbstractContextManager[Any]:
    """Inside, Dynamo has `SETTINGS`. May be entered again and again."""
    return torch._dynamo.config.patch(SETTINGS)


def looking_at_hooks() -> contextlib.AbstractContextManager[Any]:
    """Inside, Dynamo looks at each call whether PyTorch's hooks are the same as when it captured.

    A fragment serves several modules, of which some have hooks.
    """
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)


def call_of(target: nn.Module) -> FunctionType:
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # Dynamo counts recompilations by code object, and remembers by its name which sizes varied.
    # With one of its own a model is not held to account for others of its class: sizes that they
    # were called with don't make its first graph symbolic.
    code = call.__code__.replace(co_name=f"call_{next(_NUMBERS)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def compiled(call: Callable[..., Any], compiler: Backend) -> Callable[..., Any]:
    """What calls `call` by the graphs that `compiler` makes of it."""
    alive = weakref.ref(compiler)

    def piflux(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The compiler, which Dynamo must not keep alive: it remembers backends for good."""
        found = alive()
        assert found is not None, "the module that is being called holds its compiler"
        return found(gm, example_inputs)

    return torch.compile(call, backend=piflux, fullgraph=True)


class Fragments(Protocol):
    """What compiles the graphs of a call that breaks into several, and keeps what it made."""

    def add(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> int:
        """Returns the number of a fragment."""

    def run(self, number: int, args: Sequence[Any]) -> Any:
        """What a fragment gives."""


def in_fragments(call: Callable[..., Any], fragments: Fragments) -> Callable[..., Any]:
    """What calls `call` by several graphs and, between them, as it is written."""
    alive = weakref.ref(fragments)

    def held() -> Fragments:
        found = alive()
        assert found is not None, "the module that is being called holds its fragments"
        return found

    def piflux(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        number = held().add(gm, example_inputs)
        # Dynamo keeps this for good: fragments are of functions that all models of a class share.
        return lambda *args: held().run(number, args)

    return torch.compile(call, backend=piflux)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and all modules within it, once each, in an order that stays.

    `nn.Module.modules` takes nearly three times as long, and each image's first step waits.
    """
    found, known = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    return found


def forget(call: Callable[..., Any]) -> None:
    """Dynamo captures `call` anew."""
    torch._dynamo.eval_frame.reset_code(call.__code__)


def forget_with(owner: object, call: FunctionType) -> None:
    """Once `owner` is gone, Dynamo forgets the graphs of `call`: it keeps a code's for good, and
    they the caches."""
    weakref.finalize(owner, torch._dynamo.eval_frame.reset_code, call.__code__).atexit = False


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Where Dynamo calls a backend: a `PifluxError` reaches the backend's user as what it is.

    Dynamo lets its own `ShortenTraceback` through unchanged, and wraps any other exception of a
    backend in `BackendCompilerFailed`. So the error becomes one of both kinds; not from the
    beginning, since whoever only catches errors need not wait a second for Dynamo's import.
    """
    try:
        yield
    except PifluxError as error:
        from torch._dynamo.exc import ShortenTraceback

        kind = type(error)
        if not isinstance(error, ShortenTraceback):
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            error.__class__ = type(kind.__name__, (kind, ShortenTraceback), names)
            vars(error)["first_useful_frame"] = None  # its traceback stays whole
        raise
