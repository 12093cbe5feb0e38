"""Folders of PEFT adapters as the model that a command starts from: merged into their base."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_layerprune import (
    LayerPruneError,
    get_lineage,
    load_model,
    load_pruned_adapter,
    prune,
    remove_layers,
    save_adapter,
    save_model,
)
from hf_layerprune.checkpoints import adapter_folder
from hf_layerprune.checkpoints.loading import copy_companions, load_tokenizer, stored_dtype
from hf_layerprune.commands.cli import main

from ..conftest import TEXT, logits, make_model, tokens
from ..distillation.test_trainer import make_trainer


DATA = ["--data", "text.txt", "--sequence_length", "16", "--calibration_sequences", "2"]
DATA += ["--heldout_sequences", "2"]
SHORT = ["--max_steps", "1", "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no"]


def lora(**settings):
    named = {"target_modules": ["q_proj", "down_proj"], "r": 2, "init_lora_weights": False} | settings
    return LoraConfig(task_type="CAUSAL_LM", **named)


@pytest.fixture
def adapters(tokenizer):
    """A folder of adapters, whose base lies beside it; and the model with them."""

    def save(config=None, family="llama", **changes):
        make_model(family, **changes).save_pretrained("base")
        tokenizer.save_pretrained("base")
        Path("text.txt").write_text(TEXT)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config or lora()).eval()
        model.save_pretrained("adapters")
        return model

    return save


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, when it saves a tied layer
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gemma3_text", {"target_modules": ["lm_head", "q_proj"]}),  # which is tied
    ],
)
def test_adapters_are_loaded_merged(adapters, family, settings):
    model = adapters(lora(**settings), family)
    loaded = load_model("adapters")
    assert type(loaded) is type(model.get_base_model())
    assert not any("lora" in name for name in loaded.state_dict())
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=0, atol=1e-3)
    assert loaded.name_or_path == "adapters"
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert load_model("adapters", dtype="bfloat16").dtype == torch.bfloat16


def test_what_belongs_to_the_base_is_found(adapters, tokenizer):
    adapters()
    make_model().to(torch.bfloat16).save_pretrained("base")
    Path("base/processor_config.json").write_text("{}")
    assert stored_dtype("adapters") == torch.bfloat16
    rewrite("base/config.json", dtype=None)
    Path("adapters/adapter_model.safetensors").unlink()  # which is not read for this
    assert stored_dtype("adapters") == torch.bfloat16  # of the weights
    assert load_tokenizer("adapters")("hi")["input_ids"] == tokenizer("hi")["input_ids"]
    assert copy_companions("adapters", "elsewhere") == ["processor_config.json"]
    own = load_tokenizer("base")
    own.add_tokens(["<new>"])
    own.save_pretrained("adapters")
    assert len(load_tokenizer("adapters")) == len(tokenizer) + 1


def test_adapters_of_a_pruned_base_are_merged_into_its_layers(adapters, capsys):
    model = adapters()
    remove_layers(model, [1, 4])
    save_adapter(model, "pruned")
    loaded = load_model("pruned")
    assert get_lineage(loaded).removed == [1, 4]
    assert main(["inspect", "pruned"]) == 0
    assert "4 of 6 layers" in capsys.readouterr().out
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=0, atol=1e-4)
    assert get_lineage(load_pruned_adapter("pruned")).removed == [1, 4]


def test_commands_start_from_adapters(adapters, capsys):
    model = adapters()
    assert main(["inspect", "adapters"]) == 0
    assert "6 of 6 layers" in capsys.readouterr().out
    assert main(["score", "adapters", *DATA[:6], "--criterion", "block_influence"]) == 0
    flags = ["--criterion", "positional", "--target_layers", "4"]
    assert main(["prune", "adapters", *DATA, *flags, "--output_dir", "cut"]) == 0
    saved = AutoModelForCausalLM.from_pretrained("cut")
    assert not Path("cut/adapter_config.json").exists()
    remove_layers(model, get_lineage(saved).removed)
    torch.testing.assert_close(logits(saved, tokens()), logits(model, tokens()), rtol=0, atol=1e-4)
    words = ["run", "sleb", "--model", "adapters", *DATA, "--target_layers", "5", "--output_dir", "ran"]
    assert main(words) == 0
    words = [
        "distill",
        "base",
        *DATA,
        *SHORT,
        "--max_steps",
        "2",
        *flags,
        "--teacher",
        "adapters",
        "--output_dir",
        "taught",
    ]
    assert main(words) == 0
    assert main(["evaluate", "adapters", "cut", *DATA[:4], "--json", "e.json"]) == 0
    found = json.loads(Path("e.json").read_text())["models"]
    assert [found[name]["layers"] for name in found] == [6, 4]
    assert "file_mb" not in found["adapters"]


def test_prune_starts_from_adapters(adapters):
    adapters()
    settings = {"max_steps": 2, "sequence_length": 16, "calibration_sequences": 2, "heldout_sequences": 2}
    settings |= {"bf16": False, "report_to": "none", "save_strategy": "no", "output_dir": "out"}
    model, record = prune("adapters", "text.txt", keep=4, **settings)
    assert record.model["name"] == "adapters"
    assert len(get_lineage(model).kept) == 4
    assert Path("out/tokenizer.json").is_file()


def rewrite(path, **changes):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def name_no_base():
    rewrite("adapters/adapter_config.json", base_model_name_or_path=None)


def name_itself():
    rewrite("adapters/adapter_config.json", base_model_name_or_path="adapters")


def lose_base():
    rewrite("adapters/adapter_config.json", base_model_name_or_path="gone")


def quantise_base():
    rewrite("base/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def start_from_data():
    rewrite("adapters/adapter_config.json", init_lora_weights="pissa_niter_4")


def add_a_head():
    path = "adapters/adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": torch.zeros(2, 32)}, path)


def damage():
    Path("adapters/adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (name_no_base, r"is None\. Set it to the folder or hub id of the base model"),
        (name_itself, r"is 'adapters'\. Set it to the folder"),
        (lose_base, r"holds adapters for gone\. Cannot load .*set base_model_name_or_path"),
        (quantise_base, r"which is quantised, so that they cannot be merged exactly\. Set base_model_name"),
        (
            start_from_data,
            r"init_lora_weights='pissa_niter_4', which changes .*Merge them where",
        ),
        (add_a_head, r"has no place for .*score\.weight\. Give the base model"),
        (damage, r"cannot be read.*Save the adapters again"),
    ],
)
def test_what_cannot_be_merged_is_refused(adapters, change, message):
    adapters()
    change()
    with pytest.raises(LayerPruneError, match=message):
        load_model("adapters")


def test_prompt_learning_and_quantisation_on_loading_are_refused(adapters, capsys):
    adapters()
    assert main(["score", "adapters", *DATA[:6], "--load_in_8bit", "True"]) == 2
    assert "cannot be merged exactly into a base model that is quantised" in capsys.readouterr().err
    adapters(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert main(["inspect", "adapters"]) == 2
    assert "The adapters are PROMPT_TUNING" in capsys.readouterr().err


def test_a_merge_that_makes_another_model_is_refused(adapters, monkeypatch):
    adapters()
    monkeypatch.setattr(adapter_folder, "merge_adapters", lambda model: model.unload())
    with pytest.raises(LayerPruneError, match=r"cannot be merged exactly: the logits .* are off by"):
        load_model("adapters")


def test_adapters_that_lack_layers_of_their_base_are_refused(adapters):
    adapters()
    tensors = load_file("adapters/adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.4." not in name}
    save_file(kept, "adapters/adapter_model.safetensors")
    with pytest.raises(LayerPruneError, match=r"have no tensor for .*layers\.4\..*base model that they"):
        load_model("adapters")


def test_adapters_of_the_user_are_kept_while_others_are_merged(adapters):
    model = adapters()
    model.save_pretrained("out/adapter")
    before = Path("out/adapter/adapter_model.safetensors").read_bytes()
    other = get_peft_model(make_model(), lora(target_modules=["v_proj"])).eval()
    save_model(other, "out")
    assert Path("out/adapter/adapter_model.safetensors").read_bytes() == before
    assert {path.name for path in Path("out").iterdir() if path.is_dir()} == {"adapter"}
    assert torch.allclose(logits(load_model("out"), tokens()), logits(other, tokens()), atol=1e-5)


def test_a_plain_model_is_not_saved_where_adapters_would_be_loaded(adapters):
    adapters()
    with pytest.raises(LayerPruneError, match="which would be loaded instead of a plain model"):
        save_model(make_model(), "adapters")
    trainer = make_trainer(make_model(), output_dir="adapters")
    with pytest.raises(LayerPruneError, match="which would be loaded instead of a plain model"):
        trainer.train()
    assert trainer.state.global_step == 0
