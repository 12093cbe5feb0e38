"""Calibration and evaluation data in every form that users give it."""

import copy
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader, TensorDataset

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    cache_teacher_logits,
    evaluate_model,
    evaluate_text,
    load_texts,
    make_batches,
    replace_by_linear_map,
    score_layers,
    select_layers,
    token_sequences,
)
from hf_layerprune.distillation.teacher_cache import CachedTeacherLogits

from ..conftest import TEXT, make_model, tokens


IDS = tokens(4, 12)
ROWS = [{"input_ids": row.tolist()} for row in IDS]
EXTRA = [row | {"text": "unused", "length": 12, "parts": ["a", "b"]} for row in ROWS]
CHAT = [{"role": "user", "content": "Where is the fox?"}, {"role": "assistant", "content": "Over the dog."}]
TEXTS = ["The quick brown fox.", "It jumps over the lazy dog."]


class Items(torch.utils.data.Dataset):
    """A data set of torch whose last row is not the end."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": IDS[index % 4]}


TOKENS = {
    "tensor": lambda: IDS,
    "array": lambda: IDS.numpy(),
    "one batch": lambda: {"input_ids": IDS},
    "one batch of lists": lambda: {"input_ids": IDS.tolist()},
    "a list of tensors": lambda: [IDS[:2], IDS[2:]],
    "a list of batches": lambda: [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}],
    "batches with names": lambda: [{"input_ids": IDS, "names": ["a"] * 4}],
    "a generator of batches": lambda: ({"input_ids": part} for part in IDS.split(2)),
    "a generator of rows": lambda: iter(ROWS),
    "a list of rows": lambda: ROWS,
    "rows as tensors": lambda: list(IDS),
    "rows as lists": lambda: IDS.tolist(),
    "a data set": lambda: Dataset.from_list(ROWS),
    "a data set of tensors": lambda: Dataset.from_list(ROWS).with_format("torch"),
    "columns that the model does not read": lambda: Dataset.from_list(EXTRA),
    "rows with more than the model reads": lambda: EXTRA,
    "a stream": lambda: Dataset.from_list(EXTRA).to_iterable_dataset(),
    "a torch data set": Items,
    "a loader": lambda: DataLoader(Dataset.from_list(ROWS).with_format("torch"), 2),
}
TEXT_FORMS = {
    "a list of texts": lambda: TEXTS,
    "a data set of texts": lambda: Dataset.from_dict({"text": TEXTS}),
    "a stream of texts": lambda: IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
    "a column": lambda: Dataset.from_dict({"text": TEXTS})["text"],
    "an array of texts": lambda: np.array(TEXTS),
    "rows of text": lambda: [{"text": text, "url": "x"} for text in TEXTS],
    "a generator of texts": lambda: iter(TEXTS),
    "prompts": lambda: [{"prompt": text[:5], "completion": text[5:]} for text in TEXTS],
}
CHATS = {
    "messages": lambda: Dataset.from_list([{"messages": CHAT}]),
    "chats": lambda: [CHAT],
    "prompts of chats": lambda: [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
}


@pytest.fixture
def chatting(tokenizer):
    talks = copy.deepcopy(tokenizer)
    talks.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return talks


@pytest.mark.parametrize("form", TOKENS)
def test_tokens_of_every_form_score_alike(form, llama):
    expected = score_layers(llama, [{"input_ids": IDS}], progress=False)
    found = score_layers(llama, TOKENS[form](), progress=False)
    assert found.scores == pytest.approx(expected.scores, rel=1e-5)
    loss = evaluate_text(llama, [{"input_ids": IDS}])["loss"]
    assert evaluate_text(llama, TOKENS[form]())["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_texts_of_every_form_score_alike_with_a_tokenizer(form, llama, tokenizer):
    blocks = make_batches(token_sequences(TEXTS, tokenizer, 47))
    found = make_batches(TEXT_FORMS[form](), tokenizer=tokenizer, sequence_length=47)
    assert [batch["input_ids"].tolist() for batch in found] == [
        batch["input_ids"].tolist() for batch in blocks
    ]
    table = score_layers(llama, TEXT_FORMS[form](), tokenizer=tokenizer, progress=False)
    assert table.scores == score_layers(llama, blocks, progress=False).scores
    found = evaluate_text(llama, TEXT_FORMS[form](), tokenizer)
    assert found["loss"] == evaluate_text(llama, blocks)["loss"]


@pytest.mark.parametrize("form", CHATS)
def test_chats_are_written_by_the_template(form, chatting, tokenizer):
    (batch,) = make_batches(CHATS[form](), tokenizer=chatting)
    written = chatting.decode(batch["input_ids"][0])
    assert written.startswith("user: Where is the fox?\nassistant: Over the dog.")
    with pytest.raises(LayerPruneError, match="chat messages, but the tokenizer has no chat template"):
        make_batches(CHATS[form](), tokenizer=tokenizer)


def test_a_processor_brings_its_tokenizer(tokenizer):
    class Processor:
        def __init__(self):
            self.tokenizer = tokenizer

    assert make_batches(TEXTS, tokenizer=Processor())[0]["input_ids"].shape[0] == 1


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("text.txt", "is the string 'text.txt'. Give a list of texts.*load_texts"),
        (Path("text.txt"), "is the string 'text.txt'"),
        (TEXTS, r"needs a tokenizer\. Give tokenizer="),
        ([CHAT], r"needs a tokenizer"),
        (DatasetDict({"train": Dataset.from_list(ROWS)}), r"splits \['train'\]"),
        ([{"body": "x"}], r"a row with \['body'\]. Each row needs input_ids, or text"),
        (TensorDataset(IDS), "holds a Tensor|holds a tuple"),
        ([3.5], "holds a float"),
        ({"a", "b"}, "holds a set"),
        (Dataset.from_list(ROWS).to_pandas(), "holds a DataFrame"),
        (7, "holds a int"),
        (IDS.float(), "tensor of torch.float32"),
        (IDS[None], "two dimensions|shape"),
        ([{"input_ids": IDS}, ROWS[0]], "Only some entries"),
        (({"input_ids": [1, 2]} for _ in count()), r"more than 10,000 entries"),
        ([{"input_ids": IDS, "labels": torch.tensor([0, 1, 0, 1])}], "one label for each token"),
        ([""], "needs a tokenizer"),
        ([], "No calibration batches|is empty"),
    ],
)
def test_every_other_form_is_refused_with_what_is_needed(form, message, llama):
    with pytest.raises(LayerPruneError, match=message):
        score_layers(llama, form, progress=False)
    if isinstance(form, list):
        with pytest.raises(LayerPruneError, match=message):
            evaluate_text(llama, form)


def test_sources_of_unequal_length_are_padded(llama):
    rows = [{"input_ids": row[:length].tolist()} for row, length in zip(IDS, (12, 5, 9, 7), strict=True)]
    (batch,) = make_batches(rows)
    assert batch["attention_mask"].sum(1).tolist() == [12, 5, 9, 7]
    losses = [evaluate_text(llama, [row]) for row in rows]
    expected = sum(one["loss"] * one["tokens"] for one in losses) / sum(one["tokens"] for one in losses)
    assert evaluate_text(llama, rows)["loss"] == pytest.approx(expected, rel=1e-5)
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    assert make_batches(labelled)[0]["labels"][1].tolist() == rows[1]["input_ids"] + [-100] * 7
    ragged = {name: [row[name] for row in labelled] for name in ("input_ids", "labels")}
    assert evaluate_text(llama, ragged)["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_other_functions_take_the_same_forms(llama, tokenizer):
    data = Dataset.from_list(EXTRA).select_columns(["input_ids", "text"])
    assert select_layers(llama, iter(ROWS), 1, progress=False) == select_layers(
        llama, ROWS, 1, progress=False
    )
    settings = {"criterion": "block_influence", "progress": False}
    assert len(select_layers(llama, TEXTS, 2, tokenizer=tokenizer, **settings).layers) == 2
    cache_teacher_logits(llama, data, "outputs", 8)
    assert len(CachedTeacherLogits("outputs").keys) == 4
    assert evaluate_model(llama, tokenizer, data)["tokens"] == 44
    replace_by_linear_map(make_model(), 2, 1, data)


FOLDERS = count()


def train(calibration, **settings):
    args = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    pruning = LayerPruningCallback(target_layers=5, calibration=calibration)
    trainer = DistillationTrainer(
        make_model(),
        DistillationTrainingArguments(f"out-{next(FOLDERS)}", **args),
        train_dataset=Dataset.from_list(ROWS),
        callbacks=[pruning],
        **settings,
    )
    trainer.train()
    return pruning.record.phases[0].removals[0].table.scores


def test_the_callback_takes_tokens_of_every_form():
    expected = train(Dataset.from_list(ROWS))
    for form in (
        "tensor",
        "one batch",
        "a generator of batches",
        "rows with more than the model reads",
        "a stream",
    ):
        assert train(TOKENS[form]()) == pytest.approx(expected, rel=1e-5)


def test_the_callback_tokenises_text_with_the_tokenizer_of_the_trainer(chatting):
    expected = train(make_batches(TEXTS, tokenizer=chatting, sequence_length=64))
    for form in ("a list of texts", "a stream of texts", "rows of text"):
        assert train(TEXT_FORMS[form](), processing_class=chatting) == pytest.approx(expected, rel=1e-5)
    assert train(CHATS["messages"](), processing_class=chatting)
    with pytest.raises(LayerPruneError, match="processing_class= of the Trainer"):
        train(TEXTS)
    with pytest.raises(LayerPruneError, match=r"is the string 'text\.txt'"):
        train("text.txt")


def test_a_generator_serves_a_second_training():
    args = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    pruning = LayerPruningCallback(target_layers=5, calibration=iter(ROWS))
    for folder in ("one", "two"):
        data = Dataset.from_list(ROWS)
        settings = DistillationTrainingArguments(folder, **args)
        trainer = DistillationTrainer(make_model(), settings, train_dataset=data, callbacks=[pruning])
        trainer.train()
        assert len(pruning.record.phases) == 1


def test_trl_trains_on_raw_rows_and_is_calibrated_with_them(chatting):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"messages": CHAT}] * 8)
    args = SFTConfig(
        "out",
        max_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        max_length=32,
        gradient_checkpointing=None,
    )
    pruning = LayerPruningCallback(target_layers=5, calibration=rows.select(range(4)))
    SFTTrainer(make_model(), args, train_dataset=rows, processing_class=chatting, callbacks=[pruning]).train()
    assert len(pruning.record.phases) == 1


def test_the_helpers_are_public():
    Path("a.txt").write_text(TEXT)
    assert load_texts("a.txt") == [TEXT]
    assert np.ndim(make_batches(IDS)[0]["input_ids"]) == 2
