"""Which graphs a model in fragments runs in a call, for ranks to compare.

Python finds the fragments as it goes. A hook, another processor of attention or a branch on one
rank alone gives that rank other graphs, and most of these exchange what fits: all ranks would have
a wrong image. So ranks compare an image's first call graph by graph, once it has run. At the
image's end they compare what later calls ran that the first one did not, and the last output. What
lies between is compared by each step's latents. Steps exchange nothing for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from piflux.ranks.agreement import Constants, Roughly, norm_of


@dataclass(frozen=True)
class Fragment:
    """One graph of a model.

    Attributes:
        ops: what it computes, for ranks to compare.
        constants: of these, likewise.
        place: where the model's code has it, for messages. Ranks may have that in other folders.
    """

    ops: str
    constants: Constants
    place: str

    def differs(self, other: Fragment) -> bool:
        """From what another rank has, or this one had before Dynamo made a constant a symbol."""
        return self.ops != other.ops or self.constants.differs(other.constants)


@dataclass(frozen=True)
class Ran:
    """A graph that ran.

    Attributes:
        fragment: which.
        norms: of what it was called with, parameters excepted; none if they were not asked for.
            What Dynamo leaves out of all graphs shows in them alone.
    """

    fragment: Fragment
    norms: tuple[Roughly, ...]

    def differs(self, other: Ran) -> bool:
        if self.fragment.differs(other.fragment) or len(self.norms) != len(other.norms):
            return True
        return any(map(Roughly.differs, self.norms, other.norms))

    def __str__(self) -> str:
        norms = ", ".join(f"{norm:.6g}" for norm in self.norms)
        ops = f"operations {self.fragment.ops}, constants {self.fragment.constants or 'unknown'}"
        told = [ops, f"inputs of norm {norms}" if norms else ""]
        return "; ".join(filter(None, [*told, self.fragment.place]))


class Graphs:
    """Those that one call of a model runs, in order.

    Args:
        measures: whether to take norms, which stay on the device until they are asked for.
    """

    def __init__(self, measures: bool) -> None:
        self.order: list[Fragment] = []
        self._measures = measures
        self._norms: list[list[Tensor]] = []
        self._calls: Counter[object] = Counter()

    def calls(self, graph: object) -> int:
        """How often `graph` is called by now, this time included."""
        self._calls[graph] += 1  # a graph of a block is called once for each block
        return self._calls[graph]

    def add(self, fragment: Fragment, args: Sequence[object]) -> None:
        """`fragment` is called with `args`."""
        self.order.append(fragment)
        if self._measures:
            given = [x for x in args if not isinstance(x, nn.Parameter)]
            self._norms.append(_norms(given))

    def facts(self, call: str) -> dict[str, Any]:
        """What ranks must have in common of a stream's first call. Waits for the device."""
        return {
            f"graph {i} of {call}": Ran(fragment, tuple(Roughly(x) for x in several))
            for i, (fragment, several) in enumerate(zip(self.order, self._norms, strict=True), 1)
        }

    def others(self, first: Sequence[Fragment], call: str) -> dict[str, Any]:
        """What ranks must have in common of a later one: what is not as it was in the first."""
        facts: dict[str, Any] = {
            f"graph {i} of {call}, other than in the first call": Ran(fragment, ())
            for i, (fragment, then) in enumerate(zip(self.order, first, strict=False), 1)
            if fragment.place != then.place or fragment.differs(then)
        }
        if len(self.order) != len(first):
            facts[f"graphs of {call}, other than in the first call"] = str(len(self.order))
        return facts


def outputs(given: Sequence[object], call: str) -> dict[str, Any]:
    """What ranks must have in common of what a call gave. Waits for the device."""
    return {f"output {i} of {call}": Roughly(x) for i, x in enumerate(_norms(given), 1)}


def _norms(given: Sequence[object]) -> list[Tensor]:
    floats = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    return [norm_of(x.detach()) for x in floats]
