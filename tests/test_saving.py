import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, remove_layers, save_model, saving

from .conftest import logits, make_model, tokens
from .tiny_models import tiny_model


def tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_the_same(model, tmp_path, dtype):
    model = model.to(dtype)
    remove_layers(model, [1, 4])
    state = torch.get_rng_state()
    model.train()
    save_model(model, tmp_path)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval().to(dtype)
    assert torch.equal(logits(again, tokens()), logits(model.eval(), tokens()))


def test_another_model_when_loaded_is_refused_and_its_weights_kept(llama, tmp_path):
    llama.model.layers[2].self_attn.scaling *= 2  # nothing in the config says so
    with pytest.raises(LayerPruneError, match=r"another model when loaded: its logits are off by"):
        save_model(llama, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors(llama).items())
    save_model(llama, tmp_path, verify=False)


def test_missing_tensors_are_refused(llama, tmp_path):
    llama.config.num_hidden_layers = 7
    with pytest.raises(LayerPruneError, match=r"does not fit its config: {'missing_keys'"):
        save_model(llama, tmp_path)


def test_what_does_not_load_is_refused(llama, tmp_path, monkeypatch):
    save = llama.save_pretrained

    def save_half(folder):
        save(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])

    monkeypatch.setattr(llama, "save_pretrained", save_half)
    with pytest.raises(LayerPruneError, match=r"What was saved does not load"):
        save_model(llama, tmp_path)


def test_weights_are_kept_when_saving_fails(tmp_path):
    model = make_model("qwen3")
    model.config.layer_types = model.config.layer_types[:-1]  # transformers refuses such a config
    with pytest.raises(LayerPruneError, match=r"cannot be saved as a plain model.*rescued\.safetensors"):
        save_model(model, tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "rescued.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors(model).items())


def test_a_model_that_has_become_nan_can_be_saved(llama, tmp_path):
    llama.lm_head.weight.data.fill_(float("nan"))
    save_model(llama, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OLD_SCALED = {k: v for k, v in SCALED.items() if k != "rope_theta"} | {"type": "llama3"}
SPLIT = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("family", "rope", "old"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 123.0}, {"rope_theta": 123.0}),
        (
            "llama",
            SCALED,
            {"rope_theta": 5e5, "rope_scaling": OLD_SCALED},
        ),
        (
            "gemma3_text",
            SPLIT,
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
            },
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 99.0, "rotary_pct": 0.5},
        ),
        ("gpt2", None, {}),
    ],
)
def test_legacy_rotary_keys(family, rope, old, tmp_path):
    model = make_model(family, **({"rope_parameters": rope} if rope else {}))
    save_model(model, tmp_path / "new")
    save_model(model, tmp_path / "old", legacy_rope=True)  # which also reloads it
    new, both = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("new", "old"))
    assert both == new | old
    assert not old.keys() & new.keys()


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        (
            "llama",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 4.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
            "scale by 'longrope'",
        ),
        ("modernbert-decoder", None, "others for each kind of attention"),
        ("gemma4_text", None, "no older form"),
    ],
)
def test_settings_without_an_older_form_are_refused_before_saving(family, rope, message, tmp_path):
    model = tiny_model(family) if rope is None else make_model(family, rope_parameters=rope)
    with pytest.raises(LayerPruneError, match=message):
        save_model(model, tmp_path / "folder", legacy_rope=True)
    assert not (tmp_path / "folder").exists()


def test_a_model_that_lost_a_kind_of_attention_is_saved(tmp_path):
    model = tiny_model("olmo3")
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    remove_layers(model, full)
    save_model(model, tmp_path)


def test_short_and_mixed_models_are_saved(tmp_path):
    save_model(make_model("gpt2", n_positions=8), tmp_path / "short")
    model = make_model("llama").to(torch.bfloat16)
    model.lm_head.float()
    model.model.norm.float()
    save_model(model, tmp_path / "mixed")


def test_adapters_are_not_saved_as_a_model(tmp_path):
    with pytest.raises(LayerPruneError, match="use save_adapter"):
        save_model(get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])), tmp_path)


def test_without_memory_for_a_second_model_the_save_stands(llama, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    again = make_model()
    monkeypatch.setattr(again, "to", full)
    monkeypatch.setattr(saving, "load_again", lambda *args: again)
    save_model(llama, tmp_path / "saved")
    assert "there is no memory to compare its logits" in caplog.text
    assert (tmp_path / "saved" / "model.safetensors").is_file()
