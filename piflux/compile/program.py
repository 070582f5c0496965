"""From a captured graph to a program: what runs on one of so many ranks, under one schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from piflux.capture.captured import Captured
from piflux.compile.pieces import Inner, compile_piece, compile_pieces
from piflux.compile.report import GraphReport
from piflux.compile.segments import segments_of, with_weights
from piflux.cost.memory import Own
from piflux.cost.shares import SharedWeights, expected
from piflux.errors import CompileError
from piflux.graph.blocks import Block, find_blocks
from piflux.graph.plan import Context, Gathered
from piflux.graph.roles import roles_of
from piflux.graph.values import tensors
from piflux.memory.shares import Shares
from piflux.passes.runner import Pass, run_passes
from piflux.passes.speed.enclose import HEAD, enclose
from piflux.passes.speed.fetch import fetch
from piflux.passes.speed.fuse_gelu import fuse_gelu
from piflux.passes.speed.fuse_linears import fuse_linears
from piflux.passes.speed.fuse_rotary import fuse_rotary
from piflux.passes.speed.hoist import HOISTED, hoist
from piflux.passes.speed.outline import outline
from piflux.passes.speed.sigmoid_gelu import sigmoid_gelu
from piflux.passes.split.layout import layout
from piflux.passes.split.lower import lower
from piflux.passes.split.overlap import overlap
from piflux.passes.split.propagate import propagate
from piflux.passes.split.rewrite_attention import rewrite_attention
from piflux.passes.split.shard import shard
from piflux.passes.split.ungroup import ungroup
from piflux.policies.policy import Policy
from piflux.policies.schedule import Schedule
from piflux.policies.step import StepContext, current
from piflux.ranks.protocol import Ranks
from piflux.recording import recorded
from piflux.recording.recorded import Recorded
from piflux.recording.recorder import SharedSite
from piflux.runtime.hoisted import Hoisted
from piflux.runtime.streams import Roles

FIRST = (  # once, since the graph of a part and the whole one both need them
    lower,
    ungroup,  # after lower, which writes attentions of other libraries
)
PASSES = (
    layout,  # decides; everything below carries out its plan
    rewrite_attention,  # before propagate, which would run a part's attention on a part's keys
    shard,  # sizes are read off the whole example values, so before they change
    overlap,  # after shard: cuts take their places in the order, too
    propagate,  # last: every example value becomes that of a part
)
# Once the report has been read off single nodes, and for inner compilers that gain by it:
LATER = (
    hoist,
    fuse_linears,  # after overlap, whose order it keeps, and after hoist, for what is left
    fuse_gelu,
    sigmoid_gelu,  # what fuse_gelu left
    fuse_rotary,
    enclose,  # last, around all of them; outline works inside
)


Counted = tuple[fx.GraphModule, Context]
"""A graph that the passes have run on, whose work can be counted."""


@dataclass(frozen=True)
class Settled:
    """A program's settings with everything chosen.

    Attributes:
        schedule: of its steps.
        why_sync: why sync steps come by keys and values as they do, if that was chosen.
        shares: where weights are held of which each rank has a share; None for whole ones.
    """

    schedule: Schedule
    why_sync: str = ""
    shares: Shares | None = None


Settle = Callable[[Schedule, Counted, "Counted | None"], Settled]
"""Takes a schedule, the graph of a part and the one that computes all tokens, if sync steps may. Of
the part's graph `gathered` says what would be gathered if weights were shared."""


@dataclass(frozen=True)
class Program:
    """What one captured graph became.

    Attributes:
        schedule: that it was made for; `sync` is settled.
        roles: of the graph's inputs.
        part: computes a rank's part of a step. Where steps are prepared for an inner compiler that
            gains by it, a `Segments`.
        whole: computes all tokens of a sync step and fills the caches; None where such a step
            gathers.
        report: for `piflux.explain`.
        blocks: the model's repeated blocks.
        records: whether steps are recorded, so that memory must stay where it is.
    """

    schedule: Schedule
    roles: Roles
    part: Callable[..., Any]
    whole: Callable[..., Any] | None
    report: GraphReport
    blocks: tuple[Block, ...]
    records: bool


def make_program(
    captured: Captured,
    schedule: Schedule,
    ranks: Ranks | None,
    inner: Inner,
    settle: Settle = lambda schedule, part, whole: Settled(schedule),
    site: SharedSite | None = None,
) -> Program:
    """Make a program of a captured graph. All ranks call it together.

    Args:
        captured: stays as it is.
        schedule: for as many ranks.
        ranks: who shares the work; None for one rank alone.
        inner: what compiles the finished graphs.
        settle: chooses what is left open, once steps can be counted.
        site: where steps are recorded; None for one of the program's own.

    Raises:
        CompileError: weights can't be shared, since nothing in the model repeats.
        CannotShard, NoAttention: see `layout`.
        Exception: whatever `inner` raises.
    """
    world_size = schedule.world_size
    lowered = captured.copy()
    run_passes(lowered, Context(world_size), FIRST)
    captured = Captured(lowered, captured.example_inputs)
    uncut = None
    if ranks is not None and schedule.kind.remembers and schedule.sync != "gather":
        # The graph that computes all tokens and fills the cache.
        uncut = captured.copy(), Context(1)
        run_passes(*uncut, (layout, rewrite_attention))
    gm, ctx = captured.copy(), Context(world_size, schedule.kind.rotates)
    # On one rank too the layout is found, so that a model that can't be sharded says so on
    # the machine it is developed on.
    run_passes(gm, ctx, PASSES if world_size > 1 else PASSES[:1])
    blocks = find_blocks(captured.module.graph)
    gathered = expected(captured.module.graph, blocks)
    settled = settle(schedule, (gm, replace(ctx, gathered=gathered)), uncut)
    schedule, shares = settled.schedule, settled.shares
    ctx.rotates = schedule.kind.rotates
    report = GraphReport.of(ctx, schedule, Own.of(gm.graph), settled.why_sync)
    roles = roles_of(gm, ctx.plan)
    turns = ranks is not None and ranks.in_one_process
    site = site or SharedSite()
    compiling = _Compiling(schedule, inner, captured.example_inputs, turns, shares, site)
    whole = None
    if uncut is not None and schedule.sync == "recompute":
        whole = compiling.compile(*uncut)
    part = compiling.compile(gm, ctx)
    if ctx.gathered:
        report = report.sharing(SharedWeights.of(ctx.gathered, world_size))
    return Program(schedule, roles, part, whole, report, blocks, compiling.records)


