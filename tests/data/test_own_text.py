"""Text that the model writes itself: --data self."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch

from hf_layerprune import LayerPruneError, load_tokenizer, prune
from hf_layerprune.commands.cli import main
from hf_layerprune.data import own_text
from hf_layerprune.data.own_text import write_own_text
from hf_layerprune.reports.record import read_record

from ..conftest import make_model
from .test_sequences import CHATML
from .test_trainer_rows import equal


SETTINGS = {"tokens": 2000, "length": 60}
SHORT = {
    "self_sequences": 24,
    "sequence_length": 16,
    "calibration_sequences": 4,
    "heldout_sequences": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
}
WORDS = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LAYERPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "self"


@pytest.fixture
def chatting(tokenizer):
    found = copy.deepcopy(tokenizer)
    found.chat_template = CHATML
    return found


def test_half_of_the_text_is_chats(chatting, llama):
    rows = write_own_text(llama, chatting, Path("a.jsonl"), **SETTINGS)
    chats = sum(row["tokens"] for row in rows if "messages" in row)
    documents = sum(row["tokens"] for row in rows if "text" in row)
    for tokens in (chats, documents):
        assert SETTINGS["tokens"] / 2 <= tokens < SETTINGS["tokens"] / 2 + SETTINGS["length"]
    for row in rows:
        assert row["tokens"] <= SETTINGS["length"]
        if "messages" in row:
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert all(message["content"] for message in row["messages"])


@pytest.mark.parametrize("template", [None, "{{ 1 / 0 }}", "{{ raise_exception('no') }}"])
def test_without_a_template_all_of_it_is_documents(template, chatting, llama):
    chatting.chat_template = template
    rows = write_own_text(llama, chatting, Path("a.jsonl"), **SETTINGS)
    assert all("text" in row for row in rows)


def test_a_text_is_what_the_model_predicts(tokenizer, llama):
    """At a temperature near 0 the text is the greedy continuation of the end-of-text token."""
    rows = write_own_text(llama, tokenizer, Path("a.jsonl"), **SETTINGS, temperature=1e-4)
    greedy = llama.generate(torch.tensor([[256]]), do_sample=False, max_new_tokens=59, pad_token_id=257)[
        0, 1:
    ]
    ids = greedy.tolist()
    ids = ids[: ids.index(256)] if 256 in ids else ids
    assert rows[0]["text"].strip("\ufffd") == tokenizer.decode(ids, skip_special_tokens=True).strip("\ufffd")
    assert rows[0]["tokens"] == len(ids) + 1


class Killed(BaseException):
    """Stands for a kill."""


def test_a_killed_process_goes_on_where_it_was(chatting, llama, monkeypatch):
    whole = write_own_text(llama, chatting, Path("whole.jsonl"), **SETTINGS)
    short = write_own_text(llama, chatting, Path("short.jsonl"), tokens=100, length=60)
    assert [row for row in whole if row in short] == short
    assert 0 < len(short) < len(whole) / 2
    batches, written = [], own_text._write

    def write(path, rows):
        written(path, rows)
        batches.append(len(rows))
        if len(batches) == 1:
            raise Killed

    monkeypatch.setattr(own_text, "_write", write)
    with pytest.raises(Killed):
        write_own_text(llama, chatting, Path("again.jsonl"), **SETTINGS)
    assert write_own_text(llama, chatting, Path("again.jsonl"), **SETTINGS) == whole
    assert len(batches) == len({row["batch"] for row in whole})  # no batch was written twice


def test_writing_shows_progress_and_leaves_the_random_state(tokenizer, llama, capsys):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    write_own_text(llama, tokenizer, Path("a.jsonl"), **SETTINGS)
    assert torch.equal(torch.rand(1), expected)
    assert "writing text: 100%" in capsys.readouterr().err


def test_a_model_that_writes_nothing_is_told(tokenizer, llama):
    torch.nn.init.zeros_(llama.lm_head.weight)
    llama.generation_config.eos_token_id = list(range(260))
    with pytest.raises(LayerPruneError, match="data is self, but the model ended 16 texts"):
        write_own_text(llama, tokenizer, Path("a.jsonl"), **SETTINGS)


def test_commands_and_python_prune_with_the_models_own_text(folder, chatting, cache, caplog):
    chatting.save_pretrained(folder)
    target = ["--model", folder, "--target_layers", "4", "--data", "self"]
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        assert main(["run", "default", *target, "--output_dir", "out", *WORDS]) == 0
    [file] = cache.iterdir()
    assert f"The model writes text in {file}." in caplog.text
    text = file.read_text()
    expected = type(make_model()).from_pretrained("out")
    for name, model in {"folder": folder, "model": type(expected).from_pretrained(folder)}.items():
        pruned, record = prune(model, "self", 4, output_dir=f"out-{name}", **SHORT)
        assert equal(pruned, expected), name
        assert record.recipe["data"] == "self"
        assert record.texts["healing"]["name"] == "text that the model wrote"
    assert file.read_text() == text  # it was read again, not written again
    assert [one.name for one in cache.iterdir()] == [file.name]


@pytest.mark.parametrize("command", ["score", "prune", "distill"])
def test_each_command_takes_the_models_own_text(command, folder, cache, capsys):
    words = [command, folder, "--data", "self", "--sequence_length", "16", "--self_sequences", "24"]
    words += ["--calibration_sequences", "4"]
    if command != "score":
        words += ["--target_layers", "4", "--output_dir", "out", "--heldout_sequences", "4"]
    if command == "distill":
        words += ["--max_steps", "2", "--report_to", "none", "--use_cpu", "True", "--save_strategy", "no"]
    assert main(words) == 0
    [file] = cache.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum(row["tokens"] for row in rows) >= 16 * 4
    if command == "distill":
        assert read_record("out").texts["healing"]["name"] == "text that the model wrote"


def test_the_teacher_of_distill_writes_the_text(folder, cache):
    make_model(seed=1).save_pretrained("teacher")
    load_tokenizer(folder).save_pretrained("teacher")
    words = ["distill", folder, "--teacher", "teacher", "--data", "self", "--output_dir", "out", *WORDS]
    assert main([*words, "--target_layers", "4", "--use_cpu", "True"]) == 0
    assert [file.name.split("-")[0] for file in cache.iterdir()] == ["teacher"]


def test_where_no_model_can_write_is_told(folder, capsys):
    assert main(["evaluate", folder, "--data", "self"]) == 2
    assert "data is self, text that the model writes, but no single model" in capsys.readouterr().err
    assert main(["score", folder, "--data", "self", "text.txt"]) == 2
    assert "other data is given too" in capsys.readouterr().err
    assert main(["score", folder, "--data", "self", "--self_temperature", "0"]) == 2
    assert "a temperature above 0" in capsys.readouterr().err


def test_text_of_the_model_has_no_completions(llama, chatting):
    with pytest.raises(LayerPruneError, match="data is self and loss_on is completion"):
        prune(
            llama,
            "self",
            3,
            tokenizer=chatting,
            output_dir="out",
            sequence_length=16,
            loss_on="completion",
        )


def test_texts_longer_than_the_context_are_refused_before_they_are_written(chatting):
    model = make_model("gpt2", n_positions=64)
    with pytest.raises(LayerPruneError, match="but the model reads 64 tokens at most"):
        prune(model, "self", 3, tokenizer=chatting, output_dir="out", sequence_length=16, self_length=100)
