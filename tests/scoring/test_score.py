import copy
import dataclasses
import json
import random
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_layerprune import (
    LayerPruneError,
    ScoreTable,
    evaluate_text,
    rank_correlation,
    remove_layers,
    score_layers,
)
from hf_layerprune.forward.hooks import LAST, captured, hidden
from hf_layerprune.scoring.criteria import CRITERIA
from hf_layerprune.scoring.leave_one_out import PrefixCache
from hf_layerprune.scoring.score import read_table
from hf_layerprune.surgery.decoder import find_decoder
from hf_layerprune.surgery.removal import without_layers

from ..conftest import logits, make_model, tokens
from ..tiny_models import tiny_model


def batches():
    padded = {"input_ids": tokens(2, 9, seed=3), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    padded["attention_mask"][1, 6:] = 0
    return [{"input_ids": tokens(2, 12)}, padded]


def mean_loss(model):
    """The reference: float64, token by token."""
    total, count = 0.0, 0
    for batch in batches():
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        found = logits(model, **batch).double().log_softmax(-1)
        for b, row in enumerate(batch["input_ids"]):
            for t in range(len(row) - 1):
                if mask[b, t] and mask[b, t + 1]:
                    total, count = total - found[b, t, row[t + 1]].item(), count + 1
    return total / count


def test_loss_scores_are_those_of_really_removing_each_layer(model):
    family, dense = model.config.model_type, mean_loss(model)
    table = score_layers(model, batches(), progress=False)
    assert table.quality == pytest.approx(-dense, rel=1e-5)
    assert list(table.scores) == [1, 2, 3, 4]  # the first and the last are protected
    for layer, score in table.scores.items():
        cut = make_model(family)
        remove_layers(cut, layer)
        assert score == pytest.approx(mean_loss(cut) - dense, abs=1e-5)


def test_block_influence_is_one_minus_the_mean_cosine(model):
    table = score_layers(model, batches(), "block_influence", protected=[], progress=False)
    assert table.quality is None
    for layer in range(6):
        cosines = []
        for batch in batches():
            with captured(model, [layer]) as states:
                logits(model, **batch)
            before, after = (hidden(state).double() for state in states[layer])
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            norms = before.norm(dim=-1) * after.norm(dim=-1)
            cosines += ((before * after).sum(-1) / norms)[real].tolist()
        assert table.scores[layer] == pytest.approx(1 - np.mean(cosines), abs=1e-5)


def test_captured_states_are_the_models_own(llama):
    with captured(llama, [*range(6), LAST]) as states:
        logits(llama, tokens())
    assert not any(module._forward_hooks for module in llama.modules())
    with torch.no_grad():
        own = llama(input_ids=tokens(), output_hidden_states=True).hidden_states
    for layer in range(6):
        assert torch.equal(states[layer][0], own[layer])
        assert layer == 5 or torch.equal(hidden(states[layer][1]), own[layer + 1])
    assert torch.equal(states[LAST][0], own[6])


def silence(model, layer):
    """Make a layer add nothing: its output projections are zero."""
    names = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h")
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    for name, module in find_decoder(model).layers[layer].named_modules():
        last = name.split(".")[-1]
        if last in names or (last in norms and model.config.model_type.startswith("gemma")):
            nn.init.zeros_(module.weight)
            if model.config.model_type.startswith("gemma") and last in norms:
                nn.init.constant_(module.weight, -1.0)  # Gemma's norms scale by 1 + weight
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def test_a_layer_that_adds_nothing_is_ranked_last_and_costs_nothing(model):
    silence(model, 3)
    before = logits(model, tokens())
    # Labels that the model itself finds most likely, so that every working layer is of use.
    labels = torch.cat([tokens()[:, :1], before.argmax(-1)[:, :-1]], 1)
    for criterion in ("loss", "block_influence"):
        batch = {"input_ids": tokens(), "labels": labels}
        table = score_layers(model, [batch], criterion, progress=False)
        assert all(score > 1e-3 for layer, score in table.scores.items() if layer != 3)
        assert table.ranking()[0] == 3
        assert table.scores[3] == pytest.approx(0, abs=1e-6)
    remove_layers(model, 3)
    torch.testing.assert_close(logits(model, tokens()), before)


def test_task_scores_are_the_fall_of_the_users_function(llama):
    def score(model):
        assert not model.training
        return float(len(find_decoder(model).layers)) + logits(model, tokens()).mean().item()

    table = score_layers(llama, criterion="task", task=score, progress=False)
    assert table.quality == score(llama)
    cut = make_model("llama")
    remove_layers(cut, 2)
    assert table.scores[2] == pytest.approx(score(llama) - score(cut), abs=1e-6)


class Accuracy(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("int32")
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {"accuracy": sum(p == r for p, r in pairs) / len(pairs)}


def test_an_evaluate_metric_is_a_task(llama, tmp_path):
    metric = Accuracy(cache_dir=str(tmp_path))
    table = score_layers(llama, batches(), "task", task=metric, protected=[0, 1, 2, 3, 5], progress=False)

    def accuracy(model):
        right = []
        for batch in batches():
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            hits = logits(model, **batch)[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
            right += hits[mask[:, 1:] & mask[:, :-1]].tolist()
        return sum(right) / len(right)

    assert table.quality == pytest.approx(accuracy(llama))
    dense = accuracy(llama)
    remove_layers(llama, 4)
    assert table.scores == {4: pytest.approx(dense - accuracy(llama))}


@pytest.mark.parametrize("how", ["success", "error", "interrupt"])
def test_scoring_leaves_no_trace(model, how):
    model.train()
    find_decoder(model).layers[1].eval()
    config = model.config.to_dict()
    training = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def task(model):
        torch.rand(3), random.random(), np.random.rand()
        if len(find_decoder(model).layers) == 5 and how != "success":
            raise KeyboardInterrupt if how == "interrupt" else RuntimeError("x")
        return 1.0

    def run():
        score_layers(model, batches(), progress=False)
        score_layers(model, criterion="task", task=task, progress=False)

    if how == "success":
        run()
    else:
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            run()
    assert model.config.to_dict() == config
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    for module in model.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_a_task_that_leaves_the_model_in_training_mode_does_no_harm(llama):
    score_layers(llama, criterion="task", task=lambda model: float(model.train().training), progress=False)
    assert not any(module.training for module in llama.modules())


def test_what_cannot_be_cut_is_not_scored():
    model = make_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(LayerPruneError, match="Cannot remove layers"):
        score_layers(model, batches(), progress=False)


def test_padding_changes_no_score(llama):
    plain = [{"input_ids": tokens(2, 9)}]
    padded = [
        {
            "input_ids": torch.cat([tokens(2, 9), torch.full((2, 5), 257)], 1),
            "attention_mask": torch.cat([torch.ones(2, 9), torch.zeros(2, 5)], 1).long(),
        }
    ]
    for criterion in ("loss", "block_influence"):
        expected = score_layers(llama, plain, criterion, progress=False).scores
        found = score_layers(llama, padded, criterion, progress=False).scores
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"criterion": "luck"},
            "There is no criterion 'luck'. Choose from block_influence, angular, loss, kl",
        ),
        ({"criterion": "task"}, "go together"),
        ({"task": len}, "go together"),
        ({"batches": []}, "No calibration batches"),
        ({"batches": [{"labels": tokens(2, 5)}]}, "needs input_ids"),
        ({"batches": [{"input_ids": torch.rand(2, 5)}]}, "must hold whole numbers, of shape"),
        ({"batches": [{"input_ids": tokens(2, 6).view(2, 3, 2)}]}, "must hold whole numbers, of shape"),
        ({"batches": [{"input_ids": tokens(2, 1)}]}, "nothing to predict"),
        (
            {"batches": [{"input_ids": tokens(2, 5), "labels": torch.full((2, 5), -100)}]},
            "No token of the calibration counts",
        ),
        ({"protected": [9]}, "No layers \\[9\\]"),
        ({"protected": [0, 1, 2, 3, 4]}, None),
        ({"criterion": "task", "task": lambda model: float("nan")}, "not a finite number"),
        ({"criterion": "task", "task": lambda model: None}, "score is None: it must be a number"),
    ],
)
def test_bad_calls_are_refused(llama, arguments, message):
    arguments = {"batches": batches(), "progress": False} | arguments
    if message is None:
        assert list(score_layers(llama, **arguments).scores) == [5]
        return
    with pytest.raises(LayerPruneError, match=message):
        score_layers(llama, **arguments)


