import contextlib
import math
import random
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from hf_layerprune import LayerPruneError, MultipleChoice, remove_layers, score_layers
from hf_layerprune.forward.attention_masks import masks_made_once
from hf_layerprune.forward.hooks import replayed
from hf_layerprune.forward.lm_head import ChunkedLMHead, unit_losses
from hf_layerprune.scoring import score
from hf_layerprune.scoring.criteria import CriterionResult, _count_tokens
from hf_layerprune.scoring.journal import Journal
from hf_layerprune.scoring.leave_one_out import (
    Metric,
    PerUnitScores,
    PrefixCache,
    _student_quantile,
    leave_out,
)
from hf_layerprune.scoring.score import _small_enough
from hf_layerprune.surgery.layer_stack import LayerStack
from hf_layerprune.surgery.removal import without_layers

from ..conftest import LAYERS, logits, make_model, tokens
from ..evaluation.test_multiple_choice import QUESTIONS
from ..tiny_models import tiny_model


def batches():
    padded = {"input_ids": tokens(2, 9, seed=3), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    padded["attention_mask"][1, 6:] = 0
    return [{"input_ids": tokens(2, 12)}, padded]


def losses(model, given, cuts=None, confidence=None, ticks=None):
    """The leave-one-out losses of every layer."""
    metric = Metric(
        _count_tokens,
        lambda reader, batch: (None, unit_losses(reader, batch)),
        lambda reader, batch, reference: unit_losses(reader, batch),
    )
    with torch.no_grad():
        return leave_out(
            LayerStack(model),
            given,
            metric,
            given[0]["input_ids"][:1],
            cuts or LayerStack(model).removable(range(LAYERS))[0],
            confidence,
            (lambda done: None) if ticks is None else ticks.append,
            Journal(None, ""),
        )


@pytest.mark.parametrize("block_size", [1, 2])
def test_computing_only_what_comes_after_is_exact_to_the_bit(model, block_size):
    cuts, _ = LayerStack(model).removable(range(LAYERS - block_size + 1), block_size)
    found = losses(model, batches(), cuts)
    with torch.no_grad():
        reader = ChunkedLMHead(model, tokens())
        assert found.whole == [x for b in batches() for x in unit_losses(reader, b).tolist()]
        for layer in cuts:
            with without_layers(model, range(layer, layer + block_size)):
                naive = [x for batch in batches() for x in unit_losses(reader, batch).tolist()]
            assert found.without[layer] == naive


def test_layers_that_hand_on_more_get_full_passes():
    model = tiny_model("gemma3n_text")
    cuts, _ = LayerStack(model).removable(range(7))
    found = losses(model, batches(), cuts)
    with torch.no_grad():
        reader = ChunkedLMHead(model, tokens())
    for layer in cuts:
        with without_layers(model, layer), torch.no_grad():
            naive = [x for batch in batches() for x in unit_losses(reader, batch).tolist()]
        assert found.without[layer] == naive


def test_only_what_comes_after_is_computed(llama):
    calls = []
    for layer in llama.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    batch = {"input_ids": tokens(1, 12)}
    losses(llama, [batch])
    first = len(calls)
    losses(llama, [batch, batch])
    # A batch more: the six layers once, and for each candidate those after it.
    assert len(calls) - 2 * first == LAYERS + sum(range(LAYERS))


def example():
    tokens_of = [10.0, 12.0, 8.0, 10.0]
    whole = [30.0, 40.0, 20.0, 33.0]
    return PerUnitScores(tokens_of, whole, {1: [31.0, 41.5, 21.0, 34.0], 2: [36.0, 46.0, 24.0, 39.0]})


def test_scores_and_errors_of_a_ratio():
    values = example()
    assert values.quality() == -123 / 40
    assert values.score(1) == pytest.approx(4.5 / 40)
    rises = [1.0, 1.5, 1.0, 1.0]
    residuals = [r - 4.5 / 40 * t for r, t in zip(rises, values.tokens, strict=True)]
    expected = math.sqrt(sum(r * r for r in residuals) * 4 / 3) / 40
    assert values.error(1) == pytest.approx(expected)
    assert PerUnitScores([3.0], [1.0], {0: [2.0]}).error(0) is None


def test_the_error_is_that_of_repeated_samples():
    """A score's standard error is the spread of scores over many calibrations."""
    generator = torch.Generator().manual_seed(0)
    scores, errors = [], []
    for _ in range(400):
        count = torch.randint(5, 50, (30,), generator=generator).double()
        rise = count * (0.3 + 0.2 * torch.randn(30, generator=generator, dtype=torch.float64))
        values = PerUnitScores(count.tolist(), [0.0] * 30, {0: rise.tolist()})
        scores.append(values.score(0))
        errors.append(values.error(0))
    assert torch.tensor(scores).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.1)


