"""What parallelize returns, on one rank."""

import ast
import copy
import gc
import inspect
import json
import logging
import pickle
import subprocess
import sys
import threading
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models import flux_inputs, tiny_flux
from torch import nn

import piflux
from piflux.capture.dynamo import SETTINGS

log = logging.getLogger(__name__)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        q = self.project(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]


def test_public_names():
    """What a type checker reads in `__init__` is there at run time, without torch at first.

    The commands come without the compiler, Dynamo and SciPy, which take a second more.
    """
    (block,) = [x for x in ast.parse(inspect.getsource(piflux)).body if isinstance(x, ast.If)]
    typed = {alias.asname for line in block.body for alias in line.names}
    assert typed == set().union(*piflux._HOMES.values()) <= set(dir(piflux))
    assert all(getattr(piflux, name).__name__ == name for name in typed)
    with pytest.raises(AttributeError, match="nothing"):
        piflux.nothing  # noqa: B018
    code = "import sys, piflux; assert 'torch' not in sys.modules; import piflux.tools.cli; "
    code += "assert not {'torch._dynamo', 'piflux.compile.compiler', 'scipy'} & {*sys.modules}; "
    code += "piflux.parallelize"
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.no_grad()
def test_one_rank_equals_the_plain_model():
    model, inputs = tiny_flux(), flux_inputs()
    want = model(**inputs, return_dict=False)[0]
    assert torch.equal(
        piflux.parallelize(model, inner="eager")(**inputs, return_dict=False)[0], want
    )


def test_one_state_seen_through_two_classes():
    model = Attention()
    parallel = piflux.parallelize(model, inner="eager")
    assert isinstance(parallel, Attention)
    assert type(parallel).__name__ == "Attention"
    parallel.project = nn.Linear(8, 8)
    assert model.project is parallel.project
    model.double()
    assert parallel.project.weight.dtype is torch.float64
    assert parallel.state_dict().keys() == model.state_dict().keys()


def test_hooks_run_once():
    model, calls = Attention(), []
    parallel = piflux.parallelize(model, inner="eager")
    parallel.register_forward_hook(lambda *_: calls.append(1))
    parallel(torch.randn(1, 6, 8))
    assert calls == [1]


def test_hooks_that_come_and_go():
    """Dynamo itself would go on with those of the first call."""
    model, x = Attention(), torch.randn(1, 6, 8)
    parallel = piflux.parallelize(model, inner="eager")
    assert torch.equal(parallel(x), model(x))
    for module in (model.project, parallel):
        hook = module.register_forward_hook(lambda _, args, out: out * 2)
        assert torch.equal(parallel(x), model(x))
        hook.remove()
    with piflux.generation(parallel):
        assert torch.equal(parallel(x), model(x))
        graphs = len(piflux.explain(parallel).graphs)
        parallel(x)
    assert len(piflux.explain(parallel).graphs) == graphs, "captured anew without need"


class Doubles:
    def hook(self, module, args, out):
        return out * 2


def test_a_hook_that_comes_and_goes_is_captured_once():
    """Graphs with and without it are kept, and no others: of what is gone nothing stays."""
    model, x, doubles = Attention(), torch.randn(1, 6, 8), Doubles()
    parallel = piflux.parallelize(model, inner="eager")
    for _ in range(3):
        assert torch.equal(parallel(x), model(x))
        hook = model.project.register_forward_hook(doubles.hook)
        assert torch.equal(parallel(x), model(x))
        hook.remove()
    programs = list(parallel._piflux_compiler.programs)
    assert len(programs) == 2
    for plus in range(3):
        hook = model.project.register_forward_hook(lambda _, args, out, n=plus: out + n)
        assert torch.equal(parallel(x), model(x))
        hook.remove()
        gc.collect()
    left = parallel._piflux_compiler.programs
    assert len(left) == 2 and not any(x is y for x in left for y in programs)
    flags = {"with_kwargs": True}
    with model.project.register_forward_hook(lambda _, args, kwargs, out: out * 3, **flags):
        assert torch.equal(parallel(x), model(x))


class Picky(Attention):
    def forward(self, x, y=None):
        if x.shape[1] == 7:
            raise ValueError("seven is refused")
        return super().forward(x)