def test_progress_shows_the_time_left(llama, capsys):
    score_layers(llama, batches())
    assert "scoring (loss)" in capsys.readouterr().err


def test_a_table_shows_itself(llama):
    table = score_layers(llama, batches(), progress=False)
    heads, rule, *rows = [line.split("|") for line in repr(table).splitlines()]
    assert [head.strip() for head in heads[1:-1]] == ["layer", "original", "loss score", "± error"]
    assert set("".join(rule)) <= {"-", ":"}
    assert [int(row[1]) for row in rows] == table.ranking()
    assert [float(row[3]) for row in rows] == pytest.approx(
        [table.scores[layer] for layer in table.ranking()], abs=1e-5
    )
    assert table._repr_markdown_() == repr(table)
    refusing = dataclasses.replace(
        table, refused={0: "it is first."}, errors={}, scores={2: 1.0}, kept=[0, 1, 4]
    )
    assert repr(refusing).splitlines() == [
        "| layer | original | loss score |",
        "|------:|---------:|-----------:|",
        "|     2 |        4 |    1.00000 |",
        "",
        "Layer 0 cannot be removed: it is first.",
    ]


def test_plot_returns_a_figure_that_a_notebook_shows(llama, tmp_path):
    table = score_layers(llama, batches(), progress=False)
    figure = table.plot()
    assert isinstance(figure, Figure)
    assert "Layer scores by loss" in figure.axes[0].get_title()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert list(tmp_path.glob("*.png")) == []
    table.plot("scores.png")
    assert (tmp_path / "scores.png").read_bytes() == figure._repr_png_()


