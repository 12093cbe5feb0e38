import json
from pathlib import Path

import pytest
import transformers.trainer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerPruneError, ScoreTable
from hf_layerprune.commands.cli import main
from hf_layerprune.pruning.prune import prune_layers
from hf_layerprune.reports import plots as report
from hf_layerprune.reports.card import write_card
from hf_layerprune.reports.plots import plot_phases, plot_record
from hf_layerprune.reports.record import RunRecord, read_record, write_record
from hf_layerprune.reports.tables import healing_tokens, markdown_table, table_rows

from ..conftest import logits, make_model, tokens
from ..distillation.test_trainer import make_trainer
from ..pruning.test_callback import calibration, pruning


class StubHub:
    """What the Trainer asks of the hub; keeps the files it is given."""

    def __init__(self):
        self.files = {}

    def create_repo(self, name, **kwargs):
        return type("Url", (), {"repo_id": f"someone/{name}"})()

    def upload_folder(self, repo_id, folder_path, ignore_patterns, **kwargs):
        assert ignore_patterns == ["_*", "checkpoint-*"]
        for path in Path(folder_path).glob("*.*"):
            self.files[path.name] = path.read_bytes()
        self.repo_id = repo_id


def test_push_to_hub_sends_a_plain_model_with_its_card(llama, tokenizer, tmp_path, monkeypatch):
    hub = StubHub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    llama.config._name_or_path = "someone/tiny-llama"
    scores = iter(range(20, 0, -1))
    trainer = make_trainer(
        llama,
        output_dir="tiny-llama-4-layers",
        max_steps=4,
        callbacks=[pruning(evaluation=lambda model: {"perplexity": float(next(scores))})],
    )
    trainer.processing_class = tokenizer
    trainer.train()
    trainer.push_to_hub(license="apache-2.0", tags=["mine"], dataset="someone/text")

    assert hub.repo_id == "someone/tiny-llama-4-layers"
    received = tmp_path / "received"
    received.mkdir()
    for name, content in hub.files.items():
        (received / name).write_bytes(content)
    again = AutoModelForCausalLM.from_pretrained(received)
    assert len(again.model.layers) == 4
    assert (logits(again, tokens()) == logits(llama, tokens())).all()

    card = ModelCard.load(received / "README.md")
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny-llama-4-layers")' in card.content
    data = card.data
    assert data.base_model == "someone/tiny-llama"
    assert data.license == "apache-2.0"
    assert data.datasets == "someone/text"
    assert data.library_name == "transformers"
    assert {"hf_layerprune", "knowledge-distillation", "mine"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 16.0)
    record = json.loads((received / "layer_pruning.json").read_text())
    removed = [phase["removals"][0]["original"] for phase in record["phases"]]
    assert f"Removed layers (original index): {removed[0]}, {removed[1]}." in card.content
    assert "4 of its 6 decoder layers" in card.content
    assert "https://arxiv.org/abs/2511.05085" in card.content
    assert "AutoModelForCausalLM.from_pretrained" in card.content
    for cell in ("20", "19", "18", "17", "16"):  # dense, cut, healed, cut, healed
        assert f" {cell} |" in card.content
    pictures = [name for name in hub.files if name.endswith(".png")]
    phases = [f"scores_phase_{i}_layer_{layer}.png" for i, layer in enumerate(removed, 1)]
    assert sorted(pictures) == sorted(["losses.png", "quality.png", "scores_all_phases.png", *phases])
    assert all(f"]({name})" in card.content for name in pictures)
    assert str(tmp_path) not in card.content + json.dumps(record)


