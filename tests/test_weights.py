"""Folders of pipelines whose weights are not what they should be."""

import json
import math
import shutil

import pytest
import torch
from models import tiny_pipeline
from safetensors.torch import load_file, save_file

from piflux.errors import CannotLoad
from piflux.pipelines.weights import check_numbers, models_of

KEY = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def edit(folder, act):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    act(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refusal(folder):
    with pytest.raises(CannotLoad) as raised:
        models_of(str(folder))
    return str(raised.value)


def test_a_whole_folder_is_loaded(folder):
    models = models_of(str(folder), torch_dtype=torch.bfloat16)
    assert set(models) == {"transformer", "vae"}
    want = tiny_pipeline().transformer.to(torch.bfloat16).state_dict()
    for name, x in models["transformer"].state_dict().items():
        assert torch.equal(x, want[name])


def test_what_is_no_folder_is_left_to_the_pipeline(tmp_path):
    assert models_of(str(tmp_path / "none")) == {}


def test_a_missing_weight_is_named(folder):
    edit(folder, lambda weights: weights.pop(KEY))
    said = refusal(folder)
    assert f"{folder}/transformer" in said and f"it lacks 1: {KEY}" in said


def test_a_weight_too_many_is_named(folder):
    edit(folder, lambda weights: weights.update({"other.weight": torch.ones(2)}))
    said = refusal(folder)
    assert f"{folder}/transformer" in said and "too many, 1: other.weight" in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_named(value):
    pipe = tiny_pipeline()
    check_numbers(pipe, "folder", torch.device("cpu"))
    weight = dict(pipe.transformer.named_parameters())[KEY]
    with torch.no_grad():
        weight.view(-1)[3] = value
    said = f"^folder/transformer: 1 weights are not numbers, or infinite: {KEY}"
    with pytest.raises(CannotLoad, match=said):
        check_numbers(pipe, "folder", torch.device("cpu"))


@pytest.mark.parametrize("field, value", [("num_layers", 3), ("num_single_layers", 0)])
def test_a_config_of_another_model_is_refused(folder, field, value):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    said = refusal(folder)
    assert f"{folder}/transformer: the weights are not those" in said and "blocks." in said


def test_a_config_of_other_sizes_is_refused(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"joint_attention_dim": 99}))
    assert f"{folder}/transformer can't be loaded" in refusal(folder)


def test_a_cut_off_file_is_named(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{folder}/vae can't be loaded" in refusal(folder)