def test_plot_writes_a_picture(llama, tmp_path):
    table = score_layers(llama, batches(), progress=False)
    table.plot(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_ties_go_to_the_deeper_layer():
    assert ScoreTable("loss", {1: 0.5, 2: 0.1, 3: 0.1}, None, [0, 1, 2, 3, 4]).ranking() == [3, 2, 1]


def test_layers_that_cannot_go_are_no_candidates(tmp_path):
    model = tiny_model("gemma3n_text")
    for criterion in ("loss", "block_influence"):
        table = score_layers(model, batches(), criterion, protected=[], progress=False)
        assert table.scores.keys() == {0, 1, 3, 5, 6}
        assert table.refused.keys() == {2, 4}
        assert "store_full_length_kv" in table.refused[2]
        assert ScoreTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
        table.plot(tmp_path / "scores.png")
        if criterion == "loss":  # although its last layers read what earlier ones have stored
            for layer, score in table.scores.items():
                with without_layers(model, layer):
                    assert score == pytest.approx(mean_loss(model) + table.quality, abs=1e-5)
    with pytest.raises(LayerPruneError, match="Cannot remove layers"):
        score_layers(model, batches(), protected=[0, 1, 3, 5, 6], progress=False)
    old = {"criterion": "loss", "scores": {"1": 0.5}, "quality": None, "kept": [0, 1]}
    assert ScoreTable.from_dict(old).refused == {}


def test_what_cannot_be_scored_says_so():
    with pytest.raises(LayerPruneError, match=r"Layers \[2\] did not run"):
        score_layers(tiny_model("mllama"), batches(), progress=False)
    with pytest.raises(LayerPruneError, match=r"use criterion='loss'"):
        score_layers(tiny_model("xlnet"), batches(), "block_influence", progress=False)
    assert score_layers(tiny_model("openai-gpt"), batches(), "block_influence", progress=False).scores


def table_of(scores, kept=None, **settings):
    return ScoreTable("loss", scores, None, kept or list(range(1 + max(scores))), **settings)


def test_rank_correlation():
    one = table_of({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    assert rank_correlation(one, one) == pytest.approx(1)
    assert rank_correlation(one, table_of({1: 9.0, 2: 3.0, 3: 2.0, 4: 1.0})) == pytest.approx(-1)
    # By hand: ranks 1 2 3 4 and 2 1 3 4, rho = 1 - 6 * 2 / (4 * 15).
    assert rank_correlation(one, table_of({1: 0.2, 2: 0.1, 3: 3.0, 4: 40.0})) == pytest.approx(0.8)
    # Ties share their ranks: 1 2 3 4 and 1.5 1.5 3 4.
    tied = rank_correlation(one, table_of({1: 1.0, 2: 1.0, 3: 3.0, 4: 4.0}))
    assert tied == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    # By the original index: of the cut model, layer 2 is the original's 3.
    cut = table_of({1: 0.1, 2: 0.3, 3: 0.4}, kept=[0, 1, 3, 4])
    assert rank_correlation(one, cut) == pytest.approx(1)
    with pytest.raises(LayerPruneError, match="1 candidates in common"):
        rank_correlation(one, table_of({4: 1.0, 7: 2.0}))
    with pytest.raises(LayerPruneError, match="no ranking"):
        rank_correlation(one, table_of({1: 1.0, 2: 1.0}))


def test_those_that_racing_dropped_come_last():
    table = table_of({1: 0.5, 2: 0.1, 3: 0.6}, seen={1: 16, 2: 4, 3: 16})
    assert table.ranking() == [1, 3, 2]


def test_a_table_is_read_from_json(tmp_path):
    table = table_of({1: 0.5, 2: 0.1}, errors={1: 0.01}, seen={1: 4, 2: 4}, block_size=2)
    (tmp_path / "table.json").write_text(json.dumps(table.to_dict()))
    assert read_table(tmp_path / "table.json") == table
    for damaged in ("{", "[]", "{}", '{"scores": 1}'):
        (tmp_path / "table.json").write_text(damaged)
        with pytest.raises(LayerPruneError, match="No score table"):
            read_table(tmp_path / "table.json")


@pytest.fixture
def _fresh_accelerate():
    """Its state is one for the whole process, and of another precision after a Trainer."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_layers_are_read_in_the_precision_of_training():
    """accelerate puts autocast around the model's own forward, and nowhere else."""
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(make_model(), evaluation_mode=True)
    seen = []
    prepared.model.layers[5].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for criterion in ("loss", "kl", "hidden_mse", "block_influence"):
        score_layers(prepared, batches(), criterion, progress=False)
    evaluate_text(prepared, batches())
    assert set(seen) == {torch.bfloat16}
    assert not prepared.base_model._forward_hooks


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"task"}))
def test_a_model_with_adapters_scores_as_the_merged_one(criterion):
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = score_layers(merged, batches(), criterion, progress=False)
    found = score_layers(adapted, batches(), criterion, progress=False)
    plain = score_layers(make_model(), batches(), criterion, progress=False)
    assert found.ranking() == expected.ranking()
    if criterion != "taylor":  # which looks at the single weights
        assert found.scores == pytest.approx(expected.scores, rel=1e-3, abs=1e-5)
    assert criterion == "positional" or found.scores != pytest.approx(plain.scores, rel=1e-3)


