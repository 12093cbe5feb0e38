"""Cached teacher logits that are sampled: unbiased, where the top-k tokens are not."""

import pytest
import torch

from hf_layerprune import LayerPruneError, cache_teacher_logits
from hf_layerprune.commands.cli import main
from hf_layerprune.distillation.losses import divergence, top_k_log_probs
from hf_layerprune.distillation.sampled_tokens import SampledTokens, sample_tokens
from hf_layerprune.distillation.teacher_cache import CachedTeacherLogits, _offsets

from ..conftest import logits, make_model, tokens
from .test_teacher_cache import loader, padding, ragged
from .test_trainer import gradients, make_trainer, students


COUNT, DRAWS, VOCABULARY = 6, 20_000, 40


def loss_and_gradient(student, teacher, temperature=1.0):
    student = student.detach().clone().requires_grad_()
    loss = divergence(student, teacher, "kl", temperature)
    loss.backward()
    return float(loss.detach()), student.grad


def some_logits(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(2, 1, VOCABULARY, generator=generator)).unbind()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampling_is_unbiased_and_top_k_is_not(temperature):
    ours, theirs = some_logits()
    exact_loss, exact = loss_and_gradient(ours, theirs, temperature)
    offsets = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1))
    sampled = sample_tokens(theirs.expand(DRAWS, -1), COUNT, offsets, temperature)
    assert sampled.ids.shape == (DRAWS, COUNT)
    total, each = loss_and_gradient(ours.expand(DRAWS, -1), sampled, temperature)
    error = each.std(0) / DRAWS**0.5  # the standard error of each component
    assert ((each.mean(0) - exact[0]).abs() <= 4 * error + 1e-6).all()
    off = (each.mean(0) - exact[0]).norm()
    assert off < 0.03 * exact.norm()
    assert total / DRAWS == pytest.approx(exact_loss, rel=0.01)
    # With as many tokens, top-k is off by far more, however often it is computed.
    top_k_loss, top_k = loss_and_gradient(ours, top_k_log_probs(theirs, COUNT, temperature), temperature)
    assert (top_k - exact).norm() > 10 * off
    assert ((top_k[0] - exact[0]).abs() > 4 * error + 1e-6).sum() > VOCABULARY / 2
    assert top_k_loss < 0.9 * exact_loss


def test_systematic_sampling_varies_less_than_independent_draws():
    ours, theirs = some_logits()
    offsets = torch.rand(2_000, generator=torch.Generator().manual_seed(1))
    sampled = sample_tokens(theirs.expand(2_000, -1), COUNT, offsets)
    drawn = torch.multinomial(theirs.softmax(-1).expand(2_000, -1), COUNT, replacement=True)
    spreads = [
        loss_and_gradient(ours.expand(2_000, -1), SampledTokens(ids, sampled.entropy))[1].var(0).sum()
        for ids in (sampled.ids, drawn)
    ]
    assert spreads[0] < 0.7 * spreads[1]


def test_tokens_without_probability_are_never_sampled():
    theirs = torch.full((1, 5), float("-inf"))
    theirs[0, 2] = 0.0
    for offset in (0.0, 0.5, 0.9999999):
        sampled = sample_tokens(theirs, 3, torch.tensor([offset]))
        assert sampled.ids.tolist() == [[2, 2, 2]]
        assert float(sampled.entropy) == pytest.approx(0, abs=1e-6)
    loss, gradient = loss_and_gradient(torch.zeros(1, 5), sampled)
    assert loss == pytest.approx(torch.tensor(5.0).log().item(), rel=1e-5)
    assert gradient.isfinite().all()


def test_a_run_reads_sampled_tokens_as_it_would_the_teacher(tokenizer):
    """With so many samples that the estimate is almost exact."""
    results = []
    for is_cached in (False, True):
        student, teacher = students()
        if is_cached:
            batches = loader(ragged().select(range(7, -1, -1)), padding(tokenizer), 3)
            cache_teacher_logits(teacher, batches, "sampled", top_k=200, sampling=True)
        trainer = make_trainer(
            student,
            ragged(),
            padding(tokenizer),
            teacher_model="sampled" if is_cached else teacher,
            processing_class=tokenizer,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        results.append(gradients(trainer))
    (exact, logged), (found, read) = results
    assert read["kl"] == pytest.approx(logged["kl"], rel=0.05)
    norm = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    off = torch.cat([(found[name] - gradient).flatten() for name, gradient in exact.items()]).norm()
    assert off < 0.1 * norm


def test_a_row_is_sampled_alike_in_every_order():
    model = make_model()
    whole, batch = {"input_ids": tokens(4, 9)}, {"input_ids": tokens(4, 9)[[2]]}
    cache_teacher_logits(model, [whole], "whole", top_k=5, sampling=True)
    cache_teacher_logits(model, [batch], "one", top_k=5, sampling=True)
    found = [CachedTeacherLogits(folder).read(batch, [])[0] for folder in ("whole", "one")]
    assert torch.equal(found[0].ids, found[1].ids)
    log_probs = logits(model, batch["input_ids"]).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[:, :-1]
    torch.testing.assert_close(found[0].entropy[:, :-1], entropy)
    numbers = _offsets([b"one", b"another"], torch.ones(2, 3, dtype=torch.bool))
    assert len(set(numbers.tolist())) == 6


def test_what_sampled_tokens_cannot_do_is_refused(tokenizer):
    student, teacher = students()
    batches = loader(ragged(), padding(tokenizer), 3)
    cache_teacher_logits(teacher, batches, "sampled", top_k=5, sampling=True)
    with pytest.raises(LayerPruneError, match=r"divergence is 'jsd', but sampled holds sampled tokens"):
        make_trainer(student, ragged(), padding(tokenizer), teacher_model="sampled", divergence="jsd")
    with pytest.raises(LayerPruneError, match="cached logits with another sampling"):
        cache_teacher_logits(teacher, batches, "sampled", top_k=5)


def test_the_command_samples(folder, capsys):
    words = ["cache-teacher", folder, "--data", "text.txt", "--sequence_length", "16", "--top_k", "7"]
    assert main([*words, "--output_dir", "sampled", "--sampling"]) == 0
    assert "`hf-layerprune distill --teacher` reads them" in capsys.readouterr().out
    cache = CachedTeacherLogits("sampled")
    assert cache.sampling
    assert cache.top_k == 7
