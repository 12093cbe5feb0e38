"""Raw rows in a Trainer, in its calibration and on the command line."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    evaluate_text,
    prepare_dataset,
    prune,
)
from hf_layerprune.commands.cli import main
from hf_layerprune.data.collator import PaddingCollator, padding_collator
from hf_layerprune.data.sequences import IGNORED

from ..conftest import make_model
from .test_sequences import CHATML, SHAREGPT, TALK


PROMPTS = [{"prompt": "What is this? ", "completion": "A test."}, {"prompt": "A", "completion": "bc"}]
FORMS = {
    "text": [{"text": "The quick brown fox."}, {"text": "It jumps over the lazy dog."}] * 4,
    "messages": [{"messages": TALK}] * 4,
    "conversations": [{"conversations": SHAREGPT}] * 4,
    "prompts": PROMPTS * 4,
}


@pytest.fixture
def chatting(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    return tokenizer


def make_trainer(tokenizer, train_dataset, *callbacks, eval_dataset=None, **settings):
    args = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return DistillationTrainer(
        make_model(),
        DistillationTrainingArguments("out", **args | settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(
    "as_rows", [list, Dataset.from_list, lambda rows: Dataset.from_list(rows).to_iterable_dataset()]
)
@pytest.mark.parametrize("form", FORMS)
def test_the_trainer_prepares_raw_rows(form, as_rows, chatting):
    expected = prepare_dataset(FORMS[form], chatting, 64)
    trainer = make_trainer(chatting, as_rows(FORMS[form]), eval_dataset={"held out": FORMS[form]})
    assert [row["input_ids"] for row in trainer.train_dataset] == expected["input_ids"]
    assert trainer.eval_dataset["held out"]["labels"] == expected["labels"]
    trainer.train()
    assert trainer.evaluate()["eval_held out_loss"] > 0


@pytest.mark.parametrize("packing", ["none", "packed"])
def test_the_trainer_pads_and_counts_completions_alone(packing, tokenizer):
    settings = {"packing": packing, "loss_on": "completion", "sequence_length": 32}
    trainer = make_trainer(tokenizer, PROMPTS, eval_dataset=PROMPTS, ce_weight=1.0, kl_weight=0.0, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != IGNORED).sum() == len("A test.") + len("bc") + 2
    # The loss is that of each text alone: padding changes nothing, nor do other texts in the sequence.
    losses, count = [], 0
    model = make_model()
    for row in prepare_dataset(PROMPTS, tokenizer, 32, packing="none", loss_on="completion"):
        row = {name: torch.tensor([value]) for name, value in row.items()}
        tokens = int((row["labels"][:, 1:] != IGNORED).sum())
        losses.append(model(**row).loss.item() * tokens)
        count += tokens
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / count, rel=1e-5)


def test_layers_are_scored_on_the_tokens_that_training_counts(chatting):
    def scores(calibration):
        shutil.rmtree("out", ignore_errors=True)
        pruning = LayerPruningCallback(target_layers=5, calibration=calibration)
        make_trainer(chatting, FORMS["messages"], pruning, packing="none", loss_on="completion").train()
        return pruning.record.phases[0].removals[0].table.scores

    ready = prepare_dataset(FORMS["messages"], chatting, 64, packing="none", loss_on="completion")
    assert scores(FORMS["messages"]) == pytest.approx(scores(ready))
    every = prepare_dataset(FORMS["messages"], chatting, 64, packing="none")
    assert scores(FORMS["messages"]) != pytest.approx(scores(every))


def test_prepare_that_cannot_be_prepared_are_refused(chatting):
    with pytest.raises(LayerPruneError, match=r"train_dataset holds text, which needs a tokenizer"):
        make_trainer(None, FORMS["text"])
    with pytest.raises(LayerPruneError, match="sequence_length is 65, but the model reads 64"):
        make_trainer(chatting, FORMS["text"], sequence_length=65)
    with pytest.raises(LayerPruneError, match="loss_on is 'completion', but a row has no completion"):
        make_trainer(chatting, FORMS["text"], loss_on="completion")


def test_a_collator_that_reads_raw_rows_gets_them(tokenizer):
    def collate(rows):
        return tokenizer([row["text"][:9] for row in rows], return_tensors="pt")

    args = DistillationTrainingArguments(
        "out", max_steps=1, report_to="none", use_cpu=True, save_strategy="no", remove_unused_columns=False
    )
    rows = Dataset.from_list(FORMS["text"])
    trainer = DistillationTrainer(make_model(), args, collate, rows, processing_class=tokenizer)
    assert trainer.train_dataset is rows
    trainer.train()


def test_padding():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = {name: value.tolist() for name, value in PaddingCollator(9)(rows).items()}
    assert batch == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "labels": [[1, 2, 3], [4, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    packed = [row | {"position_ids": list(range(len(row["input_ids"])))} for row in rows]
    batch = PaddingCollator(9)(packed)
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert "attention_mask" not in batch


def test_a_tokenizer_without_a_padding_token_pads_with_its_last(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    assert padding_collator(tokenizer).fill["input_ids"] == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_collator(tokenizer).fill["input_ids"] == tokenizer.eos_token_id
    assert padding_collator(None).fill["input_ids"] == 0


SETTINGS = {
    "sequence_length": 48,
    "packing": "packed",
    "loss_on": "completion",
    "calibration_sequences": 4,
    "heldout_sequences": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
}


def talks(count=24):
    """Chats of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": "Hi" * (i % 5)},
                {"role": "assistant", "content": f"No {i}"},
            ]
        }
        for i in range(count)
    ]


