"""The server on a cluster, by Ray Serve: `serve run piflux.serving.cluster:app`.

A replica is a leader, which runs an engine, and its ranks, each of them an actor. The front is a
deployment of its own before all replicas: where one of them is lost, it has another one draw what
that had taken.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piflux.serving.cluster.application import app as app
    from piflux.serving.cluster.settings import Settings as Settings
else:
    _HOMES = {"app": "application", "Settings": "settings"}

    def __getattr__(name: str) -> Any:
        # At the first use: a rank's actor needs neither Ray Serve nor HTTP.
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
