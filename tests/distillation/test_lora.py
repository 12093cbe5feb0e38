import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_layerprune import (
    LayerPruneError,
    get_lineage,
    load_pruned_adapter,
    remove_layers,
)
from hf_layerprune.checkpoints.loading import load_lineage
from hf_layerprune.surgery.peft import unsaved_parameters

from ..conftest import logits, make_model, tokens
from ..pruning.test_callback import pruning
from .test_trainer import examples, make_trainer


def lora(**settings):
    return LoraConfig(**{"r": 2, "target_modules": "all-linear"} | settings)


def adapted_trainer(model, config=None, **settings):
    config = config or lora()
    if model.config.model_type == "gpt2" and isinstance(config, LoraConfig):
        config.fan_in_fan_out = True
    return make_trainer(model, peft_config=config, **settings)


def storages(*models):
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def test_the_teacher_reads_the_students_own_weights(model):
    start, alone = copy.deepcopy(model), storages(model)
    trainer = adapted_trainer(model, max_steps=4)
    adapters = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert storages(trainer.model, trainer.teacher) == alone + adapters
    remove_layers(trainer.model, [2])
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 1e-3
    assert any(
        parameter.abs().sum() > 0 for name, parameter in trainer.model.named_parameters() if "lora_B" in name
    )
    for name, value in start.state_dict().items():
        assert torch.equal(trainer.teacher.state_dict()[name], value), name
    assert torch.equal(logits(trainer.teacher, tokens()), logits(start, tokens()))


def test_a_shared_teacher_teaches_as_one_of_its_own(model):
    found = []
    for shared in (True, False):
        torch.manual_seed(0)
        student = copy.deepcopy(model)
        teacher = None if shared else copy.deepcopy(model)
        trainer = adapted_trainer(student, lora(lora_dropout=0.1), max_steps=3, teacher_model=teacher)
        remove_layers(trainer.model, [2])
        trainer.train()
        terms = [log["kl"] for log in trainer.state.log_history[:-1]]
        found.append((terms, {n: p.detach() for n, p in trainer.model.named_parameters() if "lora" in n}))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_layers_go_while_adapters_learn(export, llama, tokenizer):
    llama.save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base")
    callback = pruning(steps_per_phase=2)
    trainer = adapted_trainer(
        base,
        lora(layers_to_transform=[0, 2, 3, 5], target_modules=["q_proj", "down_proj"]),
        max_steps=4,
        export=export,
        callbacks=[callback],
        processing_class=tokenizer,
    )
    trainer.train()
    kept = get_lineage(trainer.model).kept
    assert len(kept) == 4
    # The optimizer has forgotten the adapters that went with their layers.
    live = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == live >= {id(p) for p in trainer.optimizer.state}
    trainer.save_model("out/final")
    expected = logits(trainer.model.eval(), tokens())
    names = {path.name for path in Path("out/final").iterdir()}
    assert "tokenizer.json" in names
    if export == "merged":
        saved = AutoModelForCausalLM.from_pretrained("out/final")
        assert json.loads(Path("out/final/config.json").read_text())["num_hidden_layers"] == 4
        assert not any("lora" in name for name in saved.state_dict())
    else:
        saved = load_pruned_adapter("out/final")
        size = sum(path.stat().st_size for path in Path("out/final").glob("*.safetensors"))
        assert size < Path("base/model.safetensors").stat().st_size / 4
        assert "model.safetensors" not in names
    torch.testing.assert_close(logits(saved, tokens()), expected, rtol=0, atol=1e-5)
    # Saving has merged nothing here, and the teacher is as it was.
    assert any("lora" in name for name in trainer.model.state_dict())
    assert torch.equal(logits(trainer.model, tokens()), expected)
    assert torch.equal(logits(trainer.teacher, tokens()), logits(llama, tokens()))


def test_a_resumed_run_ends_with_the_same_adapters_to_the_bit(llama):
    def run(resume=None, **settings):
        torch.manual_seed(0)
        trainer = adapted_trainer(
            copy.deepcopy(llama),
            lora(lora_dropout=0.1),
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            callbacks=[pruning(steps_per_phase=2)],
            **settings,
        )
        trainer.train(resume)
        return trainer

    whole = run(output_dir="whole")
    run(output_dir="again")
    for step in (1, 3):
        resumed = run(f"again/checkpoint-{step}", output_dir="again")
        assert get_lineage(resumed.model) == get_lineage(whole.model)
        torch.testing.assert_close(
            resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0, msg=str(step)
        )


