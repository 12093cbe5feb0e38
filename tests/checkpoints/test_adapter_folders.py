"""Folders to which adapters are saved: each holds what is needed to load them right, and says so."""

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    LoraModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_layerprune import (
    LayerPruneError,
    get_lineage,
    load_pruned_adapter,
    remove_layers,
    save_adapter,
    save_model,
)
from hf_layerprune.checkpoints import saving
from hf_layerprune.commands.cli import main

from ..conftest import logits, make_model, tokens
from ..distillation.test_lora import _cut_base, adapted_trainer, lora
from ..distillation.test_trainer import examples
from ..pruning.test_callback import pruning


def stored_llama(folder="base"):
    make_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def plain_trainer(model, **settings):
    arguments = {"max_steps": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2}
    return Trainer(
        model,
        TrainingArguments("out", learning_rate=0.1, **arguments),
        train_dataset=examples(),
        callbacks=[pruning(criterion="block_influence", **settings)],
    )


def sft_trainer(model, tokenizer):
    settings = {"max_steps": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2}
    return SFTTrainer(
        model,
        SFTConfig("out", learning_rate=0.1, bf16=False, activation_checkpointing=False, **settings),
        train_dataset=examples(),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[pruning(criterion="block_influence")],
    )


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_what_a_plain_trainer_saves_loads_on_the_right_layers(kind, tokenizer):
    model = stored_llama()
    if kind == "Trainer":
        trainer = plain_trainer(get_peft_model(model, lora()))
    else:
        trainer = sft_trainer(model, tokenizer)
    trainer.train()
    trainer.save_model()
    trainer.save_model("elsewhere")
    trainer.model.save_pretrained("by hand")
    live = logits(trainer.model.eval(), tokens())
    for folder in ("out", "elsewhere", "by hand", "out/checkpoint-4"):
        again = load_pruned_adapter(folder)
        assert get_lineage(again) == get_lineage(trainer.model)
        assert len(get_lineage(again).kept) == 4
        torch.testing.assert_close(logits(again.eval(), tokens()), live, rtol=0, atol=1e-4)
        card = ModelCard.load(Path(folder, "README.md"))
        assert card.data.library_name == "peft"
        assert f'load_pruned_adapter("{Path(folder).name}")' in card.content
        assert "[More Information Needed]" not in card.content
        assert "AutoModelForCausalLM" not in card.content
        assert "pipeline(" not in card.content  # of trl, which would load the whole base


def test_the_trainers_own_card_is_completed():
    trainer = plain_trainer(get_peft_model(stored_llama(), lora()))
    trainer.train()
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(model_name="mine", license="mit")
    card = ModelCard.load("out/README.md")
    assert card.content.count("load_pruned_adapter") == 2  # imported and called
    assert "Training hyperparameters" in card.content
    assert (card.data.library_name, card.data.license) == ("peft", "mit")


@pytest.mark.parametrize("what", ["adapters", "weights"])
def test_a_plain_trainer_compares_what_it_saves_with_the_live_model(what, monkeypatch):
    model = stored_llama()
    model = get_peft_model(model, lora()) if what == "adapters" else model
    trainer = plain_trainer(model)
    trainer.train()
    checked = []
    with monkeypatch.context() as patch:
        patch.setattr(saving, "_check_same", lambda *args: checked.append(args[2]))
        trainer.save_model("final")
        model.save_pretrained("mine", max_shard_size="1GB")  # with arguments of the user's own
    assert checked == [Path("final")]
    # Adapters alone do not hold what was done to the base; a config does not hold what was done to a module.
    base = trainer.model.get_base_model() if what == "adapters" else trainer.model
    base.model.layers[1].self_attn.scaling *= 2
    with pytest.raises(LayerPruneError, match="saved model differs"):
        trainer.save_model("final")


