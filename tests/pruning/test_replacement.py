import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_layerprune import LayerPruneError, get_lineage, remove_layers
from hf_layerprune.pruning.linear_map import RIDGES, best_ridge, check_linear_map, replace_by_linear_map
from hf_layerprune.pruning.replacement import replace_block
from hf_layerprune.surgery.decoder import find_decoder

from ..conftest import CONFIGS, logits, make_model, tokens
from ..distillation.test_trainer import examples, make_trainer
from ..tiny_models import tiny_model


GATED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"}
FAMILIES = sorted(CONFIGS)
BATCHES = [{"input_ids": tokens(4, 12, seed=seed)} for seed in (5, 6)]


def states(model, ids):
    """The states before each layer and after the last, without the final norm."""
    found, stack = [], find_decoder(model).layers
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output: found.append(
                (args[0] if args else kwargs["hidden_states"], output)
            ),
            with_kwargs=True,
        )
        for layer in stack
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    last = found[-1][1]
    return [before for before, _ in found] + [last[0] if isinstance(last, tuple) else last]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("layers", [1, 2])
def test_inherited_layers_begin_as_the_removal_of_the_others(family, layers):
    model, expected = make_model(family), make_model(family)
    trained = replace_block(model, 1, 4, "layer", layers)
    remove_layers(expected, [1 + i for i in range(layers, 4)])
    assert torch.equal(logits(model, tokens()), logits(expected, tokens()))
    assert get_lineage(model).kept == [0, *range(5 - layers, 6)]  # by lineage, the last of the run
    stack = find_decoder(model).layers
    assert {id(p) for p in trained} == {id(p) for i in range(layers) for p in stack[1 + i].parameters()}


def test_inherited_layers_may_overlap_with_those_they_inherit(llama):
    expected = make_model()
    replace_block(llama, 1, 3, "layer", 2)
    remove_layers(expected, 3)
    assert torch.equal(logits(llama, tokens()), logits(expected, tokens()))


