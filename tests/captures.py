"""One capture by Dynamo for all models that are alike, for tests of what comes after it.

Dynamo takes most of the time of a tiny model's first call, and makes the same graph of every model
of a kind, whatever its settings and its weights. A model that is first called inside of
`captured_once` has its graphs from those before it that had the same first call and were captured
anew at the same calls. Dynamo decides whether a graph is theirs, by the guards that it always
checks; the compiler, which gets a copy of the graph, is each model's own, and so is all that it
makes of it. How models are captured is for tests outside of it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from types import CodeType, FunctionType
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo import pgo
from torch._dynamo.exc import RecompileError
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch.utils._pytree import tree_flatten

from piflux.capture import dynamo
from piflux.capture.captured import Captured
from piflux.capture.captures import WholeCall

_numbers = count()

_called: WholeCall
"""That of the model that is being called."""


@dataclass
class Stage:
    """A graph, and those that models alike went on to from it.

    Attributes:
        code: of a call. Dynamo remembers by it the one graph, and which sizes varied until then.
        later: by the call at which Dynamo captured anew.
    """

    code: CodeType
    later: dict[Hashable, list[Stage]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def first(cls, code: CodeType) -> Stage:
        return cls(code.replace(co_name=f"alike_{next(_numbers)}"))

    def next(self, called: Hashable) -> Stage:
        """One more, where Dynamo knows of sizes what it knew here."""
        stage = Stage.first(self.code)
        self.later[called].append(stage)
        states = pgo.get_code_state()
        for known in [x for x in states if x.name == self.code.co_name]:
            states[replace(known, name=stage.code.co_name)] = copy.deepcopy(states[known])
        return stage

    def of(self, call: FunctionType) -> Callable[..., Any]:
        alike = FunctionType(self.code, call.__globals__, self.code.co_name, None, call.__closure__)
        return torch.compile(alike, backend=_backend, fullgraph=True)


_first: defaultdict[Hashable, list[Stage]] = defaultdict(list)
"""Those that models begin with, by the first call."""

_sizes_known: Any = None
"""Where Dynamo keeps which sizes varied; it has another place once it was told to forget all."""


@contextmanager
def captured_once() -> Iterator[None]:
    """For models whose first call is inside of it; of a job for ranks, a decorator."""
    with mock.patch.object(dynamo, "compiled", _compiled):
        yield


def _compiled(call: FunctionType, whole: WholeCall) -> Callable[..., Any]:
    """As `dynamo.compiled`, but by the graphs of models that are alike."""
    stages: list[Stage] = []  # that this one went through
    ways: list[Callable[..., Any]] = []  # the same, as functions

    def candidates(called: Hashable) -> Iterator[tuple[Stage, Callable[..., Any]]]:
        """The graphs that Dynamo would look through, then those to go on to, then a new one."""
        global _sizes_known
        if _sizes_known is not pgo.get_code_state():
            _sizes_known = pgo.get_code_state()
            _first.clear()
        yield from zip(reversed(stages), reversed(ways), strict=True)
        for stage in tuple(stages[-1].later[called] if stages else _first[called]):
            yield stage, stage.of(call)
        if stages:
            stage = stages[-1].next(called)
        else:
            stage = Stage.first(call.__code__)
            _first[called].append(stage)
        yield stage, stage.of(call)

    def run(*args: Any, **kwargs: Any) -> Any:
        global _called
        called = _signature(call.__closure__[0].cell_contents, args, kwargs)
        for stage, way in candidates(called):
            _called = whole
            with torch._dynamo.config.patch(error_on_recompile=True):
                try:
                    result = way(*args, **kwargs)
                except RecompileError:
                    continue
            if stage not in stages:
                stages.append(stage)
                ways.append(way)
            return result
        raise AssertionError("a new one has no graph yet that could not be the call's")

    return run


def _signature(target: torch.nn.Module, args: Any, kwargs: Any) -> Hashable:
    leaves, structure = tree_flatten((args, sorted(kwargs.items())))
    kinds = ((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves)
    return type(target), str(structure), *kinds


def _backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    context, captured = TracingContext.get(), Captured.of(gm, example_inputs)
    compiled: WeakKeyDictionary[WholeCall, Callable[..., Any]] = WeakKeyDictionary()
    compiled[_called] = _called.install(captured)

    def run(*args: Any) -> Any:
        whole = _called
        if whole not in compiled:
            counters["stats"]["unique_graphs"] += 1  # Dynamo's, which would have captured it
            with tracing(context):
                compiled[whole] = whole.install(captured)
        return compiled[whole](*args)

    return run
