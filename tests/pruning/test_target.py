"""Targets other than a number of layers."""

import pytest

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    get_lineage,
    load_model,
    prune,
    prune_layers,
    token_sequences,
)
from hf_layerprune.commands.cli import main
from hf_layerprune.pruning.arguments import RemovalArguments, parameter_count
from hf_layerprune.pruning.target import resolve_target

from ..conftest import TEXT, make_model, tokens


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
