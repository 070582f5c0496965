"""Modules of graphs that passes are still to change."""

from __future__ import annotations

from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule


def module_of(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Returns a module of `graph` whose code is written when it is first run or read.

    As Dynamo's own are. Written at once and after each change, code would take a third of the time
    of all passes.
    """
    return _LazyGraphModule(root, graph)
