"""The Dynamo backend: from a captured graph to a callable that runs on one rank of many."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as with_fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend

from piflux.compile.pieces import Inner, compile_piece, compile_pieces, replace
from piflux.compile.report import GraphReport
from piflux.cost.cost import SyncChoice, choose, choose_sync, layers_of
from piflux.cost.rates import slowest_rates
from piflux.cost.remembered import device_name, rates_file, remembered_rates
from piflux.errors import CompileError, let_through
from piflux.graph.plan import Context, example_size, tensors
from piflux.graph.roles import roles_of
from piflux.passes.runner import run_passes
from piflux.passes.speed.enclose import HEAD, enclose
from piflux.passes.speed.fuse_gelu import fuse_gelu
from piflux.passes.speed.fuse_linears import fuse_linears
from piflux.passes.speed.fuse_rotary import fuse_rotary
from piflux.passes.speed.hoist import HOISTED, hoist
from piflux.passes.speed.outline import outline
from piflux.passes.speed.sigmoid_gelu import sigmoid_gelu
from piflux.passes.split.layout import layout
from piflux.passes.split.overlap import overlap
from piflux.passes.split.propagate import propagate
from piflux.passes.split.rewrite_attention import rewrite_attention
from piflux.passes.split.shard import shard
from piflux.policies.schedule import (
    BEST_SYNC_STEPS,
    Compression,
    Policy,
    Schedule,
    Sync,
    read_settings,
)
from piflux.ranks.agreement import fingerprint
from piflux.ranks.groups import resolve_group
from piflux.ranks.ranks import ProcessRanks, Ranks, VirtualRanks
from piflux.recording import recorded as replay
from piflux.recording.recorded import Recorded
from piflux.runtime.hoisted import Hoisted
from piflux.runtime.runtime import Runtime
from piflux.runtime.streams import Roles

log = logging.getLogger(__name__)

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


class Compiler:
    """The backend with its settings and its runtime: all graphs of one model share them.

    Args:
        schedule: see `Runtime`.
        ranks: likewise.
        inner: a Dynamo backend by name, or a callable like one: what compiles the final graph.
        chooses: whether the schedule's policy is to be chosen when the first graph is compiled.

    Raises:
        ValueError: `inner` is no backend.
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: Ranks | None,
        inner: str | Callable[..., Any],
        *,
        chooses: bool = False,
    ) -> None:
        self.runtime = Runtime(schedule, ranks)
        unknown = (
            f"unknown inner compiler {inner!r}: use 'inductor', 'eager' or another backend of "
            "torch.compile"
        )
        try:
            self.inner: Inner = lookup_backend(inner)
        except InvalidBackend as error:
            raise ValueError(unknown) from error
        if not callable(self.inner) or self.inner is backend:
            raise ValueError(unknown)
        self.reports: list[GraphReport] = []
        self._why_sync = ""
        self._chooses = chooses

    @let_through()
    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        runtime, world_size = self.runtime, self.runtime.schedule.world_size
        if runtime.ranks is not None and not self.reports:
            # Before ranks with other settings wait in other collectives.
            settings = {"schedule": runtime.schedule, "policy is chosen": self._chooses}
            runtime.ranks.agree(fingerprint(settings, {}))
        uncut = self._uncut(gm)
        ctx = Context(world_size, runtime.name, runtime.schedule.policy == "rotate")
        # On one rank too the layout is found, so that a model that can't be sharded says so on
        # the machine it is developed on.
        run_passes(gm, ctx, PASSES if world_size > 1 else PASSES[:1])
        if self._chooses:
            self._choose_policy(gm, ctx)
        if runtime.schedule.sync == "auto":
            self._choose_sync(gm, ctx, uncut)
        self.reports.append(GraphReport.of(gm, ctx, runtime.schedule, self._why_sync))
        roles = roles_of(gm, ctx.plan)
        alone = isinstance(runtime.ranks, VirtualRanks) or runtime.schedule.sync == "recompute"
        with self._choices(1):
            whole = self._compile(*uncut, example_inputs) if uncut and alone else None
        with self._choices(world_size):
            compiled = self._compile(gm, ctx, example_inputs)
        return _PerCall(runtime, roles, compiled, whole)

    def prepare(self) -> None:
        """Start inductor's workers, which take seconds, for them to be ready after the capture.

        Until they are, inductor compiles kernels one after the other in this process.
        """
        if self.inner is not lookup_backend("eager"):
            from torch._inductor.async_compile import maybe_warm_pool  # imports parts of inductor

            maybe_warm_pool()

    def _uncut(self, gm: fx.GraphModule) -> tuple[fx.GraphModule, Context] | None:
        """The graph that computes all tokens and fills the cache, where sync steps may want it."""
        ranks, schedule = self.runtime.ranks, self.runtime.schedule
        may = schedule.policy != "gather" and schedule.sync != "gather"
        if ranks is None or not (may or isinstance(ranks, VirtualRanks)):
            return None
        uncut, ctx = copy.deepcopy(gm), Context(1, self.runtime.name)
        run_passes(uncut, ctx, (layout, rewrite_attention))
        return uncut, ctx

    def _choose_policy(self, gm: fx.GraphModule, ctx: Context) -> None:
        """Settle `policy='auto'` for this graph and all later ones, on all ranks alike."""
        ranks, schedule = self.runtime.ranks, self.runtime.schedule
        times = self.runtime.foreseen()
        steps = None if times is None else len(times)
        policy: Policy = "gather"
        if not isinstance(ranks, ProcessRanks):
            where, why = "", "no link lies between ranks that one process computes"
        else:
            layers = layers_of(gm, ctx)
            (query,) = tensors(ctx.plan.attentions[0].node.all_input_nodes[0])
            shape = [example_size(size, query) for size in query.shape]
            sent = layers[0].kv_bytes // (ranks.size - 1)
            rates = remembered_rates(ranks, shape, query.dtype, query.device, sent)
            choice = choose(layers, rates)
            where = f" for {ranks.size} ranks on {device_name(query.device)}"
            policy, why = choice.policy, f"{choice.reason} (rates of {rates_file()})"
            if steps is not None and all(schedule.step(index).sync for index in range(steps)):
                policy, why = "gather", "each of so few steps is a sync step"
        image = "" if steps is None else f", {steps} steps an image"
        sync: Sync = "gather" if policy == "gather" else schedule.sync
        self.runtime.schedule = with_fields(schedule, policy=policy, sync=sync)
        self._chooses, ctx.rotates = False, policy == "rotate"
        line = (
            f"policy 'auto' took '{policy}'{where}, {len(ctx.plan.attentions)} attentions"
            f"{image}: {why}"
        )
        self.runtime.notes.append(line)
        if ranks is None or ranks.rank == 0:
            log.warning("%s", line)

    def _choose_sync(
        self, gm: fx.GraphModule, ctx: Context, uncut: tuple[fx.GraphModule, Context] | None
    ) -> None:
        """Settle `sync='auto'` for this graph and all later ones, on all ranks alike."""
        ranks = self.runtime.ranks
        choice = SyncChoice("gather", "there is nothing to choose")
        if ranks is not None and uncut and not isinstance(ranks, VirtualRanks):
            layers = layers_of(gm, ctx)
            (query,) = tensors(ctx.plan.attentions[0].node.all_input_nodes[0])
            shape = [example_size(size, query) for size in query.shape]
            sent = layers[0].kv_bytes // (ranks.size - 1)
            rates = slowest_rates(ranks, shape, query.dtype, query.device, sent)
            choice = choose_sync(layers, layers_of(*uncut), rates)
        self.runtime.schedule = with_fields(self.runtime.schedule, sync=choice.sync)
        self._why_sync = choice.reason

    def _compile(
        self, gm: fx.GraphModule, ctx: Context, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """By the inner compiler: repeated blocks once, or the graph as a whole if it has none."""
        if self.inner is lookup_backend("eager"):
            return self.inner(gm, list(example_inputs))
        roles, records = roles_of(gm, ctx.plan), self._records(gm)
        run_passes(gm, ctx, LATER)
        calls = {node.target: node for node in gm.graph.find_nodes(op="call_module")}
        if HEAD not in calls:
            run_passes(gm, ctx, (outline,))
            pieces = any(gm.children())
            return compile_pieces(gm, self.inner) if pieces else self.inner(gm, [*example_inputs])
        run_passes(getattr(gm, HEAD), ctx, (outline,))
        inputs = gm.graph.find_nodes(op="placeholder")
        if HOISTED in calls:
            clocks = _positions(calls[HOISTED], {inputs[i] for i in roles.clocks})
            replace(gm, HOISTED, Hoisted(self.runtime, gm.get_submodule(HOISTED), clocks))
        head = compile_piece(gm.get_submodule(HEAD), self.inner)
        if records:
            moving = {inputs[i] for i in (*roles.latents, *roles.clocks, *roles.conditions)}
            head = Recorded(self.runtime, head, _positions(calls[HEAD], moving))
            self.runtime.recycles = True
        replace(gm, HEAD, head)
        return gm.forward

    def _choices(self, world_size: int) -> contextlib.AbstractContextManager[None]:
        """While it lasts, inductor compiles as these graphs want it, in the order of `overlap`."""
        if self.inner is lookup_backend("eager"):
            return contextlib.nullcontext()
        from piflux.compile.inductor import choices  # imports inductor, which takes seconds

        return choices(sends=world_size > 1)

    def _records(self, gm: fx.GraphModule) -> bool:
        """Whether steps can be recorded."""
        schedule = self.runtime.schedule
        nodes = (n for n in gm.graph.nodes if n.op != "placeholder")
        devices = {x.device.type for n in nodes for x in tensors(n)}
        # What virtual ranks send to each other is never in the same place.
        still = schedule.policy == "rotate" or not isinstance(self.runtime.ranks, VirtualRanks)
        return schedule.world_size > 1 and still and devices == {replay.DEVICE}


class _PerCall:
    """A compiled graph; each call is one pass of one denoise step."""

    def __init__(
        self,
        runtime: Runtime,
        roles: Roles,
        part: Callable[..., Any],
        whole: Callable[..., Any] | None,
    ) -> None:
        self.runtime = runtime
        self.roles = roles
        self.part = part
        self.whole = whole

    def __call__(self, *args: Any) -> Any:
        runtime = self.runtime
        if runtime.ranks is None and not runtime.foresees:
            return self.part(*args)  # a model like any other
        with runtime.call(self, self.roles, args) as step:
            if runtime.ranks is None:
                return self.part(*args)
            return runtime.ranks.run(step.sync, self._part, self.whole, args)

    def _part(self, *args: Any) -> Any:
        self.runtime.turn()
        return self.part(*args)


@let_through()
def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **unsupported: Any,
) -> Callable[..., Any]:
    """The backend for `torch.compile(model, backend=piflux.backend, options={...})`.

    Options: `group`, `policy`, `sync_steps`, `refresh_every`, `sync`, `order`, `compression` and
    `inner`, as for `parallelize`. Every compiled graph has its own caches; the beginning of an
    image is inferred.

    Raises:
        ValueError: an unknown option or a value out of range.
        CannotShard, NoAttention: see `piflux.passes.split.layout`.
        CompileError: the call records gradients.
    """
    if unsupported:
        raise ValueError(f"piflux.backend takes options only, not {', '.join(unsupported)}")
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    ):
        raise CompileError(
            "piflux is for inference, but the call records gradients: call the model under "
            "torch.no_grad()"
        )
    compiler = make_compiler(**dict(options or {}))
    compiled = compiler(gm, example_inputs)
    held = [weakref.ref(x) for x in example_inputs if isinstance(x, torch.nn.Parameter)]
    _COMPILED[compiler.runtime] = compiler.reports, held
    return compiled


