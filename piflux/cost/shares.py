"""Weights that are shared over the ranks: what of them a rank holds, and what it sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from piflux.graph.blocks import Block
from piflux.graph.plan import Gathered
from piflux.graph.sizes import bytes_of
from piflux.graph.values import parts_of, tensors

BUFFERS = 2
"""Groups of weights that have memory at once: one is read while the next arrives."""


@dataclass(frozen=True)
class SharedWeights:
    """Bytes of the groups of weights that are gathered.

    Attributes:
        world_size: the number of ranks.
        step: of each that every step gathers.
        image: of each that is gathered once an image, where its times are known, else with every
            step, too.
    """

    world_size: int
    step: tuple[int, ...]
    image: tuple[int, ...] = ()

    @classmethod
    def of(cls, gathered: Sequence[Gathered], world_size: int) -> SharedWeights:
        """As the pass `fetch` left them."""
        return cls(
            world_size,
            tuple(x.bytes for x in gathered if not x.hoisted),
            tuple(x.bytes for x in gathered if x.hoisted),
        )

    @property
    def whole_bytes(self) -> int:
        """Of all of them, as each rank has them that shares nothing."""
        return sum(self.step) + sum(self.image)

    @property
    def held_bytes(self) -> int:
        """What a rank holds in their place: its shares, and the buffers."""
        groups = (*self.step, *self.image)
        return self.whole_bytes // self.world_size + BUFFERS * max(groups, default=0)

    def among(self, weights: int) -> int:
        """Bytes of all weights that a rank holds, of so many that one has that shares nothing."""
        return weights - self.whole_bytes + self.held_bytes

    @property
    def step_bytes(self) -> int:
        """What a rank sends for all others to have its shares, in a step."""
        return sum(self.step) * (self.world_size - 1) // self.world_size

    @property
    def image_bytes(self) -> int:
        """Likewise beside that, once an image."""
        return sum(self.image) * (self.world_size - 1) // self.world_size

    def wait_s(self, compute_s: float, link_gbs: float) -> float:
        """How much longer a step takes that computes for `compute_s`, on a link of so many GB/s.

        While one group is computed with, the next is gathered. The step ends with the last one's
        computing, which hides nothing, and groups take time to compute as they have weights.
        """
        if not self.step:
            return 0.0
        travel = self.step_bytes / link_gbs / 1e9
        beside = 1 - self.step[-1] / (sum(self.step) + self.step[0])
        return max(0.0, travel - beside * compute_s)


def expected(graph: fx.Graph, blocks: Sequence[Block]) -> list[Gathered]:
    """What `fetch` will gather of a captured graph, but that what is hoisted counts as its
    block's."""
    inputs = graph.find_nodes(op="placeholder")
    own = [[x for i in block.inputs for x in tensors(inputs[i])] for block in blocks]
    counts = [sum(bytes_of(part) for x in weights for part in parts_of(x)) for weights in own]
    return [Gathered((), i % BUFFERS, count, False) for i, count in enumerate(counts[1:])]
