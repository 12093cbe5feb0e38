import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_layerprune import (
    DistillationTrainer,
    LayerPruneError,
    get_lineage,
    prune,
    reconstruct_layers,
    remove_layers,
    score_layers,
)
from hf_layerprune.commands.cli import main
from hf_layerprune.data.batches import make_batches
from hf_layerprune.data.sequences import split_sequences, token_sequences
from hf_layerprune.data.texts import load_texts
from hf_layerprune.distillation import window_training
from hf_layerprune.distillation.learning_rate import healing_learning_rate
from hf_layerprune.distillation.reconstruction import mean_kl
from hf_layerprune.evaluation.evaluate import evaluate_text
from hf_layerprune.pruning.linear_map import replace_by_linear_map
from hf_layerprune.pruning.replacement import replace_block
from hf_layerprune.recipes import run as recipe_run
from hf_layerprune.recipes.recipe import SHIPPED, read_recipe, shipped_recipes
from hf_layerprune.reports.record import RunRecord, read_record, write_record

from ..conftest import logits, make_model, tokens


TEXT = "\n".join(f"Line {i} of a text that says little about the number {i * i}." for i in range(200))


@pytest.fixture(scope="module")
def trained(tokenizer):
    """A function that gives the tiny model, trained for some seconds so that its layers differ."""
    model = make_model()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    for _ in range(300):
        batch = ids[torch.randint(len(ids), (16,), generator=generator)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1.5
    return lambda: copy.deepcopy(model.eval())


@pytest.fixture
def folder(tokenizer, trained):
    trained().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("text.txt").write_text(TEXT)
    return "model"


DATA = ["--model", "model", "--data", "text.txt", "--keep", "3"]
SMALL = [
    "--sequence_length",
    "16",
    "--calibration_sequences",
    "8",
    "--heldout_sequences",
    "8",
    "--output_dir",
    "out",
]
SHORT = ["--max_steps", "6", "--per_device_train_batch_size", "4", "--bf16", "False", "--use_cpu", "True"]
SHORT += ["--gradient_accumulation_steps", "1", "--report_to", "none", "--learning_rate", "1e-2"]
SHORT += ["--save_strategy", "no"]


def run(*words):
    return main(["run", *words])


def blocks(tokenizer):
    """As the command cuts the text."""
    return split_sequences(token_sequences(load_texts("text.txt"), tokenizer, 16), 8, 8)


def repeated(text):
    """The training rows of `default`: one in eight reads its first half twice."""

    def twice(row, place):
        again = {name: values[:9] + values[1:8] for name, values in row.items()}
        return again if place % 8 == 7 else row

    return text.map(twice, with_indices=True)


def result():
    model = AutoModelForCausalLM.from_pretrained("out").eval()
    assert model.config.use_cache is True
    assert model.generate(tokens()[:1, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)
    return model, read_record("out").to_dict()


def test_every_shipped_recipe_is_of_known_fields_and_says_where_it_is_from():
    for name in shipped_recipes():
        fields = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
        assert fields["paper"].startswith("https://arxiv.org/abs/")
        assert fields["title"]
        assert ("model" in fields) == name.endswith("-small")


def test_shortgpt_takes_the_least_block_influences_at_once(folder, tokenizer, capsys, trained):
    assert run("shortgpt", *DATA, *SMALL) == 0
    model, record = result()
    batches = make_batches(blocks(tokenizer)[0], 4)
    reference, hidden = trained(), []
    with torch.no_grad():
        for batch in batches:
            hidden.append(
                reference(**{"input_ids": batch["input_ids"]}, output_hidden_states=True).hidden_states
            )
    influence = {
        i: 1
        - torch.cat([F.cosine_similarity(h[i], h[i + 1], dim=-1).flatten() for h in hidden]).mean().item()
        for i in range(1, 5)
    }
    least = sorted(influence, key=influence.get)[:3]
    assert get_lineage(model).removed == sorted(least)
    [phase] = record["phases"]
    for removal in phase["removals"]:
        assert removal["score"] == pytest.approx(influence[removal["original"]], abs=1e-5)
    remove_layers(reference, least)
    assert torch.equal(logits(model, tokens()), logits(reference, tokens()))
    assert "not healed" in Path("out/README.md").read_text()
    assert "| perplexity |" in capsys.readouterr().out


def test_layerchop_drops_its_pattern_and_goes_on_with_the_text(folder, tokenizer, trained):
    assert run("layerchop", *DATA, *SMALL, *SHORT) == 0
    model, record = result()
    assert get_lineage(model).kept == [0, 2, 5]  # evenly from the first to the last
    cut, healed = record["phases"][0]["cut"], record["phases"][0]["healed"]
    assert healed["perplexity"] < cut["perplexity"]
    # The first loss is that of the cut model on the labels alone.
    reference = trained()
    remove_layers(reference, [1, 3, 4])
    held = make_batches(blocks(tokenizer)[1], 4)
    assert cut["loss"] == pytest.approx(evaluate_text(reference, held)["loss"], abs=1e-5)
    assert "healed on text" in Path("out/README.md").read_text()
    assert record["training"]["ce_weight"] == 1.0


def test_sleb_scores_again_after_each_layer(folder, tokenizer, trained):
    assert run("sleb", *DATA, *SMALL) == 0
    model, record = result()
    reference, removed = trained(), []
    for _ in range(3):
        kept = get_lineage(reference).kept
        losses = {}
        for layer in range(1, len(kept) - 1):
            without = copy.deepcopy(reference)
            remove_layers(without, layer)
            losses[layer] = evaluate_text(without, make_batches(blocks(tokenizer)[0], 4))["loss"]
        least = min(losses, key=losses.get)
        removed.append(kept[least])
        remove_layers(reference, least)
    assert [one["original"] for phase in record["phases"] for one in phase["removals"]] == removed
    assert torch.equal(logits(model, tokens()), logits(reference, tokens()))


def test_layerchop_step_by_step(folder):
    flags = ["--select", "phases", "--pattern", "input", "--steps_per_phase", "2"]
    assert run("layerchop", *DATA, *SMALL, *SHORT, *flags) == 0
    model, record = result()
    assert get_lineage(model).kept == [0, 4, 5]
    assert [phase["step"] for phase in record["phases"]] == [0, 2, 4]
    assert not any("kl" in entry for entry in record["log"])  # nothing teaches


def test_the_deepest_go_and_head_and_last_three_are_trained(folder, trained):
    assert run("deepest", *DATA, *SMALL, *SHORT) == 0
    model, _ = result()
    assert get_lineage(model).kept == [0, 1, 5]
    before = dict(trained().named_parameters())
    changed = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert "lm_head.weight" in changed
    assert "model.embed_tokens.weight" not in changed


@pytest.mark.parametrize("loss", ["mse", "lm", "kl"])
@pytest.mark.parametrize("kind", ["layer", "swiglu"])
def test_llm_streamline_replaces_the_run_and_trains_only_that(folder, tokenizer, kind, loss, trained):
    flags = ["--replacement", kind, "--replacement_loss", loss, "--lr_scheduler_type", "constant"]
    flags += ["--lr_scheduler_kwargs", "{}", "--warmup_steps", "0"]
    assert run("streamline", *DATA, *SMALL, *SHORT, *flags) == 0
    model, record = result()
    calibration, held, _ = blocks(tokenizer)
    reference = trained()
    # Three layers are left, of which one stands for a run of four: there is only one such run.
    table = score_layers(
        reference, make_batches(calibration, 4), "block_influence", block_size=4, progress=False
    )
    assert table.ranking()[0] == 1
    new = replace_block(reference, 1, 4, kind)
    start = evaluate_text(reference, make_batches(held, 4))["loss"]
    if kind == "layer":
        without = trained()
        remove_layers(without, [2, 3, 4])
        assert start == pytest.approx(evaluate_text(without, make_batches(held, 4))["loss"], abs=1e-6)
        assert record["phases"][0]["cut"]["loss"] == pytest.approx(start, abs=1e-5)
    names = {n for n, p in reference.named_parameters() if any(p is one for one in new)}
    original = trained()
    keep = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in names and ".layers." not in name:
            assert torch.equal(parameter, keep[name]), name
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, original.model.layers[5].mlp.up_proj.weight)
    assert not torch.equal(
        model.model.layers[1].mlp.up_proj.weight, reference.model.layers[1].mlp.up_proj.weight
    )
    assert get_lineage(model).kept == [0, 4, 5]
    assert record["recipe"].get("replacement_loss", "mse") == loss
    weights = {name: record["training"].get(name) for name in ("kl_weight", "ce_weight", "hidden_weight")}
    assert (
        weights
        == {
            "mse": {"kl_weight": 0.0, "ce_weight": None, "hidden_weight": 1.0},
            "lm": {"kl_weight": 0.0, "ce_weight": 1.0, "hidden_weight": None},
            "kl": {"kl_weight": None, "ce_weight": None, "hidden_weight": None},
        }[loss]
    )


def test_replaceme_is_the_closed_form_map(folder, tokenizer, trained):
    assert run("replaceme", *DATA, *SMALL) == 0
    model, record = result()
    batches = make_batches(blocks(tokenizer)[0], 4)
    reference = trained()
    table = score_layers(reference, batches, "block_influence", block_size=3, progress=False)
    first = table.ranking()[0]
    replace_by_linear_map(reference, first, 3, batches)
    assert torch.equal(logits(model, tokens()), logits(reference, tokens()))
    assert [one["original"] for one in record["phases"][0]["removals"]] == [first, first + 1, first + 2]
    assert record["pruning"]["replacement"] == "linear"


def test_iterative_is_that_of_distill(folder, tokenizer):
    flags = ["--steps_per_phase", "2", "--loss_preset", "paper", "--trainable", "all"]
    short = [word for word in SHORT if word not in ("--max_steps", "6")]
    assert run("iterative", *DATA, *SMALL, *short, *flags, "--restart_learning_rate", "False") == 0
    model, record = result()
    ours = logits(model, tokens())
    assert [phase["step"] for phase in record["phases"]] == [0, 2, 4]
    same = ["distill", "model", "--data", "text.txt", "--target_layers", "3", *SMALL[:-2], *short, *flags]
    same += ["--max_steps", "6", "--lr_scheduler_type", "cosine", "--warmup_steps", "0.004"]
    same += ["--weight_decay", "0.05", "--max_grad_norm", "0.3", "--output_dir", "other"]
    assert main(same) == 0
    other = AutoModelForCausalLM.from_pretrained("other").eval()
    assert get_lineage(other) == get_lineage(model)
    torch.testing.assert_close(ours, logits(other, tokens()), rtol=0, atol=1e-6)
    assert "Iterative Layer-wise Distillation" in Path("out/README.md").read_text()


def test_a_recipe_of_ones_own_and_its_way_into_record_and_card(folder):
    Path("mine.yaml").write_text(
        "title: Mine\npaper: https://example.org\nselect: greedy\ncriterion: kl\nkeep: 4\nmax_steps: 0\n"
        "sequence_length: 16\ncalibration_sequences: 4\nheldout_sequences: 4\nprotected: [0, 5]\n"
    )
    assert (
        run("mine.yaml", "--model", "model", "--data", "text.txt", "--output_dir", "out", "--keep", "5") == 0
    )
    model, record = result()
    assert len(get_lineage(model).kept) == 5
    recipe = record["recipe"]
    assert recipe["title"] == "Mine"
    assert recipe["target_layers"] == 5
    assert recipe["protected"] == [0, 5]
    card = Path("out/README.md").read_text()
    text = card.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(text) == recipe
    # It can be run again as it stands in the card.
    Path("again.yaml").write_text(text)
    assert run("again.yaml", "--model", "model", "--data", "text.txt", "--output_dir", "again") == 0
    again = AutoModelForCausalLM.from_pretrained("again").eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1e-3", "there is no field 'learnig_rate'. Did you mean learning_rate?"),
        ("qqqq: 1", "there is no field 'qqqq'."),
        ("learning_rate: fast", "learning_rate is 'fast', but must be a number"),
        ("keep: true", "keep is True, but must be a whole number"),
        ("select: best", "select is 'best'. Choose from phases, greedy"),
        ("select: [greedy]\nkeep: [3, 4]", "select is .'greedy'., but must be text"),
        ("!!python/object/apply:os.system ['true']", "is not plain YAML"),
        ("just words", "is no recipe"),
        ("a: [", "is not plain YAML"),
        ("select: greedy\nreplacement: layer", "Set select to block"),
        ("select: block\nreplacement: layer\nreplacement_layers: 9", "replacement_layers is 9: it must be"),
        ("select: block\nreplacement: ffn\nmax_steps: 0", "are gated. Use swiglu"),
        ("select: one_shot\ncriterion: positional\npattern: max-gap\nkeep: 1", "only 4 can be"),
        ("select: greedy\ncriterion: positional\npattern: max-gap", "places all layers together"),
        ("select: block\nkeep: 7", "--target_layers is 7"),
        ("select: phases\nmax_steps: 0", "select phases trains between"),
        ("select: phases\nlora_rank: 4", "there is no field 'lora_rank'"),
        ("select: greedy\nsteps_per_phase: 4", "no use for --steps_per_phase with --select greedy"),
        ("select: one_shot\nlayers_per_phase: 0.3", "no use for --layers_per_phase with --select one_shot"),
        ("select: block\nreplacement: layer\nresume_from_checkpoint: 'True'", "cannot be resumed"),
    ],
)
def test_mistakes_in_a_recipe_are_told(folder, capsys, text, message):
    Path("bad.yaml").write_text(
        text + ("" if "keep" in text else "\nkeep: 3" if ":" in text and "!!" not in text else "")
    )
    assert run("bad.yaml", "--model", "model", "--data", "text.txt", *SMALL) == 2
    error = capsys.readouterr().err
    assert pytest.importorskip("re").search(message, error), error
    assert not Path("out/config.json").exists()


