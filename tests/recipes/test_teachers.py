"""A pruned model is pruned further and learns from its original, which has more layers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_layerprune import DistillationTrainer, LayerPruneError, get_lineage, load_model, prune, remove_layers
from hf_layerprune.commands.cli import main

from ..conftest import make_model


DATA = ["--data", "text.txt", "--sequence_length", "16", "--calibration_sequences", "4"]
DATA += ["--heldout_sequences", "4"]
SHORT = ["--max_steps", "2", "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no"]
SHORT += ["--bf16", "False", "--learning_rate", "1e-3", "--logging_steps", "1"]
ALONE = ["--reconstruction_layers", "0"]  # without it, reconstruction learns from the teacher
FIELDS = {"sequence_length": 16, "calibration_sequences": 4, "heldout_sequences": 4, "max_steps": 2}
FIELDS |= {"bf16": False, "report_to": "none", "save_strategy": "no", "output_dir": "out"}


@pytest.fixture
def pruned(folder, tokenizer):
    """A folder with the tiny Llama without layers 1 and 3. Its original is in the folder model."""
    model = make_model()
    remove_layers(model, [1, 3])
    model.save_pretrained("pruned")
    tokenizer.save_pretrained("pruned")
    return "pruned"


def check_lineage():
    saved = AutoModelForCausalLM.from_pretrained("out")
    assert saved.config.num_hidden_layers == 3
    lineage = get_lineage(saved)
    assert lineage.original == 6
    assert {1, 3} < set(lineage.removed)
    record = json.loads(Path("out/layer_pruning.json").read_text())
    assert record["model"]["layers"] == 4
    assert [one["original"] for one in record["phases"][0]["removals"]] == sorted(
        set(lineage.removed) - {1, 3}
    )
    return record


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("distill", ["--hidden_weight", "0.1"]),
        ("run default", []),
        ("run default", ["--reconstruction_layers", "1", "--hidden_weight", "0.1"]),
        ("run iterative", ["--loss_preset", "paper", "--gradient_accumulation_steps", "1"]),
    ],
)
def test_a_pruned_model_learns_from_its_original(command, more, pruned, monkeypatch):
    depths = []

    def trainer(*args, teacher_model, **settings):
        depths.append(len(get_lineage(teacher_model).kept))
        return DistillationTrainer(*args, teacher_model=teacher_model, **settings)

    monkeypatch.setattr("hf_layerprune.recipes.run.DistillationTrainer", trainer)
    words = ["distill", pruned] if command == "distill" else [*command.split(), "--model", pruned]
    more = [*more, *(["--steps_per_phase", "2"] if "iterative" in command else [])]
    flags = ["--teacher", "model", "--target_layers", "3", "--output_dir", "out"]
    assert main([*words, *DATA, *SHORT, *flags, *more]) == 0
    record = check_lineage()
    if command != "distill":
        assert record["recipe"]["teacher"] == "model"
        assert depths == [6]


@pytest.mark.parametrize("teacher", ["model", "in memory"])
def test_the_loss_is_that_against_the_original(teacher, pruned):
    """At a learning rate of 0 it is the KL between the original and the pruned model."""
    given = load_model("model") if teacher == "in memory" else teacher
    settings = FIELDS | {"select": "one_shot", "criterion": "positional", "logging_steps": 1}
    settings |= {"learning_rate": 0.0, "warmup_steps": 0, "max_steps": 1, "seed": 0}
    settings |= {"bf16": teacher == "in memory"}  # under which only a teacher of the run's own is cast
    found = {}
    for name, one in (("original", given), ("itself", None)):
        settings |= {"output_dir": name, "recipe": {}}
        model, record = prune(pruned, "text.txt", keep=3, teacher=one, **settings)
        found[name] = record.log[0]["kl"]
    assert model.config.num_hidden_layers == 3
    assert found["original"] != pytest.approx(found["itself"], rel=1e-3)
    if teacher == "in memory":
        assert not any(parameter.requires_grad for parameter in given.parameters())
        expected = load_model("model").state_dict()
        torch.testing.assert_close(given.state_dict(), expected, rtol=0, atol=0)


def test_cached_logits_teach_a_recipe(pruned):
    assert main(["cache-teacher", "model", *DATA[:4], "--output_dir", "cached", "--top_k", "9"]) == 0
    words = ["run", "default", "--model", pruned, *DATA, *SHORT, "--keep", "3", "--output_dir", "out"]
    assert main([*words, "--teacher", "cached", "--reconstruction_layers", "0"]) == 0
    check_lineage()


def test_distill_refuses_repeats_of_cached_text(pruned, capsys):
    assert main(["cache-teacher", "model", *DATA[:4], "--output_dir", "cached", "--top_k", "9"]) == 0
    words = ["distill", pruned, *DATA, *SHORT, "--keep", "3", "--output_dir", "out", "--teacher", "cached"]
    assert main([*words, "--repeat_share", "0.5"]) == 2
    assert "Leave --repeat_share out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", "nowhere"], "Cannot load a model from 'nowhere'"),
        (["--teacher", "other"], "The teacher's vocabulary has 200 tokens"),
        (
            ["--teacher", "model", "--max_steps", "0", *ALONE],
            "--teacher is given, but nothing learns from it",
        ),
        (["--teacher", "model", "--kl_weight", "0", "--ce_weight", "1", *ALONE], "nothing learns from it"),
        (["--teacher", "cached"], "holds cached logits and no hidden states"),
        (["--teacher", "shallow", "--hidden_weight", "1"], "Give the original model as teacher"),
    ],
)
def test_teachers_that_cannot_teach_are_refused_before_training(more, message, pruned, capsys, monkeypatch):
    monkeypatch.setattr("hf_layerprune.recipes.run.score_present", lambda *_, **__: pytest.fail("scored"))
    make_model(vocab_size=200, pad_token_id=None).save_pretrained("other")
    shallow = make_model()
    remove_layers(shallow, [2, 3])
    shallow.save_pretrained("shallow")
    if "cached" in more:
        assert main(["cache-teacher", "model", *DATA[:4], "--output_dir", "cached", "--top_k", "9"]) == 0
    words = ["run", "default", "--model", pruned, *DATA, *SHORT, "--keep", "3", "--output_dir", "out"]
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err


def test_python_names_the_setting(pruned):
    fields = FIELDS | {"max_steps": 0, "reconstruction_layers": 0}
    with pytest.raises(LayerPruneError, match="teacher is given, but nothing learns from it"):
        prune(pruned, "text.txt", keep=3, teacher=make_model(), **fields)
