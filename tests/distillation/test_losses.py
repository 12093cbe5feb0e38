import json
import math
import os
import subprocess
import sys

import pytest
import torch

from hf_layerprune.data.targets import token_mask
from hf_layerprune.distillation.losses import divergence, hidden_error, hidden_pairs
from hf_layerprune.forward.hooks import LAST
from hf_layerprune.forward.token_losses import DIVERGENCES, HIDDEN_ERRORS, cross_entropy
from hf_layerprune.surgery.lineage import Lineage

from ..conftest import tokens


def random_logits(seed, positions=5, vocabulary=7):
    return 3 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_compiled_kl_is_the_same(temperature):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    teacher = random_logits(1)
    teacher[0, 3] = -math.inf
    found = []
    for compilation in (None, ("aot_eager", None)):
        for dtype in (torch.float32, torch.bfloat16):
            student = random_logits(0).to(dtype).requires_grad_()
            loss = divergence(student, teacher.to(dtype), "kl", temperature, compilation=compilation)
            (2 * loss).backward()
            found.append((loss.detach(), student.grad))
    torch.testing.assert_close(found[:2], found[2:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_mask_is_shifted_with_the_logits():
    ids = tokens(3, 5)
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, 3, 4, 5], [1, 2, 3, -100, -100]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert token_mask(ids, labels).int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]]
    # Left padding predicts nothing, not even the first real token; nothing predicts padding.
    both = [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]]
    assert token_mask(ids, None, attention).int().tolist() == both
    assert token_mask(ids).all()


def test_cross_entropy_is_the_definition():
    logits, targets = random_logits(0), tokens(1, 5)[0] % 7
    reference = sum(
        -math.log(row.double().softmax(-1)[said]) for row, said in zip(logits, targets, strict=True)
    )
    assert float(cross_entropy(logits, targets)) == pytest.approx(reference, rel=1e-6)


def kl(p, q):
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "beta", "definition"),
    [
        ("kl", 0.5, kl),
        ("reverse_kl", 0.5, lambda p, q: kl(q, p)),
        ("jsd", 0.5, lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2),
        ("jsd", 0.1, lambda p, q: 0.1 * kl(p, 0.1 * p + 0.9 * q) + 0.9 * kl(q, 0.1 * p + 0.9 * q)),
    ],
)
def test_divergences_and_their_gradients_are_the_definitions(kind, beta, definition, temperature):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    found = divergence(student, teacher, kind, temperature, beta)
    exact = student.detach().double().requires_grad_()
    p, q = (teacher.double() / temperature).softmax(-1), (exact / temperature).softmax(-1)
    reference = definition(p, q) * temperature**2
    assert found.item() == pytest.approx(reference.item(), rel=1e-5)
    found.backward()
    reference.backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_distribution_does_not_diverge_from_itself(kind):
    logits = random_logits(0)
    assert divergence(logits, logits.clone(), kind).item() == pytest.approx(0, abs=1e-6)


def test_errors_of_hidden_states_are_the_definitions():
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    error = ((student - teacher) ** 2).mean(-1)
    angles = (student * teacher).sum(-1) / student.norm(dim=-1) / teacher.norm(dim=-1)
    for kind, reference in {
        "mse": error.sum(),
        "normalized_mse": (error / (teacher**2).mean(-1)).sum(),
        "cosine": (1 - angles).sum(),
    }.items():
        found = hidden_error(student, teacher, kind)
        torch.testing.assert_close(found, reference)
        slopes = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (found, reference)]
        torch.testing.assert_close(*slopes)
    # Relative errors do not know the scale, also where the teacher's state is zero.
    scaled = hidden_error(1000 * student, 1000 * teacher, "normalized_mse")
    torch.testing.assert_close(scaled, hidden_error(student, teacher, "normalized_mse"))
    assert torch.isfinite(hidden_error(student * 0, teacher * 0, "normalized_mse"))


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


LIGER = """
import json
import torch
from hf_layerprune.distillation.losses import divergence, top_k_log_probs, liger_divergence

generator = torch.Generator().manual_seed(0)
ours, theirs = (torch.randn(9, 130, generator=generator) * 3 for _ in range(2))
found = []
for kind, beta in (("kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)):
    for taught in (theirs, top_k_log_probs(theirs, 5)):
        plain, fused = (ours.clone().requires_grad_() for _ in range(2))
        expected = divergence(plain, taught, kind, 1.0, beta)
        (expected * 3.7).backward()
        if taught is theirs:
            parts = fused.log_softmax(-1), theirs.log_softmax(-1)
        else:
            others = fused.scatter(-1, taught.ids, float("-inf")).logsumexp(-1, keepdim=True)
            lumped = torch.cat([fused.gather(-1, taught.ids), others], -1)
            parts = lumped - fused.logsumexp(-1, keepdim=True), taught.log_probs
        total = liger_divergence(*parts, kind, beta)
        (total * 3.7).backward()
        apart = (fused.grad - plain.grad).abs().max() / plain.grad.abs().max()
        found.append([expected.item(), total.item(), apart.item()])
print(json.dumps(found))
"""


def test_liger_computes_the_same():
    """Its kernels run on a GPU; here Triton's interpreter runs them."""
    done = subprocess.run(
        [sys.executable, "-c", LIGER],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8
    for expected, total, apart in found:
        assert expected > 1
        assert total == pytest.approx(expected, rel=1e-5)
        assert apart < 1e-5


@pytest.mark.parametrize("kind", HIDDEN_ERRORS)
def test_states_of_several_streams_count_as_one(kind):
    """As those that layers of DeepSeek V4 pass on: the mean is over all features of a position."""
    student, teacher = torch.randn(2, 5, 3, 4).unbind()
    expected = hidden_error(student.reshape(5, 12), teacher.reshape(5, 12), kind)
    assert hidden_error(student, teacher, kind) == expected
