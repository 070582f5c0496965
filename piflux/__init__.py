"""piflux: diffusion transformers split over ranks by rewriting their graphs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "CannotCapture",
    "CannotShard",
    "NoAttention",
    "PifluxError",
    "RanksDisagree",
    "Schedule",
    "backend",
    "explain",
    "generation",
    "parallelize",
    "virtual_ranks",
]

if TYPE_CHECKING:
    from piflux.api import explain as explain
    from piflux.api import generation as generation
    from piflux.api import parallelize as parallelize
    from piflux.compile.compiler import backend as backend
    from piflux.errors import CannotCapture as CannotCapture
    from piflux.errors import CannotShard as CannotShard
    from piflux.errors import NoAttention as NoAttention
    from piflux.errors import PifluxError as PifluxError
    from piflux.errors import RanksDisagree as RanksDisagree
    from piflux.policies.schedule import Schedule as Schedule
    from piflux.ranks.virtual import virtual_ranks as virtual_ranks
else:
    _HOMES = {
        "api": ("explain", "generation", "parallelize"),
        "compile.compiler": ("backend",),
        "errors": ("CannotCapture", "CannotShard", "NoAttention", "PifluxError", "RanksDisagree"),
        "ranks.virtual": ("virtual_ranks",),
        "policies.schedule": ("Schedule",),
    }

    def __getattr__(name: str) -> Any:
        # At the first use: torch takes seconds to import, in which the command must take Ctrl-C.
        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *(name for names in _HOMES.values() for name in names)]


__version__ = "0.1.0"
