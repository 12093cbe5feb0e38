import math
import random

import pytest
import torch

from hf_layerprune import LayerPruneError, MultipleChoice, evaluate_text, remove_layers, stability
from hf_layerprune.multiple_choice import Answer

from .conftest import logits, make_model, tokens
from .test_multiple_choice import QUESTIONS, likelihoods
from .test_scoring import batches, mean_loss


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
        best = max(range(len(sums)), key=lambda i: sums[i] / len(question.choices[i].strip()))
        assert answer.right == (best == question.answer)
    mixed = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
    found = [
        stability(*(MultipleChoice(questions, tokenizer).read(one) for one in (model, cut)))
        for questions in (QUESTIONS, mixed)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
