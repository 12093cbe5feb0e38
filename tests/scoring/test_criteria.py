import math

import pytest
import torch

from hf_layerprune import LayerPruneError, score_layers
from hf_layerprune.forward.hooks import captured, hidden
from hf_layerprune.forward.lm_head import LOGITS_PER_CHUNK, ChunkedLMHead, unit_losses
from hf_layerprune.forward.token_losses import UNIT
from hf_layerprune.scoring.criteria import CRITERIA, _count_tokens
from hf_layerprune.scoring.score import check_criterion_fits
from hf_layerprune.surgery.removal import without_layers

from ..conftest import logits, make_model, tokens
from ..tiny_models import tiny_model


def batches():
    padded = {"input_ids": tokens(2, 9, seed=3), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    padded["attention_mask"][1, 6:] = 0
    return [{"input_ids": tokens(2, 12)}, padded]


def rows():
    """Each text alone, without padding: (tokens,) at a time."""
    return [tokens(2, 12)[:1], tokens(2, 12)[1:], tokens(2, 9, seed=3)[:1], tokens(2, 9, seed=3)[1:, :6]]


def score(model, criterion, **settings):
    return score_layers(model, batches(), criterion, protected=[], progress=False, **settings)


def states(model, ids):
    """The raw states before each layer and after the last, float64."""
    with captured(model, range(6)) as found, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return [found[i][0].double() for i in range(6)] + [hidden(found[5][1]).double()]


def cosines(model, start, block_size):
    for ids in rows():
        raw = states(model, ids)
        before, after = raw[start][0], raw[start + block_size][0]
        yield (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)


@pytest.mark.parametrize("block_size", [1, 3])
def test_block_influence(model, block_size):
    table = score(model, "block_influence", block_size=block_size)
    assert list(table.scores) == list(range(7 - block_size))
    for layer, found in table.scores.items():
        assert found == pytest.approx(
            1 - torch.cat(list(cosines(model, layer, block_size))).mean().item(), abs=1e-5
        )


@pytest.mark.parametrize("block_size", [1, 2])
def test_angular(model, block_size):
    table = score(model, "angular", block_size=block_size)
    for layer, found in table.scores.items():
        angles = [
            math.acos(cosine[-1].clamp(-1, 1)) / math.pi for cosine in cosines(model, layer, block_size)
        ]
        assert found == pytest.approx(sum(angles) / 4, abs=1e-4)


def divergence(teacher, student):
    sums, count = 0.0, 0
    for ids in rows():
        p = logits(teacher, ids)[0, :-1].double().log_softmax(-1)
        q = logits(student, ids)[0, :-1].double().log_softmax(-1)
        sums, count = sums + (p.exp() * (p - q)).sum().item(), count + len(p)
    return sums / count


def test_kl_against_the_model_itself_and_against_a_teacher():
    model, teacher = make_model("gemma2"), make_model("gemma2", seed=1)
    own, taught = score(model, "kl"), score(model, "kl", teacher=teacher)
    assert own.quality is None
    whole = divergence(teacher, model)
    assert taught.quality == pytest.approx(-whole, rel=1e-5)
    dense = make_model("gemma2")
    for layer in range(6):
        with without_layers(model, layer):
            assert own.scores[layer] == pytest.approx(divergence(dense, model), rel=1e-4)
            assert taught.scores[layer] == pytest.approx(divergence(teacher, model) - whole, abs=1e-5)


def test_kl_with_a_teacher_of_another_kind():
    model, teacher = make_model("llama"), tiny_model("opt")  # whose logits are made at once
    found = score(model, "kl", teacher=teacher)
    assert found.quality == pytest.approx(-divergence(teacher, model), rel=1e-5)
    model.resize_token_embeddings(300)
    with pytest.raises(LayerPruneError, match="vocabularies of 300 and 260 tokens"):
        score(model, "kl", teacher=teacher)


def test_no_token_that_counts_is_an_error_everywhere(llama):
    batch = {"input_ids": tokens(2, 5), "labels": torch.full((2, 5), -100)}
    for criterion in ("loss", "kl", "hidden_mse", "taylor"):
        with pytest.raises(LayerPruneError, match="No token of the calibration counts"):
            score_layers(llama, [batch], criterion, progress=False)


def test_hidden_mse_is_relative(model):
    def last(model, ids):
        with torch.no_grad():
            return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1].double()

    table = score(model, "hidden_mse")
    own = [last(model, ids) for ids in rows()]
    for layer in (0, 3, 5):
        with without_layers(model, layer):
            cut = [last(model, ids) for ids in rows()]
        errors = [((c - o).square().sum(-1) / o.square().sum(-1)) for c, o in zip(cut, own, strict=True)]
        assert table.scores[layer] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-4)


