"""What the compiler did, as data and as text: `piflux.explain`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from piflux.cost.cost import keys_and_values, token_bytes
from piflux.cost.memory import Own
from piflux.cost.shares import SharedWeights
from piflux.graph.axes import Axis, Value
from piflux.graph.nodes import plain_name
from piflux.graph.plan import Context, Plan
from piflux.graph.sizes import example_size
from piflux.graph.values import tensors
from piflux.parts import part_length
from piflux.policies.masks import COMPUTED, SHARE, Compute
from piflux.policies.schedule import Schedule

PACKETS = 2
"""Packets of keys and values that are under way at once in a step that gathers them: one arrives
while the next is written."""

COMPRESSED = {
    "int8": " by changes in 8 bits",
    "int4": " from versions in 8 bits by changes in 4",
}


@dataclass(frozen=True)
class BoundaryReport:
    """A place where a value is cut into parts or put together from them.

    Attributes:
        verb: 'shard' or 'unshard'.
        node: name of the value in the captured graph.
        dim: its token dimension.
        lengths: full length of each segment along it.
        part_lengths: length of each segment's window.
        overlaps: tokens of each segment that are computed twice, over all ranks.
        bytes: what a rank sends here in a step; 0 for a shard.
    """

    verb: str
    node: str
    dim: int
    lengths: tuple[int, ...]
    part_lengths: tuple[int, ...]
    overlaps: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph on one rank; sizes are those it was compiled at first.

    Attributes:
        schedule: the policy and its settings.
        attentions: nodes rewritten.
        local_nodes: nodes that run on a part.
        boundaries: where values are cut and joined.
        sync_bytes: what a rank sends in a sync step.
        steady_bytes: what a rank sends in any other step.
        cache_bytes: keys and values that a rank holds for each stream, between steps.
        why_sync: how `sync='auto'` was decided; empty if it was given.
        weight_bytes: parameters that the graph reads, as they are stored.
        packet_bytes: what keys and values travel in, in a step that gathers them.
        step_bytes: most that is alive at once of what a step computes.
        shared: weights of which each rank holds a share; None if all are whole.
    """

    schedule: Schedule
    attentions: int
    local_nodes: int
    boundaries: tuple[BoundaryReport, ...]
    sync_bytes: int
    steady_bytes: int
    cache_bytes: int
    why_sync: str = ""
    weight_bytes: int = 0
    packet_bytes: int = 0
    step_bytes: int = 0
    shared: SharedWeights | None = None

    @classmethod
    def of(cls, ctx: Context, schedule: Schedule, own: Own, why_sync: str = "") -> GraphReport:
        """Of a graph that the passes have run on."""
        plan, world_size, policy = ctx.plan, ctx.world_size, schedule.kind
        boundaries: dict[tuple[str, Value, int], BoundaryReport] = {}
        for verb, edges in (("shard", plan.cuts), ("unshard", plan.joins)):
            for (_, value), dims in edges.items():
                for dim in dims:
                    boundaries.setdefault(
                        (verb, value, dim), _boundary(plan, verb, value, dim, world_size)
                    )
        shared = SharedWeights.of(ctx.gathered, world_size) if ctx.gathered else None
        final = sum(boundary.bytes for boundary in boundaries.values())
        sent = steadily = held = packet = 0
        for found in plan.attentions:
            kv = keys_and_values(plan, found, world_size)
            token = kv.token_bytes(schedule)
            sent += kv.sent_bytes
            steadily += policy.sent_bytes(token, kv.part, world_size)
            if world_size > 1:
                packet = max(packet, token.version * kv.part * (world_size + 1))
                held += policy.held_bytes(token, kv.whole, kv.part, world_size)
        return cls(
            schedule,
            len(plan.attentions),
            len(plan.local),
            tuple(boundaries.values()),
            0 if schedule.sync == "recompute" else final + sent,
            final + steadily,
            held,
            why_sync,
            own.weights if shared is None else shared.among(own.weights),
            PACKETS * packet,
            own.step,
            shared,
        )

    def sharing(self, shared: SharedWeights) -> GraphReport:
        """The same, with weights shared that it has as whole ones."""
        return replace(self, weight_bytes=shared.among(self.weight_bytes), shared=shared)

    @property
    def memory_bytes(self) -> int:
        """What a rank holds with one stream; each further one has `cache_bytes` more."""
        return self.weight_bytes + self.cache_bytes + self.packet_bytes + self.step_bytes

    def __str__(self) -> str:
        s = self.schedule
        refresh = f", then one every {s.refresh_every}" if s.refresh_every else ""
        syncs = ", ".join(str(step) for step in s.first_syncs)
        lines = [
            f"{s.policy} on {s.world_size} rank{'s' if s.world_size > 1 else ''}, "
            + (f"sync at {syncs}{refresh}" if s.kind.remembers else "every step a sync step")
            + (", recomputed" if s.sync == "recompute" else "")
            + (", predicted between" if s.predicts else "")
            + (COMPRESSED[s.compression] if s.compresses else "")
            + (f", computing {_computed(s.compute)}" if s.skips else ""),
            *([f"  sync by '{s.sync}'".ljust(25) + self.why_sync] if self.why_sync else []),
            f"  attentions rewritten   {self.attentions}",
            f"  nodes on a part        {self.local_nodes}",
            f"  sent in a sync step    {_human(self.sync_bytes)} a rank",
            f"  sent in a steady step  {_human(self.steady_bytes)} a rank",
            f"  cache                  {_human(self.cache_bytes)} a rank and stream",
            f"  memory                 {_human(self.memory_bytes)} a rank: weights "
            f"{_human(self.weight_bytes)}, cache, sending {_human(self.packet_bytes)}, a step "
            f"{_human(self.step_bytes)}",
            *([] if self.shared is None else [_shared(self.shared)]),
            "  boundaries",
        ]
        for b in self.boundaries:
            segments = " + ".join(
                f"{full} -> {part}" + (f" ({twice} twice)" if twice else "")
                for full, part, twice in zip(b.lengths, b.part_lengths, b.overlaps, strict=True)
            )
            lines.append(f"    {b.verb:8} %{b.node} dim {b.dim}: {segments} tokens")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All graphs of a model, in the order in which they were compiled.

    Attributes:
        graphs: the graphs.
        notes: what was remarkable when they ran.
    """

    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.graphs:
            return "nothing compiled yet: call the model once"
        graphs = [f"graph {i}: {graph}" for i, graph in enumerate(self.graphs)]
        return "\n".join([*graphs, *(f"note: {note}" for note in self.notes)])


def _boundary(plan: Plan, verb: str, value: Value, dim: int, world_size: int) -> BoundaryReport:
    x = tensors(value.node)[value.item]
    full = plan.lengths(Axis(value.node, dim, value.item))
    lengths = tuple(example_size(length, x) for length in full)
    parts = tuple(part_length(length, world_size) for length in lengths)
    overlaps = tuple(p * world_size - n for p, n in zip(parts, lengths, strict=True))
    per_token = token_bytes(x, dim)
    sent = per_token * sum(parts) * (world_size - 1) if verb == "unshard" else 0
    return BoundaryReport(verb, plain_name(value.node), dim, lengths, parts, overlaps, sent)


def _shared(shared: SharedWeights) -> str:
    image = f", and {_human(shared.image_bytes)} once an image" if shared.image else ""
    return (
        f"  weights shared         {_human(shared.whole_bytes)}, held in "
        f"{_human(shared.held_bytes)} a rank; {_human(shared.step_bytes)} sent in every step{image}"
    )


def _computed(compute: Compute) -> str:
    if compute == "auto":
        return f"about {SHARE:.0%} of the steps"
    if isinstance(compute, int):
        return f"{compute} steps of an image"
    return f"{compute.count(COMPUTED)} of {len(compute)} steps: {compute}"


def _human(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.4g} GB"