def test_a_plain_trainer_with_adapters(llama):
    model = get_peft_model(llama, lora())
    callback = pruning(criterion="block_influence")
    arguments = TrainingArguments(
        "out",
        max_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        save_strategy="steps",
    )
    Trainer(model, arguments, train_dataset=examples(), callbacks=[callback]).train()
    assert len(get_lineage(model).kept) == 4
    saved = load_pruned_adapter("out/checkpoint-4", base_model=_cut_base(get_lineage(model)))
    torch.testing.assert_close(logits(saved, tokens()), logits(model.eval(), tokens()), rtol=0, atol=1e-5)


def _cut_base(lineage):
    base = make_model()
    remove_layers(base, lineage.removed)
    return base


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(bias="all"), "train the model's own weights"),
        (lora(init_lora_weights="pissa"), "change the model's own weights"),
        (lora(target_modules=["nothing"]), "cannot be put on this model"),
    ],
)
def test_adapters_that_cannot_work_are_refused(config, message):
    with pytest.raises(LayerPruneError, match=message):
        adapted_trainer(make_model("qwen2"), config)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_model_with_new_adapters_trains_as_with_their_config(llama, settings):
    torch.manual_seed(0)
    by_config = adapted_trainer(copy.deepcopy(llama), lora(**settings), max_steps=2)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(llama), lora(**settings))
    trainer = make_trainer(adapted, max_steps=2)
    assert trainer.model is adapted
    own = {p.data_ptr() for p in llama.parameters()}
    shared = {p.data_ptr() for p in trainer.teacher.parameters()} & {
        p.data_ptr() for p in adapted.parameters()
    }
    assert len(shared) == len(own) - bool(settings)  # the head is trained, so the teacher has its own
    for each in (by_config, trainer):
        remove_layers(each.model, [2])
        each.train()
    assert trainer.state.log_history[0]["kl"] > 1e-3
    torch.testing.assert_close(trainer.model.state_dict(), by_config.model.state_dict(), rtol=0, atol=0)
    assert torch.equal(logits(trainer.teacher, tokens()), logits(llama, tokens()))


def test_trained_adapters_need_a_teacher(llama):
    trained = get_peft_model(copy.deepcopy(llama), lora(init_lora_weights=False))
    with pytest.raises(LayerPruneError, match="already change its logits"):
        make_trainer(trained)
    make_trainer(trained, teacher_model=llama).train()


def test_adapters_given_twice_are_refused(llama):
    with pytest.raises(LayerPruneError, match="peft_config is given too"):
        adapted_trainer(get_peft_model(llama, lora()))


def test_prompts_that_know_the_depth_stay_as_deep():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(LayerPruneError):
        adapted_trainer(make_model(), config, callbacks=[pruning()]).train()


def test_adapters_around_the_cuts(llama):
    remove_layers(llama, [3])
    trainer = adapted_trainer(llama, teacher_model=make_model(), trainable="around_cuts")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name.split(".layers.")[1][0]
        for name, p in trainer.model.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert changed == {"2", "3"}


def test_checkpoints_know_what_their_adapters_are_for(llama):
    remove_layers(llama, [3])
    settings = {"teacher_model": make_model(), "save_strategy": "steps", "save_steps": 1}
    adapted_trainer(copy.deepcopy(llama), **settings).train()
    assert load_lineage("out/checkpoint-1") == get_lineage(llama)
    short = copy.deepcopy(llama)
    remove_layers(short, [0])
    with pytest.raises(LayerPruneError, match="cannot be cut to"):
        adapted_trainer(short, **settings, max_steps=2).train(resume_from_checkpoint=True)


def test_layers_without_adapters_leave_nothing_to_train(llama):
    remove_layers(llama, [3])
    trainer = adapted_trainer(
        llama,
        lora(layers_to_transform=[0], target_modules=["q_proj"]),
        teacher_model=make_model(),
        trainable="around_cuts",
    )
    with pytest.raises(LayerPruneError, match="leaves nothing to train"):
        trainer.train()


def test_a_model_with_adapters_resumes_from_its_checkpoints(llama):
    def run(resume=None):
        torch.manual_seed(0)
        adapted = get_peft_model(copy.deepcopy(llama), lora())
        trainer = make_trainer(adapted, ce_weight=1.0, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume)
        return trainer.model.state_dict()

    whole = run()
    assert Path("out/checkpoint-2/pruned_base.json").is_file()
    torch.testing.assert_close(run("out/checkpoint-2"), whole, rtol=0, atol=0)


def test_trained_weights_that_peft_does_not_save_are_refused(llama):
    adapted = get_peft_model(llama, lora())
    adapted.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(LayerPruneError, match=r"norm\.weight is trained, but it is no part of the adapters"):
        make_trainer(adapted)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, when it saves a tied layer
@pytest.mark.parametrize("settings", [{"bias": "all"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_trained_weights_that_peft_saves_are_accepted(settings):
    assert unsaved_parameters(get_peft_model(make_model("qwen2"), lora(**settings))) == []
