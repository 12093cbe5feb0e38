"""Rows with pictures become batches by the processor, with labels as for text."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_layerprune import LayerPruneError, make_batches
from hf_layerprune.data.batches import regroup_batches, split_rows
from hf_layerprune.data.pictures import PictureCollator, check_pictures, holds_pictures

from ..tiny_vlm import make_processor, save_pictures


IMAGE = 258


@pytest.fixture
def processor(tokenizer):
    return make_processor(tokenizer)


def user(*parts):
    return {"role": "user", "content": [*parts]}


def text(words):
    return {"type": "text", "text": words}


def assistant(words):
    return {"role": "assistant", "content": [text(words)]}


PLACE = {"type": "image"}


def labelled(batch, tokenizer, row=0):
    labels = batch["labels"][row]
    return tokenizer.decode(labels[labels != -100])


def test_a_batch_is_that_of_the_processor_with_labels(processor):
    paths = save_pictures(2)
    rows = [{"text": "One <image> here", "images": [paths[0]]}, {"text": "And <image>", "image": paths[1]}]
    batch = PictureCollator(processor)(rows)
    pictures = [[Image.open(path)] for path in paths]
    texts = [row["text"] + "<end>" for row in rows]
    expected = processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    for name in ("input_ids", "attention_mask", "pixel_values"):
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    ignored = (expected["attention_mask"] == 0) | (expected["input_ids"] == IMAGE)
    assert (batch["labels"] == -100).equal(ignored)
    assert batch["labels"][~ignored].equal(expected["input_ids"][~ignored])
    assert int((batch["input_ids"][0] == IMAGE).sum()) > 1  # the processor replaced the place by many tokens


def test_a_row_alone_reads_as_in_a_batch(processor):
    paths = save_pictures(3)
    rows = [{"text": "x" * 5 * i + " <image>", "images": [path]} for i, path in enumerate(paths)]
    batch = PictureCollator(processor)(rows)
    for number, row in enumerate(rows):
        [alone] = make_batches([row], 1, tokenizer=processor)
        length = alone["input_ids"].shape[1]
        assert batch["input_ids"][number, :length].equal(alone["input_ids"][0])
        assert batch["labels"][number, :length].equal(alone["labels"][0])
        assert not batch["attention_mask"][number, length:].any()
        torch.testing.assert_close(batch["pixel_values"][number], alone["pixel_values"][0], rtol=0, atol=0)


def test_messages_name_their_pictures_in_all_forms(processor):
    path, *_ = save_pictures(2)
    asked, answer = text("What?"), assistant("A cat.")
    rows = [
        {"messages": [user(PLACE, asked), answer], "images": [path]},
        {
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}],
            "image": path,
        },
        {"messages": [user({"type": "image", "path": path}, asked), answer]},
        {"messages": [user({"type": "image", "image": Image.open(path)}, asked), answer]},
        {"messages": [user({"type": "image", "text": None, "url": path}, asked | {"url": None}), answer]},
        {"prompt": [user(PLACE, asked)], "completion": [answer], "images": [path]},
        {
            "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}],
            "images": [path],
        },
        [user({"type": "image", "path": path}, asked), answer],
    ]
    collate = PictureCollator(processor)
    expected = collate([{"text": "[user]<image>What?[assistant]A cat.", "images": [path]}])
    for row in rows:
        found = collate([row])
        assert found["input_ids"].equal(expected["input_ids"]), row
        assert found["pixel_values"].equal(expected["pixel_values"])


def test_pictures_come_as_paths_bytes_base64_or_pictures(processor):
    path, *_ = save_pictures(2)
    content = Path(path).read_bytes()
    forms = [path, content, Image.open(path), {"bytes": content, "path": None}, {"bytes": None, "path": path}]
    forms += [base64.b64encode(content).decode(), np.asarray(Image.open(path))]
    collate = PictureCollator(processor)
    expected = collate([{"text": "<image>", "images": [path]}])["pixel_values"]
    for form in forms:
        assert collate([{"text": "<image>", "images": [form]}])["pixel_values"].equal(expected), form
    decoded = Dataset.from_dict({"text": ["<image>"], "image": [path]}).cast_column("image", ImageFeature())
    for rows in (decoded, decoded.cast_column("image", ImageFeature(decode=False))):
        assert holds_pictures(rows, processor)
        assert collate([rows[0]])["pixel_values"].equal(expected)


@pytest.mark.parametrize("form", ["chat", "prompt", "prompt of messages"])
def test_loss_on_completions_counts_the_answer_alone(processor, tokenizer, form):
    paths = save_pictures(2)
    row = {
        "chat": {"messages": [user(PLACE, text("What?"), PLACE), assistant("A cat.")]},
        "prompt": {"prompt": "<image>What? <image>", "completion": "A cat."},
        "prompt of messages": {"prompt": [user(PLACE, PLACE)], "completion": [assistant("A cat.")]},
    }[form] | {"images": paths}
    longer = {"prompt": "<image> and a much longer question", "completion": "No.", "images": paths[:1]}
    batch = PictureCollator(processor, "completion")([row, longer])
    assert labelled(batch, tokenizer) == "A cat.<end>"
    assert labelled(batch, tokenizer, 1) == "No.<end>"


def test_all_answers_of_a_chat_count(processor, tokenizer):
    chat = [user(PLACE, text("What?")), assistant("A cat."), user(text("Sure?")), assistant("Yes.")]
    batch = PictureCollator(processor, "completion")([{"messages": chat, "images": save_pictures(1)}])
    assert labelled(batch, tokenizer) == "A cat.Yes.<end>"


def test_rows_without_a_picture_may_stand_between_others(processor):
    rows = [{"text": "No picture", "images": []}, {"text": "One <image>", "images": save_pictures(1)}]
    batch = PictureCollator(processor)(rows)
    assert len(batch["pixel_values"]) == 1
    assert len(PictureCollator(processor)(rows[:1])["input_ids"]) == 1


@pytest.mark.parametrize(
    ("row", "loss_on", "message"),
    [
        ({"text": "<image>", "images": ["none.png"]}, "all", r"picture 'none.png' cannot be read"),
        (
            {"text": "<image>", "images": [{"path": "text.png", "bytes": b"no"}]},
            "all",
            r"picture 'text.png' cannot",
        ),
        ({"text": "nothing", "images": [1]}, "all", "The processor cannot read these rows"),
        ({"messages": [user(PLACE, PLACE)], "images": ["a.png"]}, "all", "has 1 pictures, but 2 image parts"),
        ({"messages": [user(PLACE)], "images": []}, "all", "has 0 pictures, but 1 image parts"),
        ({"text": " ", "images": ["a.png"]}, "all", "A row with pictures has no text"),
        (
            {"text": "<image>", "images": ["a.png"]},
            "completion",
            "completion of a row with pictures cannot be",
        ),
        (
            {"messages": [user(), assistant("A."), user(PLACE), assistant("B.")], "images": ["a.png"]},
            "completion",
            "has a picture after the first one",
        ),
        (
            {"messages": [user({"type": "video"})], "images": []},
            "all",
            "type 'video' of a message, but .* with pict",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named_before_training(row, loss_on, message, processor):
    with pytest.raises(LayerPruneError, match=message):
        check_pictures([row], PictureCollator(processor, loss_on))


def test_later_rows_are_checked_without_reading_their_pictures(processor):
    rows = [{"text": "<image>", "images": save_pictures(1)}, {"text": "<image>", "images": ["later.png"]}]
    check_pictures(rows, PictureCollator(processor))
    with pytest.raises(LayerPruneError, match="has no text"):
        check_pictures([*rows, {"text": "", "images": []}], PictureCollator(processor))


def test_a_tokenizer_holds_no_pictures(processor, tokenizer):
    row = {"text": "<image>", "images": ["a.png"]}
    assert holds_pictures([row], processor)
    assert not holds_pictures([row], tokenizer)
    assert not holds_pictures([{"text": "words"}], processor)
    with pytest.raises(LayerPruneError, match="read as text alone"):
        make_batches([row], tokenizer=tokenizer)


def test_batches_with_pictures_are_neither_split_nor_merged():
    # As of Qwen2-VL: the patches of all pictures in a row, and the sizes of the pictures.
    def batch(*patches):
        rows, grid = len(patches), [[1, 1, count] for count in patches]
        values = {"pixel_values": torch.rand(sum(patches), 3), "image_grid_thw": torch.tensor(grid)}
        return {"input_ids": torch.zeros(rows, 4, dtype=torch.long), **values}

    batches = [batch(1, 3), batch(2, 2)]
    assert regroup_batches(batches, 1) == batches
    assert regroup_batches(batches, 10**6) == batches
    assert split_rows(batches[0], 1) == [batches[0]]
    plain = {"input_ids": torch.zeros(2, 4, dtype=torch.long)}
    assert len(split_rows(plain, 1)) == 2
