import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_layerprune import (
    LayerPruneError,
    evaluate_text,
    get_lineage,
    reconstruct_layers,
    remove_layers,
    replace_by_linear_map,
    score_layers,
)
from hf_layerprune.commands import study_setting
from hf_layerprune.commands.cli import main
from hf_layerprune.commands.studies import STUDIES, run_study
from hf_layerprune.commands.study_setting import StudyArguments
from hf_layerprune.data.batches import make_batches
from hf_layerprune.data.sequences import split_sequences, token_sequences
from hf_layerprune.data.texts import load_texts
from hf_layerprune.scoring.journal import Journal
from hf_layerprune.scoring.score import rank_correlation
from hf_layerprune.scoring.table import ScoreTable

from ..conftest import make_model


TEXT = "\n".join(f"Line {i} of a text that says little about the number {i * i}." for i in range(120))


@pytest.fixture
def arguments(tokenizer):
    make_model().save_pretrained("model")
    make_model(seed=1).save_pretrained("other")
    for folder in ("model", "other"):
        tokenizer.save_pretrained(folder)
    Path("text.txt").write_text(TEXT)
    Path("more.txt").write_text(TEXT[::-1])
    given = {"models": ["model"], "data": ["text.txt"], "sequence_length": 32, "quick": True, "tokens": 512}
    return given | {"learning_rate": 3e-4}


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_ends_in_a_table_and_a_plot_and_goes_on_where_it_was(name, arguments, monkeypatch):
    """Stopped after its first cell, a study computes only the others, and ends as if it had not been."""
    arguments |= {"models": ["model", "other"]} if name == "middle" else {}
    whole = run_study(name, StudyArguments(**arguments, output_dir="whole"))
    computed, once = [], Journal.once

    def stop(journal, compute):
        if journal._path is not None and journal._path.name == "cells.jsonl":
            if len(computed) == 1:
                raise KeyboardInterrupt
            computed.append(journal)
        return once(journal, compute)

    monkeypatch.setattr(Journal, "once", stop)
    with pytest.raises(KeyboardInterrupt):
        run_study(name, StudyArguments(**arguments, output_dir="parts"))
    monkeypatch.setattr(Journal, "once", once)
    first = Path("parts/cells.jsonl").read_text().splitlines()
    assert len(first) == 2  # the head and one cell
    again = run_study(name, StudyArguments(**arguments, output_dir="parts"))
    assert Path("parts/cells.jsonl").read_text().splitlines()[:2] == first
    assert plain(again) == plain(whole)
    for file in ("study.json", "table.md", "plot.png"):
        assert Path("whole", file).stat().st_size > 100
    saved = json.loads(Path("whole/study.json").read_text())
    assert saved["rows"] == json.loads(json.dumps(whole))
    assert saved["question"] == STUDIES[name].__doc__
    assert saved["settings"]["models"][0] == "model"
    assert saved["versions"]["torch"] == torch.__version__


