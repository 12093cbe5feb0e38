import math

import pytest
import torch

from hf_layerprune.lineage import Lineage
from hf_layerprune.losses import (
    LAST,
    cross_entropy,
    hidden_mse,
    hidden_pairs,
    kl_divergence,
    token_mask,
)

from .conftest import tokens


def random_logits(seed, batch=2, length=5, vocabulary=7):
    return 3 * torch.randn(batch, length, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_mask_is_shifted_with_the_logits():
    ids = tokens(3, 5)
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 3, 4, 5], [1, 2, 3, -100, -100]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert token_mask(ids, labels).int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]]
    # Left padding predicts nothing, not even the first real token; nothing predicts padding.
    both = [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]]
    assert token_mask(ids, None, attention).int().tolist() == both
    assert token_mask(ids).all()


def test_cross_entropy_is_the_models_own():
    logits, ids = random_logits(0), tokens(2, 5) % 7
    mask = token_mask(ids)
    reference = 0.0
    for b in range(2):
        for t in range(4):
            reference -= math.log(logits[b, t].double().softmax(-1)[ids[b, t + 1]])
    assert float(cross_entropy(logits, ids, mask)) == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_and_its_gradient_are_the_definition(temperature):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    mask = token_mask(tokens(2, 5))
    mask[0, 2] = False
    found = kl_divergence(student, teacher, mask, temperature)
    exact = student.detach().double().requires_grad_()
    p = (teacher.double() / temperature).softmax(-1)
    q = (exact / temperature).softmax(-1)
    reference = (((p * (p / q).log()).sum(-1))[:, :-1] * mask).sum() * temperature**2
    assert found.item() == pytest.approx(reference.item(), rel=1e-6)
    found.backward()
    reference.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert student.grad[0, 2].abs().sum() == 0  # masked
    assert student.grad[:, -1].abs().sum() == 0  # predicts nothing
    assert student.grad[0, 0].abs().sum() > 0


def test_kl_of_a_distribution_with_itself_is_zero():
    logits = random_logits(0)
    assert kl_divergence(logits, logits.clone(), token_mask(tokens(2, 5))).item() == 0


def test_hidden_mse_is_the_definition():
    student, teacher = random_logits(0), random_logits(1)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    reference = (((student - teacher) ** 2).mean(-1)[:, :-1] * mask).sum()
    torch.testing.assert_close(hidden_mse(student, teacher, mask), reference)


@pytest.mark.parametrize(
    ("kept", "teacher_kept", "layers", "pairs"),
    [
        # Kept layers 0, 2, 4, 5 of 6: after the cuts come 2 (now 1) and 4 (now 2).
        ([0, 2, 4, 5], range(6), None, [(1, 2), (2, 4), (LAST, LAST)]),
        (range(6), range(6), None, [(LAST, LAST)]),
        ([1, 2, 3, 4, 5], range(6), None, [(0, 1), (LAST, LAST)]),
        # The last layer is gone: what the head reads is compared all the same.
        ([0, 1, 2], range(6), None, [(LAST, LAST)]),
        # The layer after the cut is the last one.
        ([0, 5], range(6), None, [(LAST, LAST)]),
        # A teacher that was cut itself.
        ([0, 2, 5], [0, 2, 4, 5], None, [(1, 1), (LAST, LAST)]),
        ([0, 2, 4, 5], range(6), [2, 3, 5], [(1, 2), (LAST, LAST)]),
        ([0, 2, 4, 5], range(6), [0, 4], [(0, 0), (2, 4)]),
    ],
)
def test_hidden_pairs_follow_the_lineage(kept, teacher_kept, layers, pairs):
    student, teacher = Lineage(6, list(kept)), Lineage(6, list(teacher_kept))
    assert hidden_pairs(student, teacher, layers) == pairs