def test_taylor(llama):
    llama.model.layers[2].requires_grad_(False)
    table = score(llama, "taylor")
    assert not llama.model.layers[2].mlp.up_proj.weight.requires_grad
    assert llama.model.layers[3].mlp.up_proj.weight.requires_grad
    assert all(parameter.grad is None for parameter in llama.parameters())
    copy = make_model().requires_grad_(True)
    total, count = 0.0, 0
    for ids in rows():
        said = copy(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(said, ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    (total / count).backward()
    for layer, found in table.scores.items():
        parameters = copy.model.layers[layer].parameters()
        assert found == pytest.approx(sum((p * p.grad).abs().sum().item() for p in parameters), rel=1e-3)
    pairs = score(llama, "taylor", block_size=2)
    assert pairs.scores[3] == pytest.approx(table.scores[3] + table.scores[4])


def test_positional_patterns(llama):
    def order(**settings):
        return score_layers(llama, criterion="positional", progress=False, **settings).ranking()

    assert order() == [4, 3, 2, 1]
    assert order(pattern="input") == [1, 2, 3, 4]
    assert set(order(pattern="middle")[:2]) == {2, 3}
    assert set(order(pattern="both")[:2]) == {1, 4}
    assert order(pattern="random", seed=1) == order(pattern="random", seed=1)
    assert len({tuple(order(pattern="random", seed=seed)) for seed in range(9)}) > 3
    assert order(block_size=2) == [3, 2, 1]


def test_several_tasks_count_by_their_mean(llama):
    table = score_layers(llama, criterion="task", task=[lambda model: 1.0, lambda model: 3.0], progress=False)
    assert table.quality == 2.0
    assert set(table.scores.values()) == {0.0}


@pytest.mark.parametrize("criterion", ["loss", "kl", "hidden_mse", "block_influence", "angular", "taylor"])
def test_padding_changes_nothing(llama, criterion):
    alone = [{"input_ids": ids} for ids in rows()]
    expected = score_layers(llama, alone, criterion, progress=False)
    found = score_layers(llama, batches(), criterion, progress=False)
    for layer, value in expected.scores.items():
        assert found.scores[layer] == pytest.approx(value, rel=1e-3, abs=1e-6)
        if expected.errors:
            assert found.errors[layer] == pytest.approx(expected.errors[layer], rel=1e-2)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "positional"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_model_is_left_as_it_was(llama, criterion, error):
    llama.train()
    llama.model.layers[1].eval()
    llama.model.layers[2].requires_grad_(False)
    llama.lm_head.weight.grad = torch.ones_like(llama.lm_head.weight)
    modes = [module.training for module in llama.modules()]
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    state, config = torch.get_rng_state(), llama.config.to_dict()
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == (3 if criterion == "task" else 9):
            raise error

    handle = llama.model.layers[4].register_forward_hook(stop)
    settings = {"task": lambda model: logits(model, tokens()).mean()} if criterion == "task" else {}
    many = batches() * 9
    with pytest.raises(error):
        score_layers(llama, many, criterion, progress=False, **settings)
    handle.remove()
    assert [module.training for module in llama.modules()] == modes
    assert [parameter.requires_grad for parameter in llama.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert llama.config.to_dict() == config
    assert len(llama.model.layers) == 6
    assert not any(module._forward_hooks or "forward" in vars(module) for module in llama.modules())
    assert llama.lm_head.weight.grad.sum() == llama.lm_head.weight.numel()
    assert all(p.grad is None for p in llama.model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "loss", "teacher": "x"}, "takes no teacher"),
        ({"criterion": "positional", "pattern": "zigzag"}, "There is no pattern 'zigzag'"),
        ({"criterion": "block_influence", "racing": 0.9}, "racing is 0.9 and criterion is block_influence"),
        ({"criterion": "loss", "racing": 99}, "racing is 99 and criterion is loss"),
        (
            {"criterion": "loss", "block_size": 6},
            "block_size is 6: it must be at least 1 and below the 6 layers",
        ),
        ({"criterion": "loss", "block_size": 0}, "block_size is 0"),
        ({"criterion": "loss", "block_size": 5}, "No layer to score"),
        ({"criterion": "loss", "cache_mb": 0}, "cache_mb is 0"),
    ],
)
def test_wrong_choices_are_refused(llama, settings, message):
    with pytest.raises(LayerPruneError, match=message):
        score_layers(llama, batches(), progress=False, **settings)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "gpt2", "bert", "opt", "minicpm3", "gemma3"])
