import json

import torch
from transformers import AutoModelForCausalLM

from hf_layerprune import inspect_layers, remove_layers
from hf_layerprune.commands.cli import main

from ..conftest import make_model
from ..tiny_models import tiny_config, tiny_model


def test_each_layer_is_described():
    model = make_model("gemma2")
    remove_layers(model, [1, 3])
    found = inspect_layers(model)
    assert (found.model_type, found.original_layers, len(found.layers)) == ("gemma2", 6, 4)
    assert [layer.original for layer in found.layers] == [0, 2, 4, 5]
    assert [layer.kind for layer in found.layers] == ["sliding_attention"] * 3 + ["full_attention"]
    assert not any(layer.refused for layer in found.layers)
    embeddings = model.get_input_embeddings().weight.numel() + model.model.norm.weight.numel()
    assert found.parameters - embeddings == sum(layer.parameters for layer in found.layers)


def test_layers_that_must_stay_say_why():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gemma3n_text"))
    refused = {layer.layer: layer.refused for layer in inspect_layers(model).layers if layer.refused}
    assert refused.keys() == {2, 4}  # those whose keys and values later layers read
    assert all("store_full_length_kv" in reason for reason in refused.values())
    first = inspect_layers(tiny_model("rwkv")).layers[0].refused
    assert "pre_ln" in first


def test_the_command_needs_no_weights(tmp_path, capsys):
    tiny_config("qwen4_exp_text, layers with n-gram tables").save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [layer["layer"] for layer in found["layers"] if layer["refused"]] == [0]
    assert printed.count("|        no |") == 1
    assert printed.count("|       yes |") == 6
    assert "Cannot remove layers [0]" in printed
