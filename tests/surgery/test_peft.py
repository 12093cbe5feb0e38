import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_layerprune import (
    LayerPruneError,
    get_lineage,
    load_model,
    load_pruned_adapter,
    remove_layers,
    save_adapter,
    score_layers,
)
from hf_layerprune.checkpoints import verification
from hf_layerprune.surgery.removal import without_layers

from ..conftest import LAYERS, logits, make_model, tokens


GONE = [1, 3]


def adapted(family="llama", **settings):
    """A tiny model with LoRA that is not zero, so that an adapter on the wrong layer is seen."""
    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    torch.manual_seed(3)
    return get_peft_model(make_model(family), config).eval()


PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]
SETTINGS = {
    "all layers": {},
    "layers_to_transform": {"layers_to_transform": [1, 2, 5]},
    "one layer": {"layers_to_transform": 4},
    "names": {"target_modules": ["model.layers.2.self_attn.q_proj", "layers.3.mlp.up_proj", "o_proj"]},
    "patterns": {
        "rank_pattern": {"model.layers.2.self_attn.q_proj": 4, "layers.4.mlp.up_proj": 2},
        "alpha_pattern": {"layers.5.self_attn.q_proj": 99, "layers.3.self_attn.q_proj": 77},
    },
    "excluded": {"exclude_modules": ["model.layers.4.self_attn.q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True, "layers_to_transform": [0, 4]},
    "many names": {
        "target_modules": [f"model.layers.{i}.{name}" for i in (0, 2, 3, 5) for name in PROJECTIONS]
    },
    "escaped": {"rank_pattern": {r"model\.layers\.2\.self_attn\.q_proj": 3}},
    "excluded and gone": {"exclude_modules": ["model.layers.3.self_attn.q_proj"]},
    "saved whole": {"modules_to_save": ["model.layers.4.mlp"], "target_modules": ["q_proj"]},
    "regex without layers": {"target_modules": r".*(q_proj|up_proj)"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_stay_on_their_layers(family, settings, tmp_path):
    model = adapted(family, **settings)
    stack = model.get_base_model().model.layers
    uncut = logits(model, tokens())
    with without_layers(model, GONE):
        expected = logits(model, tokens())
    assert torch.equal(logits(model, tokens()), uncut)
    kept = [stack[i] for i in range(LAYERS) if i not in GONE]
    assert remove_layers(model, GONE).removed == GONE
    assert list(model.get_base_model().model.layers) == kept  # the very layers, adapters in them
    assert torch.equal(logits(model, tokens()), expected)
    model.save_pretrained(tmp_path)
    base = make_model(family)
    remove_layers(base, GONE)
    again = PeftModel.from_pretrained(base, tmp_path).eval()  # it would warn of missing adapter keys
    assert torch.equal(logits(again, tokens()), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": GONE}, r"only on layers \[1, 3\]"),
        ({"target_modules": ["layers.3.mlp.up_proj"]}, "nothing of the adapter's target_modules"),
        (
            {"target_modules": r".*layers\.(2|4)\..*q_proj"},
            "adapters built from their new configs would differ",
        ),
        ({"layer_replication": [(0, 3), (1, 4)]}, "made for the number of layers"),
    ],
)
def test_what_cannot_follow_is_refused_and_left_alone(settings, message):
    model = adapted(**settings)
    before, config = logits(model, tokens()), model.peft_config["default"].to_dict()
    with pytest.raises(LayerPruneError, match=message):
        remove_layers(model, GONE)
    assert torch.equal(logits(model, tokens()), before)
    assert model.peft_config["default"].to_dict() == config


def test_prefixes_and_adapters_that_nobody_holds_are_refused(monkeypatch):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(LayerPruneError, match=r"PREFIX_TUNING.* made for the number of layers"):
        remove_layers(get_peft_model(make_model(), config), 2)
    model = make_model()
    # transformers 5.24 asks for a version of PEFT that is not published yet.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **settings: None)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LayerPruneError, match="get_peft_model"):
        remove_layers(model, 2)


def test_two_adapters_follow():
    model = adapted(layers_to_transform=[2, 3])
    model.add_adapter("second", LoraConfig(target_modules=["up_proj"], layers_to_transform=[4, 5]))
    remove_layers(model, GONE)
    assert model.peft_config["default"].layers_to_transform == [1]
    assert model.peft_config["second"].layers_to_transform == [2, 3]


def test_layers_are_scored_with_their_adapters():
    model = adapted()
    batches = [{"input_ids": tokens()}]
    found = score_layers(model.get_base_model(), batches, progress=False)
    assert found.scores == score_layers(model.merge_and_unload(), batches, progress=False).scores | {
        layer: pytest.approx(score, abs=1e-5) for layer, score in found.scores.items()
    }


def test_an_adapter_knows_its_cut_base(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model = adapted(layers_to_transform=[1, 2, 5])
    remove_layers(model, 4)
    remove_layers(model, 1)
    expected = logits(model, tokens())
    with pytest.raises(LayerPruneError, match="base_model="):
        save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    merged = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=1e-5)
    assert get_lineage(merged).removed == [1, 4]
    again = load_pruned_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again.eval(), tokens()), expected)
    assert get_lineage(again).removed == [1, 4]
    # An uncut base, or one cut elsewhere, does not pass.
    for gone in ([], [2, 3]):
        base = make_model()
        remove_layers(base, gone)
        with pytest.raises(LayerPruneError, match=r"for 4 of 6 layers, removed \[1, 4\]"):
            load_pruned_adapter(str(tmp_path / "adapter"), base_model=base)
    base = make_model()
    remove_layers(base, [1, 4])
    again = load_pruned_adapter(str(tmp_path / "adapter"), base_model=base)
    assert torch.equal(logits(again.eval(), tokens()), expected)


def test_an_adapter_without_its_record_is_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(LayerPruneError, match="no readable pruned_base"):
        load_pruned_adapter(str(tmp_path))
    lineage = {"original_num_hidden_layers": 6, "kept_layers": [0, 1]}
    for damaged in ("{", json.dumps({"base_model": "x"}), json.dumps([1]), "5", "null", json.dumps(lineage)):
        (tmp_path / "pruned_base.json").write_text(damaged)
        with pytest.raises(LayerPruneError, match="no readable pruned_base"):
            load_pruned_adapter(str(tmp_path))
    with pytest.raises(LayerPruneError, match="no adapters to save"):
        save_adapter(make_model(), tmp_path)


def test_a_wrong_base_is_found_when_saving(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "other")
    model = adapted()
    remove_layers(model, 2)
    with pytest.raises(LayerPruneError, match="saved model differs"):
        save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "other"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_one_active_adapter_named_default_is_saved(tmp_path):
    named = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    two = adapted()
    two.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    for model in (named, two):
        with pytest.raises(LayerPruneError, match="One active adapter named 'default'"):
            save_adapter(model, tmp_path / "adapter", base_model="x")
    assert not (tmp_path / "adapter").exists()


def test_trained_tokens_are_saved_with_the_adapter(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model = adapted(trainable_token_indices=[1, 5])
    remove_layers(model, 2)
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))


def test_lost_adapter_tensors_are_found_however_small(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-6)
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {lost: torch.zeros_like(tensors[lost])}, file)
    again = load_pruned_adapter(str(tmp_path / "adapter"))
    with pytest.raises(LayerPruneError, match=r"saved adapters differ from those in memory: .*lora_B"):
        verification.check_same_adapters(model, again, tmp_path)
