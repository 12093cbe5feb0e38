"""Flags in a YAML file."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, prune
from hf_layerprune.commands.cli import COMMANDS, main
from hf_layerprune.recipes import inputs
from hf_layerprune.reports.record import read_record


SHORT = {
    "sequence_length": 16,
    "calibration_sequences": 4,
    "heldout_sequences": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "learning_rate": 1e-2,
    "use_cpu": True,
}
WORDS = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal(one, other):
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name])


def test_a_saved_config_runs_again(folder, capsys):
    words = ["distill", folder, "--data", "text.txt", "--target_layers", "4", *WORDS]
    assert main([*words, "--output_dir", "by-flags"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--output_dir", "out", "--save_config", "c.yaml"])
    assert "Nothing was run" in capsys.readouterr().out
    assert not Path("out").exists()
    saved = yaml.safe_load(Path("c.yaml").read_text())
    assert saved["model"] == "model"
    assert saved["target_layers"] == 4
    assert saved["learning_rate"] == 0.01
    assert main(["distill", "--config", "c.yaml"]) == 0
    assert_equal("out", "by-flags")
    # Flags override it; a target replaces any other.
    assert (
        main(
            [
                "distill",
                "--config",
                "c.yaml",
                "--target_ratio",
                "0.5",
                "--max_steps",
                "3",
                "--output_dir",
                "half",
            ]
        )
        == 0
    )
    assert AutoModelForCausalLM.from_pretrained("half").config.num_hidden_layers == 3


def test_a_recipe_is_a_config_file(folder):
    words = ["--model", folder, "--data", "text.txt", "--target_layers", "4", *WORDS, "--bf16", "False"]
    with pytest.raises(SystemExit, match="0"):
        main(["run", "default", *words, "--save_config", "c.yaml"])
    assert main(["run", "default", *words, "--output_dir", "by-flags"]) == 0
    assert main(["run", "c.yaml", "--output_dir", "as-recipe"]) == 0
    assert main(["run", "--config", "c.yaml", "--output_dir", "as-config"]) == 0
    assert_equal("as-recipe", "by-flags")
    assert_equal("as-config", "by-flags")


def test_run_and_distill_read_one_file_alike(folder):
    values = {"model": folder, "data": "text.txt", "target_ratio": 0.7, "ce_weight": 0.5, **SHORT}
    Path("c.yaml").write_text(yaml.safe_dump(values))
    assert main(["distill", "--config", "c.yaml", "--output_dir", "distilled"]) == 0
    assert main(["run", "c.yaml", "--output_dir", "by-run"]) == 0
    assert main(["run", "--config", "c.yaml", "--output_dir", "by-config"]) == 0
    assert AutoModelForCausalLM.from_pretrained("distilled").config.num_hidden_layers == 4
    assert_equal("distilled", "by-run")
    assert_equal("distilled", "by-config")


TRAINING = ["--data", "text.txt", "--target_layers", "4", *WORDS]
COPY = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
TAIL = {"phases": ["--", sys.executable, "-c", COPY, "{model}", "{output_dir}"]}
PRUNING = ["--data", "text.txt", "--target_layers", "4", "--sequence_length", "16"]
PRUNING += ["--calibration_sequences", "4", "--heldout_sequences", "4"]


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["run", "default", "--model", "model", *TRAINING], ["run", "out/layer_pruning.yaml"]),
        (["run", "sleb", "--model", "model", *TRAINING], ["run", "--config", "out/layer_pruning.yaml"]),
        (["distill", "model", *TRAINING], ["distill", "--config", "out/layer_pruning.yaml"]),
        (["distill", "--config", "c.yaml"], ["run", "out/layer_pruning.yaml"]),
        (["prune", "model", *PRUNING], ["prune", "--config", "out/layer_pruning.yaml"]),
        (["phases", "model", *PRUNING], ["phases", "--config", "out/layer_pruning.yaml"]),
    ],
)
def test_a_model_keeps_the_settings_that_made_it(folder, words, again):
    values = {"model": folder, "data": "text.txt", "target_layers": 4, **SHORT}
    Path("c.yaml").write_text(yaml.safe_dump(values))
    assert main([*words, "--output_dir", "out", *TAIL.get(words[0], [])]) == 0
    saved = yaml.safe_load(Path("out/layer_pruning.yaml").read_text())
    assert (saved["model"], saved["target_layers"]) == ("model", 4)
    assert not {"output_dir", "resume", "config"} & {*saved}
    assert main([*again, "--output_dir", "again", *TAIL.get(again[0], [])]) == 0
    assert_equal("out", "again")
    assert Path("again/layer_pruning.yaml").read_text() == Path("out/layer_pruning.yaml").read_text()


def test_python_keeps_the_settings_too(folder):
    prune(folder, "text.txt", 4, output_dir="out", bf16=False, **SHORT)
    assert main(["run", "out/layer_pruning.yaml", "--output_dir", "again"]) == 0
    assert_equal("out", "again")


def test_other_commands_keep_their_settings(folder):
    words = [folder, "--data", "text.txt", "--sequence_length", "16", "--output_dir", "out"]
    assert main(["cache-teacher", *words, "--top_k", "4"]) == 0
    saved = yaml.safe_load(Path("out/layer_pruning.yaml").read_text())
    assert saved == {"model": "model", "data": ["text.txt"], "sequence_length": 16, "top_k": 4}


def test_a_file_cannot_allow_code_to_run(folder, capsys):
    values = {"model": folder, "data": "text.txt", "target_layers": 4, "trust_remote_code": True}
    Path("c.yaml").write_text(yaml.safe_dump(values | SHORT))
    for words in (["run", "c.yaml"], ["run", "--config", "c.yaml"], ["distill", "--config", "c.yaml"]):
        assert main([*words, "--output_dir", "out"]) == 2
        error = capsys.readouterr().err
        assert "c.yaml: trust_remote_code is true, but a file cannot allow" in error
        assert "give the flag `--trust_remote_code True`" in error
    with pytest.raises(LayerPruneError, match="a file cannot allow"):
        prune(recipe="c.yaml", output_dir="out")
    assert not Path("out").exists()
    # A flag can. The file beside the model does not repeat it.
    Path("c.yaml").write_text(yaml.safe_dump(values | SHORT | {"trust_remote_code": False}))
    assert main(["distill", "--config", "c.yaml", "--trust_remote_code", "True", "--output_dir", "out"]) == 0
    assert "trust_remote_code" not in Path("out/layer_pruning.yaml").read_text()


def test_settings_of_recipes_are_told_apart(folder, capsys):
    Path("c.yaml").write_text(yaml.safe_dump({"model": folder, "select": "block"}))
    assert main(["distill", "--config", "c.yaml"]) == 2
    assert "c.yaml: select is a setting of recipes. Use `hf-layerprune run c.yaml`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_measurements_take_a_config_file(folder, command, capsys):
    values = {"model": folder, "data": "text.txt", "sequence_length": 16}
    values |= {"criterion": "angular"} if command == "score" else {"max_sequences": 4}
    Path("c.yaml").write_text(yaml.safe_dump(values))
    assert main([command, "--config", "c.yaml"]) == 0
    by_file = capsys.readouterr().out
    flags = [word for name, value in values.items() if name != "model" for word in (f"--{name}", str(value))]
    assert main([command, folder, *flags]) == 0
    if command == "score":  # evaluate prints times
        assert capsys.readouterr().out == by_file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file: c.yaml"),
        ("sequence_lenght: 16", "c.yaml: there is no field 'sequence_lenght'. Did you mean sequence_length?"),
        ("sequence_length: long", "c.yaml: sequence_length is 'long', but must be a whole number"),
        ("criterion: luck", "c.yaml: criterion is 'luck'. Choose from"),
        ("[1, 2]", "c.yaml is no recipe: it must be lines of `field: value`"),
        ("a: [", "c.yaml is not plain YAML"),
        ("data: none.txt", "No such file: none.txt"),
    ],
)
def test_a_config_that_cannot_be_read_is_told(folder, capsys, text, message):
    if text is not None:
        Path("c.yaml").write_text(text)
    assert main(["score", folder, "--config", "c.yaml"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_these_flags(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--config FILE", "--save_config", "--quiet"))
    assert "SUPPRESS" not in out


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-layerprune {version('hf-layerprune')}\n"


def test_the_settings_name_no_precision_of_this_machine(folder, monkeypatch):
    monkeypatch.setattr(inputs, "precision_of_training", lambda given: {"bf16": True})
    words = ["distill", folder, "--data", "text.txt", "--target_layers", "4", *WORDS]
    assert main([*words, "--output_dir", "out"]) == 0
    assert read_record("out").training["bf16"] is True
    saved = yaml.safe_load(Path("out/layer_pruning.yaml").read_text())
    assert "bf16" not in saved
    assert saved["max_steps"] == 2
