"""A model is saved in the dtype it came in, by every command that trains or saves, unless asked otherwise."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_layerprune import DistillationTrainingArguments, LayerPruneError
from hf_layerprune.checkpoints.loading import stored_dtype
from hf_layerprune.commands.cli import main

from ..conftest import TEXT, logits, make_model, tokens
from ..distillation.test_lora import adapted_trainer
from ..distillation.test_trainer import make_trainer
from ..pruning.test_callback import pruning


BLOCKS = ["--sequence_length", "16", "--calibration_sequences", "4", "--heldout_sequences", "4"]
TEXT_FLAGS = ["--data", "text.txt", *BLOCKS]
QUICK = ["--report_to", "none", "--use_cpu", "True"]
# A command that leaves a phase in float32, as many do.
TRAINER = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").save_pretrained(sys.argv[2])
"""
COMMANDS = {
    "prune": ["prune", "MODEL", "--target_layers", "5"],
    "distill": ["distill", "MODEL", "--target_layers", "5", "--max_steps", "1", *QUICK],
    "distill, adapters": [
        *("distill", "MODEL", "--target_layers", "5", "--max_steps", "1", "--lora_rank", "2", *QUICK)
    ],
    "run, trained": ["run", "default", "--model", "MODEL", "--keep", "5", "--max_steps", "1", *QUICK],
    "run, not trained": ["run", "replaceme", "--model", "MODEL", "--keep", "5", *QUICK],
    "phases": ["phases", "MODEL", "--target_layers", "5"],
}


def stored(dtype, folder, tokenizer):
    model = make_model().to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path("text.txt").write_text(TEXT)
    return str(folder)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_save_in_the_dtype_that_the_model_came_in(words, tokenizer):
    Path("trainer.py").write_text(TRAINER)
    command = ["--", sys.executable, "trainer.py", "{model}", "{output_dir}"] if words[0] == "phases" else []
    words = [stored(torch.bfloat16, "half", tokenizer) if word == "MODEL" else word for word in words]
    assert main([*words, *TEXT_FLAGS, "--output_dir", "out", *command]) == 0
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.bfloat16}
    size = [Path(folder, "model.safetensors").stat().st_size for folder in ("half", "out")]
    assert size[1] < size[0]


@pytest.mark.parametrize(("dtype", "asked"), [("float16", None), ("float32", None), ("bfloat16", "float32")])
def test_distill_saves_in_the_dtype_asked_for(dtype, asked, tokenizer):
    words = [stored(getattr(torch, dtype), "base", tokenizer), *COMMANDS["distill"][2:], *TEXT_FLAGS]
    words += ["--save_steps", "1"] + (["--save_dtype", asked] if asked else [])
    assert main(["distill", *words, "--output_dir", "out"]) == 0
    assert AutoModelForCausalLM.from_pretrained("out").dtype == getattr(torch, asked or dtype)
    # Training, and what it resumes from, has full precision.
    assert AutoModelForCausalLM.from_pretrained("out/checkpoint-1").dtype == torch.float32


def test_the_dtype_of_a_model_whose_config_does_not_say_it_is_that_of_its_weights(llama, tmp_path):
    llama.to(torch.float16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert stored_dtype(str(tmp_path)) == torch.float16
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "dtype"}))
    assert stored_dtype(str(tmp_path)) == torch.float16


def test_a_script_saves_in_the_dtype_of_its_model_or_that_asked_for(llama):
    for model, asked, expected in [
        (make_model().to(torch.bfloat16), None, torch.bfloat16),
        (make_model(), None, torch.float32),
        (make_model(), "bfloat16", torch.bfloat16),
    ]:
        trainer = make_trainer(model, save_dtype=asked, output_dir=f"out-{expected}-{asked}")
        trainer.train()
        trainer.save_model("final")
        saved = AutoModelForCausalLM.from_pretrained("final")
        assert saved.dtype == expected
        assert torch.equal(saved.lm_head.weight, model.lm_head.weight.to(expected))
        assert Path("final/training_args.bin").is_file()


def test_merged_adapters_are_saved_in_the_dtype_asked_for():
    trainer = adapted_trainer(make_model(), max_steps=2, learning_rate=0.1, save_dtype="bfloat16")
    trainer.train()
    trainer.save_model("final")
    saved = AutoModelForCausalLM.from_pretrained("final")
    assert saved.dtype == torch.bfloat16
    far = logits(saved.float(), tokens()) - logits(trainer.model.eval(), tokens())
    assert 0 < far.abs().max() < 0.2


def test_a_dtype_that_there_is_not_is_refused():
    with pytest.raises(
        LayerPruneError, match=r"save_dtype is 'int8': choose from float32, bfloat16, float16"
    ):
        DistillationTrainingArguments("out", save_dtype="int8")


def test_a_callback_run_keeps_checkpoints_in_full_precision(llama):
    trainer = make_trainer(
        llama, max_steps=2, save_dtype="bfloat16", save_strategy="steps", save_steps=1, callbacks=[pruning()]
    )
    trainer.train()
    checkpoint = AutoModelForCausalLM.from_pretrained("out/checkpoint-2")
    assert torch.equal(checkpoint.lm_head.weight, llama.lm_head.weight)
