"""Checkpoints whose weights are stored quantised: LoRA trains them, nothing else does."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_layerprune import LayerPruneError, load_model, load_pruned_adapter, prune
from hf_layerprune.commands.cli import main

from ..distillation.test_trainer import make_trainer
from .test_inputs import DATA, SHORT


@pytest.fixture
def quantised(folder, tokenizer):
    """A folder with the tiny Llama in 8 bits."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    loaded.save_pretrained("quantised")
    tokenizer.save_pretrained("quantised")
    return "quantised"


@pytest.mark.parametrize("command", ["distill", "run", "plan"])
def test_their_weights_are_not_trained(command, quantised, capsys):
    Path(quantised, "model.safetensors").write_bytes(b"whoever reads this fails")
    words = {
        "distill": ["distill", quantised, *DATA, *SHORT, "--target_layers", "5"],
        "run": ["run", "default", "--model", quantised, *DATA, *SHORT, "--target_layers", "5"],
        "plan": ["plan", quantised, "--target_layers", "5"],
    }
    assert main(words[command]) == 2
    error = capsys.readouterr().err
    assert "weights of quantised are stored quantised (bitsandbytes)" in error
    assert "`distill --lora_rank 16`" in error


def test_python_refuses_too(quantised):
    with pytest.raises(LayerPruneError, match=r"the model are stored quantised .*peft_config="):
        make_trainer(load_model(quantised))
    with pytest.raises(LayerPruneError, match="the model are stored quantised"):
        prune(load_model(quantised), "text.txt", keep=5, output_dir="out", sequence_length=16)


def test_lora_trains_on_them(quantised):
    flags = ["--lora_rank", "2", "--target_layers", "5", "--export", "adapter", "--heldout_sequences", "2"]
    assert main(["distill", quantised, *DATA, *flags, *SHORT]) == 0
    assert len(json.loads(Path("out/pruned_base.json").read_text())["kept_layers"]) == 5
    assert load_pruned_adapter("out").get_base_model().is_quantized


def test_what_transformers_cannot_save_again_is_refused_before_scoring(quantised, capsys, monkeypatch):
    monkeypatch.setattr("hf_layerprune.pruning.prune.score_layers", lambda *_, **__: pytest.fail("scored"))
    flags = ["--target_layers", "5", "--heldout_sequences", "2", "--output_dir", "out"]
    assert main(["prune", quantised, *DATA, *flags]) == 2
    error = capsys.readouterr().err
    assert "quantised holds quantised weights, which transformers loads but cannot save again" in error
    assert "before quantisation" in error