def test_what_is_no_recipe_is_told(folder, capsys):
    for words in (["nothing"], ["--model", "model"], [], ["--learning_rate"]):
        assert run(*words) == 2
        assert "shortgpt" in capsys.readouterr().err


# All blocks in one batch, so that their order does not matter.
WHOLE = [
    "--max_steps",
    "4",
    "--per_device_train_batch_size",
    "4096",
    "--max_grad_norm",
    "0",
    "--learning_rate",
]
WHOLE += ["1e-3", "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}", "--warmup_steps", "0"]
WHOLE += ["--weight_decay", "0", "--logging_steps", "1"]


def by_hand(model, parameters, loss):
    """Four steps of AdamW, and the loss before each."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), []
    for _ in range(4):
        found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    return losses


def compare(losses):
    model, record = result()
    logged = [entry["loss"] for entry in record["log"] if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    return model


@pytest.mark.parametrize("recipe", ["layerchop", "deepest"])
def test_healing_on_text_is_that_of_a_plain_loop(folder, tokenizer, trained, recipe):
    assert run(recipe, *DATA, *SMALL, *SHORT, *WHOLE) == 0
    reference = trained()
    remove_layers(reference, [1, 3, 4] if recipe == "layerchop" else [2, 3, 4])
    ids = torch.tensor(blocks(tokenizer)[2]["input_ids"])

    def loss():
        logits = reference(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    parameters = list(reference.parameters())
    if recipe == "deepest":  # the head and the last three layers, which are all that is left
        parameters = [*reference.model.layers.parameters(), *reference.lm_head.parameters()]
    model = compare(by_hand(reference, parameters, loss))
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["layer", "swiglu"])
def test_training_a_replacement_is_that_of_a_plain_loop(folder, tokenizer, trained, kind):
    """Against the states that the run gave, all in memory."""
    assert run("streamline", *DATA, *SMALL, *SHORT, *WHOLE, "--replacement", kind, "--keep", "4") == 0
    calibration, _, text = blocks(tokenizer)
    reference, original = trained(), trained()
    batches = make_batches(calibration, 4)
    table = score_layers(reference, batches, "block_influence", block_size=3, progress=False)
    first = table.ranking()[0]
    torch.manual_seed(42)  # as the arguments' seed; what is new in a swiglu is drawn at random
    parameters = replace_block(reference, first, 3, kind)
    ids = torch.tensor(text["input_ids"])
    with torch.no_grad():
        wanted = original(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[first + 3]
    start = [parameter.detach().clone() for parameter in parameters]

    def loss():
        # The state after a layer; the labels of the last position of a row are not there.
        found = reference(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[first + 1]
        return F.mse_loss(found[:, :-1], wanted[:, :-1])

    model, record = result()
    logged = [entry["loss"] for entry in record["log"] if "loss" in entry]
    if kind == "swiglu":
        # Begin as the command did: its first loss is that of leaving the run out, whatever was drawn.
        assert logged[0] == pytest.approx(loss().item(), rel=1e-4)
        assert logged[-1] < logged[0]
        return
    losses = by_hand(reference, parameters, loss)
    compare(losses)
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=0, atol=2e-3)
    assert not torch.equal(start[0], parameters[0])


def test_text_may_be_streamed(folder, tokenizer, trained):
    """The first blocks are set apart; what follows is trained on in its order, and never all in memory."""
    stream = ["--streaming", "True", "--logging_steps", "1"]
    assert run("layerchop", *DATA, *SMALL, *SHORT, *stream) == 0
    model, record = result()
    assert get_lineage(model).kept == [0, 2, 5]
    reference = trained()
    remove_layers(reference, [1, 3, 4])
    text = token_sequences(load_texts("text.txt"), tokenizer, 16)["input_ids"]
    first = torch.tensor(text[16:20])
    expected = F.cross_entropy(logits(reference, first)[:, :-1].flatten(0, 1), first[:, 1:].flatten()).item()
    assert record["log"][0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert run("layerchop", *DATA, *SMALL[:-1], "other", *SHORT, *stream, "--max_steps", "-1") == 2
    distill = ["distill", "model", "--data", "text.txt", "--target_layers", "4", *SMALL[:-1], "third"]
    assert main([*distill, *SHORT, *stream]) == 0
    assert AutoModelForCausalLM.from_pretrained("third").config.num_hidden_layers == 4


def test_the_default_is_a_linear_map_and_a_plain_loop_against_the_original(folder, tokenizer, trained):
    assert run("default", *DATA, *SMALL, *SHORT, *WHOLE, "--reconstruction_layers", "0") == 0
    calibration, _, text = blocks(tokenizer)
    reference, original = trained(), trained()
    batches = make_batches(calibration, 4)
    first = score_layers(reference, batches, "block_influence", block_size=3, progress=False).ranking()[0]
    replace_by_linear_map(reference, first, 3, batches)
    ids = torch.tensor(repeated(text)["input_ids"])
    wanted = logits(original, ids)[:, :-1].log_softmax(-1).flatten(0, 1)

    def loss():
        found = reference(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    model = compare(by_hand(reference, list(reference.parameters()), loss))
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("recipe", ["default", "layerchop"])
def test_removal_at_once_resumes_in_training_to_the_same_weights(folder, recipe):
    words = [recipe, *DATA, *SMALL, *SHORT, "--save_strategy", "steps", "--save_steps", "2"]
    assert run(*words) == 0
    first, record = result()
    for gone in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(Path("out", gone))
    for gone in ("model.safetensors", "config.json"):
        Path("out", gone).unlink()
    write_record(RunRecord.from_dict(record | {"finished": False, "log": []}), "out")
    assert run(*words, "--resume") == 0
    again, resumed = result()
    assert resumed["resumed_at"] == "checkpoint-2"
    assert resumed["finished"]
    weights = first.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())
    assert [e["loss"] for e in resumed["log"] if "loss" in e] == [
        e["loss"] for e in record["log"] if "loss" in e
    ]


def test_a_recipes_own_schedule_is_kept_and_runs_again_from_the_card(folder):
    """PyYAML takes 5e-5, which is a number in YAML 1.2, for a word."""
    assert run("streamline", *DATA, *SMALL, *SHORT) == 0
    model, record = result()
    assert record["recipe"]["lr_scheduler_kwargs"] == {"min_lr": 5e-5}
    assert not {"use_cpu", "dataloader_pin_memory"} & set(record["recipe"])
    Path("again.yaml").write_text(yaml.safe_dump(record["recipe"]))
    words = ["--model", "model", "--data", "text.txt", "--output_dir", "again"]
    assert run("again.yaml", *words) == 0
    again = AutoModelForCausalLM.from_pretrained("again").eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_what_is_healed_is_measured_as_what_was_cut(folder, tokenizer):
    """In the model's own precision, not in that of the training."""
    assert run("shortgpt", *DATA, *SMALL, *SHORT, "--bf16", "True") == 0
    model, record = result()
    held = make_batches(blocks(tokenizer)[1], 8)
    assert record["phases"][-1]["healed"]["loss"] == pytest.approx(
        evaluate_text(model, held)["loss"], abs=1e-6
    )


