"""A removal is seen where the Trainer prints, without a logger being set up."""

import ast
import logging
import subprocess
import sys

import pytest
import transformers.trainer
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_layerprune.commands.cli import main
from hf_layerprune.pruning import other_callbacks
from hf_layerprune.reports.record import read_record

from ..conftest import make_model
from ..distillation.test_trainer import make_trainer
from ..pruning.test_callback import plain_trainer, pruning


@pytest.fixture
def printed(monkeypatch, capsys):
    """What the Trainer printed, each log as the dict that it shows, and each row of the table of removals as
    the dict of its cells."""
    written = []
    monkeypatch.setattr(tqdm, "write", classmethod(lambda cls, s, *args, **kwargs: written.append(s)))

    def lines():
        out = written + capsys.readouterr().out.splitlines()
        heads, *rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in out if line[:1] == "|"
        ] or [[]]
        table = [dict(zip(heads, row, strict=True)) for row in rows]
        return [ast.literal_eval(line) for line in out if line.startswith("{")] + table

    return lines


@pytest.mark.parametrize("kind", ["plain", "distillation"])
@pytest.mark.parametrize("bar", [True, False])
@pytest.mark.parametrize("late", [False, True])
def test_each_removal_prints_one_line(kind, bar, late, printed):
    callback = pruning()
    settings = {"max_steps": 4, "disable_tqdm": not bar}
    if kind == "plain":
        trainer = plain_trainer(make_model(), [] if late else callback, **settings)
    else:
        trainer = make_trainer(make_model(), callbacks=[] if late else [callback], **settings)
    if late:
        trainer.add_callback(callback)
    if kind == "plain":
        callback.set_trainer(trainer)
    trainer.train()
    lines = printed()
    *removals, last = [line for line in lines if "removed" in line]
    phases = read_record("out").phases
    assert [int(line["removed"]) for line in removals] == [p.removals[0].original for p in phases]
    assert [line["layers"] for line in removals] == ["5", "4"]
    assert [int(line["step"]) for line in removals] == [phase.step for phase in phases]
    assert [float(line["loss score"]) for line in removals] == [
        pytest.approx(phase.removals[0].score, rel=1e-3) for phase in phases
    ]
    losses = [line for line in lines if "loss" in line]
    healed = [float(losses[i]["loss"]) for i in (1, 3)]
    assert [float(line["training loss"] or 0) for line in (*removals, last)] == pytest.approx(
        [0, *healed], rel=1e-3
    )
    assert (last["layers"], last["removed"], last["step"]) == ("4", "", "4")
    assert [line["layers"] for line in losses] == [5, 5, 4, 4]
    assert not any("tokens" in name for line in losses for name in line)  # counted for the record alone
    assert trainer.state.log_history[0]["layers"] == 5


def test_a_notebook_prints_the_line_beside_its_table(printed, monkeypatch):
    class Table(TrainerCallback):
        """As the one of notebooks, which shows losses only."""

    monkeypatch.setattr(other_callbacks, "DEFAULT_PROGRESS_CALLBACK", Table)
    trainer = plain_trainer(make_model(), pruning(), max_steps=4)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Table())
    trainer.train()
    assert [line["layers"] for line in printed()] == ["5", "4", "4"]


def test_without_any_output_of_the_trainer_the_log_has_the_line(caplog, printed):
    trainer = plain_trainer(make_model(), pruning(), max_steps=4)
    trainer.remove_callback(PrinterCallback)
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        trainer.train()
    assert printed() == []
    rows = [line for line in caplog.text.splitlines() if line.endswith("|")]
    assert len(rows) == 4  # headings, two removals, and the end
    assert "removed | loss score |" in rows[0]


def test_other_callbacks_keep_their_order():
    class Other(TrainerCallback):
        called = 0

        def on_train_begin(self, *args, **kwargs):
            self.called += 1

    others, late = [type(name, (Other,), {})() for name in "ABC"], pruning()
    trainer = plain_trainer(make_model(), others[:2], max_steps=4, disable_tqdm=False)
    trainer.add_callback(late)
    late.set_trainer(trainer)
    trainer.add_callback(others[2])
    trainer.train()
    names = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    assert names[-5:] == ["A", "B", "LayerPruningCallback", ProgressCallback.__name__, "C"]
    assert [one.called for one in others] == [1, 1, 1]


def test_quiet_prints_results_alone(folder):
    words = ["distill", folder, "--data", "text.txt", "--sequence_length", "16", "--target_layers", "5"]
    words += [
        "--calibration_sequences",
        "4",
        "--heldout_sequences",
        "4",
        "--max_steps",
        "2",
        "--use_cpu",
        "True",
    ]
    words += ["--report_to", "none", "--logging_steps", "1", "--save_strategy", "no"]
    shown = {}
    for name, flags in {"loud": [], "quiet": ["--quiet"]}.items():
        command = [sys.executable, "-m", "hf_layerprune", *words, *flags, "--output_dir", name]
        shown[name] = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "training loss" in shown["loud"].stdout
    assert "{'loss'" in shown["loud"].stdout
    assert "it/s" in shown["loud"].stderr
    lines = [line for line in shown["quiet"].stdout.splitlines() if line]
    assert all(line.startswith("|") for line in lines[:-1])
    assert lines[-1] == "Saved in quiet."
    assert len(lines) == 5  # headings, rule, two depths
    assert "training loss" not in lines[0]
    assert "it/s" not in shown["quiet"].stderr
    assert "Teacher:" in shown["loud"].stderr
    assert "Teacher:" not in shown["quiet"].stderr


def test_quiet_lasts_for_one_command(folder, capsys):
    package, before = logging.getLogger("hf_layerprune"), transformers_logging.get_verbosity()
    level = package.level
    assert main(["inspect", folder, "--quiet"]) == 0
    assert (package.level, transformers_logging.get_verbosity()) == (level, before)
    assert transformers.trainer.DEFAULT_PROGRESS_CALLBACK is ProgressCallback
    assert transformers.trainer.PrinterCallback is PrinterCallback
