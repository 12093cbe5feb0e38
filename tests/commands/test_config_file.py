"""Flags in a YAML file."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hf_layerprune.commands.cli import COMMANDS, main


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