def test_surely_worse_candidates_are_dropped():
    values, many = example(), 10_000
    assert values.possible([1, 2], 0.99, 1, many) == [1]
    assert values.possible([1, 2], 0.9999, 1, many) == [1, 2]
    # The fewer are still to be seen, the less can change.
    assert values.possible([1, 2], 0.9999, 1, 5) == [1]
    # Nor need those be told apart that differ by less than their scores are known.
    nearly = [x + y for x, y in zip(values.without[1], [0.001, -0.001, 0.001, -0.001], strict=True)]
    equal = PerUnitScores(values.tokens, values.whole, {1: values.without[1], 2: nearly})
    assert len(equal.possible([1, 2], 0.99, 1, 5)) == 1
    unlike = PerUnitScores(values.tokens, values.whole, {1: values.without[1], 2: values.without[1][::-1]})
    assert unlike.possible([1, 2], 0.99, 1, many) == [1, 2]
    assert PerUnitScores([1.0], [1.0], {1: [1.0], 2: [9.0]}).possible([1, 2], 0.99, 1, many) == [1, 2]


def test_the_least_important_is_seldom_dropped():
    """Of candidates that differ by chance alone: what is left after a look holds one that on all units lies
    within a standard error of the least, as often as stated."""
    generator = torch.Generator().manual_seed(1)
    means = torch.tensor([0.0, 0.05, 0.05, 0.1, 0.2], dtype=torch.float64)
    lost = 0
    for _ in range(500):
        rises = torch.randn(40, 5, generator=generator, dtype=torch.float64) + means
        full = PerUnitScores([1.0] * 40, [0.0] * 40, dict(enumerate(rises.T.tolist())))
        part = PerUnitScores([1.0] * 12, [0.0] * 12, dict(enumerate(rises[:12].T.tolist())))
        least = min(range(5), key=full.score)
        near = [i for i in range(5) if full.score(i) <= full.score(least) + full.error(least)]
        lost += not set(near) & set(part.possible(range(5), 0.9, 1, 40))
    assert lost / 500 < 0.1


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [(0.975, 5, 2.571), (0.975, 10, 2.228), (0.995, 7, 3.499), (0.999, 15, 3.733), (0.95, 30, 1.697)],
)
def test_students_quantiles(probability, degrees, expected):
    assert _student_quantile(probability, degrees) == pytest.approx(expected, rel=0.03)


def many(model):
    """Batches in which each layer is of use: what the model itself finds most likely is to be said."""
    found = [tokens(2, 16, seed=i) for i in range(12)]
    said = [logits(model, ids).argmax(-1)[:, :-1] for ids in found]
    return [
        {"input_ids": ids, "labels": torch.cat([ids[:, :1], labels], 1)}
        for ids, labels in zip(found, said, strict=True)
    ]


