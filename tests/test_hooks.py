"""Hooks that wrap a module's forward, and the signatures that libraries read off it."""

import inspect
from functools import partial

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from captures import captured_once
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from models import tiny_pipeline
from test_pipeline import draw
from torch import nn

import piflux

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x, *, scale: float = 1.0):
        for block in self.blocks:
            q = block(x * scale)[:, None]
            x = x + F.scaled_dot_product_attention(q, q, q)[:, 0]
        return x


X = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))


def parallel_of(model):
    return piflux.parallelize(model, group=piflux.virtual_ranks(2), policy="gather", inner="eager")


class Around(ModelHook):
    """Doubles what goes in, halves what comes out."""

    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append("in")
        return (args[0] * 2, *args[1:]), kwargs

    def post_forward(self, module, output):
        self.calls.append("out")
        return output / 2


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
def test_a_hook_of_the_whole_module_runs_around_the_graph(when):
    """Once a call, for the parallel module and for its target, each of which stays what it is."""
    model, hook = Model(), Around()
    want, plain = Model()(X * 2) / 2, Model()(X)
    if when == "before":
        add_hook_to_module(model, hook)
    with captured_once():
        parallel = parallel_of(model)
        if when == "after a call":
            assert (parallel(X) - plain).abs().max() < 1e-6
        if when != "before":
            add_hook_to_module(parallel, hook)
        calls = parallel._piflux_calls
        for call in (parallel, parallel.forward):
            hook.calls.clear()
            assert (call(X) - want).abs().max() < 1e-6
            assert hook.calls == ["in", "out"]
        assert parallel._piflux_calls == calls + 2
        hook.calls.clear()
        assert (model(X) - want).abs().max() < 1e-6
        assert hook.calls == ["in", "out"] and parallel._piflux_calls == calls + 2
        remove_hook_from_module(model if when == "after" else parallel)
        hook.calls.clear()
        assert (parallel(X) - plain).abs().max() < 1e-6
        assert (model(X) - plain).abs().max() < 1e-6
        assert parallel._piflux_calls == calls + 3 and not hook.calls
        assert len(piflux.explain(parallel).graphs) == 1


def test_hooks_of_pytorch_run_once_within_others():
    model, calls = Model(), []
    parallel = parallel_of(model)
    add_hook_to_module(parallel, Around())
    parallel.register_forward_hook(lambda *_: calls.append(1))
    parallel(X)
    assert calls == [1]


def test_a_forward_that_someone_assigns():
    """Before, it is what is compiled; afterwards it runs around the graph."""
    model = Model()
    model.forward = partial(model.forward, scale=2.0)
    want = model(X)
    parallel = parallel_of(model)
    assert (parallel(X) - want).abs().max() < 1e-6
    add_hook_to_module(parallel, Around())
    doubled = model(X)
    assert (parallel(X) - doubled).abs().max() < 1e-6
    remove_hook_from_module(parallel)
    assert (parallel(X) - want).abs().max() < 1e-6 and (model(X) - want).abs().max() < 1e-6
    forward, calls = parallel.forward, parallel._piflux_calls
    parallel.forward = lambda x: forward(x) + 1
    assert (parallel(X) - want - 1).abs().max() < 1e-6
    assert parallel._piflux_calls == calls + 1


def group(kind, model):
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, CPU, CPU, offload_type=kind, **blocks)


WITHIN = {
    "GroupOffloadingHook": partial(group, "block_level"),
    "GroupOffloadingHook on leaves": partial(group, "leaf_level"),
    "LayerwiseCastingHook": partial(
        apply_layerwise_casting, storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
    "AlignDevicesHook": lambda model: accelerate.cpu_offload(model, CPU),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after a call"])
@pytest.mark.parametrize("name", WITHIN)
def test_a_hook_within_the_module_is_refused(name, late):
    """At `parallelize`, or at the next call."""
    model = Model()
    if late:
        parallel = parallel_of(model)
        parallel(X)
        WITHIN[name](parallel)
        attempt = partial(parallel, X)
    else:
        WITHIN[name](model)
        attempt = partial(parallel_of, model)
    with pytest.raises(piflux.CannotCapture, match=rf"{name.split()[0]} works within this Model"):
        attempt()


def test_model_offload_of_a_pipeline():
    """Before `parallelize`, and after it and an image, with what its calls do to its hooks."""
    want = draw(tiny_pipeline(), 0)
    with captured_once():
        before, after = tiny_pipeline(), tiny_pipeline()
        before.enable_model_cpu_offload(device="cpu")
        pipes = parallel_of(before), parallel_of(after)
        draw(pipes[1], 0)
        pipes[1].enable_model_cpu_offload(device="cpu")
        for pipe in pipes:
            calls = pipe.transformer._piflux_calls
            for image in (draw(pipe, 0), draw(pipe, 0)):
                assert (image - want).abs().max() < 1e-5
            assert pipe.transformer._piflux_calls > calls
            assert len(piflux.explain(pipe).graphs) == 1
        calls = pipes[0].transformer._piflux_calls
        assert torch.equal(draw(before, 0), want)
        assert pipes[0].transformer._piflux_calls == calls


def test_signatures_are_the_originals():
    pipe = tiny_pipeline()
    parallel = parallel_of(pipe)
    for name in ("forward", "__call__"):
        assert inspect.signature(getattr(parallel.transformer, name)) == inspect.signature(
            getattr(pipe.transformer, name)
        )
    assert "true_cfg_scale" in inspect.signature(parallel.__call__).parameters
    assert inspect.signature(type(parallel)) == inspect.signature(type(pipe))
    hooked = parallel_of(tiny_pipeline().transformer)
    add_hook_to_module(hooked, Around())
    assert "img_ids" in inspect.signature(hooked.forward).parameters
