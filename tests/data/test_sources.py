"""Rows from every kind of source."""

import gzip
import io
import json
import sys

import pytest
from datasets import Dataset, DatasetDict

from hf_layerprune.data.sources import load_rows, names_of
from hf_layerprune.errors import LayerPruneError


ROWS = [{"text": "One text."}, {"text": "Another text."}]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, name):
    path, data = folder / name, Dataset.from_list(ROWS)
    kind = name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[1]
    if kind == "parquet":
        data.to_parquet(str(path))
    elif kind == "arrow":
        data.save_to_disk(str(folder / "saved"))
        next((folder / "saved").glob("*.arrow")).rename(path)
    else:
        text = {
            "txt": "One text.",
            "md": "One text.",
            "json": json.dumps(ROWS),
            "jsonl": lines(),
            "csv": "text\nOne text.\nAnother text.\n",
        }[kind]
        raw = text.encode()
        if name.endswith(".gz"):
            raw = gzip.compress(raw)
        if name.endswith(".zst"):
            import zstandard

            raw = zstandard.compress(raw)
        path.write_bytes(raw)
    return path


KINDS = ["a.txt", "a.md", "a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", [*KINDS, "a.txt.gz", "a.json.gz", "a.jsonl.gz", "a.csv.gz"])
def test_every_kind_of_file(tmp_path, name, streaming):
    rows = list(load_rows(write(tmp_path, name), streaming=streaming))
    expected = ROWS[:1] if name.startswith(("a.txt", "a.md")) else ROWS
    assert [{"text": row["text"]} for row in rows] == expected


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst"])
def test_zstandard_files(tmp_path, name):
    pytest.importorskip("zstandard")
    assert load_rows(write(tmp_path, name))[0]["text"] == "One text."


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("First line.\n\nSecond paragraph.\n")
    assert load_rows(tmp_path / "book.txt")["text"] == ["First line.\n\nSecond paragraph.\n"]


def test_a_folder_a_glob_and_several_sources(tmp_path):
    folder = tmp_path / "data"
    (folder / "deeper").mkdir(parents=True)
    write(folder, "a.jsonl")
    write(folder / "deeper", "b.parquet")
    (folder / "notes.pdf").write_text("not read")
    assert len(load_rows(folder)) == 4
    assert len(load_rows(f"{folder}/*.jsonl")) == 2
    assert len(load_rows(f"{folder}/**/*.parquet")) == 2
    assert len(load_rows([folder / "a.jsonl", folder / "deeper" / "b.parquet"])) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_all_kinds_follow_each_other(tmp_path, streaming):
    files = [write(tmp_path, name) for name in KINDS]
    rows = [row["text"] for row in load_rows(files, streaming=streaming)]
    assert rows == ["One text."] * 2 + ["One text.", "Another text."] * 5


def test_sources_with_other_columns_follow_each_other(tmp_path):
    write(tmp_path, "a.jsonl")
    chat = [{"messages": [{"role": "user", "content": "Hello"}]}]
    (tmp_path / "b.jsonl").write_text(lines(chat))
    rows = load_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert rows["text"] == ["One text.", "Another text.", None]
    assert rows[2]["messages"] == chat[0]["messages"]


def test_folders_of_save_to_disk(tmp_path):
    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert load_rows(tmp_path / "one")["text"] == data["text"]
    assert load_rows(tmp_path / "several", split="test")["text"] == ["Another text."]
    assert len(list(load_rows(tmp_path / "one", streaming=True))) == 2
    with pytest.raises(LayerPruneError, match=r"no split 'valid'. Choose from train, test"):
        load_rows(tmp_path / "several", split="valid")


@pytest.mark.parametrize(("text", "expected"), [("Some words.\n", ["Some words.\n"]), (lines(), None)])
def test_standard_input(monkeypatch, text, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert load_rows("-")["text"] == (expected or ["One text.", "Another text."])


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (None, "absent.jsonl", "No such file: absent.jsonl"),
        (None, "/nowhere/at/all", "No such file: /nowhere/at/all"),
        (None, "*.jsonl", r"No file matches \*.jsonl"),
        ("a.pdf", "a.pdf", r"Cannot read a.pdf: expected .txt, .md, .json, .jsonl, .csv, .parquet, .arrow"),
        ("a.parquet.gz", "a.parquet.gz", "Cannot read a.parquet.gz: expected"),
        ("empty.jsonl", "empty.jsonl", "empty.jsonl is empty"),
        ("folder/a.pdf", "folder", r"The folder folder holds .pdf, but no data. Give .txt"),
        ("bad.jsonl", "bad.jsonl", "Cannot read bad.jsonl: "),
        ("bad.parquet", "bad.parquet", "Cannot read bad.parquet: .*[Pp]arquet"),
    ],
)
def test_bad_sources(tmp_path, monkeypatch, make, source, message):
    monkeypatch.chdir(tmp_path)
    if make:
        (tmp_path / make).parent.mkdir(exist_ok=True)
        (tmp_path / make).write_text("" if "empty" in make else "{not json\n")
    with pytest.raises(LayerPruneError, match=message):
        load_rows(source)


def test_an_unknown_id_names_what_can_be_given(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LayerPruneError, match=r"no-one/nothing is neither a file nor a folder here"):
        load_rows("no-one/nothing")
    with pytest.raises(LayerPruneError, match="No data is given"):
        load_rows([])


def test_no_row_of_standard_input_is_lost_without_a_word(monkeypatch):
    for text, message in ((" \n", "Standard input is empty"), ('{"text": "a"}\n{broken\n', "Line 2 of")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        with pytest.raises(LayerPruneError, match=message):
            load_rows("-")


def test_names_are_without_paths(tmp_path):
    assert names_of([write(tmp_path, "a.jsonl"), "owner/data"]) == "a.jsonl, owner/data"