def test_racing_finds_the_same_layer_with_less(llama):
    given = many(llama)
    full = score_layers(llama, given, progress=False)
    raced = score_layers(llama, given, progress=False, racing=0.95)
    random.Random(0).shuffle(given)
    assert raced.ranking()[0] == full.ranking()[0]
    assert full.seen == dict.fromkeys(full.scores, 24)
    assert sum(raced.seen.values()) < sum(full.seen.values())
    for layer, seen in raced.seen.items():  # what was seen was seen right
        part = score_layers(llama, given[: seen // 2], progress=False)
        assert raced.scores[layer] == pytest.approx(part.scores[layer], abs=1e-12)
        assert raced.errors[layer] == pytest.approx(part.errors[layer], abs=1e-12)
    best = raced.ranking()[0]
    assert raced.seen[best] == max(raced.seen.values())


def test_the_bar_is_full_in_the_end(llama):
    for confidence in (None, 0.9):
        ticks = []
        losses(llama, many(llama), confidence=confidence, ticks=ticks)
        assert sum(ticks) == LAYERS * len(many(llama))


def test_large_batches_are_read_in_parts(llama):
    batch = {"input_ids": tokens(50, 64), "attention_mask": torch.ones(50, 64, dtype=torch.long)}
    parts = _small_enough(LayerStack(llama), [batch], 1)
    state = 6 * 64 * 32 * 4  # layers, length, hidden size, bytes
    assert [len(part["input_ids"]) for part in parts] == [
        2**20 // state,
        2**20 // state,
        50 - 2 * (2**20 // state),
    ]
    for name, value in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)


def test_a_bound_on_memory_changes_nothing(llama):
    whole = score_layers(llama, many(llama), progress=False)
    torch.testing.assert_close(
        whole.scores, score_layers(llama, many(llama), progress=False, cache_mb=1).scores, rtol=0, atol=1e-6
    )


def test_a_layer_without_which_nothing_is_finite_stays(llama):
    """As in float16, where some layer keeps the numbers in range."""
    scores = score_layers(llama, batches(), progress=False).scores

    def overflow(module, args, output):
        return output if len(llama.model.layers) == LAYERS else output * math.inf

    llama.model.layers[5].register_forward_hook(overflow)
    with pytest.raises(LayerPruneError, match="No layer has a loss score that is a finite number"):
        score_layers(llama, batches(), progress=False)
    first = llama.model.layers[1]
    llama.model.layers[5]._forward_hooks.clear()

    def needs_first(module, args, output):
        return output if first in llama.model.layers else output * math.nan

    llama.model.layers[5].register_forward_hook(needs_first)
    for racing in (None, 0.9):
        table = score_layers(llama, batches(), racing=racing, progress=False)
        assert table.scores == {i: score for i, score in scores.items() if i != 1}
        assert "Without layer 1 the loss score is not a finite number" in table.refused[1]


def test_a_model_without_finite_losses_is_refused_at_once(llama):
    llama.model.norm.weight.data[3] = math.nan
    ticks = []
    with pytest.raises(LayerPruneError, match="own score on calibration batch 1 is not a finite number"):
        losses(llama, batches(), ticks=ticks)
    assert sum(ticks) <= LAYERS


@pytest.mark.parametrize("criterion", ["loss", "kl", "hidden_mse"])
def test_layers_before_a_cut_are_not_computed_again(criterion, llama):
    calls = []

    def count(module, args, output):
        calls.append(1) if args[0].shape[:2] == (2, 12) else None  # not a look at whether this works

    llama.model.layers[2].mlp.register_forward_hook(count)
    given = [{"input_ids": tokens(2, 12, seed=i)} for i in range(4)]

    def score(prefix_cache):
        calls.clear()
        table = score_layers(llama, given, criterion, prefix_cache=prefix_cache, progress=False)
        return table, len(calls)

    prefix_cache, small = PrefixCache(), PrefixCache(0)
    first, computed = score(prefix_cache)
    assert score(small) == (first, computed)
    remove_layers(llama, 3)
    expected, computed = score(small)
    assert score(prefix_cache) == (expected, computed - len(given))
    assert len(prefix_cache.known(0, [0, 1, 2, 4, 5])) == 3  # up to the deepest candidate
    assert len(prefix_cache.known(0, [0, 2, 4, 5])) == 1
    assert prefix_cache.known(0, [1, 2, 4, 5]) == prefix_cache.known(9, [0]) == small.known(0, [0]) == []


def test_prefixes_keep_to_their_bound():
    prefix_cache, output = PrefixCache(1), torch.zeros(2**17)  # half a MiB
    prefix_cache.keep(0, [0], [(output, None)])
    prefix_cache.keep(1, [0, 1], [output, output])
    assert len(prefix_cache.known(0, [0])) == 1
    assert prefix_cache.known(1, [0, 1]) == []
    prefix_cache.keep(0, [0, 1], [output, output])  # in the place of what was there
    assert len(prefix_cache.known(0, [0, 1])) == 2


def test_no_token_that_counts_is_an_error(llama):
    batch = {"input_ids": tokens(2, 5), "labels": torch.full((2, 5), -100)}
    with pytest.raises(LayerPruneError, match="No token of the calibration counts"):
        score_layers(llama, [batch], progress=False)


def test_autocast_and_another_seed():
    model = make_model("qwen3", seed=3)
    plain = score_layers(model, batches(), progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = score_layers(model, batches(), progress=False)
    assert all(rough.scores[i] == pytest.approx(score, abs=0.2) for i, score in plain.scores.items())


def test_a_forward_of_a_layers_own_is_put_back(llama):
    layer = llama.model.layers[2]
    own = layer.forward
    layer.forward = own  # as a wrapper for a device or a precision sets it
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), replayed(llama, [torch.zeros(1)] * 4):
            assert torch.equal(layer.forward("anything"), torch.zeros(1))
            if error:
                raise error
        assert vars(layer)["forward"] is own
        assert "forward" not in vars(llama.model.layers[1])


def test_prefixes_are_of_the_same_parts_when_layers_have_gone(llama):
    """A batch is read in parts of as many rows as fit, which must not be more when fewer layers are left."""
    given, prefix_cache = [{"input_ids": tokens(48, 32)}], PrefixCache()
    settings = {"cache_mb": 1, "progress": False}
    parts = [
        len(_small_enough(LayerStack(make_model(num_hidden_layers=count)), given, 1)) for count in (6, 5)
    ]
    assert parts[0] > parts[1]  # as a model of that depth would be read
    score_layers(llama, given, prefix_cache=prefix_cache, **settings)
    remove_layers(llama, 3)
    found = score_layers(llama, given, prefix_cache=prefix_cache, **settings)
    assert found == score_layers(llama, given, **settings)


class Reads(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU: numbers that it reads, and indexing by masks."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        indices = args[1] if function == aten.index.Tensor else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        reads = function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
        self.count += by_mask or reads
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("criterion", ["loss", "hidden_mse", "block_influence", "task"])
def test_what_a_gpu_waits_for_does_not_grow_with_the_candidates(criterion, tokenizer, monkeypatch):
    reads, tolist = Reads(), torch.Tensor.tolist

    def counted(self):
        reads.count += 1
        return tolist(self)

    def count(layers):
        model, task = make_model(num_hidden_layers=layers), None
        if criterion == "task":
            task = MultipleChoice(QUESTIONS, tokenizer, batch_tokens=10**6)
        cuts, _ = LayerStack(model).removable(range(layers))
        monkeypatch.setattr(score, "_candidates", lambda *args: (cuts, {}))  # a look at the model alone
        reads.count = 0
        with reads:
            score_layers(model, [{"input_ids": tokens()}], criterion, task=task, progress=False)
        return reads.count

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    # Means of numbers that were read.
    monkeypatch.setattr(CriterionResult, "of", lambda *args, **kwargs: CriterionResult({0: 1.0}))
    assert count(12) == count(4) <= 20


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_masks_are_made_once_and_are_those_of_the_model(family, monkeypatch):
    model, calls, own = make_model(family), [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda ids: (calls.append(1), own(ids))[1]
    )
    expected = logits(model, tokens())
    each = len(calls)
    maker = sys.modules[type(model.model).__module__].create_causal_mask
    with masks_made_once(model):
        assert all(torch.equal(logits(model, tokens()), expected) for _ in range(3))
        assert len(calls) == 2 * each > 0
        # With a cache, the mask grows from pass to pass.
        found = model.generate(tokens(), max_new_tokens=4, do_sample=False)
    assert sys.modules[type(model.model).__module__].create_causal_mask is maker
    assert torch.equal(found, model.generate(tokens(), max_new_tokens=4, do_sample=False))
