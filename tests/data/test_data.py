import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from hf_layerprune import LayerPruneError
from hf_layerprune.data.batches import make_batches
from hf_layerprune.data.sequences import split_sequences, stream_sequences, token_sequences
from hf_layerprune.data.texts import load_texts


def test_texts_come_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load_texts(str(tmp_path / "a.txt")) == ["one\n\ntwo\n"]
    lines = "\n".join(json.dumps({"body": text, "n": 1}) for text in ("one", "  ", "two"))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert load_texts(str(tmp_path / name), field="body") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "No such file"),
        ("a.txt", "", "no text in"),
        ("a.txt", " \n ", "no text in"),
        ("a.jsonl", '{"body": "x"}', r"has no field 'text', only \['body'\]"),
        ("a.jsonl", "not json", r"Cannot read .*a\.jsonl: "),
        ("a.jsonl.gz", "not gzip", r"Cannot read .*a\.jsonl\.gz: "),
        ("a.csv", "a,b\n1,2", r"has no field 'text', only \['a', 'b'\]"),
        ("a.pdf", "a,b", r"Cannot read .*a.pdf: expected .txt, .md, .json, .jsonl, .csv"),
        ("no/such-dataset", None, "no/such-dataset is neither .* and cannot be read from the hub"),
    ],
)
def test_bad_sources_are_refused(tmp_path, name, content, message):
    path = str(tmp_path / name) if content is not None or name.startswith("a.") else name
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(LayerPruneError, match=message):
        load_texts(path)


def test_blocks_hold_the_text_in_order(tokenizer):
    blocks = token_sequences(["hello", "world!"], tokenizer, 4)
    end = tokenizer.eos_token_id
    flat = [*tokenizer("hello")["input_ids"], end, *tokenizer("world!")["input_ids"], end]
    assert [token for block in blocks["input_ids"] for token in block] == flat[:12]
    assert blocks["labels"] == blocks["input_ids"]
    assert len(token_sequences(["hello"] * 100, tokenizer, 4, limit=3)) == 3


def test_blocks_begin_as_the_tokenizer_begins_a_text(tokenizer):
    starting = copy.deepcopy(tokenizer)
    starting.add_special_tokens({"bos_token": "<start>"})
    bos = starting.bos_token_id
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", bos)]
    )
    plain = token_sequences(["hello world"], tokenizer, 3)["input_ids"]
    blocks = token_sequences(["hello world"], starting, 4)["input_ids"]
    assert blocks == [[bos, *block] for block in plain]


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        ([], 4, "0 tokens, less than one sequence of 4"),
        (["ab"], 4, "3 tokens, less than one sequence of 4"),
        (["abcdef"], 1, "nothing to predict"),
    ],
)
def test_too_little_text_is_refused(tokenizer, texts, length, message):
    with pytest.raises(LayerPruneError, match=message):
        token_sequences(texts, tokenizer, length)


@pytest.mark.parametrize(
    ("count", "calibration", "heldout"), [(20, 3, 4), (7, 3, 4), (50, 16, 16), (9, 1, 7)]
)
def test_the_parts_of_a_text_are_disjoint_and_whole(count, calibration, heldout):
    parts = split_sequences(Dataset.from_dict({"n": list(range(count))}), calibration, heldout)
    assert [len(part) for part in parts] == [calibration, heldout, count - calibration - heldout]
    assert sorted(n for part in parts for n in part["n"]) == list(range(count))


@pytest.mark.parametrize(("calibration", "heldout"), [(0, 1), (1, 0), (3, 3)])
def test_parts_that_cannot_be_are_refused(calibration, heldout):
    with pytest.raises(LayerPruneError, match="the text has 5 sequences"):
        split_sequences(Dataset.from_dict({"n": list(range(5))}), calibration, heldout)


def test_batches():
    data = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]})
    state = torch.get_rng_state()
    batches = make_batches(data, 2)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 2], [3, 4]], [[5, 6]]]
    assert torch.equal(torch.get_rng_state(), state)
    assert make_batches(batches, 7) == batches
    loaded = make_batches(DataLoader(data.with_format("torch"), 2), 7)
    assert [batch["input_ids"].tolist() for batch in loaded] == [[[1, 2], [3, 4]], [[5, 6]]]
    rows = [{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3, 4])}]
    assert make_batches(rows, 2)[0]["input_ids"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(LayerPruneError, match="data is empty"):
        make_batches([], 2)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_stream_gives_the_same_blocks(tokenizer, kind):
    texts = [f"Document {i} says {i * i}." * (i % 5) for i in range(40)]
    texts = [text or "  " for text in texts]  # of which some say nothing
    lines = "\n".join(json.dumps({"text": text}) for text in texts) if kind == "jsonl" else "".join(texts)
    Path(f"t.{kind}").write_text(lines)
    whole = token_sequences(load_texts(f"t.{kind}"), tokenizer, 16)
    head, rest = stream_sequences(tokenizer, 16, 5, f"t.{kind}")
    assert head["input_ids"] == whole["input_ids"][:5]
    for _ in range(2):  # from its beginning again
        found = list(rest)
        assert [row["input_ids"] for row in found] == whole["input_ids"][5:]
        assert all(row["labels"] == row["input_ids"] for row in found)
    with pytest.raises(LayerPruneError, match="of which the first 500 are not trained on"):
        stream_sequences(tokenizer, 16, 500, f"t.{kind}")
    for field, message in (("words", "no field 'words'"), ("text", "No such file")):
        with pytest.raises(LayerPruneError, match=message):
            stream_sequences(tokenizer, 16, 5, f"t.{kind}" if field == "words" else "none.txt", field)


UMLAUTS = "Grüße aus Köln. " * 40


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("latin-1", "ISO-8859-1")],
)
def test_a_file_that_is_not_utf8_says_so(encoding, named, name, streaming, tokenizer):
    text = UMLAUTS if name == "a.txt" else json.dumps({"text": UMLAUTS}, ensure_ascii=False)
    with (gzip.open if name.endswith("gz") else open)(name, "wb") as file:
        file.write(text.encode(encoding))
    with pytest.raises(LayerPruneError, match=rf"{name} is not UTF-8 .*iconv -f {named} -t UTF-8"):
        stream_sequences(tokenizer, 8, 2, name) if streaming else load_texts(name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_mark_of_utf8_is_no_text(name):
    text = UMLAUTS if name == "a.txt" else json.dumps({"text": UMLAUTS}, ensure_ascii=False)
    Path(name).write_text(text, encoding="utf-8-sig")
    assert load_texts(name) == [UMLAUTS]


def test_a_letter_between_two_parts_of_a_file_is_utf8():
    Path("a.txt").write_text("a" * (2**20 - 1) + "ü")
    assert load_texts("a.txt")[0].endswith("ü")


def test_sources_without_text_are_counted(tokenizer, caplog):
    rows = [{"text": "word " * 9}, {"text": None}, {"text": " "}, {"other": "x"}, {"text": "more " * 9}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = "a.jsonl: 3 of 5 rows have no text in 'text' and are skipped."
    with caplog.at_level("WARNING", "hf_layerprune"):
        assert len(load_texts("a.jsonl")) == 2
        assert [record.message for record in caplog.records] == [expected]
        Path("a.jsonl").rename("b.jsonl")
        _, rest = stream_sequences(tokenizer, 16, 2, "b.jsonl")
        assert len(list(rest)) == len(list(rest))
    told = [record.message for record in caplog.records]
    assert told == [expected, expected.replace("a.", "b.")]  # once, however often it is read
