"""What a card shows of a run: each number, column and sentence where there is something to show."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import IntervalStrategy

from hf_layerprune import evaluate_text
from hf_layerprune.commands.cli import main
from hf_layerprune.evaluation.comparison import agreement, compare_models, task_scores
from hf_layerprune.evaluation.evaluate import HeldOutText
from hf_layerprune.pruning.prune import prune_layers
from hf_layerprune.reports import plots
from hf_layerprune.reports.card import write_card
from hf_layerprune.reports.plots import removal_marks
from hf_layerprune.reports.record import read_record
from hf_layerprune.reports.tables import evaluation_rows, healing_tokens, table_rows, text_rows
from hf_layerprune.reports.texts import describe_text
from hf_layerprune.scoring.table import ScoreTable

from ..conftest import make_model, tokens
from ..distillation.test_trainer import examples, make_trainer
from ..pruning.test_callback import calibration, plain_trainer, pruning


DATA = ["--data", "text.txt", "--sequence_length", "16"]
SMALL = ["--calibration_sequences", "4", "--heldout_sequences", "3"]
TRAIN = ["--max_steps", "4", "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no"]
TRAIN += ["--per_device_train_batch_size", "2", "--disable_tqdm", "True"]


def sections(folder):
    """The tables of a card, by the heading above."""
    found, heading = {}, None
    for line in Path(folder, "README.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        if line.startswith("| "):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def evaluate_at(trainer, steps, data):
    trainer.eval_dataset, trainer.args.eval_steps = data, steps
    trainer.args.eval_strategy = IntervalStrategy.STEPS


@pytest.mark.parametrize("kind", ["plain", "distillation"])
def test_a_card_shows_what_the_trainer_evaluated(kind, tmp_path):
    callback = pruning()
    if kind == "plain":
        trainer = plain_trainer(make_model(), callback)
    else:
        trainer = make_trainer(make_model(), max_steps=6, callbacks=[callback])
    evaluate_at(trainer, 1, examples(4))
    dense = trainer.evaluate()["eval_loss"]
    trainer.train()
    healed = {}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"]:
            healed[5 if entry["step"] <= 3 else 4] = entry["eval_loss"]
    write_card(read_record("out").to_dict(), Path("out"))
    heads, *rows = sections("out")["Removals"]
    assert "after" not in " ".join(heads)
    column = [row[heads.index("eval_loss")] for row in rows]
    assert column == [f"{value:.4g}" for value in (dense, healed[5], healed[4])]
    assert ("eval_kl" in heads) == (kind == "distillation")  # and eval_ce is eval_loss once more
    assert not {"eval_ce", "eval_runtime", "epoch", "tokens/s"} & set(heads)
    card = ModelCard.load("out/README.md")
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", pytest.approx(healed[4], abs=1e-4))
    assert '"After removal" is measured' not in card.content
    assert "](quality.png)" in card.content


def test_evaluations_of_several_data_sets_stand_side_by_side():
    trainer = plain_trainer(make_model(), pruning())
    evaluate_at(trainer, 3, {"one": examples(4), "two": calibration().remove_columns("text")})
    trainer.train()
    record = read_record("out").to_dict()
    assert {"eval_one_loss", "eval_two_loss"} <= set(table_rows(record)[0])
    assert [row[0] for row in text_rows(record)[1:]][-2:] == ["evaluation (one)", "evaluation (two)"]


def test_a_card_names_the_texts_and_counts_their_tokens(folder):
    words = ["--target_layers", "4", "--output_dir", "healed", *DATA, *SMALL, *TRAIN]
    assert main(["distill", folder, *words]) == 0
    assert sections("healed")["Text"] == [
        ["", "text", "sequences", "tokens"],
        ["calibration", "text.txt", "4", "64"],
        ["healing", "text.txt", "", "128"],
        ["evaluation", "text.txt", "3", "48"],
    ]
    assert "num_input_tokens" not in str(read_record("healed").training)
    assert main(["prune", folder, *DATA, *SMALL, "--target_layers", "4", "--output_dir", "cut"]) == 0
    assert [row[0] for row in sections("cut")["Text"]] == ["", "calibration", "evaluation"]
    assert sections("cut")["Removals"][0] == [
        "layers",
        "removed",
        "loss score",
        "perplexity",
        "parameters",
        "tokens/s",
        "seconds",
    ]
    card = Path("cut/README.md").read_text()
    for absent in ('"After removal" is measured', "Perplexity on the training distribution", "Training:"):
        assert absent not in card
        assert absent in Path("healed/README.md").read_text()


@pytest.mark.parametrize("recipe", ["default", "iterative-small"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_recipe_counts_the_tokens_of_its_healing(folder, recipe, stream):
    words = ["--keep", "4", "--output_dir", "out", *DATA, *SMALL, *TRAIN, "--model", folder]
    words += ["--gradient_accumulation_steps", "1", "--streaming", str(stream)]
    words += ["--steps_per_phase", "2"] if recipe == "iterative-small" else []
    assert main(["run", recipe, *words]) == 0
    record = read_record("out").to_dict()
    assert record["texts"]["healing"] == {"name": "text.txt", "tokens": 128}
    assert healing_tokens(record) == 128


def test_phases_of_a_command_name_their_texts(folder):
    copy_model = "import shutil, sys; shutil.copytree(*sys.argv[1:])"
    words = ["--target_layers", "5", "--output_dir", "out", *DATA, *SMALL, "--"]
    assert main(["phases", folder, *words, "python", "-c", copy_model, "{model}", "{output_dir}"]) == 0
    assert sections("out")["Text"][1:] == [
        ["calibration", "text.txt", "4", "64"],
        ["evaluation", "text.txt", "3", "48"],
    ]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # trl sets it
def test_supervised_fine_tuning_counts_its_tokens(folder):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = Dataset.from_dict({"text": ["A dog barks.", "A longer line of text says more."] * 8})
    settings = {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none"}
    args = SFTConfig(**settings, max_length=64, use_cpu=True, bf16=False, save_strategy="no")
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    seen = []
    collate = trainer.data_collator

    def count(batch):
        batch = collate(batch)
        seen.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = count
    callback = pruning(calibration=trainer.train_dataset.select(range(2)), target_layers=5)
    trainer.add_callback(callback)
    trainer.train()
    record = read_record("out").to_dict()
    assert 0 < record["texts"]["healing"]["tokens"] <= sum(seen)
    assert sum(seen[:2]) == record["texts"]["healing"]["tokens"]
    assert record["texts"]["calibration"]["tokens"] > 0


def test_a_name_is_that_of_the_data_set_and_not_of_its_format():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[1, 1, 0], [1, 1]]})
    assert describe_text(rows) == {"name": None, "sequences": 2, "tokens": 4}
    rows.info.dataset_name = rows.info.builder_name = "json"
    assert describe_text(rows)["name"] is None
    rows.info.dataset_name, rows.info.config_name = "wikitext", "wikitext-2"
    assert describe_text(rows.select([0])) == {"name": "wikitext, wikitext-2", "sequences": 1, "tokens": 2}
    assert describe_text(torch.utils.data.DataLoader(rows))["name"] == "wikitext, wikitext-2"


def test_data_without_input_ids_is_not_counted():
    """As for GRPO, where the Trainer would warn at every step."""
    callback = pruning()
    trainer = plain_trainer(make_model(), callback, max_steps=2)
    trainer.train_dataset = [{"inputs": [1, 2, 3]}] * 8
    trainer.data_collator = lambda rows: {"input_ids": tokens(4, 12), "labels": tokens(4, 12)}
    trainer.args.remove_unused_columns = False
    trainer.train()
    assert trainer.args.include_num_input_tokens_seen == "no"
    assert "tokens" not in callback.record.texts["healing"]


def test_a_stream_of_torch_is_not_looked_into():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(8).to_list())

    callback = pruning(evaluation=lambda model: {"loss": 1.0, "tokens": 7})
    trainer = plain_trainer(make_model(), callback, max_steps=2)
    trainer.train_dataset = Stream()
    trainer.train()
    assert text_rows(callback.record.to_dict()) == [
        ["", "sequences", "tokens"],
        ["calibration", "4", "48"],
        ["evaluation", "", "7"],
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_speed_is_noted_with_its_precision(precision):
    model = make_model().to(getattr(torch, precision))
    batches = [{"input_ids": tokens(2, 12)}]
    assert evaluate_text(model, batches)["precision"] == precision
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate_text(model, batches)["precision"] == "bfloat16"
    assert not model.lm_head._forward_hooks


def test_training_in_mixed_precision_is_seen_in_the_speeds():
    callback = pruning(evaluation=HeldOutText(calibration()))
    make_trainer(make_model(), max_steps=2, bf16=True, callbacks=[callback]).train()
    measured = [
        callback.record.to_dict()["dense"],
        *(phase["healed"] for phase in callback.record.to_dict()["phases"]),
    ]
    assert {found["precision"] for found in measured} == {"bfloat16"}
    assert "tokens/s" in table_rows(callback.record.to_dict())[0]


def test_speeds_of_two_precisions_are_not_put_side_by_side():
    record = prune_layers(
        make_model(), target_layers=4, calibration=calibration(), evaluation=HeldOutText(calibration())
    ).to_dict()
    assert "tokens/s" in table_rows(record)[0]
    mixed = copy.deepcopy(record)
    mixed["phases"][-1]["healed"] = mixed["phases"][-1]["cut"] | {"precision": "bfloat16"}
    assert "tokens/s" not in table_rows(mixed)[0]
    for found in [mixed["dense"], *(phase[name] for phase in mixed["phases"] for name in ("cut", "healed"))]:
        (found or {}).pop("precision", None)  # a record of an earlier version
    assert "tokens/s" not in table_rows(mixed)[0]
    mixed["phases"][-1]["healed"] = None
    assert "tokens/s" in table_rows(mixed)[0]
    sides = {"dense": {"layers": 6, "parameters": 1, "weights_mb": 1, "dtype": "bfloat16"}}
    sides["dense"] |= {"tokens_per_second": 10.0, "generated_per_second": 1.0}
    sides["cut"] = sides["dense"] | {"dtype": "float32"}
    heads = [row[0] for row in evaluation_rows(sides)]
    assert "precision" in heads
    assert "prefill tokens/s" not in heads
    assert "prefill tokens/s" in [row[0] for row in evaluation_rows({"dense": sides["dense"]})]


def with_perplexities(right, spread):
    scores = task_scores({"piqa": right}, {"piqa": 0.5})
    scores["tasks"]["piqa"]["perplexities"] = [[1.0, 1.0 + 2 * spread * i] for i in range(len(right))]
    return {"layers": 6, "parameters": 1, "weights_mb": 1.0, **scores}


@pytest.mark.parametrize(("spread", "steady"), [(0.0, True), (0.01, True), (0.03, True), (0.1, False)])
def test_stability_is_shown_where_many_questions_decide(spread, steady, tmp_path):
    original, pruned = [True] * 80 + [False] * 20, [True] * 50 + [False] * 50
    results = {name: with_perplexities(right, spread) for name, right in (("a", original), ("b", pruned))}
    compare_models(results)
    task = results["b"]["tasks"]["piqa"]
    assert task["agreement"]["share"] == pytest.approx(0.7)
    assert task["agreement"] == agreement("1" * 80 + "0" * 20, "1" * 50 + "0" * 50)
    assert (task["stability"]["effective_questions"] >= 30) == steady
    assert task["stability"]["effective_questions"] == pytest.approx(100) or spread
    rows = {row[0]: row[1:] for row in evaluation_rows(results)}
    assert rows["agreement, piqa"] == ["", "0.700 ± 0.046"]
    assert ("stability, piqa" in rows) == steady
    record = prune_layers(make_model(), target_layers=5, calibration=calibration()).to_dict()
    record["evaluation"] = {"text": "t.txt", "dense": results["a"], "model": results["b"]}
    before = json.dumps(record)
    write_card(record, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert json.dumps(record) == before
    assert "Agreement is the share" in card
    assert ("effective questions" in card) == steady
    for absent in ("Perplexity and copy accuracy", "Copied without error"):
        assert absent not in card


def test_agreement_is_shown_of_evaluations_of_an_earlier_version(tmp_path):
    """Which kept no perplexities, nor what the stability is made of."""
    results = {name: with_perplexities([True] * 40, 1.0) for name in "ab"}
    compare_models(results)
    for found in results.values():
        for name in ("perplexities", "agreement"):
            found["tasks"]["piqa"].pop(name)
        found["tasks"]["piqa"]["stability"].pop("effective_questions")
    record = prune_layers(make_model(), target_layers=5, calibration=calibration()).to_dict()
    record["evaluation"] = {"text": "t.txt", "dense": results["a"], "model": results["b"]}
    write_card(record, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "agreement, piqa" in card
    assert "stability" not in card.lower()


def test_losses_are_marked_where_layers_went(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    places = []
    monkeypatch.setattr(Axes, "axvline", lambda axes, place, **kwargs: places.append(place))
    callback = pruning(target_layers=3, layers_per_phase=2)
    make_trainer(make_model(), max_steps=4, callbacks=[callback]).train()
    record = read_record("out").to_dict()
    plots.plot_record(record, tmp_path)
    assert places == [0, 2]
    first, second = ([r["original"] for r in phase["removals"]] for phase in record["phases"])
    assert removal_marks(record) == [
        (0, f"layers {first[0]}, {first[1]} removed"),
        (2, f"layer {second[0]} removed"),
    ]
    greedy = prune_layers(make_model(), target_layers=4, calibration=calibration()).to_dict()
    assert len(removal_marks(greedy)) == 1


def test_results_say_what_their_error_bars_are(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    labels, legend = [], Axes.legend
    monkeypatch.setattr(
        Axes, "legend", lambda axes, **kwargs: labels.extend(axes.get_legend_handles_labels()[1])
    )
    dense, cut = (with_perplexities([True] * count + [False] * (40 - count), 0.0) for count in (36, 30))
    records = {
        f"run-{layers}": {"evaluation": {"dense": dense, "model": cut | {"layers": layers}}}
        for layers in (4, 5)
    }
    plots.plot_results(records, tmp_path / "results.png")
    assert labels == [
        "dense model, 6 layers",
        "4 layers, ± 2 standard errors",
        "5 layers, ± 2 standard errors",
    ]
    monkeypatch.setattr(Axes, "legend", legend)
    plots.plot_results(records, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 1000


def labels_of(monkeypatch, draw):
    """The legends of the pictures that a function draws."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    found, of_axes, of_figure = [], Axes.legend, Figure.legend

    def axes_legend(axes, **options):
        found.extend(axes.get_legend_handles_labels()[1])
        return of_axes(axes, **options)

    def figure_legend(figure, handles, **options):
        found.extend(handle.get_label() for handle in handles)
        return of_figure(figure, handles=handles, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Axes, "legend", axes_legend)
        patch.setattr(Figure, "legend", figure_legend)
        draw()
    return found