def plain(rows):
    """Rows without what no two runs share."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def parts(tokenizer):
    return split_sequences(token_sequences(load_texts("text.txt"), tokenizer, 32), 4, 8)


def test_the_baseline_is_the_loss_without_the_layers_it_names(arguments, tokenizer):
    rows = run_study("baseline", StudyArguments(**arguments))
    heldout = make_batches(parts(tokenizer)[1], 4)
    assert rows[0]["loss"] == pytest.approx(evaluate_text(make_model(), heldout)["loss"])
    checked = 0
    for row in rows[1:]:
        if "linear map" in row["way"]:
            continue
        model = make_model()
        remove_layers(model, row["layers gone"])
        assert len(row["layers gone"]) == row["removed"]
        assert row["loss"] == pytest.approx(evaluate_text(model, heldout)["loss"], rel=1e-5)
        checked += 1
    assert checked == 8


def test_each_loss_heals_in_its_own_way(arguments, tokenizer):
    """Text alone as a plain Trainer heals on it, the others otherwise."""
    rows = run_study("losses", StudyArguments(**arguments))
    assert len({row["healed"] for row in rows}) == len(rows)
    (alone,) = [row for row in rows if row["losses"] == "text alone"]
    model, (_, heldout, train) = make_model(), parts(tokenizer)
    remove_layers(model, alone["layers gone"])
    heldout = make_batches(heldout, 4)
    assert alone["cut"] == pytest.approx(evaluate_text(model, heldout)["loss"])
    args = TrainingArguments(
        "out",
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        seed=0,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    Trainer(model, args, train_dataset=train, data_collator=default_data_collator).train()
    assert alone["healed"] == pytest.approx(evaluate_text(model, heldout)["loss"], abs=0.005)  # bfloat16
    assert alone["healed"] < alone["cut"] - 0.05


def test_a_schedule_for_each_phase_is_another_run(arguments):
    rows = run_study("iterative", StudyArguments(**arguments))
    assert len({round(row["healed"], 6) for row in rows}) == len(rows)
    assert [len(row["layers gone"]) for row in rows] == [2] * len(rows)


def test_a_row_of_reconstruction_is_that_of_the_library(arguments, tokenizer):
    """The linear map, then the layers on the first tokens of the shuffled text, then distillation."""
    first, *rows = run_study("reconstruction", StudyArguments(**arguments))
    assert first["reconstruction"] == "none"
    assert "KL reconstructed" not in first
    settings = [(row["layers"], row["epochs"], row["tokens"]) for row in rows]
    assert settings[0] == (1, 4, 512)
    assert len({*settings}) == len(settings) == 9
    some, _, train = parts(tokenizer)
    for row in (rows[0], rows[-2]):
        model, calibration = make_model(), make_batches(some, 4)
        table = score_layers(model, calibration, "block_influence", block_size=2, progress=False)
        replace_by_linear_map(model, table.ranking()[0], 2, calibration)
        read = make_batches(train.shuffle(seed=0).select(range(max(1, row["tokens"] // 32))), 4)
        sides = dict.fromkeys(("layers_before", "layers_after"), row["layers"])
        settings = {"epochs": row["epochs"], "autocast": torch.bfloat16, "progress": False}
        result = reconstruct_layers(model, make_model(), read, **sides, **settings)
        assert row["KL cut"] == pytest.approx(result.kl_before, rel=1e-4)
        assert row["KL reconstructed"] == pytest.approx(result.kl_after, rel=1e-3)


def test_models_without_a_linear_map_are_cut_without_it(arguments, tokenizer):
    make_model("gemma3_text").save_pretrained("gemma")
    tokenizer.save_pretrained("gemma")
    setting = study_setting.Setting("baseline", StudyArguments(**arguments | {"models": ["gemma"]}))
    model, found = setting.cut_block(2)
    assert get_lineage(model).removed == found["layers gone"]


def test_calibration_correlates_the_tables_of_two_texts(arguments, tokenizer):
    rows = run_study("calibration", StudyArguments(**arguments | {"data": ["text.txt", "more.txt"]}))
    tables = []
    for name in ("text.txt", "more.txt"):
        blocks = token_sequences(load_texts(name), tokenizer, 32).select(range(4))
        tables.append(score_layers(make_model(), make_batches(blocks, 4), "loss", progress=False))
    assert rows[0]["rank correlation"] == pytest.approx(rank_correlation(*tables))
    assert rows[0]["texts"] == "text.txt / more.txt"
    assert len(rows) == 2


def test_the_middle_is_ranked_by_thirds(arguments, tokenizer):
    rows = run_study("middle", StudyArguments(**arguments | {"models": ["model", "other"]}))
    assert [row["model"] for row in rows] == ["model", "other"]
    batches = make_batches(parts(tokenizer)[0], 4)
    for seed, row in enumerate(rows):
        expected = score_layers(make_model(seed=seed), batches, protected=[], progress=False).scores
        assert dict(enumerate(row["scores"])) == pytest.approx(expected)
        order = sorted(range(6), key=lambda layer: row["scores"][layer])
        assert row["least important"] == order[:1]
        for third, name in enumerate(("first third", "middle third", "last third")):
            ranks = [order.index(layer) / 5 for layer in (2 * third, 2 * third + 1)]
            assert row[name] == pytest.approx(sum(ranks) / 2, abs=1e-3)


def operations(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_what_was_reckoned_on_paper_is_what_is_counted(arguments):
    """The operations of the dense model, not counted by the study, by its formula and by the counter."""
    rows = {row["model"]: row for row in run_study("scale", StudyArguments(**arguments))}
    setting = study_setting.Setting("scale", StudyArguments(**arguments, output_dir="counted"))
    ids = setting.calibration[0]["input_ids"][:1]
    full = operations(lambda: setting.dense(input_ids=ids)) / 32 / 1e9
    assert rows["llama"]["reading, GFLOP a token"] == pytest.approx(full, rel=0.05)
    often = [{"input_ids": ids}] * 20  # so that what is done once is little of it
    scoring = operations(lambda: score_layers(setting.dense, often, progress=False)) / 640 / 1e9
    assert rows["llama"]["scoring all layers, GFLOP a token"] == pytest.approx(scoring, rel=0.1)
    for name in ("llama", "7B", "70B"):  # the teacher reads, the student reads, and backward is twice that
        times = rows[name]["distilling, GFLOP a token"] / rows[name]["reading, GFLOP a token"]
        assert times == pytest.approx(4, rel=0.1), name
    assert rows["7B"]["parameters, millions"] == pytest.approx(6738.4, abs=1)
    assert rows["70B"]["parameters, millions"] == pytest.approx(68976.6, abs=10)
    assert 12 < rows["7B"]["reading, GFLOP a token"] < 22  # twice its parameters, and attention (much here)


def test_mistakes_are_said(arguments, capsys):
    with pytest.raises(LayerPruneError, match="remove is 4, but the model has 6 layers"):
        run_study("losses", StudyArguments(**arguments, remove=4))
    with pytest.raises(LayerPruneError, match="remove is 0, but the model has 6 layers"):
        run_study("losses", StudyArguments(**arguments, remove=0))
    Path("short.txt").write_text("Too little of it. " * 5)
    with pytest.raises(
        LayerPruneError, match=r"short\.txt makes 2 sequences, but calibration_sequences is 4"
    ):
        run_study("calibration", StudyArguments(**arguments | {"data": ["text.txt", "short.txt"]}))
    with pytest.raises(LayerPruneError, match=r"Did you mean losses\? Choose from baseline, losses"):
        run_study("loses", StudyArguments(**arguments))
    assert main(["study"]) == 2
    assert "NAME is missing. Choose from baseline, losses" in capsys.readouterr().err
    assert (
        main(
            [
                "study",
                "middle",
                "--models",
                "model",
                "--data",
                "text.txt",
                "--quick",
                "--sequence_length",
                "32",
            ]
        )
        == 0
    )
    assert "| middle third |" in capsys.readouterr().out
    assert Path("study-middle/plot.png").is_file()


def test_quick_changes_only_what_was_not_given():
    quick = StudyArguments(quick=True, tokens=99)
    assert (quick.tokens, quick.remove, quick.calibration_sequences) == (99, 2, 4)
    assert StudyArguments(quick=True, tokens=262_144).tokens == StudyArguments().tokens == 262_144


def test_a_study_measures_on_the_text_it_is_given_and_starts_afresh_with_another(
    arguments, tokenizer, caplog
):
    rows = run_study("baseline", StudyArguments(**arguments, heldout="more.txt", output_dir="found"))
    other = make_batches(token_sequences(load_texts("more.txt"), tokenizer, 32).select(range(8)), 4)
    assert rows[0]["loss"] == pytest.approx(evaluate_text(make_model(), other)["loss"])
    Path("more.txt").write_text(TEXT[::-1].upper())
    again = run_study("baseline", StudyArguments(**arguments, heldout="more.txt", output_dir="found"))
    assert again[0]["loss"] != rows[0]["loss"]
    assert caplog.text.count("starts afresh") == 1
    Path("text.txt").write_text(TEXT.upper())
    run_study("baseline", StudyArguments(**arguments, heldout="more.txt", output_dir="found"))
    assert caplog.text.count("starts afresh") == 2


def test_texts_of_one_name_are_told_apart(arguments):
    Path("a").mkdir()
    Path("a/text.txt").write_text(TEXT[::-1])
    rows = run_study("calibration", StudyArguments(**arguments | {"data": ["text.txt", "a/text.txt"]}))
    assert [row["texts"] for row in rows] == ["text.txt / a/text.txt"] * 2


def test_a_text_in_thirds_is_compared_with_itself(arguments):
    rows = run_study("calibration", StudyArguments(**arguments))
    assert len(rows) == 6
    assert rows[0]["texts"] == "text.txt, part 1 / text.txt, part 2"
    assert all(-1 <= row["rank correlation"] <= 1 for row in rows)
    assert torch.is_grad_enabled()


def test_tables_go_through_the_journal_unchanged():
    table = ScoreTable("loss", {1: 0.5, 2: 0.25}, -1.0, [0, 1, 2, 3])
    assert ScoreTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_a_way_that_a_model_does_not_take_is_left_out(arguments, monkeypatch):
    def refuse(*args):
        raise LayerPruneError("no linear map")

    monkeypatch.setattr(study_setting, "replace_by_linear_map", refuse)
    for name in ("baseline", "iterative"):
        rows = run_study(name, StudyArguments(**arguments, output_dir=name))
        assert rows[-1]["not possible"] == "no linear map"
        assert "no linear map" in Path(name, "table.md").read_text()
        assert Path(name, "plot.png").stat().st_size > 1000


def test_blocks_longer_than_the_model_reads_are_refused(arguments):
    with pytest.raises(LayerPruneError, match="sequence_length is 65, but the model reads 64"):
        run_study("losses", StudyArguments(**arguments | {"sequence_length": 65}))
    with pytest.raises(LayerPruneError, match="batch_size is 0"):
        StudyArguments(batch_size=0)
