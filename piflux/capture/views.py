"""A second view of an object: its own state under a class that does one thing differently."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any


class View:
    """The class that the class of a view's target is mixed with.

    A view is an instance of a subclass of the target's class with the very same `__dict__`. So
    `config`, parameters, adapters and every attribute are the target's, whichever of the two they
    are set on, and only what the mixed-in class overrides differs.
    """

    _piflux_target: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or pickle is of the target: process groups can't be copied."""
        return _identity, (self._piflux_target,)


def _identity(x: Any) -> Any:
    return x


def standing_for(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with the name, the documentation and the signature of `original`."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return call


def view_of(target: Any, mixin: type[View], **members: Any) -> Any:
    """A view of `target`, with `members` for attributes of its class.

    The class is the view's own, since whatever the instance holds, the target holds too. It goes by
    the target's name, which diffusers writes into configs and looks up again. Methods that `mixin`
    overrides have the signatures of the target's, by which diffusers chooses what to pass them.
    """
    cls = type(target)
    for name, method in vars(mixin).items():
        if isinstance(method, FunctionType) and hasattr(cls, name):
            members.setdefault(name, standing_for(getattr(cls, name), method))
    members |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_piflux_target": target,
    }
    view: Any = object.__new__(type(cls.__name__, (mixin, cls), members))
    view.__dict__ = target.__dict__
    return view
