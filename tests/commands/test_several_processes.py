"""Commands that torchrun starts in several processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_layerprune.commands.cli import main


TEXT = ["--data", "text.txt", "--sequence_length", "16"]


def launched(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return subprocess.run(
        [*command, "-m", "hf_layerprune", *words], capture_output=True, text=True, timeout=600
    )


def test_score_prints_and_writes_once_what_one_process_finds(folder, capsys):
    words = ["score", folder, *TEXT, "--calibration_sequences", "6"]
    done = launched(*words, "--json", "two.json", "--plot", "two.png")
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert main([*words, "--json", "one.json"]) == 0
    assert done.stdout == capsys.readouterr().out
    two, one = (json.loads(Path(f"{name}.json").read_text())["scores"] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)
    assert Path("two.png").is_file()


def test_evaluate_prints_and_writes_once_what_one_process_finds(folder, capsys):
    words = ["evaluate", folder, *TEXT, "--max_sequences", "6"]
    done = launched(*words, "--json", "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1
    capsys.readouterr()
    assert main([*words, "--json", "one.json"]) == 0
    two, one = (json.loads(Path(f"{name}.json").read_text())["models"][folder] for name in ("two", "one"))
    for name in ("perplexity", "tokens", "copying"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.parametrize("command", ["prune", "cache-teacher", "plan"])
def test_a_command_for_one_process_is_refused_in_several(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([command, "model"]) == 2
    assert f"{command} works in one process, but torchrun or accelerate started 4" in capsys.readouterr().err
