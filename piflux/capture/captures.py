"""By which graphs a model is called: those that it has with the hooks of now.

Dynamo takes seconds to capture a model, and a model is parallelized several times: for groups of
several sizes, for several schedules. What it captures is the same, and is captured once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from types import MethodType
from typing import Any, ClassVar, Protocol
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch.utils._pytree import tree_leaves

from piflux.capture import dynamo
from piflux.capture.captured import Captured, UnfitSizes

Hooks = tuple[Hashable, ...]


def hooks_within(model: nn.Module) -> Hooks:
    """PyTorch's own hooks of a model's forward, each with its module's place and how it is called.

    Dynamo takes them into the graph, and by default doesn't look again whether they are the same.
    To have it look at each call takes a millisecond for every few hundred modules.
    """
    return tuple(
        (place, _held_weakly(hook), number in with_kwargs, number in always)
        for place, module in enumerate(dynamo.modules_of(model))
        if module._forward_pre_hooks or module._forward_hooks
        for hooks, with_kwargs, always in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, ()),
            (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ),
        )
        for number, hook in hooks.items()
    )


def _held_weakly(hook: Callable[..., Any]) -> Hashable:
    """Equal for equal hooks, as long as they are there."""
    try:
        return weakref.WeakMethod(hook) if isinstance(hook, MethodType) else weakref.ref(hook)
    except TypeError:
        return hook  # of a kind that can't be held weakly


class Compiler(Protocol):
    """What makes programs of captured graphs."""

    def install(self, captured: Captured) -> Callable[..., Any]:
        """What is called in the graph's place."""


class Capture:
    """What calls a model by the graphs that it has with some hooks, for one compiler.

    Args:
        target: the model.
        compiler: makes programs of the graphs.
        hooks: that the model has now.

    Attributes:
        hooks, compiler: as given.
        fragments: what calls it by several graphs, with why it is no one graph; None as long as
            nobody asked for them.
        breaks: whether these are to be called.
    """

    def __init__(self, target: nn.Module, compiler: Compiler, hooks: Hooks) -> None:
        self.hooks = hooks
        self.compiler = compiler
        self.fragments: tuple[Callable[..., Any], Exception] | None = None
        self.breaks = False
        self._target = target
        self._shared = WholeCall.of(target, hooks)
        self._own: WholeCall | None = None
        self._kinds: set[Hashable] = set()  # of calls that shared graphs are unfit for

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model by one graph.

        Raises:
            Unsupported: it is none, likewise UserError.
            Exception: whatever the compiler raises, or the model.
        """
        if not self._kinds or _kind(args, kwargs) not in self._kinds:
            try:
                return self._shared.run(self, args, kwargs)
            except UnfitSizes:
                self._kinds.add(_kind(args, kwargs))
        if self._own is not None:
            try:
                return self._own.run(self, args, kwargs)
            except UnfitSizes:  # its program was made anew, for fewer ranks
                self._own.leave(self)
        self._own = WholeCall(self._target)
        return self._own.run(self, args, kwargs)

    def forget(self) -> None:
        """All programs that the compiler made, and the graphs that nobody else is called by."""
        self._shared.leave(self)
        if self._own is not None:
            self._own.leave(self)


_CALLING: ContextVar[Capture] = ContextVar("piflux_calling")
"""Whose program is to run."""


class WholeCall:
    """A call of a model by one graph, for all compilers that have parallelized the model.

    Which graph, Dynamo chooses. Whose program of it runs, is up to who calls.

    Args:
        target: the model.
    """

    _of: ClassVar[WeakValueDictionary[tuple[int, Hooks], WholeCall]] = WeakValueDictionary()

    def __init__(self, target: nn.Module) -> None:
        self._call = dynamo.call_of(target)
        self._run = dynamo.compiled(self._call, self)
        self._graphs: WeakSet[_Graph] = WeakSet()  # as long as Dynamo knows them
        self._users: set[Capture] = set()

    @classmethod
    def of(cls, target: nn.Module, hooks: Hooks) -> WholeCall:
        """That of the model as it is with some hooks."""
        key = id(target), hooks  # which nothing else has as long as the call is there
        found = cls._of.get(key)
        if found is None:
            found = cls._of[key] = cls(target)
        return found

    def run(self, capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises UnfitSizes if Dynamo has chosen a graph that has no program for these inputs."""
        self._users.add(capture)
        before = _CALLING.set(capture)
        try:
            return self._run(*args, **kwargs)
        finally:
            _CALLING.reset(before)

    def leave(self, capture: Capture) -> None:
        """The capture calls no more."""
        self._users.discard(capture)
        for graph in tuple(self._graphs):
            graph.leave(capture)
        if not self._users:
            dynamo.forget(self._call)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return self.install(Captured.of(gm, example_inputs))

    def install(self, captured: Captured) -> Callable[..., Any]:
        """What Dynamo calls in a graph's place, with the program of who calls made."""
        graph = _Graph(captured)
        graph.make(_CALLING.get())
        self._graphs.add(graph)
        return graph


class _Graph:
    """A model's graph, and each compiler's program of it."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._context = TracingContext.try_get()
        self._programs: dict[Capture, Callable[..., Any]] = {}

    def make(self, capture: Capture) -> None:
        """The program of one that has none."""
        with tracing(self._context):
            self._programs[capture] = capture.compiler.install(self._captured)

    def leave(self, capture: Capture) -> None:
        self._programs.pop(capture, None)

    def __call__(self, *args: Any) -> Any:
        capture = _CALLING.get()
        self._captured.sizes.check(args)
        if capture not in self._programs:
            self.make(capture)
            self._captured.sizes.check(args)
        return self._programs[capture](*args)


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    return tuple(x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


class Captures:
    """Those of one parallelized model. Its last sets of hooks are known, so that they may come and
    go by turns.

    Args:
        target: the model.
        compiler: makes programs of the graphs.
    """

    MOST = 2

    def __init__(self, target: nn.Module, compiler: Compiler) -> None:
        self._target, self._compiler = target, compiler
        self._known: list[Capture] = []  # the latest first

    @property
    def latest(self) -> Capture:
        """What is to be called."""
        return self._known[0]

    def choose(self, owner: object) -> bool:
        """Take that of the hooks that the model has now.

        Returns whether another was forgotten. All are once `owner` is gone.
        """
        hooks = hooks_within(self._target)
        if self._known and self.latest.hooks == hooks:
            return False
        found = next((x for x in self._known if x.hooks == hooks), None)
        if not self._known:
            weakref.finalize(owner, self.forget).atexit = False
        if found is None:
            found = Capture(self._target, self._compiler, hooks)
        known = [found, *(x for x in self._known if x is not found)]
        self._known, forgotten = known[: self.MOST], known[self.MOST :]
        for capture in forgotten:
            capture.forget()
        return bool(forgotten)

    def forget(self) -> None:
        """All of them; Dynamo would keep graphs for good, and they the caches."""
        for capture in self._known:
            capture.forget()
