"""One capture by Dynamo for all models that are alike, for tests of what comes after it.

Dynamo takes most of the time of a tiny model's first call, and makes the same graph of every model
of a kind, whatever its settings and its weights. Inside of `captured_once` models whose first
calls are alike have their graph from the first of them. Dynamo decides whether it is theirs, by the
guards that it always checks; the compiler, which gets a copy of the graph, is each model's own, and
so is all that it makes of it. How models are captured is for tests outside of it.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import count
from types import CodeType, FunctionType
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch.utils._pytree import tree_flatten

from piflux.capture import dynamo
from piflux.capture.captured import Captured
from piflux.compile.compiler import Compiler

_codes: dict[Hashable, CodeType] = {}
"""By first call. Dynamo remembers by code which graphs it has captured, and which sizes varied."""

_numbers = count()

_called: tuple[Hashable, Compiler]
"""The first call of the model that is being called, and its compiler."""


@contextmanager
def captured_once() -> Iterator[None]:
    """For models that are parallelized inside of it; of a job for ranks, a decorator."""
    with mock.patch.object(dynamo, "compiled", _compiled):
        yield


def _compiled(call: FunctionType, compiler: Compiler) -> Callable[..., Any]:
    """As `dynamo.compiled`, but models that are alike have one code and one backend."""
    first: Hashable = None
    compiled: Callable[..., Any] = call

    def run(*args: Any, **kwargs: Any) -> Any:
        global _called
        nonlocal first, compiled
        if first is None:
            first = _signature(call.__closure__[0].cell_contents, args, kwargs)
            if first not in _codes:
                _codes[first] = call.__code__.replace(co_name=f"alike_{next(_numbers)}")
            code = _codes[first]
            alike = FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
            compiled = torch.compile(alike, backend=_backend, fullgraph=True)
        _called = first, compiler
        return compiled(*args, **kwargs)

    return run


def _signature(target: torch.nn.Module, args: Any, kwargs: Any) -> Hashable:
    leaves, structure = tree_flatten((args, sorted(kwargs.items())))
    kinds = ((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
    return type(target), str(structure), *kinds


def _varied(example_input: Any) -> bool:
    """Whether Dynamo made an input of a number that was not the same in all calls.

    Of an int it makes a symbol, of a float a tensor in double precision.
    """
    if isinstance(example_input, Tensor):
        return example_input.dim() == 0 and example_input.dtype == torch.float64
    return isinstance(example_input, torch.SymInt)


def _backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    first, compiler = _called
    if compiler.reports and any(map(_varied, example_inputs)):
        # Such a graph serves more calls, as of many sizes. A model to come would have it at once,
        # where alone it had one with numbers first.
        _codes.pop(first, None)
    context, captured = TracingContext.get(), Captured.of(gm, example_inputs)
    compiled: WeakKeyDictionary[Compiler, Callable[..., Any]] = WeakKeyDictionary()
    compiled[compiler] = compiler.install(captured)

    def run(*args: Any) -> Any:
        _, compiler = _called
        if compiler not in compiled:
            counters["stats"]["unique_graphs"] += 1  # Dynamo's, which would have captured it
            with tracing(context):
                compiled[compiler] = compiler.install(captured)
        return compiled[compiler](*args)

    return run