def test_logits_is_chunked_are_the_models_own(name, monkeypatch):
    model = tiny_model(name)
    whole = logits(model, tokens()).flatten(0, 1)
    monkeypatch.setattr("hf_layerprune.forward.lm_head.LOGITS_PER_CHUNK", 260 * 20)
    with torch.no_grad():
        reader = ChunkedLMHead(model, tokens())
        pieces = list(reader.rows(reader.states({"input_ids": tokens()}).flatten(0, 1)))
        assert reader.is_chunked == (name != "opt")  # whose last hidden states are not those the head reads
    assert [len(piece) for piece in pieces] == [16, 8]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-5)
    assert "forward" not in vars(model.base_model)


def test_a_forward_that_was_patched_before_is_patched_after(llama):
    own = llama.base_model.forward
    llama.base_model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    patched = llama.base_model.forward
    expected = score(make_model(), "loss").scores
    assert score(llama, "loss").scores == expected
    assert llama.base_model.forward is patched


def test_chunks_hold_few_logits():
    """The memory of a chunk does not grow with the length of the text."""
    assert LOGITS_PER_CHUNK * 4 <= 128 * 2**20


def test_losses_of_units_are_float64_sums(llama):
    batch = {"input_ids": tokens(2, 2 * UNIT + 9), "attention_mask": torch.ones(2, 2 * UNIT + 9).long()}
    batch["attention_mask"][1, UNIT + 5 :] = 0
    llama.config.max_position_embeddings = 128
    with torch.no_grad():
        found = unit_losses(ChunkedLMHead(llama, tokens()), batch)
    said = logits(llama, **batch)[:, :-1].double().log_softmax(-1)
    losses = -said.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    losses[1, UNIT + 4 :] = 0
    expected = [part.sum().item() for row in losses for part in row.split(UNIT)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.dtype == torch.float64
    assert _count_tokens(batch).tolist() == [UNIT, UNIT, 8, UNIT, 4, 0]


@pytest.mark.parametrize("name", CRITERIA)
def test_the_table_says_what_each_criterion_does(name, llama):
    kind = CRITERIA[name]
    settings = {"task": lambda model: logits(model, tokens()).mean().item()} if kind.needs_task else {}

    def works(given=None, **more):
        try:
            return score_layers(llama, given or [], name, progress=False, **settings, **more)
        except LayerPruneError:
            return None

    table = works(batches())
    assert (table.quality is not None) == kind.measures_quality
    assert (works() is None) == (kind.reads_text and not kind.needs_task)
    assert (works(batches(), racing=0.9) is not None) == kind.leave_one_out
    assert (works(batches(), teacher=make_model()) is not None) == kind.takes_teacher
    settings = {} if kind.needs_task else {"task": len}
    assert works(batches()) is None
    if kind.needs_next_token:
        with pytest.raises(LayerPruneError, match="block_influence, angular, hidden_mse or positional, or"):
            check_criterion_fits(tiny_model("bert").base_model, name)
    else:
        check_criterion_fits(tiny_model("bert").base_model, name)
