"""Vision-language models: the layers of their text decoder are removed, and the pruned model is distilled."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    cache_teacher_logits,
    load_model,
    load_rows,
    make_batches,
    prune,
    reconstruct_layers,
    remove_layers,
    score_layers,
)
from hf_layerprune.commands.cli import main
from hf_layerprune.data.texts import text_of

from .conftest import TEXT
from .tiny_vlm import make_vlm, save_pictures, save_vlm


DATA = ["--data", "text.txt", "--sequence_length", "16", "--calibration_sequences", "4"]
DATA += ["--heldout_sequences", "4"]
SHORT = ["--max_steps", "2", "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no"]
SHORT += ["--bf16", "False"]
PHASES = ["--steps_per_phase", "1", "--gradient_accumulation_steps", "1"]


@pytest.fixture
def vlm(tokenizer):
    """A folder with a tiny vision-language model and its processor, beside it text.txt."""
    save_vlm("vlm", tokenizer)
    Path("text.txt").write_text(TEXT)
    return "vlm"


def collate(folder="vlm"):
    processor = AutoProcessor.from_pretrained(folder)

    def make_batch(rows):
        pictures, texts = [Image.open(row["file"]) for row in rows], [row["text"] for row in rows]
        return dict(processor(images=pictures, text=texts, padding=True, return_tensors="pt"))

    return make_batch


def rows_with_pictures():
    return [{"file": path, "text": f"A picture <image> of number {path}"} for path in save_pictures(8)]


def check_saved(folder, layers):
    """The folder holds a plain model that reads a picture, and its processor."""
    saved = AutoModelForImageTextToText.from_pretrained(folder)
    whole = make_vlm()
    assert saved.config.text_config.num_hidden_layers == layers
    for part in ("vision_tower", "multi_modal_projector"):
        expected = getattr(whole.model, part).state_dict()
        torch.testing.assert_close(getattr(saved.model, part).state_dict(), expected, rtol=0, atol=0)
    with torch.no_grad():
        logits = saved(**collate(folder)(rows_with_pictures()[:2])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "words",
    [
        ["run", "default", "--model", "vlm"],
        ["run", "iterative", "--model", "vlm", *PHASES],
        ["distill", "vlm"],
        ["distill", "vlm", "--lora_rank", "2"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_commands_prune_and_distil_the_text_decoder(words, vlm, capsys):
    assert main([*words, *DATA, *SHORT, "--target_layers", "4", "--output_dir", "out"]) == 0
    check_saved("out", 4)
    assert "AutoModelForImageTextToText.from_pretrained" in Path("out/README.md").read_text()
    assert main(["evaluate", "vlm", "out", *DATA[:4], "--json", "e.json"]) == 0
    found = json.loads(Path("e.json").read_text())["models"]
    assert [found[name]["layers"] for name in ("vlm", "out")] == [6, 4]


def test_python_prunes_one_in_one_call(vlm):
    settings = {"sequence_length": 16, "calibration_sequences": 4, "heldout_sequences": 4, "max_steps": 2}
    settings |= {"bf16": False, "report_to": "none", "save_strategy": "no", "output_dir": "out"}
    model, record = prune("vlm", "text.txt", keep=4, **settings)
    assert type(model) is type(make_vlm())
    assert record.model["layers"] == 6
    check_saved("out", 4)


def test_teacher_and_student_see_the_pictures(vlm):
    rows, student = rows_with_pictures(), make_vlm()
    remove_layers(student, [2, 3])
    settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "remove_unused_columns": False}
    args = DistillationTrainingArguments(
        "out", max_steps=1, learning_rate=0.0, logging_steps=1, per_device_train_batch_size=8, **settings
    )
    trainer = DistillationTrainer(
        student, args, train_dataset=rows, data_collator=collate(), teacher_model=make_vlm()
    )
    batch = collate()(rows)
    with torch.no_grad():
        student_logits, logits = (model(**batch).logits[:, :-1] for model in (student, make_vlm()))
    mask = batch["attention_mask"][:, 1:].bool()
    kl = F.kl_div(student_logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none")
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(float(kl.sum(-1)[mask].mean()), rel=1e-4)


PICTURES = ["--data", "pictures.jsonl", *DATA[2:]]
QUESTION = {"role": "user", "content": "What colour is it?"}


@pytest.fixture
def pictures(vlm):
    """The vision-language model, beside it pictures.jsonl with 24 chats about a picture."""
    write_chats(save_pictures(24))
    return vlm


def write_chats(paths):
    def row(number, path):
        answer = {"role": "assistant", "content": f"Number {number}."}
        return {"images": [path], "messages": [QUESTION, answer]}

    rows = [json.dumps(row(number, path)) + "\n" for number, path in enumerate(paths)]
    Path("pictures.jsonl").write_text("".join(rows))


@pytest.mark.parametrize(
    "words",
    [
        ["run", "default", "--model", "vlm", *SHORT],
        ["run", "iterative", "--model", "vlm", *SHORT, *PHASES, "--reconstruction_layers", "1"],
        ["run", "layerchop", "--model", "vlm", *SHORT],
        ["distill", "vlm", *SHORT, "--loss_on", "completion"],
        ["distill", "vlm", *SHORT, "--lora_rank", "2"],
        ["prune", "vlm"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_commands_read_chats_about_pictures(words, pictures, capsys):
    assert main([*words, *PICTURES, "--target_layers", "4", "--output_dir", "out"]) == 0, (
        capsys.readouterr().err
    )
    check_saved("out", 4)
    record = json.loads(Path("out/layer_pruning.json").read_text())
    assert {text["name"] for text in record["texts"].values()} == {"pictures.jsonl"}
    assert main(["evaluate", "vlm", "out", *PICTURES[:4], "--json", "e.json"]) == 0
    found = json.loads(Path("e.json").read_text())["models"]
    assert all(found[name]["perplexity"] > 1 and "copying" not in found[name] for name in ("vlm", "out"))
    assert main(["card", "out", "--evaluation", "e.json"]) == 0


def test_commands_score_with_the_pictures(pictures):
    def scores():
        assert main(["score", "vlm", *PICTURES[:6], "--json", "scores.json"]) == 0
        return json.loads(Path("scores.json").read_text())["scores"]

    first = scores()
    write_chats([f"pictures/{23 - number}.png" for number in range(24)])
    assert scores() != pytest.approx(first, rel=1e-3)
    rows = list(load_rows("pictures.jsonl").select(range(4)))
    processor = AutoProcessor.from_pretrained("vlm")
    table = score_layers(load_model("vlm"), rows, tokenizer=processor, progress=False)
    assert scores() == pytest.approx({str(layer): score for layer, score in table.scores.items()}, rel=1e-4)


def test_python_and_command_give_equal_weights_on_pictures(pictures):
    settings = {"sequence_length": 16, "calibration_sequences": 4, "heldout_sequences": 4, "max_steps": 2}
    settings |= {"bf16": False, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    model, _ = prune("vlm", "pictures.jsonl", keep=4, output_dir="python", **settings)
    words = ["run", "default", "--model", "vlm", *PICTURES, *SHORT, "--target_layers", "4"]
    assert main([*words, "--output_dir", "command"]) == 0
    other = AutoModelForImageTextToText.from_pretrained("command", dtype="float32").state_dict()
    torch.testing.assert_close(model.state_dict(), other, rtol=0, atol=0)
    rows = list(load_rows("pictures.jsonl"))
    inputs = {"tokenizer": AutoProcessor.from_pretrained("vlm"), "output_dir": "loaded"}
    model, _ = prune(load_model("vlm", dtype="float32"), rows, keep=4, **inputs, **settings)
    torch.testing.assert_close(model.state_dict(), other, rtol=0, atol=0)


def test_a_trainer_reads_rows_with_pictures_by_the_processor(pictures):
    rows, student = load_rows("pictures.jsonl").select(range(8)), make_vlm()
    remove_layers(student, [2, 3])
    processor = AutoProcessor.from_pretrained("vlm")
    args = DistillationTrainingArguments(
        "out",
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        loss_on="completion",
    )
    trainer = DistillationTrainer(
        student, args, train_dataset=rows, processing_class=processor, teacher_model=make_vlm()
    )
    trainer.train()
    texts = [f"[user]<image>What colour is it?[assistant]Number {number}.<end>" for number in range(8)]
    images = [Image.open(f"pictures/{number}.png") for number in range(8)]
    batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        of_student, of_teacher = (model(**batch).logits.log_softmax(-1) for model in (student, make_vlm()))
    kl = F.kl_div(of_student, of_teacher, log_target=True, reduction="none").sum(-1)
    answer = len("Number 0.") + 1  # all have one digit; one more token ends the text
    ends = batch["attention_mask"].sum(1) - 1  # the place before each token predicts it
    counted = torch.stack([row[end - answer : end] for row, end in zip(kl, ends, strict=True)])
    assert trainer.state.log_history[0]["kl"] == pytest.approx(float(counted.mean()), rel=1e-4)


def test_a_trainer_evaluates_pictures_and_text(pictures):
    processor, rows = AutoProcessor.from_pretrained("vlm"), load_rows("pictures.jsonl")
    text = Dataset.from_list([{"text": TEXT[:40]}] * 4)
    settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "eval_strategy": "steps"}
    args = DistillationTrainingArguments("out", max_steps=1, eval_steps=1, **settings)
    data = {"train_dataset": rows.select(range(8)), "processing_class": processor}
    both = {"pictures": rows.select(range(8, 12)), "text": text}
    student = make_vlm()
    remove_layers(student, [2, 3])
    trainer = DistillationTrainer(student, args, teacher_model=make_vlm(), eval_dataset=both, **data)
    before = make_vlm().model.vision_tower.state_dict()
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if any("eval_" in name for name in entry)]
    assert {name for one in losses for name in one} >= {"eval_pictures_loss", "eval_text_loss"}
    torch.testing.assert_close(trainer.model.model.vision_tower.state_dict(), before, rtol=0, atol=0)
    assert not trainer.model.lm_head.weight.equal(make_vlm().lm_head.weight)
    tokens = Dataset.from_list([{"input_ids": [1, 2, 3]}])
    with pytest.raises(LayerPruneError, match="holds rows with pictures, and another data set holds tokens"):
        DistillationTrainer(make_vlm(), args, eval_dataset=tokens, **data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill", "vlm", "--packing", "packed"], "rows with pictures are not packed"),
        (["distill", "vlm", "--streaming", "True", "--max_steps", "2"], "and no streaming"),
        (["cache-teacher", "vlm"], "logits are cached for text alone"),
    ],
)
def test_what_pictures_cannot_do_is_said_before_weights_are_loaded(words, message, pictures, capsys):
    Path("vlm/model.safetensors").unlink()
    others = [] if words[0] == "cache-teacher" else [*PICTURES[4:], "--target_layers", "4"]
    assert main([*words, *PICTURES[:4], *others, "--output_dir", "out"]) == 2
    assert message in capsys.readouterr().err


def test_a_model_whose_processor_cannot_be_loaded_reads_text(vlm, caplog, capsys):
    Path("vlm/processor_config.json").write_text('{"processor_class": "Llava2Processor"}')
    words = ["score", "vlm", *DATA[:6], "--criterion", "block_influence"]
    assert main(words) == 0
    assert "Pictures cannot be read" not in caplog.text  # nobody asked for them
    write_chats(save_pictures(4))
    assert main(["score", "vlm", *PICTURES[:6]]) == 2
    assert "Pictures cannot be read: vlm has no image processor" in caplog.text
    assert "The data holds media in column 'images', but rows are read as text" in capsys.readouterr().err
    caplog.clear()
    Path("vlm/processor_config.json").write_text("[]")
    assert main(["score", "vlm", *PICTURES[:6]]) == 2
    assert "Pictures cannot be read: the processor of vlm fails" in caplog.text


@pytest.mark.parametrize("pictures_of_rows", [(1, 1, 1, 1), (2, 0, 1, 3)])
def test_layers_are_reconstructed_with_any_number_of_pictures(vlm, pictures_of_rows):
    paths, teacher, student = save_pictures(3), make_vlm(), make_vlm()
    rows = [{"text": "<image> " * count + "words", "images": paths[:count]} for count in pictures_of_rows]
    remove_layers(student, [3])
    batches = make_batches(rows, 2, tokenizer=AutoProcessor.from_pretrained("vlm"))
    settings = {"layers_before": 1, "layers_after": 1, "epochs": 8, "learning_rate": 1e-2, "progress": False}
    found = reconstruct_layers(student, teacher, batches, **settings)
    [window] = found.windows
    assert window.error_after < window.error_before


def test_layers_are_scored_with_pictures(vlm):
    batch = collate()(rows_with_pictures())
    other = batch | {"pixel_values": -batch["pixel_values"]}
    model = load_model("vlm")
    tables = [score_layers(model, [one], progress=False).scores for one in (batch, other)]
    assert tables[0] != pytest.approx(tables[1], rel=1e-3)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shorter = make_vlm()
    remove_layers(shorter, 2)
    with torch.no_grad():
        losses = [float(one(**batch, labels=labels).loss) for one in (shorter, model)]
    assert tables[0][2] == pytest.approx(losses[0] - losses[1], abs=1e-4)


def test_logits_are_not_cached_for_pictures(vlm):
    batch = collate()(rows_with_pictures())
    with pytest.raises(LayerPruneError, match=r"have pixel_values beside .* Give the teacher itself"):
        cache_teacher_logits(load_model("vlm"), [batch], "cached")


PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"text": "A cat.", "image": np.zeros((2, 2))}, "in column 'image'"),
        ({"prompt": "What?", "completion": "A cat.", "images": ["cat.png"]}, "in column 'images'"),
        ({"messages": [{"role": "user", "content": PARTS}]}, "as a part of type 'image' of a message"),
        ([{"role": "user", "content": PARTS}], "as a part of type 'image' of a message"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
            "as a part of type 'audio' of a message",
        ),
    ],
)
def test_rows_with_pictures_are_not_read_as_text(row, where):
    with pytest.raises(LayerPruneError, match=f"holds media {where}, but rows are read as text alone"):
        text_of(row)


def test_text_beside_pictures_is_read_where_it_is_asked_for(vlm, capsys):
    rows = [{"text": TEXT[:200], "image": "cat.png"}] * 20
    Path("pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["score", "vlm", "--data", "pictures.jsonl", *DATA[2:6], "--criterion", "block_influence"]
    assert main(words) == 2
    assert "The picture 'cat.png' cannot be read: it is no file" in capsys.readouterr().err
    assert main([*words, "--data_template", "{text}"]) == 0
    empty = {"text": "A text.", "images": [], "image": None}
    assert text_of(empty).text == "A text."
