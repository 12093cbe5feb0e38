"""Teachers in eight bits. What else can teach is in the other files of this folder."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_layerprune import LayerPruneError, remove_layers
from hf_layerprune.distillation.teacher import make_teacher

from ..conftest import logits, tokens
from .test_trainer import make_trainer


@pytest.fixture
def eight_bits(llama):
    """The tiny Llama with its layers' weights in eight bits."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells each cast to float16
    llama.save_pretrained("whole")
    return AutoModelForCausalLM.from_pretrained(
        "whole", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("trainable", ["all", "around_cuts"])
def test_a_teacher_in_eight_bits_teaches(folder, trainable, llama, eight_bits):
    assert eight_bits.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    eight_bits.save_pretrained("eight")
    assert 0 < (logits(eight_bits, tokens()) - logits(llama, tokens())).abs().max() < 0.3
    student = copy.deepcopy(llama)
    remove_layers(student, [2])
    losses = []
    for teacher in (llama, "eight" if folder else eight_bits):
        one = copy.deepcopy(student)
        settings = {"hidden_weight": 0.1, "trainable": trainable, "max_steps": 3}
        trainer = make_trainer(one, teacher_model=teacher, **settings)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history[:-1]])
        assert losses[-1][-1] < losses[-1][0]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_student_in_eight_bits_shares_its_weights_with_its_teacher(ran_before, eight_bits):
    reference = logits(copy.deepcopy(eight_bits), tokens())
    if ran_before:
        logits(eight_bits, tokens())
    teacher = make_teacher(None, eight_bits, hidden_states=False, adapters=True)
    for model in (eight_bits, teacher, eight_bits):
        assert torch.equal(logits(model, tokens()), reference)
    states = [model.model.layers[0].mlp.up_proj.state for model in (eight_bits, teacher)]
    assert states[0].CB.data_ptr() == states[1].CB.data_ptr()


def test_adapters_are_trained_on_eight_bits(eight_bits):
    trainer = make_trainer(eight_bits, peft_config=LoraConfig(target_modules="all-linear", r=4), max_steps=2)
    remove_layers(trainer.model, [2])
    trainer.train()
    first, second = [log["kl"] for log in trainer.state.log_history[:2]]
    assert second < first


def test_a_teacher_whose_weights_are_shared_out_is_refused(llama):
    """As ZeRO-3 does with what is loaded after the training arguments are made."""
    teacher = copy.deepcopy(llama)
    next(teacher.parameters()).ds_id = 0
    for given in (teacher, None):
        student = llama if given else teacher
        with pytest.raises(LayerPruneError, match="load it before the training arguments are made"):
            make_teacher(given, student, False)


def test_adapters_on_eight_bits_are_saved_and_checked(eight_bits):
    settings = {"peft_config": LoraConfig(target_modules="all-linear", r=4), "export": "adapter"}
    trainer = make_trainer(eight_bits, max_steps=1, **settings)
    remove_layers(trainer.model, [2])
    trainer.train()
    trainer.save_model()
    assert Path("out/pruned_base.json").is_file()
