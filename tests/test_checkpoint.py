import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_layerprune import LayerPruneError, remove_layers
from hf_layerprune.checkpoint import load_lineage, load_model, load_tokenizer

from .conftest import logits, make_model, tokens


def test_a_saved_model_and_its_lineage_load(llama, tokenizer, tmp_path):
    remove_layers(llama, 3)
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path)), tokens()), logits(llama, tokens()))
    assert load_lineage(tmp_path).kept == [0, 1, 2, 4, 5]
    assert load_tokenizer(str(tmp_path))("hi")["input_ids"] == tokenizer("hi")["input_ids"]


def test_what_is_no_model_is_refused(llama, tmp_path):
    with pytest.raises(LayerPruneError, match="not a folder with a model"):
        load_model(str(tmp_path))
    with pytest.raises(LayerPruneError, match="Cannot load a model from 'no/such'"):
        load_model("no/such")
    with pytest.raises(LayerPruneError, match="Cannot load a tokenizer from 'no/such'"):
        load_tokenizer("no/such")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(LayerPruneError, match="Cannot load a model"):
        load_model(str(tmp_path))


def test_weights_that_do_not_fit_the_config_are_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.5.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayerPruneError, match=r"1 tensors are missing .* model\.layers\.5\.mlp\.up_proj"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 40}, r"18 tensors are missing or of another shape"),
        ({"num_hidden_layers": 5}, r"must be equal to the number of `layer_types`"),
        ({"num_hidden_layers": -1}, "Cannot load a model"),
        ({"num_hidden_layers": "six"}, "Cannot load a model"),
        ({"hidden_size": None}, "Cannot load a model"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, changes, message):
    make_model("qwen3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(LayerPruneError, match=message):
        load_model(str(tmp_path))


def test_a_truncated_file_is_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LayerPruneError, match="Cannot load a model"):
        load_model(str(tmp_path))
