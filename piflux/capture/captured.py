"""A graph as Dynamo captured it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from piflux.errors import describe_op, source_line
from piflux.graph.modules import module_of
from piflux.graph.values import tensors


@dataclass(frozen=True, eq=False)
class Captured:
    """One graph of a model, from which programs are made: for any number of ranks, any schedule.

    Attributes:
        module: the graph, which stays as it is.
        example_inputs: what it was captured with: fake tensors, and symbols of sizes.
    """

    module: fx.GraphModule
    example_inputs: Sequence[Any]

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
        """Keep what Dynamo gives to a backend; it clears its own graph when the backend is done."""
        return cls(_copy(gm), tuple(example_inputs))

    @cached_property
    def ops(self) -> str:
        """What it computes, for ranks to compare, whether its sizes are numbers or symbols."""
        nodes = [node for node in self.module.graph.nodes if node.op.startswith("call")]
        ops = [describe_op(node) for node in nodes if tensors(node)]
        return f"{len(ops)}, {zlib.crc32(' '.join(ops).encode()):08x}"

    @cached_property
    def place(self) -> str:
        """Where the model's code begins with it, as 'file:line, in f: code'; '' if not recorded."""
        nodes = (node for node in self.module.graph.nodes if node.op.startswith("call"))
        return next(filter(None, map(source_line, nodes)), "")

    def copy(self) -> fx.GraphModule:
        """The graph, to be changed."""
        return _copy(self.module)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own. Modules and what nodes know of values are shared."""
    return module_of(gm, copy.deepcopy(gm.graph))
