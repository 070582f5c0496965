"""One capture by Dynamo for all models that are alike, for tests of what comes after it.

Dynamo takes most of the time of a tiny model's first call, and makes the same graph of every model
of a kind, whatever its settings and its weights. Inside of `captured_once` models have their graph
from the first of their kind. Dynamo decides whether it is theirs, by the guards that it always
checks; the compiler, which gets a copy of the graph, is each model's own, and so is all that it
makes of it. How models are captured, at a second size above all, is for tests outside of it.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch._guards import TracingContext, tracing

from piflux import api
from piflux.compiler import Compiler

_CODE = api._call(torch.nn.Identity()).__code__
"""What all models call here: Dynamo keeps its graphs by code."""

_called: Compiler
"""That of the model which is being called."""


@contextmanager
def captured_once() -> Iterator[None]:
    """Also a decorator, of jobs for ranks too: those of one file then share their graphs."""
    with mock.patch.object(api, "_compiled", _compiled):
        yield


def shares_captures(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a job for ranks: it runs inside of `captured_once`, as others of its file do."""
    shared = captured_once()(function)
    shared.shares_captures = True
    return shared


def _compiled(call: FunctionType, compiler: Compiler) -> Callable[..., Any]:
    """As `piflux.api._compiled`, but all models have the same code and the same backend."""
    alike = FunctionType(_CODE, call.__globals__, call.__name__, None, call.__closure__)
    compiled = torch.compile(alike, backend=_backend, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        global _called
        _called = compiler
        return compiled(*args, **kwargs)

    return run


def _backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    assert not _called.reports, "a model that is captured twice must have its captures to itself"
    context, untouched = TracingContext.get(), copy.deepcopy(gm)
    compiled: WeakKeyDictionary[Compiler, Callable[..., Any]] = WeakKeyDictionary()
    compiled[_called] = _called(gm, example_inputs)

    def run(*args: Any) -> Any:
        if _called not in compiled:
            with tracing(context):
                compiled[_called] = _called(copy.deepcopy(untouched), example_inputs)
        return compiled[_called](*args)

    return run
