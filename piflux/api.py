"""`parallelize`, `generation` and `explain`: what a user calls."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported, UserError
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import keystr, tree_flatten_with_path

from piflux.capture import dynamo
from piflux.capture.captures import Captures
from piflux.capture.views import View, standing_for, view_of
from piflux.compile.choices import MemoryLimit, Sharing
from piflux.compile.compiler import Compiler, make_compiler, reports_of
from piflux.compile.report import Report
from piflux.errors import (
    CannotCapture,
    CannotShard,
    CompileError,
    DependsOnData,
    PifluxError,
    plain,
)
from piflux.integrations.alike import SameWeights
from piflux.integrations.diffusers import (
    has_step_cache,
    is_pipeline,
    parallel_pipeline,
    refuse_step_caches,
    transformers_of,
)
from piflux.integrations.hooks import (
    Forward,
    OldForward,
    breaks_graphs,
    hooked,
    refuse_hooks,
    within_hooks,
)
from piflux.integrations.times import shown
from piflux.memory.shares import Shares, is_shared
from piflux.policies.schedule import Compression, PolicyName, Sync
from piflux.ranks.groups import bring, check_device, serves
from piflux.ranks.processes import ProcessRanks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from piflux.ranks.meeting import Meeting
    from piflux.ranks.virtual import VirtualRanks

Target = TypeVar("Target")

log = logging.getLogger(__name__)


class ParallelModule(View, nn.Module):
    """The class that a parallelized module's own class is mixed with; see `View`."""

    _piflux_compiler: Compiler
    _piflux_captures: Captures
    _piflux_settings: contextlib.AbstractContextManager[Any]
    _piflux_core: Callable[..., Any]
    _piflux_outer: tuple[Any, Any] | None = None
    _piflux_calls = 0
    _piflux_unchecked = True  # whether an image began since weights were compared
    _piflux_same_weights: SameWeights

    forward: Any = Forward()
    _old_forward: Any = OldForward()

    # PyTorch's own hooks live in the shared `__dict__`, and the target's own call runs them.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def _piflux_run(self, *args: Any, **kwargs: Any) -> Any:
        """The compiled call; what it raises the other ranks are told of."""
        runtime = self._piflux_compiler.runtime
        ranks = runtime.ranks
        with runtime.alone(type(self).__name__):
            try:
                return self._piflux_called(*args, **kwargs)
            except BaseException as error:
                self._piflux_compiler.met_in = -1
                if ranks is not None:
                    ranks.stop(error)
                raise
            finally:
                if ranks is not None:
                    ranks.busy = False

    def _piflux_called(self, *args: Any, **kwargs: Any) -> Any:
        """With the weights where hooks around it have put them."""
        parameter = next(self.parameters(), None)
        if has_step_cache(self):
            refuse_step_caches(self)
        if breaks_graphs(self, parameter):
            refuse_hooks(self)
        ranks, cls = self._piflux_compiler.runtime.ranks, type(self)
        shares = self._piflux_compiler.shares
        if parameter is not None:
            check_device(ranks, parameter.device)
        if isinstance(ranks, ProcessRanks):
            target, weights = self._piflux_target, self._piflux_same_weights
            begins = cls._piflux_unchecked
            changed = begins and weights.may_have_changed(target)
            meet = partial(self._piflux_compiler.meet, begins=begins, changed=changed)
            if ranks.surviving(meet, "programs"):
                ranks.surviving(partial(weights.compare, target, ranks, shares), "weights")
        looks = cls._piflux_unchecked or not self._piflux_compiler.runtime.explicit
        if looks and self._piflux_captures.choose(self):
            self._piflux_compiler.drop_forgotten()
        capture = self._piflux_captures.latest
        cls._piflux_unchecked = False
        cls._piflux_calls += 1
        if ranks is not None:
            ranks.busy, ranks.doing = True, "the model's capture"  # until its graph runs
        with torch.no_grad(), self._piflux_settings, dynamo.uncollected(), within_hooks(self):
            if not self._piflux_compiler.has_made:
                self._piflux_compiler.prepare()
            if capture.breaks:
                return self._piflux_in_fragments(args, kwargs)
            try:
                try:
                    return capture.whole(*args, **kwargs)
                except (Unsupported, UserError):
                    refuse_step_caches(self)
                    refuse_hooks(self)
                    if self._piflux_compiler.has_made:
                        raise
                    if shares is not None:
                        shares.aside.bring()
                # Dynamo need not follow how a first call makes what later ones find: rotary tables.
                self._piflux_target(*args, **kwargs)
                return capture.whole(*args, **kwargs)
            except (Unsupported, UserError, DependsOnData) as error:
                note = self._piflux_break(error)
            try:
                result = self._piflux_in_fragments(args, kwargs)
            except PifluxError:
                raise
            except Exception:
                # The model refuses such inputs, which says nothing of its graph of others.
                capture.breaks = False
                raise
            self._piflux_compiler.runtime.notes.append(note)
            if ranks is None or ranks.rank == 0:
                log.warning("%s", note)
            return result

    def _piflux_break(self, reason: Exception) -> str:
        """From now on take the graphs that Dynamo makes of the parts of a call; says why."""
        compiler = self._piflux_compiler
        compiler.have_whole_weights()
        if compiler.shares is not None:
            raise CannotCapture(
                f"shard_weights: {type(self).__name__} is no one graph, and what runs between "
                "its graphs may read weights that are elsewhere. Leave them whole. "
                f"{plain(str(reason))}"
            ) from reason
        first, *_ = plain(str(reason)).splitlines() or [""]
        note = (
            f"{type(self).__name__} is no one graph ({first}): each of its graphs is split by "
            "itself, and what goes from one to the next is gathered"
        )
        # What was raised holds what the model was called with: its frames, and what Dynamo adds.
        why = reason if isinstance(reason, CannotShard) else CompileError(str(reason))
        why.__traceback__ = why.__cause__ = why.__context__ = None
        vars(why).pop("_torch_dynamo_tracer_output", None)
        capture = self._piflux_captures.latest
        if capture.fragments is None:
            fragments = dynamo.in_fragments(call := dynamo.call_of(self._piflux_target), compiler)
            dynamo.forget_with(self, call)
        else:
            fragments, _ = capture.fragments
        capture.fragments, capture.breaks = (fragments, why), True
        return note

    def _piflux_in_fragments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        capture, compiler = self._piflux_captures.latest, self._piflux_compiler
        assert capture.fragments is not None
        fragments, why_broken = capture.fragments
        inputs = tree_flatten_with_path((args, kwargs))[0]
        named = {keystr(path): x for path, x in inputs if isinstance(x, Tensor)}
        ranks = compiler.runtime.ranks

        def act() -> Any:
            with compiler.runtime.fragments(named) as call, dynamo.looking_at_hooks():
                run = partial(fragments, *args, **kwargs)
                return run() if call is None else call.run_fragments(run)

        result = act() if ranks is None else ranks.surviving(act, ranks.calls())
        compiler.check_fragments(why_broken)
        return result


