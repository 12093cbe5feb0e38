"""Relatives of faults that users met: other adapters, trainers, model types and ways to go on."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftMixedModel, ShiraConfig, get_peft_model
from transformers import AlbertConfig, AlbertForSequenceClassification, Trainer, TrainingArguments

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    load_pruned_adapter,
    remove_layers,
    score_layers,
)
from hf_layerprune.checkpoints.loading import load_model
from hf_layerprune.surgery.decoder import find_decoder

from ..conftest import logits, make_model, tokens
from .test_callback import hand_over


def rows(count=4):
    ids = tokens(count, 8).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def settings(cls=DistillationTrainingArguments, **changes):
    fixed = {
        "output_dir": "run",
        "max_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
    }
    return cls(**{**fixed, **changes})


def pruning(**changes):
    return LayerPruningCallback(**{"target_layers": 5, "calibration": rows(), **changes})


def recorded(folder="run"):
    with open(f"{folder}/layer_pruning.json", encoding="utf-8") as file:
        return json.load(file)


def test_an_evaluation_before_training_is_recorded(llama):
    trainer = DistillationTrainer(
        llama, settings(), train_dataset=rows(), eval_dataset=rows(), callbacks=[pruning()]
    )
    trainer.evaluate()
    trainer.train()
    assert [(one["step"], one["layers"]) for one in recorded()["evaluations"]] == [(0, 6)]


def test_a_resumed_run_keeps_its_evaluations_with_a_teacher_of_the_criterion():
    def run(**resume):
        trainer = DistillationTrainer(
            make_model(),
            settings(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1),
            train_dataset=rows(),
            eval_dataset=rows(),
            callbacks=[pruning(criterion="kl", teacher=make_model())],
        )
        trainer.train(**resume)
        return [one["step"] for one in recorded()["evaluations"]]

    assert run() == [1, 2]
    assert run(resume_from_checkpoint="run/checkpoint-1") == [1, 2]


def test_a_callback_in_another_trainer_begins_a_new_record():
    callback = pruning()
    for folder in ("first", "second"):
        trainer = DistillationTrainer(
            make_model(),
            settings(output_dir=folder),
            train_dataset=rows(),
            eval_dataset=rows(),
            callbacks=[callback],
        )
        trainer.evaluate()
        trainer.train()
        assert [(one["step"], one["layers"]) for one in recorded(folder)["evaluations"]] == [(0, 6)]


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_adapters_that_change_the_base_are_refused_where_the_teacher_reads_it(llama, init):
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init)
    with pytest.raises(LayerPruneError, match="change the model's own weights"):
        DistillationTrainer(llama, settings(), train_dataset=rows(), peft_config=config)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_adapters_that_change_the_base_are_saved_as_trained(llama, init):
    llama.save_pretrained("base")
    base = type(llama).from_pretrained("base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init))
    args = settings(TrainingArguments, save_strategy="steps", save_steps=1)
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[pruning()])
    trainer.train()  # with a checkpoint that is loaded again
    trainer.save_model("saved")
    torch.testing.assert_close(
        logits(load_pruned_adapter("saved").eval(), tokens()), logits(model.eval(), tokens())
    )


def adapted(model, name="default", *others):
    model.save_pretrained("base")
    base = type(model).from_pretrained("base")
    model = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name=name
    )
    for other in others:
        model.add_adapter(other, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    return model


def test_an_adapter_of_another_name_is_saved_as_trained(llama):
    model = adapted(llama, "mine")
    args = settings(TrainingArguments, save_strategy="steps", save_steps=1)
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[pruning()])
    trainer.train()
    trainer.save_model("saved")
    torch.testing.assert_close(
        logits(load_pruned_adapter("saved/mine").eval(), tokens()), logits(model.eval(), tokens())
    )


def test_two_active_adapters_are_each_saved(llama, caplog):
    model = adapted(llama, "default", "other")
    model.base_model.set_adapter(["default", "other"])
    args = settings(TrainingArguments, save_strategy="steps", save_steps=1)
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        Trainer(model, args, train_dataset=rows(), callbacks=[pruning()]).train()
    assert "2 adapters are active (default, other)" in caplog.text
    for name, folder in {"default": "", "other": "/other"}.items():
        model.set_adapter(name)
        again = load_pruned_adapter(f"run/checkpoint-2{folder}").eval()
        torch.testing.assert_close(logits(again, tokens()), logits(model.eval(), tokens()))


def test_mixed_adapters_are_refused(llama):
    model = PeftMixedModel(llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LayerPruneError, match="PeftMixedModel mixes adapters"):
        remove_layers(model, [1])


def test_adapters_that_cannot_be_built_without_weights_are_refused_by_name(llama):
    model = get_peft_model(llama, ShiraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(LayerPruneError, match="cannot build SHIRA adapters without weights"):
        remove_layers(model, [2])


def test_one_layer_that_runs_many_times_is_not_taken_for_layers_cut_by_hand():
    config = AlbertConfig(
        vocab_size=64, hidden_size=16, embedding_size=8, intermediate_size=16, num_attention_heads=2
    )
    with pytest.raises(LayerPruneError, match="Cannot tell the decoder layers") as told:
        find_decoder(AlbertForSequenceClassification(config))
    assert "cut by hand" not in str(told.value)


def test_a_folder_of_plain_adapters_is_named_as_such(llama):
    get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained("adapters")
    with pytest.raises(LayerPruneError, match="holds adapters of PEFT and no model"):
        DistillationTrainer("adapters", settings(), train_dataset=rows())


def test_a_class_that_transformers_does_not_have_is_told(llama, caplog):
    type("MyLlama", (type(llama),), {})(llama.config).save_pretrained("own")
    llama.save_pretrained("plain")
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        load_model("plain")
        assert not caplog.text
        load_model("own")
    assert "names the class MyLlama, but the model is loaded and saved as LlamaForCausalLM" in caplog.text


def test_token_ids_of_32_bits_are_scored_alike(llama):
    ids = tokens()
    wide, narrow = (score_layers(llama, [{"input_ids": one}], progress=False) for one in (ids, ids.int()))
    assert wide.scores == narrow.scores


def test_a_mask_of_pairs_of_tokens_is_refused(llama):
    ids = tokens()
    mask = torch.ones(len(ids), 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(LayerPruneError, match="attention_mask has the shape"):
        score_layers(llama, [{"input_ids": ids, "attention_mask": mask}], progress=False)


def test_a_resume_without_the_optimizer_says_so(caplog):
    def run(**resume):
        args = settings(save_strategy="steps", save_steps=1, save_only_model=True)
        DistillationTrainer(make_model(), args, train_dataset=rows(), callbacks=[pruning()]).train(**resume)

    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        run()
        assert "save_only_model" not in caplog.text
        run(resume_from_checkpoint="run/checkpoint-1")
    assert "holds no state of the optimizer" in caplog.text


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # trl uses its old names
@pytest.mark.parametrize("adapters", [False, True])
def test_a_reference_that_loses_layers_is_told(llama, tokenizer, adapters, caplog):
    from trl import DPOConfig, DPOTrainer

    data = {"prompt": ["hello "] * 4, "chosen": ["world"] * 4, "rejected": ["war"] * 4}
    batches = [{"input_ids": tokens()}]
    llama.save_pretrained("base")  # where trl loads the reference from, without adapters
    trainer = DPOTrainer(
        type(llama).from_pretrained("base"),
        args=settings(DPOConfig, bf16=False, max_length=32),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]) if adapters else None,
        callbacks=[pruning(criterion="block_influence", calibration=batches, verify_save=False)],
    )
    hand_over(trainer)
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        trainer.train()
    assert ("The reference of DPOTrainer" in caplog.text) == adapters
