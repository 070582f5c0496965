"""What fails for a reason that nobody foresaw becomes a refusal that names the op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import FrameType

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)

from piflux.errors import CannotShard, DependsOnData, PifluxError
from piflux.graph.values import known


@contextlib.contextmanager
def refusing(node: Callable[[], fx.Node]) -> Iterator[None]:
    """Makes a CannotShard of any other exception.

    Args:
        node: gives the node at fault where the traceback names none.
    """
    try:
        yield
    except PifluxError:
        raise
    except Exception as error:
        at = _looked_at(error) or node()
        unknown = _of_unknown_size(at, error)
        if unknown is not None:
            raise DependsOnData(
                unknown,
                f"has a size that depends on data, here {_unknown_sizes(unknown)}, and the graph "
                "is cut before there is any: let the caller hand in tensors of the length that "
                "counts, or pad to a fixed length and mask",
            ) from error
        first, *_ = str(error).splitlines() or [""]
        raise CannotShard(
            at, f"piflux failed at this op ({type(error).__name__}: {first}): please report it"
        ) from error


def _looked_at(error: BaseException) -> fx.Node | None:
    """The variable `node` of the innermost call that had one: passes and rules call it so."""
    trace = error.__traceback__
    frames: list[FrameType] = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    found = (frame.f_locals.get("node") for frame in reversed(frames))
    return next((node for node in found if isinstance(node, fx.Node)), None)


def _of_unknown_size(node: fx.Node, error: Exception) -> fx.Node | None:
    """The first node with a size that only data tell, if that is what made `node` fail."""
    read = [node, *node.all_input_nodes]
    if not isinstance(error, GuardOnDataDependentSymNode) and not any(map(_unknown_sizes, read)):
        return None
    return next((n for n in node.graph.nodes if _unknown_sizes(n)), None)


def _unknown_sizes(node: fx.Node) -> str:
    value = known(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    sizes = [size for x in values if isinstance(x, Tensor) for size in x.shape]
    return ", ".join(str(size) for size in sizes if free_unbacked_symbols(size))
