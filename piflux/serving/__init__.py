"""Warm models behind an API.

`jobs` has the words that the front (HTTP) and the engine (ranks) share. The front is `app`, with
what it needs; `server` runs both.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Keys", "Limits", "build_app"]

if TYPE_CHECKING:
    from piflux.serving.app import build_app as build_app
    from piflux.serving.keys import Keys as Keys
    from piflux.serving.limits import Limits as Limits
else:
    _HOMES = {"build_app": "app", "Keys": "keys", "Limits": "limits"}

    def __getattr__(name: str) -> Any:
        # At the first use: the engine's processes need no HTTP.
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