def equal(one, other):
    weights = other.state_dict()
    return all(torch.equal(weights[name], value) for name, value in one.state_dict().items())


def test_the_command_and_python_prune_with_chats_alike(folder, chatting):
    chatting.save_pretrained(folder)
    Dataset.from_list(talks()).to_parquet("chats.parquet")
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    target = ["--model", folder, "--target_layers", "4", "--data", "chats.parquet", "--output_dir", "out"]
    assert main(["run", "default", *target, *words]) == 0
    expected = type(make_model()).from_pretrained("out")
    forms = {"file": "chats.parquet", "files": [Path("chats.parquet")], "rows": talks()}
    forms["data set"] = Dataset.from_list(talks())
    for name, data in forms.items():
        pruned, record = prune(folder, data, 4, output_dir=f"out {name}", **SETTINGS)
        assert equal(pruned, expected), name
    assert json.loads(Path("out/layer_pruning.json").read_text())["recipe"]["data"] == "chats.parquet"
    assert record.recipe["loss_on"] == "completion"


def test_padded_chats_are_evaluated(folder, chatting, capsys):
    chatting.save_pretrained(folder)
    Dataset.from_list(talks(6)).to_parquet("chats.parquet")
    words = ["evaluate", folder, "--data", "chats.parquet", "--packing", "none", "--loss_on", "completion"]
    assert main([*words, "--json", "e.json"]) == 0
    found = json.loads(Path("e.json").read_text())["models"][folder]
    rows = prepare_dataset(talks(6), chatting, 64, packing="none", loss_on="completion")
    losses = [evaluate_text(make_model(), [row]) for row in rows]
    total = sum(one["loss"] * one["tokens"] for one in losses)
    assert found["loss"] == pytest.approx(total / sum(one["tokens"] for one in losses), rel=1e-5)
    assert found["tokens"] == sum(one["tokens"] for one in losses)


def test_a_list_of_file_names_is_refused(folder):
    with pytest.raises(
        LayerPruneError, match=r"taken for texts, but text.txt is a file. Give a list of pathlib"
    ):
        prune(folder, ["text.txt"], 4, output_dir="out", sequence_length=16)


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        (["a.jsonl", "b.csv"], []),
        (["parts"], []),
        (["*.jsonl"], []),
        (["saved"], []),
        (["q.jsonl"], ["--data_template", "{q}\\n{a}"]),
        (["q.jsonl"], ["--data_field", "a"]),
    ],
)
def test_commands_read_data_of_every_form(folder, capsys, data, flags):
    rows = [{"text": f"The fox number {i} jumps."} for i in range(20)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_csv("b.csv")
    Dataset.from_list(rows).save_to_disk("saved")
    Path("parts").mkdir()
    Dataset.from_list(rows).to_parquet("parts/a.parquet")
    Path("q.jsonl").write_text("\n".join(json.dumps({"q": "Why?", "a": row["text"]}) for row in rows))
    if data == ["*.jsonl"]:
        Path("q.jsonl").unlink()
    words = ["score", folder, "--data", *data, *flags, "--sequence_length", "16", "--criterion", "angular"]
    assert main([*words, "--calibration_sequences", "4"]) == 0
    assert "angular" in capsys.readouterr().out
