import contextlib
import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_layerprune.data.targets import token_mask
from hf_layerprune.distillation.losses import divergence
from hf_layerprune.distillation.tiled_loss import LOGITS_PER_CHUNK_CPU, logits_per_chunk, tiled_loss
from hf_layerprune.forward.hooks import undisturbed
from hf_layerprune.forward.lm_head import ChunkedLMHead
from hf_layerprune.forward.token_losses import cross_entropy

from ..conftest import make_model, tokens
from ..surgery.test_architectures import NAMES
from ..tiny_models import tiny_model


WEIGHTS = {"kl": 1.0, "ce": 0.5}


def losses(own, theirs, targets):
    return {"kl": divergence(own, theirs), "ce": cross_entropy(own, targets), "noted": own.detach().sum() * 0}


def reader(model):
    with undisturbed(model):
        return ChunkedLMHead(model, tokens() % 60)


def perturbed(model):
    teacher, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return teacher


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check_against_whole_logits(model):
    """Loss and gradients in tiles equal those of logits made at once; whether they were made in tiles."""
    ids = tokens(2, 9) % 60
    mask = token_mask(ids)
    mask[0, 2] = False
    teacher = perturbed(model)
    student_reader, teacher_reader = reader(model), reader(teacher)
    with torch.no_grad():
        taught = teacher_reader.states({"input_ids": ids})
        expected = teacher(input_ids=ids, use_cache=False).logits
    states = student_reader.states({"input_ids": ids})
    parts = [x[:, :-1][mask] for x in (states, taught)]
    total, sums = tiled_loss(
        student_reader, parts[0], teacher_reader, parts[1], ids[:, 1:][mask], losses, WEIGHTS | {"noted": 0.0}
    )
    total.backward()
    found = gradients(model)
    logits = model(input_ids=ids, use_cache=False).logits
    reference = losses(logits[:, :-1][mask], expected[:, :-1][mask], ids[:, 1:][mask])
    whole = sum(WEIGHTS[name] * reference[name] for name in WEIGHTS)
    whole.backward()
    plain = gradients(model)
    assert total.item() == pytest.approx(whole.item(), rel=1e-4)
    for name in WEIGHTS:
        assert sums[name].item() == pytest.approx(reference[name].item(), rel=1e-4)
        assert not sums[name].requires_grad
    # Where one is not reached, the other may say zero.
    for name in found.keys() | plain.keys():
        one, other = (grads.get(name, torch.zeros(1)) for grads in (found, plain))
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-6, name
    assert sum(gradient.norm() for gradient in plain.values()) > 0
    return student_reader.is_chunked


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("hf_layerprune.distillation.tiled_loss.LOGITS_PER_CHUNK_CPU", 260 * 5)


# Among them heads with a bias, a scale, a soft cap, layers of their own and tied weights; OPT's last hidden
# states are not those that its head reads.
@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "gemma2", "cohere", "granite", "phi", "bert", "minicpm3", "mamba", "opt", "bart"],
)
def test_tiles_change_nothing(name, small_tiles):
    assert check_against_whole_logits(tiny_model(name)) == (name not in ("opt", "bart"))


@pytest.mark.architectures
@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # transformers' own, for some tiny models
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"reformer"}))  # which trains in its own mode only
def test_tiles_change_nothing_for_any_type(name, small_tiles):
    check_against_whole_logits(tiny_model(name))


def test_one_tile_is_as_many():
    assert check_against_whole_logits(make_model("qwen3"))


def test_a_frozen_head_gets_no_gradient(small_tiles):
    model = make_model()
    model.lm_head.requires_grad_(False)
    assert check_against_whole_logits(model)
    assert reader(model).head_parameters() == []


def test_adapters_on_the_head_are_trained(small_tiles):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    assert check_against_whole_logits(model)
    assert len(reader(model).head_parameters()) == 2


def test_no_gradient_is_computed_where_none_is_asked_for(small_tiles):
    model = make_model()
    one, states = reader(model), torch.randn(7, 32)
    calls = []
    model.lm_head.register_full_backward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        total, _ = tiled_loss(one, states, one, states, torch.arange(7), losses, WEIGHTS | {"noted": 0.0})
    assert not total.requires_grad
    assert not calls