def test_a_run_goes_on_only_as_it_began_and_until_it_is_finished(folder, capsys):
    words = ["default", *DATA, *SMALL, *SHORT, "--save_strategy", "steps", "--save_steps", "2"]
    assert run(*words) == 0
    assert run(*words, "--keep", "4", "--resume") == 2
    assert "began with --target_layers 3, not 4" in capsys.readouterr().err
    assert run(*words, "--criterion", "loss", "--resume") == 2
    assert "began with --criterion block_influence, not loss" in capsys.readouterr().err
    for checkpoint in Path("out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for recipe in ("default", "layerchop"):
        assert run(recipe, *words[1:], "--resume") == 2
        assert "No checkpoint to resume from in out" in capsys.readouterr().err
    assert result()[1]["finished"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibration_sequences", "10", "--heldout_sequences", "BLOCKS"], "none is left to train on"),
        (["--eval_strategy", "steps"], "--eval_strategy is set, but a recipe evaluates"),
        (["--report_to", "nothing"], "nothing is not supported"),
        (["--per_device_eval_batch_size", "0"], "batch size is 0"),
    ],
)
def test_what_cannot_be_trained_is_told(folder, tokenizer, capsys, flags, message):
    count = len(token_sequences(load_texts("text.txt"), tokenizer, 16)) - 10
    flags = [str(count) if word == "BLOCKS" else word for word in flags]
    assert run("shortgpt", *DATA, *SMALL, *SHORT, *flags) == 2
    assert message in capsys.readouterr().err


