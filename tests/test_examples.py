import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, pipeline

from hf_layerprune import remove_layers

from .conftest import make_model


EXAMPLES = Path(__file__).parent.parent / "examples"


# As `accelerate launch --num_processes 2` does where there is no GPU.
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
LAUNCH += ["--main_process_port", "0"]


@pytest.mark.parametrize(
    ("script", "launch"),
    [("drop_in.py", []), ("drop_in.py", LAUNCH), ("plain_trainer.py", []), ("lora.py", []), ("sft.py", [])],
)
def test_an_example_runs_as_it_stands(script, launch, tokenizer):
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    text = "\n".join(f"Line {i} of a text that says little about the number {i * i}." for i in range(200))
    Path("text.txt").write_text(text)
    command = [sys.executable, *launch, str(EXAMPLES / script), "model", "text.txt", "out", "4", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 4


def test_the_config_for_eight_gpus_is_one():
    config = load_config_from_file(str(EXAMPLES / "eight_gpus.yaml"))
    assert (config.distributed_type, config.num_processes) == ("MULTI_GPU", 8)


def test_the_config_for_deepspeed_is_one():
    config = load_config_from_file(str(EXAMPLES / "deepspeed.yaml"))
    assert (config.distributed_type, config.deepspeed_config["zero_stage"]) == ("DEEPSPEED", 3)
    assert config.deepspeed_config["zero3_save_16bit_model"] is True  # else no plain model is left


@pytest.fixture
def cut(tokenizer):
    remove_layers(model := make_model(), [2, 3])
    model.save_pretrained("cut")
    tokenizer.save_pretrained("cut")
    return model


def test_a_cut_model_is_exported_with_equal_logits(cut):
    command = [sys.executable, str(EXAMPLES / "onnx_export.py"), "cut", "exported"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    scale, difference = map(
        float, re.search(r"4 layers; logits of up to (\S+) differ by (\S+)", done.stdout).groups()
    )
    assert scale > 1
    assert difference < 1e-5 * scale


def test_a_pipeline_loads_a_cut_model(cut, tokenizer):
    generate = pipeline("text-generation", "cut")
    said = generate("The sky", max_new_tokens=5, do_sample=False, return_tensors=True)[0][
        "generated_token_ids"
    ]
    ids = tokenizer("The sky", return_tensors="pt")["input_ids"]
    expected = cut.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=257)[0].tolist()
    assert said in (expected, expected[ids.shape[1] :])