def test_a_local_base_model_is_not_called_a_hub_id(llama, tmp_path):
    llama.config._name_or_path = str(tmp_path / "someone" / "mine")
    record = prune_layers(llama, target_layers=5, calibration=calibration()).to_dict()
    write_card(record, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert "\nmine with 5 of its 6" in card.content
    assert str(tmp_path) not in card.content + json.dumps(record)
    assert "not healed" in card.content
    assert "distillation" not in card.content


def test_without_pruning_the_card_is_the_trainers(llama):
    trainer = make_trainer(llama)
    trainer.train()
    trainer.create_model_card(license="mit")
    assert ModelCard.load("out/README.md").data.license == "mit"


def test_pruning_without_training_is_the_greedy_search(llama):
    from hf_layerprune import remove_layers, score_layers

    reference = make_model()
    order = []
    for _ in range(3):
        table = score_layers(reference, [{"input_ids": tokens(4, 12, seed=5)}], progress=False)
        least = min(table.scores, key=table.scores.get)
        order.append(table.kept[least])
        remove_layers(reference, least)
    record = prune_layers(llama, target_layers=3, calibration=calibration()).to_dict()
    assert [phase["removals"][0]["original"] for phase in record["phases"]] == order
    assert (logits(llama, tokens()) == logits(reference, tokens())).all()
    rows = table_rows(record)
    assert rows[0] == ["layers", "removed", "loss score", "parameters", "seconds"]
    assert [row[0] for row in rows[1:]] == ["6", "5", "4", "3"]
    lines = markdown_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_a_record_is_read_back_and_a_broken_one_refused(tmp_path):
    assert read_record(tmp_path) is None
    record = prune_layers(make_model(), target_layers=4, calibration=calibration())
    record.warnings, record.undone = ["Look at this."], record.phases.pop()
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    values = json.loads((tmp_path / "layer_pruning.json").read_text())
    assert values == record.to_dict()
    assert values["warnings"] == ["Look at this."]
    assert not {"signs", "recipe", "evaluation"} & set(values)
    for content in ("{", '{"format": 9}', "[]", '{"format": 1, "unknown": 1}'):
        (tmp_path / "layer_pruning.json").write_text(content)
        with pytest.raises(LayerPruneError, match="not a record of this version"):
            read_record(tmp_path)


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_record(RunRecord(), tmp_path)
    with pytest.raises(TypeError):
        write_record(RunRecord(training={"bad": object()}), tmp_path)
    assert read_record(tmp_path) == RunRecord()


def test_phases_are_drawn_as_a_heat_map(tmp_path):
    first = ScoreTable("loss", {1: 0.2, 2: 0.1, 3: 5.0}, -2.0, [0, 1, 2, 3, 4])
    second = ScoreTable("loss", {1: 0.3, 2: 5.5}, -2.1, [0, 1, 3, 4])
    plot_phases([first, second], tmp_path / "phases.png")
    assert (tmp_path / "phases.png").read_bytes()[:4] == b"\x89PNG"


def test_the_card_tells_what_the_run_saw(llama):
    record = prune_layers(llama, target_layers=5, calibration=calibration()).to_dict()
    for wrong in ({}, {"warnings": ["Layer 3 cost too much.", "Nothing came back."], "stopped": "It ended."}):
        write_card(record | wrong, Path())
        card = Path("README.md").read_text()
        assert ("- Layer 3 cost too much.\n\n- Nothing came back.\n" in card) == bool(wrong)
        assert ("It ended.\n" in card) == bool(wrong)


def test_a_card_says_what_was_measured(folder, capsys):
    """`evaluate`, then `card`: tasks in the hub's schema, and the table beside the dense model."""
    data = ["--data", "text.txt", "--sequence_length", "16"]
    flags = ["--target_layers", "4", "--output_dir", "cut", "--calibration_sequences", "4"]
    assert main(["prune", folder, *data, *flags]) == 0
    rows = [{"text": f"The dog barked {i} times, and then it barked"} for i in range(3)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = ["--tasks", "lambada_openai=rows.jsonl", "--json", "e.json", "--max_sequences", "4"]
    assert main(["evaluate", folder, "cut", *data, *tasks]) == 0
    table = capsys.readouterr().out.partition("|  ")[2].splitlines()[3]
    before = json.loads(Path("cut/layer_pruning.json").read_text())
    words = [
        "--base_model",
        "someone/tiny",
        "--license",
        "mit",
        "--datasets",
        "a/b",
        "--repository",
        "me/cut",
    ]
    assert main(["card", "cut", "--evaluation", "e.json", *words]) == 0
    card = ModelCard.load("cut/README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.license == "mit"
    assert card.data.datasets == ["a/b"]
    result = card.data.eval_results[-1]
    assert (result.dataset_type, result.dataset_config) == ("EleutherAI/lambada_openai", "default")
    assert (result.dataset_split, result.metric_name) == (
        None,
        "accuracy, zero-shot, 3 questions of rows.jsonl",
    )
    found = json.loads(Path("e.json").read_text())["models"]["cut"]
    assert result.metric_value == pytest.approx(found["tasks"]["lambada_openai"]["accuracy"], abs=1e-4)
    assert result.metric_type == "acc"
    assert table in card.content
    assert 'from_pretrained("me/cut")' in card.content
    after = read_record("cut").to_dict()
    found["tasks"]["lambada_openai"].pop("perplexities")
    assert after["evaluation"]["model"] == found
    assert {k: v for k, v in after.items() if k not in ("model", "evaluation")} == {
        k: v for k, v in before.items() if k != "model"
    }
    assert main(["card", "cut"]) == 0  # as it is, from the record alone
    assert ModelCard.load("cut/README.md").data.eval_results[-1].metric_value == result.metric_value


def test_a_card_of_what_is_no_run_is_refused(folder, capsys):
    assert main(["card", folder]) == 2
    assert "holds no layer_pruning.json" in capsys.readouterr().err
    write_record(RunRecord(), folder)
    Path("e.json").write_text('{"text": "t", "models": {"other": {}}}')
    assert main(["card", folder, "--evaluation", "e.json"]) == 2
    assert "e.json is of other alone, not of model" in capsys.readouterr().err
    Path("e.json").write_text("{}")
    assert main(["card", folder, "--evaluation", "e.json"]) == 2
    assert "e.json is not from evaluate --json" in capsys.readouterr().err


def test_every_part_of_the_loss_that_a_trainer_logs_is_drawn(llama, tmp_path, monkeypatch):
    trainer = make_trainer(llama, max_steps=2, hidden_weight=1.0, ce_weight=0.1, divergence="jsd")
    trainer.train()
    drawn = []
    monkeypatch.setattr(report, "plot_lines", lambda lines, *args: drawn.append(lines))
    plot_record({"dense": None, "phases": [], "log": trainer.state.log_history}, tmp_path)
    assert list(drawn[0]) == ["loss", "jsd", "ce", "hidden_mse"]


def test_quality_and_losses_are_drawn_where_they_are_known(llama, tmp_path):
    record = prune_layers(
        llama, target_layers=4, calibration=calibration(), evaluation=lambda model: {"perplexity": 9.0}
    ).to_dict()
    assert list(plot_record(record, tmp_path)) == ["quality.png"]
    record["log"] = [{"loss": "2.5", "kl": "2.0", "step": 1}, {"loss": "1.5", "kl": "1.0", "step": 2}]
    assert list(plot_record(record, tmp_path)) == ["quality.png", "losses.png"]
    write_card(record, tmp_path)
    card = (tmp_path / "README.md").read_text()
    for name in ("quality.png", "losses.png"):
        assert f"]({name})" in card
        assert (tmp_path / name).stat().st_size > 1000
    record |= {"dense": None, "log": []}
    assert plot_record(record, tmp_path) == {}


def test_a_card_tells_two_models_of_one_name_apart(folder, capsys):
    data = ["--data", "text.txt", "--sequence_length", "16"]
    flags = ["--target_layers", "4", "--output_dir", f"cut/{folder}", "--calibration_sequences", "4"]
    assert main(["prune", folder, *data, *flags]) == 0
    words = ["evaluate", folder, f"cut/{folder}", *data, "--max_sequences", "4", "--json", "e.json"]
    assert main(words) == 0
    assert main(["card", f"cut/{folder}", "--evaluation", "e.json"]) == 0
    measured = read_record(f"cut/{folder}").evaluation
    assert (measured["dense"]["layers"], measured["model"]["layers"]) == (6, 4)
    lines = Path("cut", folder, "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert ["layers", "6", "4"] in rows
    flags = ["--target_layers", "3", "--output_dir", f"more/{folder}", "--calibration_sequences", "4"]
    assert main(["prune", folder, *data, *flags]) == 0
    words.insert(3, f"more/{folder}")
    assert main(words) == 0
    for place, layers in (("cut", 4), ("more", 3)):
        assert main(["card", f"{place}/{folder}", "--evaluation", "e.json"]) == 0
        assert read_record(f"{place}/{folder}").evaluation["model"]["layers"] == layers


def test_an_evaluation_that_was_stopped_is_refused(folder, capsys):
    write_record(RunRecord(), folder)
    model = {"layers": 1, "tasks": {}}
    Path("e.json").write_text(json.dumps({"text": "t", "models": {"dense": model, folder: model}}))
    assert main(["card", folder, "--evaluation", "e.json"]) == 2
    assert "e.json was not finished" in capsys.readouterr().err


def test_healing_tokens_are_of_the_steps_that_were_taken():
    recipe = {"sequence_length": 16, "per_device_train_batch_size": 2}
    by_epochs = {"recipe": recipe, "training": {"max_steps": -1}, "log": [{"step": 5}, {"step": 7}]}
    assert healing_tokens(by_epochs) == 7 * 32
    assert healing_tokens(by_epochs | {"training": {"max_steps": 0}, "log": []}) == 0