RECONSTRUCTED = ["--reconstruction_layers", "1", "--reconstruction_epochs", "3"]


def test_reconstruction_comes_between_cut_and_distillation(folder, tokenizer, trained):
    """On the tokens that distillation reads, or on the first of them."""
    words = [*SHORT, "--max_steps", "3", *RECONSTRUCTED, "--reconstruction_learning_rate", "2e-3"]
    assert run("default", *DATA, *SMALL, *words, "--kl_weight", "0", "--ce_weight", "1e-30") == 0
    calibration, _, text = blocks(tokenizer)
    reference, original = trained(), trained()
    batches = make_batches(calibration, 4)
    first = score_layers(reference, batches, "block_influence", block_size=3, progress=False).ranking()[0]
    replace_by_linear_map(reference, first, 3, batches)
    rows = make_batches(repeated(text).shuffle(seed=42).select(range(12)), 4)
    settings = {"epochs": 3, "learning_rate": 2e-3, "seed": 42, "progress": False}
    expected = reconstruct_layers(reference, original, rows, **settings)
    model, record = result()
    found = record["phases"][-1]["reconstruction"]
    assert found["tokens"] == 3 * 4 * 16
    assert found["kl_after"] == pytest.approx(expected.kl_after, rel=1e-3)
    assert found["windows"][0]["error_after"] < found["windows"][0]["error_before"]
    assert found["seconds"] > 0
    for name in ("reconstruction_layers", "reconstruction_epochs", "reconstruction_learning_rate"):
        assert name in record["recipe"]
    assert get_lineage(model).kept == get_lineage(reference).kept


