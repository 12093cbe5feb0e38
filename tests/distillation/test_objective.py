"""The distillation loss without a Trainer, against a plain reference in float32."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hf_layerprune import cache_teacher_logits, get_lineage, remove_layers
from hf_layerprune.data.targets import token_mask
from hf_layerprune.distillation.forward_pass import ForwardPass
from hf_layerprune.distillation.hidden_balance import HiddenBalance
from hf_layerprune.distillation.losses import hidden_pairs
from hf_layerprune.distillation.objective import distillation_loss
from hf_layerprune.distillation.shared_prefix import shared_prefix
from hf_layerprune.distillation.teacher_cache import CachedTeacherLogits
from hf_layerprune.forward.lm_head import router_losses
from hf_layerprune.surgery.decoder import find_decoder

from ..conftest import make_model, tokens
from ..pruning.test_faults import experts


REMOVED = [1, 2]


def make_settings(**changes):
    defaults = {
        "kl_weight": 0.7,
        "divergence": "kl",
        "jsd_beta": 0.5,
        "temperature": 2.0,
        "top_k": None,
        "ce_weight": 0.2,
        "hidden_weight": 0.3,
        "hidden_loss": "mse",
        "torch_compile": False,
        "torch_compile_backend": None,
        "torch_compile_mode": None,
    }
    return SimpleNamespace(**defaults | changes)


def test_torch_compile_compiles_the_loss():
    torch.compiler.reset()
    models, batch = make_models(), make_batch()
    losses = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.utils.counters.clear()
        losses.append(compute(*models, batch, make_settings(**changes)).total.detach())
    torch.testing.assert_close(losses[0], losses[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def make_models(family="llama"):
    teacher = make_model(family).requires_grad_(False)
    student = make_model(family)
    remove_layers(student, REMOVED)
    return student.train(), teacher


def make_batch(rows=4, length=12):
    """A batch with padding on either side."""
    batch = {"input_ids": tokens(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    batch["attention_mask"][0, 7:] = 0
    batch["attention_mask"][1, :3] = 0
    return batch


def compute(student, teacher, batch, settings, pairs=(), shared=0, **options):
    """The loss through [`ForwardPass`]."""
    forward = ForwardPass(teacher, student, batch["input_ids"])
    with router_losses(student) as routers:
        outputs = forward.run(batch, pairs, shared)
    mask = token_mask(batch["input_ids"], None, batch.get("attention_mask"))
    options |= {"layer_pairs": pairs, "router_losses": routers}
    return distillation_loss(*outputs, batch["input_ids"], mask, settings, **options)


def pairs_of(student, teacher, layers=None):
    return hidden_pairs(get_lineage(student), get_lineage(teacher), layers)


def kept_logits(model, batch):
    """The logits and targets of the positions that count."""
    mask = token_mask(batch["input_ids"], None, batch.get("attention_mask"))
    logits = model(**batch, use_cache=False).logits[:, :-1][mask]
    return logits, batch["input_ids"][:, 1:][mask]


def reference(student, teacher, batch, settings):
    """All terms from whole logits and hidden states; entry i + 1 of these is the output of layer i, the last
    entry follows the final norm."""
    kept = {"output_hidden_states": True, "use_cache": False}
    learned = student(**batch, **kept)
    with torch.no_grad():
        wanted = teacher(**batch, **kept)
    mask = token_mask(batch["input_ids"], None, batch.get("attention_mask"))
    p = (wanted.logits[:, :-1][mask] / settings.temperature).log_softmax(-1)
    q = (learned.logits[:, :-1][mask] / settings.temperature).log_softmax(-1)
    terms = {"kl": (p.exp() * (p - q)).sum() * settings.temperature**2}
    targets = batch["input_ids"][:, 1:][mask]
    terms["ce"] = F.cross_entropy(learned.logits[:, :-1][mask], targets, reduction="sum")
    # Layers 1 and 2 are gone, so layer 3 of the teacher is layer 1 of the student.
    errors = [
        (learned.hidden_states[i] - wanted.hidden_states[j])[:, :-1][mask].square().mean(-1).sum()
        for i, j in ((2, 4), (-1, -1))
    ]
    terms["hidden_mse"] = sum(errors) / 2
    weights = {"kl": settings.kl_weight, "ce": settings.ce_weight, "hidden_mse": settings.hidden_weight}
    return sum(weights[name] * value for name, value in terms.items()), terms


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_loss_and_gradients_are_those_of_a_plain_reference(family):
    student, teacher = make_models(family)
    batch, settings = make_batch(), make_settings()
    expected, terms = reference(student, teacher, batch, settings)
    expected.backward()
    plain = gradients(student)
    student.zero_grad()
    loss = compute(student, teacher, batch, settings, pairs_of(student, teacher))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.terms.keys() == terms.keys()
    for name, value in terms.items():
        assert loss.terms[name].item() == pytest.approx(value.item(), rel=1e-5)
        assert not loss.terms[name].requires_grad
    others = 0.7 * terms["kl"] + 0.2 * terms["ce"]
    assert loss.logit_loss.item() == pytest.approx(others.item(), rel=1e-5)
    assert loss.hidden_error.item() == pytest.approx(terms["hidden_mse"].item(), rel=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)


def test_padding_does_not_change_the_loss():
    student, teacher = make_models()
    ids, settings = tokens(4, 12), make_settings()
    pairs = pairs_of(student, teacher)
    plain = compute(student, teacher, {"input_ids": ids}, settings, pairs)
    filler = torch.full((4, 5), 7)
    padded = {
        "input_ids": torch.cat([ids, filler], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros_like(filler)], 1),
    }
    found = compute(student, teacher, padded, settings, pairs)
    assert found.total.item() == pytest.approx(plain.total.item(), rel=1e-5)


def test_the_loss_is_a_sum_over_tokens():
    student, teacher = make_models()
    batch, settings = make_batch(), make_settings()
    pairs = pairs_of(student, teacher)
    whole = compute(student, teacher, batch, settings, pairs).total
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    parts = sum(compute(student, teacher, row, settings, pairs).total for row in rows)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_term_without_weight_is_not_in_the_loss():
    student, teacher = make_models()
    batch = make_batch()
    _, terms = reference(student, teacher, batch, make_settings())
    only_kl = compute(student, teacher, batch, make_settings(ce_weight=0.0))
    assert only_kl.terms.keys() == {"kl"}
    measured = compute(student, teacher, batch, make_settings(ce_weight=0.0), with_cross_entropy=True)
    assert measured.terms["ce"].item() == pytest.approx(terms["ce"].item(), rel=1e-5)
    assert measured.total.item() == pytest.approx(0.7 * terms["kl"].item(), rel=1e-5)
    settings = make_settings(kl_weight=0.0, ce_weight=0.0)
    only_hidden = compute(student, teacher, batch, settings, pairs_of(student, teacher))
    assert only_hidden.terms.keys() == {"hidden_mse"}
    assert only_hidden.total.item() == pytest.approx(0.3 * terms["hidden_mse"].item(), rel=1e-5)


def test_top_k_sees_all_other_tokens_as_one():
    student, teacher = make_models()
    batch, settings = make_batch(), make_settings(top_k=9, ce_weight=0.0)
    learned, _ = kept_logits(student, batch)
    wanted, _ = kept_logits(teacher, batch)
    ids = wanted.topk(9).indices

    def with_rest(logits):
        p = (logits / 2).softmax(-1).gather(-1, ids)
        return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)

    p, q = with_rest(wanted), with_rest(learned)
    expected = 4 * (p * (p / q).log()).sum()
    assert compute(student, teacher, batch, settings).terms["kl"].item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_cached_logits_give_the_loss_of_the_teacher():
    student, teacher = make_models()
    batch, settings = make_batch(), make_settings(top_k=9)
    cache_teacher_logits(teacher, [batch], "cache", top_k=9, temperature=2.0, hidden_layers=[3, 5])
    pairs = pairs_of(student, teacher, [3, 5])
    found = compute(student, CachedTeacherLogits("cache"), batch, settings, pairs)
    expected = compute(student, teacher, batch, settings, pairs)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    assert found.terms.keys() == expected.terms.keys()


def test_shared_first_layers_run_once_and_change_nothing():
    student, teacher = make_models()
    student.requires_grad_(False)
    find_decoder(student).layers[1:].requires_grad_(True)
    batch, settings = make_batch(), make_settings()
    assert shared_prefix(student, teacher, batch["input_ids"]) == 1
    results, runs = [], []
    for shared in (0, 1):
        student.zero_grad()
        first = find_decoder(student).layers[0].mlp
        handle = first.register_forward_hook(lambda *_, shared=shared: runs.append(shared))
        loss = compute(student, teacher, batch, settings, pairs_of(student, teacher), shared)
        handle.remove()
        loss.total.backward()
        results.append((loss.total.item(), gradients(student)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)
    assert runs.count(0) == runs.count(1) + 1  # both try the LM head once


def test_balancing_losses_of_experts_are_added_by_tokens():
    student = experts().train()
    batch = make_batch()
    own = student(**batch, use_cache=False)
    loss = compute(student, experts().requires_grad_(False), batch, make_settings(hidden_weight=0.0))
    count = token_mask(batch["input_ids"], None, batch["attention_mask"]).sum()
    assert loss.terms["aux_loss"].item() == pytest.approx((own.aux_loss * count).item(), rel=1e-5)
    # The weight of the balancing loss in the config of these models is 1.
    assert (loss.total - loss.logit_loss).item() == pytest.approx(loss.terms["aux_loss"].item(), rel=1e-4)


def test_the_balance_makes_the_hidden_error_as_large_as_the_other_terms():
    student, teacher = make_models()
    batch, settings = make_batch(), make_settings(hidden_weight=0.5)
    pairs, kept = pairs_of(student, teacher), get_lineage(student).kept
    balance, memory = HiddenBalance(lambda value: value), {}
    totals = []
    for step in range(2):
        scale = balance.scale(memory, kept, step)
        loss = compute(student, teacher, batch, settings, pairs, hidden_scale=scale)
        balance.add(memory, loss)
        assert balance.scale(memory, kept, step) == scale  # the same for all micro-batches of a step
        totals.append(loss.total.item() / loss.logit_loss.item())
    assert totals == pytest.approx([1.0, 1.5], rel=1e-5)
    assert balance.scale(memory, kept[:-1], 2) == 0.0  # other layers


def test_autocast_is_near_float32():
    student, teacher = make_models()
    batch, settings = make_batch(), make_settings()
    pairs = pairs_of(student, teacher)
    plain = compute(student, teacher, batch, settings, pairs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = compute(student, teacher, batch, settings, pairs)
    assert cast.total.dtype == torch.float32
    assert cast.total.item() != plain.total.item()
    assert cast.total.item() == pytest.approx(plain.total.item(), rel=0.02)
    cast.total.backward()
    assert all(p.grad.dtype == torch.float32 for p in student.parameters())


def test_a_larger_vocabulary_is_only_padding():
    student, teacher = make_models()
    batch, settings = make_batch(), make_settings(ce_weight=0.0)
    plain = compute(student, teacher, batch, settings).total
    for model in (0, 1):
        models = [copy.deepcopy(student), copy.deepcopy(teacher)]
        models[model].resize_token_embeddings(272)
        found = compute(*models, batch, settings).total
        assert found.item() == pytest.approx(plain.item(), rel=1e-5)