@pytest.mark.parametrize("criterion", ["loss", "block_influence", "taylor"])
def test_scoring_that_runs_out_of_memory_goes_on_with_smaller_batches(criterion, llama, monkeypatch, caplog):
    batches = [{"input_ids": tokens(7, 12, seed=seed)} for seed in (1, 2)]
    prefix_cache = PrefixCache()  # of the batches as they are now
    expected = score_layers(llama, batches, criterion, prefix_cache=prefix_cache, progress=False)
    forward, most = type(llama.model).forward, 2

    def limited(self, input_ids=None, **kwargs):
        if len(input_ids) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(llama.model), "forward", limited)
    more = {"journal": "scores.part", "prefix_cache": prefix_cache}
    found = score_layers(llama, batches, criterion, progress=False, **more)
    assert found.scores == pytest.approx(expected.scores, rel=1e-4)
    assert caplog.text.count("Out of memory in scoring") == 2  # seven rows, four, two
    assert not Path("scores.part").exists()
    most = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        score_layers(llama, batches, criterion, progress=False)


def test_a_teacher_scores_without_its_dropout_and_is_left_as_it_was():
    model, teacher = make_model("gpt2"), make_model("gpt2", seed=1)
    expected = score_layers(model, batches(), "kl", teacher=teacher.eval(), progress=False)
    assert score_layers(model, batches(), "kl", teacher=teacher.train(), progress=False) == expected
    assert teacher.training
    with pytest.raises(LayerPruneError, match="The teacher is on meta, the model on cpu"):
        score_layers(model, batches(), "kl", teacher=teacher.to("meta"))


def test_racing_reads_batches_as_they_are_given(llama):
    rows = [{"input_ids": tokens(1, 12, seed=seed)} for seed in range(12)]
    found = score_layers(llama, rows, racing=0.6, batch_tokens=10**6, progress=False)
    assert found == score_layers(llama, rows, racing=0.6, progress=False)


def test_metrics_are_computed_with_smaller_batches_when_there_is_no_memory(llama):
    read = []

    def fail(module, args, kwargs):
        read.append(len(kwargs["input_ids"]))
        if read[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Metric:
        def compute(self, predictions, references):
            return {"right": sum(a == b for a, b in zip(predictions, references, strict=True))}

    llama.register_forward_pre_hook(fail, with_kwargs=True)
    rows = [{"input_ids": tokens(8, 12)}]
    table = score_layers(llama, rows, "task", task=Metric(), progress=False)
    assert len(table.scores) == 4
    assert max(read[-3:]) <= 4