def prepare(
    gm: fx.GraphModule, ctx: Context, later: Sequence[Pass] = LATER, *, shares: bool
) -> None:
    """Run the passes that come once the report has been read off single nodes.

    Args:
        gm: a graph that `PASSES` have run on.
        ctx: theirs.
        later: which; fewer for an inner compiler that doesn't gain by them.
        shares: whether ranks share the weights.
    """
    run_passes(gm, ctx, later)
    heads = gm.graph.find_nodes(op="call_module", target=HEAD)
    run_passes(getattr(gm, HEAD) if heads else gm, ctx, (outline,))
    if shares:
        run_passes(gm, ctx, (fetch,))


class _Compiling:
    """Compiles the graphs of one program.

    Attributes:
        records: whether steps of one of them are recorded.
    """

    def __init__(
        self,
        schedule: Schedule,
        inner: Inner,
        example_inputs: Sequence[Any],
        turns: bool,
        shares: Shares | None,
        site: SharedSite,
    ) -> None:
        """`turns`: whether ranks of one process take turns."""
        self.records = False
        self._shares = shares
        self._site = site
        self._turns = turns
        self._schedule = schedule
        self._policy: Policy = schedule.make_policy()
        self._inner = inner
        self._example_inputs = example_inputs
        self._is_eager = inner is lookup_backend("eager")

    def compile(self, gm: fx.GraphModule, ctx: Context) -> Callable[..., Any]:
        """By the inner compiler: repeated blocks once, or the graph as a whole if it has none."""
        if self._is_eager and self._shares is None:
            return self._inner(gm, list(self._example_inputs))
        with contextlib.nullcontext() if self._is_eager else self._choices(ctx.world_size):
            run = self._compile(gm, ctx)
        if self._shares is None:
            return run
        if not ctx.gathered:
            raise CompileError(
                "shard_weights: nothing repeats in this model, and what is gathered while the "
                "block before computes are the weights of repeated blocks. Leave its weights whole"
            )
        return _Sharing(run, ctx.gathered, self._shares)

    def _compile(self, gm: fx.GraphModule, ctx: Context) -> Callable[..., Any]:
        roles, records = roles_of(gm, ctx.plan), self._records(gm, ctx)
        later = () if self._is_eager else LATER
        prepare(gm, ctx, later, shares=self._shares is not None)
        calls = {node.target: node for node in gm.graph.find_nodes(op="call_module")}
        if HEAD not in calls:
            if any(gm.children()):
                return compile_pieces(gm, self._inner)
            return self._inner(gm, list(self._example_inputs))
        inputs = gm.graph.find_nodes(op="placeholder")
        run: dict[str, Callable[..., Sequence[Any]]] = {
            name: module.forward for name, module in gm.named_children()
        }
        if HOISTED in calls:
            clocks = _positions(calls[HOISTED], {inputs[i] for i in roles.clocks})
            run[HOISTED] = Hoisted(run[HOISTED], clocks)
        head = compile_piece(gm.get_submodule(HEAD), self._inner)
        if records:
            head = with_weights(gm, head)
            moving = {inputs[i] for i in (*roles.latents, *roles.clocks, *roles.conditions)}
            head = Recorded(head, _positions(calls[HEAD], moving), self._kind, self._site)
            self.records = True
        return segments_of(gm, run | {HEAD: head})

    def _choices(self, world_size: int) -> contextlib.AbstractContextManager[None]:
        """While it lasts, inductor compiles as these graphs want it, in the order of `overlap`."""
        from piflux.compile.inductor import choices  # imports inductor, which takes seconds

        return choices(sends=world_size > 1)

    def _records(self, gm: fx.GraphModule, ctx: Context) -> bool:
        """Whether steps can be recorded."""
        nodes = (n for n in gm.graph.nodes if n.op != "placeholder")
        devices = {x.device.type for n in nodes for x in tensors(n)}
        recordable = devices == {recorded.DEVICE} and (recorded.TURNS or not self._turns)
        return ctx.world_size > 1 and recordable

    def _kind(self, context: StepContext) -> Hashable | None:
        return self._policy.recording_key(context.step, gathers=self._schedule.sync == "gather")


class _Sharing:
    """A program whose weights are shared over the ranks.

    Args:
        run: the program.
        gathered: what it fetches, by number.
        shares: of the model.
    """

    def __init__(
        self, run: Callable[..., Any], gathered: Sequence[Gathered], shares: Shares
    ) -> None:
        self._run = run
        self._gathered = gathered
        self._shares = shares

    def __call__(self, *args: Any) -> Any:
        current().weights = self._shares.ready(args, self._gathered)
        return self._run(*args)


def _positions(call: fx.Node, nodes: set[fx.Node]) -> list[int]:
    """Which arguments of a call are among `nodes`."""
    return [i for i, node in enumerate(call.args) if node in nodes]