def test_pictures_of_scores_say_what_they_show(tmp_path, monkeypatch):
    record = prune_layers(make_model(), target_layers=4, calibration=calibration()).to_dict()
    labels = labels_of(monkeypatch, lambda: plots.plot_scores(record, tmp_path))
    bars = ["layer", "lowest score", "± 1 standard error"]
    assert labels == ["removed", "not scored: protected, or removed before", *bars, *bars]
    table = ScoreTable("block_influence", {1: 0.2, 2: 0.1}, None, [0, 1, 2, 3], block_size=2)
    labels = labels_of(monkeypatch, lambda: table.plot(tmp_path / "p.png"))
    assert labels == ["first layer of a block of 2", "lowest score"]


def test_a_card_is_silent_about_what_it_does_not_have(tmp_path):
    record = prune_layers(make_model(), target_layers=5, calibration=calibration()).to_dict()
    write_card(record, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "criterion loss" in card
    for absent in (" None", "## Evaluation", "## Recipe", "multiple choice", "not listed above", "healing"):
        assert absent not in card.replace("not listed\nabove", "not listed above")
    assert "It was not trained after the removal." in card


def test_a_model_without_a_name_has_a_card_that_reads(tmp_path):
    write_card(prune_layers(make_model(), target_layers=5, calibration=calibration()).to_dict(), tmp_path)
    assert "\nA model of type llama with 5 of its 6" in (tmp_path / "README.md").read_text()
