"""What no pass does for itself: lint, recompile, count, time, log and trace."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch import fx
from torch._logging._internal import trace_structured

from piflux.graph.plan import Context
from piflux.passes.refusals import refusing

log = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule, Context], int]


def run_passes(gm: fx.GraphModule, ctx: Context, passes: Sequence[Pass]) -> None:
    """Run `passes` in order over `gm`, in place.

    `TORCH_LOGS="+piflux"` prints a line a pass; with `TORCH_TRACE=dir` the graph before the first
    and after each pass becomes an artifact of the trace.

    Raises:
        CannotShard: what a pass raises, or in place of anything else that makes it fail.
    """
    _trace("piflux_0_captured", gm)
    for number, run in enumerate(passes, start=1):
        start = time.perf_counter()
        with refusing(gm.graph.output_node):
            count = run(gm, ctx)
            gm.graph.lint()
        elapsed = time.perf_counter() - start
        log.info("%-18s %5d nodes %7.3f s", run.__name__, count, elapsed)
        _trace(f"piflux_{number}_{run.__name__}", gm)
    gm.recompile()  # once: writing the code of a graph takes as long as most passes


def _trace(name: str, gm: fx.GraphModule) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )
