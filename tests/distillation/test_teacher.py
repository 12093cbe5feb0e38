"""Teachers in eight or 16 bits. What else can teach is in the other files of this folder."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_layerprune import LayerPruneError, remove_layers
from hf_layerprune.distillation.teacher import make_teacher

from ..conftest import logits, make_model, tokens
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


AUTOCAST = {"bf16": True, "trainable": "around_cuts", "hidden_weight": 0.3}


def halved_bytes(model):
    """The bytes of a float32 model whose linear layers are in 16 bits."""
    linear = {p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    linear -= {model.get_input_embeddings().weight}
    return sum(p.numel() * (2 if p in linear else 4) for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("source", ["copy", "folder"])
def test_under_autocast_the_teacher_holds_its_linear_layers_in_16_bits(source, tied, tmp_path):
    """It teaches the same to the bit, and first layers are still shared."""
    original = make_model(tie_word_embeddings=tied)
    original.save_pretrained(tmp_path / "original")
    found = []
    for teacher in (None if source == "copy" else str(tmp_path / "original"), copy.deepcopy(original)):
        student = copy.deepcopy(original)
        trainer = make_trainer(student, teacher_model=teacher, learning_rate=1e-2, max_steps=3, **AUTOCAST)
        remove_layers(trainer.model, [4])
        trainer.train()
        found.append([{k: log[k] for k in ("kl", "hidden_mse")} for log in trainer.state.log_history[:-1]])
        assert trainer._shared_prefix.length == 3
        size = sum(parameter.nbytes for parameter in trainer.teacher.parameters())
        is_given = not isinstance(teacher, str | None)
        assert size == (4 * original.num_parameters() if is_given else halved_bytes(original))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "settings", [{}, {"peft_config": LoraConfig(target_modules=["q_proj"]), "bf16": True}]
)
def test_the_teacher_stays_in_float32_without_autocast_or_if_the_student_reads_it(settings):
    trainer = make_trainer(make_model(), **settings)
    assert {parameter.dtype for parameter in trainer.teacher.parameters()} == {torch.float32}
