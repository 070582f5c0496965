"""What makes a pipeline fit into a GPU's memory: 8 bits, and text encoders that visit it."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
import transformers
from models import Int8Weight, tiny_flux, tiny_sd3
from torch import nn

from piflux.errors import CannotLoad
from piflux.memory.aside import Aside, plain
from piflux.pipelines import quantized
from piflux.pipelines.offload import visit
from piflux.pipelines.quantized import layers_of, quantize
from piflux.pipelines.together import weights_together

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None,
    reason="needs torchao, which prints warnings where it is installed",
)


def encoder():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config).eval()


def test_an_encoder_that_visits_computes_the_same_and_is_back_home(monkeypatch):
    """Copies stand for what is on another device."""
    model, tokens = encoder(), torch.arange(6)[None]
    want = model(tokens)[0]
    homes = {name: x.data_ptr() for name, x in model.named_parameters()}
    visit(model, CPU)
    present: list[int] = []

    def away(module, args):
        present.append(sum(x.data_ptr() != homes[n] for n, x in model.named_parameters()))

    to = torch.Tensor.to

    def copied(x, *args, **kwargs):
        return to(x, *args, **kwargs).clone() if args == (CPU,) else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    for block in model.encoder.block:
        block.layer[0].register_forward_pre_hook(away)
    with torch.no_grad():
        # Sums depend on where weights begin in memory.
        assert (model(tokens)[0] - want).abs().max() < 1e-5
    assert {name: x.data_ptr() for name, x in model.named_parameters()} == homes
    # One block's weights at a time, and those that are in no block.
    own = len(list(model.encoder.block[1].parameters()))
    rest = len(homes) - sum(len(list(x.parameters())) for x in model.encoder.block)
    assert present[1] == own + rest < len(homes)


def test_layers_that_multiply_tokens_are_found_by_where_they_are():
    flux = tiny_flux(double=2, single=3)
    names = {layer: name for name, layer in flux.named_modules()}
    found = {names[x] for x in layers_of(flux)}
    assert len(found) == 2 * (2 * 4 + 2 * 2) + 3 * 5
    assert not any("norm" in name for name in found)  # the modulations
    assert "proj_out" not in found and "x_embedder" not in found
    sd3 = tiny_sd3(layers=2)
    names = {layer: name for name, layer in sd3.named_modules()}
    assert {names[x] for x in layers_of(sd3)} >= {"transformer_blocks.0.attn.to_q"}
    assert not any("norm" in names[x] for x in layers_of(sd3))


def test_sizes_that_are_no_multiples_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, n)) for n in (16, 17))

    model = Odd()
    assert layers_of(model) == [model.blocks[0][0]]


def test_fp8_is_for_gpus(monkeypatch):
    with pytest.raises(CannotLoad, match=r"no GPU multiplies no 8-bit floating .*: take int8"):
        quantized._check_fp8(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A40")
    with pytest.raises(CannotLoad, match=r"fp8: A40 \(compute capability 8.6\) multiplies no"):
        quantized._check_fp8(torch.device("cuda"))


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(CannotLoad, match=r"pip install 'piflux\[quantize\]'"):
        quantize(tiny_flux(), "fp8")


@needs_torchao
@pytest.mark.parametrize("home", [None, "cpu"])
def test_int8(home):
    model = tiny_flux(double=2, single=2)
    count = quantize(model, "int8", CPU, home)
    assert count == len(layers_of(model)) > 0
    kinds = {type(layer.weight).__name__ for layer in layers_of(model)}
    assert kinds == {"Int8Tensor"}
    assert type(model.transformer_blocks[0].norm1.linear.weight) is nn.Parameter


@needs_torchao
def test_what_torchao_made_is_put_aside_and_comes_back():
    """A parameter of it wraps other tensors than the tensor that it was made of."""
    model, aside = tiny_flux(double=2, single=2), Aside()
    quantize(model, "int8")
    weights = [x for layer in layers_of(model) for x in plain(layer.weight)]
    before = [x.clone() for x in weights]
    aside.put(model, CPU)
    after = [x for layer in layers_of(model) for x in plain(layer.weight)]
    assert all(x in aside and x.untyped_storage().nbytes() == 0 for x in after)
    aside.bring()
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def made_together(rank, group):
    """Which layers a rank made, whether all have what each would make, in one memory."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 8).requires_grad_(False) for _ in range(3)]
    want = [Int8Weight.of(layer.weight) for layer in layers]
    made = []

    def make(layer):
        made.append(layers.index(layer))
        layer.weight = nn.Parameter(Int8Weight.of(layer.weight), requires_grad=False)

    weights_together(layers, make, group)
    got = [layer.weight for layer in layers]
    alike = all(
        torch.equal(a, b)
        for x, y in zip(got, want, strict=True)
        for a, b in zip(plain(x), plain(y), strict=True)
    )
    dist.barrier(group)
    if rank == 1:
        plain(got[0])[0][0, 0] = 99  # of a layer that the other rank made
    dist.barrier(group)
    links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    left = [x for x in links if "memfd:piflux" in x]
    return made, alike, int(plain(got[0])[0][0, 0]), left


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memory without a name")
def test_ranks_of_one_host_make_weights_once(ranks):
    found = ranks(2, made_together)
    assert [made for made, *_ in found] == [[0, 2], [1]]
    assert all(alike for _, alike, *_ in found)
    assert [seen for *_, seen, _ in found] == [99, 99]
    assert all(left == [] for *_, left in found)


@needs_torchao
def test_a_model_without_blocks_is_refused():
    with pytest.raises(CannotLoad, match="has no blocks"):
        quantize(nn.Linear(16, 16), "int8")
