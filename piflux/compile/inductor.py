"""How inductor compiles the graphs of this project: what it chooses otherwise than by default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch._inductor.virtualized import V

from piflux.graph.targets import SEND

WIDEST = 4096
"""Numbers in a row that a block of threads holds at once. Measured on an H200 (2026-11-24, torch
2.11): a norm of 2304 rows of 3072 numbers in bfloat16 takes 10 us, and 22 where the row is read
twice, as inductor does from 1024 numbers on."""


@contextlib.contextmanager
def choices(sends: bool) -> Iterator[None]:
    """Inside, inductor compiles for us; others' choices (`V.set_choices_handler`) are put aside.

    Args:
        sends: whether to keep every send ahead of what the graph has behind it.
    """
    options: dict[str, object] = {"inductor_choices_class": Choices}  # part of the cache's key
    if sends:
        options["reorder_for_locality"] = False  # puts a node right before what reads it
        options["reorder_for_peak_memory"] = False  # sorts kernels anew
    with config.patch(options), V.set_choices_handler(Choices()):
        yield


class Choices(InductorChoices):
    """Inductor's own choices but for two."""

    def uuid(self) -> object:
        """What inductor's cache tells these choices by."""
        return get_hash_for_files((str(Path(__file__)),))

    @staticmethod
    def should_use_persistent_reduction(
        features: SIMDKernelFeatures, cooperative_reduction: bool
    ) -> bool:
        """Rows that lie in one piece are read once up to WIDEST, as a transformer's norms have."""
        numel = features.reduction_numel
        once = (
            features.get_reduction_hint() == ReductionHint.INNER
            and not cooperative_reduction
            and numel.is_number
            and numel <= WIDEST
        )
        return once or InductorChoices.should_use_persistent_reduction(
            features, cooperative_reduction
        )

    @staticmethod
    def can_fuse_horizontal(
        scheduler: Scheduler,
        node1: BaseSchedulerNode,
        node2: BaseSchedulerNode,
        shared_data_score: int,
    ) -> bool:
        """No kernel computes a key for a send along with a query that could be computed behind it.

        As both read the same rotary table they would become one, and the send would wait for the
        query's projection.
        """
        first, second = sorted((node1.min_order, node2.min_order))
        return InductorChoices.can_fuse_horizontal(
            scheduler, node1, node2, shared_data_score
        ) and not any(
            first < node.min_order < second and _is_send(node) for node in scheduler.nodes
        )


def _is_send(node: BaseSchedulerNode) -> bool:
    return getattr(node.node, "op_overload", None) is SEND
