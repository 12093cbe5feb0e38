"""All weights of a bfloat16 model are trained by an optimizer of torchao that rounds at random."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


pytest.importorskip("torchao")

WORDS = ["--data", "text.txt", "--sequence_length", "16", "--calibration_sequences", "4"]
WORDS += ["--heldout_sequences", "4", "--target_layers", "4", "--output_dir", "out", "--use_cpu", "True"]
WORDS += ["--report_to", "none", "--max_steps", "4", "--steps_per_phase", "2", "--save_steps", "2"]
IN_BF16 = ["--dtype", "bfloat16", "--optim", "adamw_torch_8bit"]
IN_BF16 += ["--optim_args", "bf16_stochastic_round=True", "--bf16", "True"]


def test_distill_trains_removes_layers_and_saves(folder):
    # torchao compiles its steps, which takes a minute and changes nothing here.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "hf_layerprune", "distill", folder, *WORDS, *IN_BF16]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "rounds most small updates away" not in done.stderr
    assert list(Path("out").glob("checkpoint-*/optimizer.pt"))
    saved = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert saved.config.num_hidden_layers == 4
    before = AutoModelForCausalLM.from_pretrained(folder)
    change = saved.get_input_embeddings().weight.float() - before.get_input_embeddings().weight
    assert torch.any(change != 0)