_COMPILED: WeakKeyDictionary[Runtime, tuple[list[GraphReport], list[weakref.ref[Any]]]]
_COMPILED = WeakKeyDictionary()
"""The graphs that `torch.compile(backend="piflux")` made, with the parameters that they read."""


def reports_of(module: torch.nn.Module) -> list[tuple[GraphReport, Sequence[str]]]:
    """The backend's graphs that read a parameter of `module`, each with notes on its runs."""
    own = {id(x) for x in module.parameters()}
    return [
        (report, runtime.notes)
        for runtime, (reports, held) in _COMPILED.items()
        if any(id(ref()) in own for ref in held)
        for report in reports
    ]


def make_compiler(
    *,
    group: Any = None,
    policy: Policy | str = "rotate",
    sync_steps: int | Sequence[int] = BEST_SYNC_STEPS,
    refresh_every: int | None = None,
    sync: Sync = "gather",
    order: int = 1,
    compression: Compression = "none",
    inner: str | Callable[..., Any] = "inductor",
    **unknown: Any,
) -> Compiler:
    """Raises ValueError for unknown options or values out of range."""
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))}: piflux knows group, policy, "
            "sync_steps, refresh_every, sync, order, compression and inner"
        )
    # A bad value is reported before any rank waits for another.
    settings: dict[str, Any] = {
        "policy": policy,
        "sync_steps": tuple(sync_steps) if isinstance(sync_steps, Sequence) else sync_steps,
        "refresh_every": refresh_every,
        "sync": sync,
        "order": order,
        "compression": compression,
    }
    if policy.endswith(".json"):
        settings |= read_settings(policy)
    chooses = settings["policy"] == "auto"
    if chooses:
        settings["policy"] = "rotate"  # until it is chosen, what may need most
    Schedule(**settings)
    ranks = resolve_group(group)
    world_size = ranks.size if ranks is not None else 1
    schedule = Schedule(**settings, world_size=world_size)
    return Compiler(schedule, ranks, inner, chooses=chooses)


def _positions(call: fx.Node, nodes: set[fx.Node]) -> list[int]:
    """Which arguments of a call are among `nodes`."""
    return [i for i, node in enumerate(call.args) if node in nodes]
