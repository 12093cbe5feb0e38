"""The help of a command: one screen, in groups, with an example that runs."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hf_layerprune.commands.cli import COMMANDS, main
from hf_layerprune.commands.help import FLAG_WIDTH, GROUP_OF, GROUPS, SCREEN, TRAINER_HELP, WIDTH
from hf_layerprune.commands.studies import STUDIES
from hf_layerprune.recipes.recipe import shipped_recipes


def help_of(command, capsys, flag="--help"):
    with pytest.raises(SystemExit, match="0"):
        main([command, flag])
    return capsys.readouterr().out


def flags_in(text):
    return set(re.findall(r"(?:(?<=^  )|(?<= ))--\w+", text, re.M)) - {"--help_all"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command, capsys):
    text = help_of(command, capsys)
    lines = text.splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= WIDTH
    assert lines[-1].startswith("--help_all explains every flag")
    assert [line[:-1] for line in lines if line.endswith(":") and line[:-1] in GROUPS] == [
        group for group in GROUPS if f"\n{group}:\n" in text
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag_of_ours_and_explains_it_in_one_line(command, capsys):
    short, whole = help_of(command, capsys), help_of(command, capsys, "--help_all")
    ours = flags_in(whole.partition("\nTrainer:\n")[0].partition("\n\n")[2])
    assert ours <= flags_in(short)
    below = [line for line in short.splitlines() if line.startswith(" " * FLAG_WIDTH)]
    assert len(below) <= ("--criterion" in short)  # whose choices take a second line


@pytest.mark.parametrize("flag", ["--help_all", "--help-all"])
def test_help_all_has_the_flags_of_the_trainer(flag, capsys):
    text = help_of("distill", capsys, flag)
    trainer = text.partition("\nTrainer:\n")[2]
    assert {"--lr_scheduler_type", "--weight_decay", "--fsdp"} <= flags_in(trainer)
    assert "--kl_weight" not in trainer
    assert "It is a mean per token." in " ".join(text.split())
    assert "--weight_decay" not in help_of("distill", capsys)


def test_every_flag_has_one_group(capsys):
    names = [name for parts in GROUPS.values() for part in parts for name in part.split()]
    assert len(names) == len(set(names))
    known, trainer = set(), {one.name for one in dataclasses.fields(TrainingArguments)}
    for command in COMMANDS:
        whole = help_of(command, capsys, "--help_all")
        known |= {flag[2:] for flag in flags_in(whole)}
        assert {flag[2:] for flag in flags_in(whole.partition("\nTrainer:\n")[2])} <= trainer
    assert set(GROUP_OF) <= known
    assert set(TRAINER_HELP) <= {name for main_flags, _ in GROUPS.values() for name in main_flags.split()}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_the_help_can_be_run(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"example:\n((?:  .*\n)+)", help_of(command, capsys))[1]
    program, name, *words = shlex.split(example.replace("\\\n", ""))
    assert (program, name) == ("hf-layerprune", command)
    at = words.index("--") if "--" in words else len(words)
    cpu = ["--use_cpu"] * (command == "run")
    with pytest.raises(SystemExit, match="0"):  # it is checked, and not run
        main([name, *words[:at], *cpu, "--save_config", "c.yaml", *words[at:]])
    assert isinstance(yaml.safe_load(Path("c.yaml").read_text()), dict)


@pytest.mark.parametrize(
    ("command", "first", "names"), [("run", "RECIPE", shipped_recipes()), ("study", "NAME", STUDIES)]
)
def test_help_lists_what_the_first_argument_can_be(command, first, names, capsys):
    text = help_of(command, capsys)
    assert text.startswith(f"usage: hf-layerprune {command} {first} ")
    listed = " ".join(re.search(rf"^{first}: (.*?)\n\n", text, re.M | re.S)[1].split())
    assert ", ".join(names) in listed


@pytest.mark.parametrize(
    ("recipe", "default"), [("default", ["128"]), ("iterative-small", ["32"]), (None, [])]
)
def test_help_of_run_shows_the_defaults_of_the_recipe(recipe, default, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", *([recipe] if recipe else []), "--help"])
    line = next(x for x in capsys.readouterr().out.splitlines() if "--calibration_sequences N" in x)
    assert re.findall(r"\(default: (.*)\)", line) == default


@pytest.mark.parametrize(
    ("words", "flag", "shown"),
    [
        (["run", "iterative", "--help"], "learning_rate X", "Peak learning rate. (default: 0.0001)"),
        (["run", "default", "--help"], "learning_rate X", "Default: fits the weights (LoRA: 5e-5)."),
        (["distill", "--help_all"], "learning_rate X", "Default: fits the weights (LoRA: 5e-5)."),
        (
            ["run", "default", "--help_all"],
            "reconstruction_layers N",
            "before the other training. (default: 3)",
        ),
        (["distill", "--help_all"], "reconstruction_layers N", "Default: 0, none."),
    ],
)
def test_a_default_of_the_recipe_stands_for_that_in_the_text(words, flag, shown, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    _, text = capsys.readouterr().out.split(f"  --{flag} ", 1)
    text = text.split("\n  --", 1)[0]
    assert " ".join(text.split()).endswith(shown)
