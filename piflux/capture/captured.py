"""A graph as Dynamo captured it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from piflux.errors import CompileError, describe_op, source_line
from piflux.graph.modules import module_of
from piflux.graph.values import tensors
from piflux.ranks.agreement import Constants


class UnfitSizes(CompileError):
    """Dynamo chose a graph whose program was made for other sizes."""


class Sizes:
    """What programs of one graph ask of its sizes, where these are symbols.

    What the first program asks becomes Dynamo's guards. What later ones ask, such as those for
    fewer ranks, Dynamo does not see: it is checked here, in each call.

    Args:
        example_inputs: of the graph.
    """

    def __init__(self, example_inputs: Sequence[Any]) -> None:
        numbers = {i: x.node for i, x in enumerate(example_inputs) if isinstance(x, torch.SymInt)}
        self._symbols = {i: node.expr for i, node in numbers.items()}
        self._env = next((node.shape_env for node in numbers.values()), None)
        self._first: int | None = None
        self._known: dict[tuple[int, ...], bool] = {}  # by values, and by how much was asked

    def seen(self) -> None:
        """The first program was made, and Dynamo looks at what was asked until now."""
        if self._first is None:
            self._first = self._asked()

    def _asked(self) -> int:
        return 0 if self._env is None else len(self._env.guards)

    def check(self, args: Sequence[Any]) -> None:
        """Raises UnfitSizes if these inputs of the graph don't have what was asked since then."""
        asked = self._asked()
        if asked == self._first:
            return
        values = {symbol: args[i] for i, symbol in self._symbols.items()}
        key = asked, *values.values()
        if key not in self._known:
            assert self._env is not None, "something was asked"
            given = {symbol: sympy.Integer(value) for symbol, value in values.items()}
            guards = self._env.guards[self._first :]
            self._known[key] = all(x.expr.xreplace(given) == sympy.true for x in guards)
        if not self._known[key]:
            told = ", ".join(f"{symbol} = {value}" for symbol, value in values.items())
            raise UnfitSizes(
                f"a program of this graph is not for the sizes {told}: have Dynamo capture the "
                "model anew (torch.compiler.reset())"
            )


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
    def constants(self) -> Constants:
        """Those of its operations that can be no sizes, for ranks to compare."""
        leaves = tree_leaves([(node.args, node.kwargs) for node in self.module.graph.nodes])
        values = [x.meta.get("example_value") for x in leaves if isinstance(x, fx.Node)]
        if any(isinstance(x, (torch.SymFloat, torch.SymBool)) for x in values):
            return Constants()
        told = " ".join(repr(x) for x in leaves if isinstance(x, (float, bool)))
        return Constants(f"{zlib.crc32(told.encode()):08x}")

    @cached_property
    def place(self) -> str:
        """Where the model's code begins with it, as 'file:line, in f: code'; '' if not recorded."""
        nodes = (node for node in self.module.graph.nodes if node.op.startswith("call"))
        return next(filter(None, map(source_line, nodes)), "")

    @cached_property
    def sizes(self) -> Sizes:
        """To be asked for before a program is made."""
        return Sizes(self.example_inputs)

    def copy(self) -> fx.GraphModule:
        """The graph, to be changed."""
        return _copy(self.module)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A module with a graph of its own. Modules and what nodes know of values are shared."""
    return module_of(gm, copy.deepcopy(gm.graph))