def test_nothing_may_stand_in(llama):
    expected = make_model()
    assert replace_block(llama, 2, 3, "none") == []
    remove_layers(expected, [2, 3, 4])
    assert torch.equal(logits(llama, tokens()), logits(expected, tokens()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_feed_forward_part_begins_as_nothing_and_is_a_plain_layer(family, tmp_path):
    model, without = make_model(family), make_model(family)
    trained = replace_block(model, 1, 3, "swiglu" if family in GATED else "ffn")
    remove_layers(without, [1, 2, 3])
    torch.testing.assert_close(logits(model, tokens()), logits(without, tokens()), rtol=1e-4, atol=1e-5)
    assert get_lineage(model).kept == [0, 3, 4, 5]
    module = find_decoder(model).layers[1]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(logits(model, tokens()), logits(without, tokens()), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    attention = getattr(module, "self_attn", None) or getattr(module, "attn", None) or module.attention
    assert not {id(p) for p in attention.parameters()} & {id(p) for p in trained}
    generated = [m.generate(tokens()[:, :4], max_new_tokens=4, do_sample=False) for m in (model, again)]
    assert torch.equal(*generated)


def test_the_folded_part_is_the_feed_forward_network_of_the_paper(llama):
    """x + W2 (silu(G n(x)) * W1 n(x)), with a norm n: as it would be without the layer around it."""
    trained = replace_block(llama, 1, 3, "swiglu")
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    layer = find_decoder(llama).layers[1]
    found = states(llama, tokens())
    x = found[1]
    norm = layer.post_attention_layernorm
    n = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    mlp = layer.mlp
    expected = x + (F.silu(n @ mlp.gate_proj.weight.T) * (n @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(found[2], expected)


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("llama", "ffn", "are gated. Use swiglu"),
        ("gpt2", "swiglu", "are not gated. Use ffn"),
        ("opt", "ffn", "has no mlp, feed_forward, ffn. Use replacement='layer'"),
        ("openai-gpt", "ffn", "changes the hidden state even when"),  # a norm comes after the sum
        ("llama", "linear", "kind is 'linear': choose from none, layer, ffn, swiglu"),
        ("llama", "magic", "kind is 'magic'"),
    ],
)
def test_impossible_replacements_are_refused_and_change_nothing(family, kind, message):
    model = make_model(family) if family in CONFIGS else tiny_model(family)
    ids = tokens() % 60
    before = logits(model, ids)
    with pytest.raises(LayerPruneError, match=message):
        replace_block(model, 1, 3, kind)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("first", "count", "layers"), [(1, 6, 1), (4, 3, 1), (0, 6, 1), (1, 3, 3), (1, 3, 0)]
)
def test_impossible_blocks_are_refused(llama, first, count, layers):
    with pytest.raises(LayerPruneError):
        replace_block(llama, first, count, "layer", layers)
    assert len(find_decoder(llama).layers) == 6


def test_training_the_replacement_brings_its_output_to_that_of_the_block(llama):
    teacher = make_model()
    trained = {id(p) for p in replace_block(llama, 1, 3, "layer")}
    for parameter in llama.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    frozen = {n: p.clone() for n, p in llama.named_parameters() if id(p) not in trained}
    batch = tokens(8, 12)
    wanted = states(teacher, batch)[4]
    before = F.mse_loss(states(llama, batch)[2], wanted)
    settings = {"kl_weight": 0.0, "hidden_weight": 1.0, "hidden_layers": [3], "learning_rate": 1e-2}
    trainer = make_trainer(llama, examples(8), teacher_model=teacher, max_steps=30, **settings)
    trainer.train()
    logged = [entry["hidden_mse"] for entry in trainer.state.log_history if "hidden_mse" in entry]
    after = F.mse_loss(states(llama.eval(), batch)[2], wanted)
    assert logged[0] == pytest.approx(before.item(), rel=0.3)  # of its own batch
    assert after < 0.7 * before
    assert all(torch.equal(p, frozen[n]) for n, p in llama.named_parameters() if n in frozen)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_the_linear_map_is_that_of_least_squares(family, tmp_path):
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which are nothing at first
                parameter += 0.1 * torch.randn_like(parameter)
    original = copy.deepcopy(model)
    first, count = 2, 3
    part = find_decoder(original).layers[first - 1].mlp
    said = []
    handle = part.register_forward_hook(lambda module, args, output: said.append(output))
    gave, rest, wanted = [], [], []
    for batch in BATCHES:
        said.clear()
        found = states(original, batch["input_ids"])
        # All positions but the last of each row count, as for a loss.
        gave.append(said[0][:, :-1].flatten(0, 1))
        rest.append(found[first][:, :-1].flatten(0, 1) - gave[-1])
        wanted.append(found[first + count][:, :-1].flatten(0, 1))
    handle.remove()
    gave, rest, wanted = (torch.cat(parts).double().numpy() for parts in (gave, rest, wanted))
    expected = np.linalg.lstsq(gave, wanted - rest, rcond=None)[0]

    weight = replace_by_linear_map(model, first, count, BATCHES, ridge=1e-12)
    assert get_lineage(model).kept == [0, 1, 5]
    old = find_decoder(original).layers[first - 1].mlp
    names = {id(p): n for n, p in find_decoder(model).layers[first - 1].mlp.named_parameters()}
    before = dict(old.named_parameters())[names[id(weight)]].detach().double().numpy()
    folded = before @ expected if family == "gpt2" else expected.T @ before
    np.testing.assert_allclose(weight.detach().numpy(), folded, rtol=2e-2, atol=2e-3 * np.abs(folded).max())
    ids = BATCHES[0]["input_ids"]
    found = states(model, ids)[first][:, :-1].flatten(0, 1).detach().numpy()
    count = len(found)
    np.testing.assert_allclose(found, (rest + gave @ expected)[:count], atol=1e-2 * np.abs(wanted).max())
    # It fits what it was made on better than leaving the run out does.
    error = np.square((rest + gave @ expected) - wanted).mean()
    assert error < np.square((rest + gave) - wanted).mean()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(type(model).from_pretrained(tmp_path).eval(), tokens()), logits(model, tokens())
    )


@torch.no_grad()
def test_the_map_of_little_text_is_no_worse_than_none():
    """Of fewer tokens than it is wide, a free fit is; the ridge is drawn to leaving the run out."""
    few, other = [{"input_ids": tokens(2, 12, seed=1)}], {"input_ids": tokens(8, 24, seed=2)}

    def error(ridge):
        model = make_model(hidden_size=64)
        wanted = states(model, other["input_ids"])[5]
        if ridge == "no map":
            remove_layers(model, [2, 3, 4])
        else:
            replace_by_linear_map(model, 2, 3, few, ridge)
        return float(F.mse_loss(states(model, other["input_ids"])[2], wanted))

    assert error(None) <= 1.02 * error("no map")
    assert error(1e-9) > 1.1 * error("no map")
    assert error(1e9) == pytest.approx(error("no map"), rel=1e-3)


def test_the_ridge_is_that_with_which_either_half_fits_the_other_best():
    random = np.random.default_rng(0)
    inputs = [random.normal(size=(30, 8)) for _ in range(2)]
    targets = [one @ random.normal(size=(8, 8)) * 0.1 + random.normal(size=(30, 8)) for one in inputs]

    def error(ridge):
        total = 0.0
        for one, other in ((0, 1), (1, 0)):
            size = ridge * np.mean(np.square(inputs[one]).sum(0))
            rows = np.vstack([inputs[one], np.sqrt(size) * np.eye(8)])
            fit = np.linalg.lstsq(rows, np.vstack([targets[one], np.zeros((8, 8))]), rcond=None)[0]
            total += np.square(targets[other] - inputs[other] @ fit).sum()
        return total

    grams = torch.tensor(np.stack([one.T @ one for one in inputs]))
    crosses = torch.tensor(np.stack([one.T @ two for one, two in zip(inputs, targets, strict=True)]))
    chosen = best_ridge(grams, crosses)
    assert chosen == min(RIDGES, key=error)
    assert RIDGES[0] < chosen < RIDGES[-1]


@pytest.mark.parametrize(
    ("family", "first", "message"),
    [
        ("gemma2", 2, "is not simply added"),
        ("llama", 0, "multiplied into the layer before the block"),
        ("llama", 4, "No layers"),
    ],
)
def test_a_refused_linear_map_changes_nothing(family, first, message):
    model = make_model(family)
    before, weights = logits(model, tokens()), copy.deepcopy(model.state_dict())
    with pytest.raises(LayerPruneError, match=message):
        replace_by_linear_map(model, first, 3, BATCHES)
    assert torch.equal(logits(model, tokens()), before)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_layers_of_different_kinds_are_refused_and_nothing_changes():
    model = tiny_model("deepseek_v3")  # two dense layers first, then sparse ones
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LayerPruneError, match="are of different kinds"):
        replace_block(model, 1, 3, "layer")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(get_lineage(model).kept) == len(find_decoder(model).layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_without_a_linear_map_are_known_beforehand(family, dtype):
    model = make_model(family).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if family in ("gemma2", "gemma3_text"):  # which normalise what the part gives
        with pytest.raises(LayerPruneError, match="is not simply added"):
            check_linear_map(model)
    else:
        check_linear_map(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