def test_reconstruction_alone_trains_nothing_else(folder, tokenizer, trained):
    words = [*SHORT, "--max_steps", "0", *RECONSTRUCTED, "--reconstruction_tokens", "256"]
    assert run("shortgpt", *DATA, *SMALL, *words) == 0
    model, record = result()
    whole, kept = trained(), record["phases"][-1]["kept"]
    assert record["phases"][-1]["reconstruction"]["tokens"] == 256
    assert not Path("out", "reconstruction").exists()
    trained_layers = {
        layer for one in record["phases"][-1]["reconstruction"]["windows"] for layer in one["layers"]
    }
    for place, layer in enumerate(kept):
        pairs = zip(
            model.model.layers[place].parameters(), whole.model.layers[layer].parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs) == (layer not in trained_layers)
    assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["default", "--reconstruction_layers", "-1"], "reconstruction_layers is -1"),
        (["default", *RECONSTRUCTED, "--reconstruction_tokens", "0"], "reconstruction_tokens is 0"),
        (["shortgpt", "--block_candidates", "2"], "set select to block"),
        (["default", "--block_candidates", "0"], "block_candidates is 0"),
        (["streamline", "--block_candidates", "2"], "trains its own layer"),
        (["streamline", *RECONSTRUCTED], "trains its own layer"),
        (
            ["default", "--max_steps", "0", "--streaming", "True"],
            "a stream is not read when --max_steps is 0",
        ),
        (["default", "--replacement_loss", "kl"], "Set replacement to linear"),
        (["default", "--replacement", "layer"], "or set --reconstruction_layers to 0"),
        (["default", *RECONSTRUCTED, "--reconstruction_epochs", "0"], "at least 1 epoch"),
    ],
)
def test_reconstruction_that_cannot_be_is_told(folder, capsys, words, message):
    recipe, *flags = words
    assert run(recipe, *DATA, *SMALL, *SHORT, *flags) == 2
    assert message in capsys.readouterr().err


