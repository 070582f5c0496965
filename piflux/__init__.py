"""piflux: diffusion transformers split over ranks by rewriting their graphs."""

from piflux.api import explain as explain
from piflux.api import generation as generation
from piflux.api import parallelize as parallelize
from piflux.compiler import backend as backend
from piflux.errors import CannotCapture as CannotCapture
from piflux.errors import CannotShard as CannotShard
from piflux.errors import NoAttention as NoAttention
from piflux.errors import PifluxError as PifluxError
from piflux.errors import RanksDisagree as RanksDisagree
from piflux.runtime.ranks import virtual_ranks as virtual_ranks
from piflux.schedule import Schedule as Schedule

__version__ = "0.1.0"