def test_a_call_that_the_model_refuses_changes_nothing():
    """It is no graph break: later calls are of one graph as before."""
    parallel, x = piflux.parallelize(Picky(), inner="eager"), torch.randn(1, 6, 8)
    want = parallel(x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        parallel(y=x)
    with pytest.raises(ValueError, match="seven is refused"):
        parallel(torch.randn(1, 7, 8))
    assert torch.equal(parallel(x), want)
    report = piflux.explain(parallel)
    assert (len(report.graphs), report.notes) == (1, ())


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_thread_at_a_time(ranks):
    """Also of two models on the same ranks; the call under way is not disturbed."""
    group = piflux.virtual_ranks(ranks) if ranks > 1 else None
    entered, leave = threading.Event(), threading.Event()

    def inner(gm, inputs):
        def run(*args):
            if not entered.is_set():
                entered.set()
                assert leave.wait(60)
            return gm(*args)

        return run

    models = [Attention(), Attention()]
    first, second = (piflux.parallelize(m, inner=inner, group=group) for m in models)
    x, drawn = torch.randn(1, 6, 8), []
    thread = threading.Thread(target=lambda: drawn.append(first(x)))
    thread.start()
    assert entered.wait(60)
    for model in [first, second] if ranks > 1 else [first]:
        with pytest.raises(RuntimeError, match="another thread is calling this Attention"):
            model(x)
    leave.set()
    thread.join(60)
    assert (drawn[0] - models[0](x)).abs().max() < 1e-6
    assert (second(x) - models[1](x)).abs().max() < 1e-6


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_of_the_plain_model(duplicate):
    model = Attention()
    twin = duplicate(piflux.parallelize(model, inner="eager"))
    assert type(twin) is Attention
    assert twin.project.weight is not model.project.weight
    assert torch.equal(twin.project.weight, model.project.weight)


def test_many_models_of_one_class():
    """Each has a recompile limit of its own: Dynamo's is 8 a code object."""
    x = torch.randn(1, 6, 8)
    for _ in range(12):
        model = Attention()
        parallel = piflux.parallelize(model, inner="eager")
        assert (parallel(x) - model(x)).abs().max() < 1e-6
        assert len(piflux.explain(parallel).graphs) == 1


def test_sizes_that_varied_between_models_are_numbers():
    """Those of one model's calls are symbols from the second on."""
    sizes = []

    def inner(gm, inputs):
        sizes.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return gm.forward

    for tokens in (6, 7):
        parallel = piflux.parallelize(Attention(), inner=inner)
        parallel(torch.randn(1, tokens, 8))
    assert sizes == [[], []]
    parallel(torch.randn(1, 8, 8))
    assert len(sizes[2]) == 1


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_nothing_outlives_the_parallel_module(inner):
    """Its caches are gigabytes; the target lives on."""
    model, x = Attention(), torch.randn(1, 6, 8)
    parallel = piflux.parallelize(model, group=piflux.virtual_ranks(2), inner=inner)
    parallel(x)
    caches = weakref.ref(parallel._piflux_compiler.runtime.streams._streams[0])
    del parallel
    gc.collect()
    assert caches() is None
    again = piflux.parallelize(model, group=piflux.virtual_ranks(2), inner=inner)
    assert (again(x) - model(x)).abs().max() < 1e-6


class Scaled(Attention):
    """A first call makes a table, and notes whether a call was plain, as no graph can."""

    def __init__(self):
        super().__init__()
        self.table = None
        self.plain_calls = 0

    def forward(self, x, broken=False):
        if self.table is None:
            with torch.device("cpu"):
                self.table = torch.arange(8) / 8
        if not torch.compiler.is_compiling():
            self.plain_calls += 1
        if broken:
            torch._dynamo.graph_break()
        return super().forward(x * self.table)


def test_what_a_first_call_makes_is_made_by_a_plain_one():
    parallel = piflux.parallelize(Scaled(), group=piflux.virtual_ranks(2), inner="eager")
    x = torch.randn(1, 6, 8)
    results = [parallel(x) for _ in range(3)]
    assert parallel.plain_calls == 1
    assert len(piflux.explain(parallel).graphs) == 1
    want = parallel._piflux_target(x)
    assert all((result - want).abs().max() < 1e-6 for result in results)


def test_a_model_that_can_be_captured_makes_no_plain_call():
    model, x = Scaled(), torch.randn(1, 6, 8)
    model.table = torch.arange(8) / 8
    assert piflux.parallelize(model, inner="eager")(x).isfinite().all()
    assert model.plain_calls == 0


def test_a_graph_break_makes_a_plain_call_at_first_only():
    """Then the model is taken in fragments."""
    x = torch.randn(1, 6, 8)
    broken = piflux.parallelize(Scaled(), inner="eager")
    got = broken(x, broken=True)
    assert broken.plain_calls == 1
    assert (got - broken._piflux_target(x)).abs().max() < 1e-6
    whole = piflux.parallelize(Scaled(), inner="eager")
    whole(x)
    plain = whole.plain_calls
    assert (whole(x, broken=True) - whole(x)).abs().max() < 1e-6
    assert whole.plain_calls == plain


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_in_a_call(enabled):
    """Before and after one, and after one that failed, as it was."""
    found = []

    def inner(gm, inputs):
        found.append(gc.isenabled())
        return gm.forward

    parallel, x = piflux.parallelize(Scaled(), inner=inner), torch.randn(1, 6, 8)
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(RuntimeError, match="must match the size"):
            parallel(x[..., :5])
        assert gc.isenabled() == enabled
        parallel(x)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert found == [False]


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_the_workers_of_inductor_start_before_the_first_capture(inner):
    parallel, x = piflux.parallelize(Attention(), inner=inner), torch.randn(1, 6, 8)
    graphs = []

    def start():
        graphs.append(len(piflux.explain(parallel).graphs))

    with mock.patch("torch._inductor.async_compile.maybe_warm_pool", start):
        parallel.double()
        parallel(x.double())
        parallel.float()
        parallel(x)
    assert len(piflux.explain(parallel).graphs) == 2
    assert graphs[:1] == ([0] if inner == "inductor" else [])


class Deprecated(Attention):
    def forward(self, x):
        log.warning("deprecated")
        return super().forward(x)


def test_a_model_that_warns_is_captured():
    parallel = piflux.parallelize(Deprecated(), inner="eager")
    assert parallel(torch.randn(1, 6, 8)).isfinite().all()
    assert len(piflux.explain(parallel).graphs) == 1


def test_the_settings_of_dynamo_can_be_recorded():
    """As torch 2.11 does at each compilation."""
    recorded = {
        key: sorted(value) if isinstance(value, set) else value for key, value in SETTINGS.items()
    }
    methods = json.loads(json.dumps(recorded))["ignore_logger_methods"]
    assert methods == ["debug", "error", "info", "warning"]


def test_results_carry_no_gradient():
    parallel = piflux.parallelize(Attention(), inner="eager")
    assert not parallel(torch.randn(1, 6, 8)).requires_grad


def test_a_module_of_the_backend_is_explained():
    """By the parameters that its graphs read; another backend's module has none."""
    x, model = torch.randn(1, 6, 8), Attention()
    compiled = torch.compile(model, backend="piflux", options={"inner": "eager"})
    with pytest.raises(TypeError, match="no graph of this Attention was compiled by piflux"):
        piflux.explain(compiled)
    with torch.no_grad():
        compiled(x)
        torch.compile(Attention(), backend="piflux", options={"inner": "eager"})(x)
    (graph,) = piflux.explain(compiled).graphs
    assert graph.attentions == 1
    other = torch.compile(Attention(), backend="eager")
    other(x)
    with pytest.raises(TypeError, match="no graph"):
        piflux.explain(other)


@pytest.mark.parametrize("times", [[1.0, 0.5], 2, torch.ones(1, 2), torch.tensor(1.0)])
def test_timesteps_are_a_tensor_of_one_dimension(times):
    parallel = piflux.parallelize(Attention(), inner="eager")
    with (
        pytest.raises(TypeError, match="timesteps must be"),
        piflux.generation(parallel, timesteps=times),
    ):
        pass


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.jit.trace(m, torch.ones(1, 6, 8))]
)
def test_wrapped_modules_are_refused(wrap):
    with pytest.raises(ValueError, match="pass the module that it was made of"):
        piflux.parallelize(wrap(Attention()))


@pytest.mark.parametrize("shares", ["no", 1, None])
def test_whether_weights_are_shared_is_a_bool(shares):
    with pytest.raises(ValueError, match="shard_weights"):
        piflux.parallelize(Attention(), shard_weights=shares)


def test_a_generation_without_a_call_is_told_of(caplog):
    model, x = Attention(), torch.randn(1, 6, 8)
    parallel = piflux.parallelize(model, inner="eager")
    with piflux.generation(parallel):
        model(x)
    assert "the Attention that it was given was never called" in caplog.text
    caplog.clear()
    with piflux.generation(parallel):
        parallel(x)
    assert "never called" not in caplog.text
