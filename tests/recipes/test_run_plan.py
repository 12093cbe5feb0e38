"""What a run needs, told before its weights are loaded."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig

from hf_layerprune import DistillationTrainingArguments, cache_teacher_logits
from hf_layerprune.commands.cli import main
from hf_layerprune.distillation.plan import GIB
from hf_layerprune.pruning.arguments import PruningArguments
from hf_layerprune.recipes import prune, run_plan
from hf_layerprune.recipes.arguments import ModelArguments
from hf_layerprune.recipes.run_plan import announce_plan, plan_run, planned_model

from ..conftest import make_model, tokens


LARGE = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 4096,
}


def stored_config(name, **changes):
    """A folder with the config of a model that has no weights."""
    config = LlamaConfig(**LARGE | changes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(name)
    return name


def arguments(**changes):
    given = {"use_cpu": True, "report_to": "none", "sequence_length": 64, "max_steps": -1}
    return DistillationTrainingArguments(**given | {"num_train_epochs": 2} | changes)


ROWS = Dataset.from_list([{"input_ids": [0]}] * 100)


def announced(caplog, args, level=logging.INFO, **settings):
    caplog.clear()
    source, pruning = ModelArguments(), PruningArguments(target_layers=4)
    with caplog.at_level(level, "hf_layerprune"):
        announce_plan("large", source, pruning, args, ROWS, **settings)
    return [record.message for record in caplog.records if record.name == run_plan.__name__]


def test_memory_time_and_fit_are_told_without_weights(caplog):
    stored_config("large")
    memory, time, fit = announced(caplog, arguments())
    plan = plan_run(planned_model("large", ModelArguments(), None), arguments(), 4, 5, on_cpu=True)
    assert memory.startswith(f"Memory: training needs about {plan.training.peak / GIB:.1f} GiB, ")
    assert memory.endswith("GiB of RAM are free.")
    assert time.startswith("Time: 26 steps of 512 tokens, about ")  # 13 batches of 8 sequences, twice
    assert fit == "The run should fit."
    assert announced(caplog, arguments(max_steps=7))[1].startswith("Time: 7 steps of 512 tokens")


def test_the_time_of_reconstruction_is_told(caplog, monkeypatch):
    stored_config("large")
    monkeypatch.setattr(run_plan, "matmul_speed", lambda dtype: 2e9)
    pruning = PruningArguments(target_layers=4, reconstruction_layers=1)
    plan = plan_run(planned_model("large", ModelArguments(), None), arguments(), 4, 5, on_cpu=True)
    layer, layers = plan.footprint.layer_flops, plan.footprint.layers  # of 8 x 64 tokens
    tokens = 10 * 512
    assert plan.reconstruction_flops(pruning, tokens, None) == pytest.approx(
        10 * layer * (layers + 4 * 3 * 2)
    )
    less = replace(pruning, reconstruction_tokens=512)
    assert plan.reconstruction_flops(less, tokens, None) == pytest.approx(layer * (layers + 4 * 3 * 2))
    assert plan.reconstruction_flops(pruning, tokens, 8) == pytest.approx(layer * (layers + 4 * 3 * 2))
    phases = replace(plan, phases=2)
    assert phases.reconstruction_flops(less, tokens, None) == pytest.approx(2 * layer * (layers + 4 * 3 * 2))
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        announce_plan("large", ModelArguments(), pruning, arguments(max_steps=10), ROWS, select="block")
    expected = run_plan.duration(plan.reconstruction_flops(pruning, tokens, 100) / 1e9)
    assert any(one.message.endswith(f", and about {expected} of reconstruction.") for one in caplog.records)


def test_the_setting_to_change_is_told(caplog, monkeypatch):
    stored_config("large")
    peak = plan_run(
        planned_model("large", ModelArguments(), None), arguments(), 4, 5, on_cpu=True
    ).training.peak
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0.98 * peak))
    assert announced(caplog, arguments())[2] == ("The run may not fit. Add --activation_checkpointing True.")
    assert not any(record.levelno > logging.INFO for record in caplog.records)  # RAM is an estimate
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert "Use a smaller batch, FSDP2, or LoRA" in announced(caplog, arguments())[2]


def test_a_gpu_that_is_too_small_is_a_warning(caplog, monkeypatch):
    stored_config("large")
    plan = plan_run(planned_model("large", ModelArguments(), None), arguments(), 4, 5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (0.5 * GIB, 22.5 * GIB))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        run_plan.log_plan(plan, arguments(), None)
    memory, time, fit = caplog.records
    assert "0.5 GiB on nvidia l4 are free" in memory.message
    assert "A step of 512 tokens" in time.message
    assert "The run may not fit" in fit.message
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert not time.message.endswith("seconds.")  # nobody knows its speed in float32


@pytest.mark.parametrize(
    ("share", "given", "changes", "is_set"),
    [
        (0.98, (), {}, True),
        (1.02, (), {}, False),  # it fits
        (0.5, (), {}, False),  # it would not fit either
        (0.98, ("activation_checkpointing",), {}, False),
        (0.98, (), {"torch_compile": True}, False),
        (0.98, (), {"trainable": "around_cuts"}, False),  # the plan counts all weights as trained
    ],
)
def test_activations_are_recomputed_where_the_gpu_is_too_small(
    share, given, changes, is_set, caplog, monkeypatch
):
    stored_config("large")
    peak = plan_run(planned_model("large", ModelArguments(), None), arguments(), 4, 5).training.peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (share * peak, 22.5 * GIB))
    args = arguments(**changes)
    args.use_cpu = False  # as on the GPU that is pretended
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    messages = announced(caplog, args, given=given)
    assert bool(args.activation_checkpointing) == is_set
    assert any("activation_checkpointing is set, because training" in one for one in messages) == is_set
    assert ("The run should fit." in messages) == (is_set or share > 1)


def test_nothing_is_planned_where_nobody_reads_it(caplog, monkeypatch):
    stored_config("large")
    monkeypatch.setattr(run_plan, "planned_model", lambda *args: pytest.fail("planned"))
    assert announced(caplog, arguments(), logging.WARNING) == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # each process holds a part
    assert announced(caplog, arguments()) == []


def test_a_model_that_cannot_be_planned_ends_no_run(caplog, monkeypatch):
    def fail(*args, **settings):
        raise AssertionError("no values")

    stored_config("large")
    monkeypatch.setattr(run_plan, "measure_footprint", fail)
    assert announced(caplog, arguments()) == []


def test_the_speed_of_a_cpu_leaves_the_random_state():
    state = torch.get_rng_state()
    assert run_plan.matmul_speed(torch.float32) > 1e6
    assert torch.equal(torch.get_rng_state(), state)


def test_a_teacher_is_as_large_as_it_is(folder):
    stored_config("large")
    stored_config("teacher", num_hidden_layers=12, hidden_size=256)
    cache_teacher_logits(make_model(), [{"input_ids": tokens()}], "cached")

    def planned(teacher, rank=None, **changes):
        model = planned_model("large", ModelArguments(), rank)
        return plan_run(model, arguments(**changes), 4, 5, teacher=teacher).training

    own, other, cached = planned(None), planned("teacher"), planned("cached")
    twelve = planned_model("teacher", ModelArguments(), None).num_parameters()
    assert own.memory["teacher"] == 4 * planned_model("large", ModelArguments(), None).num_parameters()
    assert other.memory["teacher"] == 4 * twelve
    assert cached.memory["teacher"] == 0
    assert cached.step_flops < other.step_flops < own.step_flops
    assert planned(None, rank=2).memory["teacher"] == 0
    assert planned("teacher", rank=2).memory["teacher"] == 4 * twelve
    # Adapters keep a loaded teacher as it is. Under autocast another one is held in 16 bits.
    assert planned("teacher", rank=2, bf16=True).memory["teacher"] == 4 * twelve
    assert planned("teacher", bf16=True).memory["teacher"] < 0.7 * 4 * twelve


def test_plan_takes_a_teacher_and_a_share_of_the_layers(capsys):
    stored_config("large")
    stored_config("teacher", num_hidden_layers=60)
    words = ["plan", "large", "--target_ratio", "0.5", "--sequence_length", "64"]
    assert main(words) == 0
    assert "large: 6 -> 3 layers" in capsys.readouterr().out

    def teacher_memory():
        return float(re.search(r"teacher \|\s+([\d.]+)", capsys.readouterr().out)[1])

    assert main(words) == 0
    own = teacher_memory()
    assert main([*words, "--teacher", "teacher"]) == 0
    assert teacher_memory() > 3 * own


DATA = ["--data", "text.txt", "--sequence_length", "16", "--calibration_sequences", "2"]
TRAIN = [
    "--target_layers",
    "5",
    "--output_dir",
    "out",
    "--max_steps",
    "1",
    "--use_cpu",
    "--report_to",
    "none",
]


@pytest.mark.parametrize("command", ["distill", "run"])
@pytest.mark.parametrize("quiet", [False, True])
def test_commands_tell_it_before_weights_are_loaded(command, quiet, folder, capsys, monkeypatch):
    def load(*args, **kwargs):
        raise OSError("loading weights")

    monkeypatch.setattr("hf_layerprune.recipes.inputs.load_on_device", load)
    monkeypatch.setattr(prune, "load_on_device", load)
    words = ["default", "--model", folder] if command == "run" else [folder]
    assert main([command, *words, *DATA, *TRAIN, *["--quiet"] * quiet]) == 2
    text = capsys.readouterr().err
    assert "loading weights" in text
    lines = ("Memory: training needs about ", "Time: 1 step of ", "The run should fit.")
    assert [line in text for line in lines] == [not quiet] * 3
