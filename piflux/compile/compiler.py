"""The Dynamo backend: each graph that it is given becomes a program of one model's runtime."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend
from torch._guards import TracingContext, tracing

from piflux.capture.captured import Captured
from piflux.capture.dynamo import let_through
from piflux.compile.choices import Choices, MemoryLimit, Sharing, check_memory
from piflux.compile.pieces import Inner
from piflux.compile.program import Counted, Program, Settled, make_program
from piflux.compile.report import GraphReport
from piflux.errors import CannotShard, CompileError, NoAttention, NothingToShare, plain
from piflux.memory.shares import Shares
from piflux.policies.schedule import (
    Compression,
    PolicyName,
    Schedule,
    Sync,
    read_settings,
)
from piflux.policies.step import apart
from piflux.ranks.agreement import fingerprint
from piflux.ranks.groups import resolve_group
from piflux.ranks.processes import ProcessRanks
from piflux.ranks.protocol import Ranks
from piflux.recording.recorder import SharedSite
from piflux.runtime.fragments import Fragment
from piflux.runtime.runtime import Runtime

log = logging.getLogger(__name__)


class Compiler:
    """The backend with its settings and its runtime: all graphs of one model share them.

    Args:
        schedule: see `Runtime`.
        ranks: likewise.
        inner: a Dynamo backend by name, or a callable like one: what compiles the final graph.
        chooses: whether the schedule's policy is to be chosen when the first graph is compiled.
        memory: see `Choices`.
        shard_weights: whether each rank is to hold a share of the weights; 'auto' if `memory` is
            short otherwise.

    Attributes:
        programs: in the order in which they first ran; without those for ranks that were lost.
        has_made: whether any has.
        met_in: the epoch in which ranks compared what they have kept; -1 after a call that failed.
        may_share: for 'auto', whether weights can be shared; asked when memory is short.

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
        memory: MemoryLimit = None,
        shard_weights: Sharing = False,
    ) -> None:
        self.runtime = Runtime(schedule, ranks)
        self._asked = schedule
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
        self.programs: list[Program] = []
        self.has_made = False
        self._calls: WeakSet[_PerCall] = WeakSet()
        self._unkept: Program | None = None  # was made, and has not run
        self.met_in = -1
        self._site = SharedSite()
        self._fragments: list[tuple[Fragment, Callable[..., Any]]] = []
        self._whole: list[CompileError] = []  # why fragments run whole
        self.may_share: Callable[[], bool] = lambda: False
        may_share = (lambda: self.may_share()) if shard_weights == "auto" else None
        shares = self._shared(may_share is None) if shard_weights else None
        self._choices = Choices(chooses, ranks, self.runtime.notes, memory, shares, may_share)

    @property
    def shares(self) -> Shares | None:
        """Where each rank's share of the weights is, or may come to be; None if they are whole."""
        return self._choices.shares

    @property
    def shares_are_open(self) -> bool:
        """Whether it is chosen at the first call if weights are shared."""
        return self._choices.shares_are_open

    def have_whole_weights(self) -> None:
        """See `Choices.have_whole_weights`."""
        self._choices.have_whole_weights()

    def _shared(self, tell: bool) -> Shares | None:
        ranks = self.runtime.ranks
        if isinstance(ranks, ProcessRanks):
            return Shares(ranks)
        if not tell:
            return None
        what = "one rank alone has" if ranks is None else "ranks of one process have"
        line = f"shard_weights: {what} every weight once, there is nothing to share"
        self.runtime.notes.append(line)
        log.warning("%s", line)
        return None

    @property
    def reports(self) -> list[GraphReport]:
        """Of all programs."""
        return [program.report for program in self.programs]

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return self.install(Captured.of(gm, example_inputs))

    @let_through()
    def install(self, captured: Captured, *, apart: bool = False) -> Callable[..., Any]:
        """Make a program of a graph. Returns what Dynamo calls in its place; see `make`."""
        ranks, sizes = self.runtime.ranks, captured.sizes
        make = partial(self.make, captured, apart)
        program = make() if ranks is None else ranks.surviving(make, "compiling")
        sizes.seen()
        return _PerCall(self, captured, apart, program)

    def make(self, captured: Captured, apart: bool) -> Program:
        """A program for as many ranks as there are now; it is to be kept once it runs.

        All ranks call it together until any program is kept. Later ones a rank makes by itself:
        the others may have one that serves.

        Args:
            captured: the graph.
            apart: whether what it returns is read after other programs have run.
        """
        runtime, first = self.runtime, not self.has_made
        size = 1 if runtime.ranks is None else runtime.ranks.size
        schedule = replace(runtime.schedule, world_size=size)
        ranks = runtime.ranks if size > 1 else None
        if first and ranks is not None:
            self._agree_on_settings(ranks)
        if self.has_made:  # of other shapes, for which nothing of an earlier image is of use
            runtime.streams.drop_spare()
        site = SharedSite() if apart else self._site
        program = make_program(captured, schedule, ranks, self.inner, self._settle, site)
        self._unkept = program  # before others can have it, who may keep it
        if first and ranks is not None:
            # Where one raises until here, none keeps the program, so that all make it at the next
            # call. What they chose is the same.
            ranks.agree(fingerprint({"schedule of the program": program.schedule}, {}))
        return program

    def _agree_on_settings(self, ranks: Ranks) -> None:
        """Before ranks with other settings wait in other collectives."""
        schedule = replace(self.runtime.schedule, world_size=1)  # of which each has its own idea
        settings = {
            "schedule": schedule,
            "policy is chosen": self._choices.policy,
            "memory": self._choices.memory,
            "weights are shared": self.shares is not None and not self.shares_are_open,
        }
        ranks.agree(fingerprint(settings, {}))

    def keep(self, program: Program) -> None:
        """It runs: what was chosen for it is for all later ones."""
        if any(program is kept for kept in self.programs):
            return
        self._keep_choices(program)
        self.runtime.streams.recycles |= program.records
        self.programs.append(program)

    def _keep_choices(self, program: Program) -> None:
        self._choices.keep()
        self.runtime.settle(program.schedule)
        self.has_made, self._unkept = True, None

    def drop_forgotten(self) -> None:
        """Let go of programs that Dynamo calls no more."""
        called = {id(call.program) for call in self._calls}
        self.programs[:] = [program for program in self.programs if id(program) in called]

    def meet(self, *, begins: bool, changed: bool) -> bool:
        """Choose what the other ranks have kept, or all of it anew if this can't be known.

        A rank may have raised between the ranks' agreement on the first program and its run, since
        Dynamo has yet to make its guards: the others have kept it then. Or a rank has parallelized
        its model once more. All ranks call this together at each call, and compare in the first one
        of an image, if it `begins` as such, or of an epoch, and after one that failed.

        Args:
            begins: whether an image begins.
            changed: whether this rank's weights may have changed since they were last compared.

        Returns:
            Whether any rank's weights may have changed; False where ranks did not compare.
        """
        ranks = self.runtime.ranks
        if not isinstance(ranks, ProcessRanks) or not (begins or ranks.epoch != self.met_in):
            return False
        mine = (self.has_made, self._unkept is not None), changed
        everyones = ranks.exchange(mine, "programs")
        self.met_in = ranks.epoch
        self._choose_alike([kept for kept, _ in everyones])
        return any(changed for _, changed in everyones)

    def _choose_alike(self, told: Sequence[tuple[bool, bool]]) -> None:
        """`told`: by rank, whether it has made a program, and whether one of its has not run."""
        if len({has_made for has_made, _ in told}) == 1:
            return
        if (False, False) not in told:
            if self._unkept is not None:
                self._keep_choices(self._unkept)
            return
        for call in self._calls:
            call.program = None
        self.programs.clear()
        self.runtime.streams.drop_spare()
        self.has_made, self._unkept = False, None
        self._choices.reopen()
        self.runtime.settle(replace(self._asked, compute=self.runtime.schedule.compute))

    def add(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> int:
        """Install a fragment of a model; one with nothing to split runs whole on every rank."""
        captured = Captured.of(gm, example_inputs)
        fragment = Fragment(captured.ops, captured.constants, captured.place)
        try:
            made: Callable[..., Any] = self.install(captured, apart=True)
        except (NoAttention, NothingToShare) as error:
            error.__traceback__ = None  # its frames hold what the model was called with
            self._whole.append(error)
            made = self.inner(gm, list(example_inputs))
        self._fragments.append((fragment, made))
        return len(self._fragments) - 1

    def run(self, number: int, args: Sequence[Any]) -> Any:
        """What a fragment gives."""
        fragment, made = self._fragments[number]
        self.runtime.runs(fragment, args)
        return made(*args)

    def check_fragments(self, why_broken: Exception) -> None:
        """Raises what stood in the way if no fragment could be split.

        Args:
            why_broken: why the model is no one graph. Dynamo may have left attention out of all.
        """
        if self.has_made:
            return
        if isinstance(why_broken, CannotShard):
            raise why_broken
        refusals = (str(x) for x in self._whole if isinstance(x, CannotShard))
        raise NoAttention(
            f"none of the {len(self._whole)} graphs that Dynamo makes of the model has attention "
            "that can be split, so that every rank would compute all of it. It makes several, or "
            f"leaves code out of them, because of: {plain(str(why_broken))}\n"
            + next(refusals, "Whatever attends is in none of them, or no attention of PyTorch's")
        )

    def _settle(self, schedule: Schedule, part: Counted, whole: Counted | None) -> Settled:
        foreseen = self.runtime.foreseen
        times = foreseen(torch.empty(1)) if foreseen is not None else []
        return self._choices.settle(schedule, part, whole, len(times[0]) if times else None)

    def prepare(self) -> None:
        """Start inductor's workers, which take seconds, for them to be ready after the capture.

        Until they are, inductor compiles kernels one after the other in this process.
        """
        if self.inner is not lookup_backend("eager"):
            from torch._inductor.async_compile import maybe_warm_pool  # imports parts of inductor

            maybe_warm_pool()


class _PerCall:
    """A program; each call is one pass of one denoise step.

    A step in which a rank is lost is computed once more by those that are left, as a sync step: its
    inputs are whole, so nothing else is needed. One rank alone ends the image by the model as it
    is, without waiting for a compiler; in the next one it has a program of its own.
    """

    def __init__(
        self, compiler: Compiler, captured: Captured, apart: bool, program: Program
    ) -> None:
        self._compiler = compiler
        self._captured = captured
        self._apart = apart
        self._context = TracingContext.try_get()
        self._has_run = False
        self._alone_in: int | None = None  # the image in which this rank was first alone
        self.runtime = compiler.runtime
        self.program: Program | None = program  # None: there is none for those that are here
        compiler._calls.add(self)

    def __call__(self, *args: Any) -> Any:
        ranks = self.runtime.ranks
        if ranks is None:
            return self._run(*args)
        try:
            if self.runtime.in_fragments:  # all of the model's call is computed once more
                return self._run_fitting(ranks, *args)
            return ranks.surviving(lambda: self._run_fitting(ranks, *args), ranks.calls())
        finally:
            self._has_run, ranks.busy = True, False

    def _run_fitting(self, ranks: Ranks, *args: Any) -> Any:
        if self._compiler.shares is not None:
            self._compiler.shares.check_members()
        if self.program is not None and self.program.schedule.world_size != ranks.size:
            self._let_go()
        # At its first run a program's kernels may be compiled, too.
        ranks.busy = not self._has_run or self.program is None
        if ranks.size == 1 and self.program is None:
            image, _ = ranks.at()
            self._alone_in = image if self._alone_in is None else self._alone_in
            if image == self._alone_in:
                with apart():
                    return self._captured.module(*args)
        if self.program is None:
            with tracing(self._context):
                self.program = self._compiler.make(self._captured, self._apart)
            self._captured.sizes.check(args)
        return self._run(*args)

    def _let_go(self) -> None:
        """Of the program for more ranks, and of what its steps have left."""
        self._compiler.programs[:] = [x for x in self._compiler.programs if x is not self.program]
        self.program = None
        self.runtime.renew()

    def _run(self, *args: Any) -> Any:
        runtime, program = self.runtime, self.program
        assert program is not None, "it has been made"
        self._compiler.keep(program)
        if not runtime.follows:
            with apart():
                return program.part(*args)  # a model like any other
        captured = self._captured
        facts = {"operations of the model": captured.ops, "their constants": captured.constants}
        with runtime.call(self, program.roles, args, facts) as call:
            whole = program.whole if call.step.sync else None
            run = program.part if whole is None else whole
            return call.run(lambda: run(*args))


@let_through()
def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **unsupported: Any,
) -> Callable[..., Any]:
    """The backend for `torch.compile(model, backend=piflux.backend, options={...})`.

    Options: `group`, `policy`, `sync_steps`, `refresh_every`, `sync`, `order`, `compression`,
    `memory`, `compute`, `shard_weights` and `inner`, as for `parallelize`; `compute` as a mask,
    since no pipeline says how many steps an image has. Every compiled graph has its own caches; the
    beginning of an image is inferred.

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
    compute = compiler.runtime.schedule.compute
    if isinstance(compute, int) or compute == "auto":
        raise ValueError(
            f"compute={compute!r}: of how many steps is not known to piflux.backend. Give it a "
            "mask, or call piflux.parallelize"
        )
    compiled = compiler(gm, example_inputs)
    held = [weakref.ref(x) for x in example_inputs if isinstance(x, torch.nn.Parameter)]
    _COMPILED[compiler.runtime] = compiler.programs, held
    return compiled


_COMPILED: WeakKeyDictionary[Runtime, tuple[list[Program], list[weakref.ref[Any]]]]
_COMPILED = WeakKeyDictionary()
"""The programs that `torch.compile(backend="piflux")` made, with the parameters that they read."""


def reports_of(module: torch.nn.Module) -> list[tuple[GraphReport, Sequence[str]]]:
    """The backend's graphs that read a parameter of `module`, each with notes on its runs."""
    own = {id(x) for x in module.parameters()}
    return [
        (program.report, runtime.notes)
        for runtime, (programs, held) in _COMPILED.items()
        if any(id(ref()) in own for ref in held)
        for program in programs
    ]


