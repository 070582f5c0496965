"""What inductor must leave alone, so that the order of `passes.overlap` reaches the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch._inductor.virtualized import V

_SEND = torch.ops.piflux.send_kv.default


@contextlib.contextmanager
def sends_first() -> Iterator[None]:
    """Inside, inductor keeps every send ahead of what the graph has behind it.

    Choices of one's own (`V.set_choices_handler`) are put aside meanwhile.
    """
    order = {
        "reorder_for_locality": False,  # puts a node right before what reads it
        "reorder_for_peak_memory": False,  # sorts kernels anew
    }
    with config.patch(order), V.set_choices_handler(_Choices()):
        yield


class _Choices(InductorChoices):
    """No kernel computes a key for a send along with a query that could be computed behind it.

    As both read the same rotary table they would become one, and the send would wait for the
    query's projection. Inductor's cache need not know: no other graph has sends.
    """

    @staticmethod
    def can_fuse_horizontal(
        scheduler: Scheduler,
        node1: BaseSchedulerNode,
        node2: BaseSchedulerNode,
        shared_data_score: int,
    ) -> bool:
        first, second = sorted((node1.min_order, node2.min_order))
        return InductorChoices.can_fuse_horizontal(
            scheduler, node1, node2, shared_data_score
        ) and not any(
            first < node.min_order < second and _is_send(node) for node in scheduler.nodes
        )


def _is_send(node: BaseSchedulerNode) -> bool:
    return getattr(node.node, "op_overload", None) is _SEND