def test_phases_are_reconstructed(folder):
    flags = ["--steps_per_phase", "2", "--trainable", "all"]
    short = [word for word in SHORT if word not in ("--max_steps", "6")]
    assert run("iterative", *DATA, *SMALL, *short, *flags, *RECONSTRUCTED) == 0
    _, record = result()
    for phase in record["phases"]:
        assert len(phase["reconstruction"]["windows"]) == 1
        assert phase["reconstruction"]["tokens"] > 0
    card = Path("out/README.md").read_text()
    assert "| KL after removal | KL after reconstruction |" in " ".join(card.split())
    assert "the layers next to the cut were trained on the hidden states" in card


@pytest.mark.parametrize("moment", ["reconstruction", "training"])
def test_a_stopped_run_with_reconstruction_resumes_to_the_same_bits(folder, monkeypatch, moment):
    fields = FIELDS | {"reconstruction_layers": 1, "reconstruction_epochs": 3, "reconstruction_tokens": 256}
    fields |= {"save_strategy": "steps", "save_steps": 2, "block_candidates": 2, "keep": 4}
    expected, whole = prune("model", "text.txt", output_dir="whole", **fields)
    save, epochs = window_training.WindowTraining._save, []

    def stop(self, checkpoint, epoch, *others):
        save(self, checkpoint, epoch, *others)
        epochs.append(epoch)
        if moment == "reconstruction" and epoch == 2 and len(epochs) == 2:
            raise KeyboardInterrupt

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if moment == "training" and state.global_step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(window_training.WindowTraining, "_save", stop)
    with monkeypatch.context() as patch:
        train = DistillationTrainer.train

        def stopping(self, *args, **settings):
            self.add_callback(Stop())
            return train(self, *args, **settings)

        patch.setattr(DistillationTrainer, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            prune("model", "text.txt", output_dir="out", **fields)
    epochs_before = list(epochs)
    assert epochs_before == ([1, 2] if moment == "reconstruction" else [1, 2, 3])
    found, record = prune("model", "text.txt", output_dir="out", resume_from_checkpoint=True, **fields)
    assert epochs[len(epochs_before) :] == ([3] if moment == "reconstruction" else [])
    assert equal_weights(found, expected)
    [one], [other] = record.phases, whole.phases
    assert one.reconstruction["kl_after"] == other.reconstruction["kl_after"]
    assert one.candidates == other.candidates


def test_the_best_few_blocks_are_compared_by_kl(folder, tokenizer, trained):
    words = [*SHORT, "--max_steps", "0", "--keep", "4", "--block_candidates", "3", "--criterion", "loss"]
    words += ["--reconstruction_layers", "0"]  # only the candidates are reconstructed
    assert run("default", *DATA, *SMALL, *words) == 0
    model, record = result()
    calibration, _, text = blocks(tokenizer)
    batches, rows = make_batches(calibration, 4), make_batches(repeated(text).shuffle(seed=42), 4)
    original = trained()
    table = score_layers(original, batches, "loss", block_size=2, progress=False)
    found = []
    for first in table.ranking():
        candidate = trained()
        replace_by_linear_map(candidate, first, 2, batches)
        reconstruct_layers(candidate, original, rows, epochs=1, seed=42, progress=False)
        found.append(mean_kl(candidate, original, batches, 16_384))
    [phase] = record["phases"]
    assert [one["layers"][0] for one in phase["candidates"]] == table.ranking()
    assert [one["kl"] for one in phase["candidates"]] == pytest.approx(found, rel=1e-3)
    assert [one["score"] for one in phase["candidates"]] == pytest.approx(
        [table.scores[i] for i in table.ranking()]
    )
    best = table.ranking()[found.index(min(found))]
    assert get_lineage(model).removed == [best, best + 1]
    expected = trained()
    replace_by_linear_map(expected, best, 2, batches)
    assert torch.equal(logits(model, tokens()), logits(expected, tokens()))
    card = Path("out/README.md").read_text()
    assert "The 3 blocks with the lowest scores were removed and briefly reconstructed" in card
    assert "| block | loss score |" in " ".join(card.split())


@pytest.fixture
def gemma(tokenizer):
    """A model whose layers normalise the output of the feed-forward part."""
    make_model("gemma3_text").save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("text.txt").write_text(TEXT)


@pytest.mark.parametrize(("kind", "replacement"), [("folder", "linear"), ("gemma", "none")])
def test_the_default_has_a_linear_map_where_the_model_allows_it(request, kind, replacement):
    request.getfixturevalue(kind)
    assert run("default", *DATA, *SMALL, *SHORT) == 0
    record = read_record("out").to_dict()
    assert record["pruning"].get("replacement", "none") == replacement
    assert record["recipe"].get("replacement", "none") == replacement
    assert len(record["phases"][-1]["reconstruction"]["windows"]) == 1
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 3


@pytest.mark.parametrize("command", ["run", "distill"])
def test_without_a_learning_rate_it_fits_the_weights(folder, trained, command):
    short = [word for word in SHORT if word not in ("--learning_rate", "1e-2")]
    words = ["run", "default", *DATA] if command == "run" else ["distill", "model", *DATA[2:]]
    assert main([*words, *SMALL, *short]) == 0
    rate = healing_learning_rate(trained())
    assert read_record("out").training["learning_rate"] == rate
    assert main([*words, *SMALL[:-1], "other", *SHORT]) == 0
    assert read_record("other").training["learning_rate"] == 1e-2 != rate


@pytest.mark.parametrize(
    ("more", "tokens"), [([], 6 * 4 * 16), (["--reconstruction_tokens", "64"], 64)], ids=["all", "64"]
)
@pytest.mark.parametrize("streaming", ["True", "False"])
def test_reconstruction_reads_the_rows_of_training_up_to_its_tokens(folder, streaming, more, tokens):
    words = [*DATA, *SMALL, *SHORT, *more, "--streaming", streaming, "--reconstruction_epochs", "1"]
    assert run("default", *words) == 0
    record = read_record("out")
    assert record.phases[-1].reconstruction["tokens"] == tokens
    assert record.log[-1]["step"] == 6


def test_reconstruction_of_rows_of_any_length_stops_before_its_tokens(folder):
    """The first row is short here, and says nothing about the others."""
    Path("text.jsonl").write_text("".join(json.dumps({"text": "ab " * n}) + "\n" for n in [2, 30] * 40))
    words = ["--model", "model", "--data", "text.jsonl", "--keep", "3", *SMALL, *SHORT, "--packing", "none"]
    words += ["--streaming", "True", "--max_steps", "8", "--reconstruction_tokens", "100"]
    assert run("default", *words) == 0
    assert 60 < read_record("out").phases[-1].reconstruction["tokens"] <= 200  # padding counts too


def test_reconstruction_alone_is_told_in_the_card(folder):
    assert run("default", *DATA, *SMALL, *SHORT, "--max_steps", "0") == 0
    card = Path("out/README.md").read_text()
    assert "healed by reconstruction" in card
    assert "not healed" not in card
    assert "was not trained" not in card


def test_candidates_are_compared_on_a_stream(folder):
    words = ["--block_candidates", "2", "--streaming", "True", "--keep", "4"]
    assert run("default", *DATA, *SMALL, *SHORT, *words) == 0
    assert len(read_record("out").phases[-1].candidates) == 2


def test_a_quantised_model_is_not_reconstructed(folder, capsys):
    words = ["--max_steps", "0", "--load_in_4bit", "True"]
    assert run("default", *DATA, *SMALL, *SHORT, *words) == 2
    assert "quantised weights cannot be trained" in capsys.readouterr().err


def test_models_into_which_no_linear_map_goes_are_told_before_scoring(gemma, capsys, monkeypatch):
    monkeypatch.setattr(recipe_run, "score_present", None)  # never called
    assert run("replaceme", *DATA, *SMALL, *SHORT) == 2
    error = capsys.readouterr().err
    assert "In this gemma3_text model the output of the feed-forward part is not simply added" in error
    assert "Use --replacement none, and --reconstruction_layers 3" in error
    assert not Path("out/layer_pruning.json").exists()


FIELDS = {
    "sequence_length": 16,
    "calibration_sequences": 8,
    "heldout_sequences": 8,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "learning_rate": 1e-2,
}


def equal_weights(one, other):
    weights = other.state_dict()
    return all(torch.equal(weights[name], value) for name, value in one.state_dict().items())


def test_prune_is_run(folder, tokenizer, trained):
    words = [word for name, value in FIELDS.items() for word in (f"--{name}", str(value))]
    assert run("default", *DATA, *words, "--output_dir", "out") == 0
    expected, record = result()
    pruned, own_record = prune("model", "text.txt", keep=3, output_dir="other", **FIELDS)
    assert not pruned.training
    assert all(parameter.requires_grad for parameter in pruned.parameters())
    assert equal_weights(pruned, expected)
    assert equal_weights(AutoModelForCausalLM.from_pretrained("other"), expected)
    assert own_record.recipe == record["recipe"]
    assert own_record == read_record("other")
    # Models in memory and texts in a list give the same.
    model = trained()
    memory = prune(model, load_texts("text.txt"), 3, tokenizer=tokenizer, output_dir="third", **FIELDS)
    assert memory.model is model
    assert equal_weights(memory.model, expected)
    rows = token_sequences(load_texts("text.txt"), tokenizer, 16).remove_columns("labels")
    recipe = read_recipe("default")
    fourth = prune("model", rows, 3, recipe, output_dir="fourth", **FIELDS | {"learning_rate": 1e-2})
    plain = prune("model", "text.txt", 3, output_dir="fifth", repeat_share=0, **FIELDS)
    assert equal_weights(fourth.model, plain.model)  # given tokens stay as they are
    assert not equal_weights(plain.model, expected)


def test_prune_asks_for_the_tokenizer_of_a_model_made_in_memory(folder):
    with pytest.raises(LayerPruneError, match=r"tokenizer is missing, .* Give tokenizer="):
        prune(make_model(), load_texts("text.txt"), 3, output_dir="out", **FIELDS)


def test_prune_trains_what_the_caller_left_trainable(folder, tokenizer, trained):
    model = trained()
    model.model.embed_tokens.requires_grad_(False)
    fields = FIELDS | {"output_dir": "out"}
    pruned, _ = prune(model, load_texts("text.txt"), 3, "streamline", tokenizer=tokenizer, **fields)
    frozen = {name for name, parameter in pruned.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}
    assert all(parameter.grad is None for parameter in pruned.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learnig_rate": 1e-3}, "prune: there is no field 'learnig_rate'. Did you mean learning_rate?"),
        ({"learning_rate": "fast"}, "prune: learning_rate is 'fast', but must be a number."),
        ({"max_steps": 2.5}, "prune: max_steps is 2.5, but must be a whole number."),
        ({"protected": [0, "five"]}, "must be a list, each entry a whole number."),
        ({"bf16": "yes"}, "prune: bf16 is 'yes', but must be true or false."),
        ({"criterion": "luck"}, "prune: criterion is 'luck'. Choose from block_influence, "),
        ({"recipe": {"kep": 3}}, "recipe: there is no field 'kep'. Did you mean keep?"),
        ({"target_layers": 4}, "prune: target_layers is target_layers, which is given too."),
        ({"data": 7}, "Each row needs input_ids"),
        ({"data": None}, "There is no data."),
        ({"model": None}, "model has no value."),
        ({"lr_scheduler_type": "sinus"}, "is not a valid SchedulerType"),
    ],
)
def test_mistakes_in_prune_are_told(folder, fields, message):
    given = {"model": "model", "data": "text.txt", "keep": 3, "output_dir": "out"} | FIELDS | fields
    with pytest.raises(LayerPruneError, match=re.escape(message)):
        prune(**given)
    assert not Path("out/config.json").exists()


