"""Other models than FLUX: what several ranks compute is the untouched model's.

`gather` is exact by its nature. `rotate` is too as long as the latents stand still, for then the
remembered keys and values are the fresh ones; so it is judged on still latents, part by part.
"""

import pytest
import torch
from captures import captured_once
from model_zoo import (
    CASES,
    SIZES,
    VARIANTS,
    sana,
    sana_inputs,
    z_image,
    z_image_batch,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import piflux
from piflux.errors import CannotShard

EXACT = 1e-4
STEPS = 6


def samples(model, inputs) -> list[Tensor]:
    """Every tensor that a call gives."""
    return tree_leaves(model(**inputs, return_dict=False))


@torch.no_grad()
def exact(model, inputs) -> list[Tensor]:
    return samples(model, inputs)


@captured_once()
def gathered(rank, group, name):
    """What the first size gives."""
    case = CASES[name]
    model = piflux.parallelize(case.build(), group=group, policy="gather", inner="eager")
    return samples(model, case.inputs(*case.sizes[0]))


@captured_once()
def rotated(rank, group, name):
    """What each size gives at each step of a still image; the graphs compiled after the second."""
    case = CASES[name]
    counters.clear()
    model = piflux.parallelize(case.build(), group=group, policy="rotate", inner="eager")
    images, late = [], 0
    for size in case.sizes:
        with piflux.generation(model):
            image = [samples(model, case.inputs(*size)) for _ in range(2)]
            before = counters["stats"]["unique_graphs"]
            image += [samples(model, case.inputs(*size)) for _ in range(2, STEPS)]
            moved = case.inputs(*size)
            moved[case.clock] = moved[case.clock] * 0.9
            samples(model, moved)
            late += counters["stats"]["unique_graphs"] - before
        images.append(image)
    return images, late


def assert_exact(got: list[Tensor], want: list[Tensor], where: str) -> None:
    assert len(got) == len(want)
    for number, (tensor, truth) in enumerate(zip(got, want, strict=True)):
        assert tensor.shape == truth.shape
        worst = (tensor - truth).abs().max().item()
        assert worst <= EXACT, f"{where}, output {number}: off by {worst:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_a_model_on_two_and_three_ranks(virtual, name):
    """Literal sizes first, symbols from the second resolution on; one graph for all steps."""
    model, case = CASES[name].build(), CASES[name]
    want = [exact(model, case.inputs(*size)) for size in case.sizes]
    assert all(x.std() > 0.1 for call in want for x in call)
    (got,) = virtual(3, gathered, name)
    assert_exact(got, want[0], "gather")
    ((images, late),) = virtual(2, rotated, name)
    for number, (image, truth) in enumerate(zip(images, want, strict=True)):
        for step, got in enumerate(image):
            assert_exact(got, truth, f"rotate, size {number}, step {step}")
    assert late == 0


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_on_virtual_ranks(name):
    """At steps that gather and at others, of a still image."""
    case = VARIANTS[name]
    model, inputs = case.build(), case.inputs(*SIZES[0])
    want = exact(model, inputs)
    group = piflux.virtual_ranks(3)
    parallel = piflux.parallelize(model, group=group, policy="rotate", inner="eager")
    with piflux.generation(parallel):
        for step in range(4):
            assert_exact(samples(parallel, inputs), want, f"step {step}")
    assert piflux.explain(parallel).graphs[0].attentions > 0


def test_linear_attention_is_refused():
    """The image's tokens meet in products of matrices alone; softmax attends to the prompt only."""
    model = piflux.parallelize(sana(), group=piflux.virtual_ranks(2), inner="eager")
    with pytest.raises(CannotShard, match="linear attention") as error:
        model(**sana_inputs(*SIZES[0]))
    assert "sana_transformer.py" in str(error.value)


def test_z_image_pads_prompts_of_unequal_length_between_attentions():
    """The longer of two prompts decides where the shorter one's padding ends, in mid-model."""
    parallel = piflux.parallelize(z_image(), group=piflux.virtual_ranks(2), inner="eager")
    with pytest.raises(CannotShard, match="mixes tokens between two attentions") as error:
        parallel(**z_image_batch(SIZES[0][0], 13, 40))
    assert error.value.op.endswith("pad_sequence")