def test_the_loss_is_float32_inside_and_the_gradient_in_the_weights_precision():
    model = make_model().bfloat16()
    one, states = reader(model), torch.randn(7, 32).bfloat16().requires_grad_()
    seen = []

    def noted(own, theirs, targets):
        seen.append(own.dtype)
        return {"ce": cross_entropy(own, targets)}

    total, _ = tiled_loss(one, states, one, states.detach(), torch.arange(7), noted, {"ce": 1.0})
    total.backward()
    assert set(seen) == {torch.float32}
    assert total.dtype == torch.float32
    assert states.grad.dtype == model.lm_head.weight.grad.dtype == torch.bfloat16


def in_autocast(model, dtype):
    """As accelerate puts the precision of training into a model's forward."""
    forward = model.forward

    def cast(*args, **kwargs):
        with torch.autocast("cpu", dtype=dtype):
            return forward(*args, **kwargs)

    model.forward = functools.wraps(type(model).forward)(cast)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_head_once(dtype, small_tiles, monkeypatch):
    model = in_autocast(make_model(), dtype)
    one, states, targets = reader(model), torch.randn(37, 32), torch.arange(37)
    weight, seen = model.lm_head.weight, []
    model.lm_head.register_forward_hook(lambda module, *_: seen.append(module.weight))

    def loss_and_gradients():
        leaf = states.clone().requires_grad_()
        total, _ = tiled_loss(one, leaf, one, states + 1, targets, losses, WEIGHTS | {"noted": 0.0})
        scale = 2**16  # as a loss scaler multiplies
        (total * scale / 37).backward()
        return total, leaf.grad / scale, gradients(model)["lm_head.weight"] / scale

    total, slope, head = loss_and_gradients()
    assert len(seen) > 10
    assert len({id(weight) for weight in seen}) == 1
    assert seen[0].dtype == dtype
    assert model.lm_head.weight is weight
    monkeypatch.setattr(ChunkedLMHead, "cast_once", lambda self: contextlib.nullcontext())
    plain_total, plain_slope, plain_head = loss_and_gradients()
    assert torch.equal(total, plain_total)
    assert torch.equal(slope, plain_slope)
    assert torch.equal(head, plain_head)
    exact = make_model()
    leaf = states.clone().requires_grad_()
    reference = losses(exact.lm_head(leaf), exact.lm_head(states + 1).detach(), targets)
    (sum(WEIGHTS[name] * reference[name] for name in WEIGHTS) / 37).backward()
    for found, expected in ((slope, leaf.grad), (head, exact.lm_head.weight.grad)):
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_an_interrupted_loss_leaves_the_head_as_it_was():
    model = in_autocast(make_model(), torch.bfloat16)
    one, states, weight = reader(model), torch.randn(7, 32), model.lm_head.weight

    def interrupt(*_):
        assert model.lm_head.weight is not weight
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiled_loss(one, states, one, states, torch.arange(7), interrupt, {})
    assert model.lm_head.weight is weight
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_no_position_gives_no_loss():
    model = make_model()
    one, states = reader(model), torch.randn(0, 32, requires_grad=True)
    total, _ = tiled_loss(
        one, states, one, states.detach(), torch.arange(0), losses, WEIGHTS | {"noted": 0.0}
    )
    total.backward()
    assert total == 0
    assert states.grad.shape == (0, 32)


def test_memory_does_not_grow_with_the_length_of_the_text():
    assert LOGITS_PER_CHUNK_CPU * 4 <= 64 * 2**20


def test_tiles_are_larger_where_a_gpu_has_free_memory(monkeypatch):
    free = [0]
    monkeypatch.setattr("hf_layerprune.distillation.tiled_loss.free_gpu_memory", lambda device: free[0])
    assert logits_per_chunk(torch.device("cpu")) == LOGITS_PER_CHUNK_CPU
    assert logits_per_chunk(torch.device("cuda")) == 2**26
    free[0] = 16 * 2**30
    assert logits_per_chunk(torch.device("cuda")) == 2**27
    free[0] = None  # of other devices
    assert logits_per_chunk(torch.device("mps")) == 2**26
