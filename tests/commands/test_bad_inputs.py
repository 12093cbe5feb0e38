"""Mistakes with data, targets and config files: one clear line each, before weights are loaded."""

import io
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_layerprune.commands.cli import main


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.fixture
def inputs(folder):
    """A model whose weights cannot be read, and files beside it."""
    Path("model/model.safetensors").write_bytes(b"whoever reads this fails")
    Path("empty").mkdir()
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(b"png")
    Path("a.pdf").write_text("a")
    Path("table.csv").write_text("question,answer\nWhy?,Because.\n")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("broken.parquet").write_text("no parquet")
    Path("chats.jsonl").write_text(json.dumps({"messages": TALK}))
    Path("cats.jsonl").write_text(json.dumps({"conversations": [{"from": "cat", "value": "Meow"}]}))
    Path("numbers.jsonl").write_text(json.dumps({"text": 7}))
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a" * 99, "completion": "b"}))
    Path("c.yaml").write_text("target_layers: four\n")
    Path("keep.yaml").write_text("keep: 4\ntarget_layers: 4\n")
    DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}).save_to_disk("saved")
    return folder


PRUNE = ["prune", "model", "--output_dir", "out"]
TEXT = ["--data", "text.txt"]
SCORE = ["score", "model", "--sequence_length", "16", "--data"]
COMPLETION = ["--loss_on", "completion"]
BAD = [
    ([*SCORE, "none.parquet"], "No such file: none.parquet"),
    ([*SCORE, "text.txt", "none.csv"], "No such file: none.csv"),
    ([*SCORE, "*.arrow"], "No file matches *.arrow."),
    ([*SCORE, "a.pdf"], "Cannot read a.pdf: expected .txt, .md, .json, .jsonl, .csv, .parquet, .arrow"),
    ([*SCORE, "empty"], "The folder empty holds no files, but no data. Give .txt"),
    ([*SCORE, "pictures"], "The folder pictures holds .png, but no data. Give .txt"),
    ([*SCORE, "broken.jsonl"], "Cannot read broken.jsonl: "),
    ([*SCORE, "broken.parquet"], "Cannot read broken.parquet: "),
    ([*SCORE, "saved"], "saved has no split 'train'. Choose from test."),
    ([*SCORE, "someone/nothing"], "someone/nothing is neither a file nor a folder here"),
    (
        [*SCORE, "table.csv"],
        "a row with ['question', 'answer']. Each row needs input_ids, or text in a column",
    ),
    ([*SCORE, "table.csv", "--data_field", "reply"], "no field 'reply', only ['question', 'answer']"),
    ([*SCORE, "table.csv", "--data_template", "{q}"], "names 'q', which the data lacks"),
    ([*SCORE, "table.csv", "--data_template", "question"], "names no column"),
    ([*SCORE, "table.csv", "--data_template", "{question"], "The template '{question' cannot be read"),
    ([*SCORE, "chats.jsonl"], "the tokenizer has no chat template"),
    ([*SCORE, "cats.jsonl"], "a turn from 'cat'. Use one of human, user"),
    ([*SCORE, "numbers.jsonl"], "The text has 0 tokens"),
    ([*SCORE, "text.txt", *COMPLETION], "loss_on is 'completion', but a row has no completion"),
    ([*SCORE, "prompts.jsonl", *COMPLETION, "--packing", "none"], "There is no text to train on"),
    ([*SCORE, "text.txt", "--packing", "tight"], "argument --packing: invalid choice: 'tight'"),
    ([*SCORE, "text.txt", "--loss_on", "answers"], "argument --loss_on/--loss-on: invalid choice: 'answers'"),
    ([*SCORE, "text.txt", "--sequence_length", "1"], "The sequence length is 1. Choose at least 2"),
    ([*SCORE, "text.txt", "--sequence_length", "99"], "--sequence_length is 99, but the model reads 64"),
    ([*SCORE, "-"], "Standard input is empty."),
    ([*PRUNE, *TEXT], "--target_layers is missing. Give the number of layers to keep, or --target_ratio"),
    (
        [*PRUNE, *TEXT, "--keep", "4", "--target_ratio", "0.5"],
        "--target_layers and --target_ratio are given.",
    ),
    ([*PRUNE, *TEXT, "--target_ratio", "75"], "--target_ratio is 75.0. Choose a share between 0 and 1"),
    ([*PRUNE, *TEXT, "--target_parameters", "big"], "--target_parameters is 'big'. Give a number above 0"),
    ([*PRUNE, *TEXT, "--config", "none.yaml"], "No such file: none.yaml."),
    ([*PRUNE, *TEXT, "--config", "c.yaml"], "c.yaml: target_layers is 'four', but must be a whole number."),
    ([*PRUNE, *TEXT, "--config", "keep.yaml"], "which is given too. Give one of them."),
    ([*PRUNE, *TEXT, "--keep", "4", "--save_config", "no/c.yaml"], "Cannot write no/c.yaml: its folder"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_clear_line(inputs, words, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("hf-layerprune: error: ")
    assert message in last
    assert not Path("out").exists()
