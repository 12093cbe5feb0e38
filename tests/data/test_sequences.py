"""Text, chats and prompts as sequences with labels."""

import copy
import logging

import pytest
import torch
from datasets import Dataset

from hf_layerprune.data.sequences import IGNORED, prepare_dataset
from hf_layerprune.data.texts import text_of
from hf_layerprune.errors import LayerPruneError

from ..conftest import make_model


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


@pytest.fixture
def chatting(tokenizer):
    found = copy.deepcopy(tokenizer)
    found.chat_template = CHATML
    return found


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def counted(tokenizer, row):
    return read(tokenizer, [label for label in row["labels"] if label != IGNORED])


SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in TALK
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        TALK,
        {"conversations": SHAREGPT},
        {"prompt": TALK[:3], "completion": TALK[3:]},
        {"messages": TALK, "text": None},
    ],
)
def test_chats_of_every_form_are_the_same_text(chatting, row):
    expected = chatting.apply_chat_template(TALK, tokenize=False)
    assert text_of(row, chatting).text == expected
    [sequence] = prepare_dataset([row], chatting, 256, packing="none", loss_on="completion")
    assert read(chatting, sequence["input_ids"]) == expected
    answers = "So long.<|end|>" if "prompt" in row else "Hello!<|end|>So long.<|end|>"
    assert counted(chatting, sequence) == answers
    # The end-of-text token after the last answer counts, as it ends that answer.
    assert sequence["labels"][-1] == chatting.eos_token_id


def test_a_prompt_and_its_completion(tokenizer):
    [row] = prepare_dataset(
        [{"prompt": "1+1=", "completion": "2"}], tokenizer, 32, packing="none", loss_on="completion"
    )
    assert (read(tokenizer, row["input_ids"]), counted(tokenizer, row)) == ("1+1=2", "2")
    assert read(tokenizer, prepare_dataset(["1+1=2"], tokenizer, 3)[0]["labels"]) == "1+1"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # that trl gives
def test_completion_labels_are_those_of_trl(tokenizer, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "What is this? ", "completion": "A test."}, {"prompt": "A", "completion": "bc"}]
    args = SFTConfig(output_dir=str(tmp_path), max_length=64, report_to="none", use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        make_model("llama"), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    ours = prepare_dataset(rows, tokenizer, 64, packing="none", loss_on="completion")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    for i, row in enumerate(ours):
        length = len(row["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["labels"][i, :length].tolist() == row["labels"]


def test_a_template_over_columns(tokenizer):
    rows = [{"q": "Why?", "a": "Because.", "n": 3}, {"q": "How?", "a": None, "n": 4}]
    texts = [text_of(row, template="{q}\n{a} ({n})").text for row in rows]
    assert texts == ["Why?\nBecause. (3)", "How?\n (4)"]
    with pytest.raises(
        LayerPruneError, match=r"names 'x', which the data lacks. The data has \['q', 'a', 'n'\]"
    ):
        prepare_dataset(rows, tokenizer, 8, template="{x}")
    with pytest.raises(LayerPruneError, match="names no column"):
        prepare_dataset(rows, tokenizer, 8, template="q")


def test_joined_texts_are_cut_with_their_labels(tokenizer):
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "fg", "completion": "hij"}]
    joined = prepare_dataset(rows, tokenizer, 4, loss_on="completion")
    assert [read(tokenizer, row["input_ids"]) for row in joined] == ["abcd", "efg", "hij"]
    assert [counted(tokenizer, row) for row in joined] == ["d", "e", "hij"]
    every = prepare_dataset(rows, tokenizer, 4)
    assert every["input_ids"] == joined["input_ids"]
    assert every["labels"] == every["input_ids"]


def test_packed_texts_do_not_see_each_other(tokenizer):
    rows = ["The first text.", "A second one.", "And the third."]
    alone = prepare_dataset(rows, tokenizer, 48, packing="none")
    packed = prepare_dataset(rows, tokenizer, 48, packing="packed")
    assert [len(row["input_ids"]) for row in packed] == [45]
    assert packed[0]["position_ids"] == [*range(16), *range(14), *range(15)]
    model = make_model("llama")
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([packed[0]["input_ids"]]),
            position_ids=torch.tensor([packed[0]["position_ids"]]),
            use_cache=False,
        ).logits[0]
        expected = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in alone]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    # The last token of a text does not predict the first one of the next.
    assert [i for i, label in enumerate(packed[0]["labels"]) if label == IGNORED] == [0, 16, 30]


def test_what_is_cut_off_is_reported(tokenizer, caplog):
    rows = [
        {"prompt": "x" * 20, "completion": "never seen"},
        {"prompt": "a", "completion": "b" * 12},
        "",
        None,
    ]
    with caplog.at_level(logging.WARNING):
        found = prepare_dataset(
            rows[:2], tokenizer, 10, packing="none", loss_on="completion", name="talks.jsonl"
        )
    assert [counted(tokenizer, row) for row in found] == ["b" * 9]
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "talks.jsonl: 2 of 2 texts are longer than a sequence. 25 tokens are cut off." in logged
    assert "1 of 2 texts have no completion within a sequence" in logged


def test_empty_rows_are_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        found = prepare_dataset([{"text": ""}, {"text": None}, {"text": "abc"}], tokenizer, 4, name="rows")
    assert read(tokenizer, found[0]["input_ids"]) == "abc"
    assert "rows: 2 of 3 rows have no text" in caplog.text


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"text": "abc"}], {"loss_on": "completion"}, "no completion that can be told: it is plain text"),
        ([{"other": "abc"}], {}, r"The data holds a row with \['other'\]. Each row needs"),
        ([3], {}, "The data holds a int"),
        ([{"messages": TALK}], {}, "the tokenizer has no chat template"),
        ([{"conversations": [{"from": "cat", "value": "meow"}]}], {}, "a turn from 'cat'"),
        (["abc"], {"packing": "tight"}, "packing is 'tight'. Choose from joined, packed, none."),
        (["abc"], {"loss_on": "answers"}, "loss_on is 'answers'. Choose from all, completion."),
        (["abc"], {"length": 1}, "The sequence length is 1. Choose at least 2"),
        (["abc"], {}, "The text has 4 tokens, less than one sequence of 8"),
        ([], {"packing": "packed"}, "There is no text to train on"),
    ],
)
def test_what_cannot_be_prepared_is_refused(tokenizer, rows, settings, message):
    with pytest.raises(LayerPruneError, match=message):
        prepare_dataset(rows, tokenizer, **{"length": 8} | settings)


def test_a_template_that_rewrites_earlier_turns_has_no_completions(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages | length }}: {% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert text_of(TALK, tokenizer).completions == []
    with pytest.raises(LayerPruneError, match="writes earlier turns differently"):
        prepare_dataset([TALK], tokenizer, 64, packing="none", loss_on="completion")


def test_a_template_that_fails_says_why(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LayerPruneError, match=r"cannot write these messages: .*roles must alternate"):
        text_of(TALK, tokenizer)


def test_the_first_token_of_a_model_comes_first(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<pad>"
    tokenizer.add_bos_token = True
    start = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
    for packing in ("joined", "packed", "none"):
        rows = prepare_dataset(["abcdefg"], tokenizer, 5, packing=packing)
        assert (
            rows[0]["input_ids"]
            == start + tokenizer.encode("abcdefg", add_special_tokens=False)[: 5 - len(start)]
        )