def parallelize(
    target: Target,
    *,
    group: ProcessGroup | DeviceMesh | Meeting | VirtualRanks | None = None,
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
) -> Target:
    """Split a diffusion transformer, or a diffusers pipeline's, over the ranks of `group`.

    Args:
        target: a module with scaled dot product attention, or a diffusers pipeline. It stays as it
            is, but is moved to this rank's GPU if it is on another one; the result is a drop-in
            that shares its parameters. The module is compiled at its first call, once per input
            signature, for inference only.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the default group. With none
            initialised and torchrun's environment present, it is initialised; else one rank runs
            alone. `piflux.virtual_ranks(n)` simulates n ranks in this process. Where processes come
            and go, as in a server, a `piflux.ranks.meeting.Meeting`.
        policy: where attention gets the other parts' keys and values: 'gather' (fresh, exact),
            'rotate' or 'displaced' (remembered). 'auto' takes the freshest that the link between
            the ranks can afford, on all of them alike: at the first call it measures the link and
            two kernels, or remembers what it measured on this machine, and says what it took and
            why, as `explain` does. Or the path of a `.json` file with settings that take the place
            of these, as `piflux quality --tune` writes it.
        sync_steps: the sync steps, which gather everything: their numbers, or how many of the
            first steps. None: (0, 2), which the policy 'auto' makes (0, 1) in images of nine steps
            or fewer; where `compute` leaves steps out (0, 2, 5), on more than two ranks (0, 2, 5,
            10, 16). What is asked for is what is done.
        refresh_every: after those, every so many steps one is a sync step, too. None: none is.
        sync: how a sync step comes by all keys and values: 'gather', or 'recompute', by which each
            rank computes the whole step and nothing is sent. That is for links that take longer,
            and a second graph is compiled for it. 'auto' measures the link and two kernels at the
            first call, and chooses what is faster, on all ranks alike; `explain` says why.
        order: 1: attention reads remembered keys and values moved on to this step's noise level,
            by the change between their last two versions, which takes a second cache. 0: it reads
            them as they were.
        compression: 'int8': that change is remembered in 8 bits a number in place of the second
            version, and is what 'displaced' sends in steady steps. 'int4': in 4 bits, and the last
            version in 8. 'none': as the model computes.
        memory: GiB that a rank may hold on its GPU, what is there already included, or 'auto' for
            as much as the GPU has. If the settings take more, the nearest ones that fit take their
            place: a stronger compression, and in the end 'gather', which remembers nothing; also
            shared weights, if `shard_weights` is 'auto'. It is counted at the first call, which
            says what it took and why, as `explain` does. None: settings that don't fit are
            refused, but for what 'auto' chose.
        compute: which denoise steps are computed, on one rank, too; in the others no block is
            run, and the prediction is continued along the last two that were computed. 'all'; a
            number of the steps that the pipeline, or `generation`, announces; a mask such as
            'xxxxx.x.xx', or a sequence of bools, for images of just as many steps; 'auto': about
            two of three steps, and all of an image of fewer than ten.
        shard_weights: whether each rank holds a share of the weights of repeated blocks, which are
            gathered block by block while the block before computes. Exact. From the first call on
            the module's own weights can't be read, written or moved. A module on the host is not
            moved to this rank's GPU as a whole, but each rank takes its share at the first call.
            A lost rank takes its share along: `WeightsLost`. Where one process has all ranks, it
            has each weight once, and this changes nothing. 'auto' shares them if they don't fit
            into `memory` otherwise: before it tries what changes the image if steps hardly wait for
            weights, and after that on slower links.
        inner: the Dynamo backend that compiles the final graph: 'inductor', or 'eager' to debug.

    Returns:
        For a module, a module of the same class. For a pipeline, a pipeline of the same class
        whose every call is one generation, and whose ranks start from the same noise and decode
        a band of the picture's rows each.

    Raises:
        ValueError: a setting out of range, a target already parallelized, a foreign group.
        TypeError: a target that is neither a module nor a pipeline.
        RuntimeError: CUDA asked for where there is none, or weights kept on another rank's GPU.
        RankFailed: there are fewer GPUs than ranks on this host.
        CannotCapture: one of diffusers' step caches is enabled; at the next call, if it is later.
        CannotShard: at the first call, as all that follows; the model can't be split.
        NoAttention: there is nothing to split.
        DoesNotFit: a GPU has too little memory left.
        RanksDisagree: ranks were called with different things.
    """
    settings: dict[str, Any] = {
        "group": group,
        "policy": policy,
        "sync_steps": sync_steps,
        "refresh_every": refresh_every,
        "sync": sync,
        "order": order,
        "compression": compression,
        "memory": memory,
        "compute": compute,
        "shard_weights": shard_weights,
        "inner": inner,
    }
    if is_pipeline(target):
        transformers = transformers_of(target)
        compilers = {name: make_compiler(**settings) for name in transformers}
        pipe: Any = target
        others = [x for x in pipe.components.values() if isinstance(x, nn.Module)]
        for name, module in transformers.items():
            bring(compilers[name].runtime.ranks, module, others)
        parts = {
            name: _parallel_module(module, compilers[name]) for name, module in transformers.items()
        }
        return parallel_pipeline(target, parts)
    if isinstance(target, nn.Module):
        return _parallel_module(target, make_compiler(**settings))
    raise TypeError(
        "piflux.parallelize takes an nn.Module or a diffusers pipeline, got "
        f"{type(target).__module__}.{type(target).__name__}; of anything else, such as a modular "
        "pipeline, parallelize the transformer that it holds"
    )


