"""Rows with pictures become batches by the processor, with labels as for text."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import processors

from hf_layerprune import LayerPruneError, make_batches
from hf_layerprune.data.batches import regroup_batches, split_rows
from hf_layerprune.data.pictures import PictureCollator, check_pictures, hold_pictures, picture_dataset
from hf_layerprune.data.processes import split_for_processes

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


def said(speaker, words):
    return {"from": speaker, "value": words}


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
        {"conversations": [said("human", "What?"), said("gpt", "A cat.")], "images": [path]},
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
        assert hold_pictures(rows)
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
        ({"text": "nothing", "images": [1]}, "all", "picture '1' cannot be read"),
        ({"text": "<image> <image>", "images": ["a.png"]}, "all", "has 1 pictures, but 2 places"),
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


def test_only_rows_with_a_picture_hold_pictures(processor, tokenizer):
    row = {"text": "<image>", "images": ["a.png"]}
    empty = {"text": "words", "images": []}
    parts = {"messages": [user({"type": "image", "url": "a.png"}, text("What?"))]}
    for rows, holds in (
        ([row], True),
        ([empty, row], True),
        ([empty], False),
        ([parts], True),
        ([{"text": "words", "image": None}], False),
        ([{"text": "words", "image": "a.png"}], True),
        ([{"messages": [{"role": "user", "content": "words"}]}], False),
        ([{"text": "words"}], False),
    ):
        assert hold_pictures(rows) == holds, rows
        assert hold_pictures(Dataset.from_list(rows)) == holds, rows
    mixed = Dataset.from_list([empty, row, empty, row])
    assert hold_pictures(mixed.select([3, 0]))
    assert not hold_pictures(mixed.select([2, 0]))  # by indices into the whole table
    with pytest.raises(LayerPruneError, match="read as text alone"):
        make_batches([row], tokenizer=tokenizer)
    rows = [{"text": "words " * 20, "images": []}]
    batch, *_ = make_batches(rows, tokenizer=processor, sequence_length=16)
    assert batch["input_ids"].shape[1] == 16  # text alone is joined and cut


def test_chats_of_plain_text_are_not_read_for_pictures(monkeypatch):
    plain = [
        {"messages": [{"role": "user", "content": "words"}]},
        {"conversations": [said("human", "words")]},
        {"prompt": "words", "completion": "more"},
    ]
    read = []
    monkeypatch.setattr("hf_layerprune.data.pictures.pictures_of", lambda row: read.append(row) or [])
    for row in plain:
        assert not hold_pictures(Dataset.from_list([row] * 3))
    assert not read
    parts = {"prompt": [user(text("words"))], "completion": [assistant("more")]}
    assert not hold_pictures(Dataset.from_list([parts] * 3))
    assert len(read) == 3


def test_marks_in_plain_text_are_the_places(processor):
    path, other = save_pictures(2)
    rows = [
        {
            "image": path,
            "conversations": [said("human", "<image>\nWhat?"), said("gpt", "A.")],
        },
        {"images": [path, other], "messages": [{"role": "user", "content": "Is <image> like <image>?"}]},
    ]
    texts = ["[user]<image>\nWhat?[assistant]A.<end>", "[user]Is <image> like <image>?<end>"]
    assert [PictureCollator(processor).text_of(row).text for row in rows] == texts


def test_rows_in_memory_of_different_forms_are_one_data_set(processor):
    path, other = save_pictures(2)
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    rows = [
        {"messages": chat},
        {"messages": [user(PLACE, text("What?")), assistant("A cat.")], "images": [Image.open(path)]},
        {"messages": chat, "image": np.asarray(Image.open(other))},
        [user({"type": "image", "path": path}, text("What?")), assistant("A cat.")],
        {"text": "<image> alone", "images": [path]},
    ]
    collate, made = PictureCollator(processor), picture_dataset(rows)
    check_pictures(made, collate)
    for found, row in zip(made, rows, strict=True):
        expected = collate([row])
        given = collate([found])
        assert given["input_ids"].equal(expected["input_ids"])
        assert given.keys() == expected.keys()
        if "pixel_values" in expected:
            assert given["pixel_values"].equal(expected["pixel_values"])
    with pytest.raises(LayerPruneError, match="rows with pictures differ in form"):
        picture_dataset([{"prompt": "a", "images": [path]}, {"prompt": chat[:1], "images": [path]}])


def test_checking_rows_decodes_one_picture(processor, monkeypatch):
    pictures = [Image.fromarray(np.zeros((4, 4, 3), "uint8"))]
    rows = Dataset.from_list([{"text": "<image>", "images": pictures} for _ in range(8)])
    decoded = []
    decode = ImageFeature.decode_example

    def counted(*args, **others):
        decoded.append(1)
        return decode(*args, **others)

    monkeypatch.setattr(ImageFeature, "decode_example", counted)
    check_pictures(rows, PictureCollator(processor))
    assert not decoded  # the first picture is read from its bytes
    rows[0]
    assert decoded


def test_a_beginning_of_text_token_is_added_once(processor):
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    backend = tokenizer.backend_tokenizer
    begin = tokenizer.bos_token_id
    special = [("<begin>", begin)]
    backend.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=special)
    rows = [{"text": "<image>", "images": save_pictures(1)}, {"text": "<begin>words", "images": []}]
    collate = PictureCollator(processor, "all")
    for given in (rows[:1], rows[1:], rows):
        batch = collate(given)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist().count(begin) == 1
            assert ids[0] == begin
    answers = [{"prompt": "<image>What?", "completion": "A.", "images": rows[0]["images"]}]
    answers += [{"prompt": "<begin>Is?", "completion": "No."}]
    batch = PictureCollator(processor, "completion")(answers)
    assert [labelled(batch, tokenizer, row) for row in (0, 1)] == ["A.<end>", "No.<end>"]


def test_a_tokenizer_without_padding_token_pads_with_its_last(processor):
    processor.tokenizer.pad_token = None
    rows = [{"text": "short <image>", "images": save_pictures(1)}, {"text": "much longer", "images": []}]
    batch = PictureCollator(processor)(rows)
    assert (batch["labels"] == -100).sum() == 4 + int((batch["attention_mask"] == 0).sum())


def test_a_chat_template_of_the_tokenizer_is_enough(processor):
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    row = {"messages": [user(PLACE, text("What?"))], "images": save_pictures(1)}
    assert PictureCollator(processor).text_of(row).text == "[user]<image>What?<end>"


def test_paligemma_is_refused():
    class PaliGemmaProcessor:
        pass

    with pytest.raises(LayerPruneError, match="both directions"):
        PictureCollator(PaliGemmaProcessor())


def test_batches_with_pictures_are_neither_split_nor_merged(monkeypatch):
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
    monkeypatch.setattr("hf_layerprune.data.processes.process_count", lambda: 2)
    assert split_for_processes(batches[:1]) == batches[:1]
    assert len(split_for_processes([plain])) == 2