def test_a_model_of_a_plain_trainer_is_saved_by_hand(monkeypatch):
    """With settings of its own, and checked once or not at all."""
    model = stored_llama()
    plain_trainer(model).train()
    save_model(model, "half", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained("half").dtype == torch.bfloat16
    checked = []
    monkeypatch.setattr(saving, "_check_same", lambda *args, **kwargs: checked.append(args[2]))
    save_model(model, "unchecked", verify=False)
    assert checked == []
    for _ in range(2):
        save_model(model, "checked")
    model.save_pretrained("plain")
    assert checked == [Path("checked"), Path("checked"), Path("plain")]


def test_without_verify_save_a_plain_trainer_checks_nothing(monkeypatch):
    monkeypatch.setattr(saving, "_check_same", lambda *args: pytest.fail("checked"))
    trainer = plain_trainer(get_peft_model(stored_llama(), lora()), verify_save=False)
    trainer.train()
    trainer.save_model()
    assert Path("out/pruned_base.json").is_file()


def test_a_checkpoint_of_adapters_is_compared_with_the_live_model(monkeypatch):
    """Also where nobody knows where the base is from: on a copy of the one in memory."""
    compared = []
    monkeypatch.setattr(saving, "_check_same", lambda live, again, folder: compared.append(again))
    trainer = adapted_trainer(make_model(), save_strategy="steps", save_steps=1)
    remove_layers(trainer.model, [2])
    trainer.train()
    (again,) = compared
    assert torch.equal(logits(again.eval(), tokens()), logits(trainer.model.eval(), tokens()))
    assert again.get_base_model() is not trainer.model.get_base_model()
    with pytest.raises(
        LayerPruneError, match=r"does not say where the base model is from\. Pass base_model="
    ):
        load_pruned_adapter("out/checkpoint-1")


def test_a_copy_of_a_model_saves_itself():
    model = get_peft_model(make_model(), lora(init_lora_weights=False)).eval()
    remove_layers(model, [2])
    other = copy.deepcopy(model)
    remove_layers(other, [0])
    other.save_pretrained("other")
    assert json.loads(Path("other/pruned_base.json").read_text())["kept_layers"] == [1, 3, 4, 5]
    again = load_pruned_adapter("other", base_model=_cut_base(get_lineage(other)))
    assert torch.equal(logits(again.eval(), tokens()), logits(other, tokens()))
    again.save_pretrained("further")  # loaded adapters know their base, too
    assert Path("further/pruned_base.json").read_text() == Path("other/pruned_base.json").read_text()


def test_each_adapter_of_several_has_the_record_beside_it():
    model = get_peft_model(stored_llama(), lora(init_lora_weights=False)).eval()
    model.add_adapter("second", lora(init_lora_weights=False))
    remove_layers(model, [2])
    model.save_pretrained("both")
    model.set_adapter("second")
    again = load_pruned_adapter("both/second")
    assert torch.equal(logits(again.eval(), tokens()), logits(model, tokens()))


@pytest.mark.parametrize("place", ["out", "out/final"])
def test_the_card_of_adapters_says_how_to_load_them(place, tokenizer):
    model = stored_llama()
    model.config._name_or_path = "base"
    trainer = adapted_trainer(
        model, max_steps=4, export="adapter", callbacks=[pruning()], processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(place)
    if place == "out":
        trainer.create_model_card(license="mit")
        assert main(["card", "out"]) == 0
    card = ModelCard.load(Path(place, "README.md"))
    assert card.data.library_name == "peft"
    assert f'load_pruned_adapter("{Path(place).name}")' in card.content
    assert "AutoModelForCausalLM" not in card.content
    assert "## Removals" in card.content
    assert Path(place, "layer_pruning.json").is_file()


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # of PEFT, offline
def test_a_hub_base_is_named_in_the_metadata():
    model = get_peft_model(make_model(), lora())
    remove_layers(model, [2])
    save_adapter(model, "out", base_model="someone/tiny", verify=False)
    data = ModelCard.load("out/README.md").data
    assert (data.base_model, data.base_model_relation) == ("someone/tiny", "adapter")
    assert json.loads(Path("out/pruned_base.json").read_text())["base_model"] == "someone/tiny"


def test_prompt_learning_is_refused_before_training():
    configs = [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        CPTConfig(cpt_token_ids=[0], cpt_mask=[1], cpt_tokens_type_mask=[1], task_type="CAUSAL_LM"),
        AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    ]
    for config in configs:
        with pytest.raises(LayerPruneError, match=rf"are {config.peft_type.value} .* Use LoraConfig"):
            adapted_trainer(make_model(), config)


def test_a_plain_trainer_refuses_prompt_learning_before_training():
    model = get_peft_model(make_model(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    trainer = plain_trainer(model)
    with pytest.raises(LayerPruneError, match="PREFIX_TUNING"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("what", ["type", "memory"])
def test_what_cannot_be_merged_is_refused_before_training(what, monkeypatch):
    def refuse(self):
        if what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        raise NotImplementedError("no merging here")

    monkeypatch.setattr(LoraModel, "merge_and_unload", refuse)
    with pytest.raises(LayerPruneError, match="export='adapter'"):
        adapted_trainer(make_model())
    adapted_trainer(make_model(), export="adapter")


@pytest.mark.parametrize("first", [1, 3, 5])
def test_adapters_may_leave_the_first_layers_bare(first):
    trainer = adapted_trainer(
        make_model(),
        lora(layers_to_transform=list(range(first, 6)), target_modules=["q_proj"]),
        teacher_model=make_model(seed=1),
        max_steps=3,
        learning_rate=0.1,
    )
    trainer.train()
    losses = [log["kl"] for log in trainer.state.log_history[:-1]]
    assert losses[-1] < losses[0]


def test_bare_first_layers_run_once_for_teacher_and_student():
    found = []
    for shared in (True, False):
        torch.manual_seed(0)
        config = lora(layers_to_transform=[3, 5], target_modules=["q_proj"])
        trainer = adapted_trainer(make_model(), config, max_steps=3, learning_rate=0.1)
        if not shared:
            trainer._follow_removals = lambda *args: None
        remove_layers(trainer.model, [4])
        trainer.train()
        assert (trainer._shared_prefix.length == 3) == shared
        found.append([log["kl"] for log in trainer.state.log_history[:-1]])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
