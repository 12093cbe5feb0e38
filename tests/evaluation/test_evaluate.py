import math
import random

import numpy as np
import pytest
import torch

from hf_layerprune import LayerPruneError, MultipleChoice, evaluate_text, remove_layers, stability
from hf_layerprune.data.batches import make_batches
from hf_layerprune.data.sequences import token_sequences
from hf_layerprune.evaluation import evaluate as evaluation
from hf_layerprune.evaluation.comparison import (
    compare_models,
    mean_difference,
    share_kept,
    task_scores,
    tasks_done,
)
from hf_layerprune.evaluation.evaluate import copying, evaluate_model, generation_speed
from hf_layerprune.evaluation.multiple_choice import Answer, Question

from ..conftest import logits, make_model, tokens
from ..scoring.test_score import batches, mean_loss
from .test_multiple_choice import QUESTIONS, likelihoods


def test_perplexity_is_over_all_tokens_not_a_mean_of_batches(model):
    model.train()
    found = evaluate_text(model, batches())
    assert model.training
    model.eval()
    assert found["loss"] == pytest.approx(mean_loss(model), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == 22 + 8 + 5
    assert found["tokens_per_second"] > 0


def test_nothing_to_predict_is_refused(llama):
    labels = torch.full((2, 5), -100)
    with pytest.raises(LayerPruneError, match="no token to predict"):
        evaluate_text(llama, [{"input_ids": tokens(2, 5), "labels": labels}])
    assert logits(llama, tokens()).isfinite().all()


def test_a_model_is_stable_against_itself(llama, tokenizer):
    answers = MultipleChoice(QUESTIONS, tokenizer).read(llama)
    assert stability(answers, answers) == {
        "stability": pytest.approx(1.0),
        "standard_error": pytest.approx(0.0),
        "effective_questions": pytest.approx(1.0),
    }


def test_stability_by_hand():
    original = [Answer(True, [1.0, 3.0]), Answer(False, [2.0, 2.0]), Answer(True, [1.0, 5.0, 9.0])]
    pruned = [Answer(True, [9.0, 9.0]), Answer(True, [1.0, 1.0]), Answer(False, [1.0, 1.0, 1.0])]
    spread = [1.0, 0.0, math.sqrt(32 / 3)]
    weights = [math.exp(s) / sum(map(math.exp, spread)) for s in spread]
    found = stability(original, pruned)
    assert found["stability"] == pytest.approx(weights[0])  # only on the first do they agree
    assert found["standard_error"] == pytest.approx(
        math.sqrt(sum(w**2 * (x - weights[0]) ** 2 for w, x in zip(weights, (1, 0, 0), strict=True)))
    )
    # As the released code would: the first weights, as many as agree. Here the same; not in another order.
    turned = stability(original[::-1], pruned[::-1])
    assert turned["stability"] == pytest.approx(weights[0]) != weights[2]
    huge = [Answer(True, [1.0, 1e100]), Answer(False, [1.0, 1e99])]  # whose exponents would overflow
    assert stability(huge, huge[::-1])["stability"] == 0.0
    for worse in (math.inf, math.nan, 1e308):
        with pytest.raises(LayerPruneError, match="not a finite number"):
            stability([Answer(True, [1.0, worse])], huge[:1])
    for other in ([], pruned[:2]):
        with pytest.raises(LayerPruneError, match="the same questions"):
            stability(original, other)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # which read a question in one row, and in several
def test_answers_are_those_of_one_pass_for_each_choice(family, tokenizer):
    model = make_model(family)
    cut = make_model(family)
    remove_layers(cut, [2, 3])
    read = MultipleChoice(QUESTIONS, tokenizer, batch_tokens=40).read(model)
    for question, answer in zip(QUESTIONS, read, strict=True):
        sums = likelihoods(model, tokenizer, question)
        counts = [
            len(choice.strip()) + (choice[0] == " " or question.context[-1:] == " ")
            for choice in question.choices
        ]
        expected = [math.exp(-x / n) for x, n in zip(sums, counts, strict=True)]  # bytes are tokens here
        assert answer.perplexities == pytest.approx(expected, rel=1e-3)
        best = max(range(len(sums)), key=lambda i: sums[i] / len(question.choices[i].removeprefix(" ")))
        assert answer.right == (best == question.answer)
    mixed = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
    found = [
        stability(*(MultipleChoice(questions, tokenizer).read(one) for one in (model, cut)))
        for questions in (QUESTIONS, mixed)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_bits_per_byte_are_of_the_predicted_text(llama, tokenizer):
    """Of a tokenizer whose tokens are bytes they are the loss in bits, less the bytes of marks."""
    texts = ["A cat sat on a mat and looked around.", "Then it went away."]
    blocks = make_batches(token_sequences(texts, tokenizer, 12), 2)
    found = evaluate_text(llama, blocks, tokenizer)
    ends = sum(int((batch["input_ids"][:, 1:] == tokenizer.eos_token_id).sum()) for batch in blocks)
    assert ends == 1
    bits = found["loss"] / math.log(2) * found["tokens"] / (found["tokens"] - ends)
    assert found["bits_per_byte"] == pytest.approx(bits)


def test_copied_is_what_greedy_decoding_repeats(llama):
    """By a model that says one token after each, of passages that it says itself, up to one other token."""
    for layer in llama.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.data.zero_()
    after = logits(llama, torch.arange(256)[:, None])[:, 0].argmax(1)
    rows = torch.zeros(4, 20, dtype=torch.long)
    for row, start in zip(rows, (5, 70, 90, 110), strict=True):
        row[0] = start
        for i in range(1, 20):
            row[i] = after[row[i - 1]] % 256
    rows[1, 12:] = tokens(1, 8)[0]
    rows[2, 6] = (rows[2, 6] + 1) % 256
    found = copying(llama, [{"input_ids": rows[:3]}, {"input_ids": rows[3:]}], given=4)
    shares = []
    for row in rows:
        prompt = torch.cat([row, row[:4]])[None]
        said = llama.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=257)
        same = (said[0, 24:] == row[4:]).long()
        shares.append(same.cumprod(0).double().mean().item())
    assert len(set(shares)) >= 3
    assert max(shares) == 1
    assert found["copied"] == pytest.approx(sum(shares) / 4)
    assert found["copied"] < found["right"] < 1
    with pytest.raises(LayerPruneError, match="too short to copy"):
        copying(llama, [{"input_ids": rows}], given=20)
    with pytest.raises(LayerPruneError, match="no passage"):
        copying(llama, [])


def test_a_passage_is_cut_to_what_the_model_reads(llama):
    long, half = tokens(2, 50), tokens(2, 50)[:, :32]
    assert copying(llama, [{"input_ids": long}]) == copying(llama, [{"input_ids": half}])


def test_generation_is_timed_without_a_change(llama):
    before = torch.random.get_rng_state()
    llama.train()
    assert generation_speed(llama, {"input_ids": tokens()}, new_tokens=4) > 0
    assert llama.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_kept_is_above_chance():
    """Of the tasks that the dense model does: what it guesses does not count, whatever the other says."""
    right = {"easy": [True] * 9 + [False], "hard": [True] * 5 + [False] * 5, "guessed": [False] * 10}
    chances = {"easy": 0.5, "hard": 0.0, "guessed": 0.5}
    dense = task_scores(right, chances)
    assert dense["mean"] == pytest.approx((0.9 + 0.5 + 0.0) / 3)
    assert dense["tasks"]["easy"]["right"] == "1111111110"
    assert dense["tasks"]["hard"]["standard_error"] == pytest.approx(math.sqrt(0.25 / 9))
    assert tasks_done(dense) == ["easy", "hard"]
    assert share_kept(dense, dense) == {"share": pytest.approx(1.0), "standard_error": pytest.approx(0.0)}
    guess = {"easy": [True, False] * 5, "hard": [False] * 10, "guessed": [True] * 10}
    assert share_kept(dense, task_scores(guess, chances))["share"] == pytest.approx(0.0)
    half = {"easy": [True] * 7 + [False] * 3, "hard": [True] * 2 + [False] * 8, "guessed": [True] * 10}
    assert share_kept(dense, task_scores(half, chances))["share"] == pytest.approx(0.4 / 0.9)
    assert mean_difference(dense, task_scores(half, chances), ["easy", "hard"])[0] == pytest.approx(-0.25)
    fewer = task_scores({name: half[name] for name in ("easy", "hard")}, chances)
    assert mean_difference(dense, fewer, ["easy", "hard"])[0] == pytest.approx(-0.25)
    for pair in ((dense, fewer), (fewer, dense)):
        with pytest.raises(LayerPruneError, match="Not the same questions"):
            mean_difference(*pair)
    with pytest.raises(LayerPruneError, match="not better than chance in any task"):
        share_kept(task_scores(guess, chances | {"guessed": 1.0}), dense)
    with pytest.raises(LayerPruneError, match="Not the same questions"):
        share_kept(dense, task_scores({"easy": [True] * 10}, {"easy": 0.5}))


def test_standard_errors_of_pairs_are_those_of_resampling():
    generator = np.random.default_rng(0)
    sizes, chances = {"a": 400, "b": 250}, {"a": 0.25, "b": 0.0}
    before = {name: generator.random(size) < 0.6 for name, size in sizes.items()}
    after = {name: x & (generator.random(len(x)) < 0.7) for name, x in before.items()}
    dense, pruned = (task_scores(one, chances) for one in (before, after))
    shares, differences = [], []
    for _ in range(3000):
        picks = {name: generator.integers(0, size, size) for name, size in sizes.items()}
        means = [
            np.mean([one[name][picks[name]].mean() - chances[name] for name in sizes])
            for one in (before, after)
        ]
        shares.append(means[1] / means[0])
        differences.append(means[1] - means[0])
    found = share_kept(dense, pruned)
    assert found["standard_error"] == pytest.approx(np.std(shares), rel=0.06)
    assert found["share"] == pytest.approx(np.mean(shares), abs=0.01)
    difference, error = mean_difference(dense, pruned)
    assert difference == pytest.approx(pruned["mean"] - dense["mean"])
    assert error == pytest.approx(np.std(differences), rel=0.06)
    assert error < math.hypot(dense["standard_error"], pruned["standard_error"])  # as it would be unpaired


def test_a_model_is_measured_and_compared(tokenizer):
    model, cut = make_model("llama"), make_model("llama")
    remove_layers(cut, [2, 3])
    batches = [{"input_ids": tokens(2, 24)}]
    results = {
        name: evaluate_model(one, tokenizer, batches, {"questions": QUESTIONS, "sciq": QUESTIONS[:4]})
        for name, one in (("dense", model), ("cut", cut))
    }
    read = [MultipleChoice(QUESTIONS, tokenizer).read(one) for one in (model, cut)]
    whole = MultipleChoice(QUESTIONS[:4], tokenizer, normalize=False)(cut)
    assert results["cut"]["tasks"]["sciq"]["accuracy"] == pytest.approx(whole)
    assert results["cut"]["layers"] == 4
    assert results["cut"]["perplexity"] == evaluate_text(cut, batches)["perplexity"]
    compare_models(results)
    assert results["cut"]["tasks"]["questions"]["stability"] == stability(*read)
    assert results["cut"]["difference"]["mean"] == pytest.approx(
        results["cut"]["mean"] - results["dense"]["mean"]
    )
    only_text = {"dense": {"layers": 6}}
    compare_models(only_text)
    assert only_text == {"dense": {"layers": 6}}


def test_the_share_that_is_kept_stands_beside_the_models():
    right = {"a": [True] * 40 + [False] * 10, "b": [True] * 5 + [False] * 45}
    models = {
        name: {"layers": 1, **task_scores(one, {"a": 0.5, "b": 0.5})}
        for name, one in {"dense": right, "cut": right | {"a": [True] * 31 + [False] * 19}}.items()
    }
    compare_models(models)
    assert models["dense"]["kept"]["share"] == pytest.approx(1)
    assert models["cut"]["kept"]["share"] == pytest.approx(0.12 / 0.3)
    assert models["cut"]["difference"]["mean"] == pytest.approx(-0.09)  # of both tasks


def test_what_is_kept_of_another_model_is_forgotten():
    one = {"layers": 1, **task_scores({"a": [True] * 40 + [False] * 10}, {"a": 0.5})}
    weak = {"layers": 1, **task_scores({"a": [True] * 25 + [False] * 25}, {"a": 0.5})}
    compare_models({"dense": one, "same": one})
    assert "kept" in one
    compare_models({"weak": weak, "same": one})
    assert "kept" not in one


def test_a_question_longer_than_the_model_reads_is_told_before_the_rest(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate_text", lambda *args: pytest.fail("read"))
    long = [Question("word " * 20, [" yes", " no"])]  # a hundred tokens, of 64
    with pytest.raises(LayerPruneError, match=r"A question has \d+ tokens, but the model reads 64 at most"):
        evaluate_model(llama, tokenizer, [{"input_ids": tokens(2, 24)}], {"questions": long})
