"""A graph as Dynamo captured it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True, eq=False)
class Captured:
    """One graph of a model, from which programs are made: for any number of ranks, any schedule.

    Attributes:
        module: the graph, which stays as it is.
        example_inputs: what it was captured with: fake tensors, and symbols of sizes.
    """

    module: fx.GraphModule
    example_inputs: Sequence[Any]

    def copy(self) -> fx.GraphModule:
        """The graph, to be changed. Its modules and what its nodes know of values are shared."""
        return fx.GraphModule(self.module, copy.deepcopy(self.module.graph))
