import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_layerprune import LayerPruneError, remove_layers
from hf_layerprune.checkpoints.loading import load_lineage, load_meta_model, load_model, load_tokenizer

from ..conftest import logits, make_model, tokens
from ..tiny_models import tiny_model


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


def test_weights_of_more_layers_than_the_config_has_are_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(LayerPruneError, match=r"has 5 layers: there is model\.layers\.5\."):
        load_model(str(tmp_path))


HOSTILE = [-1, 0, 10**12, 1.5, "x", [], {}, None, True, [1] * 100_000, {"a": 1}]


@pytest.mark.parametrize("field", ["num_hidden_layers", "layer_types", "layer_pruning", "model_type"])
def test_hostile_values_end_in_one_error(field, tmp_path):
    model = make_model("qwen3")
    remove_layers(model, 1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in HOSTILE:
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        if value is None and field in ("layer_types", "layer_pruning"):  # it is not there, which is right
            load_model(str(tmp_path))
            continue
        with pytest.raises(LayerPruneError) as caught:
            load_model(str(tmp_path))
        assert len(str(caught.value)) < 600


def test_code_that_comes_with_a_model_is_not_run_unasked(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')")
    for load in (load_model, load_lineage, load_meta_model):
        with pytest.raises(LayerPruneError, match="trust_remote_code"):
            load(str(tmp_path))
    with pytest.raises(SystemExit, match="it was run"):
        load_model(str(tmp_path), trust_remote_code=True)


def test_a_skeleton_has_no_weights(tmp_path):
    make_model("gemma2").config.save_pretrained(tmp_path)
    model = load_meta_model(str(tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(LayerPruneError, match=r"(?s)built from the config|does not say"):
        load_meta_model(str(tmp_path))


def test_layers_that_only_predict_further_tokens_are_no_excess(tmp_path):
    model = tiny_model("deepseek_v3")
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.7.eh_proj.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(tmp_path)).config.num_hidden_layers == 7
    weights["model.layers.8.eh_proj.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayerPruneError, match=r"model\.layers\.8"):
        load_model(str(tmp_path))