def _parallel_module(target: nn.Module, compiler: Compiler) -> Any:
    if isinstance(target, ParallelModule):
        raise ValueError(
            f"this {type(target).__name__} is already parallelized: pass the original module"
        )
    if isinstance(target, torch._dynamo.OptimizedModule):
        raise ValueError(
            "this module is already wrapped by torch.compile: pass the original module; "
            "parallelize compiles it"
        )
    if isinstance(target, (torch.jit.ScriptModule, nn.DataParallel, DistributedDataParallel)):
        raise ValueError(
            f"this {type(target).__name__} is not the model as it was written: pass the module "
            "that it was made of"
        )
    if any(map(is_shared, target.parameters())):
        raise ValueError(
            f"the weights of this {type(target).__name__} are shared over the ranks already, by "
            "an earlier parallelize: load it anew"
        )
    refuse_step_caches(target)
    refuse_hooks(target)
    bring(compiler.runtime.ranks, target)
    if compiler.shares_are_open:
        compiler.may_share = lambda: not hooked(target)
    if compiler.shares is not None and not (compiler.shares_are_open and hooked(target)):
        _put_aside(target, compiler.shares)
    if not hooked(target):
        parameter = next(target.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        check_device(compiler.runtime.ranks, device)
    return view_of(
        target,
        ParallelModule,
        _piflux_core=standing_for(type(target).forward, ParallelModule._piflux_run),
        _piflux_compiler=compiler,
        _piflux_same_weights=SameWeights(),
        _piflux_settings=dynamo.settings(),
        _piflux_captures=Captures(target, compiler),
    )


def _put_aside(target: nn.Module, shares: Shares) -> None:
    """Weights on the host of a rank that has a GPU stay there until they are shared."""
    if hooked(target):
        raise CannotCapture(
            f"hooks move the weights of this {type(target).__name__}, as those of "
            "enable_model_cpu_offload do, and shared ones can't be moved. Leave the transformer "
            'out of the offload (pipe._exclude_from_cpu_offload = ["transformer"] before it), or '
            "its weights whole"
        )
    parameter = next(target.parameters(), None)
    if parameter is None or parameter.device.type != "cpu" or not torch.cuda.is_available():
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if serves(shares.ranks, device):
        shares.aside.put(target, device)


def _parallel_modules(target: Any) -> list[ParallelModule]:
    modules = transformers_of(target).values() if is_pipeline(target) else [target]
    found = [m for m in modules if isinstance(m, ParallelModule)]
    if not found:
        raise TypeError(
            f"this {type(target).__name__} is not parallelized: pass what piflux.parallelize gave"
        )
    return found


@contextlib.contextmanager
def generation(target: Any, *, timesteps: Tensor | None = None) -> Iterator[None]:
    """One image: inside the block calls are its denoise steps, and the first is step 0.

    A parallelized pipeline does this by itself at every call. Without it the beginning of an image
    is inferred from the inputs, at the price of a host-device synchronisation each step. Calls with
    the same conditions are steps of one image, so two images of one prompt can't take turns here.

    Args:
        target: what `parallelize` gave.
        timesteps: (steps,): those that the model will be called with, in any order, or the
            scheduler's, which diffusers' models get as thousandths. What depends on them alone is
            then computed for all steps at once.

    Raises:
        TypeError: the target isn't parallelized, or `timesteps` is no such tensor.
        StepsUnforeseen: at the end, if the first of `timesteps` was met and a later step's was not.
    """
    if timesteps is not None and not (isinstance(timesteps, Tensor) and timesteps.dim() == 1):
        shape = f" of shape {tuple(timesteps.shape)}" if isinstance(timesteps, Tensor) else ""
        raise TypeError(
            f"timesteps must be a tensor with one number a step, got {type(timesteps).__name__}"
            f"{shape}"
        )
    foreseen = None if timesteps is None else partial(shown, timesteps)
    modules = _parallel_modules(target)
    calls = [module._piflux_calls for module in modules]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(module._piflux_compiler.runtime.generation(foreseen))
            type(module)._piflux_unchecked = True
        yield
    if calls == [module._piflux_calls for module in modules]:
        log.warning(
            "piflux.generation ended and the %s that it was given was never called: call what "
            "piflux.parallelize returned, not the original",
            type(target).__name__,
        )


def explain(target: Any) -> Report:
    """What the compiler did to a parallelized module or pipeline, graph by graph.

    Or to a module of `torch.compile(backend="piflux")` that was called.

    Raises:
        TypeError: the target isn't parallelized.
    """
    if isinstance(target, torch._dynamo.OptimizedModule):
        found = reports_of(target)
        if not found:
            raise TypeError(
                f"no graph of this {type(target._orig_mod).__name__} was compiled by piflux: call "
                'it once, and compile it with torch.compile(model, backend="piflux")'
            )
        notes = dict.fromkeys(note for _, noted in found for note in noted)
        return Report(tuple(report for report, _ in found), tuple(notes))
    compilers = [module._piflux_compiler for module in _parallel_modules(target)]
    return Report(
        tuple(report for compiler in compilers for report in compiler.reports),
        tuple(dict.fromkeys(note for compiler in compilers for note in compiler.runtime.notes)),
    )