def test_no_file_beside_the_model_holds_a_secret(folder, trained):
    prune("model", "text.txt", 3, output_dir="out", hub_token="hf_SECRET", **FIELDS)
    texts = [path.read_bytes() for path in Path("out").rglob("*") if path.is_file()]
    assert not any(b"hf_SECRET" in text for text in texts)
    words = ["default", *DATA, "--use_cpu", "True", "--hub_token", "hf_S", "--save_config", "c.yaml"]
    with pytest.raises(SystemExit, match="0"):
        run(*words)
    assert "hf_S" not in Path("c.yaml").read_text()


def test_a_teacher_in_memory_is_named_in_the_settings(folder, trained):
    teacher = AutoModelForCausalLM.from_pretrained("model")
    prune("model", "text.txt", 3, output_dir="out", teacher=teacher, **FIELDS)
    assert yaml.safe_load(Path("out/layer_pruning.yaml").read_text())["teacher"] == "model"


def test_a_run_does_not_resume_with_other_layers(folder, capsys):
    words = ["--model", "model", "--data", "text.txt", *SMALL, *SHORT, "--save_strategy", "steps"]
    words += ["--save_steps", "2"]
    assert run("default", *words, "--replacement", "none", "--layers", "2-3") == 0
    shutil.rmtree("out/checkpoint-6")
    record = json.loads(Path("out/layer_pruning.json").read_text())
    Path("out/layer_pruning.json").write_text(json.dumps(record | {"finished": False}))
    assert run("default", *words, "--replacement", "none", "--layers", "3-4", "--resume") == 2
    assert "began with protected_originals=[0, 1, 4, 5], not [0, 1, 2, 5]" in capsys.readouterr().err


def test_a_config_replaces_the_target_of_a_recipe(folder):
    Path("mine.yaml").write_text("target_layers: 4\nselect: greedy\nmax_steps: 0\n")
    Path("config.yaml").write_text("layers: 3-4\n")
    words = ["--model", "model", "--data", "text.txt", *SMALL, "--config", "config.yaml"]
    assert run("mine.yaml", *words, "--use_cpu", "True") == 0
    assert read_record("out").to_dict()["phases"][-1]["kept"] == [0, 1, 2, 5]
