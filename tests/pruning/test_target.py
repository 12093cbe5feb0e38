"""Targets other than a number of layers."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    get_lineage,
    load_model,
    prune,
    prune_layers,
    remove_layers,
    token_sequences,
)
from hf_layerprune.commands.cli import main
from hf_layerprune.pruning import prune as prune_module
from hf_layerprune.pruning import target
from hf_layerprune.pruning.arguments import RemovalArguments, named_layers, parameter_count
from hf_layerprune.pruning.target import resolve_target

from ..conftest import TEXT, logits, make_model, tokens
from .test_callback import plain_trainer


def depth(model, **target):
    return resolve_target(RemovalArguments(**target), model).target_layers


def test_a_share_of_the_layers_is_rounded_down(llama):
    assert [depth(llama, target_ratio=ratio) for ratio in (0.2, 0.5, 0.75, 0.84)] == [1, 3, 4, 5]
    assert depth(make_model(num_hidden_layers=10), target_ratio=0.7) == 7


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_more_parameters_than_asked_for(family):
    sizes = {kept: make_model(family, num_hidden_layers=kept).num_parameters() for kept in (3, 4, 6)}
    if family == "gpt2":
        sizes = {kept: make_model(family, n_layer=kept).num_parameters() for kept in (3, 4, 6)}
    model = make_model(family)
    assert model.num_parameters() == sizes[6]
    assert depth(model, target_parameters=sizes[4]) == 4
    assert depth(model, target_parameters=str(sizes[4] - 1)) == 3


def test_parameters_are_written_as_people_write_them():
    assert [parameter_count(value) for value in ("2.4B", "300m", "5 K", 17)] == [
        24 * 10**8,
        3 * 10**8,
        5000,
        17,
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "target_layers is missing"),
        ({"target_layers": 4, "target_ratio": 0.5}, "target_layers and target_ratio are given. Give one"),
        ({"target_ratio": 1.0}, "target_ratio is 1.0. Choose a share between 0 and 1"),
        ({"target_ratio": 0.1}, "keeps 0 of the 6 layers"),
        ({"target_parameters": "2.4 gigs"}, "target_parameters is '2.4 gigs'. Give a number above 0"),
        ({"target_parameters": "0"}, "Give a number above 0"),
        ({"target_parameters": "7B"}, "keeps 6 of the 6 layers"),
        ({"target_parameters": "1K"}, "keeps 0 of the 6 layers"),
        ({"target_speedup": 1}, "target_speedup is 1. Choose a number above 1"),
        ({"target_speedup": 99}, "target_speedup is 99, which keeps 0 of the 6 layers"),
        ({"layers": "12-"}, "layers is '12-'. Give numbers and ranges of layers"),
        ({"layers": "4-2"}, "the smaller number first"),
        ({"layers": []}, "Give numbers and ranges"),
        ({"layers": "4-6"}, r"layers names \[6\], but the model has layers 0 to 5\."),
        ({"layers": "0-5"}, "layers is 0-5, which keeps 0 of the 6 layers"),
        ({"layers": "2", "protected": [2]}, r"layers names \[2\], which protected keeps"),
        ({"layers": "2", "target_layers": 5}, "target_layers and layers are given. Give one"),
    ],
)
def test_targets_that_cannot_be_are_refused(target, message, llama):
    with pytest.raises(LayerPruneError, match=message):
        depth(llama, **target)


def test_every_way_to_prune_takes_them(folder, tokenizer):
    model = make_model()
    record = prune_layers(model, calibration=[{"input_ids": tokens()}], target_ratio=0.5)
    assert len(get_lineage(model).kept) == record.pruning["target_layers"] == 3
    pruning = LayerPruningCallback(target_ratio=0.67, calibration=[{"input_ids": tokens()}])
    args = DistillationTrainingArguments("out", max_steps=2, report_to="none", use_cpu=True)
    rows = token_sequences([TEXT], tokenizer, 16)
    trainer = DistillationTrainer(make_model(), args, train_dataset=rows, callbacks=[pruning])
    trainer.train()
    assert pruning.record.pruning["target_layers"] == 4
    few = {"sequence_length": 16, "calibration_sequences": 4, "heldout_sequences": 4, "max_steps": 1}
    fields = few | {"bf16": False, "report_to": "none", "save_strategy": "no"}
    pruned, record = prune(folder, "text.txt", target_parameters="50K", output_dir="other", **fields)
    assert pruned.num_parameters() <= 50_000 < pruned.num_parameters() * 4 / 3
    assert record.recipe["target_layers"] == len(get_lineage(pruned).kept)
    recipe = {"target_layers": 2, "select": "greedy"}
    assert (
        len(
            prune(
                folder, "text.txt", None, recipe, target_ratio=0.5, output_dir="third", **fields
            ).record.phases
        )
        == 3
    )


def test_commands_take_them(folder, capsys):
    words = ["prune", folder, "--data", "text.txt", "--sequence_length", "16", "--output_dir", "cut"]
    assert main([*words, "--target_ratio", "0.5", "--target_layers", "3"]) == 2
    assert "--target_layers and --target_ratio are given. Give one of them." in capsys.readouterr().err
    assert main(words) == 2
    assert "--target_layers is missing" in capsys.readouterr().err
    assert main([*words, "--target_ratio", "0.5"]) == 0
    assert len(load_model("cut").model.layers) == 3


@pytest.mark.parametrize("value", ["1,3-4", ["1", "3-4"], [1, 3, 4], [1, range(3, 5)[0], "4"], " 3 - 4 , 1 "])
def test_layers_are_named_as_people_write_them(value):
    assert named_layers(value) == [1, 3, 4]


def test_named_layers_go_and_no_other(llama, monkeypatch):
    monkeypatch.setattr(prune_module, "score_layers", lambda *_, **__: pytest.fail("scored"))
    record = prune_layers(llama, calibration=[{"input_ids": tokens()}], layers="0,3-4")
    assert get_lineage(llama).kept == [1, 2, 5]
    assert [removal.original for removal in record.removals] == [0, 3, 4]
    expected = make_model()
    remove_layers(expected, [0, 3, 4])
    assert torch.equal(logits(llama, tokens()), logits(expected, tokens()))


def test_layers_are_named_by_their_original_number(llama):
    remove_layers(llama, [1, 2])
    prune_layers(llama, calibration=[{"input_ids": tokens()}], layers=[4])
    assert get_lineage(llama).kept == [0, 3, 5]
    with pytest.raises(LayerPruneError, match=r"names \[2, 4\].*Layers \[1, 2, 4\] were removed before"):
        depth(llama, layers="2-4")


def test_phases_remove_named_layers_in_the_order_of_their_scores(tokenizer):
    pruning = LayerPruningCallback(layers="1-3", calibration=[{"input_ids": tokens()}])
    args = DistillationTrainingArguments("out", max_steps=3, report_to="none", use_cpu=True)
    rows = token_sequences([TEXT], tokenizer, 16)
    trainer = DistillationTrainer(make_model(), args, train_dataset=rows, callbacks=[pruning])
    trainer.train()
    assert get_lineage(trainer.model).kept == [0, 4, 5]
    assert len(pruning.record.phases) == 3
    assert sorted(pruning.record.removals[0].table.scores) == [1, 2, 3]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_speedup_is_that_of_the_flops_of_a_forward_pass(family):
    model = make_model(family)

    def flops(model):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(input_ids=torch.zeros(1, 64, dtype=torch.long), use_cache=False)
        return counter.get_total_flops()

    whole = flops(model)
    for layers in ([5], [1, 2, 3]):
        shorter = make_model(family)
        remove_layers(shorter, layers)
        speedup = whole / flops(shorter)
        assert depth(model, target_speedup=speedup - 1e-3) == 6 - len(layers)
        assert depth(model, target_speedup=speedup + 1e-3) == 5 - len(layers)


def test_a_speedup_that_cannot_be_counted_is_refused(llama, monkeypatch):
    def refuse(*_, **__):
        raise LayerPruneError("It does not run.")

    monkeypatch.setattr(target, "measure_footprint", refuse)
    with pytest.raises(LayerPruneError, match=r"FLOPs cannot be counted\. It does not run\. Set"):
        depth(llama, target_speedup=1.5)


FEW = ["--data", "text.txt", "--sequence_length", "16", "--calibration_sequences", "4"]
FEW += ["--heldout_sequences", "4", "--output_dir", "out"]
SHORT = ["--max_steps", "2", "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no"]
SHORT += ["--bf16", "False"]


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "model"],
        ["run", "default", "--model", "model", *SHORT],
        ["run", "streamline", "--model", "model", "--replacement", "none", *SHORT],
        ["run", "sleb", "--model", "model"],
        ["distill", "model", *SHORT],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_commands_take_named_layers(words, folder, capsys):
    assert main([*words, *FEW, "--layers", "2-3"]) == 0
    assert get_lineage(load_model("out")).kept == [0, 1, 4, 5]
    printed = capsys.readouterr().out
    assert all(number in printed for number in (["2", "3"] if words[0] == "distill" else ["2, 3"]))
    assert Path("out/README.md").is_file()


def test_commands_take_a_speedup(folder, capsys):
    assert main(["plan", folder, "--target_speedup", "1.5"]) == 0
    printed = capsys.readouterr().out
    [faster] = re.findall(r"pruned model is ([0-9.]+) times as fast", printed)
    assert float(faster) >= 1.5
    assert main(["prune", folder, *FEW, "--target_speedup", "1.5", "--criterion", "positional"]) == 0
    assert f"6 -> {len(load_model('out').model.layers)} layers" in printed
    assert main(["plan", folder, "--target_ratio", "0.5"]) == 0
    assert "6 -> 3 layers" in capsys.readouterr().out


def test_prune_takes_named_layers_and_gives_the_recipe_with_them(folder):
    fields = {"sequence_length": 16, "calibration_sequences": 4, "heldout_sequences": 4, "max_steps": 0}
    fields |= {"bf16": False, "output_dir": "out"}
    model, record = prune(folder, "text.txt", layers=[2, 3], **fields)
    assert get_lineage(model).kept == [0, 1, 4, 5]
    assert record.recipe["target_layers"] == 4
    with pytest.raises(LayerPruneError, match=r"block of 2 consecutive .* only layers \[1, 3\] may go"):
        prune(folder, "text.txt", layers=[1, 3], **fields | {"output_dir": "other"})


def heal(model, target, resume=None):
    """Prunes a model in a plain Trainer of four steps, and gives its weights."""
    callback = LayerPruningCallback(
        calibration=[{"input_ids": tokens(4, 12)}], criterion="block_influence", **target
    )
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    plain_trainer(model, callback, **settings).train(resume_from_checkpoint=resume)
    return model.state_dict()


@pytest.mark.parametrize("target", [{"layers": "2,4"}, {"target_ratio": 0.7}])
def test_a_plain_trainer_resumes_with_the_target_of_its_start(llama, target):
    whole = heal(llama, target)
    for step in (1, 3):
        model = AutoModelForCausalLM.from_pretrained(f"out/checkpoint-{step}")
        torch.testing.assert_close(heal(model, target, f"out/checkpoint-{step}"), whole, rtol=0, atol=0)


def test_a_plain_trainer_does_not_resume_with_other_layers(llama):
    heal(llama, {"layers": "2,4"})
    message = "began with protected_originals=[0, 1, 3, 5], not [0, 1, 2, 5]"
    for step in (1, 3):
        model = AutoModelForCausalLM.from_pretrained(f"out/checkpoint-{step}")
        with pytest.raises(LayerPruneError, match=re.escape(message)):
            heal(model, {"layers": "3-4"}, f"out/checkpoint-{step}")