def make_compiler(
    *,
    group: Any = None,
    policy: PolicyName | str = "rotate",
    sync_steps: int | Sequence[int] | None = None,
    refresh_every: int | None = None,
    sync: Sync = "gather",
    order: int = 1,
    compression: Compression = "none",
    memory: MemoryLimit = None,
    compute: str | int | Sequence[bool] = "all",
    shard_weights: Sharing = False,
    inner: str | Callable[..., Any] = "inductor",
    **unknown: Any,
) -> Compiler:
    """Raises ValueError for unknown options or values out of range."""
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))}: piflux knows group, policy, "
            "sync_steps, refresh_every, sync, order, compression, memory, compute, shard_weights "
            "and inner"
        )
    # A bad value is reported before any rank waits for another.
    settings: dict[str, Any] = {
        "policy": policy,
        "sync_steps": sync_steps,
        "refresh_every": refresh_every,
        "sync": sync,
        "order": order,
        "compression": compression,
        "compute": compute,
    }
    if str(policy).endswith(".json"):
        settings |= read_settings(policy)
    chooses = settings["policy"] == "auto"
    if chooses:
        settings["policy"] = "rotate"  # until it is chosen, what may need most
    Schedule(**settings)
    check_memory(memory, shard_weights)
    ranks = resolve_group(group)
    world_size = ranks.size if ranks is not None else 1
    schedule = Schedule(**settings, world_size=world_size)
    return Compiler(
        schedule, ranks, inner, chooses=chooses, memory=memory, shard_weights=shard_weights
    )
