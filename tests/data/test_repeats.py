"""Rows of training text that read a passage twice."""

from pathlib import Path

import pytest
from datasets import Dataset

from hf_layerprune import LayerPruneError, prune, repeat_passages
from hf_layerprune.data.arguments import SequenceArguments
from hf_layerprune.recipes.arguments import TextArguments, TrainingSampleArguments
from hf_layerprune.recipes.inputs import split_text

from ..conftest import make_model


def rows(count, length=8):
    ids = [list(range(100 * row, 100 * row + length)) for row in range(count)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])


@pytest.mark.parametrize(("share", "places"), [(0, []), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (1, range(8))])
def test_repeated_rows_are_spread_evenly(share, places):
    given, found = rows(8), repeat_passages(rows(8), share)
    assert [place for place in range(8) if found[place] != given[place]] == [*places]
    assert found.column_names == given.column_names


@pytest.mark.parametrize("length", [7, 8])
def test_the_second_copy_begins_after_the_first_token_and_labels_follow(length):
    (row,) = repeat_passages(rows(1, length), 1)
    first = list(range(1 + length // 2))
    assert row["input_ids"] == [*first, *first[1:]][:length]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert len(row["input_ids"]) == length


def test_a_row_without_a_passage_stays():
    assert repeat_passages(rows(2, 3), 1).to_list() == rows(2, 3).to_list()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_0_and_1_is_refused(share, folder):
    with pytest.raises(LayerPruneError, match="repeat_share"):
        repeat_passages(rows(1), share)
    with pytest.raises(LayerPruneError, match="repeat_share"):
        prune(folder, "text.txt", keep=4, repeat_share=share, output_dir="out")


def split(tokenizer, share, data="text.txt", **settings):
    text = TextArguments(**{name: settings.pop(name) for name in ("streaming",) if name in settings})
    sequence = SequenceArguments(sequence_length=16, **settings)
    sample = TrainingSampleArguments(4, 4, repeat_share=share)
    config = make_model().config
    return [list(part) for part in split_text(data, text, sequence, sample, config, tokenizer, 4)]


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_training_text_of_a_recipe_is_repeated(streaming, folder, tokenizer):
    plain, found = (split(tokenizer, share, streaming=streaming) for share in (0, 0.125))
    assert found[:2] == plain[:2]
    changed = [place for place, row in enumerate(plain[2]) if found[2][place] != row]
    assert changed == list(range(7, len(plain[2]), 8))
    assert all(found[2][place]["input_ids"][1:8] == found[2][place]["input_ids"][9:] for place in changed)


def test_texts_of_an_iterator_are_repeated_as_those_of_a_list(tokenizer):
    texts = ["A text that is long enough to be cut into some sequences."] * 20
    assert split(tokenizer, 0.125, iter(texts)) == split(tokenizer, 0.125, texts)
    assert split(tokenizer, 0.125, texts) != split(tokenizer, 0, texts)


CHAT = '{"prompt": "A question?", "completion": " An answer."}\n'


@pytest.mark.parametrize(
    "form", [{"packing": "packed"}, {"packing": "none"}, {"loss_on": "completion"}], ids=str
)
def test_chats_and_answers_are_not_repeated(form, folder, tokenizer):
    Path("rows.jsonl").write_text(CHAT * 40)
    found = [split(tokenizer, share, "rows.jsonl", **form) for share in (0, 1)]
    assert found[0] == found[1]


def test_own_tokens_are_not_repeated(folder, tokenizer):
    assert split(tokenizer, 1, rows(16)) == split(tokenizer, 0, rows(16))


@pytest.mark.parametrize(("packing", "share"), [("joined", 0.125), ("none", 0.0)])
def test_the_record_says_what_was_repeated(packing, share, folder):
    Path("rows.jsonl").write_text('{"text": "A text that is long enough."}\n' * 40)
    settings = {"calibration_sequences": 4, "heldout_sequences": 4, "sequence_length": 16, "max_steps": 0}
    record = prune(folder, "rows.jsonl", 4, packing=packing, output_dir="out", **settings).record
    assert record.recipe.get("repeat_share", 0.0) == share


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_formatted_rows_are_repeated_too(kind):
    found = repeat_passages(rows(2).with_format(kind), 1)
    assert found.format["type"] == kind
    assert found.with_format(None).to_list() == repeat_passages(rows(2), 1).to_list()


def test_rows_with_other_columns_are_refused():
    packed = rows(2).add_column("position_ids", [[0] * 8] * 2)
    with pytest.raises(LayerPruneError, match="position_ids"):
        repeat_passages(packed, 0.5)
