"""Hooks that wrap a module's `forward`: accelerate's, which move weights, and diffusers'.

Some must run around the compiled graph and some can't run at all. A hook of the whole module, such
as `enable_model_cpu_offload` adds, runs before and after the graph. A hook within the module would
have to run in the middle of it, and is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from piflux.errors import CannotCapture


def hooked(model: nn.Module) -> bool:
    """Whether hooks of accelerate decide where the model's weights are."""
    return "_hf_hook" in vars(model)


def breaks_graphs(model: nn.Module, parameter: nn.Parameter | None) -> bool:
    """Whether hooks may work within the model, as cheaply as each call can afford to ask.

    Args:
        model: the whole of it, which group offload always hooks, too.
        parameter: its first, which sequential offload leaves without memory.
    """
    registry = getattr(model, "_diffusers_hook", None)
    return bool(registry is not None and registry.hooks) or (
        parameter is not None and parameter.is_meta
    )


def refuse_hooks(model: nn.Module) -> None:
    """Refuse hooks that move or cast weights in the middle of a step.

    Raises:
        CannotCapture: a submodule has a hook of accelerate, as after sequential offload or with a
            device map, or any module has one of diffusers that breaks the graph on purpose, as
            those of group offload do.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and name:
            _refuse(model, hook, name)
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            if _moves_weights(hook):
                _refuse(model, hook, name)


def _refuse(model: nn.Module, hook: Any, name: str) -> None:
    where = f"on its submodule {name}" if name else "on the model itself"
    raise CannotCapture(
        f"{type(hook).__name__} works within this {type(model).__name__} ({where}): it moves or "
        "casts weights in the middle of a step, but piflux captures the step as one graph. Remove "
        "the hooks (in diffusers: pipe.remove_all_hooks(), or load the model without group offload "
        "and layerwise casting); where memory is short use pipe.enable_model_cpu_offload(), which "
        "moves whole models between steps"
    )


def _moves_weights(hook: Any) -> bool:
    """By the classes of diffusers that the hook's own class is of; diffusers is not imported."""
    return any(
        kind.__module__ in ("diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")
        and kind.__name__ != "PeftInputAutocastDisableHook"
        for kind in type(hook).__mro__
    )


class Forward:
    """The attribute `forward` of a view of a module; see `piflux.capture.views.View`.

    Hooks replace `forward` on the instance, whose `__dict__` the view shares with its target. What
    they wrap must be the compiled graph for the view, and the target's own method for the target,
    whichever of the two they were added to and whether that was before or after. So the shared
    `__dict__` holds what the target is to see, and this descriptor translates.

    Of the view's class it expects `_piflux_target`, `_piflux_core` (the compiled call, with the
    signature of the target's forward) and `_piflux_outer` (what was assigned to the view's forward
    by something unknown, with what had been there before; None at first).
    """

    def __get__(self, view: Any, owner: Any) -> Any:
        if view is None:
            return owner._piflux_core
        outer = _outer(view)
        return view._piflux_core if outer is None else outer

    def __set__(self, view: Any, value: Any) -> None:
        state = vars(view)
        if _is_core(view, value):
            _put(state, "forward", _inner(view))
        elif _is_accelerates(view, value, view):
            state["forward"] = _about(view._piflux_target, value, state["_old_forward"])
        else:
            type(view)._piflux_outer = value, state.get("forward")
            state["forward"] = value

    def __delete__(self, view: Any) -> None:
        vars(view).pop("forward", None)


class OldForward:
    """The attribute under which accelerate keeps the `forward` that its hook wraps."""

    def __get__(self, view: Any, owner: Any) -> Any:
        if view is None or "_old_forward" not in vars(view):
            raise AttributeError("_old_forward")
        return view._piflux_core

    def __set__(self, view: Any, value: Any) -> None:
        if _is_core(view, value):
            value = vars(view).get("forward") or _plain(view)
        vars(view)["_old_forward"] = value

    def __delete__(self, view: Any) -> None:
        vars(view).pop("_old_forward", None)


@contextlib.contextmanager
def within_hooks(view: Any) -> Iterator[None]:
    """While it lasts, the target's `forward` is what the hooks around it wrap.

    So Dynamo captures the same with and without them.
    """
    state = vars(view)
    held = state.get("forward")
    # Where a hook was taken off, accelerate leaves the target's own method.
    inner = held if _outer(view) is None and held != _plain(view) else _inner(view)
    _put(state, "forward", inner)
    try:
        yield
    finally:
        _put(state, "forward", held)


def _outer(view: Any) -> Callable[..., Any] | None:
    """What runs around the compiled graph; None if nothing does."""
    value = vars(view).get("forward")
    if value is None:
        return None
    if _is_accelerates(view, value, view._piflux_target):
        return _about(view, value, view._piflux_core)
    outer = type(view)._piflux_outer
    return value if outer is not None and value is outer[0] else None


def _inner(view: Any) -> Callable[..., Any] | None:
    """What the outermost wrapper wraps: a `forward` that someone gave the target; None for its
    own."""
    state, outer = vars(view), type(view)._piflux_outer
    if outer is not None and state.get("forward") is outer[0]:
        wrapped = outer[1]
    else:
        wrapped = state.get("_old_forward")
    return None if wrapped is None or wrapped == _plain(view) else wrapped


def _put(state: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        state.pop(name, None)
    else:
        state[name] = value


def _is_core(view: Any, value: Any) -> bool:
    return getattr(value, "__func__", None) is type(view)._piflux_core


def _is_accelerates(view: Any, value: Any, module: Any) -> bool:
    """Whether `value` is what accelerate makes of a hook and the module `module`."""
    return (
        hooked(view)
        and isinstance(value, functools.partial)
        and len(value.args) == 1
        and value.args[0] is module
        and "_old_forward" in vars(view)
    )


def _about(
    module: Any, wrapper: functools.partial[Any], wrapped: Callable[..., Any]
) -> functools.partial[Any]:
    """The same wrapper, of another of the two modules that share one state and its `wrapped`."""
    about = functools.partial(wrapper.func, module)
    vars(about).update(vars(wrapper) | {"__wrapped__": wrapped})
    return about


def _plain(view: Any) -> MethodType:
    target = view._piflux_target
    return MethodType(type(target).forward, target)
