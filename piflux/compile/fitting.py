"""What a rank would hold under some settings, and which others are tried where that is too much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx

from piflux.compile.report import GraphReport
from piflux.cost.memory import Own
from piflux.cost.shares import BUFFERS, SharedWeights
from piflux.graph.nodes import PRODUCTS, op_name
from piflux.graph.plan import Context
from piflux.graph.roles import is_of_the_model
from piflux.graph.sizes import bytes_of
from piflux.graph.values import known, wraps
from piflux.policies.schedule import Compression, Schedule

BITS: tuple[Compression, ...] = ("int8", "int4")
"""What keys and values may be remembered in; pictures drift least by the first."""


@dataclass(frozen=True)
class Option:
    """Settings that differ in memory.

    Attributes:
        schedule: the policy and its settings.
        shares: whether ranks share the weights.
    """

    schedule: Schedule
    shares: bool = False

    def __str__(self) -> str:
        """As `parallelize` takes them."""
        s = self.schedule
        more = f", compression={s.compression!r}" if s.compresses else ""
        more += "" if s.order else ", order=0"
        return f"policy={s.policy!r}{more}" + (", shard_weights=True" if self.shares else "")


def options_of(first: Option) -> list[Option]:
    """An option, and others whose schedules hold less, in the order in which they are tried: in
    fewer bits, without what `displaced` sends, without anything remembered.

    Whatever else takes less memory belongs here. `order=0` does not: one version takes more than
    both in few bits, and drifts further.
    """
    schedule, found = first.schedule, [first.schedule]
    if schedule.kind.remembers:
        for compression in BITS:
            found.append(replace(schedule, order=1, compression=compression))
    if schedule.kind.remembers and not schedule.kind.rotates:  # what it sends is held, too
        found.append(replace(found[-1], policy="rotate"))
    found.append(replace(schedule, policy="gather", sync="gather", order=1, compression="none"))
    return [Option(x, first.shares) for x in dict.fromkeys(found)]


def with_shares(options: Iterable[Option], *, hides: bool) -> list[Option]:
    """The same and those whose weights are shared, in the order in which they are to be taken.

    Args:
        options: of whole weights.
        hides: whether steps hardly wait for weights. Then to share them comes before anything that
            changes the images, else where nothing else is left: a slow link is why little is sent.
    """
    whole = list(options)
    shared = [replace(x, shares=True) for x in whole]
    if not hides:
        return whole + shared
    return [x for pair in zip(whole, shared, strict=True) for x in pair]


@dataclass(frozen=True)
class Room:
    """What options take on one rank, and what is there for them.

    Attributes:
        ctx: of the graph of a part.
        own: what no option changes, with whole weights.
        shared: the weights that would be shared.
        held: bytes of weights that the device has now.
        free: bytes that it has left.
        streams: how many streams' keys and values it holds.
    """

    ctx: Context
    own: Own
    shared: SharedWeights
    held: int
    free: float
    streams: int = 1

    def report(self, option: Option) -> GraphReport:
        """What the compiler says of it."""
        ctx = self.ctx if option.shares else replace(self.ctx, gathered=[])
        return GraphReport.of(ctx, option.schedule, self.own)

    def left(self, option: Option) -> float:
        """Bytes that are left beside the weights."""
        return self.free + self.held - self.report(option).weight_bytes

    def fits(self, option: Option) -> bool:
        """Whether the device can hold it, and come there from what it holds now."""
        found = self.report(option)
        more = self.streams * (found.cache_bytes + found.packet_bytes) + found.step_bytes
        return more <= self.left(option) and self._on_the_way(option) <= self.free

    def _on_the_way(self, option: Option) -> int:
        """While weights become shared that the device has as a whole: the buffers, and a share."""
        if not option.shares or self.held <= self.shared.among(self.own.weights):
            return 0
        largest = max((*self.shared.step, *self.shared.image))
        return BUFFERS * largest + largest // self.shared.world_size


def saved_by_8_bits(gm: fx.GraphModule, ctx: Context) -> int:
    """About how many bytes fewer weights take whose products with tokens are in 8 bits."""
    found = {
        node: known(node)
        for product in gm.graph.nodes
        if product in ctx.plan.local and op_name(product) in PRODUCTS
        for node in product.all_input_nodes
        if is_of_the_model(node) and known(node).dim() == 2
    }
    return sum(
        bytes_of(x) - bytes_of(x) // x.element_size() for x in found.values() if not wraps(x)
    )
